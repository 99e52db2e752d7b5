"""Three kinds of tokenizer behind one face; which kind a file is, its content tells.

    SentencePiece (Llama 1 and 2, Mistral)   a protocol buffer
    tiktoken      (Llama 3)                  lines of base64 and rank
    tokenizers    (Hugging Face)             JSON
"""
import base64
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from data import need, read_bytes

# Llama 3 splits text by this pattern before it merges bytes; the file does not say so.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# A tokenizer.json does not say which of its tokens end a text; these are the names they have.
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")

LARGEST = 2 ** 25  # bytes: Llama 3's tokenizer.json has 17 million


@dataclass
class Tokenizer:
    file: Path
    vocab_size: int
    bos_id: int | None                    # None: this tokenizer starts no stream with a token of its own
    ends: tuple[int, ...]                 # the tokens that end a text, the plain one first
    encode: Callable[[str], list[int]]    # without BOS
    decode: Callable[[list[int]], str]    # of BOS and ends, nothing

    def stream(self, text):
        """text -> one stream of tokens (N,) int64, with the BOS (if there is one) once at its start."""
        with complaint(f"{self.file}: fails on this text"):
            ids = torch.tensor(([] if self.bos_id is None else [self.bos_id]) + self.encode(text), dtype=torch.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{self.file}: gives tokens from {ids.min()} to {ids.max()}, but has {self.vocab_size:,}")
        return ids


@contextmanager
def complaint(words):
    """Whatever a tokenizer's library raises here is a ValueError of these words; what it prints is not seen.

    On damaged files they do both, in C++ and Rust, whose panics Python takes for no Exception.
    """
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except MemoryError:
        raise
    except BaseException as e:
        raise ValueError(f"{words} ({e})") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def load_tokenizer(folder, vocab_size=None):
    """The tokenizer of a checkpoint folder. ValueError if it knows more tokens than the model's `vocab_size`."""
    files = [f for name in ("tokenizer.model", "tokenizer.model.v*", "tokenizer.json")
             for f in sorted(Path(folder).glob(name)) if f.is_file()]
    if not files:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for tokenizer.model and tokenizer.json")
    content = read_bytes(files[0], LARGEST)
    first_line = content.split(b"\n", 1)[0].split()
    if content.lstrip()[:1] == b"{":
        tokenizer = read_json_tokenizer(files[0], content)
    elif len(first_line) == 2 and first_line[1].isdigit():
        tokenizer = read_tiktoken(files[0], content)
    else:
        tokenizer = read_sentencepiece(files[0], content)
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{files[0]}: {tokenizer.vocab_size:,} tokens, but the model has only {vocab_size:,}")
    return tokenizer


def read_sentencepiece(file, content):
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor()
    with complaint(f"{file}: neither a SentencePiece model, nor lines of base64 and rank, nor JSON"):
        model.LoadFromSerializedProto(content)
    bos, end = model.bos_id(), model.eos_id()
    return Tokenizer(file, model.vocab_size(), bos if bos >= 0 else None, (end,) * (end >= 0), model.encode,
                     model.decode)


def read_tiktoken(file, content):
    """Llama 3: the ranks of the file, then 256 special tokens, of which <|begin_of_text|> is the first."""
    tiktoken = need("tiktoken", f"reading {file}")
    try:
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as e:
        raise ValueError(f"{file}: not lines of base64 and rank ({e})") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not {bytes([i]) for i in range(256)} <= set(ranks):
        raise ValueError(f"{file}: expected every rank from 0 on once, and a token for each of the 256 bytes")
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    n = len(ranks)
    return Tokenizer(file, n + 256, n, (n + 1, n + 9), encoding.encode_ordinary,  # <|end_of_text|>, <|eot_id|>
                     lambda ids: encoding.decode([i for i in ids if i < n]))


def read_json_tokenizer(file, content):
    tokenizers = need("tokenizers", f"reading {file}")
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content):  # on which the library may abort the process
        raise ValueError(f"{file}: its tokens have a continuing_subword_prefix, as those of no Llama")
    with complaint(f"{file}: not a tokenizer.json"):
        model = tokenizers.Tokenizer.from_buffer(content)
        model.no_truncation()
        model.no_padding()
        if hasattr(model.model, "dropout"):
            model.model.dropout = None  # which would leave out merges at random
        plain, full = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
        vocab_size = max(model.get_vocab().values()) + 1
    starts = len(full) > len(plain) and full[1:len(plain) + 1] == plain  # does its post-processor put a BOS in front?
    ends = tuple(i for i in map(model.token_to_id, ENDS) if i is not None)
    return Tokenizer(file, vocab_size, full[0] if starts else None, ends,
                     lambda text: model.encode_batch([text], add_special_tokens=False)[0].ids,  # encode() would keep
                     model.decode)                              # the GIL all the while, and Ctrl-C without an answer
