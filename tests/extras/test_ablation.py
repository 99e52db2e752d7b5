"""The lesson: one setting varies, everything else is the same; so each variant is what grasp.py makes of it alone."""
import json
import re
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import evaluate
import grasp
from tests.conftest import ROOT, another_tokenizer, error_of, job_of, random_model, random_tokens
from data.checkpoint import load_checkpoint
from data.corpus import random_windows
from extras import ablation
from extras.controls import drop_layers
from extras.ablation import ablate, held, in_common, ratio_of_size, spread, studies
from runtime import cli, job

BASE = {"calibration": "a", "samples": 4, "seed": 42, "score": "taylor", "iterative": False, "ratio": 0.4,
        "threshold": None, "label_shift": 1, "group": None}


def setup():
    """A dense model, windows of two calibration texts and of one to evaluate on."""
    model = random_model(dim=32, head_dim=8, hidden_dim=56)
    windows = {(text, 4, 42): random_tokens(model, 4, 12, seed) for seed, text in enumerate("ab")}
    return model, windows, {"text": (random_tokens(model, 3, 12, seed=9), None)}


def variants(changes):
    return [(f"{change}", {**BASE, **change}) for change in changes]


def test_each_variant_is_grasp_alone_on_a_fresh_model():
    model, windows, texts = setup()
    changes = [{}, {"score": "gradient"}, {"score": "magnitude"}, {"iterative": True}, {"calibration": "b"},
               {"ratio": None, "threshold": 0.3}, {"label_shift": 2}, {"score": "signed"}, {}]
    rows = list(ablate(job_of(model, texts), variants(changes), windows, layers=2))
    for row, change in zip(rows, changes):
        s = {**BASE, **change}
        alone, _, _ = setup()
        sweep = partial(cli.batches, windows[s["calibration"], 4, 42], 2)
        *_, redundant = grasp.find_redundant(alone, sweep, 2)
        records = list(grasp.compress(alone, redundant, sweep, s["ratio"], s["threshold"], s["score"], s["iterative"],
                                        label_shift=s["label_shift"]))
        assert row["redundant"] == redundant and row["matrices"] == records and row["settings"] == s
        assert row["parameters"] == alone.n_params < model.n_params
        assert row["perplexity"]["text"] == evaluate.perplexity(alone, texts["text"][0].split(2))
    assert len({row["perplexity"]["text"] for row in rows}) == 8  # the last is the first again
    assert rows[-1]["perplexity"] == rows[0]["perplexity"]


def test_the_dense_model_is_whole_after_every_variant_and_after_an_error(monkeypatch):
    model, windows, texts = setup()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def untouched():
        return model.state_dict().keys() == before.keys() and all(
            torch.equal(p, before[name]) and not p.requires_grad for name, p in model.named_parameters())

    changes = [{}, {"iterative": True}, {"score": "magnitude"}, {"calibration": "b"}]
    for row in ablate(job_of(model, texts), variants(changes), windows, layers=2):
        assert row["parameters"] < model.n_params and untouched()
    monkeypatch.setattr(job, "result_row", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(ablate(job_of(model, texts), variants([{}]), windows, layers=2))
    assert untouched()


def test_the_same_windows_are_swept_once(monkeypatch):
    model, windows, texts = setup()
    calls = []

    def counted(function, *words):
        calls.append(function.__name__)
        return function(*words)

    for function in (ablation.find_redundant, ablation.weight_gradients):
        monkeypatch.setattr(ablation, function.__name__, partial(counted, function))
    one = variants([{}, {"score": "gradient"}, {"iterative": True}, {"calibration": "b"}])
    list(ablate(job_of(model, texts), one, windows, layers=2))
    assert calls == ["find_redundant", "weight_gradients"] * 2
    calls.clear()
    rows = list(ablate(job_of(model, texts), one, windows, layer_ids=[3, 0]))
    assert calls == ["weight_gradients"] * 2 and all(row["redundant"] == [0, 3] for row in rows)


def test_what_is_swept_once_counts_in_the_seconds_of_each_that_uses_it(monkeypatch):
    model, windows, texts = setup()

    def slow(seconds, phase, device):
        seconds[phase] = seconds.get(phase, 0) + {"redundancy": 1, "attribution": 10, "compression": 100}[phase]
        return nullcontext()

    monkeypatch.setattr(cli, "timed", slow)
    changes = [{}, {"score": "gradient"}, {"score": "magnitude"}, {"iterative": True}]
    rows = ablate(job_of(model, texts), variants(changes), windows, layers=2)
    assert [row["seconds"] for row in rows] == [111, 111, 101, 101]


def test_fewer_samples_are_the_first_of_more():
    tokens = torch.arange(9000)
    more, _ = random_windows(tokens, 512, 16, 42)
    for name, change in studies(samples=[64, 128, 256])["samples"]:
        fewer, _ = random_windows(tokens, change["samples"], 16, 42)
        assert name == f"{len(fewer)} samples" and torch.equal(fewer, more[:len(fewer)])


def test_the_ratio_of_a_size_by_hand():
    """A 100 x 100 matrix at rank k holds 200 k parameters, and so from the ratio k / 50 on."""
    find = partial(ratio_of_size, [(100, 100)])
    assert find(2000) == 0.2 and find(2199) == 0.22 and 0.2 <= find(2099) < 0.22 and find(2101) == 0.22
    assert 0 < find(0) <= 0.04 and find(10 ** 4) == 1.0 and find(10 ** 9) == 1.0
    assert held([(100, 100)], 0.2) == 2000 and held([(100, 100)], 1.0) == held([(100, 100)]) == 10 ** 4


def test_threshold_and_ratio_are_compared_at_equal_size():
    """No other ratio comes nearer to what the threshold kept."""
    model, windows, texts = setup()
    pairs = [(name, {**BASE, **change}) for name, change in studies(thresholds=[0.3, 0.5])["budget"]]
    rows = list(ablate(job_of(model, texts), pairs, windows, layers=2))
    assert [row["model"].split()[0] for row in rows] == ["threshold", "ratio"] * 2
    shapes = 2 * [p.shape for name, p in model.layers[0].named_parameters() if "norm" not in name]
    removed = [sum(max(0, m * n - max(1, i * m * n // (1000 * (m + n))) * (m + n)) for m, n in shapes)
               for i in range(1, 1001)]  # by the ratios 0.001, 0.002 ... 1
    for adaptive, uniform in zip(rows[::2], rows[1::2]):
        asked, found = adaptive["settings"], uniform["settings"]
        assert asked["ratio"] is None and found["threshold"] is None and uniform["model"] == f"ratio {found['ratio']}"
        gap = adaptive["parameters"] - model.n_params
        assert abs(uniform["parameters"] - adaptive["parameters"]) == min(abs(gap + less) for less in removed)
        of_squares = [{r["rank"] for r in row["matrices"] if r["shape"] == [32, 32]} for row in (adaptive, uniform)]
        assert len(of_squares[0]) > 1 and len(of_squares[1]) == 1
    assert [row["in_common"] is None for row in rows] == [True, False] * 2  # a ratio is compared with its threshold


def test_components_in_common_by_hand():
    def records(**kept):
        return [{"name": name, "kept": ids} for name, ids in kept.items()]

    first = records(wq=[0, 1, 2, 3], wk=[4, 5], w1=None, w2=[0])
    assert in_common(records(wq=[1, 2, 3, 9], wk=[6, 7], w1=[0], w2=None, w3=[1]), first) == 3 / 6
    assert in_common(first, first) == 1 and in_common(records(w3=[1]), first) is None


def test_spread_by_hand():
    """2, 4, 9: mean 5, squared distances 9 + 1 + 16, over n - 1 = 2."""
    rows = [{"perplexity": {"ptb": value}} for value in (2.0, 4.0, 9.0)]
    assert spread(rows, ["ptb"]) == f"3 seeds, mean and standard deviation (n - 1): ptb 5.00 and {13 ** 0.5:.2f}"


def test_layers_that_are_low_rank_already_cannot_be_varied():
    model, windows, texts = setup()
    list(grasp.compress(model, [1], lambda label: [windows["a", 4, 42]], ratio=0.4))
    with pytest.raises(ValueError, match=r"layers \[1\] are low-rank already"):
        next(ablate(job_of(model, texts), variants([{}]), windows, layer_ids=[1]))
    row = next(ablate(job_of(model, texts), variants([{}]), windows, layer_ids=[1, 2]))
    assert len(row["matrices"]) == 7 and row["matrices"][0]["name"] == "layers.2.attention.wq"


# ------------------------------------------------------------------------------------------------ the command

QUICK = ["--seq-len", "64", "--windows", "4"]


def report(main, words, monkeypatch, file):
    monkeypatch.setattr(sys, "argv", ["command", *QUICK, *words.split()])
    cli.command(main)
    return json.loads(file.read_text())


@pytest.mark.parametrize("words, names", [
    ("calibration --samples 4 --calibration embedded README.md", ["embedded", "README.md"]),
    ("samples --samples 4 8", ["4 samples", "8 samples"]),
    ("schedule --samples 4", ["one-shot", "iterative"]),
    ("budget --samples 4 --thresholds 0.4", ["threshold 0.4", "ratio"]),
    ("seeds --samples 4", ["seed 42", "seed 43", "seed 44", "seed 45", "seed 46"])])
def test_a_table_for_each_study(words, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = report(ablation.main, f"{words} --layers 2 --json {tmp_path}/a.json", monkeypatch, tmp_path / "a.json")
    rows, out = found["results"], capsys.readouterr().out
    assert len(rows) == len(names) + 1
    for row, name in zip(rows, ["dense", *names]):
        perplexity = row["perplexity"]["embedded"]
        assert row["model"].startswith(name)
        assert re.search(rf"\| {row['model']} +\| +{row['parameters']:,} .* {perplexity:.2f} \|", out)
    assert out.count("  layers [") == len(names) and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert ("standard deviation" in out) == words.startswith("seeds")


def test_the_grid_of_scores_ratios_and_seeds(tmp_path, monkeypatch, capsys):
    """Each cell is the mean over the seeds of what grasp.py gives; plain SVD and dropped layers have no seeds."""
    monkeypatch.chdir(ROOT)
    found = report(ablation.main, "labels --samples 4 --layer-ids 3 5 --ratio 0.1 0.4 --seeds 1 2 --label-shifts 1 2 "
                   f"--json {tmp_path}/a.json --figure {tmp_path}/a.png", monkeypatch, tmp_path / "a.json")
    rows, out = found["results"][1:], capsys.readouterr().out
    ranked = [f"{score}, label shift {shift}" for shift in (1, 2) for score in ("taylor", "signed", "gradient")]
    counts = Counter(row["model"] for row in rows)
    assert counts == {**dict.fromkeys([*ranked, "random"], 4), "magnitude": 2, "dropped": 1}
    assert all(row["redundant"] == [3, 5] for row in rows)
    for name in ranked:
        of = [row for row in rows if row["model"] == name and row["settings"]["ratio"] == 0.4]
        low, high = (row["perplexity"]["embedded"] for row in of)
        assert f"| {name}" in out and f"{(low + high) / 2:.2f} ± {abs(low - high) / 2 ** 0.5:.2f}" in out
    dropped, = (row for row in rows if row["model"] == "dropped")
    assert f"the layers dropped: embedded {dropped['perplexity']['embedded']:.2f}" in out
    model = load_checkpoint(cli.TINY)
    drop_layers(model, [3, 5])
    assert dropped["parameters"] == model.n_params and not dropped["matrices"]
    assert {row["parameters"] for row in rows if row["settings"]["ratio"] == 0.1} == {
        row["parameters"] for row in rows if row["model"] == "magnitude" and row["settings"]["ratio"] == 0.1}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_random_components_are_as_many_and_follow_the_seed():
    model, windows, texts = setup()
    first, again, other = (row["matrices"] for row in ablate(job_of(model, texts), variants(
        [{"score": "random", "seed": seed} for seed in (1, 1, 2)]), {("a", 4, 1): windows["a", 4, 42],
                                                                     ("a", 4, 2): windows["a", 4, 42]}, layer_ids=[1, 2]))
    assert first == again != other and [r["rank"] for r in first] == [r["rank"] for r in other]
    shares = [r["kept"].count(0) for r in first + other]
    assert 0 < sum(shares) < len(shares)  # the largest singular value has no advantage


def test_mean_and_deviation_by_ratio_by_hand():
    rows = [{"model": name, "settings": {"ratio": ratio}, "perplexity": {"ptb": value}}
            for name, ratio, value in (("a", 0.1, 2.0), ("a", 0.1, 4.0), ("a", 0.2, 3.0), ("b", None, 7.0))]
    assert ablation.by_ratio(rows, "ptb") == {"a": {0.1: (3, 2 ** 0.5), 0.2: (3, 0)}, "b": {None: (7, 0)}}


def test_a_row_is_the_row_of_the_command_grasp(nowhere, monkeypatch, capsys):
    seeds = report(ablation.main, "seeds --seeds 5 6 --samples 6 --layers 2 --ratio 0.2 --json a.json", monkeypatch,
                   nowhere / "a.json")
    alone = report(grasp.main, "--seed 6 --samples 6 --layers 2 --ratio 0.2", monkeypatch,
                   nowhere / "tiny-grasp/report.json")
    ours, theirs = seeds["results"], alone["results"]
    assert ours[0]["perplexity"] == theirs[0]["perplexity"] and ours[2]["perplexity"] == theirs[1]["perplexity"]
    assert ours[2]["parameters"] == theirs[1]["parameters"]
    assert ours[2]["matrices"] == alone["matrices"] and ours[2]["redundant"] == alone["redundant"]
    assert ours[1]["matrices"] != ours[2]["matrices"] and 0 < ours[2]["in_common"] < 1


@pytest.mark.parametrize("words, message", [
    ("", "the following arguments are required: STUDY"),
    ("speed --layers 2", "STUDY: invalid choice: 'speed'"),
    ("score", "give one of --layers N and --layer-ids"),
    ("score --layers 2 --layer-ids 1", "give one of --layers N and --layer-ids"),
    ("score --layers 9", "this model has 8 layers, 0 to 7; asked for 9"),
    ("score --layer-ids 8", "this model has 8 layers, 0 to 7; asked for [8]"),
    ("score --layer-ids 3 3", "expected some of them, each once"),
    ("score --layers 2 --label-shifts 1 2", "--label-shifts [1, 2]: the labels study varies it, the score study takes 1"),
    ("samples --layers 2 --ratio 0.1 0.2", "--ratio [0.1, 0.2]: the score study varies it, the samples study takes 1"),
    ("labels --layers 2 --seq-len 8 --label-shifts 1 8", "--label-shifts [1, 8]: expected less than 8, the window"),
    ("score --layers 2 --eval none", "--eval none: the score study compares perplexities"),
    ("labels --layers 2 --seeds 1 1", "--seeds: the labels study takes at least 1, each once; got [1, 1]"),
    ("samples --layers 2 --figure a.png", "--figure: for the studies score and labels"),
    ("score --layers 2 --samples 4 8", "--samples [4, 8]: the samples study varies it, the score study takes 1"),
    ("score --layers 2 --thresholds 0.1", "--thresholds [0.1]: the budget study varies it, the score study takes none"),
    ("samples --layers 2 --samples 4", "--samples: the samples study takes at least 2, each once; got [4]"),
    ("samples --layers 2 --samples 4 4", "at least 2, each once; got [4, 4]"),
    ("seeds --layers 2 --seeds -1 2", "argument --seeds: '-1', expected a whole number from 0 to 2^63 - 1"),
    ("budget --layers 2 --ratio 0.1", "--ratio: the budget study finds its ratios itself, by --thresholds"),
    ("budget --layers 2 --thresholds 1.5", "--thresholds: '1.5', expected more than 0 and at most 1"),
    ("calibration --layers 2", "--calibration: the calibration study takes at least 2, each once; got none"),
    ("calibration --layers 2 --calibration embedded nowhere", "no text 'nowhere': expected wikitext2, ptb, embedded"),
    ("calibration --layers 2 --calibration embedded short", "the calibration text has 3 tokens, too few"),
    ("score --layers 2 --eval short", "the evaluation text has 3 tokens, too few"),
])
def test_mistakes_are_one_line_before_any_sweep(words, message, nowhere, monkeypatch, capsys):
    (nowhere / "short").write_text("if x")
    monkeypatch.setattr(job, "result_row", None)
    assert message in error_of(ablation.main, words, monkeypatch, capsys)


def test_texts_that_the_study_compares_are_never_replaced(nowhere, monkeypatch, capsys):
    shutil.copytree(cli.TINY, "dense")  # a model like any other: it is not known by its tokenizer
    another_tokenizer("dense")
    error = error_of(ablation.main, "calibration --layers 2 --ckpt dense", monkeypatch, capsys)
    assert "wikitext-2-raw/wiki.train.raw: not in " in error


def test_files_of_one_name_are_two_variants():
    names = [name for name, _ in studies(["a/text", "b/text"])["calibration"]]
    assert names == ["a/text", "b/text"]
    assert [name for name, _ in studies(["a/text", "ptb"])["calibration"]] == ["text", "ptb"]
