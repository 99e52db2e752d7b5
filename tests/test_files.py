"""The lesson: a write is atomic.

If it fails or is interrupted, the target stays as it was and nothing is left over.
"""
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.files import atomic_write, check_output, read_bytes, read_json, write_json


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


@pytest.mark.parametrize("error, raised", [(KeyboardInterrupt, KeyboardInterrupt), (SystemExit, SystemExit),
                                           (ValueError, ValueError), (RuntimeError, OSError)])
def test_an_interrupted_write_leaves_the_target_as_it_was(error, raised, tmp_path):
    """torch.save raises RuntimeError on a full disk: that becomes an OSError with the name of the target."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("first")
    folder.mkdir()
    (folder / "first").touch()
    for target in (file, folder, tmp_path / "absent"):
        with pytest.raises(raised), atomic_write(target) as new:
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


def test_a_failed_write_names_the_target_and_out_of_memory_stays_what_it_is(tmp_path):
    class OutOfMemoryError(RuntimeError):
        pass

    with pytest.raises(OSError, match="out: could not be written: pos 64"), atomic_write(tmp_path / "out"):
        raise RuntimeError("pos 64")
    with pytest.raises(OutOfMemoryError), atomic_write(tmp_path / "out"):
        raise OutOfMemoryError
    assert names(tmp_path) == []


def test_a_parent_that_vanishes_is_an_error(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    with pytest.raises(FileNotFoundError), atomic_write(parent / "out") as new:
        shutil.rmtree(parent)
        new.write_text("late")
    with pytest.raises(FileNotFoundError):
        write_json(parent / "out", {})
    with pytest.raises(FileNotFoundError, match="there is no folder .*parent; create it first"):
        check_output(parent / "out")
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------------- leftovers

def leftover(path, suffix=""):
    """A temporary folder of `path`, as a killed process leaves it."""
    folder = path.with_name(f".{path.name}.partial-0123abcd{suffix}")
    folder.mkdir()
    (folder / "half of it").touch()
    return folder


def test_the_name_of_a_leftover_is_that_of_a_write(tmp_path):
    with suppress(FileNotFoundError), atomic_write(tmp_path / "out") as new:
        assert re.fullmatch(r"\.out\.partial-[0-9a-f]{8}", new.name) and new.parent == tmp_path


def test_the_next_write_begins_by_removing_leftovers(tmp_path):
    """So that a disk that a killed run has filled is free again."""
    out = tmp_path / "out"
    leftover(out), leftover(out, "-old")
    with atomic_write(out) as new:
        assert names(tmp_path) == []
        new.touch()
    assert names(tmp_path) == ["out"]


def test_of_two_writes_at_once_one_fails_and_the_target_is_complete(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), atomic_write(out) as first:
        first.write_text("first")
        with atomic_write(out) as second:
            second.write_text("second")
    assert names(tmp_path) == ["out"] and out.read_text() == "second"


def test_a_name_without_room_for_the_temporary_one_is_refused_before_the_work(tmp_path):
    check_output(tmp_path / ("n" * 220))
    with atomic_write(tmp_path / ("n" * 220)) as new:
        new.touch()
    with pytest.raises(OSError, match="the name is too long"):
        check_output(tmp_path / ("é" * 111))


def test_look_alikes_of_leftovers_stay(tmp_path):
    """Temporary files of other targets with similar names, and names that no write gives."""
    out = tmp_path / "out"
    name = leftover(out).name
    shutil.rmtree(tmp_path / name)
    others = [tmp_path / other for other in ("out.state", "ou", "my.out", ".out", "o.t", "OUT")]
    kept = [leftover(other) for other in others]
    for look_alike in (name + "x", name.removeprefix("."), name[:-1], name + ".txt"):
        (tmp_path / look_alike).touch()
        kept.append(tmp_path / look_alike)
    with atomic_write(out) as new:
        new.touch()
    assert names(tmp_path) == sorted([*(path.name for path in kept), "out"])


def test_what_a_leftover_link_points_to_stays(tmp_path):
    precious, link = tmp_path / "precious", leftover(tmp_path / "out")
    precious.mkdir()
    (precious / "thesis").touch()
    shutil.rmtree(link)
    link.symlink_to(precious)
    with atomic_write(tmp_path / "out") as new:
        new.touch()
    assert names(tmp_path) == ["out", "precious"] and names(precious) == ["thesis"]


# ------------------------------------------------------------------------------------------------------- JSON

def test_a_link_to_a_json_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "[\n 1\n]\n"


@pytest.mark.parametrize("content, message", [
    (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 10 ** 5, "not JSON"),
    (b"[1]", "a JSON list, expected an object")])
def test_only_an_object_is_read(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"file: {message}"):
        read_json(tmp_path / "file")


def test_large_files_are_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"{}" + b" " * 98)
    assert read_json(tmp_path / "file", largest=100) == {} and len(read_bytes(tmp_path / "file", 100)) == 100
    for read in (read_json, read_bytes):
        with pytest.raises(ValueError, match="file: more than 99 bytes"):
            read(tmp_path / "file", 99)
    with pytest.raises(OSError, match="absent"):
        read_bytes(tmp_path / "absent", 99)
