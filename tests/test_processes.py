"""The lesson: many processes give what one gives, whole weights or sharded, and fail as one.

This file is its own worker: torchrun starts it again, and what follows `if __name__` runs in each process.
"""
import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed.fsdp

import evaluate
import grasp
from attribution import importance, layer_cosines, sigma_gradients, svd, weight_gradients
from conftest import ROOT, random_model, random_tokens
from data import corpus, processes
from data.corpus import batches
from data.target import obey_signals
from model import load_checkpoint, save_checkpoint

JOB = ["--layers", "2", "--samples", "7", "--seq-len", "48", "--batch-size", "2", "--windows", "5", "--compare"]


SHARD = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "share_comm_ctx"), reason="--shard needs torch 2.10")


def torchrun(n, *words, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", n, *words]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("n, size, sequences", [(1, 4, 10), (2, 2, 7), (4, 2, 7), (3, 5, 2), (4, 1, 5)])
def test_every_sequence_has_one_process_and_all_processes_the_same_steps(n, size, sequences, monkeypatch):
    windows, shares = torch.arange(sequences)[:, None].expand(-1, 3), []
    monkeypatch.setattr(processes, "count", lambda: n)
    for place in range(n):
        monkeypatch.setattr(processes, "rank", lambda: place)
        shares.append(list(batches(windows, size, "")))
    assert torch.equal(torch.cat([torch.cat(share) for share in shares]), windows)
    assert len({len(share) for share in shares}) == 1 and max(len(part) for share in shares for part in share) <= size
    assert n > 1 or [len(part) for part in shares[0]] == [len(part) for part in windows.split(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run([sys.executable, ROOT / "grasp.py", *JOB, "--out", "out"], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("n, shard", [(2, []), pytest.param(4, ["--shard"], marks=SHARD)])
def test_the_job_is_the_same_job(n, shard, alone, tmp_path):
    """7 sequences in batches of 2: some processes have one less than others."""
    done = torchrun(n, ROOT / "grasp.py", *JOB, *shard, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to out") == 1 and f"processes    {n}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", alone))
    assert ours["redundant"] == theirs["redundant"]
    assert ours["cosines"] == pytest.approx(theirs["cosines"], abs=1e-6)
    kept, expected = ({record["name"]: record["kept"] for record in report["matrices"]} for report in (ours, theirs))
    assert kept == expected and len(kept) == 14
    for row, other in zip(ours["results"], theirs["results"], strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5) and row["model"] == other["model"]
    model, other = load_checkpoint(tmp_path / "out"), load_checkpoint(alone)
    for name, p in model.named_parameters():
        assert torch.allclose(p, other.get_parameter(name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("n, shard", [(4, False), pytest.param(2, True, marks=SHARD), pytest.param(4, True, marks=SHARD)])
def test_scores_of_each_owner_and_its_part_of_the_weights(n, shard, tmp_path):
    """Rows that do not divide by 4, and a head and embeddings that stay whole."""
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
    """(cosines, {name: scores}) of random tokens; of several processes each has the scores of the matrices it owns."""
    sweep = partial(batches, random_tokens(model, 6, 11), 1)
    cosines = layer_cosines(model, sweep(""))
    names = [name for layer in range(4) for name in grasp.matrices(layer)]
    G, scores = weight_gradients(model, names, sweep("")), {}
    for i, name in enumerate(names):
        total = processes.summed(G.pop(name), i % processes.count())
        W = processes.whole(model.get_submodule(name).weight)
        if i % processes.count() == processes.rank():
            U, S, Vh = svd(W)
            scores[name] = importance(S, sigma_gradients(U, total, Vh))
    return cosines, scores


@SHARD
def test_no_process_keeps_the_whole_gradients_of_more_than_one_matrix(tmp_path):
    """FSDP2 keeps the last gradient that it adds up until the backward pass ends, all rows of it; here of 28 matrices."""
    save_checkpoint(random_model(torch.float32), tmp_path / "random")
    done = torchrun(2, __file__, "buffers", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"{place}.txt").read_text() for place in range(2)} == {"1"}


def test_all_calibrate_and_evaluate_on_the_text_of_process_0(tmp_path):
    """Which alone looks for it, and finds nothing here; and it alone writes the results."""
    done = torchrun(2, __file__, "texts", "--windows", "3", "--seq-len", "16", "--json", "e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on with the embedded text") == 2  # wikitext2 and ptb
    assert list(json.loads((tmp_path / "e.json").read_text())["perplexity"]) == ["embedded"]


@SHARD
@pytest.mark.parametrize("ending, told", [("error", "error: only here"), ("kill", "by peer")])
def test_where_one_ends_all_end(ending, told, tmp_path):
    """Process 1 fails in its second batch: one line says why, and none of ours leaves a trace."""
    done = torchrun(2, __file__, ending, *JOB, "--shard", "--out", "out", cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr
    assert "in backward" not in done.stderr and "in weight_gradients" not in done.stderr


@pytest.mark.parametrize("words, told", [
    ([ROOT / "grasp.py", "--layers", "9"], "this model has 8 layers"),
    (["-m", "extras.fisher", "--budget", "0.3"], "start it with python, not with torchrun")])
def test_a_mistake_is_one_line_from_all(words, told, tmp_path):
    done = torchrun(2, *words, cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr


def test_what_torchrun_terminates_takes_back_what_it_wrote(tmp_path):
    done = torchrun(2, __file__, "slow save", *JOB, "--out", "out", cwd=tmp_path)
    assert done.returncode != 0 and errors(done) == ["error: while another writes"] and not list(tmp_path.iterdir())


def fail_in_batch(how):
    """batches, but process 1 fails before its second."""
    def failing(windows, size, label):
        for i, batch in enumerate(batches(windows, size, label), 1):
            if processes.rank() == 1 and i == 2 and label == "attribution":
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("only here")
            yield batch
    return failing


def write_scores(folder, shard):
    model = load_checkpoint(f"{folder}/random", shard=bool(int(shard)))
    cosines, scores = sweeps(model)
    held = sum(p.nbytes for p in map(processes.own, model.layers.parameters()))
    torch.save({"cosines": cosines, "scores": scores, "held": held}, f"{folder}/{processes.rank()}.pt")


def count_buffers(folder):
    """How many FSDP2 communication contexts, each of which keeps such a gradient, the model's layers have."""
    from torch.distributed.fsdp import FSDPModule
    model = load_checkpoint(f"{folder}/random", shard=True)
    sweeps(model)
    found = {id(m._get_fsdp_state()._comm_ctx) for m in model.modules() if isinstance(m, FSDPModule)}
    open(f"{folder}/{processes.rank()}.txt", "w").write(str(len(found)))


def only_process_0_looks(name, use, data_dir=None):
    """load_text, of which all but the embedded text is missing, and all where another process asks."""
    assert processes.rank() == 0
    if name != "embedded":
        raise FileNotFoundError(name)
    return corpus.embedded_text(use), "embedded"


def save_slowly(*args):
    """Process 0 is in the midst of writing when process 1 fails."""
    import time

    import model
    if processes.rank():
        while not list(os.scandir(".")):
            time.sleep(0.1)
        raise ValueError("while another writes")
    model.torch.save = lambda *_: time.sleep(600)
    save_checkpoint(*args)


if __name__ == "__main__":
    obey_signals()  # as grasp.py and evaluate.py do
    task, *words = sys.argv[1:]
    if task in ("scores", "buffers"):
        main = partial(write_scores if task == "scores" else count_buffers, *words)
    elif task == "texts":
        sys.argv[1:], main = words, evaluate.main
        corpus.load_text, evaluate.TINY = only_process_0_looks, None  # or it would ask for no other text
        sys.argv += ["--ckpt", str(ROOT / "data/tiny")]
    else:
        sys.argv[1:], main = words, grasp.main
        if task == "slow save":
            grasp.save_checkpoint = save_slowly
        else:
            grasp.batches = fail_in_batch(task)
    evaluate.command(main, parallel=True)
