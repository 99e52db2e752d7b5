"""The lesson: a write is atomic.

If it fails or is interrupted, the target stays as it was and nothing is left over.
"""
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from data.checkpoint import save_checkpoint
from data.files import OURS, atomic_write, check_output, read_bytes, read_json, write_json
from tests.conftest import random_model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------- atomic writes

def test_a_file_is_replaced_at_the_end(tmp_path):
    file = tmp_path / "file"
    for content in ("first", "second"):
        with atomic_write(file) as new:
            new.write_text(content)
            assert not file.exists() or file.read_text() == "first"
        assert file.read_text() == content and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, RuntimeError])
def test_an_interrupted_write_leaves_the_target_as_it_was(error, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("first")
    folder.mkdir()
    (folder / "first").touch()
    for target in (file, folder, tmp_path / "absent"):
        with pytest.raises(error), atomic_write(target) as new:
            new.mkdir()
            (new / "half of it").touch()
            raise error
    assert names(tmp_path) == ["file", "folder"]
    assert file.read_text() == "first" and names(folder) == ["first"]


def test_a_folder_is_replaced_at_the_end(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_write(out) as new:
            new.mkdir()
            (new / content).touch()
        assert names(out) == [content] and names(tmp_path) == ["out"]
    with pytest.raises(FileNotFoundError), atomic_write(out):  # nothing was written
        pass
    assert names(out) == ["second"] and names(tmp_path) == ["out"]


def test_a_failed_overwrite_restores_the_old_folder(tmp_path, monkeypatch):
    """The old folder waits under another name while the new one gets its place."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "first").touch()

    def fail(self, target):
        assert self.is_dir() and not out.exists()
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"), atomic_write(out) as new:
        new.mkdir()
    assert names(out) == ["first"] and names(tmp_path) == ["out"]


def test_only_a_folder_that_was_there_at_the_start_is_replaced(tmp_path):
    """Of two runs with the same --out the second to end fails: it was not told to overwrite."""
    out = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), atomic_write(out) as new:
        new.mkdir()
        out.mkdir()
        (out / "another's").touch()
    assert names(out) == ["another's"] and names(tmp_path) == ["out"]


def test_a_failed_write_of_a_checkpoint_names_the_target(tmp_path, monkeypatch):
    """torch.save raises RuntimeError on a full disk."""
    def fail(*_):
        raise RuntimeError("pos 64")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(ValueError, match="out: not written: pos 64"):
        save_checkpoint(random_model(), tmp_path / "out")
    assert names(tmp_path) == []


def test_a_parent_that_vanishes_is_an_error(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises(FileNotFoundError), atomic_write(parent / "out") as new:
        shutil.rmtree(parent)
        new.write_text("late")
    with pytest.raises(FileNotFoundError):
        write_json(parent / "out", {})
    with pytest.raises(OSError, match="parent is no folder that can be written to"):
        check_output(parent / "out")
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------------- leftovers

def test_the_next_write_begins_by_removing_what_a_killed_one_left(tmp_path):
    """So that a disk that a killed run has filled is free again. What belongs to other targets stays."""
    out, other = tmp_path / "out[1]", ".out[1].state.partial-0"
    for name in (".out[1].partial-0", other):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half of it").touch()
    with atomic_write(out) as new:
        assert names(tmp_path) == [new.parent.name, other] and new.parent.name.startswith(".out[1].partial-")
        new.touch()
    assert names(tmp_path) == [other, "out[1]"]


def test_a_check_that_is_killed_leaves_nothing_that_the_next_write_does_not_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(TemporaryDirectory, "cleanup", lambda folder: folder._finalizer.detach())
    check_output(tmp_path / "out")
    assert [name.startswith(".out.partial-") for name in names(tmp_path)] == [True]
    with atomic_write(tmp_path / "out") as new:
        new.touch()
    assert names(tmp_path) == ["out"]


def test_of_two_writes_at_once_one_fails_and_the_target_is_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), atomic_write(out) as first:
        first.write_text("first")
        with atomic_write(out) as second:
            second.write_text("second")
    assert names(tmp_path) == ["out"] and out.read_text() == "second"


def test_what_a_link_in_the_place_of_a_leftover_points_to_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    (tmp_path / ".out.partial-0").symlink_to(precious)
    with atomic_write(tmp_path / "out") as new:
        new.touch()
    assert names(precious) == ["thesis"]


def test_only_a_folder_of_this_project_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in OURS:
        with pytest.raises(FileExistsError, match="--overwrite replaces only a folder of this project"):
            check_output(folder, overwrite=True)
        (folder / name).touch()
    check_output(folder, overwrite=True)
    with pytest.raises(FileExistsError, match="exists; choose another"):
        check_output(folder)


# ------------------------------------------------------------------------------------------------------- JSON

@pytest.mark.parametrize("content, message", [
    (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 10 ** 5, "not JSON"),
    (b"[1]", "a JSON list, expected an object")])
def test_only_an_object_is_read(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file: {message}"):
        read_json(tmp_path / "file")


def test_only_a_file_is_replaced_by_json(tmp_path):
    (tmp_path / "folder").mkdir()
    for file in ("/dev/null", tmp_path / "folder"):
        with pytest.raises(FileExistsError, match=f"{file}: not a file"):
            write_json(file, {})


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(OSError, match="absent"):
        read_bytes(tmp_path / "absent")
