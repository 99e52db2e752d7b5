"""The lesson: several processes give the results of one, with whole weights or split ones, and end together.

torchrun starts this file again: the code after `if __name__` runs in each process.
"""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed.fsdp

import evaluate
import grasp
from attribution import angular_distances, importance, layer_cosines, sigma_gradients, svd, weight_gradients
from tests.conftest import ROOT, random_model, random_tokens
from data import corpus
from evaluate import perplexity
from model import load_checkpoint, matrix_names, save_checkpoint
from runtime import cli, distributed
from runtime.cli import batches

JOB = ["--layers", "2", "--samples", "7", "--seq-len", "48", "--batch-size", "2", "--windows", "5"]
SHARD = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "share_comm_ctx"),
                           reason="--shard needs torch 2.10")


def torchrun(n, *words, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", n, *words]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def batches_of_each(n, windows, size, monkeypatch):
    """The micro-batches of each of n processes."""
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "count", lambda: n)
        found = []
        for process in range(n):
            patched.setattr(distributed, "index", lambda: process)
            found.append(list(batches(windows, size, "")))
    return found


@pytest.mark.parametrize("n, size, sequences", [(1, 4, 10), (2, 2, 7), (4, 2, 7), (3, 5, 2), (4, 1, 5)])
def test_each_sequence_has_one_process_and_all_have_as_many_batches(n, size, sequences, monkeypatch):
    """A process without a sequence left gets one of -100: it takes part in every step, but adds nothing."""
    windows = torch.arange(sequences)[:, None].expand(-1, 3)
    found = batches_of_each(n, windows, size, monkeypatch)
    every = [batch for mine in found for batch in mine]
    assert torch.equal(torch.cat([batch for batch in every if (batch >= 0).all()]), windows)
    assert all(batch.tolist() == [[-100] * 3] for batch in every if not (batch >= 0).all())
    assert len({len(mine) for mine in found}) == 1 and max(map(len, every)) <= size
    assert n > 1 or [len(batch) for batch in found[0]] == [len(batch) for batch in windows.split(size)]


def test_sequences_of_minus_100_are_not_counted(monkeypatch):
    """The sums over the batches of all processes are those over the windows."""
    model, names = random_model(), matrix_names(1, 3)
    windows = random_tokens(model, 5, 8)
    every = [batch for mine in batches_of_each(4, windows, 1, monkeypatch) for batch in mine]
    assert len(every) == 8
    for ours, expected in ((layer_cosines(model, every)[0], layer_cosines(model, [windows])[0]),
                           (angular_distances(model, every, 2), angular_distances(model, [windows], 2))):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-14)
    assert perplexity(model, every) == pytest.approx(perplexity(model, [windows]), rel=1e-13)
    G = weight_gradients(model, names, [windows])
    for name, ours in weight_gradients(model, names, every).items():
        assert torch.allclose(ours, G[name], rtol=0, atol=1e-14), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run([sys.executable, ROOT / "grasp.py", *JOB, "--out", "out"], cwd=folder,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("n, shard", [(2, []), pytest.param(4, ["--shard"], marks=SHARD)])
def test_the_job_is_the_same_job(n, shard, alone, tmp_path):
    """7 sequences in batches of 2: some processes have one sequence less than others."""
    done = torchrun(n, ROOT / "grasp.py", *JOB, *shard, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to out") == 1 and f"processes    {n}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", alone))
    assert ours["redundant"] == theirs["redundant"]
    assert ours["cosines"] == pytest.approx(theirs["cosines"], abs=1e-6)
    kept, expected = ({record["name"]: record["kept"] for record in report["matrices"]}
                      for report in (ours, theirs))
    assert kept == expected and len(kept) == 14
    for row, other in zip(ours["results"], theirs["results"], strict=True):
        assert row["model"] == other["model"]
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    model, other = load_checkpoint(tmp_path / "out"), load_checkpoint(alone)
    for name, p in model.named_parameters():
        assert torch.allclose(p, other.get_parameter(name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("n, shard",
                         [(4, False), pytest.param(2, True, marks=SHARD), pytest.param(4, True, marks=SHARD)])
def test_scores_and_memory_of_each_process(n, shard, tmp_path):
    """The rows do not divide by 4. The head and the embeddings stay whole."""
    model = random_model(torch.float32, dim=30, n_heads=5, n_kv_heads=1, head_dim=6, hidden_dim=70)
    save_checkpoint(model, tmp_path / "random")
    done = torchrun(n, __file__, "scores", tmp_path, int(shard), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cosines, scores = sweeps(model)
    found = [torch.load(tmp_path / f"{place}.pt") for place in range(n)]
    assert all(torch.allclose(part["cosines"], cosines, rtol=0, atol=1e-6) for part in found)
    assert sorted(name for part in found for name in part["scores"]) == sorted(scores)  # one owner each
    for part in found:
        assert len(part["scores"]) in (28 // n, -(-28 // n))
        for name, score in part["scores"].items():
            assert torch.allclose(score, scores[name], rtol=1e-4, atol=1e-4 * scores[name].max()), name
    everything = sum(p.nbytes for p in model.layers.parameters())
    most = max(part["held"] for part in found)
    assert 1 / n <= most / everything < 1.2 / n if shard else most == everything


def sweeps(model):
    """(cosines, {name: scores}) of random tokens.

    Each of several processes computes the scores of its matrices.
    """
    sweep = partial(batches, random_tokens(model, 6, 11), 1)
    cosines = layer_cosines(model, sweep(""))[0]
    names = matrix_names(*range(4))
    G, scores = weight_gradients(model, names, sweep("")), {}
    for i, name in enumerate(names):
        gradient, W = distributed.whole(G[name]), distributed.whole(model.get_submodule(name).weight)
        if i % distributed.count() == distributed.index():
            U, S, Vh = svd(W)
            scores[name] = importance(S, sigma_gradients(U, gradient, Vh))
    return cosines, scores


@SHARD
def test_no_process_keeps_the_whole_gradients_of_more_than_one_matrix(tmp_path):
    """FSDP2 keeps one whole gradient per communication context until the backward pass ends."""
    save_checkpoint(random_model(torch.float32), tmp_path / "random")
    done = torchrun(2, __file__, "buffers", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"{place}.txt").read_text() for place in range(2)} == {"1"}


def test_only_process_0_looks_for_the_texts(tmp_path):
    """All calibrate and evaluate on the text that it found."""
    done = torchrun(2, __file__, "texts", *JOB, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["calibration"]["text"] == "train, found by process 0"
    assert report["protocol"]["embedded"]["text"] == "test, found by process 0"


@SHARD
@pytest.mark.parametrize("ending, told", [("error", "error: only here"), ("kill", "by peer")])
def test_if_one_process_ends_all_end(ending, told, tmp_path):
    """Process 1 fails in its second batch. One line says why, and none of ours shows a stack trace."""
    done = torchrun(2, __file__, ending, *JOB, "--shard", "--out", "out", cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr
    assert "in backward" not in done.stderr and "in weight_gradients" not in done.stderr


@pytest.mark.parametrize("words, told", [
    ([ROOT / "grasp.py", "--layers", "9"], "this model has 8 layers"),
    (["-m", "extras.fisher", "--budget", "0.3"], "start it with python, not with torchrun")])
def test_a_mistake_of_all_processes_is_one_line(words, told, tmp_path):
    done = torchrun(2, *words, cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr


def test_a_terminated_process_removes_what_it_was_writing(tmp_path):
    """torchrun ends process 0 with SIGTERM, because process 1 has failed."""
    done = torchrun(2, __file__, "slow save", *JOB, "--out", "out", cwd=tmp_path)
    assert done.returncode != 0 and errors(done) == ["error: while another writes"]
    assert list(tmp_path.iterdir()) == []


def fail_in_batch(how):
    """batches, but process 1 fails before its second."""
    def failing(windows, size, label):
        for i, batch in enumerate(batches(windows, size, label), 1):
            if distributed.index() == 1 and i == 2 and label == "attribution":
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("only here")
            yield batch
    return failing


def write_scores(folder, shard):
    model = load_checkpoint(f"{folder}/random", split=bool(int(shard)))
    cosines, scores = sweeps(model)
    held = sum(p.nbytes for p in map(distributed.local, model.layers.parameters()))
    torch.save({"cosines": cosines, "scores": scores, "held": held}, f"{folder}/{distributed.index()}.pt")


def count_buffers(folder):
    """Write the number of FSDP2 communication contexts of the model's layers."""
    from torch.distributed.fsdp import FSDPModule
    model = load_checkpoint(f"{folder}/random", split=True)
    sweeps(model)
    found = {id(m._get_fsdp_state()._comm_ctx) for m in model.modules() if isinstance(m, FSDPModule)}
    open(f"{folder}/{distributed.index()}.txt", "w").write(str(len(found)))


def only_process_0_looks(name, use, data_dir=None):
    """load_text, which no other process may call."""
    assert distributed.index() == 0
    return corpus.embedded_text(use), f"{use}, found by process 0"


def save_slowly(*args):
    """Process 0 is writing when process 1 fails."""
    if distributed.index():
        while not list(os.scandir(".")):
            time.sleep(0.1)
        raise ValueError("while another writes")
    torch.save = lambda *_: time.sleep(600)
    save_checkpoint(*args)


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task in ("scores", "buffers"):
        main = partial(write_scores if task == "scores" else count_buffers, *words)
    else:
        sys.argv[1:], main = words, grasp.main
        if task == "texts":
            corpus.load_text = evaluate.load_text = only_process_0_looks
        elif task == "slow save":
            grasp.save_checkpoint = save_slowly
        else:
            cli.batches = fail_in_batch(task)
    cli.command(main, parallel=True)
