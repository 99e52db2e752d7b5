"""The lesson: what is written stands there whole or not at all, whatever ends it, and a signal ends it at once."""
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from conftest import ROOT, random_model
from data import target
from data.target import check_target, clear_leftovers, scratch_folder, scratch_prefix, write_json, written_whole
from model import load_checkpoint, save_checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def leave(path, *inside, letters="abcdefgh"):
    """What a killed run leaves of `path`: a scratch folder that nobody holds the lock of."""
    scratch = path.with_name(scratch_prefix(path) + letters)
    scratch.mkdir()
    for name in inside:
        (scratch / name).mkdir()
        (scratch / name / "file").write_text(name)
    return scratch


# ------------------------------------------------------------------------------------------------ whole or absent

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    for content in ("first", "second"):
        with written_whole(file) as partial:
            partial.write_text(content)
            assert not file.exists() or file.read_text() == "first"
    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (RuntimeError, OSError)):
        with pytest.raises(raised):
            with written_whole(file) as partial:
                partial.write_text("cut")
                raise error
        assert file.read_text() == "second" and names(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with written_whole(out) as folder:
            folder.mkdir()
            (folder / content).touch()
        assert names(out) == [content] and names(tmp_path) == ["out"]
    with pytest.raises(FileNotFoundError), written_whole(out):  # nothing was written: the last rename has no source
        pass
    assert names(out) == ["second"] and names(tmp_path) == ["out"]


def test_only_what_stood_there_at_first_is_replaced(tmp_path):
    """Two runs with one --out: the one that ends last has not asked to overwrite the other's."""
    out = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), written_whole(out) as folder:
        folder.mkdir()
        out.mkdir()
        (out / "another's").touch()
    assert names(out) == ["another's"] and names(tmp_path) == ["out"]


def test_a_failed_write_says_what_is_free_and_out_of_memory_stays_what_it_is(tmp_path):
    class OutOfMemoryError(RuntimeError):
        pass

    with pytest.raises(OSError, match=r"out: could not be written, [\d,.]+ MiB are free there: unexpected pos 64"):
        with written_whole(tmp_path / "out"):
            raise RuntimeError("unexpected pos 64")
    with pytest.raises(OutOfMemoryError), written_whole(tmp_path / "out"):
        raise OutOfMemoryError
    assert names(tmp_path) == []


def test_a_parent_that_vanishes_is_an_error_and_does_not_come_back(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises(FileNotFoundError), written_whole(parent / "out") as partial:
        shutil.rmtree(parent)
        partial.write_text("late")
    with pytest.raises(FileNotFoundError):
        write_json(parent / "out", {})
    with pytest.raises(PermissionError, match="is not a folder or read-only"):
        check_target(parent / "out")
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------ leftovers

def test_a_leftover_is_cleared_but_not_one_at_work(tmp_path):
    out = tmp_path / "out"
    leave(out, "new")
    with scratch_folder(out) as ours:
        assert names(tmp_path) == [ours.parent.name]
        check_target(out)
        assert names(tmp_path) == [ours.parent.name]  # locked: its process lives
        with written_whole(out) as second:
            second.touch()
        assert names(tmp_path) == sorted([ours.parent.name, "out"])
    assert names(tmp_path) == ["out"]


def test_what_a_kill_between_the_two_renames_left_is_put_back(tmp_path):
    out = tmp_path / "out"
    save_checkpoint(random_model(), out, {"some": "report"})
    scratch = leave(out, "new")
    out.rename(scratch / "old")
    with pytest.raises(FileExistsError, match="exists; choose another"):
        check_target(out)
    assert load_checkpoint(out).n_params == random_model().n_params and names(tmp_path) == ["out"]
    leave(out, "old")  # and where the kill came after both, the new one stays
    check_target(out, overwrite=True)
    assert (out / "params.json").is_file() and names(tmp_path) == ["out"]


def test_what_was_half_gone_is_not_put_back(tmp_path):
    """Killed while it deleted what it had replaced; then the user moved the new one away."""
    leave(tmp_path / "out", "old", letters="abcdefg-")
    check_target(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_link_to_a_json_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "[\n 1\n]\n"


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    """Another target whose name begins or goes on like ours, another number of letters, other content, a link."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.mkdir()
    kept = [leave(tmp_path / "out.state"), leave(tmp_path / "ou"), leave(out, letters="abcdefghi"), precious,
            leave(out, "thesis", letters="20261122")]
    (tmp_path / ".out.tmp-linklink").symlink_to(precious)
    (tmp_path / ".out.tmp-filefile").touch()
    leave(out)
    clear_leftovers(out)
    assert names(tmp_path) == sorted([path.name for path in kept] + [".out.tmp-linklink", ".out.tmp-filefile"])


def test_a_leftover_taken_away_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Between mkdtemp and the lock another run may take our folder for a leftover."""
    flock, taken = fcntl.flock, []

    def late(lock, operation):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        flock(lock, operation)

    monkeypatch.setattr(target.fcntl, "flock", late)
    with scratch_folder(tmp_path / "out") as scratch:
        assert scratch.parent.is_dir() and scratch.parent != taken[0]


def test_a_thread_that_still_writes_leaves_nothing_behind(tmp_path, monkeypatch):
    """Whenever a folder has been emptied and is about to go, the thread puts one more file where it was writing."""
    rmdir, late = os.rmdir, []

    def rmdir_late(*words, **how):
        with suppress(OSError):
            (scratch / "new/more").touch()
        late.append(words)
        rmdir(*words, **how)

    scratch = leave(tmp_path / "out", "new")
    monkeypatch.setattr(os, "rmdir", rmdir_late)
    target.clear(scratch, tmp_path / "out")
    assert late and names(tmp_path) == []


def test_names_leave_room_for_the_scratch_folders(tmp_path):
    check_target(tmp_path / ("n" * 230))
    write_json(tmp_path / ("n" * 230 + ".state"), {})
    with pytest.raises(OSError, match="more than 230 bytes"):
        check_target(tmp_path / ("n" * 231))


# ------------------------------------------------------------------------------------------------ signals

def process(code, folder, **how):
    """Python at work on `code` after obey_signals(), its standard output read until it says that it is there."""
    code = f"from data.target import *\nobey_signals()\n{code}"
    started = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, **how,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"})
    assert started.stdout.readline() == "there\n", started.communicate()
    return started


def ended(started, number):
    """(exit code, the rest of stdout, stderr) after a signal."""
    started.send_signal(number)
    out, err = started.communicate()
    return started.returncode, out, err.strip()


WRITING = """
from conftest import random_model
import model, itertools
def slow(*words):
    (words[1].parent / "more").touch()
    print("there")
    for i in itertools.count():
        with suppress(OSError):
            (words[1].parent / f"{i}").touch()
model.shutil.copyfile = lambda source, file: slow(source, file)
model.save_checkpoint(random_model(), "out", {"new": 1}, "tokenizer.model", overwrite=True)
"""


@pytest.mark.parametrize("code", [
    "print('there'); import torch; print('imported')",
    "import torch; W = torch.randn(6000, 6000); print('there'); torch.linalg.svd(W); print('decomposed')",
    "print('there'); time_ = __import__('time').sleep(1000)"], ids=["import", "svd", "sleep"])
@pytest.mark.parametrize("number, code_and_line", [(signal.SIGINT, (130, "interrupted")), (signal.SIGTERM, (143, "")),
                                                   (signal.SIGHUP, (129, ""))])
def test_a_signal_does_not_wait_for_what_is_under_way(code, number, code_and_line, tmp_path):
    exit_code, out, err = ended(process(code, tmp_path), number)
    assert (exit_code, err) == code_and_line and out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_while_writing(number, tmp_path):
    """The old folder stands, though a thread goes on putting files into the new one."""
    save_checkpoint(random_model(), tmp_path / "out", {"old": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    exit_code, *_ = ended(process(WRITING, tmp_path), number)
    assert exit_code == (-number if number == signal.SIGKILL else 128 + number)
    assert len(names(tmp_path)) == (2 if number == signal.SIGKILL else 1)
    with pytest.raises(FileExistsError):
        check_target(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As a shell's & and nohup start a process: Ctrl-C is for what runs in front."""
    started = process("print('there'); import time; time.sleep(1); print('done')", tmp_path,
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert ended(started, signal.SIGINT) == (0, "done\n", "")


def test_a_librarys_own_signals_end_nothing(tmp_path):
    started = process("import time; signal.signal(signal.SIGALRM, print); print('there'); signal.alarm(1); time.sleep(2)\n"
                      "print('done')", tmp_path)
    out, err = started.communicate()
    assert started.returncode == 0 and out.endswith("done\n") and not err


def test_a_signal_ends_it_though_nobody_reads_what_it_says(tmp_path):
    started = process("print('there'); import time; time.sleep(1000)", tmp_path)
    started.stderr.close()
    started.send_signal(signal.SIGINT)
    assert started.wait() == 130


def test_it_tells_though_standard_error_points_elsewhere(tmp_path):
    """As it does while a library that says too much is at work."""
    started = process("os.dup2(os.open(os.devnull, os.O_WRONLY), 2); print('there'); import time; time.sleep(1000)",
                      tmp_path)
    assert ended(started, signal.SIGINT) == (130, "", "interrupted")
    closed = process("print('there'); import time; time.sleep(1000)", tmp_path, preexec_fn=lambda: os.close(2))
    assert ended(closed, signal.SIGINT) == (130, "", "")


def test_a_child_process_can_be_interrupted_as_ever(tmp_path):
    started = process("import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\n"
                      "import time; time.sleep(0.5); print('there'); print(child.pid); child.wait(); print('over')\n"
                      "time.sleep(1000)", tmp_path)
    os.kill(int(started.stdout.readline()), signal.SIGTERM)
    assert started.stdout.readline() == "over\n"
    assert ended(started, signal.SIGINT)[0] == 130


@pytest.mark.parametrize("rank, line", [("0", "interrupted"), ("1", "")])
def test_of_several_processes_the_first_tells(rank, line, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    started = process("print('there'); import time; time.sleep(1000)", tmp_path)
    assert ended(started, signal.SIGINT) == (130, "", line)
