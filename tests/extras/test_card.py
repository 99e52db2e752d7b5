"""The lesson: an exported folder says in its README.md what the model is, and nothing that is not known."""
import json
import re
import shutil

import pytest

import grasp
from tests.conftest import error_of, output_of, random_model
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras import controls, export
from extras.export.__main__ import main
from extras.export.card import card
from extras.fisher.__main__ import main as fisher_main
from tests.extras.test_export import TINY, compressed

QUICK = "--samples 2 --seq-len 16 --windows 1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exported(ckpt, capsys, words=""):
    """The model card of a folder that the command writes, without paths of this machine."""
    shutil.rmtree("out", ignore_errors=True)
    output_of(main, f"--ckpt {ckpt} --out out {words}", capsys)
    with open("out/README.md", encoding="utf-8") as file:
        text = file.read()
    assert not re.search(r"[^:/\w]/\w", text), text
    return text


def test_a_folder_of_grasp(here, capsys):
    file = here / "text.txt"
    file.write_text("It is a text of some words, and more of them. " * 100)
    output_of(grasp.main, f"--layer-ids 3 5 {QUICK} --calibration {file} --eval embedded {file} --out small", capsys)
    text, report = exported("small", capsys), json.loads((here / "small/report.json").read_text())
    dense, made = report["results"]
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- llama\n---\n\n# out\n\n- Base model: `tiny`\n")
    assert "- Method: GRASP ([arXiv 2501.00339](https://arxiv.org/abs/2501.00339)), ratio 0.1\n" in text
    assert "- Calibration: text.txt; the file as it stands; " in text and "2 random windows of 16, seed 42\n" in text
    assert f"- Parameters: {dense['parameters']:,} before, {made['parameters']:,} after, " in text
    assert f"- In this folder: {dense['parameters']:,} parameters, because the weights are dense again" in text
    assert "- Low-rank: 14 matrices, of layers 3, 5: " in text
    for row in dense, made:
        assert " | ".join(f"{perplexity:8.2f}" for perplexity in row["perplexity"].values()) in text
    assert "text.txt: the file as it stands; " in text and "first 1 window of " in text
    assert "Measured in float32, before the export.\n" in text
    assert "The license of the base model applies to these weights." in text


def test_how_it_is_loaded_depends_on_the_format(here, capsys):
    save_checkpoint(compressed(load_checkpoint(TINY)), here / "small", tokenizer=load_tokenizer(TINY).files)
    hf, low_rank, meta = (exported("small", capsys, f"--format {layout}") for layout in ("hf", "hf-lowrank", "meta"))
    assert 'AutoModelForCausalLM.from_pretrained("out")\n' in hf
    assert 'from_pretrained("out", trust_remote_code=True)\n' in low_rank and "- low-rank\n" in low_rank
    assert "In this folder" not in low_rank
    assert meta.startswith("---\ntags:\n- llama\n---\n") and 'load_checkpoint("out")' in meta
    for text in hf, low_rank, meta:  # a compressed folder without a report
        assert "- Base model: not known, the folder had no report.json\n" in text
        assert "% removed" in text and "## Perplexity" not in text and "Calibration" not in text


def test_a_dense_folder_is_its_own_base(here, capsys):
    text = exported(TINY, capsys)
    assert "- Base model: `tiny`\n- Parameters: 886,368\n\n## Loading" in text
    hub = here / "models--org--name-7b/snapshots/0123"
    shutil.copytree(TINY, hub)
    text = exported(hub, capsys)
    assert "base_model: org/name-7b\n---" in text and "- Base model: `org/name-7b`\n" in text


def test_other_methods_and_their_order(here, capsys):
    """Second-order pruning by channels, then GRASP of what is left, which a training would follow."""
    output_of(fisher_main, f"--budget 0.1 --layers 2 {QUICK} --out one", capsys)
    output_of(grasp.main, f"--ckpt one --layer-ids 0 {QUICK} --eval none --score magnitude --out two", capsys)
    text, report = exported("two", capsys), json.loads((here / "two/report.json").read_text())
    first = text.index("Method: second-order pruning, `extras.fisher --shape free --budget 0.1`\n")
    assert text.index("Method: plain SVD, ratio 0.1\n") > first and "- Base model: `tiny`\n" in text
    assert f"- Parameters: 886,368 before, {report['parameters_after']:,} after, " in text
    assert re.search(r"- Narrower feed-forwards: layers \d, \d: \d+ to \d+ of 256 channels\n", text)
    assert text.count("## Perplexity") == 1
    report["input"] = {"settings": {**report["input"]["settings"], "shape": "llama", "remove": 0.2}, "kept": {},
                       "results": [], "protocol": {}}
    assert "`extras.fisher --shape llama --remove 0.2`\n" in card(load_checkpoint("two"), report, "hf", "out")
    log = [{"step": 0, "loss": None, "held_out": 3.5}, {"step": 64, "loss": 3.1, "held_out": 3.0}]
    report["recovery"] = {"settings": {"lora": None}, "log": log}
    trained = card(load_checkpoint("two"), report, "hf", "out")
    assert "Then trained: the factors, 64 steps; held-out loss 3.5000 to 3.0000 nats per token\n" in trained
    output_of(grasp.main, f"--layers 1 {QUICK} --out three", capsys)
    output_of(controls.main, "dropped --ckpt three", capsys)
    text = exported("three-dropped", capsys)
    assert "- Method: a control for comparison: dropped\n" in text and "% removed" not in text


def test_a_method_of_the_comparison_has_a_row_of_its_own():
    report = {"settings": {"ckpt": "/a/base", "dtype": "torch.float32"}, "parameters_before": 9000, "protocol": {},
              "results": [{"method": "llm-pruner", "perplexity": {}}]}
    text = card(random_model(), report, "hf", "out")
    assert "- Base model: `base`\n- Method: llm-pruner\n" in text


def test_both_calibration_texts_are_named():
    """ "A+B" is two texts, and a plus in the name of one file is not."""
    report = {"settings": {"ckpt": "/a/base", "calibration": "wikitext2+/a/c4.txt"}, "results": [{"method": "svd"}],
              "calibration": {"parts": [], "protocol": "two protocols"}}
    assert "- Calibration: wikitext2 + c4.txt; two protocols\n" in card(random_model(), report, "hf", "out")
    report["calibration"] = {"protocol": "one protocol"}
    report["settings"]["calibration"] = "/a/b+c.txt"
    assert "- Calibration: b+c.txt; one protocol\n" in card(random_model(), report, "hf", "out")


def test_a_report_of_another_kind_is_one_line(here, monkeypatch, capsys):
    model = compressed(load_checkpoint(TINY))
    save_checkpoint(model, here / "small", {"parameters_after": 1}, load_tokenizer(TINY).files)
    error = error_of(main, "--ckpt small --out out", monkeypatch, capsys)
    assert "small: report.json, for the model card: 'settings'" in error
    assert [path.name for path in here.iterdir()] == ["small"]
    export.export(model, load_tokenizer(TINY), here / "out")  # without a source nothing is read
    assert "not known" in (here / "out/README.md").read_text()
