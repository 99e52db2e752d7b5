"""The lesson: Ctrl-C and SIGTERM end a command with one line, and remove what it was writing.

Each command is a child process. tests/robustness/crashes.py hits commands at hundreds of random moments.
"""
import signal
import time

import pytest

from tests.conftest import ROOT, obey_all_signals, random_model, start
from data.checkpoint import load_checkpoint, save_checkpoint
from data.files import read_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def started(code, folder, *words, preexec_fn=obey_all_signals):
    """A process that runs the Python code and has printed "there"."""
    process = start("-u", "-c", code, *words, cwd=folder, preexec_fn=preexec_fn)
    while (line := process.stdout.readline()) != "there\n":
        assert line, process.communicate()
    return process


# ------------------------------------------------------------------------------------------- during the sweep

def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    process = start("-u", ROOT / "grasp.py", "--layers", 2, "--samples", 100_000, cwd=tmp_path,
                    preexec_fn=obey_all_signals)
    try:
        while not process.stdout.readline().startswith("method"):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == "\ninterrupted\n" and list(tmp_path.iterdir()) == []


# grasp.py with a sweep that prints "there" and then takes some seconds
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


@pytest.mark.parametrize("number, exit_code, told", [(signal.SIGINT, 130, "\ninterrupted\n"),
                                                     (signal.SIGTERM, 143, "\nterminated\n")])
def test_a_signal_ends_a_sweep(number, exit_code, told, tmp_path):
    """Both say so, on a line of their own, and nothing is left behind."""
    process = started(SLOW, tmp_path, 600)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (exit_code, told) and list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored(tmp_path):
    """A script's shell starts a background command with SIGINT ignored."""
    process = started(SLOW, tmp_path, 0.3, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "written to out" in out, err


# ------------------------------------------------------------------------------------------- during a write

# an overwrite of the folder "out" that prints "there" half-way and then waits
WRITING = """
import pathlib, time
from tests.conftest import random_model
from data.checkpoint import save_checkpoint
from runtime import cli
def slow(file, content):
    file.touch()
    print("there", flush=True)
    time.sleep(600)
pathlib.Path.write_bytes = slow
model, tokenizer = random_model(), {"tokenizer.model": b""}
cli.command(lambda: save_checkpoint(model, "out", {"new": 1}, tokenizer, overwrite=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_an_overwrite_keeps_the_old_folder(number, tmp_path):
    """Only SIGKILL leaves the temporary folder behind, until the next write."""
    save_checkpoint(random_model(), tmp_path / "out", {"old": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    process = started(WRITING, tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert len(names(tmp_path)) == (2 if number == signal.SIGKILL else 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    save_checkpoint(random_model(), tmp_path / "out", {"new": 1}, overwrite=True)
    assert names(tmp_path) == ["out"] and read_json(tmp_path / "out/report.json") == {"new": 1}
    assert load_checkpoint(tmp_path / "out").n_params == random_model().n_params
