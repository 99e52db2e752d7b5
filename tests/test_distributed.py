"""The lesson: several processes give the results of one.

torchrun starts this file again: the code after `if __name__` runs in each process. Starting takes longer than
the work, so torchrun runs once with 2 processes and once with 3, and the tests read what these have written.
tests/robustness/test_torchrun.py has the runs that fail.
"""
import json
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

import grasp
from attribution import weight_gradients
from tests.conftest import output_of, random_model, random_tokens, run, start, torchrun, ROOT
from data.checkpoint import load_checkpoint
from evaluate import perplexity
from grasp import find_redundant
from model import matrix_names
from runtime import cli
from runtime.cli import batches

JOB = ["--layers", "2", "--samples", "7", "--seq-len", "48", "--batch-size", "2", "--windows", "5"]


@pytest.mark.parametrize("n, size, sequences", [(1, 4, 10), (2, 2, 7), (3, 2, 7), (3, 5, 2), (4, 1, 5)])
def test_each_sequence_has_one_process(n, size, sequences, monkeypatch):
    """In order, so that what is gathered has the order of the windows. A process may have none."""
    windows = torch.arange(sequences)[:, None].expand(-1, 3)
    monkeypatch.setattr(dist, "is_initialized", lambda: n > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: n)
    found = []
    for process in range(n):
        monkeypatch.setattr(dist, "get_rank", lambda: process)
        found.append(list(batches(windows, size, "")))
    assert torch.equal(torch.cat([batch for mine in found for batch in mine]), windows)
    assert all(0 < len(batch) <= size for mine in found for batch in mine)
    counts = [sum(map(len, mine)) for mine in found]
    assert max(counts) - min(counts) <= 1


# --------------------------------------------------------------------------------- what each process does

def sweeps(samples):
    """Cosines, redundant layers, gradients and perplexity of a random model."""
    model = random_model(torch.float32)
    sweep = partial(batches, random_tokens(model, samples, 11), 1)
    c, redundant = find_redundant(model, sweep, 2)
    return {"c": c, "redundant": redundant, "perplexity": perplexity(model, sweep("")),
            "gradients": weight_gradients(model, matrix_names(1, 3), sweep(""))}


def in_each_process(folder):
    """7 sequences, then 2, of which a third process has none; then the whole job."""
    torch.save([sweeps(7), sweeps(2)], f"{folder}/{dist.get_rank()}.pt")
    sys.argv[1:] = [*JOB, "--out", f"{folder}/job/out"]
    grasp.main()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """{n: (folder, stdout)} of n processes. Both groups run at the same time."""
    folders = {n: tmp_path_factory.mktemp(f"{n}-processes") for n in (2, 3)}
    for folder in folders.values():
        (folder / "job").mkdir()
    groups = {n: start(*torchrun(n, __file__, folder), cwd=folder) for n, folder in folders.items()}
    ends = {n: group.communicate() for n, group in groups.items()}
    for n, (_, err) in ends.items():
        assert groups[n].returncode == 0, err
    return {n: (folders[n], out) for n, (out, _) in ends.items()}


# ---------------------------------------------------------------------------------------- what they have done

@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("samples", [7, 2])
def test_all_processes_have_the_sums_over_all(n, samples, done):
    expected = sweeps(samples)
    for process in range(n):
        found = torch.load(done[n][0] / f"{process}.pt")[samples == 2]
        torch.testing.assert_close(found["c"], expected["c"], rtol=0, atol=1e-6)  # in the order of the sequences
        assert found["redundant"] == expected["redundant"]
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
        for name, G in expected["gradients"].items():
            assert (found["gradients"][name] - G).norm() < 1e-5 * G.norm(), name


@pytest.mark.parametrize("n", [2, 3])
def test_the_job_is_the_same_job(n, done, tmp_path, capsys):
    """7 sequences in batches of 2: the processes make unequally many steps. Process 0 prints and writes."""
    output_of(grasp.main, [*JOB, "--out", tmp_path / "alone"], capsys)
    folder, out = done[n]
    assert out.count(f"written to {folder}/job/out") == 1 and out.count(f"processes    {n}") == 1
    assert sorted(p.name for p in (folder / "job").iterdir()) == ["out"]
    ours, theirs = (json.loads((place / "report.json").read_text())
                    for place in (folder / "job/out", tmp_path / "alone"))
    assert ours["redundant"] == theirs["redundant"] and ours["cosine_sequences"] == 7
    assert ours["cosines"] == pytest.approx(theirs["cosines"], abs=1e-6)
    kept, expected = ({(record["name"], component) for record in report["matrices"] for component in record["kept"]}
                      for report in (ours, theirs))
    differ = kept ^ expected  # of two scores that nearly tie, last bits decide
    assert len(ours["matrices"]) == 14 and len(kept) == len(expected) and len(differ) <= 2
    for row, other in zip(ours["results"], theirs["results"], strict=True):
        assert row["model"] == other["model"]
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-2 if differ else 1e-5)
    model, other = load_checkpoint(folder / "job/out"), load_checkpoint(tmp_path / "alone")
    for name, p in model.named_parameters():
        if name.rpartition(".")[0] not in {matrix for matrix, _ in differ}:
            assert torch.allclose(p, other.get_parameter(name), rtol=0, atol=1e-5), name


def test_a_schedulers_variables_alone_mean_nothing(tmp_path):
    """Without torchrun there is one process, whatever a batch system has left in the environment."""
    left = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = run(ROOT / "evaluate.py", "--windows", 1, cwd=tmp_path, env=left)
    assert done.returncode == 0 and "embedded ppl" in done.stdout and "processes" not in done.stdout


if __name__ == "__main__":
    cli.command(partial(in_each_process, sys.argv[1]), parallel=True)
