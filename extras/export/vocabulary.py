"""A GGUF file's tokenizer: only of kinds that llama.cpp is known to read to the same ids."""
import json
from dataclasses import replace

from data.tokenizer import LLAMA3_PATTERN
from extras.export.tokenizer import from_sentencepiece, from_tiktoken, is_json, same_ids

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE_TOKENIZERS = {  # llama.cpp's name: (the pre-tokenizers of a tokenizer.json, whether it ignores merges)
    "llama-bpe": ([{"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
                   {**BYTES, "use_regex": False}], True),
    "smollm": ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], False)}


def add_vocabulary(writer, tokenizer, rows, config):
    """Add the tokens to a GGUFWriter, `rows` of them, with their kinds, special ids and the chat template.

    config: Hugging Face's config.json, for the ids of BOS and EOS. Raises ValueError for any other tokenizer.
    """
    import gguf
    found = byte_level(tokenizer) or sentencepiece(tokenizer)
    if found is None or len(tokenizer.before) > 1 or tokenizer.after:
        raise ValueError(f"--format gguf: {tokenizer.file} is not one of the tokenizers that it knows (SentencePiece "
                         "like Llama 2's, Llama 3, SmolLM2); use --format hf and llama.cpp's convert_hf_to_gguf.py on "
                         "its folder")
    kind, pre, tokens, merges = found
    if (n := max(tokens) + 1) > rows:
        raise ValueError(f"--format gguf: {tokenizer.file} has {n:,} tokens, expected at most {rows:,}, the rows of "
                         "the model's embeddings")
    unused = gguf.TokenType.UNUSED
    texts, kinds, scores = zip(*(tokens.get(i, (f"[PAD{i}]", unused, 0.0)) for i in range(rows)))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if kind == "llama":
        writer.add_token_scores(scores)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(bool(tokenizer.before))
    writer.add_add_eos_token(False)
    if (bos := config["bos_token_id"]) is not None:
        writer.add_bos_token_id(bos)
    if tokenizer.ends:
        writer.add_eos_token_id(tokenizer.ends[0])
        writer.add_eot_token_id(tokenizer.ends[-1])
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    template = tokenizer.files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if template:
        writer.add_chat_template(template)


def byte_level(tokenizer):
    """("gpt2", llama.cpp's name of the pre-tokenizer, {id: (text, kind, score)}, merges); None for any but the two."""
    from gguf import TokenType
    from tokenizers import Tokenizer
    content = tokenizer.files[tokenizer.file.name]
    if is_json(content):
        made = Tokenizer.from_buffer(content)
    elif content[:1] == b"\n" or not same_ids(made := from_tiktoken(content), tokenizer):
        return None
    table = json.loads(made.to_str())
    model, added, before = table["model"], table["added_tokens"], table["pre_tokenizer"] or {}
    pre = next((name for name, like in PRE_TOKENIZERS.items()
                if like == (before.get("pretokenizers"), model.get("ignore_merges"))), None)
    others = [table["normalizer"], *(model.get(name) for name in ("byte_fallback", "end_of_word_suffix")),
              *(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word"))]
    if pre is None or any(others) or any(made.token_to_id(token) != i for token, i in tokenizer.special.items()):
        return None
    tokens = {i: (token, TokenType.NORMAL, 0.0) for token, i in model["vocab"].items()}
    tokens |= {token["id"]: (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED, 0.0)
               for token in added}
    return "gpt2", pre, tokens, [" ".join(pair) for pair in model["merges"]]


def sentencepiece(tokenizer):
    """("llama", "default", {id: (text, kind, score)}, []) of a SentencePiece BPE with byte fallback, or None.

    It is the tokenizer's file or stands beside its tokenizer.json. Their ids are compared, on the texts of same_ids.
    """
    from gguf import TokenType
    from sentencepiece import SentencePieceProcessor
    file = next((name for name, content in tokenizer.files.items()
                 if name.startswith("tokenizer.model") and content[:1] == b"\n"), None)
    if file is None:
        return None
    model = SentencePieceProcessor(model_proto=tokenizer.files[file])
    n = model.vocab_size()
    special = {token: i for token, i in tokenizer.special.items()
               if i >= n or model.is_control(i) or model.is_unknown(i)}
    if sum(map(model.is_byte, range(n))) != 256 or not same_ids(
            from_sentencepiece(replace(tokenizer, file=tokenizer.file.with_name(file), special=special)), tokenizer):
        return None
    kinds = [(model.is_unknown, TokenType.UNKNOWN), (model.is_control, TokenType.CONTROL),
             (model.is_byte, TokenType.BYTE), (model.is_unused, TokenType.UNUSED)]
    tokens = {i: (model.id_to_piece(i), next((kind for is_kind, kind in kinds if is_kind(i)), TokenType.NORMAL),
                  model.get_score(i)) for i in range(n)}
    tokens |= {i: (token, TokenType.USER_DEFINED if tokenizer.decode([i]) else TokenType.CONTROL, 0.0)
               for token, i in special.items() if i >= n}
    return "llama", "default", tokens, []
