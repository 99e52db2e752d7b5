"""The lesson: engines can be compared where they do the same work, and take turns at it.

Every engine decodes the same greedy tokens of the same folder in fp32. llama.cpp's are asked of its server over HTTP.
"""
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT, error_of, obey_all_signals, output_of, random_model, random_tokens, start
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras import throughput as command
from extras.generate import empty_cache, step
from extras.throughput import multiply_adds, random_prompt, throughput, weight_bytes
from grasp import compress
from model import rotations
from tests.extras.test_deci import narrow_model
from tests.extras.test_generate import greedy, low_rank_model

TINY = ROOT / "data/tiny"


def low_rank():
    model = load_checkpoint(TINY)
    list(compress(model, [3], None, ratio=0.4, score="magnitude"))
    return model


def dropped():
    model = load_checkpoint(TINY)
    del model.layers[3:5]
    model.args.n_layers = 6
    return model


def saved(model, folder):
    save_checkpoint(model, folder, tokenizer=load_tokenizer(TINY).files)
    return folder


def cells(markdown):
    """The rows of a table, its head apart."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line][1:]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary folders are made: none of ours may be left (torch makes one of its own)."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys, "path", sys.path[:])  # transformers adds where it copies code to
    yield tmp_path / "temporary"
    assert not list((tmp_path / "temporary").glob("grasp-*"))


# ------------------------------------------------------------------------------------------------ what is counted

def test_multiply_adds_by_hand_and_by_torchs_own_count():
    """dim 16, 4 query heads over 2 of size 4, hidden 24, vocabulary 50."""
    model = random_model(tied=True)
    block = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 24 * 16
    assert multiply_adds(model, 10) == 4 * (block + 2 * 10 * 16) + 50 * 16
    model = low_rank_model(tied=True)
    assert multiply_adds(model, 10) == 4 * (block + 2 * 10 * 16) + 50 * 16 - 8 * 16 + 3 * 24 - 16 * 24 + 3 * 40

    cache, rotary = empty_cache(model, 1, 10), rotations(model.args, 10, "cpu")
    step(model, random_tokens(model, 1, 9), cache, 0, rotary)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts the CPU's fused one as 0
        step(model, random_tokens(model, 1, 1), cache, 9, rotary)
    assert 2 * multiply_adds(model, 10) == counter.get_total_flops()


def test_weights_are_counted_in_bytes_and_tied_ones_once():
    model = random_model(torch.bfloat16, tied=True)
    assert weight_bytes(model) == 2 * (4 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 24 * 16 + 2 * 16) + 16 + 50 * 16)


# ------------------------------------------------------------------------------------------------ turns

def test_all_take_turns_and_the_first_does_not_count():
    a, b, calls = random_model(), random_model(n_layers=2), []

    def clocked(name, *seconds):
        times = iter(seconds * 2)

        def run(prompt, max_new_tokens):
            calls.append((name, tuple(prompt.shape), max_new_tokens))
            first = next(times)
            return first, 2 * first
        return run

    pairs = [("dense", "this", a, clocked("a", 9.0, 3.0, 1.0, 2.0), 2 ** 20),
             ("dropped", "other", b, clocked("b", 9.0, 6.0, 4.0, 5.0), 2 ** 21), ("dropped", "none", b, None, None)]
    texts = {"dense": {"text": 12.345}, "dropped": {"text": 20.0}}
    rows = cells(throughput(pairs, texts, [1, 2], [6], max_new_tokens=5, repeats=3, seed=0))
    assert calls == [("a", (1, 6), 5), ("b", (1, 6), 5)] * 4 + [("a", (2, 6), 5), ("b", (2, 6), 5)] * 4
    like_a, like_b = ([f"{m.n_params:,}", f"{multiply_adds(m, 6) / 1e6:.2f}"] for m in (a, b))
    for B, three in ((1, rows[:3]), (2, rows[3:])):  # 6 B tokens in 2 or 5 s, and 4 B in twice as long
        assert three == [
            ["dense", "this", "float64", f"{B}", "6", like_a[0], "1.0", "12.35", f"{3 * B:.1f}", f"{B:.1f}", like_a[1]],
            ["dropped", "other", "float64", f"{B}", "6", like_b[0], "2.0", "20.00", f"{1.2 * B:.1f}", f"{0.4 * B:.1f}",
             like_b[1]],
            ["dropped", "none", "float64", f"{B}", "6", like_b[0], "-", "20.00", "-", "-", like_b[1]]]


def test_one_dtype_for_folders_of_two(tmp_path, monkeypatch, capsys):
    """The bytes of one dtype say nothing beside another's: half of them may be the dtype alone."""
    saved(load_checkpoint(TINY, torch.bfloat16), tmp_path / "half")
    words = f"--ckpt {TINY} {tmp_path / 'half'} --batch-sizes 1 --lengths 8 --max-new-tokens 2 --repeats 1"
    message = error_of(command.main, words, monkeypatch, capsys)
    assert ("--ckpt: folders of different dtypes: tiny torch.float32, half torch.bfloat16; pass --dtype for one"
            in message)
    rows = cells(output_of(command.main, f"{words} --dtype bfloat16", capsys))
    assert [row[:3] for row in rows] == [["tiny", "this", "bfloat16"], ["half", "this", "bfloat16"]]
    assert rows[0][5:7] == rows[1][5:7] == ["886,368", f"{2 * 886368 / 2 ** 20:.1f}"]


def test_a_table_of_dense_and_dropped(tmp_path, capsys):
    saved(dropped(), tmp_path / "dropped")
    out = output_of(command.main, f"--ckpt {TINY} {tmp_path / 'dropped'} --batch-sizes 1 3 --lengths 8 --repeats 2 "
                    "--max-new-tokens 4 --eval embedded --windows 2", capsys)
    rows = cells(out)
    assert [row[:5] for row in rows] == [
        [name, "this", "float32", B, "8"] for B in "13" for name in ("tiny", "dropped")]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[5:])
    assert float(rows[1][7]) > float(rows[0][7]) and float(rows[1][-1]) < float(rows[0][-1])  # perplexity, work
    assert "| embedded ppl |" in out and out.count("first 2 windows of 256") == 1
    assert "4 new tokens" in out and "medians of 2 turns" in out and f"torch {torch.__version__}" in out


# ------------------------------------------------------------------------------------------------ the engines

@pytest.fixture
def answers(monkeypatch):
    """What transformers' generate and llama.cpp's server have decoded: {engine: [tokens (B, n)]}.

    Without the one token of a server's start.
    """
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install -r requirements-test.txt")
    found = {"transformers": [], "llama.cpp": []}
    real, start_server = transformers.GenerationMixin.generate, xllamacpp.Server

    def generate(self, prompt, **how):
        tokens = real(self, prompt, **how)
        found["transformers"].append(tokens[:, prompt.shape[1]:])
        return tokens

    class Server:
        """Asks what handle_completions is asked, but of a path of llama.cpp's that returns the tokens too."""
        def __init__(self, params):
            self.server = start_server(params)

        def handle_completions(self, question):
            request = urllib.request.Request(
                self.server.listening_address + "/completion", json.dumps({**question, "return_tokens": True}).encode(),
                {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                rows = json.load(answer)
            rows = sorted(rows, key=lambda row: row["index"]) if isinstance(rows, list) else [rows]
            assert all(row["timings"]["predicted_n"] == question["n_predict"] for row in rows)
            if question["n_predict"] > 1:
                found["llama.cpp"].append(torch.tensor([row["tokens"] for row in rows]))
            return rows[0]

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    monkeypatch.setattr(xllamacpp, "Server", Server)
    return found


ALL = "--engines this transformers llama.cpp --repeats 1"


@pytest.mark.parametrize("make, layout", [
    (lambda: load_checkpoint(TINY), "hf"), (lambda: narrow_model([40, 40, 40]), "hf"),
    (lambda: narrow_model([40, 72, 33]), "hf-lowrank")])
def test_every_engine_decodes_the_same_tokens(make, layout, answers, place, monkeypatch, capsys):
    """Of each sequence of a batch, up to the model's last position."""
    model, layouts, write = make(), [], command.export.export
    monkeypatch.setattr(command.export, "export", lambda model, tokenizer, out, layout: (
        layouts.append(layout), write(model, tokenizer, out, layout)))
    saved(model, place.parent / "small")
    out = output_of(command.main, f"--ckpt {place.parent / 'small'} {ALL} --batch-sizes 1 3 --lengths 5 20 "
                    "--max-new-tokens 30", capsys)
    assert [row[1] for row in cells(out)] == ["this", "transformers", "llama.cpp"] * 4 and layouts == [layout, "gguf"]
    assert all(float(cell.replace(",", "")) > 0 for row in cells(out) for cell in row[6:])
    expected = [greedy(model, random_prompt(model, B, T, 0), 30) for B in (1, 3) for T in (5, 20) for _ in range(2)]
    assert torch.cat(expected).unique().numel() > 10
    for found in answers.values():  # a turn that does not count, and one that does
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_last_position(answers, place, capsys):
    output_of(command.main, f"{ALL} --batch-sizes 1 --lengths 236 --max-new-tokens 20", capsys)
    assert torch.equal(answers["llama.cpp"][0], answers["transformers"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, answers, place, capsys):
    """The files are half as large in every engine; llama.cpp's holds the tokenizer too."""
    out = output_of(command.main, f"{ALL} --batch-sizes 2 --lengths 8 --max-new-tokens 4 --dtype {dtype}", capsys)
    assert [row[2] for row in cells(out)] == [dtype] * 3
    assert all(abs(float(row[6]) - 1.7) <= 0.11 for row in cells(out)), out


def test_what_llama_cpp_cannot_read_is_told_under_the_table(answers, place, capsys):
    model = low_rank()
    saved(model, place.parent / "small")
    words = f"--ckpt {place.parent / 'small'} {ALL} --batch-sizes 2 --lengths 8 --max-new-tokens 12"
    out = output_of(command.main, words, capsys)
    this, theirs, none = cells(out)
    assert this[6] == theirs[6] and none[6:] == ["-", "-", "-", this[-1]]
    assert ("\nsmall in llama.cpp: --format gguf: layers.3.attention.wq is low-rank, expected dense matrices; use "
            "--format hf-lowrank or extras.fisher" in out)
    assert torch.equal(answers["transformers"][0], greedy(model, random_prompt(model, 2, 8, 0), 12))
    assert answers["llama.cpp"] == []
    out = output_of(command.main, "--engines llama.cpp --batch-sizes 1 --lengths 8 --dtype float64 --repeats 1", capsys)
    assert "tiny in llama.cpp: torch.float64 on cpu, expected float32, bfloat16 or float16 on the CPU" in out


def test_what_cannot_be_loaded_is_told_too(answers, place, monkeypatch, capsys):
    monkeypatch.setattr(command.export, "export", lambda model, tokenizer, out, layout: (
        out.mkdir(), (out / "model.gguf").write_text("no weights")))
    out = output_of(command.main, "--engines llama.cpp --batch-sizes 1 --lengths 8 --max-new-tokens 2", capsys)
    assert cells(out)[0][6] == "-" and "\ntiny in llama.cpp: Failed to init server" in out


def test_as_many_threads_in_llama_cpp_as_in_torch(monkeypatch):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install -r requirements-test.txt")
    started = []

    def refuse(params):
        started.append(params)
        raise RuntimeError("not started")

    monkeypatch.setattr(xllamacpp, "Server", refuse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with ExitStack() as stack, pytest.raises(RuntimeError, match="not started"):
        command.in_llama_cpp("file", torch.float32, 1, 9, stack)
    assert started[0].cpuparams.n_threads == started[0].cpuparams_batch.n_threads == 3


# ------------------------------------------------------------------------------------------------ the end

def threads():
    time.sleep(0.1)  # one that has been joined is listed some milliseconds longer
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_no_server_outlives_the_command(place, monkeypatch, capsys):
    """Nor does one wait for ever that is stopped at once: llama.cpp's would, before its first answer."""
    pytest.importorskip("xllamacpp", reason="llama.cpp: pip install -r requirements-test.txt")
    words = "--engines llama.cpp --batch-sizes 1 2 --lengths 8 --max-new-tokens 2 --repeats 1"
    output_of(command.main, words, capsys)
    before = threads()  # what a library keeps for the process's life is there now

    def fail(*_, **__):
        seen.append(threads())
        raise ValueError("while it runs")

    seen = []
    monkeypatch.setattr(command, "throughput", fail)
    for _ in range(5):
        assert "while it runs" in error_of(command.main, words, monkeypatch, capsys)
        assert seen.pop() > before >= threads()


# extras.throughput, which prints "there" before each turn
TOLD = """
from extras import throughput
from runtime import cli
def told(*words, prompt=throughput.random_prompt):
    print("there")
    return prompt(*words)
throughput.random_prompt = told
cli.command(throughput.main)
"""


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_ctrl_c_leaves_nothing(engine, tmp_path):
    """In a later turn: the first imports things, and Ctrl-C in an import may end Python by the signal, not with 130."""
    pytest.importorskip(command.ENGINES[engine][0], reason="pip install -r requirements-test.txt")
    process = start("-c", TOLD, "--engines", engine, "--repeats", 10 ** 6, cwd=tmp_path,
                    env={"TMPDIR": str(tmp_path)}, preexec_fn=obey_all_signals)
    for _ in range(3):
        while (line := process.stdout.readline()) != "there\n":
            assert line, process.communicate()
    assert list(tmp_path.glob("grasp-*/0/README.md"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.endswith("\ninterrupted\n") and not list(tmp_path.glob("grasp-*"))


# ------------------------------------------------------------------------------------------------ mistakes

@pytest.mark.parametrize("words, message", [
    ("--ckpt nowhere", "nowhere: no such folder"),
    ("--engines vllm", "invalid choice: 'vllm'"),
    ("--max-new-tokens 1", "--max-new-tokens: '1', expected 2 or more"),
    ("--lengths 8 200", "a prompt of 200 tokens and 100 new ones: this model's positions end at 256"),
    ("--batch-sizes 0", "--batch-sizes: '0', expected"),
    ("--repeats 0", "--repeats: '0', expected"),
    ("--seed -1", "argument --seed: '-1', expected a whole number from 0 to 2^63 - 1"),
    ("--eval nowhere.txt", "nowhere.txt"),
])
def test_mistakes_are_one_line(words, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(command, "throughput", None)  # nothing is measured before all is known to be good
    assert message in error_of(command.main, words, monkeypatch, capsys)


@pytest.mark.parametrize("engine, package", [
    ("transformers", "transformers"), ("transformers", "safetensors"), ("llama.cpp", "xllamacpp"),
    ("llama.cpp", "gguf")])
def test_a_missing_package_is_named_before_the_long_work(engine, package, place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for other in command.ENGINES[engine]:
        if other != package:
            monkeypatch.setitem(sys.modules, other, sys)  # as if it were there
    monkeypatch.setattr(command.cli, "open_checkpoint", None)
    assert (f"--engines {engine} needs the package {package}: pip install {package}"
            in error_of(command.main, f"--engines this {engine}", monkeypatch, capsys))
