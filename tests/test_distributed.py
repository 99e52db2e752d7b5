"""The lesson: several processes give the results of one, with whole weights or split ones.

torchrun starts this file again: the code after `if __name__` runs in each process. Starting takes longer than
the work, so torchrun runs once with 2 processes and once with 4, and the tests read what these have written.
tests/robustness/test_torchrun.py has the runs that fail.
"""
import atexit
import json
import os
import sys
from functools import partial

import pytest
import torch
import torch.distributed.fsdp

import grasp
from attribution import angular_distances, importance, layer_cosines, sigma_gradients, svd, weight_gradients
from tests.conftest import output_of, random_model, random_tokens, start, torchrun
from evaluate import perplexity
from model import load_checkpoint, matrix_names, save_checkpoint
from runtime import cli, distributed
from runtime.cli import batches

JOB = ["--layers", "2", "--samples", "7", "--seq-len", "48", "--batch-size", "2", "--windows", "5"]
CAN_SHARD = hasattr(torch.distributed.fsdp, "share_comm_ctx")
SHARD = pytest.mark.skipif(not CAN_SHARD, reason="--shard needs torch 2.10")


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


# --------------------------------------------------------------------------------- what each process does

def in_each_process(folder):
    """The sweeps of a random model, with whole and with split weights, then the whole job. Four split it."""
    atexit.register(os.abort)  # a process of several must not take Python down: gloo's threads may abort it
    assert distributed.smallest(distributed.index() + 3) == 3
    for shard in (False, True)[:1 + CAN_SHARD]:
        write_scores(folder, shard)
    shard = ["--shard"] * (distributed.count() == 4 and CAN_SHARD)
    sys.argv[1:] = [*JOB, *shard, "--out", f"{folder}/job/out"]
    grasp.main()


def write_scores(folder, shard):
    """Write what this process computes and holds, and the number of FSDP2's communication contexts."""
    from torch.distributed.fsdp import FSDPModule
    model = load_checkpoint(f"{folder}/random", split=shard)
    cosines, scores = sweeps(model)
    held = sum(p.nbytes for p in map(distributed.local, model.layers.parameters()))
    contexts = {id(m._get_fsdp_state()._comm_ctx) for m in model.modules() if isinstance(m, FSDPModule)}
    torch.save({"cosines": cosines, "scores": scores, "held": held, "contexts": len(contexts)},
               f"{folder}/{distributed.index()}-{shard}.pt")


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


def small_model():
    """Its rows do not divide by 4."""
    return random_model(torch.float32, dim=30, n_heads=5, n_kv_heads=1, head_dim=6, hidden_dim=70)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """{n: (folder, stdout)} of n processes. Both groups run at the same time."""
    folders = {n: tmp_path_factory.mktemp(f"{n}-processes") for n in (2, 4)}
    for folder in folders.values():
        (folder / "job").mkdir()
        save_checkpoint(small_model(), folder / "random")
    groups = {n: start(*torchrun(n, __file__, folder), cwd=folder) for n, folder in folders.items()}
    ends = {n: group.communicate() for n, group in groups.items()}
    for n, (_, err) in ends.items():
        assert groups[n].returncode == 0, err
    return {n: (folders[n], out) for n, (out, _) in ends.items()}


# ---------------------------------------------------------------------------------------- what they have done

@pytest.mark.parametrize("n", [2, pytest.param(4, marks=SHARD)])
def test_the_job_is_the_same_job(n, done, tmp_path, capsys):
    """7 sequences in batches of 2: some processes have one sequence less than others. 4 split the weights."""
    output_of(grasp.main, [*JOB, "--out", tmp_path / "alone"], capsys)
    folder, out = done[n]
    assert out.count(f"written to {folder}/job/out") == 1 and f"processes    {n}" in out
    assert sorted(p.name for p in (folder / "job").iterdir()) == ["out"]
    ours, theirs = (json.loads((place / "report.json").read_text())
                    for place in (folder / "job/out", tmp_path / "alone"))
    assert ours["settings"]["shard"] == (n == 4)
    assert ours["redundant"] == theirs["redundant"]
    assert ours["cosines"] == pytest.approx(theirs["cosines"], abs=1e-6)
    kept, expected = ({record["name"]: record["kept"] for record in report["matrices"]}
                      for report in (ours, theirs))
    assert kept == expected and len(kept) == 14
    for row, other in zip(ours["results"], theirs["results"], strict=True):
        assert row["model"] == other["model"]
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    model, other = load_checkpoint(folder / "job/out"), load_checkpoint(tmp_path / "alone")
    for name, p in model.named_parameters():
        assert torch.allclose(p, other.get_parameter(name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("n, shard", [(2, False), (4, False), pytest.param(2, True, marks=SHARD),
                                      pytest.param(4, True, marks=SHARD)])
def test_scores_and_memory_of_each_process(n, shard, done):
    """Split, a process holds its rows; the head and the embeddings stay whole."""
    model, (folder, _) = small_model(), done[n]
    cosines, scores = sweeps(model)
    found = [torch.load(folder / f"{place}-{shard}.pt") for place in range(n)]
    assert all(torch.allclose(part["cosines"], cosines, rtol=0, atol=1e-6) for part in found)
    assert sorted(name for part in found for name in part["scores"]) == sorted(scores)
    for part in found:
        assert len(part["scores"]) in (28 // n, -(-28 // n))
        for name, score in part["scores"].items():
            assert torch.allclose(score, scores[name], rtol=1e-4, atol=1e-4 * scores[name].max()), name
    everything = sum(p.nbytes for p in model.layers.parameters())
    most = max(part["held"] for part in found)
    assert 1 / n <= most / everything < 1.2 / n if shard else most == everything


@SHARD
@pytest.mark.parametrize("n", [2, 4])
def test_no_process_keeps_the_whole_gradients_of_more_than_one_matrix(n, done):
    """FSDP2 keeps one whole gradient per communication context until the backward pass ends."""
    assert [torch.load(done[n][0] / f"{place}-True.pt")["contexts"] for place in range(n)] == [1] * n


if __name__ == "__main__":
    cli.command(partial(in_each_process, sys.argv[1]), parallel=True)
