"""Reading and writing files: atomic writes, JSON."""
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

OURS = {"params.json", "consolidated.00.pth", "report.json"}  # in every folder that is written
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.*")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file or folder written there replaces `path` at the end.

    If the block fails or is interrupted, `path` stays as it was and the temporary path is removed. A folder
    is replaced only if it was there at the start. The next write of `path` removes what a killed process
    left, so two processes must not write it at once. Raises OSError.
    """
    path = Path(path).absolute()
    for name in os.listdir(path.parent):
        if re.fullmatch(rf"\.{re.escape(path.name)}\.partial-[0-9a-f]{{8}}(-old)?", name):
            remove(path.with_name(name))
    new = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    old, overwrite = new.with_name(f"{new.name}-old"), path.is_dir()
    try:
        yield new
        if overwrite:
            path.rename(old)
        new.replace(path)
    except RuntimeError as e:
        if type(e) is not RuntimeError:  # out of memory is a subclass
            raise
        raise OSError(f"{path}: could not be written: {e}") from e  # torch.save on a full disk
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        remove(new)
        remove(old)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_output(path: str | Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Check, before any long work, that a checkpoint folder can be written to `path`. inputs: folders that
    are read.

    Raises FileExistsError, PermissionError or, if it is an input, ValueError.
    """
    path = Path(path)
    if os.path.realpath(path) in [os.path.realpath(folder) for folder in inputs if folder]:
        raise ValueError(f"--out {path}: is the input")
    check_parent(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists; choose another, or overwrite it (with --overwrite)")
    if os.path.lexists(path):
        names = set(os.listdir(path)) if path.is_dir() and not path.is_symlink() else set()
        others = {name for name in names - OURS if not any(fnmatch(name, known) for known in TOKENIZER_FILES)}
        if not OURS <= names or others:
            raise FileExistsError(f"{path}: --overwrite replaces only a folder of this project (report.json)")


def check_parent(path: Path) -> None:
    """Raise OSError if nothing can be written there."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{path}: cannot be written, there is no folder {parent}; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, {parent} is read-only")
    if len(os.fsencode(path.name)) > 220:  # of the 255 of a file system; the temporary name is longer
        raise OSError(f"{path}: the name is too long")


def check_space(path: str | Path, size: int) -> None:
    """Raise OSError if the file system of `path` has not so many bytes free."""
    if size > (free := shutil.disk_usage(Path(path).absolute().parent).free):
        raise OSError(f"{path}: needs {size:,} bytes, only {free:,} are free there")


@contextmanager
def error_prefix(what: str | Path) -> Iterator[None]:
    """Turn any error in the block into a one-line ValueError that begins with `what`, e.g. a file's name."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ModuleNotFoundError, MemoryError):
        raise
    except BaseException as e:  # a panic of a library in Rust is no Exception
        if getattr(e, "filename", None):  # an OSError that names its file
            raise
        raise ValueError(f"{what}: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from e


def read_bytes(file: str | Path, largest: int) -> bytes:
    """The content of a file. Raises OSError, and ValueError if it has more than `largest` bytes."""
    if os.path.getsize(file) > largest:
        raise ValueError(f"{file}: more than {largest:,} bytes")
    refuse_pointer(file)
    with error_prefix(file):
        return Path(file).read_bytes()


def refuse_pointer(file: str | Path) -> None:
    """Raise ValueError if Git LFS has left a pointer in the place of a file."""
    with error_prefix(file), open(file, "rb") as f:
        if f.read(30).startswith(b"version https://git-lfs"):
            raise ValueError("a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def read_json(file: str | Path, largest: int = 2 ** 20) -> dict:
    """The object in a JSON file. Raises ValueError for anything else."""
    content = read_bytes(file, largest)
    with error_prefix(f"{file}: not JSON"):
        value = json.loads(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON {type(value).__name__}, expected an object")
    return value


def optional_json(file: str | Path) -> dict:
    """The object in a JSON file, or {} if there is no file. A report.json may be long."""
    return read_json(file, 2 ** 26) if os.path.isfile(file) else {}


def write_json(file: str | Path, content) -> None:
    """Write a JSON file atomically. If `file` is a link, its target is written."""
    with atomic_write(os.path.realpath(file)) as new:
        new.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
