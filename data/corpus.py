"""Texts by name, and their windows of tokens.

A name stands for a protocol: file, split, and how records are joined. Perplexities of two protocols cannot be
compared. `embedded` is the language reference that Python carries, for the embedded model.
"""
import hashlib
import os
import platform
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.files import error_prefix, read_bytes
from data.tokenizer import Tokenizer

CACHE = Path.home() / ".cache/grasp"  # where python -m extras.texts puts them
HELD_OUT = "typesfunctions"  # topics from here on are the last tenth of the embedded text

SHA256 = {
    "wikitext-2-raw/wiki.train.raw": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "wikitext-2-raw/wiki.train.head.raw": "15049cf0cffde2fb1a0d171d548d89e3731f17d2aa9ed44dd4e49714eddfb268",
    "wikitext-2-raw/wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "ptb/ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb/ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb/ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}


def join_rows(text: str) -> str:
    """WikiText: a row keeps its newline, a blank row is the empty string; joined by two newlines."""
    return "\n\n".join(row + "\n" if row.strip() else "" for row in text.split("\n")[:-1])


def join_lines(text: str, by: str = "\n\n") -> str:
    """PTB: stripped lines."""
    return by.join(line.strip() for line in text.split("\n")[:-1])


WIKI = "WikiText-2 raw, {} split, rows joined by two newlines"
PENN = "Penn Treebank, {} split, stripped lines joined by {}"
TEXTS = {  # (name, use): (file, description, function that joins the records)
    ("wikitext2", "test"): ("wikitext-2-raw/wiki.test.raw", WIKI.format("test"), join_rows),
    ("wikitext2", "train"): ("wikitext-2-raw/wiki.train.raw", WIKI.format("training"), join_rows),
    ("ptb", "test"): ("ptb/ptb.valid.txt", PENN.format("validation", "two newlines"), join_lines),
    ("ptb", "train"): ("ptb/ptb.train.txt", PENN.format("training", "two newlines"), join_lines),
    ("ptb-test", "test"): ("ptb/ptb.test.txt", PENN.format("test", "two newlines"), join_lines),
    ("ptb-new", "test"): ("ptb/ptb.test.txt", PENN.format("test", "one space"), partial(join_lines, by=" ")),
}


def text_names(use: str) -> str:
    """The names of the texts for a use, "train" or "test"."""
    return ", ".join([name for name, known in TEXTS if known == use] + ["embedded"])


def load_text(name: str, use: str, data_dir: str | None = None) -> tuple[str, str]:
    """Return (text, description) of a name in TEXTS, of "embedded", or of a UTF-8 file given by its path.

    use: "train" for calibration, "test" for evaluation. Raises FileNotFoundError with the way to get the
    text, and ValueError if a file is not the published one or not UTF-8.
    """
    if name == "embedded":
        part = "held-out last tenth" if use == "test" else "first nine tenths"
        return embedded_text(use), f"Python {platform.python_version()}'s language reference, {part}"
    if (name, use) in TEXTS:
        file, description, join = TEXTS[name, use]
        content, head = find_file(file, data_dir)
        return join(content.decode("utf-8")), description + " (only its head)" * head
    if not Path(name).is_file():
        raise FileNotFoundError(f"no text {name!r}: expected {text_names(use)}, or the path of a file")
    if Path(name).suffix.lower() in (".json", ".jsonl"):
        raise ValueError(f"{name}: JSON is no text; extract it first, e.g. jq -r .text {name} > text.txt")
    content = read_bytes(name)
    with error_prefix(f"{name}: not UTF-8 text"):
        return content.decode("utf-8-sig"), "the file as it stands"  # a byte order mark is not text


def find_file(wanted: str, data_dir: str | None = None) -> tuple[bytes, bool]:
    """Return (content, whether it is only the head) of a file in SHA256.

    Looks in data_dir, $GRASP_DATA or CACHE: the first that is given. The head of WikiText-2's training text
    is enough. Raises FileNotFoundError, and ValueError if a file is not the published one.
    """
    folder = Path(data_dir or os.environ.get("GRASP_DATA") or CACHE)
    for name in (wanted, wanted.replace("train.raw", "train.head.raw")):
        if (folder / name).is_file():
            return checked((folder / name).read_bytes(), name, folder), name != wanted
    raise FileNotFoundError(
        f"{wanted}: not in {folder}; fetch it by python -m extras.texts, put the file there as DIR/{wanted} "
        "and pass --data-dir DIR, or name another text")


def checked(content: bytes, name: str, source: str | Path) -> bytes:
    """The content itself. Raises ValueError if its SHA-256 is not the published one."""
    if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise ValueError(f"{source}: not the published {name}: {len(content):,} bytes of SHA-256 {found}, "
                         f"expected {SHA256[name]}")
    return content


def embedded_text(use: str) -> str:
    """Python's language reference, each paragraph once: its first nine tenths, or the held-out last tenth.

    The cut is at a topic's name, so that the held-out part was never trained on, whichever Python's text it
    is.
    """
    from pydoc_data.topics import topics
    first = {}  # paragraph -> the first topic that has it
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            first.setdefault(paragraph.strip("\n"), topic)
    return "\n\n".join(paragraph for paragraph, topic in first.items()
                       if paragraph.strip() and (topic >= HELD_OUT) == (use == "test")) + "\n"


def calibration_windows(tokenizer: Tokenizer, name: str, samples: int, seq_len: int, seed: int,
                        data_dir: str | None = None) -> tuple[Tensor, dict]:
    """Return (windows (samples, seq_len) int64 at random offsets of a training text, a report).

    name: "A+B" takes equally many windows of each text, in random order.
    """
    if "+" in name and not Path(name).is_file():
        names = name.split("+")
        windows, reports = zip(*(
            calibration_windows(tokenizer, each, (samples + i) // len(names), seq_len, seed, data_dir)
            for i, each in enumerate(names)))
        protocol = " + ".join(report["protocol"] for report in reports)
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
        return torch.cat(windows)[order], {"parts": [*reports], "order": order.tolist(), "protocol": protocol}
    text, source = load_text(name, "train", data_dir)
    tokens = tokenizer.stream(text)
    windows, offsets = random_windows(tokens, samples, seq_len, seed)
    return windows, {
        "text": source, "tokens": len(tokens), "offsets": offsets.tolist(),
        "protocol": f"{source}; {len(tokens):,} tokens, {samples} random windows of {seq_len}, seed {seed}"}


def random_windows(tokens: Tensor, samples: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (windows (samples, seq_len) int64 of tokens (N,), their offsets (samples,)), none padded."""
    if len(tokens) < seq_len:
        raise ValueError(f"the calibration text has {len(tokens):,} tokens, "
                         f"too few for one sequence of {seq_len:,}")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(len(tokens) - seq_len + 1, (samples,), generator=generator)
    return tokens[offsets[:, None] + torch.arange(seq_len)], offsets


def consecutive_windows(tokens: Tensor, seq_len: int, limit: int | None = None) -> Tensor:
    """Cut tokens (N,) into at most `limit` windows (n, seq_len) without overlap; the tail is dropped."""
    count = min(len(tokens) // seq_len, limit or len(tokens))
    if not count:
        raise ValueError(f"the evaluation text has {len(tokens):,} tokens, "
                         f"too few for one window of {seq_len:,}")
    return tokens[:count * seq_len].view(count, seq_len)
