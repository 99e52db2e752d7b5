"""Thousands of broken checkpoint folders, each of which must be read rightly or refused in one line.

    python -m tests.robustness.faults --count 5000 --seed 0
    python -m tests.robustness.faults --only 17 --keep FOLDER      sees one again and keeps its folder

A case is a function of (seed, number). It copies a small good folder of one kind, damages it once to three times
(tests/robustness/damage.py), and runs evaluate.py, or in one case of five grasp.py, on it in a forked child. The judge:

    refused    exit code 2; stderr is one line `error: ...` that names the folder, a file of it or a flag; no table
               (a library may have printed others before it: warnings, or of a tokenizer; but no stack trace)
    same       exit code 0, and the perplexity is to the last bit the undamaged folder's
    other      exit code 0, and it is another; in both it is to 1e-5 that of what the folder now holds

A .safetensors file has no checksum: with a flipped bit of a mantissa it is another valid checkpoint, and the right
answer is the perplexity of exactly those weights. `reference` finds it without the readers under test: json, struct,
zipfile, torch.load. It shares with them only torch.load, the tokenizers' libraries and model.Transformer's arithmetic.
What grasp.py wrote must give the perplexity that its report says.

Anything else is a failure: a trace, another exit code, death by a signal, NaN, more than BOUND seconds, more memory
than the run on the undamaged folder or twice that folder, and NOISE on top; and any file of the case's folder, or
beside it, that is not as it was: code in a pickle would make one. Only the pickle UNBOUNDED may take memory and time:
torch.load(weights_only=True) lets a pickle make a bytearray of any size.
"""
import collections
import io
import itertools
import json
import math
import os
import random
import shutil
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
from data.checkpoint import HF_FIELDS
from data.corpus import consecutive_windows, embedded_text
from evaluate import markdown, perplexity
from tests.robustness.damage import DAMAGES, KINDS, read_header, write_good
from data.files import check_output
from model import LowRankLinear, ModelArgs, Transformer, matrix_names
from runtime import cli

BOUND = 30  # seconds; an undamaged run takes a fraction of one
NOISE = 64 * 2 ** 20  # bytes: the interpreter's and the libraries' own, which vary from run to run
UNBOUNDED = "pickle: 1 GiB"  # a damage
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {"model.": "", "_proj": "", "embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm":
         "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.": "attention.w", "mlp.gate":
         "feed_forward.w1", "mlp.down": "feed_forward.w2", "mlp.up": "feed_forward.w3"}  # Hugging Face's -> Meta's
LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


# ------------------------------------------------------------------------------------------------ the reference reader

def pth_tensors(file):
    """{name: tensor} of a .pth: Python's zipfile finds and checks its records, torch.load says what they mean."""
    sound = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(sound, "w") as new:
        infos = archive.infolist()
        summed = any(info.CRC for info in infos)
        for info in infos:
            if not summed:
                del info.CRC  # torch was told to write none
            new.writestr(info.filename, archive.read(info))
    sound.seek(0)
    return torch.load(sound, map_location="cpu", weights_only=True)


def safetensors_tensors(file):
    table, data = read_header(file)
    table.pop("__metadata__", None)
    return {name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=DTYPES[entry["dtype"]])
            .reshape(entry["shape"]) for name, entry in table.items()}


def meta_folder(folder):
    """(params.json's table, [{Meta's name: tensor}]) of Meta's and Mistral's folders and this project's own."""
    table, files = json.loads((folder / "params.json").read_text()), sorted(filter(Path.is_file, folder.iterdir()))
    shards = [pth_tensors(file) for file in files if file.match("consolidated*.pth")]
    return table, shards or [safetensors_tensors(file) for file in files if file.match("consolidated*.safetensors")]


def hf_folder(folder):
    """The same of a Hugging Face folder, under Meta's names too; the rows of wq and wk as they are."""
    table, files = json.loads((folder / "config.json").read_text()), {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():
        files = {file.name for file in folder.glob("model-*.safetensors") if file.is_file()}
    shard = {}
    for name, t in (item for file in files for item in safetensors_tensors(folder / file).items()):
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        shard[name] = t
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    return {**table, **{ours: table.get(theirs) for ours, theirs in HF_FIELDS.items()},
            "rope_theta": rope.get("rope_theta", table.get("rope_theta")),
            "rope_scaling": rope if rope.get("rope_type") == "llama3" else None,
            "use_scaled_rope": None}, [shard]  # a field of params.json, which transformers does not know


def reference_args(table, vocab_size):
    """ModelArgs from the table of either; its hidden_dim is not looked at."""
    dim, n_layers, n_heads = (int(table[name]) for name in ("dim", "n_layers", "n_heads"))
    scaling = table.get("rope_scaling") or ({} if table.get("use_scaled_rope") else None)
    if scaling is not None:
        positions = {"original_max_position_embeddings": table.get("max_position_embeddings") or 8192.0}
        scaling = {**LLAMA31, **positions, **{name: value for name, value in scaling.items() if value is not None}}
    window = table.get("sliding_window", 4096 if table.get("model_type") == "mistral" else None)
    limits = [int(limit) for limit in (table.get("max_seq_len"), window if table.get("model_type") != "llama" else None)
              if limit]
    mistral = "model_type" not in table and table.get("hidden_dim") and not window  # its own code's rule
    return ModelArgs(dim, n_layers, n_heads, int(table.get("n_kv_heads") or n_heads),
                     int(table.get("head_dim") or dim // n_heads), 1, vocab_size, float(table["norm_eps"]),
                     float(table.get("rope_theta") or (1e6 if mistral else 1e4)), scaling, min(limits, default=None))


def joined(shards, name, dim):
    """A tensor from its parts: norms are repeated, wo, w2 and the embeddings split over columns, others over rows."""
    parts = [shard[name + ".weight"] for shard in shards]
    if len(parts) == 1 or parts[0].ndim == 1:
        return parts[0]
    return torch.cat(parts, int(name.endswith(("wo", "w2")) or "embeddings" in name and parts[0].shape[1] < dim))


def reference_model(folder):
    """A Transformer filled by hand from what the folder's files say."""
    meta = not any((folder / "config.json").is_file() and f.is_file() for f in folder.glob("model*.safetensors"))
    table, shards = meta_folder(folder) if meta else hf_folder(folder)
    embeddings = joined(shards, "tok_embeddings", int(table["dim"]))
    args, dtype = reference_args(table, len(embeddings)), embeddings.dtype

    def weight(name):
        W = joined(shards, name, args.dim)
        if not meta and name.endswith(("wq", "wk")):
            W = W.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        return nn.Parameter(W.to(dtype), requires_grad=False)

    with torch.device("meta"):
        model = Transformer(args)
    tied = not meta and table.get("tie_word_embeddings") or "output.weight" not in shards[0]
    for name in ["output", *matrix_names(*range(args.n_layers))]:
        if name + ".A" in shards[0]:
            model.set_submodule(name, LowRankLinear(*(shards[0][f"{name}.{factor}"].to(dtype) for factor in "AB")))
        else:
            model.get_submodule(name).weight = weight("tok_embeddings" if tied and name == "output" else name)
    for name, module in model.named_modules():
        if name.endswith(("norm", "embeddings")):
            module.weight = weight(name)
    return model


def reference_tokens(folder, text):
    """The tokens of a text by the libraries themselves, which alone know what a damaged vocabulary means."""
    file = next(f for name in ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*")
                for f in sorted(folder.glob(name)) if f.is_file())
    content = file.read_bytes()
    if content.lstrip()[:1] == b"{":
        table = json.loads(content)
        made = need("tokenizers", "").Tokenizer.from_str(json.dumps({**table, "truncation": None, "padding": None}))
        return made.encode(text).ids
    if len(words := content.split(b"\n")[0].split()) == 2 and words[1].isdigit():
        from data.tokenizer import read_tiktoken  # the pattern and the places of special tokens are not in the file
        return read_tiktoken(file, content, {}, []).stream(text).tolist()
    made = sentencepiece.SentencePieceProcessor(model_proto=content)
    return [made.bos_id()] * (made.bos_id() >= 0) + made.encode(text)


def reference(folder, text):
    """The perplexity that the folder must give."""
    model, tokens = reference_model(folder), reference_tokens(folder, text)
    seq_len = min(2048, model.args.max_seq_len or 2048)
    return perplexity(model, [consecutive_windows(torch.tensor(tokens), seq_len, 1)])


# ------------------------------------------------------------------------------------------------ one case

def resident(pid="self"):
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forked(work, function):
    """(exit code or -signal, peak bytes above this process's, seconds) of function() in a child.

    Its output goes to files in `work`. It is killed after BOUND seconds, or before it has taken the machine's memory.
    """
    before, start, pid = resident(), time.monotonic(), os.fork()
    if not pid:
        run_child(work, function)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024 - before, time.monotonic() - start
        if time.monotonic() - start > BOUND or resident(pid) > 2 ** 32:
            os.kill(pid, 9)
        time.sleep(0.004)


def run_child(work, function):
    """function() as a process of its own would run it: it does not return."""
    code = 1
    try:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # as Python's own
        function()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(work, method):
    """evaluate.py (or with `method` grasp.py) as a user starts it on work/in/model; it writes to work/out."""
    words = ("--layers 1 --ratio 0.5 --samples 4 --seq-len 16 --calibration text.txt --eval text.txt --out ../out/model"
             if method else "--data text.txt --json ../out/result.json")

    def run():
        os.chdir(work / "in")
        sys.argv = f"command --ckpt model --windows 1 --device cpu {words}".split()
        cli.command(grasp.main if method else evaluate.main)

    return forked(work, run)


def printed(work, method):
    """[perplexity of the folder as it was read, and of what grasp.py wrote] of a command that ended well."""
    if not method:
        return [json.loads((work / "out/result.json").read_text())["perplexity"]["text.txt"]]
    rows = json.loads((work / "out/model/report.json").read_text())["results"]
    return [row["perplexity"]["text.txt"] for row in rows]


def compute(work, folder, text):
    """The reference answer for a folder, found in a child, since what is damaged may take its reader down; or None."""
    (work / "reference").unlink(missing_ok=True)
    code, _, _ = forked(work, lambda: (work / "reference").write_text(repr(reference(folder, text))))
    return float((work / "reference").read_text()) if code == 0 else None


def tree(folder):
    """{path: (mode, size, time of its last change)} of all that is in a folder; no program can set that time."""
    stats = {str(path): path.lstat() for path in sorted(folder.rglob("*"))}
    return {path: (s.st_mode, s.st_size, s.st_ctime_ns) for path, s in stats.items()}


def judge(work, method, good, before, done):
    """(outcome, what is wrong with it or None) of a command that has run in `work`.

    good: (perplexity, peak) of the undamaged folder; before: work/in's tree; done: what `forked` gave.
    """
    code, peak, seconds = done
    out, err = (work.joinpath(name).read_text(errors="replace") for name in ("stdout", "stderr"))
    written = [path.name for path in (work / "out").iterdir()]
    if (after := tree(work / "in")) != before:
        return "wrote", f"changed {sorted(set(after.items()) ^ set(before.items()))[:1]}"
    if seconds > BOUND:
        return "hang", f"more than {BOUND} s"
    size = sum(f.lstat().st_blocks * 512 for f in (work / "in").rglob("*"))  # on the disk: holes take nothing
    if peak > max(good[1], 2 * size) + NOISE:
        return "memory", f"{peak / 2 ** 20:.0f} MiB; on the undamaged folder {good[1] / 2 ** 20:.0f}"
    if code == 2:
        noise, found, line = ("\n" + err).rpartition("\nerror: ")
        named = str(work / "in/model") in line or "--" in line
        quiet = not noise or "Traceback" not in noise and ("in/model/tokenizer." in line or "Warning: " in noise)
        fine = found and line.count("\n") == 1 and named and quiet and "| model" not in out and not written
        return "refused", None if fine else f"stderr {err[-600:]!r}, written {written}"
    if code or err or written != [("model" if method else "result.json")]:
        return "crash", f"exit code {code}, stderr {err[-1500:]!r}, written {written}"
    return judge_numbers(work, printed(work, method), good[0])


def near(found, right):
    """To 1e-5: the last bits of a product may hang on where in memory its weights lie. right: None if unknown."""
    return right is not None and abs(right - found) <= 1e-5 * right


def judge_numbers(work, found, good):
    """The same of a command that ended well. found: what `printed` gave; good: the undamaged folder's perplexity."""
    text = (work / "in/text.txt").read_text()
    if not all(map(math.isfinite, found)):
        return "not finite", f"perplexity {found}"
    if len(found) == 2 and not near(found[1], again := compute(work, work / "out/model", text)):
        return "unlike", f"what grasp.py wrote: reported {found[1]!r}, read again {again!r}"
    right = compute(work, work / "in/model", text)
    return "same" if found[0] == good else "other", None if near(found[0], right) else (
        f"perplexity {found[0]!r}, the reference reader has {right!r} {(work / 'stderr').read_text()[-300:]!r}")


# ------------------------------------------------------------------------------------------------ all cases

def prepare(work, folder, text):
    """work/in, where a command runs: the text, and a copy of a good folder; and work/out, where it writes."""
    (work / "out").mkdir(parents=True)
    shutil.copytree(folder, work / "in/model")
    (work / "in/text.txt").write_text(text)


def case(seed, number, goods, measured, text, work):
    """(kind, damage's name, damages in words, outcome, failure or None) of case `number`; work: not there yet."""
    rng = random.Random(f"{seed} {number}")
    kind, method, wanted = rng.choice(KINDS), rng.random() < 0.2, rng.choice([1] * 8 + [2, 3])
    prepare(work, goods[kind], text)
    words = []
    for _ in range(8):  # not every damage finds what it breaks, least of all in a folder that is broken
        damage = rng.choice(DAMAGES)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            words.append(f"{damage.__name__}: {damage(work / 'in/model', rng)}")
        if len(words) == wanted:
            break
    before = tree(work / "in")
    outcome, failure = judge(work, method, measured[kind, method], before, run_command(work, method))
    said = "; ".join(words)
    if outcome in ("hang", "memory") and UNBOUNDED in said:
        failure = None
    return kind, words[0].partition(":")[0] if len(words) == 1 else "several", said, outcome, failure


def measure(goods, root, text):
    """{(kind, method): (perplexity, peak)} of both commands on the undamaged folders."""
    found = {}
    for kind, method in itertools.product(goods, (False, True)):
        work = root / f"{kind}-{method}"
        prepare(work, goods[kind], text)
        code, peak, _ = run_command(work, method)
        if code or printed(work, method)[0] != compute(work, goods[kind], text):
            raise AssertionError(f"the undamaged {kind}: exit code {code}, {(work / 'stderr').read_text()}")
        found[kind, method] = printed(work, method)[0], peak
    return found


def run_cases(numbers, seed, root):
    """Yield (number, *what `case` gives) of each case; the folder of a case alone stays."""
    text = embedded_text("test")[:20000]
    goods = {kind: root / kind for kind in KINDS}
    for kind, folder in goods.items():
        write_good(kind, folder)
        reference(folder, text)  # what torch and the tokenizers import or set up at first use, no child has to
    measured = measure(goods, root, text)
    for n in numbers:
        yield n, *case(seed, n, goods, measured, text, root / f"case-{n}")
        if len(numbers) > 1:
            shutil.rmtree(root / f"case-{n}")


def count_table(head, counts):
    """A Markdown table of {(row's name, outcome): cases}; the three right outcomes come first."""
    outcomes = ["refused", "same", "other", *sorted({outcome for _, outcome in counts} - {"refused", "same", "other"})]
    return markdown([head, *outcomes], [[name, *(f"{counts[name, outcome]:,}" for outcome in outcomes)]
                                        for name in sorted({name for name, _ in counts})])


def main():
    p = cli.Parser(__doc__)
    p.add_argument("--count", type=cli.positive, metavar="N", default=5000, help="cases (default: 5000)")
    p.add_argument("--seed", type=cli.seed, default=0, help="of all cases (default: 0)")
    p.add_argument("--only", type=cli.seed, metavar="I", help="only case I")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and keep it (default: a temporary folder)")
    a = p.parse_args()
    for package in ("safetensors", "huggingface_hub", "tokenizers", "tiktoken"):
        need(package, "tests.robustness.faults")
    numbers, start = range(a.count) if a.only is None else [a.only], time.monotonic()
    kinds, damages, failures = collections.Counter(), collections.Counter(), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="grasp-faults-") as temporary:
        root = (a.keep or Path(temporary) / "cases").resolve()
        check_output(root)
        root.mkdir()
        for done, (n, kind, damage, words, outcome, failure) in enumerate(run_cases(numbers, a.seed, root), 1):
            kinds[kind, outcome] += 1
            damages[damage, outcome] += 1
            failures += [n] * bool(failure)
            if failure or a.only is not None:
                print(f"case {n}, {kind}: {words}\n    {outcome}: {failure or 'as it should be'}")
            cli.show(f"faults  {done}/{len(numbers)} cases  {len(failures)} failures", last=done == len(numbers))
    print(f"\n{count_table('folder', kinds)}\n\n{count_table('damage', damages)}\n\n{len(numbers):,} cases, "
          f"{len(failures)} failures {failures or ''}  {time.monotonic() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    cli.command(main)
