"""Reading and writing files: atomic writes, JSON."""
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

OURS = ("params.json", "consolidated.00.pth", "report.json")  # in every folder that is written
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.*")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path. The file or folder written there replaces `path` at the end.

    If the block fails or is interrupted, `path` stays as it was and the temporary folder is removed. What a
    killed process left of it, the next write of `path` removes, so two processes must not write `path` at
    once. A folder is replaced only if it was there at the start. Raises OSError.
    """
    path = Path(path).absolute()
    prefix, overwrite = f".{path.name}.partial-", path.is_dir()
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(prefix + secrets.token_hex(4))
    new, old = temporary / path.name, temporary / f"{path.name}.old"
    try:
        temporary.mkdir()
        yield new
        if overwrite:
            path.rename(old)
        new.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Check, before any long work, that a checkpoint folder can be written to `path`. Raises OSError.

    overwrite: whether a folder that this project wrote, and that holds nothing else, may be replaced.
    """
    path, parent = Path(path), Path(path).absolute().parent
    if not os.access(parent, os.W_OK):
        raise OSError(f"{path}: {parent} is no folder that can be written to")
    TemporaryDirectory(dir=parent, prefix=f".{path.name}.partial-").cleanup()  # no name may be too long
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path}: exists; choose another, or overwrite it (with --overwrite)")
    names = {*os.listdir(path)} if path.is_dir() else set()
    others = {name for name in names if not any(fnmatch(name, known) for known in OURS + TOKENIZER_FILES)}
    if os.path.lexists(path) and (others or not names >= {*OURS}):
        raise FileExistsError(f"{path}: --overwrite replaces only a folder of this project (report.json)")


def check_space(path: str | Path, size: int) -> None:
    """Raise OSError if the file system of `path` has not so many bytes free."""
    if size > (free := shutil.disk_usage(Path(path).absolute().parent).free):
        raise OSError(f"{path}: needs {size:,} bytes, only {free:,} are free there")


@contextmanager
def error_prefix(what: str | Path) -> Iterator[None]:
    """Turn any error in the block into a one-line ValueError that begins with `what`, e.g. a file's name."""
    try:
        yield
    except (KeyboardInterrupt, ModuleNotFoundError, MemoryError):
        raise
    except BaseException as e:  # a panic of a library in Rust is no Exception
        if getattr(e, "filename", None):  # an OSError that names its file
            raise
        raise ValueError(f"{what}: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from e


def read_bytes(file: str | Path) -> bytes:
    """The content of a file. Raises OSError, and ValueError for a Git LFS pointer."""
    refuse_pointer(file)
    return Path(file).read_bytes()


def refuse_pointer(file: str | Path) -> None:
    """Raise ValueError if Git LFS has left a pointer in the place of a file."""
    with error_prefix(file), open(file, "rb") as f:
        if f.read(30).startswith(b"version https://git-lfs"):
            raise ValueError("a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def read_json(file: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError for anything else."""
    content = read_bytes(file)
    with error_prefix(f"{file}: not JSON"):
        value = json.loads(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a JSON {type(value).__name__}, expected an object")
    return value


def optional_json(file: str | Path) -> dict:
    """The object in a JSON file, or {} if there is no file."""
    return read_json(file) if os.path.isfile(file) else {}


def write_json(file: str | Path, content) -> None:
    """Write a JSON file atomically. Raises OSError, also if it would replace what is not a file."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise FileExistsError(f"{file}: not a file")
    with atomic_write(file) as new:
        new.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
