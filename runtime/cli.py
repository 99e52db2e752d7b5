"""What the commands share: flags, device and dtype, timing, progress, errors of one line."""
import argparse
import filecmp
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from data.checkpoint import load_checkpoint, weight_files
from data.corpus import text_names
from data.files import error_prefix
from data.tokenizer import Tokenizer, load_tokenizer
from model import Transformer

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"  # the embedded model
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
Group = argparse._ArgumentGroup
EMBEDDED = "with the embedded model: embedded"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises ValueError instead of exiting. The functions below add groups of flags.

    doc: a command's docstring: --help shows its first two paragraphs; it has a line "python -m NAME ...".
    """
    def __init__(self, doc: str):
        super().__init__(prog=re.search(r"python (-m )?[\w.]+", doc)[0], allow_abbrev=False,
                         description="\n\n".join(doc.split("\n\n")[:2]),
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.texts = {}     # {flag: (default with the embedded model, default with others)}
        self.suffix = None  # of the default --out

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, *words) -> argparse.Namespace:
        """Parse the command line and fill in the defaults that depend on --ckpt. Raises ValueError."""
        a = super().parse_args(*words)
        for flag, (embedded, other) in self.texts.items():
            if getattr(a, flag) is None:
                setattr(a, flag, embedded if made_on_embedded(a.ckpt) else other)
            elif getattr(a, flag) == ["none"]:
                setattr(a, flag, [])
        if self.suffix:
            a.out = a.out or Path(f"{a.ckpt.name}-{self.suffix}")
        return a


def model_flags(parser: Parser, title: str, **ckpt) -> Group:
    """Add --ckpt. Each of these functions makes a group of flags and returns it."""
    group = parser.add_argument_group(title)
    group.add_argument("--ckpt", **{
        "type": lambda name: Path(os.path.abspath(name)), "default": TINY, "metavar": "FOLDER", "help":
        "Meta's, Mistral's, Hugging Face's or a compressed folder (default: the embedded model)", **ckpt})
    return group


def calibration_flags(parser: Parser, samples: int = 512) -> Group:
    group = parser.add_argument_group("calibration")
    parser.texts["calibration"] = "embedded", "wikitext2"
    add = group.add_argument
    add("--calibration", metavar="TEXT",
        help=f"{text_names('train')} or a file; A+B: half of each (default: wikitext2; {EMBEDDED})")
    add("--samples", type=positive, metavar="N", default=samples, help=f"sequences (default: {samples})")
    add("--seq-len", type=positive, metavar="T", help="tokens in each (default: 512, or the model's maximum)")
    add("--seed", type=seed, default=42, help="seed of all random choices (default: 42)")
    return group


def evaluation_flags(parser: Parser) -> Group:
    group = parser.add_argument_group("evaluation")
    parser.texts["eval"] = ["embedded"], ["wikitext2", "ptb"]
    add = group.add_argument
    add("--eval", "--data", nargs="+", metavar="TEXT",
        help=f"{text_names('test')} or files; the word none skips it (default: wikitext2 ptb; {EMBEDDED})")
    add("--windows", type=positive, metavar="N", help="only the first N windows of each text (default: all)")
    add("--data-dir", metavar="DIR", help="folder with wikitext-2-raw/ and ptb/ (default: $GRASP_DATA, else "
        "~/.cache/grasp)")
    return group


def output_flags(parser: Parser, suffix: str) -> Group:
    group, parser.suffix = parser.add_argument_group("output"), suffix
    group.add_argument("--out", type=Path, metavar="FOLDER", help=f"to write (default: ./CKPT-{suffix})")
    group.add_argument("--overwrite", action="store_true", help="replace a folder that an earlier run wrote")
    return group


def machine_flags(parser: Parser, batches: bool = False, offload: bool = False) -> Group:
    """Add --device and --dtype; batches: --batch-size; offload: --offload."""
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: CUDA where there is one)")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="dtype of the weights (default: the checkpoint's own)")
    if batches:
        add("--batch-size", type=positive, metavar="N",
            help="sequences at a time (default: 1,024 tokens; for sweeps and evaluations on CUDA up to "
            f"8,192{', with --offload 32,768,' * offload} where memory allows)")
    if offload:
        add("--offload", action="store_true", help="for a model larger than the GPU: the blocks' weights "
            "stay in host memory, and one block at a time is copied to the GPU")
    return group


def between(text: str, kind: type, low: int, high: int, expected: str) -> int | float:
    with suppress(ValueError):
        if low < kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")


positive = partial(between, kind=int, low=0, high=2 ** 31 - 1, expected="a whole number from 1 to 2^31 - 1")
seed = partial(between, kind=int, low=-1, high=2 ** 63 - 1, expected="a whole number from 0 to 2^63 - 1")
fraction = partial(between, kind=float, low=0, high=1, expected="more than 0 and at most 1")


def json_file(name: str) -> Path:
    if Path(name).is_dir() or not os.access(Path(name).absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: cannot be written")
    return Path(name)


def made_on_embedded(ckpt: Path) -> bool:
    """Whether a folder has the embedded model's tokenizer: it is that model, or was made from it."""
    file = ckpt / "tokenizer.model"
    return file.is_file() and filecmp.cmp(file, TINY / "tokenizer.model", shallow=False)


def open_checkpoint(ckpt: Path, device: str, dtype: str,
                    offload: bool = False) -> tuple[Transformer, Tokenizer]:
    """Load model and tokenizer, and print what they are and where they run.

    device, dtype, offload: the values of their flags.
    """
    device = pick_device(device)
    if offload and device == "cpu":
        raise ValueError("--offload copies weights from host memory to a GPU, and this run is on the CPU; "
                         "leave it out")
    _, files = weight_files(ckpt)
    adapter = ", without the adapter beside them" * (ckpt / "adapter_config.json").is_file()
    print(f"reading      {', '.join(file.name for file in files)} of {ckpt}{adapter}")
    model = load_checkpoint(ckpt, DTYPES.get(dtype), device, offload)
    introduce(ckpt, model)
    return model, load_tokenizer(ckpt, model.args.vocab_size)


def pick_device(device: str) -> str:
    """The device that --device names, with its number. Under torchrun each process has its own GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK'] if dist.is_initialized() else 0}"
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise ValueError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    with error_prefix(f"--device {device}"):
        torch.empty(0, device=device)
        if device != "cpu":
            torch.cuda.set_device(device)  # new streams and collective operations take the current one
    return device


def introduce(name: str | Path, model: Transformer) -> None:
    """Print the model's sizes, its device and its dtype."""
    a = model.args
    print(f"model        {name}  {a.n_layers} layers, dim {a.dim}, {a.n_heads} heads over {a.n_kv_heads}, "
          f"{model.n_params:,} parameters\n"
          f"device       {model.device}, dtype {str(model.dtype).removeprefix('torch.')}"
          f"{', the blocks in host memory' * model.offload}")
    if model.device.type == "cuda":
        print(f"memory       {free_bytes(model.device) / 2 ** 30:.1f} GiB are free beside the weights")
    if dist.is_initialized():
        print(f"processes    {dist.get_world_size()}, each with its part of the sequences")


def sequence_length(asked: int | None, default: int, model: Transformer) -> int:
    """The --seq-len asked for, or the default cut to the model's positions. ValueError if it does not fit."""
    limit = model.args.max_seq_len
    if asked and (asked < 2 or limit and asked > limit):
        raise ValueError(f"--seq-len {asked}: expected 2 to {limit or 'any number'} (the model's positions)")
    return asked or min(default, limit or default)


def batch_size(asked: int | None, seq_len: int, model: Transformer | None = None, layers: int = 0) -> int:
    """Sequences in a micro-batch: as asked, else as many as make 1,024 tokens, for which a CPU is fast.

    On CUDA as many as fit into free memory. layers: whose gradients are summed.
    """
    if asked or model is None or model.device.type != "cuda":
        return asked or max(1, 1024 // seq_len)
    return fitting(model, seq_len, layers, free_bytes(model.device))


def fitting(model: Transformer, seq_len: int, layers: int, free: int) -> int:
    """Sequences that fit into `free` bytes beside the weights, in weight_gradients of `layers` layers.

    An estimate on the safe side; 1 if not even one fits. At most 8,192 tokens: autograd is taken to keep the
    activations of every block. With offload at most 32,768, since each micro-batch copies all weights over
    the bus: the states between the blocks, one block's activations, and twice its size (weights, gradients).
    """
    a, s = model.args, model.dtype.itemsize  # the numbers below are bytes
    wide, block = max(4, s), max(sum(p.numel() for p in block.parameters()) for block in model.layers)
    head = 4 * wide * model.head_chunk * a.vocab_size
    one = s * (8 * a.dim + 4 * a.n_heads * a.head_dim + 4 * a.hidden_dim)  # a block's activations of a token
    most, fixed, token = 8192, layers * wide * block, one * (a.n_layers + 1)
    if model.offload:
        most, fixed, token = 32768, 2 * s * block, 2 * one + wide * a.dim * a.n_layers
    return max(1, int(min(most, (free - fixed - head) / token)) // seq_len)


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is free or cached by torch."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def batches(windows: Tensor, size: int, label: str) -> Iterator[Tensor]:
    """Yield micro-batches of (this process's part of) windows (n, T), with progress on a terminal."""
    start = time.monotonic()
    if dist.is_initialized():
        windows = windows.tensor_split(dist.get_world_size())[dist.get_rank()]
    parts = windows.split(size) if len(windows) else ()
    try:
        for i, batch in enumerate(parts, 1):
            yield batch
            left = (time.monotonic() - start) * (len(parts) - i) / i
            show(f"{label}  {i}/{len(parts)} batches  {left:.0f} s left", last=False)
    finally:  # also if the sweep stops early
        show("", last=True)


def show(line: str, last: bool) -> None:
    """Rewrite one line of progress, if stderr is a terminal. The last one erases it."""
    if sys.stderr.isatty() and first_process():
        print(f"\r\x1b[K{line * (not last)}", end="", file=sys.stderr)


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device | None = None) -> Iterator[None]:
    """Add the wall time of a block to seconds[phase], including what a CUDA device still has to do."""
    start = time.perf_counter()
    try:
        yield
    finally:  # a sweep may stop early
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def terminate(number, frame):
    raise KeyboardInterrupt("terminated")


def first_process() -> bool:
    """Whether this process prints and writes: process 0 of those that torchrun started, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def join_processes(parallel: bool) -> None:
    """If torchrun started this process, join the others. All but process 0 print nothing but errors."""
    if dist.is_torchelastic_launched():  # a scheduler's leftover WORLD_SIZE alone means nothing
        if not parallel:
            raise ValueError("this command runs in one process: start it with python, not with torchrun")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = sys.stdout if first_process() else open(os.devnull, "w")


def end(code: int) -> NoReturn:
    """Exit. One of several processes exits at once: to leave NCCL's group it would wait for the others."""
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


def command(main: Callable[[], None], parallel: bool = False) -> None:
    """Run a command. A user's mistake is one line and exit code 2; GRASP_DEBUG=1 shows a stack trace.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, so that unfinished files are removed. parallel: whether
    torchrun may start it. A process that fails says why, and torchrun ends the others.
    """
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for logs, and any file name
    signal.signal(signal.SIGTERM, terminate)
    try:
        join_processes(parallel)
        main()
    except KeyboardInterrupt as e:
        print(f"\n{str(e) or 'interrupted'}", file=sys.stderr)
        end(128 + (signal.SIGTERM if e.args else signal.SIGINT))
    except Exception as e:
        memory = isinstance(e, MemoryError) or re.search("out of memory|can't allocate memory", str(e))
        known = memory or isinstance(e, (ValueError, OSError, ModuleNotFoundError, RuntimeError))
        if os.environ.get("GRASP_DEBUG") or not known or isinstance(e, RecursionError):
            raise
        what, *_ = (str(e) or type(e).__name__).split("\nException raised from")  # torch's own C++ trace
        hint = ["out of memory; use a smaller --batch-size, --dtype bfloat16 or, where a command has it, "
                "--offload"] * bool(memory)
        print("error:", " ".join(what.splitlines()), *hint, file=sys.stderr)
        end(2)
    if dist.is_initialized():
        dist.destroy_process_group()
