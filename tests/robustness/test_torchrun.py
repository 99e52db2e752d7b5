"""The lesson: if one of several processes fails, all end, and one line says why.

torchrun starts this file again: the code after `if __name__` runs in each process.
"""
import atexit
import os
import signal
import sys
import time

import pytest
import torch

import grasp
from tests.conftest import ROOT, run, torchrun
from tests.test_distributed import JOB, SHARD
from model import save_checkpoint
from runtime import cli, distributed
from runtime.cli import batches


def errors(done):
    """The lines that say why. Nothing may abort: a process of several must not take Python down."""
    assert "SIGABRT" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@SHARD
@pytest.mark.parametrize("ending, told", [("error", "error: only here"), ("kill", "by peer")])
def test_if_one_process_ends_all_end(ending, told, tmp_path):
    """Process 1 fails in its second batch. One line says why, and none of ours shows a stack trace."""
    done = run(*torchrun(2, __file__, ending, *JOB, "--shard", "--out", "out"), cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr
    assert "in backward" not in done.stderr and "in weight_gradients" not in done.stderr


@pytest.mark.parametrize("words, told", [
    ([ROOT / "grasp.py", "--layers", "9"], "this model has 8 layers"),
    (["-m", "extras.fisher", "--budget", "0.3"], "start it with python, not with torchrun")])
def test_a_mistake_of_all_processes_is_one_line(words, told, tmp_path):
    done = run(*torchrun(2, *words), cwd=tmp_path)
    assert done.returncode != 0 and len(errors(done)) == 1 and told in errors(done)[0], done.stderr


def test_a_terminated_process_removes_what_it_was_writing(tmp_path):
    """torchrun ends process 0 with SIGTERM, because process 1 has failed."""
    done = run(*torchrun(2, __file__, "slow save", *JOB, "--out", "out"), cwd=tmp_path)
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


def save_slowly(*args):
    """Process 0 is writing when process 1 fails."""
    if distributed.index():
        while not list(os.scandir(".")):
            time.sleep(0.1)
        raise ValueError("while another writes")
    torch.save = lambda *_: time.sleep(600)
    save_checkpoint(*args)


if __name__ == "__main__":
    ending, *sys.argv[1:] = sys.argv[1:]
    atexit.register(os.abort)
    if ending == "slow save":
        grasp.save_checkpoint = save_slowly
    else:
        cli.batches = fail_in_batch(ending)
        if ending == "kill":  # torchrun's SIGTERM may come before process 0 has noticed
            cli.terminate = lambda *_: None
    cli.command(grasp.main, parallel=True)
