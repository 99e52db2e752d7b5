"""Faults made on purpose: whatever interrupts a command, what it writes stands there whole or not at all.

    python -m extras.crashes signals     SIGINT, SIGTERM and SIGKILL at random moments of four commands
    python -m extras.crashes disk        one that is full, one that is read-only, a folder that vanishes (Linux, root)
    python -m extras.crashes load        50 evaluations at once; a folder of 3 GB in 1.4 times as much memory

    state    {path: content} of all that is in a folder; a scratch folder of data/target.py has the content None
    case     a folder of its own, in which one command runs once and is hit once
    verdict  (what stands there: "absent", "whole", "as before", and what is wrong or "")
"""
import argparse
import ctypes
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from threading import Thread

import torch

from data.corpus import embedded_text, show
from data.target import scratch_folder
from evaluate import TINY, command, markdown, positive
from model import ModelArgs, Transformer, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
Command = namedtuple("Command", "words before whole seconds")  # of a run to its end: the state before, and after
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
ARCHIVED = "wikitext-2-raw/wiki.test.raw"
DOWNLOAD = f"""from data.target import obey_signals
obey_signals()
import sys
from pathlib import Path
import evaluate
from data import corpus
corpus.CACHE, corpus.WIKITEXT, corpus.SHA256["{ARCHIVED}"] = Path("there"), sys.argv.pop(1), sys.argv.pop(1)
evaluate.command(evaluate.main)"""


def start(words, folder):
    """A command of this project, on one core, with no network but this machine."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "no_proxy": "*"}
    env.pop("GRASP_DATA", None)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(words, folder):
    """A run that nothing interrupts."""
    process = start(words, folder)
    _, err = process.communicate()
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, words))}: not even without a fault: {err}")


def state(folder):
    """{path: content} of all files in a folder; of JSON, what is not measured. A scratch folder counts, too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".tmp-" in path.name:
            found[name] = None
        elif path.is_file() and ".tmp-" not in name:
            found[name] = path.read_bytes()
            with suppress(ValueError):  # no JSON, or cut
                found[name] = plain(json.loads(found[name]))
    return found


def plain(report):
    """A report without times and memory, and so the same for every run."""
    if isinstance(report, list):
        return [plain(item) for item in report]
    if isinstance(report, dict):
        return {name: plain(item) for name, item in report.items() if name not in ("seconds", "peak_bytes")}
    return report


def verdict(found, made):
    """(what stands there after a fault, what is wrong or "")."""
    found, first = dict(found), "as before" if made.before else "absent"
    try:  # the state that recover goes on from may stay
        torch.load(io.BytesIO(found.pop("out.state")), weights_only=True) if "out.state" in found else None
    except Exception as e:
        return "cut", f"out.state cannot be read: {e}"
    if found in (made.before, made.whole):
        return (first if found == made.before else "whole"), ""
    wrong = sorted(name for name in {*found, *made.whole} if found.get(name, ...) != made.whole.get(name, ...))
    return "cut", f"neither {first} nor whole: {', '.join(wrong)}"


def one_line(process, err):
    """What is wrong with a command that had to end with a user's error, or ""."""
    good = process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1
    return "" if good else f"exit code {process.returncode}, stderr {err.strip()!r}"


# ------------------------------------------------------------------------------------------------ commands

def prepare(work):
    """{name: words} of the commands that are hit, with what they read in `work`; serves the file that one downloads."""
    small, records = work / "small", work / "records.json"
    grasp = [ROOT / "grasp.py", "--layers", 2, "--samples", 6, "--seq-len", 64, "--eval", "none", "--out", "there/out"]
    finish([*grasp[:-1], small], work)
    records.write_text(json.dumps([{"instruction": f"Add {i} and {i}.", "output": f"{2 * i}"} for i in range(10)]))
    url, digest = serve()
    recover = ["-m", "extras.recover", "--ckpt", small, "--data", records, "--out", "there/out", "--held-out", 2,
               "--batch-size", 2, "--micro-batch", 2, "--epochs", 1, "--save-every", 1]
    export = ["-m", "extras.export", "--ckpt", small, "--out", "there/out", "--format"]
    return {"grasp": grasp, "grasp --overwrite": [*grasp, "--overwrite"],
            "download": ["-c", DOWNLOAD, url, digest, "--data", "wikitext2", "--windows", 1],
            "evaluate --json": [ROOT / "evaluate.py", "--windows", 1, "--json", "there/out.json"],
            "recover": recover, "export hf": [*export, "hf"], "export meta": [*export, "meta"]}


def serve(parts=20, pause=0.05):
    """(URL, SHA-256 of the text) of an archive like WikiText-2's, given slowly by a thread of this process."""
    text, archive = embedded_text("test").encode(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(ARCHIVED, text)
    content = archive.getvalue()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # the other side was hit
                for i in range(0, len(content), size := -(-len(content) // parts)):
                    self.wfile.write(content[i:i + size])
                    time.sleep(pause)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/wikitext.zip", hashlib.sha256(text).hexdigest()


def new_case(work, name):
    """A folder to run the command `name` in, which writes to its folder `there`, maybe over an older run's."""
    case = Path(tempfile.mkdtemp(prefix="case-", dir=work))
    (case / "there").mkdir()
    if "--overwrite" in name:
        shutil.copytree(TINY, case / "there/out")
        (case / "there/out/report.json").write_text('{"an": "older run"}')
    return case


def measure(work, name, words):
    """The Command: what a run to its end makes, which can be loaded, and how long it takes."""
    case = new_case(work, name)
    before, begun = state(case / "there"), time.monotonic()
    finish(words, case)
    seconds = time.monotonic() - begun
    if (case / "there/out").is_dir():
        load_checkpoint(case / "there/out")
    return Command(words, before, state(case / "there"), seconds)


def all_of(jobs, function, plan, label):
    """[function(*job) for job in plan], several at a time, with a progress line."""
    begun, done = time.monotonic(), []
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(lambda job: function(*job), plan):
            done.append(result)
            left = (time.monotonic() - begun) / len(done) * (len(plan) - len(done))
            show(f"{label}  {len(done)}/{len(plan)}  {left:.0f} s left", last=len(done) == len(plan))
    return done


# ------------------------------------------------------------------------------------------------ signals

def signals(work, count, seed, jobs):
    """`count` moments of each of four commands, the three signals in turn."""
    words, draw = prepare(work), random.Random(seed)
    turns = (["grasp", "grasp --overwrite"], ["download"], ["recover"], ["export hf", "export meta"])
    names = [name for turn in turns for name in turn]  # all is measured under the load that it then runs in
    made = [all_of(jobs, measure, [(work, name, words[name]) for name in names], "uninterrupted") for _ in range(2)][1]
    made = dict(zip(names, made))  # of the second time, when nothing is read from the disk any more
    plan = [(turn[i // 3 % len(turn)], [*SIGNALS][i % 3]) for turn in turns for i in range(count)]
    done = all_of(jobs, hit, [(work, name, made[name], kind, draw.uniform(0, 1.1 * made[name].seconds))
                              for name, kind in plan], "signals")
    rows = []
    for name, kind in dict.fromkeys(plan):
        what, early, left, seconds, faults = zip(*(r for job, r in zip(plan, done) if job == (name, kind)))
        rows.append([f"{name} ({made[name].seconds:.1f} s), {kind}", len(what), *map(what.count, (
            "absent", "as before", "whole")), sum(early), sum(left), f"{median(seconds):.2f}", f"{max(seconds):.2f}",
            sum(map(bool, faults))])
    head = "command (alone), signal|runs|absent|as before|whole|early|left|median s|max s|faults".split("|")
    return head, rows, [r[-1] for r in done if r[-1]]


def hit(work, name, made, kind, moment):
    """(what, early, left, seconds, fault) of one run that gets a signal `moment` seconds after its start.

    early: Python had not come to obey_signals yet, and may say what it likes. left: SIGKILL left a scratch folder,
    which the same command, run again, has to take away. seconds: from the signal to the end.
    """
    number, case = SIGNALS[kind], new_case(work, name)
    process = start(made.words, case)
    time.sleep(moment)
    early, begun = not (process.poll() is not None or catches(process, signal.SIGTERM)), time.monotonic()
    process.send_signal(number)
    _, err = process.communicate()
    seconds, found = time.monotonic() - begun, state(case / "there")
    left = None in found.values()
    if kind == "SIGKILL":
        found = {path: content for path, content in found.items() if content is not None}
        what, fault = ("absent", "") if left and not found else verdict(found, made)
        fault = fault or again(made, case)
    else:
        what, fault = verdict(found, made)
        told = process.returncode == 128 + number and err.strip() == "interrupted" * (kind == "SIGINT")
        ended = process.returncode in (0, -number) and what == "whole" and not err  # -number: Python was ending itself
        if not (early or told or ended):
            fault = fault or f"exit code {process.returncode}, stderr {err.strip()!r}"
    shutil.rmtree(case)
    return what, early, left, seconds, fault and f"{name}, {kind} after {moment:.3f} s: {fault}"


def catches(process, number):
    """Whether a process has a handler for a signal by now: proc(5)."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return True


def again(made, case):
    """What is wrong after the same command has run once more, or "": it ends whole, or sees that it did."""
    process = start(made.words, case)
    _, err = process.communicate()
    what, fault = verdict(state(case / "there"), made)
    if process.returncode and "exists; choose another" not in err or what != "whole":
        fault = fault or f"{what}, exit code {process.returncode}, stderr {err.strip()!r}"
    return fault and f"run again: {fault}"


# ------------------------------------------------------------------------------------------------ disk

def disk(work, count, seed, jobs):
    """Each command with `count` amounts of free space, on a read-only disk, and its folder taken away `count` times."""
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: the mounts are this process's own, and go with it
    mount("--make-rprivate", "/")
    words, draw = prepare(work), random.Random(seed)
    words.pop("download")  # does without a cache where it cannot have one
    made = dict(zip(words, all_of(jobs, measure, [(work, name, words[name]) for name in words], "uninterrupted")))
    plan = []
    for name, command_made in made.items():
        sizes = [len(content if isinstance(content, bytes) else json.dumps(content))
                 for content in command_made.whole.values()]
        pages = sum(-(-size // 4096) for size in sizes)
        most = pages * (4 if name == "recover" else 1)  # its states come before, the last beside the folder
        frees = {*range(pages)[-count // 3:], *(round(draw.uniform(0, most)) for _ in range(count))}
        plan += [(name, "full", free) for free in sorted(frees)] + [(name, "read-only", 0)]
        plan += [(name, "vanishes", draw.uniform(0, command_made.seconds)) for _ in range(count)]
    done = all_of(jobs, lambda name, kind, at: faulty_disk(work, name, made[name], kind, at), plan, "disk")
    rows = []
    for name, kind in dict.fromkeys(job[:2] for job in plan):
        what, faults = zip(*(r for job, r in zip(plan, done) if job[:2] == (name, kind)))
        rows.append([f"{name}, {kind}", len(what), *map(what.count, ("absent", "as before", "whole")),
                     sum(map(bool, faults))])
    return "command, disk|runs|absent|as before|whole|faults".split("|"), rows, [r[-1] for r in done if r[-1]]


def mount(*words):
    if subprocess.run(["mount", *map(str, words)], capture_output=True).returncode:
        raise PermissionError("a small disk needs Linux and the right to mount one: run this as root")


def faulty_disk(work, name, made, kind, at):
    """(what, fault) of a run on a disk of `at` free pages, on a read-only one, or whose folder goes after `at` s."""
    place = Path(tempfile.mkdtemp(prefix="disk-", dir=work))
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", place)
    case = new_case(place, name)
    if kind == "full":
        with open(place / "filler", "wb") as filler:
            free = os.statvfs(place).f_bavail * os.statvfs(place).f_bsize
            os.posix_fallocate(filler.fileno(), 0, free - at * 4096)
    if kind == "read-only":
        mount("-o", "remount,ro", place)
    process = start(made.words, case)
    if kind == "vanishes":
        time.sleep(at)
        while (case / "there").exists():
            shutil.rmtree(case / "there", ignore_errors=True)
    _, err = process.communicate()
    if kind == "vanishes":
        what, fault = ("absent", "") if not (case / "there").exists() else ("cut", "the folder is there again")
    else:
        what, fault = verdict(state(case / "there"), made)
    if process.returncode or what != "whole" and kind != "vanishes":
        fault = fault or one_line(process, err) or what == "whole" and f"whole, and yet {err.strip()}"
    subprocess.run(["umount", place], check=True)
    return what, fault and f"{name}, {kind} at {at}: {fault}"


# ------------------------------------------------------------------------------------------------ load

def load(work, count, seed, jobs):
    """50 evaluations of one folder at once; then one of 3 GB through the whole job under a limit on its memory."""
    rows, faults = [], []
    for row, found in (together(work), *large(work, seed)):
        rows.append([*row, len(found)])
        faults += found
    return "load|seconds|folder, bytes|limit|peak|faults".split("|"), rows, faults


def together(work, runs=50):
    """(row, faults) of as many evaluations: all end well, and with the same bits."""
    begun, files = time.monotonic(), [work / f"{i}.json" for i in range(runs)]
    processes = [start([ROOT / "evaluate.py", "--windows", 2, "--json", file], work) for file in files]
    errors = [process.communicate()[1] for process in processes]
    faults = [f"evaluation: {err.strip()}" for process, err in zip(processes, errors) if process.returncode or err]
    found = {json.loads(file.read_text())["perplexity"]["embedded"] for file in files if file.is_file()}
    if len(found) > 1:
        faults.append(f"one folder, several perplexities: {sorted(found)}")
    return [f"{runs} evaluations at once", f"{time.monotonic() - begun:.0f}", "-", "-", "-"], faults


def large(work, seed):
    """Yield (row, faults) of grasp.py on a folder of 3 GB, and of an evaluation of what it wrote."""
    size, text, out = write_random(work / "big", seed), work / "text", work / "out"
    text.write_text(embedded_text("test")[:20_000])
    few = ["--windows", 4, "--batch-size", 1]
    for words in ([ROOT / "grasp.py", "--ckpt", work / "big", "--layers", 2, "--ratio", 0.2,
                   "--calibration", "embedded", "--samples", 4, "--seq-len", 64, "--eval", text, "--out", out, *few],
                  [ROOT / "evaluate.py", "--ckpt", out, "--data", text, "--json", work / "out.json", *few]):
        begun = time.monotonic()
        code, err, peak, limit = limited(words, work, int(1.4 * size))
        faults = [f"{words[0].name} of {size:,} bytes in {limit:,}: exit code {code}, {err.strip()}"] if code else []
        if (work / "out.json").is_file():
            two = [json.loads((out / "report.json").read_text())["results"][-1],
                   json.loads((work / "out.json").read_text())]
            if not math.isclose(*(row["perplexity"]["text"] for row in two), rel_tol=1e-6):
                faults.append(f"reported and evaluated: {[row['perplexity'] for row in two]}")
        yield [words[0].name, f"{time.monotonic() - begun:.0f}", f"{size:,}", f"{limit:,}", f"{peak:,}"], faults


def write_random(folder, seed, layers=15, dim=2048):
    """Write random weights like Mistral's (params.json, consolidated.safetensors), a tensor at a time; their bytes.

    fp32, dim 2048, 16 heads over 4, hidden_dim 5632, the embedded model's vocabulary; 15 layers are 2.7e9 bytes.
    """
    args = ModelArgs(dim=dim, n_layers=layers, n_heads=16, n_kv_heads=4, head_dim=dim // 16, hidden_dim=dim * 11 // 4,
                     vocab_size=1024, norm_eps=1e-5, max_seq_len=256)
    with torch.device("meta"):
        tensors = dict(Transformer(args, tied=False).named_parameters())
    header, offset = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": [*t.shape], "data_offsets": [offset, offset + t.numel() * 4]}
        offset += t.numel() * 4
    folder.mkdir()
    shutil.copyfile(TINY / "tokenizer.model", folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(vars(args)))
    generator = torch.Generator().manual_seed(seed)
    with open(folder / "consolidated.safetensors", "wb") as file:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (name, t) in enumerate(tensors.items(), 1):
            file.write((torch.randn(t.shape, generator=generator) * 0.02 + (t.ndim == 1)).numpy())
            show(f"writing {folder}  {i}/{len(tensors)} tensors", last=i == len(tensors))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else its pages count as ours, not as the job's
    return offset


def limited(words, work, limit):
    """(exit code, stderr, peak, limit) in bytes, of a command in a memory group of its own (cgroup v1).

    What is mapped or cached counts there too, but can be dropped. Without such groups limit is 0, and peak the largest
    resident set of any child so far.
    """
    groups = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    group = Path(f"/sys/fs/cgroup/memory{groups[0].rstrip('/')}/{work.name}") if groups else None
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except (OSError, AttributeError):
        process = start(words, work)
        _, err = process.communicate()
        return process.returncode, err, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, 0
    try:
        enter = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.executable, sys.argv[2:])"
        process = start(["-c", enter, group / "cgroup.procs", sys.executable, *words], work)
        _, err = process.communicate()
        return process.returncode, err, int((group / "memory.max_usage_in_bytes").read_text()), limit
    finally:
        group.rmdir()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("kind", choices=["signals", "disk", "load"])
    p.add_argument("--count", type=positive, metavar="N", default=100, help="signals: moments of each command; disk: "
                   "sizes, and moments, of each (default: 100)")
    p.add_argument("--seed", type=int, default=0, help="of the moments, sizes and weights (default: 0)")
    p.add_argument("--jobs", type=positive, metavar="N", default=3, help="runs at a time (default: 3)")
    a = p.parse_args()
    begun = time.monotonic()
    with scratch_folder(Path(tempfile.gettempdir()) / "grasp-crashes") as work:
        head, rows, faults = globals()[a.kind](work, a.count, a.seed, a.jobs)
    print(f"{markdown(head, [[str(cell) for cell in row] for row in rows])}\n\n{time.monotonic() - begun:.0f} s")
    for fault in faults:
        print(f"fault: {fault}")
    return sys.exit(1) if faults else None


if __name__ == "__main__":
    command(main)
