"""The lesson: the commands as a user meets them, first without mistakes, then with them."""
import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import grasp
from tests.conftest import ROOT, another_tokenizer, error_of, output_of, random_model, run, start
from model import ModelArgs, Transformer
from runtime import cli
from runtime.cli import TINY, batch_size, batches, open_checkpoint, pick_device, sequence_length, timed

QUICK = ["--layers", "2", "--samples", "6", "--seq-len", "64", "--windows", "4", "--ratio", "0.2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The whole job as a user starts it: (the folder where it ran, what it printed)."""
    folder = tmp_path_factory.mktemp("job")
    done = run(ROOT / "grasp.py", *QUICK, "--out", "small", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_whole_job_and_its_evaluation(job, tmp_path):
    folder, out = job
    assert sorted(p.name for p in folder.iterdir()) == ["small"]
    assert sorted(p.name for p in (folder / "small").iterdir()) == [
        "consolidated.00.pth", "params.json", "report.json", "tokenizer.model"]
    report = json.loads((folder / "small/report.json").read_text())
    rows = {row["model"]: row for row in report["results"]}
    assert list(rows) == ["dense", "GRASP"] and all(name in out for name in rows)
    assert len(report["cosines"]) == 8 and len(report["redundant"]) == 2 and len(report["matrices"]) == 14
    assert len(report["calibration"]["offsets"]) == 6 and report["settings"]["ratio"] == 0.2
    assert report["parameters_after"] == rows["GRASP"]["parameters"] < report["parameters_before"]
    assert all(len(r["kept"]) == r["rank"] for r in report["matrices"])
    assert {*report["seconds"]} == {"redundancy", "attribution", "compression"}
    assert rows["GRASP"]["seconds"] == report["seconds"]["redundancy"] + report["seconds"]["compression"]
    for r in report["matrices"]:
        assert r["kept"] == sorted(set(r["kept"])) and r["kept"][-1] < min(r["shape"])

    kept = f"{100 * report['parameters_after'] / report['parameters_before']:.1f}"
    again = run(ROOT / "evaluate.py", "--ckpt", "small", "--data", "embedded", "--windows", 4,
                "--json", tmp_path / "e.json", cwd=folder)
    assert again.returncode == 0, again.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["perplexity"]["embedded"] == pytest.approx(rows["GRASP"]["perplexity"]["embedded"],
                                                             rel=1e-5)
    assert f"{result['perplexity']['embedded']:.2f}" in again.stdout and f" {kept} " in again.stdout
    assert result["parameters"] == report["parameters_after"]


def test_the_embedded_model_by_any_path_and_layers_by_hand(nowhere, capsys):
    words = ["--ckpt", ROOT / "data/../data/tiny", "--layer-ids", 6, 2, "--threshold", 0.5, "--samples", 4,
             "--windows", 2, "--iterative"]
    out = output_of(grasp.main, words, capsys)
    assert "embedded ppl" in out
    report = json.loads((nowhere / "tiny-grasp/report.json").read_text())
    assert report["redundant"] == [2, 6] and report["matrices"][0]["name"] == "layers.6.feed_forward.w1"


def test_dtype_is_the_dtype_of_the_written_weights(nowhere, capsys):
    out = output_of(grasp.main, [*QUICK, "--dtype", "bfloat16", "--eval", "none"], capsys)
    assert "device       cpu, dtype bfloat16\n" in out and "ppl" not in out
    table = torch.load(nowhere / "tiny-grasp/consolidated.00.pth", weights_only=True)
    assert {t.dtype for t in table.values()} == {torch.bfloat16}


def test_one_seed_gives_identical_folders(job, nowhere, capsys):
    """In another process, and into another folder."""
    output_of(grasp.main, [*QUICK, "--out", "again"], capsys)
    small, again = job[0] / "small", nowhere / "again"
    for file in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (small / file).read_bytes() == (again / file).read_bytes(), file
    a, b = (json.loads((folder / "report.json").read_text()) for folder in (small, again))
    for measured in ("seconds", "results", "settings"):  # times, memory, and --out
        a.pop(measured), b.pop(measured)
    assert a == b


def test_a_folder_made_from_the_embedded_model_takes_its_text(tmp_path):
    """It is known by the bytes of its tokenizer."""
    parser = cli.Parser("A command: python -m name")
    cli.model_flags(parser, "model")
    cli.evaluation_flags(parser)

    def texts():
        return parser.parse_args(["--ckpt", str(tmp_path)]).eval

    assert texts() == ["wikitext2", "ptb"]
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert texts() == ["embedded"]
    another_tokenizer(tmp_path)
    assert texts() == ["wikitext2", "ptb"]


@pytest.mark.parametrize("main", [grasp.main, evaluate.main])
def test_help_shows_the_defaults(main, capsys):
    assert "default: the embedded model" in output_of(main, "--help", capsys)


@pytest.mark.parametrize("main", [grasp.main, evaluate.main])
def test_help_says_the_default_of_each_flag(main, monkeypatch):
    """The numbers and names; "auto" is explained in words."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        main()
    defaults = {action.dest: (action.default, action.help) for action in parsers[0]._actions
                if type(action.default) in (int, str) and action.default not in ("auto", "==SUPPRESS==")}
    assert all(f"(default: {default}" in shown for default, shown in defaults.values())
    assert main is evaluate.main or {*defaults} == {"samples", "seed", "score", "label_shift"}


def test_help_shows_the_flags_in_groups(capsys):
    shown = output_of(grasp.main, "--help", capsys)
    titles = ["what to compress:", "calibration:", "evaluation:", "output:", "machine:"]
    assert [line for line in shown.splitlines() if line in titles] == titles
    groups = shown.split("what to compress:")[1].split("\n\n")
    compress, calibration, evaluation, output, machine = groups
    assert "\n    python grasp.py --ckpt FOLDER --layers 7 --ratio 0.1\n" in shown
    for flags, group in (("--ckpt --layers --ratio", compress), ("--samples --seed", calibration),
                         ("--eval --windows --data-dir", evaluation), ("--out --overwrite", output),
                         ("--device --dtype --batch-size", machine)):
        assert all(f"  {flag}" in group for flag in flags.split()), flags


def test_flags_reach_the_method(nowhere, monkeypatch, capsys):
    """Each flag changes what its help says. All runs overwrite one folder."""
    def report(words):
        output_of(grasp.main, [*QUICK, "--eval", "none", "--overwrite", *words.split()], capsys)
        return json.loads((nowhere / "tiny-grasp/report.json").read_text())

    plain, seed, magnitude = map(report, ("", "--seed 7", "--score magnitude"))
    assert plain["versions"]["torch"] == torch.__version__ and plain["input"] == {}
    assert plain["calibration"]["offsets"] != seed["calibration"]["offsets"]
    assert plain["cosines"] != sorted(plain["cosines"]) and plain["redundant"] != [0, 1]
    assert all(m["kept"] == list(range(m["rank"])) for m in magnitude["matrices"])
    assert any(m["kept"] != list(range(m["rank"])) for m in plain["matrices"])
    assert plain["cosine_sequences"] == len(plain["calibration"]["offsets"]) and len(plain["cosine_errors"]) == 8
    one = report("--samples 1")
    assert one["cosine_errors"] is None and one["cosine_sequences"] == 1  # NaN is no JSON


def test_layers_by_hand_need_no_redundancy_sweep(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(grasp, "layer_cosines", lambda *_: pytest.fail("a redundancy sweep"))
    assert "cosine" not in output_of(grasp.main, "--layer-ids 3 --samples 2 --seq-len 16 --eval none", capsys)
    report = json.loads((nowhere / "tiny-grasp/report.json").read_text())
    assert report["cosines"] is None and report["redundant"] == [3] and "redundancy" not in report["seconds"]


@pytest.mark.parametrize("main, words", [
    (grasp.main, "--layers 2 --samples 3"),
    (grasp.main, "--layer-ids 3 --samples 1 --batch-size 2"),
    (grasp.main, "--layers 1 --threshold 0.5 --samples 1 --eval none"),
    (evaluate.main, "--json e.json"), (evaluate.main, "--data none --dtype bfloat16")])
def test_nothing_changes_the_settings_after_parsing(main, words, nowhere, monkeypatch, capsys):
    """What a command was asked for is what it does and what its report says."""
    parsed = []

    def watch(place, name):
        parse = getattr(place, name)

        def watched(*words):
            a = parse(*words)
            parsed.append((a, copy.deepcopy(vars(a))))
            return a
        monkeypatch.setattr(place, name, watched)

    watch(*((grasp, "parse") if main is grasp.main else (cli.Parser, "parse_args")))
    output_of(main, f"{words} --windows 1", capsys)
    (a, before), = parsed
    assert vars(a) == before


def test_files_of_one_name_are_two_texts(nowhere, capsys):
    for folder in ("a", "b"):
        (nowhere / folder).mkdir()
        (nowhere / folder / "text").write_text("some words here " * 200)
    out = output_of(evaluate.main, "--data a/text b/text --windows 1", capsys)
    assert "| text ppl | b/text ppl |" in out


def test_the_embedded_text_can_be_asked_for(nowhere, capsys):
    shutil.copytree(TINY, nowhere / "model")
    words = "--ckpt model --calibration embedded --eval embedded".split()
    out = output_of(grasp.main, [*QUICK, *words], capsys)
    assert "embedded ppl" in out and (nowhere / "model-grasp/report.json").is_file()


def test_a_link_gives_its_own_name_to_the_output(nowhere, capsys):
    (nowhere / "mine").symlink_to(TINY)
    out = output_of(grasp.main, "--ckpt mine --layer-ids 3 --eval none --samples 4 --seq-len 32", capsys)
    assert out.startswith(f"reading      consolidated.00.pth of {nowhere / 'mine'}\n")
    assert (nowhere / "mine-grasp/report.json").is_file()  # and it was calibrated on the embedded text


# --------------------------------------------------------------------------------------------------- mistakes

def test_a_stack_trace_on_request(tmp_path):
    """A mistake is one line.

    With GRASP_DEBUG=1 it is a stack trace, for whoever looks for a fault in the code.
    """
    both = [start(ROOT / "grasp.py", "--layers", 9, cwd=tmp_path, env={"GRASP_DEBUG": debug})
            for debug in ("", "1")]
    (_, plain), (_, trace) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [2, 1]
    assert plain.startswith("error: ") and plain.count("\n") == 1
    assert "Traceback (most recent call last)" in trace
    assert all("asked for 9" in err.splitlines()[-1] for err in (plain, trace))


def test_an_error_of_torch_is_one_line(nowhere, monkeypatch, capsys):
    """A decomposition that does not converge, an operator that a processor lacks; without torch's C++ trace."""
    def fail(W):
        raise torch.linalg.LinAlgError("linalg.svd: did not converge\nException raised from svd at svd.cpp:1\nframe #0")

    monkeypatch.setattr(grasp, "svd", fail)
    line = error_of(grasp.main, "--layer-ids 3 --samples 2 --seq-len 16 --eval none", monkeypatch, capsys)
    assert line == "error: linalg.svd: did not converge\n"


@pytest.mark.parametrize("words, message", [
    ("", "one of the arguments --layers --layer-ids is required"),
    ("--layers 2 --layer-ids 1", "argument --layer-ids: not allowed with argument --layers"),
    ("--layers 0", "--layers: '0', expected a whole number from 1 to"),
    ("--layers two", "--layers: 'two', expected a whole number"),
    ("--layers 9", "this model has 8 layers, 0 to 7; asked for 9"),
    ("--layer-ids 3 8", "this model has 8 layers, 0 to 7; asked for [3, 8]"),
    ("--layer-ids 3 -1", "this model has 8 layers"),
    ("--layer-ids 3 3", "asked for [3, 3]"),
    ("--layers 2 --ratio 0", "--ratio: '0', expected more than 0 and at most 1"),
    ("--layers 2 --ratio 1.5", "--ratio: '1.5', expected more than 0 and at most 1"),
    ("--layers 2 --ratio nan", "--ratio: 'nan', expected"),
    ("--layers 2 --ratio much", "--ratio: 'much', expected more than 0 and at most 1"),
    ("--layers 2 --ratio 0.1 --threshold 0.5", "argument --threshold: not allowed with argument --ratio"),
    ("--layers 2 --score sigma", "--score: invalid choice: 'sigma'"),
    ("--layers 2 --label-shift 0", "--label-shift: '0', expected"),
    ("--layers 2 --seq-len 8 --label-shift 8", "label shift 8: expected 1 to 7"),
    ("--layers 2 --score signed --threshold 0.5", "signed scores may sum to 0"),
    ("--layers 2 --seed -1", "--seed: '-1', expected a whole number from 0 to 2^63 - 1"),
    ("--layers 2 --samples 0", "--samples: '0', expected"),
    ("--layers 2 --seq-len 257", "--seq-len 257: expected 2 to 256 (the model's positions)"),
    ("--layers 2 --seq-len 1", "--seq-len 1: expected 2 to 256"),
    ("--layers 2 --batch-size 0", "--batch-size: '0', expected"),
    ("--layers 2 --no-such-flag", "unrecognized arguments: --no-such-flag\n"),
    ("--layers 2 --ckpt nowhere", "nowhere: no such folder\n"),
    ("--layers 2 --ckpt no/such/folder", "no/such/folder: no such folder\n"),
    ("--layers 2 --ckpt file", "file: no such folder"),
    ("--layers 2 --ckpt empty", "empty: no checkpoint here; looked for config.json"),
    ("--layers 2 --ckpt bare", "bare: no tokenizer; looked for tokenizer.model and .json"),
    ("--layers 2 --device cuda:99", "--device cuda:99"),
    ("--layers 2 --device meta", "--device meta: expected auto, cpu, cuda or cuda:N"),
    ("--layers 2 --device cpu --offload", "--offload copies weights from host memory to a GPU, and this run is"),
    ("--layers 2 --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--layers 2 --calibration nowhere",
     "no text 'nowhere': expected wikitext2, ptb, embedded, or the path of a file"),
    ("--layers 2 --calibration wikitext2",
     "put the file there as DIR/wikitext-2-raw/wiki.train.raw and pass --data-dir DIR"),
    ("--layers 2 --calibration short", "the calibration text has 3 tokens"),
    ("--layers 2 --eval wikitext2", "put the file there as DIR/wikitext-2-raw/wiki.test.raw"),
    ("--layers 2 --eval short", "the evaluation text has 3 tokens"),
    ("--layers 2 --data-dir nowhere --eval ptb", "ptb/ptb.valid.txt: not in nowhere; fetch it by python -m extras.texts"),
    ("--layers 2 --out empty", "empty: exists; choose another, or overwrite it"),
    ("--layers 2 --out empty --overwrite", "empty: --overwrite replaces only a folder"),
    ("--layers 2 --ckpt bare --out ./bare", "bare: exists; choose another, or overwrite it"),
    ("--layers 2 --out no/such/parent", "no/such is no folder that can be written to"),
])
def test_mistakes_are_one_line_and_write_nothing(words, message, nowhere, monkeypatch, capsys):
    (nowhere / "file").touch()
    (nowhere / "empty").mkdir()
    (nowhere / "short").write_text("if x")
    shutil.copytree(TINY, nowhere / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    before = sorted(nowhere.rglob("*"))
    assert message in error_of(grasp.main, words, monkeypatch, capsys)
    assert sorted(nowhere.rglob("*")) == before


@pytest.mark.parametrize("words, message", [
    ("--data", "--data: expected at least one argument"),
    ("--seq-len 999", "--seq-len 999: expected 2 to 256"),
    ("--windows 0", "--windows: '0', expected"),
    ("--data embedded --json .", "--json: .: cannot be written"),
    ("--data embedded --json no/such/file", "--json: no/such/file: cannot be written"),
])
def test_mistakes_of_evaluate(words, message, nowhere, monkeypatch, capsys):
    assert message in error_of(evaluate.main, words, monkeypatch, capsys)


@pytest.mark.parametrize("main, words, file", [
    (grasp.main, "--layers 2", "wikitext-2-raw/wiki.train.raw"),
    (grasp.main, "--layers 2 --calibration embedded", "wikitext-2-raw/wiki.test.raw"),
    (grasp.main, "--layers 2 --calibration ptb --eval none", "ptb/ptb.train.txt"),
    (evaluate.main, "", "wikitext-2-raw/wiki.test.raw"), (evaluate.main, "--data ptb", "ptb/ptb.valid.txt")])
def test_without_data_or_network_a_real_model_is_refused(main, words, file, nowhere, monkeypatch, capsys):
    """No other text is taken instead: its perplexities could not be compared.

    The error says how to get the text.
    """
    shutil.copytree(TINY, nowhere / "model")
    another_tokenizer(nowhere / "model")
    before = sorted(nowhere.rglob("*"))
    line = error_of(main, f"--ckpt model {words}", monkeypatch, capsys)
    assert line.startswith(f"error: {file}: ") and f"DIR/{file}" in line
    assert "--data-dir DIR" in line and "name another text" in line
    assert sorted(nowhere.rglob("*")) == before


def test_a_parent_that_cannot_be_written_to_is_refused_before_the_work(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(cli, "open_checkpoint", None)
    assert error_of(grasp.main, "--layers 2 --out /proc/out", monkeypatch, capsys).startswith("error: [Errno ")


def test_out_of_memory_is_one_line(nowhere, monkeypatch, capsys):
    def fail(*words):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB")

    monkeypatch.setattr("runtime.job.calibration_windows", fail)
    line = error_of(grasp.main, "--layers 2", monkeypatch, capsys)
    assert "out of memory; use a smaller --batch-size" in line


# -------------------------------------------------------------------------------- device, lengths and batches

def test_devices_and_clocks():
    with pytest.raises(ValueError, match="--device nonsense"):
        open_checkpoint(TINY, "nonsense", "auto")
    with pytest.raises(ValueError, match="--device meta: expected auto, cpu, cuda or cuda:N"):
        open_checkpoint(TINY, "meta", "auto")
    seconds = {"work": 1.0}
    with timed(seconds, "work"):
        pass
    assert seconds["work"] > 1.0
    assert [batch_size(None, 256), batch_size(None, 2048), batch_size(3, 256)] == [4, 1, 3]


def test_a_cuda_device_has_a_number(monkeypatch):
    """Without a number torch does not make it the current device. Under torchrun the number is LOCAL_RANK.

    A LOCAL_RANK that a scheduler has left means nothing.
    """
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    assert pick_device("auto") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("cuda") == "cuda:0"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert pick_device("cuda") == "cuda:2" and chosen == [0, 0, 2]


def test_sequence_length_fits_the_model():
    model = random_model(max_seq_len=64)
    assert sequence_length(None, 2048, model) == 64 and sequence_length(32, 2048, model) == 32
    assert sequence_length(None, 2048, random_model()) == 2048
    for wrong in (1, 65):
        with pytest.raises(ValueError, match="expected 2 to 64"):
            sequence_length(wrong, 2048, model)


def test_batches_cover_the_windows_in_order():
    windows = torch.arange(14).view(7, 2)
    assert torch.equal(torch.cat(list(batches(windows, 3, "test"))), windows)


GIB = 2 ** 30
SHAPES = {
    "LLaMA-2-7B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000),
    "Llama-3-8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256),
    "LLaMA-2-13B": dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824, vocab_size=32000),
}


def on_a_gpu(model, free, monkeypatch, capability=(8, 0)):
    """Let the model seem to be on a GPU that has so many bytes free, one GiB of them in torch's cache."""
    monkeypatch.setattr(Transformer, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])  # with the second, grouped heads are repeated
@pytest.mark.parametrize("card", [24, 40, 80])
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu_no_more_tokens_than_fit(name, card, capability, monkeypatch):
    """A sweep with the chosen micro-batch fits into the free memory, whichever layers are redundant.

    Where nothing fits, one sequence is chosen.
    """
    from extras.bench.memory import sweep_bytes
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SHAPES[name], head_dim=128, norm_eps=1e-5)).bfloat16()
    free, n, T = card * GIB - 2 * model.n_params, model.args.n_layers, 512
    if free < 0:
        return  # the weights alone need more
    on_a_gpu(model, free, monkeypatch, capability)
    size = batch_size(None, T, model, 7)
    assert T <= size * T <= 8192
    for layers in (range(7), range(n - 7, n), range(9, 16), range(0, n, n // 6), [0, 1, 2, 3, 4, 5, n - 1]):
        need = sweep_bytes(model, layers, size, T)
        assert size == 1 or need["gradients"] + need["activations"] <= free, layers


def test_on_a_large_gpu_micro_batches_are_larger(monkeypatch, capsys):
    """The free memory is printed with the device."""
    model = random_model()
    on_a_gpu(model, 60 * GIB, monkeypatch)
    assert batch_size(None, 512, model, 2) == 16 and batch_size(3, 512, model, 2) == 3
    cli.introduce("model", model)
    assert "memory       60.0 GiB are free beside the weights" in capsys.readouterr().out
    assert batch_size(None, 512, random_model(), 2) == 16
    on_a_gpu(model, GIB // 1000, monkeypatch)
    assert batch_size(None, 512, model, 2) == 1 and batch_size(None, 2048, model, 2) == 1


def test_a_low_rank_layer_does_not_hide_the_gradients_of_the_dense_ones(monkeypatch):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SHAPES["LLaMA-2-7B"], head_dim=128, norm_eps=1e-5)).bfloat16()
    on_a_gpu(model, 12 * GIB, monkeypatch)
    dense = batch_size(None, 512, model, 7)
    model.layers[0] = torch.nn.Identity()  # without parameters
    assert batch_size(None, 512, model, 7) == dense < batch_size(None, 512, model, 1)
