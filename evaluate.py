"""Perplexity of a folder of weights, dense or compressed: `python evaluate.py --ckpt FOLDER --data wikitext2 ptb`.

text -> one stream of tokens -> windows that do not overlap -> mean NLL (nats) of each window's predicted tokens -> exp.
The second half is what all commands share: their table, their settings and their way to fail.
"""
import argparse
import os
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from data.target import check_place, obey_signals, write_json

if __name__ == "__main__":
    obey_signals()  # before torch, whose import takes seconds

import torch

from data import processes
from data.corpus import TEXTS, batches, consecutive_windows, text_names, text_or_embedded
from data.tokenizer import load_tokenizer
from model import load_checkpoint

TINY = Path(__file__).resolve().parent / "data" / "tiny"  # the embedded model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@torch.no_grad()
def perplexity(model, token_batches):
    """exp of the mean negative log-likelihood (nats) per predicted token over batches (B, T) int64 of equal windows.

    Each window predicts its tokens 1..T-1, the first of them from the window's first token alone. ValueError if the
    perplexity is not finite: one without a number is no result.
    """
    total, count = 0.0, 0
    for tokens in token_batches:
        tokens = tokens.to(model.device)
        total += sum(nll.double() for nll in model.losses(model.final_state(tokens), tokens))
        count += tokens[:, 1:].numel()
    mean = processes.mean(total, count)
    if not mean.exp().isfinite():
        raise ValueError(f"no finite perplexity: the mean loss is {mean.item():.4g} nats per token in {model.dtype}; "
                         "try --dtype bfloat16 or float32")
    return mean.exp().item()


def load_windows(asked, tokenizer, seq_len, ckpt, limit=None, data_dir=None):
    """{label: (windows (n, seq_len) int64, protocol)} of the texts asked for; `limit` takes only the first windows.

    asked None: WikiText-2 and PTB, or the embedded text for the embedded model and where those cannot be had.
    """
    texts = {}
    for name in asked or (["embedded"] if ckpt == TINY else ["wikitext2", "ptb"]):
        name, text, source = text_or_embedded(name, "test", data_dir, asked)
        tokens = tokenizer.stream(text)
        windows = consecutive_windows(tokens, seq_len, limit)
        label = Path(name).name  # of a file, its name will do, unless it is another text's
        label = name if label in texts or (label, "test") in TEXTS else label
        texts[label] = windows, {"text": source, "tokens": len(tokens), "windows": len(windows), "seq_len": seq_len,
                                 "all_windows": len(tokens) // seq_len, "bos": tokenizer.bos_id is not None}
    return texts


def perplexities(model, texts, batch_size, label):
    """{text label: perplexity} of one model over what load_windows gave."""
    return {name: perplexity(model, batches(windows, batch_size, f"{label} on {name}"))
            for name, (windows, _) in texts.items()}


def table(rows, texts, dense_params):
    """A Markdown table of rows {model, parameters, perplexity, seconds, peak_bytes}, the texts' protocols under it."""
    head = ["model", "parameters", "kept %", *(f"{name} ppl" for name in texts), "seconds", "peak GiB"]
    cells = [[row["model"], f"{row['parameters']:,}", f"{100 * row['parameters'] / dense_params:.1f}",
              *(f"{row['perplexity'][name]:.2f}" for name in texts),
              "-" if row["seconds"] is None else f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 2 ** 30:.2f}"]
             for row in rows]
    protocols = [f"{name}: {p['text']}; {p['tokens']:,} tokens, {'first ' * (p['windows'] < p['all_windows'])}"
                 f"{p['windows']} windows of {p['seq_len']:,}, {'BOS once at the start' if p['bos'] else 'no BOS'}"
                 for name, (_, p) in texts.items()]
    return "\n".join([markdown(head, cells), "", *protocols])


def markdown(head, cells):
    """Rows of strings as an aligned Markdown table, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
                     for row in (head, rule, *cells))


def peak_bytes(device):
    """Peak memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def timed(seconds, phase, device=None):
    """Add the wall time of a block to seconds[phase], with a CUDA device's queued work done."""
    start = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


class Words(argparse.ArgumentParser):
    """What a command may be told; anything else is a ValueError."""
    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        raise ValueError(message)


class Parser(Words):
    """With the flags of every command that reads weights; `ckpt`: keywords to change --ckpt by."""
    def __init__(self, description, **ckpt):
        super().__init__(description)
        add = self.add_argument
        add("--ckpt", **{"type": lambda name: Path(os.path.realpath(name)), "default": TINY, "metavar": "FOLDER",
            "help": "weights: Meta's, Mistral's, Hugging Face's or a compressed folder (default: the embedded model)",
            **ckpt})
        add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
        add("--dtype", default="auto", choices=["auto", *DTYPES], help="to compute in and write (default: the ckpt's)")

    def add_texts(self, shard=False):
        add = self.add_argument
        if shard:
            add("--shard", action="store_true", help="under torchrun, a process holds only its part of the matrices")
        add("--batch-size", type=positive, metavar="N", help="sequences in a micro-batch (default: of 1,024 tokens)")
        add("--data-dir", metavar="DIR", help="with wikitext-2-raw/ and ptb/ (default: $GRASP_DATA, cache, download)")
        add("--windows", type=positive, metavar="N", help="evaluate only N windows of each text (default: all)")


def positive(text):
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2 ** 31):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 to 2^31 - 1")
    return int(text)


def json_file(name):
    if Path(name).exists() and not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name}: not a file")
    check_place(Path(os.path.realpath(name)))
    return Path(name)


def open_checkpoint(ckpt, device, dtype, shard=False):
    """Load model and tokenizer, and say in two lines what they are and where they run: (model, tokenizer)."""
    device, why = pick_device(device)
    model = load_checkpoint(ckpt, DTYPES.get(dtype), device, shard)
    if model.n_params < 10 ** 7:  # matrices this small are not worth sharing, least of all on a busy machine
        torch.set_num_threads(1)
    introduce(ckpt, model, why, "the folder's own" if dtype == "auto" else "as asked")
    return model, load_tokenizer(ckpt, model.args.vocab_size)


def pick_device(device):
    """(the device that --device names, why that one); under torchrun each process has a GPU of its own."""
    why = "as asked"
    if device == "auto":
        device, why = ("cuda", "auto: CUDA is here") if torch.cuda.is_available() else ("cpu", "auto: no CUDA here")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        torch.cuda.set_device(device)  # collectives and new streams take the current one
    return device, why


def introduce(name, model, why, whose):
    """Say in two lines what a model is and where it runs, in whose dtype; of several processes, what this one holds."""
    a = model.args
    print(f"model        {name}  {a.n_layers} layers, dim {a.dim}, {a.n_heads} heads over {a.n_kv_heads}, "
          f"{model.n_params:,} parameters\ndevice       {model.device} ({why}), "
          f"dtype {str(model.dtype).removeprefix('torch.')} ({whose})")
    if processes.count() > 1:
        held = sum(p.nbytes for p in map(processes.own, model.parameters())) / 2 ** 30
        print(f"processes    {processes.count()}; this one holds {held:.3f} GiB of the weights")


def sequence_length(asked, default, model):
    """The --seq-len asked for, or the default cut to the model's positions. ValueError where it does not fit."""
    limit = model.args.max_seq_len
    if limit and limit < 2 or asked and (asked < 2 or limit and asked > limit):
        raise ValueError(f"--seq-len {asked}: expected 2 to {limit or 'any number'} (the model's positions)")
    return asked or min(default, limit or default)


def batch_size(asked, seq_len):
    """The --batch-size asked for, or as many sequences as make 1,024 tokens: small models run faster for it."""
    return asked or max(1, 1024 // seq_len)


def command(main, parallel=False):
    """Run a command: a user's mistake is one line on stderr and exit code 2.

    parallel: torchrun may start it many times over; whichever process fails first tells why, and torchrun ends all.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # logs show where it is, whatever the names
    try:
        with processes.joined():
            if processes.count() > 1 and not parallel:
                raise ValueError("this command is the work of one process: start it with python, not with torchrun")
            return main()
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as e:
        memory = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)
        if isinstance(e, RuntimeError) and not memory and not processes.lost(e):
            raise  # not the user's mistake but ours
        hint = ["out of memory; lower --batch-size or --dtype, or use torchrun"] * memory
        if processes.fails_first():
            print("error:", *str(e).split(), *hint, file=sys.stderr)
        sys.exit(2)


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_texts(shard=True)
    add = parser.add_argument
    add("--data", nargs="+", metavar="TEXT", help=f"any of {text_names('test')} and files (default: wikitext2 ptb; "
        "with the embedded model, embedded)")
    add("--seq-len", type=positive, metavar="T", help="tokens in a window (default: 2048, or all positions if fewer)")
    add("--json", type=json_file, metavar="FILE", help="write the results there too")
    a = parser.parse_args()
    model, tokenizer = open_checkpoint(a.ckpt, a.device, a.dtype, a.shard)
    seq_len, seconds = sequence_length(a.seq_len, 2048, model), {}
    texts = load_windows(a.data, tokenizer, seq_len, a.ckpt, a.windows, a.data_dir)
    with timed(seconds, "evaluation"):
        results = perplexities(model, texts, batch_size(a.batch_size, seq_len), "perplexity")
    row = {"model": a.ckpt.name, "parameters": model.n_params, "perplexity": results,
           "seconds": seconds["evaluation"], "peak_bytes": peak_bytes(model.device),
           "protocol": {label: protocol for label, (_, protocol) in texts.items()}}
    print("\n" + table([row], texts, model.n_params_dense))
    if a.json and not processes.rank():
        write_json(a.json, row)


if __name__ == "__main__":
    command(main, parallel=True)
