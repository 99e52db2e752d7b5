"""The lesson: if one of several processes fails, it says why, and torchrun ends the others.

torchrun starts this file again: the code after `if __name__` runs in each process.
"""
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

import grasp
from tests.conftest import ROOT, run, torchrun
from tests.test_distributed import JOB
from data.checkpoint import save_checkpoint
from runtime import cli
from runtime.cli import batches


def errors(done):
    """The lines that say why, and no stack trace of ours; nothing may abort."""
    assert not any(word in done.stderr for word in ("SIGABRT", "in command", "in weight_gradients")), done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("ending", ["error", "kill"])
def test_if_one_process_ends_all_end(ending, tmp_path):
    """Process 1 fails in its second batch. The other may say that it has lost it; nothing is left behind."""
    done = run(*torchrun(2, __file__, ending, *JOB, "--out", "out"), cwd=tmp_path)
    assert done.returncode != 0 and ("error: only here" in errors(done)) == (ending == "error"), done.stderr
    assert all(line == "error: only here" or "peer" in line for line in errors(done)), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, told", [
    ([ROOT / "grasp.py", "--layers", "9"], "this model has 8 layers"),
    (["-m", "extras.fisher", "--budget", "0.3"], "start it with python, not with torchrun")])
def test_a_mistake_of_all_processes_is_a_line_of_each(words, told, tmp_path):
    """Or of those that come so far before torchrun ends them."""
    done = run(*torchrun(2, *words), cwd=tmp_path)
    assert done.returncode != 0 and 1 <= len(errors(done)) <= 2, done.stderr
    assert all(told in line for line in errors(done))


def test_a_terminated_process_removes_what_it_was_writing(tmp_path):
    """torchrun ends process 0 with SIGTERM, because process 1 has failed."""
    done = run(*torchrun(2, __file__, "slow save", *JOB, "--out", "out"), cwd=tmp_path)
    assert done.returncode != 0 and errors(done) == ["error: while another writes"]
    assert list(tmp_path.iterdir()) == []


def fail_in_batch(how):
    """batches, but process 1 fails before its second."""
    def failing(windows, size, label):
        for i, batch in enumerate(batches(windows, size, label), 1):
            if dist.get_rank() == 1 and i == 2 and label == "attribution":
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("only here")
            yield batch
    return failing


def save_slowly(*args):
    torch.save = lambda *_: time.sleep(600)
    save_checkpoint(*args)


def fail_while_another_writes():
    """Whether this process writes. Process 1 waits until process 0 does, and fails."""
    if dist.get_rank():
        while not list(os.scandir(".")):
            time.sleep(0.1)
        raise ValueError("while another writes")
    return True


if __name__ == "__main__":
    ending, *sys.argv[1:] = sys.argv[1:]
    if ending == "slow save":
        grasp.save_checkpoint, grasp.check_output = save_slowly, lambda *_: None  # which writes, too
        grasp.check_space = lambda *_: setattr(cli, "first_process", fail_while_another_writes)
    else:
        cli.batches = fail_in_batch(ending)
    cli.command(grasp.main, parallel=True)
