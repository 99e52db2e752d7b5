"""The lesson: the commands as a user meets them, first without mistakes, then with them."""
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import grasp
from tests.conftest import ROOT, error_of, obey_all_signals, run
from runtime import cli, job

QUICK = ["--layers", "2", "--samples", "6", "--seq-len", "64", "--windows", "4"]


def test_the_whole_job_and_its_evaluation(tmp_path):
    done = run("grasp.py", *QUICK, "--ratio", 0.2, "--out", "small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [
        "consolidated.00.pth", "params.json", "report.json", "tokenizer.model"]
    report = json.loads((tmp_path / "small/report.json").read_text())
    rows = {row["model"]: row for row in report["results"]}
    assert list(rows) == ["dense", "GRASP"] and all(name in done.stdout for name in rows)
    assert len(report["cosines"]) == 8 and len(report["redundant"]) == 2 and len(report["matrices"]) == 14
    assert len(report["calibration"]["offsets"]) == 6 and report["settings"]["ratio"] == 0.2
    assert report["parameters_after"] == rows["GRASP"]["parameters"] < report["parameters_before"]
    assert all(len(r["kept"]) == r["rank"] for r in report["matrices"])
    assert {*report["seconds"]} == {"redundancy", "attribution", "compression"}
    assert rows["GRASP"]["seconds"] == report["seconds"]["redundancy"] + report["seconds"]["compression"]
    assert re.search(r"removed; peak memory \d\.\d\d GiB\n", done.stdout)
    for r in report["matrices"]:
        assert r["kept"] == sorted(set(r["kept"])) and r["kept"][-1] < min(r["shape"])

    kept = f"{100 * report['parameters_after'] / report['parameters_before']:.1f}"
    again = run("evaluate.py", "--ckpt", "small", "--data", "embedded", "--windows", 4, "--json", "e.json",
                cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["perplexity"]["embedded"] == pytest.approx(rows["GRASP"]["perplexity"]["embedded"],
                                                             rel=1e-6)
    assert f"{result['perplexity']['embedded']:.2f}" in again.stdout and f" {kept} " in again.stdout
    assert result["parameters"] == report["parameters_after"]


def test_the_embedded_model_by_any_path_and_layers_by_hand(tmp_path):
    done = run("grasp.py", "--ckpt", ROOT / "data/../data/tiny", "--layer-ids", 6, 2, "--threshold", 0.5,
               "--samples", 4, "--windows", 2, "--iterative", cwd=tmp_path)
    assert done.returncode == 0 and "embedded ppl" in done.stdout, done.stderr
    report = json.loads((tmp_path / "tiny-grasp/report.json").read_text())
    assert report["redundant"] == [2, 6] and report["matrices"][0]["name"] == "layers.6.feed_forward.w1"


def test_dtype_is_the_dtype_of_the_written_weights(tmp_path):
    done = run("grasp.py", *QUICK, "--dtype", "bfloat16", "--eval", "none", cwd=tmp_path)
    assert done.returncode == 0 and "dtype bfloat16 (as asked)" in done.stdout, done.stderr
    table = torch.load(tmp_path / "tiny-grasp/consolidated.00.pth", weights_only=True)
    assert {t.dtype for t in table.values()} == {torch.bfloat16}


def test_one_seed_gives_identical_folders(tmp_path):
    for out in ("a", "b"):
        done = run("grasp.py", *QUICK, "--eval", "none", "--out", out, cwd=tmp_path)
        assert done.returncode == 0 and "ppl" not in done.stdout, done.stderr
    for file in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    a, b = (json.loads((tmp_path / out / "report.json").read_text()) for out in "ab")
    for measured in ("seconds", "results", "settings"):  # times, memory, and --out
        a.pop(measured), b.pop(measured)
    assert a == b


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    words = ["--layers", "2", "--samples", "100000"]
    process = subprocess.Popen([sys.executable, "-u", ROOT / "grasp.py", *words], cwd=tmp_path, text=True,
                               preexec_fn=obey_all_signals, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not process.stdout.readline().startswith("method"):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == "\ninterrupted\n" and list(tmp_path.iterdir()) == []


# grasp.py with a sweep that prints "there" and then takes a second
SLOW = """
import sys, time
import grasp
from runtime import cli
def sweep(windows, *_):
    print("there", flush=True)
    time.sleep(seconds)
    yield windows
cli.batches, seconds = sweep, float(sys.argv[1])
sys.argv[1:] = "--layers 2 --samples 1 --seq-len 8 --eval none --out out".split()
cli.command(grasp.main, parallel=True)
"""


def slow_command(folder, seconds, preexec_fn=obey_all_signals):
    process = subprocess.Popen([sys.executable, "-u", "-c", SLOW, str(seconds)], cwd=folder, text=True,
                               preexec_fn=preexec_fn,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    while (line := process.stdout.readline()) != "there\n":
        assert line, process.communicate()
    return process


@pytest.mark.parametrize("number, exit_code, told", [(signal.SIGINT, 130, "\ninterrupted\n"),
                                                     (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")])
def test_a_signal_ends_a_sweep(number, exit_code, told, tmp_path):
    """Ctrl-C says so, on its own line. The others are silent. test_files.py has signals during a write."""
    process = slow_command(tmp_path, 600)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (exit_code, told) and list(tmp_path.iterdir()) == []


LATE = """
import atexit, time
from runtime import cli
def at_exit():
    print("there", flush=True)
    time.sleep(1)
cli.command(lambda: atexit.register(at_exit))  # as libraries do that the work imports
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_python_shuts_down_prints_nothing(number):
    """The work is done by then."""
    process = subprocess.Popen([sys.executable, "-c", LATE], cwd=ROOT, text=True, preexec_fn=obey_all_signals,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("terminal, modules, expected", [
    (False, [], ""),  # a log gets a line a minute
    (True, [], "\r\x1b[Ksweep  1/2 batches  0 s left\r\x1b[K"),
    (False, ["ipykernel"], f"\r{'sweep  1/2 batches  0 s left':<110}\r{'':<110}\r")])
def test_progress_is_one_line_of_a_terminal_or_notebook(terminal, modules, expected, monkeypatch, capsys):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, object())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert len(list(cli.batches(torch.zeros(3, 4, dtype=torch.int64), 2, "sweep"))) == 2
    assert capsys.readouterr().err == expected


def test_an_ignored_signal_stays_ignored(tmp_path):
    """nohup starts a command with SIGHUP ignored."""
    process = slow_command(tmp_path, 1, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "written to out" in out, err


def test_help_shows_the_defaults():
    for script in ("grasp.py", "evaluate.py"):
        shown = run(script, "--help", cwd=ROOT)
        assert shown.returncode == 0 and "default: the embedded model" in shown.stdout


def test_help_shows_the_flags_in_groups():
    shown = run("grasp.py", "--help", cwd=ROOT).stdout
    titles = ["what to compress:", "calibration:", "evaluation:", "output:", "machine:"]
    assert [line for line in shown.splitlines() if line in titles] == titles
    compress, calibration, evaluation, output, machine, example = shown.split("what to compress:")[1].split("\n\n")
    assert example == "example: python grasp.py --ckpt FOLDER --layers 7 --ratio 0.1\n"
    for flags, group in (("--ckpt --layers --ratio", compress), ("--samples --seed", calibration),
                         ("--eval --windows --data-dir", evaluation), ("--out --overwrite", output),
                         ("--device --dtype --batch-size", machine)):
        assert all(f"  {flag}" in group for flag in flags.split()), flags


def test_layers_by_hand_need_no_redundancy_sweep(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(grasp, "layer_cosines", lambda *_: pytest.fail("a redundancy sweep"))
    monkeypatch.setattr(sys, "argv", "grasp.py --layer-ids 3 --samples 2 --seq-len 16 --eval none".split())
    cli.command(grasp.main)
    assert "cosine" not in capsys.readouterr().out
    report = json.loads((nowhere / "tiny-grasp/report.json").read_text())
    assert report["cosines"] is None and report["redundant"] == [3] and "redundancy" not in report["seconds"]


@pytest.mark.parametrize("main, words", [
    (grasp.main, "--layers 2 --samples 3"),
    (grasp.main, "--layer-ids 3 --samples 1 --batch-size 2"),
    (grasp.main, "--layers 1 --threshold 0.5 --contiguous --samples 1 --eval none"),
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
    monkeypatch.setattr(sys, "argv", ["command", *words.split(), "--windows", "1"])
    cli.command(main)
    (a, before), = parsed
    assert vars(a) == before


def test_a_stack_trace_on_request(tmp_path):
    """A mistake is one line.

    With GRASP_DEBUG=1 it is a stack trace, for whoever looks for a fault in the code.
    """
    for debug in ("", "1"):
        done = subprocess.run([sys.executable, ROOT / "grasp.py", "--layers", "9"], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, "GRASP_DEBUG": debug})
        assert done.returncode == (1 if debug else 2) and "asked for 9" in done.stderr.splitlines()[-1]
        assert ("Traceback (most recent call last)" in done.stderr) == bool(debug)
        assert debug or done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("words, message", [
    ("", "one of --layers N, --layer-ids ID ... and --remove FRACTION is needed"),
    ("--layers 2 --layer-ids 1", "argument --layer-ids: not allowed with argument --layers"),
    ("--layers 0", "--layers: '0', expected a whole number from 1 to"),
    ("--layers two", "--layers: 'two', expected a whole number"),
    ("--layers 9", "this model has 8 layers, 0 to 7; asked for 9"),
    ("--layer-ids 3 8", "this model has 8 layers, 0 to 7; asked for [3, 8]"),
    ("--layer-ids 3 -1", "this model has 8 layers"),
    ("--layer-ids 3 3", "asked for [3, 3]"),
    ("--layer-ids 3 --contiguous", "not with --layer-ids"),
    ("--layers 2 --ratio 0", "--ratio: '0', expected more than 0 and at most 1"),
    ("--layers 2 --ratio 1.5", "--ratio: '1.5', expected more than 0 and at most 1"),
    ("--layers 2 --ratio nan", "--ratio: 'nan', expected"),
    ("--layers 2 --ratio much", "--ratio: 'much', expected more than 0 and at most 1"),
    ("--layers 2 --ratio 0.1 --threshold 0.5", "argument --threshold: not allowed with argument --ratio"),
    ("--layers 2 --score sigma", "--score: invalid choice: 'sigma'"),
    ("--layers 2 --seed -1", "--seed: '-1', expected a whole number from 0 to 2^63 - 1"),
    ("--layers 2 --samples 0", "--samples: '0', expected"),
    ("--layers 2 --samples 2000000000", "2,000,000,000 sequences of 256 tokens are too many"),
    ("--layers 2 --seq-len 257", "--seq-len 257: expected 2 to 256 (the model's positions)"),
    ("--layers 2 --seq-len 1", "--seq-len 1: expected 2 to 256"),
    ("--layers 2 --batch-size 0", "--batch-size: '0', expected"),
    ("--layers 2 --no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("--layers 2 --samplse 3", "unrecognized arguments: --samplse 3; did you mean --samples?"),
    ("--layers 2 --remove 0.1 --ratio 0.1", "argument --ratio: not allowed with argument --remove"),
    ("--layers 2 --ckpt meta/Small", "Small: no such folder; from the hub: hf download meta/Small --local-dir Small"),
    ("--layers 2 --ckpt cache", "cache: a cache of the hub; name a folder in its snapshots/"),
    ("--layers 2 --ckpt nowhere", "nowhere: no such folder\n"),
    ("--layers 2 --ckpt no/such/folder", "no/such/folder: no such folder\n"),
    ("--layers 2 --ckpt file", "file: a file, expected a folder"),
    ("--layers 2 --ckpt empty", "empty: no checkpoint here; looked for config.json"),
    ("--layers 2 --ckpt bare", "bare: no tokenizer; looked for tokenizer.model and .json"),
    ("--layers 2 --device cuda:99", "--device cuda:99"),
    ("--layers 2 --device meta", "--device meta: expected auto, cpu, cuda or cuda:N"),
    ("--layers 2 --shard", "--shard divides the weights among processes: start them with torchrun"),
    ("--layers 2 --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--layers 2 --calibration nowhere",
     "no text 'nowhere': expected wikitext2, ptb, embedded, or the path of a file"),
    ("--layers 2 --calibration wikitext2",
     "put the file there as DIR/wikitext-2-raw/wiki.train.raw and pass --data-dir"),
    ("--layers 2 --calibration short", "the calibration text has 3 tokens"),
    ("--layers 2 --eval wikitext2", "put the file there as DIR/wikitext-2-raw/wiki.test.raw"),
    ("--layers 2 --eval short", "the evaluation text has 3 tokens"),
    ("--layers 2 --data-dir nowhere --eval ptb", "--data-dir nowhere: no such folder"),
    ("--layers 2 --out empty", "empty: exists; choose another, or pass --overwrite"),
    ("--layers 2 --out empty --overwrite", "empty: --overwrite replaces only a folder"),
    ("--layers 2 --ckpt bare --out ./bare", "--out bare: is the input"),
    ("--layers 2 --out no/such/parent", "no/such; create it first"),
])
def test_mistakes_are_one_line_and_write_nothing(words, message, nowhere, monkeypatch, capsys):
    (nowhere / "file").touch()
    (nowhere / "empty").mkdir()
    (nowhere / "cache/snapshots").mkdir(parents=True)
    (nowhere / "short").write_text("if x")
    shutil.copytree(ROOT / "data/tiny", nowhere / "bare", ignore=shutil.ignore_patterns("tokenizer.model"))
    before = sorted(nowhere.rglob("*"))
    assert message in error_of(grasp.main, words, monkeypatch, capsys)
    assert sorted(nowhere.rglob("*")) == before


@pytest.mark.parametrize("words, message", [
    ("--data", "--data: expected at least one argument"),
    ("--seq-len 999", "--seq-len 999: expected 2 to 256"),
    ("--windows 0", "--windows: '0', expected"),
    ("--data embedded --json no/such/file", "no/such/file: cannot be written"),
])
def test_mistakes_of_evaluate(words, message, nowhere, monkeypatch, capsys):
    assert message in error_of(evaluate.main, words, monkeypatch, capsys)


def test_json_that_cannot_be_written_is_refused_before_the_work(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write anywhere
    assert "e.json: cannot be written" in error_of(evaluate.main, "--json e.json", monkeypatch, capsys)


def test_out_of_memory_is_one_line(nowhere, monkeypatch, capsys):
    def fail(*words):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PB")

    monkeypatch.setattr(job, "calibration_windows", fail)
    assert "out of memory; use a smaller --batch-size" in error_of(grasp.main, "--layers 2", monkeypatch, capsys)


def test_flags_reach_the_method(nowhere, monkeypatch, capsys):
    """Each flag changes what its help says. All runs overwrite one folder."""
    def report(words):
        monkeypatch.setattr(sys, "argv",
                            ["grasp.py", *QUICK, "--eval", "none", "--overwrite", *words.split()])
        cli.command(grasp.main)
        capsys.readouterr()
        return json.loads((nowhere / "tiny-grasp/report.json").read_text())

    plain, seed, magnitude = map(report, ("", "--seed 7", "--score magnitude"))
    assert plain["versions"]["torch"] == torch.__version__ and plain["input"] is None
    assert plain["calibration"]["offsets"] != seed["calibration"]["offsets"]
    assert plain["cosines"] != sorted(plain["cosines"]) and plain["redundant"] != [0, 1]
    assert all(m["kept"] == list(range(m["rank"])) for m in magnitude["matrices"])
    assert any(m["kept"] != list(range(m["rank"])) for m in plain["matrices"])
    monkeypatch.setattr(grasp, "angular_distances", lambda model, batches, n: torch.arange(7))
    assert report("--contiguous")["redundant"] == [0, 1]


def test_files_of_one_name_are_two_texts(nowhere, monkeypatch, capsys):
    for folder in ("a", "b"):
        (nowhere / folder).mkdir()
        (nowhere / folder / "text").write_text("some words here " * 200)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "a/text", "b/text", "--windows", "1"])
    cli.command(evaluate.main)
    assert "| text ppl | b/text ppl |" in capsys.readouterr().out


@pytest.mark.parametrize("main, words, file", [
    (grasp.main, "--layers 2", "wikitext-2-raw/wiki.train.raw"),
    (grasp.main, "--layers 2 --calibration embedded", "wikitext-2-raw/wiki.test.raw"),
    (grasp.main, "--layers 2 --calibration ptb --eval none", "ptb/ptb.train.txt"),
    (evaluate.main, "", "wikitext-2-raw/wiki.test.raw"), (evaluate.main, "--data ptb", "ptb/ptb.valid.txt")])
def test_without_data_or_network_a_real_model_is_refused(main, words, file, nowhere, monkeypatch, capsys):
    """No other text is taken instead: its perplexities could not be compared.

    The error says how to get the text.
    """
    shutil.copytree(ROOT / "data/tiny", nowhere / "model")
    before = sorted(nowhere.rglob("*"))
    line = error_of(main, f"--ckpt model {words}", monkeypatch, capsys)
    assert line.startswith(f"error: {file}: ") and f"DIR/{file}" in line
    assert "--data-dir DIR" in line and "name another text" in line
    assert sorted(nowhere.rglob("*")) == before


def test_the_embedded_text_can_be_asked_for(nowhere, monkeypatch, capsys):
    shutil.copytree(ROOT / "data/tiny", nowhere / "model")
    words = "--ckpt model --calibration embedded --eval embedded"
    monkeypatch.setattr(sys, "argv", ["grasp.py", *QUICK, *words.split()])
    cli.command(grasp.main)
    assert "embedded ppl" in capsys.readouterr().out and (nowhere / "model-grasp/report.json").is_file()


def test_a_read_only_parent_is_refused(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "tiny-grasp: cannot be written" in error_of(grasp.main, "--layers 2", monkeypatch, capsys)


@pytest.mark.parametrize("files, commit", [
    ({}, None), ({"HEAD": "abc123"}, "abc123"), ({"HEAD": "ref: refs/heads/main"}, None),
    ({"HEAD": "ref: refs/heads/main", "refs/heads/main": "abc123\n"}, "abc123"),
    ({"HEAD": "ref: refs/heads/main", "packed-refs": "# pack-refs\n9 refs/heads/x\nabc123 refs/heads/main\n"}, "abc123")])
def test_a_report_has_the_commit_where_there_is_one(files, commit, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "TINY", tmp_path / "data/tiny")
    for name, content in files.items():
        (tmp_path / ".git" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".git" / name).write_text(content)
    assert cli.versions()["commit"] == commit
