"""What is written stands there whole or not at all, whatever ends the run; and Ctrl-C ends it at once, with one line.

A file or folder NAME is written as .NAME.tmp-XXXXXXXX/new beside it, and that folder is locked for as long as the
process lives. One without a lock is what a killed run left behind: the next run that writes NAME takes it away.
"""
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
writing = {}  # the scratch folders of this process: their targets
renaming = threading.Lock()  # a signal waits for it, and then keeps it for good


def check_target(path, overwrite=False, inputs=()):
    """FileExistsError or PermissionError if a checkpoint cannot be written to `path`; called before any long work.

    inputs: whole paths of folders that are read, none of which it may be (ValueError).
    """
    path = Path(path)
    if Path(os.path.realpath(path)) in inputs:
        raise ValueError(f"--out {path}: is the input")
    check_place(path)
    clear_leftovers(path)
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise FileExistsError(f"{path}: exists; choose another, or pass --overwrite where the command has it")
        ours = {"params.json", "consolidated.00.pth", "report.json"}
        found = {entry.name for entry in path.iterdir()} if path.is_dir() and not path.is_symlink() else set()
        if not ours <= found or not all(name in ours or name.startswith("tokenizer.") for name in found):
            raise FileExistsError(f"{path}: --overwrite replaces only a folder written by this project (report.json)")


def check_place(path):
    """OSError if a file or folder `path` cannot be written, whatever stands there."""
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, {parent} is not a folder or read-only")
    if len(os.fsencode(path.name)) > 230:  # of the 255 that a file system gives: some are for .NAME.state.tmp-XXXXXXXX
        raise OSError(f"{path}: a name of more than 230 bytes")


@contextmanager
def written_whole(path):
    """A path to write a file or a folder at: in the end it takes `path`'s place, and if that is not reached, it goes.

    OSError (disk full, read-only, a folder that was not there at first) with `path` as it was before.
    """
    path = Path(path).absolute()
    stood = path.is_dir()
    with scratch_folder(path) as new:
        try:
            yield new
        except RuntimeError as e:
            if type(e) is not RuntimeError:  # out of memory has a class of its own
                raise
            free = shutil.disk_usage(path.parent).free / 2 ** 20  # what torch.save says of a failed write is no reason
            raise OSError(f"{path}: could not be written, {free:,.1f} MiB are free there: {e}") from e
        with renaming:
            if stood:  # and not one that another run has put there meanwhile
                path.rename(new.with_name("old"))
            new.replace(path)


@contextmanager
def scratch_folder(path):
    """A path beside `path` to make a file or folder at, which goes at the end, or when the next run begins."""
    path = Path(path).absolute()
    clear_leftovers(path)
    with renaming:  # a signal finds it in `writing`, or finds none
        scratch, lock = locked_folder(path)
        writing[scratch] = path
    try:
        yield scratch / "new"
    finally:
        with renaming:
            clear(scratch, path)
            del writing[scratch]
            os.close(lock)


def write_json(file, content):
    """A table or list as a JSON file, whole or not at all; of a link, the file that it leads to."""
    with written_whole(os.path.realpath(file)) as partial:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def scratch_prefix(path):
    return f".{path.name}.tmp-"  # mkdtemp adds eight letters


def locked_folder(path):
    """(a new scratch folder beside `path`, the open file that holds its lock)."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix(path), dir=path.parent))
        with suppress(FileNotFoundError):  # another run has taken it for a leftover just now
            lock = os.open(scratch, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks, where nobody takes leftovers away
                fcntl.flock(lock, fcntl.LOCK_EX)
            if scratch.exists():
                return scratch, lock


def clear_leftovers(path):
    """Take away the scratch folders that killed runs left of `path`: their lock is free, nothing else is in them."""
    path = Path(path).absolute()
    names = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    for scratch in (path.with_name(name) for name in names if name[:-8] == scratch_prefix(path)):
        with suppress(OSError):  # another process is at work there, it is another user's, or no folder
            lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if set(os.listdir(scratch)) <= {"new", "old"}:
                    clear(scratch, path)
            finally:
                os.close(lock)


def clear(scratch, path):
    """Take a scratch folder away; where it ended between its two renames, what stood at `path` goes back there."""
    with suppress(OSError):  # there is nothing to put back
        if not os.path.lexists(path) and scratch.name[-1] != "-":  # what is half gone stays gone
            (scratch / "old").rename(path)
    gone = scratch.with_name(scratch.name[:-1] + "-")  # a thread that still writes finds no folder to put more into
    with suppress(OSError):
        scratch.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def obey_signals():
    """From here on Ctrl-C, SIGTERM and SIGHUP end the process within a moment, with nothing half written left behind.

    Ctrl-C says so in one line, the others say nothing; exit code 128 and the signal's number. A thread waits for them,
    since Python's own handlers run between two operations of the main thread, and one decomposition may take a minute.
    Called by a command before it imports torch, which takes seconds.
    """
    told = os.dup(2) if sys.stderr else -1  # as it is now: while a library works, 2 may point elsewhere
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # the number of each signal is written there the moment it comes
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & have it
            signal.signal(number, lambda *_: None)
    threading.Thread(target=end_at_signal, args=[reader, told], daemon=True).start()


def end_at_signal(reader, told):
    while (number := os.read(reader, 1)[0]) not in SIGNALS:  # a library's own
        pass
    try:
        renaming.acquire()
        for scratch, path in writing.items():
            clear(scratch, path)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first tells
            os.write(told, b"\ninterrupted\n")
    finally:
        os._exit(128 + number)
