"""Three kinds of tokenizer with one interface. The kind is detected from the file's content.

    SentencePiece (Llama 1 and 2, Mistral)   a protocol buffer
    tiktoken      (Llama 3)                  lines of base64 and rank
    tokenizers    (Hugging Face)             JSON
"""
import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import need
from runtime.files import error_prefix, read_bytes

# Llama 3 splits text by this pattern before it merges bytes; its file does not hold it.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
                  r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# A tokenizer.json does not say which of its tokens end a text. They have these names.
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")

LARGEST = 2 ** 25  # bytes; Llama 3's tokenizer.json has 17 million


@dataclass
class Tokenizer:
    file: Path
    vocab_size: int
    bos_id: int | None                    # None: no token is put before a text
    ends: tuple[int, ...]                 # the tokens that end a text, the general one first
    encode: Callable[[str], list[int]]    # without BOS
    decode: Callable[[list[int]], str]    # without BOS and ends

    def stream(self, text: str) -> Tensor:
        """Encode a text as one stream of tokens (N,) int64, with BOS (if there is one) once at its start."""
        with error_prefix(f"{self.file}: fails on this text"):
            bos = [] if self.bos_id is None else [self.bos_id]
            ids = torch.tensor(bos + self.encode(text), dtype=torch.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{self.file}: gives token {ids.max()}, but has {self.vocab_size:,} tokens")
        return ids


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or has more tokens than the model's
    `vocab_size`, ModuleNotFoundError if its library is not installed.
    """
    files = [f for name in ("tokenizer.model", "tokenizer.model.v*", "tokenizer.json")
             for f in sorted(Path(folder).glob(name)) if f.is_file()]
    if not files:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for tokenizer.model and tokenizer.json")
    file, content = files[0], read_bytes(files[0], LARGEST)
    first_line = content.split(b"\n", 1)[0].split()
    if content.lstrip()[:1] == b"{":
        kind, read = "a tokenizer.json", read_json_tokenizer
    elif len(first_line) == 2 and first_line[1].isdigit():
        kind, read = "lines of base64 and rank", read_tiktoken
    else:
        kind, read = "a SentencePiece model, nor lines of base64 and rank, nor JSON", read_sentencepiece
    with error_prefix(f"{file}: not {kind}"):
        tokenizer = read(file, content)
    if vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{file}: {tokenizer.vocab_size:,} tokens, but the model has only {vocab_size:,}")
    return tokenizer


def read_sentencepiece(file: Path, content: bytes) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    bos, end = model.bos_id(), model.eos_id()  # -1: it has none
    return Tokenizer(file, model.vocab_size(), bos if bos >= 0 else None, (end,) * (end >= 0), model.encode,
                     model.decode)


def read_tiktoken(file: Path, content: bytes) -> Tokenizer:
    """Llama 3: the ranks of the file, then 256 special tokens, of which <|begin_of_text|> is the first."""
    tiktoken = need("tiktoken", f"reading {file}")
    pairs = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != [*range(len(pairs))] or not {bytes([i]) for i in range(256)} <= {*ranks}:
        raise ValueError("expected every rank from 0 on once, and a token for each of the 256 bytes")
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    n = len(ranks)
    ends = (n + 1, n + 9)  # <|end_of_text|>, <|eot_id|>
    return Tokenizer(file, n + 256, n, ends, encoding.encode_ordinary,
                     lambda ids: encoding.decode([i for i in ids if i < n]))


def read_json_tokenizer(file: Path, content: bytes) -> Tokenizer:
    tokenizers = need("tokenizers", f"reading {file}")
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content):  # the library may abort the process
        raise ValueError("a continuing_subword_prefix, which no Llama tokenizer has")
    model = tokenizers.Tokenizer.from_buffer(content)
    model.no_truncation()
    model.no_padding()
    if hasattr(model.model, "dropout"):
        model.model.dropout = None  # would leave out merges at random
    plain, full = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    has_bos = len(full) > len(plain) and full[1:len(plain) + 1] == plain
    ends = tuple(i for i in map(model.token_to_id, ENDS) if i is not None)
    return Tokenizer(file, max(model.get_vocab().values()) + 1, full[0] if has_bos else None, ends,
                     lambda text: model.encode(text, add_special_tokens=False).ids, model.decode)
