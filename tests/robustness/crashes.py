"""Faults made on purpose: whatever interrupts a command, what it writes is whole, absent or as before (Linux).

    python -m tests.robustness.crashes signals    SIGINT, SIGTERM and SIGKILL at 100 moments of each of four commands
    python -m tests.robustness.crashes disk       one that is full, one that is read-only, a folder that vanishes (root)
    python -m tests.robustness.crashes load       50 evaluations at once; a folder of 3 GB in 1.4 times as much memory (cgroup v1)

A third of the moments is aimed at a write, which takes milliseconds: 0 to 30 ms after a temporary path of
data/files.py appears. The others lie anywhere from where cli.command has its handlers in place. After SIGKILL one
command in four runs again, to its end, which must take away what the killed one left. Killed between the two renames
of an overwrite, a target may be absent if the old folder waits, complete, in the temporary one. Two commands run at a time.
"""
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch

from data.checkpoint import save_checkpoint
from data.corpus import embedded_text
from data.tokenizer import load_tokenizer
from evaluate import markdown
from extras.bench import random_weights
from runtime import cli
from runtime.cli import TINY

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTS = {"signals": 100, "disk": 10, "load": 50}
# The end of a command that obeys. Python ends by SIGINT itself (-2) if Ctrl-C hit it in an exec, as in some imports.
SIGNALS = {"SIGINT": "(130|-2) interrupted", "SIGTERM": "143 terminated", "SIGKILL": "-9"}
TEMPORARY = ".partial-"  # in the names of data/files.py's temporary folders
ERROR = "2 error: .*"  # one line: a dot is no newline
# states before and after, its files' pages, temporary paths, seconds from the handlers to the last of them
Command = namedtuple("Command", "words before whole pages writes seconds")
DOWNLOAD = """import sys, time, extras.texts as texts
def slowly(path, content):
    with open(path, "wb") as file:
        for start in range(0, len(content), 2 ** 14):
            time.sleep(file.write(content[start:start + 2 ** 14]) / 2 ** 21)
texts.Path.write_bytes = slowly
texts.NAMES = ["wikitext-2-raw/wiki.test.raw"]
texts.WIKITEXT, texts.SHA256[texts.NAMES[0]] = sys.argv.pop(1).split()
texts.cli.command(texts.main)"""


class Slow(SimpleHTTPRequestHandler):
    def copyfile(self, source, output):
        with suppress(OSError):  # the other side was hit
            for part in iter(lambda: source.read(2 ** 14), b""):
                output.write(part)
                time.sleep(0.01)

    def log_message(self, *words):
        pass


def commands(work):
    """{name: words} of what is hit, with what it reads in `work`; the first word of a name is the command's."""
    small, records, archive, text = work / "small", work / "records.json", work / "text.zip", embedded_text("test")
    grasp = [ROOT / "grasp.py", "--layers", 2, "--samples", 6, "--seq-len", 64, "--eval", "none", "--out", "there/out"]
    ended(start([*grasp[:-1], small], work))
    records.write_text(json.dumps([{"instruction": f"Add {i} and {i}.", "output": f"{2 * i}"} for i in range(10)]))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", text)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *words: Slow(*words, directory=work))
    Thread(target=server.serve_forever, daemon=True).start()
    url, digest = f"http://127.0.0.1:{server.server_port}/text.zip", hashlib.sha256(text.encode()).hexdigest()
    export = ["-m", "extras.export", "--ckpt", small, "--out", "there/out", "--format"]
    return {"grasp": grasp, "grasp --overwrite": [*grasp, "--overwrite"],
            "download": ["-c", DOWNLOAD, f"{url} {digest}", "there"],
            "evaluate --json": [ROOT / "evaluate.py", "--windows", 1, "--json", "there/out.json"],
            "recover": ["-m", "extras.recover", "--ckpt", small, "--data", records, "--out", "there/out", "--held-out",
                        2, "--batch-size", 2, "--micro-batch", 2, "--epochs", 1, "--save-every", 1],
            "export hf": [*export, "hf"], "export meta": [*export, "meta"]}


def start(words, folder, **how):
    """A command of this project, on one core, with no network but this machine."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "no_proxy": "*", "GRASP_DATA": ""}
    obedient = ["env", "--default-signal", sys.executable]  # undoes ignored signals; a preexec_fn is unsafe beside threads
    return subprocess.Popen([*obedient, *map(str, words)], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)


def ended(process):
    """The exit code and what stderr says."""
    _, err = process.communicate()
    return f"{process.returncode} {err.strip()}".strip()


def obeys(process):
    """Wait until a command has put its handlers in place (SIGTERM is caught, see man 5 proc), or has ended."""
    status, caught = Path(f"/proc/{process.pid}/status"), r"SigCgt:\s*\w*[4567cdef]\w{3}\n"
    while process.poll() is None and not re.search(caught, status.read_text()):
        time.sleep(0.001)


def temporaries(folder):
    return [Path(path, name) for path, *names in os.walk(folder) for name in sum(names, []) if TEMPORARY in name]


def writes(process, folder):
    """Yield whenever a temporary path appears, for as long as the process runs."""
    seen = set()
    while process.poll() is None:
        now = {*temporaries(folder)}
        yield from now - seen
        seen = now
        time.sleep(0.001)


def state(folder):
    """{path: content} of all files but a sound `.state`; of a temporary path None, of JSON what is not measured."""
    found = {str(path.relative_to(folder)): None for path in temporaries(folder) if path.is_dir()}
    for path in filter(Path.is_file, folder.rglob("*")):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        with suppress(Exception):  # neither, or cut: many kinds
            if name.endswith(".state") and torch.load(path, weights_only=True):
                continue
            content = json.loads(content, object_hook=lambda d: {k: d[k] for k in d.keys() - {"seconds", "peak_bytes"}})
        found[name] = content
    return found


def judge(made, found, end, if_whole, otherwise):
    """("absent", "as before", "whole" or "cut"; what is wrong or ""); the last two: right ends, as patterns."""
    if found not in (made.before, made.whole):
        wrong = sorted(name for name in {*found, *made.whole} if found.get(name, ...) != made.whole.get(name, ...))
        return "cut", f"cut or left: {', '.join(wrong)}; end {end!r}"
    what = "whole" if found == made.whole else "as before" if made.before else "absent"
    return what, "" if re.fullmatch(if_whole if what == "whole" else otherwise, end) else f"{what}, and yet end {end!r}"


def new_case(work, name):
    """The folder `there` of a new case of the command `name`, maybe with an older run's."""
    there = Path(tempfile.mkdtemp(prefix="case-", dir=work)) / "there"
    there.mkdir()
    if "--overwrite" in name:
        shutil.copytree(TINY, there / "out")
        (there / "out/report.json").write_text('{"an": "older run"}')
    return there


def measured(work, names):
    """{name: Command} of those commands, as many at a time as there are later."""
    def measure(name):
        there = new_case(work, name)
        before, process = state(there), start(words[name], there.parent)
        obeys(process)
        begun = time.monotonic()
        seconds = [time.monotonic() - begun for _ in writes(process, there)] or [time.monotonic() - begun]
        end = ended(process)
        pages = sum(-(-path.stat().st_size // 4096) for path in there.rglob("*") if path.is_file())
        if end != "0" or state(there) == before:
            raise ValueError(f"{name}: not even without a fault: {end}")
        return Command(words[name], before, state(there), pages, len(seconds), seconds[-1])

    words = commands(work)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(measure, names)))


def tried(function, plan):
    """(head, rows, faults, results) of function(name, kind, ...) -> (what, fault, ...) for each job.

    There is a row for each name and kind.
    """
    done, whats, rows = [], ["absent", "as before", "whole"], []
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda job: function(*job), plan):
            done.append(result)
            cli.show(f"{len(done)}/{len(plan)}", last=len(done) == len(plan))
    for job in dict.fromkeys(job[:2] for job in plan):
        what, fault, *others = zip(*(result for other, result in zip(plan, done) if other[:2] == job))
        others = [f"{sorted(c)[len(c) // 2]:.2f}, {max(c):.2f}" if type(c[0]) is float else sum(c) for c in others]
        rows.append([", ".join(job), len(what), *map(what.count, whats), sum(map(bool, fault)), *others])
    heads = ["", "runs", *whats, "faults", "in a write", "left", "again", "seconds, median and most"]
    return heads[:len(rows[0])], rows, [f"{job}: {r[1]}" for job, r in zip(plan, done) if r[1]], done


def signals(work, count):
    """`count` moments of each command, half of them of each of its two forms; the three signals take turns."""
    made = measured(work, ["grasp", "grasp --overwrite", "download", "recover", "export hf", "export meta"])
    draw, plan = random.Random(0), []
    for name, this in made.items():
        forms = sum(other.split()[0] == name.split()[0] for other in made)
        for i in range(-(-count // forms)):
            write = 0 if i // 3 % 3 else draw.randint(1, this.writes)
            delay = 0.03 * draw.random() ** 3 if write else 1.2 * this.seconds * draw.random()  # half within 4 ms
            plan.append((name, [*SIGNALS][i % 3], write, delay, draw.random() < 0.25))
    head, rows, faults, done = tried(lambda name, *job: hit(work, name, made[name], *job), plan)
    seconds = [result[-1] for job, result in zip(plan, done) if job[1] != "SIGKILL"]
    median, most = statistics.median(seconds), max(seconds)
    return head, rows, faults, (
        f"{len(done)} moments, {sum(result[2] for result in done)} in a write, {len(faults)} faults; "
        f"seconds to end after SIGINT or SIGTERM: median {median:.1f}, most {most:.1f}")


def hit(work, name, made, kind, write, delay, again):
    """(what, fault, writing, left, again, seconds) of a signal `delay` s after the handlers or, if not 0, a `write`.

    writing, left: there was a temporary path at the signal, and after the end. seconds: from the one to the other.
    """
    there, number, again = new_case(work, name), getattr(signal, kind), again and kind == "SIGKILL"
    process = start(made.words, there.parent)
    obeys(process)
    list(zip(range(write), writes(process, there)))
    time.sleep(delay)
    writing, begun = bool(temporaries(there)), time.monotonic()
    process.send_signal(number)
    end, seconds, left = ended(process), time.monotonic() - begun, temporaries(there)
    right = rf"{SIGNALS[kind]}|0(.|\n)*|-{number:d}", SIGNALS[kind]  # whole, it may have been on its way out of Python
    if again:
        end, right = ended(start(made.words, there.parent)), (f"0|{ERROR}exists; choose another.*", "")
    for path in left if kind == "SIGKILL" and not again else []:
        target = path.with_name(path.name[1:].rpartition(TEMPORARY)[0])
        old = path / f"{target.name}.old"
        if old.exists() and not target.exists():
            old.rename(target)  # killed between the two renames
        shutil.rmtree(path)
    what, fault = judge(made, state(there), end, *right)
    shutil.rmtree(there.parent)
    return what, fault, writing, bool(left), again, seconds


def disk(work, count):
    """Each command with `count` amounts of free space, on a read-only disk, and its folder taken away `count` times."""
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: the mounts are this process's own, and go with it
    mount("--make-rprivate", "/")
    made = measured(work, ["grasp", "grasp --overwrite", "evaluate --json", "recover", "export hf", "export meta"])
    draw, plan = random.Random(0), []
    for name, (*_, pages, _, seconds) in made.items():
        most = pages * (4 if name == "recover" else 1)  # its states come before, the last beside the folder
        frees = {most * i // count for i in range(count)} | {max(0, pages - i) for i in range(1, count // 3)}
        plan += [(name, "read-only", 0), *((name, "full", free) for free in sorted(frees))]
        plan += [(name, "vanishes", draw.uniform(0, seconds)) for _ in range(count)]
    head, rows, faults, done = tried(lambda name, *job: faulty_disk(work, name, made[name], *job), plan)
    return head, rows, faults, f"{len(done)} runs, {len(faults)} faults"


def mount(*words):
    if subprocess.run(["mount", *map(str, words)], capture_output=True).returncode:
        raise PermissionError("a small disk needs Linux and the right to mount one: run this as root")


def faulty_disk(work, name, made, kind, at):
    """(what, fault) of a run on a disk of `at` free pages, on a read-only one, or whose folder goes after `at` s."""
    place = Path(tempfile.mkdtemp(prefix="disk-", dir=work))
    mount("-t", "tmpfs", "tmpfs", place)
    (place / "page").write_text("that is taken, for a size of 0 would be no limit")
    there, disk = new_case(place, name), os.statvfs(place)
    size = (disk.f_blocks - disk.f_bfree) * disk.f_bsize + at * 4096
    mount("-o", {"full": f"remount,size={size:.0f}", "read-only": "remount,ro", "vanishes": "remount"}[kind], place)
    process, right = start(made.words, there.parent), ("0", ERROR)
    if kind == "vanishes":
        obeys(process)
        time.sleep(at)
        while there.exists():
            shutil.rmtree(there, ignore_errors=True)
        made, right = made._replace(before={}), ("", f"0|{ERROR}")
    what, fault = judge(made, end=ended(process), found=state(there), if_whole=right[0], otherwise=right[1])
    subprocess.run(["umount", place], check=True)
    return what, fault


def load(work, count):
    """`count` evaluations of one folder at once; then one of 3 GB through grasp.py under a limit on its memory."""
    files = [work / f"{i}.json" for i in range(count)]
    processes = [start([ROOT / "evaluate.py", "--windows", 2, "--json", file], work) for file in files]
    faults = [f"evaluation: {end}" for end in map(ended, processes) if end != "0"]
    found = {json.loads(file.read_text())["perplexity"]["embedded"] for file in files if file.is_file()}
    faults += [f"one folder, several perplexities: {sorted(found)}"] * (len(found) > 1)
    row, more = large(work)
    faults += more
    return (["", "limit, bytes", "peak, bytes"], [[f"{count} evaluations at once", "-", "-"], row], faults,
            f"{count} evaluations at once and 1 large folder, {len(faults)} faults")


def large(work):
    """(row, faults) of grasp.py in a memory group: what is mapped or cached counts there, but can be dropped."""
    own = "".join(re.findall(r":memory:(.*)", Path("/proc/self/cgroup").read_text()))
    group = Path(f"/sys/fs/cgroup/memory{own}/grasp-crashes-{os.getpid()}")
    for stale in group.parent.glob("grasp-crashes-*"):
        with suppress(OSError):  # one at work
            stale.rmdir()
    size = write_random(work / "big")
    words = [ROOT / "grasp.py", "--ckpt", "big", "--layers", 1, "--ratio", 0.2, "--calibration", "embedded",
             "--samples", 4, "--seq-len", 64, "--eval", "embedded", "--windows", 1]
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(int(1.4 * size)))
        end = ended(start(words, work, preexec_fn=lambda: (group / "cgroup.procs").write_text("0")))
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    row = [f"grasp.py on {size:,} bytes", f"{1.4 * size:,.0f}", f"{peak:,}"]
    return row, [f"{row}: end {end!r}"] * (end != "0")


def write_random(folder, shape=(2048, 17, 16, 4, 5632, 1024, False)):
    """Write random weights, by default of 3.1e9 bytes, and keep none of them in the machine's cache; their bytes."""
    model = random_weights(shape, torch.float32, "cpu")
    save_checkpoint(model, folder, tokenizer=load_tokenizer(TINY).files)
    with open(folder / "consolidated.00.pth", "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else its pages count as ours, not as the job's
    return sum(p.nbytes for p in model.parameters())


def main():
    p = cli.Parser(__doc__)
    p.add_argument("kind", choices=COUNTS)
    p.add_argument("--count", type=cli.positive, metavar="N", help="moments or evaluations (default: 100, 10, 50)")
    a = p.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started by a shell's &, all commands would ignore it
    with tempfile.TemporaryDirectory(prefix="grasp-crashes-") as work:
        head, rows, faults, summary = globals()[a.kind](Path(work).resolve(), a.count or COUNTS[a.kind])
    table = markdown(head, [[*map(str, row)] for row in rows])
    print("\n".join([table, "", *(f"fault: {fault}" for fault in faults), summary]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    cli.command(main)
