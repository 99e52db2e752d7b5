"""Thousands of broken checkpoint folders, each of which must be read rightly or refused in one line.

    python -m extras.faults --count 5000 --seed 0      or, to see one again and keep its folder: --only 17 --keep FOLDER

A case is a function of (seed, number). It copies a small good folder of one kind, damages it once to three times, and
runs the real command (evaluate.py, or for one in five grasp.py) on it in a forked child of this process. The judge:

    refused    exit code 2; stderr is one line `error: ...` that names the folder, a file of it or a flag; no table
    same       exit code 0, and the perplexity is to the last bit the undamaged folder's
    other      exit code 0, and it is another; in both it is to 1e-6 that of what the folder now holds

No format but zip has a checksum: a .safetensors file with a flipped bit of a mantissa is another valid checkpoint, and
the right answer is the perplexity of exactly those weights. `witness` finds it without the readers under test: json,
struct, views of bytes, and an unpickler of its own. Only the tokenizer libraries and model.Transformer's
arithmetic are shared. A compressed folder that grasp.py wrote must give the perplexity that its report says.

Anything else is a failure: a trace, another exit code, death by a signal, NaN, more than BOUND seconds, more memory
than the run on the undamaged folder or twice that folder, and NOISE on top; and any file of the case's folder, or
beside it, that is not as it was: a pickle's payload would make one.
"""
import argparse
import collections
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import sentencepiece
import torch
from torch import nn

import evaluate
import grasp
from data import need
from data.corpus import consecutive_windows, embedded_text, show
from evaluate import command, markdown, perplexity, positive
from extras._damage import DAMAGES, NAMES, write_good
from model import MATRICES, LowRankLinear, ModelArgs, Transformer

BOUND = 30  # seconds; an undamaged run takes a fraction of one
NOISE = 64 * 2 ** 20  # bytes: the interpreter's and the libraries' own, which vary from run to run
KINDS = ("meta", "meta2", "llama3", "mistral", "hf", "hf-sharded", "compressed")
WINDOWS = 2
RECORD = 4096  # bytes that a pipe takes as one
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
          "DoubleStorage": torch.float64}


# ------------------------------------------------------------------------------------------------ the witness

class Unpickler(pickle.Unpickler):
    """Tensors from a .pth whose zip archive Python's own zipfile has read (and checked)."""
    def __init__(self, file, archive, root):
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        if name == "OrderedDict":
            return collections.OrderedDict
        return {"_rebuild_tensor_v2": self.tensor, "_rebuild_parameter": lambda t, *_: t}.get(name) or DTYPES[name]

    def persistent_load(self, key):
        _, dtype, name, _, numel = key
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{name}")), dtype=dtype)[:numel]

    def tensor(self, storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)


def pth_tensors(file):
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist() if not any(info.CRC for info in archive.infolist()) else ():
            del info.CRC  # torch was told to write none
        inside = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(inside) as data:
            return Unpickler(data, archive, inside.partition("/")[0]).load()


def safetensors_tensors(file):
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8:start])
    table.pop("__metadata__", None)
    return {name: torch.frombuffer(bytearray(content[start + t["data_offsets"][0]:start + t["data_offsets"][1]]),
                                   dtype=DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in table.items()}


def witness_weights(folder):
    """({ModelArgs' field or other word: value}, whether Hugging Face's, [{Meta's name: tensor}])."""
    raw = sorted(f for f in folder.glob("consolidated*.pth") if f.is_file())
    raw = raw or sorted(f for f in folder.glob("consolidated*.safetensors") if f.is_file())
    if raw and (folder / "params.json").is_file():
        table = json.loads((folder / "params.json").read_text())
        return table, False, [(pth_tensors if f.suffix == ".pth" else safetensors_tensors)(f) for f in raw]
    table, index = json.loads((folder / "config.json").read_text()), folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    shard = {}
    for f in files:
        for name, t in safetensors_tensors(folder / f).items():
            for ours, theirs in NAMES.items():
                name = name.replace(theirs, ours)
            shard[name.removeprefix("model.")] = t
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    words = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "max_seq_len": "max_position_embeddings"}
    return {**table, **{ours: table.get(theirs) for ours, theirs in words.items()},
            "rope_theta": rope.get("rope_theta", table.get("rope_theta")),
            "rope_scaling": rope if rope.get("rope_type") == "llama3" else None}, True, [shard]


def witness_model(folder):
    """A Transformer filled by hand from what the folder's files say."""
    table, halves, shards = witness_weights(folder)
    dim, n_heads, n_layers = (int(table[name]) for name in ("dim", "n_heads", "n_layers"))
    n_kv_heads = int(table.get("n_kv_heads") or n_heads)
    head_dim = int(table.get("head_dim") or dim // n_heads)
    scaling = table.get("rope_scaling") or ({} if table.get("use_scaled_rope") else None)
    scaling = scaling if scaling is None else {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                               "original_max_position_embeddings": 8192.0,
                                               **{k: v for k, v in scaling.items() if v is not None}}
    limits = [table[name] for name in ("max_seq_len", "sliding_window") if table.get(name)]

    def tensor(name):
        parts = [shard[name] for shard in shards]
        leaf = name.split(".")[-2]
        if len(parts) == 1 or parts[0].ndim == 1:
            return parts[0]
        columns = leaf in ("wo", "w2") or leaf == "tok_embeddings" and parts[0].shape[1] < dim
        return torch.cat(parts, int(columns))

    def linear(name):
        if name + ".A" in shards[0]:
            return LowRankLinear(shards[0][name + ".A"].to(dtype), shards[0][name + ".B"].to(dtype))
        W = tensor(name + ".weight")
        if halves and name.endswith(("wq", "wk")):
            W = W.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        module = nn.Linear(1, 1, bias=False)
        module.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        return module

    embeddings = tensor("tok_embeddings.weight")
    dtype = shards[0]["tok_embeddings.weight"].dtype
    with torch.device("meta"):
        model = Transformer(ModelArgs(dim, n_layers, n_heads, n_kv_heads, head_dim, 1, len(embeddings),
                                      float(table["norm_eps"]), float(table.get("rope_theta") or 1e4), scaling,
                                      int(min(limits)) if limits else None))
    tied = table.get("tie_word_embeddings") or "output.weight" not in shards[0]
    model.tok_embeddings.weight = nn.Parameter(embeddings.to(dtype), requires_grad=False)
    model.replace_matrix("output", linear("tok_embeddings" if tied else "output"))
    for name in [f"layers.{i}.{matrix}" for i in range(n_layers) for matrix in MATRICES]:
        model.replace_matrix(name, linear(name))
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight = nn.Parameter(tensor(name + ".weight").to(dtype), requires_grad=False)
    return model


def witness_tokens(folder, text):
    """The tokens of a text by the libraries themselves, which alone know what a damaged vocabulary means."""
    file = next(f for name in ("tokenizer.model", "tokenizer.model.v*", "tokenizer.json")
                for f in sorted(folder.glob(name)) if f.is_file())
    content = file.read_bytes()
    if content.lstrip()[:1] == b"{":
        table = json.loads(content)
        table["model"].pop("dropout", None)  # tokens must not be left to chance
        made = need("tokenizers", "").Tokenizer.from_str(json.dumps(table))
        made.no_truncation()
        made.no_padding()
        full, plain = made.encode("a").ids, made.encode("a", add_special_tokens=False).ids
        bos = full[:1] if len(full) > len(plain) and full[1:len(plain) + 1] == plain else []
        return bos + made.encode(text, add_special_tokens=False).ids
    if len(words := content.split(b"\n")[0].split()) == 2 and words[1].isdigit():
        from data.tokenizer import read_tiktoken  # the pattern and the places of special tokens are not in the file
        return read_tiktoken(file, content).stream(text).tolist()
    made = sentencepiece.SentencePieceProcessor(model_proto=content)
    return [made.bos_id()] * (made.bos_id() >= 0) + made.encode(text)


def witness(folder, text):
    """The perplexity that the folder must give."""
    model, tokens = witness_model(folder), witness_tokens(folder, text)
    seq_len = min(2048, model.args.max_seq_len or 2048)
    windows = consecutive_windows(torch.tensor(tokens), seq_len, WINDOWS)
    return perplexity(model, windows.split(max(1, 1024 // seq_len)))


# ------------------------------------------------------------------------------------------------ one case

def resident(pid="self"):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forked(work, function):
    """(exit code or -signal, peak bytes above this process's, seconds) of function() in a child.

    Its output goes to files in `work`. It is killed after BOUND seconds, or before it has taken the machine's memory.
    """
    here = resident()
    start, pid = time.monotonic(), os.fork()
    if not pid:
        code = 99
        try:
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # as Python's own
            code = function() or 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024 - here, time.monotonic() - start
        if time.monotonic() - start > BOUND or resident(pid) > 2 ** 32:
            os.kill(pid, 9)
        time.sleep(0.004)


def run_command(work, method):
    """One of the two commands as a user would start it on work/in/model; what it writes lies in work/out."""
    files = ["--windows", WINDOWS, "--device", "cpu"]
    if method:
        main, words = grasp.main, ["--layers", 1, "--ratio", 0.5, "--samples", 4, "--seq-len", 16, "--calibration",
                                   "text.txt", "--eval", "text.txt", "--out", "../out/model", *files]
    else:
        main, words = evaluate.main, ["--data", "text.txt", "--json", "../out/result.json", *files]
    os.chdir(work / "in")
    sys.argv = ["command", "--ckpt", "model", *map(str, words)]
    return forked(work, lambda: command(main))


def tree(folder):
    """{path: what it is}: names, kinds, sizes, times and contents of all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        s = path.lstat()
        regular = path.is_file() and not path.is_symlink()
        with open(path, "rb") if regular else open(os.devnull, "rb") as f:
            content = hashlib.sha256(f.read(2 ** 26)).hexdigest()
        link = os.readlink(path) if path.is_symlink() else ""
        found[str(path)] = s.st_mode, regular and s.st_size, s.st_mtime_ns, link, content
    return found


def printed(work, method):
    """(perplexity of the folder as it was read, of what grasp.py wrote) of a command that ended well."""
    if not method:
        return json.loads((work / "out/result.json").read_text())["perplexity"]["text.txt"], None
    rows = json.loads((work / "out/model/report.json").read_text())["results"]
    return [row["perplexity"]["text.txt"] for row in rows]


def compute(work, folder, text):
    """The witness's answer for a folder, found in a child, since what is damaged may take its reader down; or None."""
    def say():
        (work / "witness").write_text(repr(witness(folder, text)))

    (work / "witness").unlink(missing_ok=True)
    code, _, _ = forked(work, say)
    return float((work / "witness").read_text()) if code == 0 else None


def judge(work, method, good, before, done):
    """(outcome, what is wrong with it or None) of a command that has run in `work`.

    good: (perplexity, peak, folder's bytes) of the undamaged folder; before: work/in's tree; done: what `forked` gave.
    """
    code, peak, seconds = done
    out, err = (work.joinpath(name).read_text(errors="replace") for name in ("stdout", "stderr"))
    written = sorted(path.name for path in (work / "out").iterdir())
    if seconds > BOUND:
        return "hang", f"more than {BOUND} s"
    if tree(work / "in") != before:
        return "wrote", f"changed {sorted(set(tree(work / 'in').items()) ^ set(before.items()))[:1]}"
    if peak > max(good[1], 2 * good[2]) + NOISE:
        return "memory", f"{peak / 2 ** 20:.0f} MiB; on the undamaged folder {good[1] / 2 ** 20:.0f}"
    if code == 2:
        named = any(name in err for name in (str(work / "in/model"), "--"))
        fine = err.startswith("error: ") and err.count("\n") == 1 and named and "| model" not in out and not written
        return "refused", None if fine else f"stderr {err[-600:]!r}, written {written}"
    if code or err or written != [("model" if method else "result.json")]:
        return "crash", f"exit code {code}, stderr {err[-1500:]!r}, written {written}"
    found, after = printed(work, method)
    if not math.isfinite(found) or method and not math.isfinite(after):
        return "not finite", f"perplexity {found}, {after}"
    text = (work / "in/text.txt").read_text()
    if method and (again := compute(work, work / "out/model", text)) != after:
        return "unlike", f"what grasp.py wrote: reported {after!r}, read again {again!r}"
    right = compute(work, work / "in/model", text)
    close = right is not None and abs(right - found) <= 1e-6 * abs(right)
    return "same" if found == good[0] else "other", None if close else (
        f"perplexity {found!r}, the witness has {right!r} {(work / 'stderr').read_text()[-300:]!r}")


def prepare(work, folder, text):
    for name in ("in", "out"):
        (work / name).mkdir(parents=True)
    shutil.copytree(folder, work / "in/model")
    (work / "in/text.txt").write_text(text)


def case(seed, number, goods, measured, text, work):
    """(kind, damages in words, outcome, failure or None) of case `number`; work: a folder that is not there yet."""
    rng = random.Random(f"{seed} {number}")
    kind, method = rng.choice(KINDS), rng.random() < 0.2
    prepare(work, goods[kind], text)
    words = []
    wanted = rng.choice([1] * 8 + [2, 3])
    for _ in range(8):  # not every damage finds what it breaks, least of all in a folder that is broken
        damage = rng.choice(DAMAGES)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            words.append(f"{damage.__name__}: {damage(work / 'in/model', rng)}")
        if len(words) == wanted:
            break
    before = tree(work / "in")
    outcome, failure = judge(work, method, measured[kind][method], before, run_command(work, method))
    return kind, "; ".join(words), outcome, failure


def measure(goods, root, text):
    """{kind: [(perplexity, peak, folder's bytes) of evaluate.py and of grasp.py]} of the undamaged folders.

    The peak is with windows of 2,048 tokens.
    """
    found = {}
    for kind, folder in goods.items():
        for method in (False, True):
            work = root / f"run-{kind}-{method}"
            prepare(work, folder, text)
            code, _, _ = run_command(work, method)
            if code or printed(work, method)[0] != compute(work, folder, text):
                raise AssertionError(f"the undamaged {kind}: exit code {code}, {(work / 'stderr').read_text()}")
            right, size = printed(work, method)[0], sum(f.stat().st_size for f in folder.iterdir())
            shutil.rmtree(work)
            prepare(work, folder, text)
            for file in (work / "in/model").glob("*.json"):  # damaged, it may allow the longest windows there are
                file.write_text(re.sub(r'(max_seq_len|max_position_embeddings)": 128', r'\1": 2048', file.read_text()))
            found.setdefault(kind, []).append((right, run_command(work, method)[1], size))
    return found


def run_cases(numbers, seed, root, workers=2):
    """Yield (number, kind, words, outcome, failure) of each case, in the order they end; `workers` at a time."""
    text = embedded_text("test")[:20000]
    goods = {kind: root / kind for kind in KINDS}
    for kind, folder in goods.items():
        write_good(kind, folder)
        witness(folder, text)  # what torch and the tokenizers import or set up at first use, no child has to
    reader, writer = os.pipe()
    for w in range(workers):
        if not os.fork():
            work_through(numbers[w::workers], seed, goods, text, root / f"worker-{w}", writer, len(numbers) == 1)
    os.close(writer)
    with os.fdopen(reader) as lines:
        while line := lines.read(RECORD):
            yield json.loads(line)


def work_through(numbers, seed, goods, text, root, writer, keep):
    """One worker's cases, a record of RECORD bytes for each into the pipe; it does not return."""
    try:
        found = measure(goods, root, text)
        for n in numbers:
            work = root / f"case-{n}"
            record = [n, *case(seed, n, goods, found, text, work)]
            record = [part[:300] if isinstance(part, str) else part for part in record]
            os.write(writer, json.dumps(record).encode().ljust(RECORD))
            if not keep:
                shutil.rmtree(work)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--count", type=positive, metavar="N", default=5000, help="cases (default: 5000)")
    p.add_argument("--seed", type=grasp.seed, default=0, help="of all cases (default: 0)")
    p.add_argument("--only", type=int, metavar="I", help="only case I")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and keep it (default: a temporary folder)")
    a = p.parse_args()
    numbers = range(a.count) if a.only is None else [a.only]
    counts, failures, start = collections.Counter(), [], time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = (a.keep or Path(temporary)).resolve()
        for done, (n, kind, words, outcome, failure) in enumerate(run_cases(numbers, a.seed, root), 1):
            counts[kind, outcome] += 1
            if failure or a.only is not None:
                failures += [n] * bool(failure)
                print(f"case {n}, {kind}: {words}\n    {outcome}: {failure or 'as it should be'}")
            show(f"faults  {done}/{len(numbers)} cases  {len(failures)} failures", last=done == len(numbers))
    outcomes = ["refused", "same", "other", *sorted({o for _, o in counts} - {"refused", "same", "other"})]
    cells = [[kind, *(f"{counts[kind, outcome]:,}" for outcome in outcomes)] for kind in KINDS]
    done = counts.total()  # fewer than asked for where a worker died
    print(f"\n{markdown(['folder', *outcomes], cells)}\n\n{done:,} cases, {len(failures)} failures {failures or ''}  "
          f"{time.monotonic() - start:.0f} s")
    sys.exit(bool(failures) or done < len(numbers))


if __name__ == "__main__":
    command(main)
