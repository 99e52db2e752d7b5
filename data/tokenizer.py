"""Tokenizers. Ids are those that other tools find in the same folder; README.md says where they differ.

    tokenizer.json     read by `tokenizers`, wherever there is one
    tokenizer.model    SentencePiece (Llama 1 and 2, Mistral), or lines of base64 and rank (Llama 3, tiktoken)

What other files of the folder add is taken from them: more tokens (added_tokens.json, tokenizer_config.json)
and the ids that end a text (generation_config.json, config.json, tokenizer_config.json).
"""
import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from data import need
from data.files import TOKENIZER_FILES, error_prefix, optional_json, read_bytes

# Llama 3 splits text by this pattern before it merges bytes; its file does not hold it.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
                  r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Nor its special tokens, here with their places after the ranks. Llama 3.0 has reserved the rest of the 256.
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                  "<|end_header_id|>": 7, "<|eot_id|>": 9}

# Where no file says which tokens end a text, those with these names do.
ENDS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")


@dataclass
class Tokenizer:
    before: list[int]                      # put before a text: BOS, or nothing
    after: list[int]                       # put after a text: nothing, rarely EOS
    ends: list[int]                        # the tokens that end a text, the general one first
    encode: Callable[[str], list[int]]     # without before and after
    decode: Callable[[list[int]], str]     # without special tokens; unknown ids give nothing
    special: dict[str, int]                # ids of tokens by name: the special ones, or all that are known
    vocab_size: int                        # how many tokens it knows
    file: Path | None = None               # the file that is read
    files: dict[str, bytes] | None = None  # {name: content}: what a folder with this tokenizer needs
    rows: int | None = None                # rows of the model's embeddings; None: any id is accepted

    @property
    def bos_id(self) -> int | None:
        return self.before[0] if self.before else None

    def stream(self, text: str) -> Tensor:
        """Encode a text as one stream of tokens (N,) int64, with BOS (if there is one) once at its start."""
        with error_prefix(f"{self.file}: fails on this text"):
            ids = torch.tensor([*self.before, *self.encode(text), *self.after], dtype=torch.int64)
        if len(ids) and self.rows and (top := int(ids.max())) >= self.rows:
            token = next((token for token, i in self.special.items() if i == top), self.decode([top]))
            raise ValueError(f"{self.file}: token {top} ({token!r}) of this text has no row in the model")
        return ids


def load_tokenizer(folder: str | Path, rows: int | None = None) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder, for a model whose embeddings have so many rows.

    Raises FileNotFoundError if there is none, ValueError if it is damaged, ModuleNotFoundError if its library
    is not installed.
    """
    folder = Path(folder)
    files = {f.name: read_bytes(f) for name in TOKENIZER_FILES
             for f in sorted(folder.glob(name)) if f.is_file()}
    name = next((name for name in files if name.startswith(("tokenizer.json", "tokenizer.model"))), None)
    if name is None:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for tokenizer.model and .json")
    file, content = folder / name, files[name]
    first_line = content.split(b"\n", 1)[0].split()
    if content.lstrip()[:1] == b"{":
        read = read_json_tokenizer
    elif len(first_line) == 2 and first_line[1].isdigit():
        read = read_tiktoken
    else:
        read = read_sentencepiece
    config, added, named = read_added_tokens(folder)
    with error_prefix(f"{file}: not readable as a tokenizer"):
        tokenizer = read(file, content, added, named)
    if read is not read_json_tokenizer:  # which says this itself
        tokenizer.before *= config.get("add_bos_token") is not False
        tokenizer.after = tokenizer.ends[:1] * (config.get("add_eos_token") is True)
    tokenizer.file, tokenizer.files, tokenizer.rows = file, files, rows
    tables = [optional_json(folder / name) for name in ("config.json", "generation_config.json")]
    ids = {key: value for table in tables for key, value in table.items()  # the second overrides the first
           if key in ("bos_token_id", "eos_token_id") and value is not None}
    with error_prefix(f"{folder}: eos_token_id"):
        if (end := ids.get("eos_token_id")) is not None:
            tokenizer.ends = list(map(int, end if isinstance(end, list) else [end]))
        elif (end := tokenizer.special.get(config.get("eos_token"))) is not None:
            tokenizer.ends = [end]
    if ids:  # config.json itself is not carried
        files["generation_config.json"] = json.dumps({**tables[1], **ids}, indent=1).encode()
    return tokenizer


def read_added_tokens(folder: Path) -> tuple[dict, dict[int, dict], list[str]]:
    """Return (tokenizer_config.json, {id: {content, lstrip, ...}} of added tokens, names of special tokens).

    special_tokens_map.json and added_tokens.json count only without added_tokens_decoder, as in transformers.
    """
    config = optional_json(folder / "tokenizer_config.json")
    with error_prefix(f"{folder}: tokenizer_config.json, added_tokens.json"):
        decoder = config.get("added_tokens_decoder")
        if decoder is None:
            config |= optional_json(folder / "special_tokens_map.json")
        config |= {key: t["content"] for key, t in config.items() if isinstance(t, dict) and "content" in t}
        named = [t for key, t in config.items() if key.endswith("_token") and isinstance(t, str)]
        more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
        named += [t["content"] if isinstance(t, dict) else t for t in more if isinstance(more, list)]
        added = {int(i): dict(token) for i, token in (decoder or {}).items()}
        for token, i in optional_json(folder / "added_tokens.json").items() if decoder is None else ():
            added[int(i)] = {"content": token, "special": token in named, "normalized": token not in named}
    return config, dict(sorted(added.items())), named


def cut(special: dict[str, int], flags: dict[str, dict], encode: Callable[[str], list[int]]) -> Callable:
    """Return a function that cuts a text at the special tokens and encodes the parts between them.

    flags: {token: {lstrip, rstrip, single_word}}: whether the blanks before and after a token belong to it;
    whether it counts inside a longer word.
    """
    def pattern(token):
        flag, word = flags.get(token, {}), f"({re.escape(token)})"
        left, right = (r"\s*" * bool(flag.get(side)) for side in ("lstrip", "rstrip"))
        return left + (rf"(?<!\w){word}(?!\w)" if flag.get("single_word") else word) + right

    tokens = re.compile("|".join(map(pattern, sorted(special, key=len, reverse=True))) or "(?!)")

    def encode_parts(text):
        ids, end = [], 0
        for match in tokens.finditer(text):
            ids += encode(text[end:match.start()]) + [special[match[match.lastindex]]]
            end = match.end()
        return ids + encode(text[end:])
    return encode_parts


def read_sentencepiece(file: Path, content: bytes, added: dict[int, dict], named: list[str]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    n, bos, end = model.vocab_size(), model.bos_id(), model.eos_id()  # -1: it has none
    special = {model.id_to_piece(i): i for i in range(n) if model.is_control(i) or model.is_unknown(i)}
    special |= {token["content"]: i for i, token in added.items()}
    for token in named:  # a name without an id gets the next one
        if token not in special and model.id_to_piece(model.piece_to_id(token)) != token:
            special[token] = max([n - 1, *special.values()]) + 1
    flags = {token["content"]: token for token in added.values()}
    plain = {i: token["content"] for i, token in added.items() if not token.get("special")}

    def decode(ids):  # special tokens and unknown ids give nothing
        runs = groupby((i for i in ids if i in plain or i < n and i not in special.values()), plain.get)
        return "".join(text * len([*run]) if text else model.decode([*run]) for text, run in runs)

    return Tokenizer([bos] * (bos >= 0), [], [end] * (end >= 0), cut(special, flags, model.encode), decode,
                     special, max([n, *(i + 1 for i in special.values())]))


def read_tiktoken(file: Path, content: bytes, added: dict[int, dict], named: list[str]) -> Tokenizer:
    """Llama 3: the ranks of the file, then 256 special tokens."""
    tiktoken = need("tiktoken", f"reading {file}")
    pairs = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != [*range(len(pairs))] or not {bytes([i]) for i in range(256)} <= {*ranks}:
        raise ValueError("expected every rank from 0 on once, and a token for each of the 256 bytes")
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    n = len(ranks)
    special = {token: n + place for token, place in LLAMA3_SPECIAL.items()}
    special |= {token["content"]: i for i, token in added.items()}
    return Tokenizer([n], [], [special["<|end_of_text|>"], special["<|eot_id|>"]],
                     cut(special, {}, encoding.encode_ordinary),
                     lambda ids: encoding.decode([i for i in ids if i < n]), special, n + 256)


def read_json_tokenizer(file: Path, content: bytes, added: dict[int, dict], named: list[str]) -> Tokenizer:
    tokenizers = need("tokenizers", f"reading {file}")
    model = tokenizers.Tokenizer.from_buffer(content)
    model.no_truncation()
    model.no_padding()
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    for i, token in added.items():
        if token["content"] in known and "lstrip" not in token:  # added_tokens.json does not know the flags
            continue
        flags = {key: value for key, value in token.items() if not key.startswith("__")}
        model.add_tokens([tokenizers.AddedToken(**flags)])
        if model.token_to_id(token["content"]) != i:
            raise ValueError(f"{token['content']} is {model.token_to_id(token['content'])}, elsewhere {i}")
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    model.add_special_tokens([token for token in named if token not in known])
    plain, full = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((i for i in range(len(full)) if full[i:i + len(plain)] == plain != []), len(full))
    vocab = model.get_vocab()
    return Tokenizer(full[:at], full[at + len(plain):], [vocab[end] for end in ENDS if end in vocab],
                     lambda text: model.encode(text, add_special_tokens=False).ids, model.decode, vocab,
                     max(vocab.values()) + 1)
