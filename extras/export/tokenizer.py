"""The tokenizer's files for other tools; a SentencePiece or tiktoken model becomes a tokenizer.json."""
import base64
import json

from data.corpus import embedded_text
from data.files import write_json

# A converted tokenizer must give the same ids here, and on the embedded text with its tables and indented code.
PROBE = "  Two  spaces,\ttabs\r\nand\n\n\nlines; 1234567 3.14; naïve été e\u0301 ½ ﬁ, 日本語 🙂 \x00 don't WE'RE ▁ a<s>b </s> <unk> "


def write_tokenizer(tokenizer, folder, positions):
    """All files of the tokenizer, and where there is none a tokenizer.json and a tokenizer_config.json."""
    from tokenizers import Tokenizer
    files = dict(tokenizer.files)
    if is_json(content := files[tokenizer.file.name]):
        made, files["tokenizer.json"] = Tokenizer.from_buffer(content), files.pop(tokenizer.file.name)
    else:
        sentencepiece = content[:1] == b"\n"  # a protocol buffer that starts with its first piece
        made = from_sentencepiece(tokenizer) if sentencepiece else from_tiktoken(content)
        same = same_ids(made, tokenizer)
        if same:
            made.save(str(folder / "tokenizer.json"))
        else:
            print(f"tokenizer    {tokenizer.file.name} could not be converted to the same ids: copied as it is; "
                  "transformers may give other ids, or load the model but not the tokenizer")
        if same and not sentencepiece:  # under this name it would be taken for a SentencePiece model
            del files[tokenizer.file.name]
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    if "tokenizer_config.json" in files and str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 would give other ids for spaces
        files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if (folder / "tokenizer.json").is_file() and "tokenizer_config.json" not in files:
        named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.ends), None)}
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": positions, **{name: made.id_to_token(i) for name, i in named.items() if i is not None}})


def same_ids(made, tokenizer):
    """Whether a `tokenizers` one gives the ids of `tokenizer`, on PROBE, every token and the embedded text."""
    words = " ".join(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))  # some may be split off first
    return all(made.encode(text).ids == [*tokenizer.before, *tokenizer.encode(text), *tokenizer.after]
               for text in (PROBE, words, embedded_text("test"), *tokenizer.special))


def is_json(content):
    return content.lstrip()[:1] == b"{"


def merges(ranks):
    """[(left, right)] for every way that two tokens make a third, of {token: rank}; the lowest rank first.

    BPE merges in this order. Of equal ranks (Llama 2's runs of spaces) the one with the longest left part comes first,
    so that a run grows from its left end, as in SentencePiece.
    """
    pairs = [(rank, -i, token[:i], token[i:]) for token, rank in ranks.items() for i in range(1, len(token))
             if token[:i] in ranks and token[i:] in ranks]
    return [(left, right) for *_, left, right in sorted(pairs)]


def from_sentencepiece(tokenizer):
    """A `tokenizers` one of a SentencePiece BPE with byte fallback that, like Llama's, only turns spaces into "▁"."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers
    model = SentencePieceProcessor(model_file=str(tokenizer.file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    ranks = {piece: -model.get_score(i) for i, piece in enumerate(pieces)
             if not (i in special or model.is_byte(i) or model.is_unused(i))}
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges(ranks), byte_fallback=True,
                                unk_token=pieces[model.unk_id()], fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return with_special(made, sorted(tokenizer.special, key=tokenizer.special.get), tokenizer.bos_id)


def from_tiktoken(content):
    """A `tokenizers` one of Llama 3's lines of base64 and rank, its 256 special tokens after them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from data.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a letter for each byte: its own if that can be shown,
    others = iter(letter for letter in alphabet if ord(letter) > 255)  # else the next one from 256 on
    letters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]

    def shown(token):
        return "".join(letters[byte] for byte in token)

    made = Tokenizer(models.BPE({shown(token): rank for token, rank in ranks.items()},
                                [(shown(left), shown(right)) for left, right in merges(ranks)], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    numbers, named = iter(range(256)), {place: token for token, place in LLAMA3_SPECIAL.items()}
    special = [named.get(i) or f"<|reserved_special_token_{next(numbers)}|>" for i in range(256)]
    return with_special(made, special, len(ranks))


def with_special(made, special, bos_id):
    """`made` with its special tokens, which are those of its vocabulary or come after it, and a BOS (or None)."""
    from tokenizers import AddedToken, processors
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos_id is not None:
        bos = made.id_to_token(bos_id)
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return made
