"""The lesson: the token ids, BOS and end tokens of a folder are those that other tools find in it."""
import base64
import dataclasses
import json
import shutil
import sys

import pytest

from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from runtime.cli import TINY


# ----------------------------------------------------------------------------------- three kinds of tokenizer

def test_sentencepiece_keeps_every_character():
    from sentencepiece import SentencePieceProcessor
    tokenizer = load_tokenizer(TINY)
    text = 'def f(x):\n    return "é 12"\n\n'
    ids = tokenizer.stream(text)
    assert tokenizer.vocab_size == 1024 and ids[0] == tokenizer.bos_id == 1 and tokenizer.ends == [2]
    assert tokenizer.decode([*ids.tolist(), 2]) == text
    assert SentencePieceProcessor(model_file=str(TINY / "tokenizer.model")).decode(ids.tolist()) == text


def test_sentencepiece_without_bos(tmp_path):
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c", "b c d"]), model_prefix=str(tmp_path / "tokenizer"),
        model_type="char", vocab_size=7, bos_id=-1, minloglevel=2)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.stream("a").tolist() == tokenizer.encode("a")
    assert tokenizer.decode(tokenizer.encode("b a")) == "b a"


def llama3_file(folder):
    """256 bytes and two merges, as Llama 3 writes its ranks."""
    words = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    lines = (base64.b64encode(word) + b" " + str(rank).encode() for rank, word in enumerate(words))
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")


def test_llama3_ranks(tmp_path):
    pytest.importorskip("tiktoken", reason="pip install tiktoken")
    llama3_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (258 + 256, 258)  # 256 special tokens, BOS the first
    assert tokenizer.stream("abcab 1234").tolist() == [258, 257, 256, 32, 49, 50, 51, 52]
    assert tokenizer.ends == [259, 267]
    assert tokenizer.decode([258, 257, 256, 32, 49, 259]) == "abcab 1"


def json_file(folder, bos, name="tokenizer.json"):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    from tokenizers import models, pre_tokenizers, processors
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "?": 4, "</s>": 5},
                                                 unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / name))


def test_truncation_and_padding_are_switched_off(tmp_path):
    json_file(tmp_path, bos=False)
    import tokenizers
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).stream("a b a b").tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("bos, name",
                         [(True, "tokenizer.json"), (False, "tokenizer.json"), (True, "tokenizer.model")])
def test_json_tokenizers(bos, name, tmp_path):
    """The post-processor says whether there is a BOS. The kind of file is detected from its content."""
    json_file(tmp_path, bos, name)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stream("b a c").tolist() == [0] * bos + [2, 1, 3]
    assert tokenizer.ends == [5] and tokenizer.decode([2, 1, 5]) == "b a"


def test_ctrl_c_and_out_of_memory_pass_through_a_tokenizer():
    """An error of a tokenizer library becomes a ValueError that names the file. Ctrl-C is no such error."""
    def stream(error):
        def encode(text):
            raise error
        return dataclasses.replace(load_tokenizer(TINY), encode=encode).stream("text")

    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            stream(error())
    with pytest.raises(ValueError, match="tokenizer.model: .*its own error"):
        stream(BufferError("its own error"))


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for tokenizer.model and .json"):
        load_tokenizer(tmp_path)
    for content in (b"", b"\x00\x01garbage", b"plain words"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model: not readable as a tokenizer"):
            load_tokenizer(tmp_path)
    for content in (b"IQ== 0\nIg== 1\n", b"IQ== 5\n", b"@@@@ 0\n"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises((ValueError, ModuleNotFoundError),
                           match="expected every rank|not readable|pip install"):
            load_tokenizer(tmp_path)


def test_a_token_without_a_row_is_refused_when_a_text_uses_it():
    tokenizer = load_tokenizer(TINY, 1000)
    known = tokenizer.stream("a ")
    assert known.max() < 1000
    with pytest.raises(ValueError, match=r"tokenizer.model: token 10\d\d \('.'\) of this text has no row"):
        tokenizer.stream("".join(map(chr, range(32, 0x2000))))


@pytest.mark.parametrize("package, content", [("tiktoken", b"IQ== 0\nIg== 1\n"), ("tokenizers", b"{}")])
def test_missing_packages_are_named(package, content, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        load_tokenizer(tmp_path)


def test_broken_json_and_ranks_are_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    for content in (json.dumps({"model": 1}).encode(), b"{"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.json: not readable as a tokenizer"):
            load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------- the same ids as transformers

CHATML = ("<|im_end|>", "<|im_start|>")
TEXTS = ("", "hello world", " leading", "  two", "end  ", "a\n\n b\r\n", "🙂 naïve", "<s>", "</s>",
         "x<s>y</s> z", "a <unk> b <unk>", "<|im_start|>user\nHi<|im_end|> ", "<|endoftext|>def",
         "<pad>1234<|im_end|><|im_end|>", "a foot foo", "a hello b")


def write_json_tokenizer(folder, specials=("<s>", "</s>"), bos=None, byte_level=True, added=()):
    """A byte-level BPE as Llama 3 has, or a word model with Llama 2's normalizer."""
    from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                            trainers)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    made = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(["hello world, hello user and naïve def 1234"] * 9, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<unk>", *specials], show_progress=False))
    made.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    made.save(str(folder / "tokenizer.json"))
    return made.get_vocab_size()


def token_of(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": True, **flags}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
SHAPES = {  # name: (arguments of write_json_tokenizer, {file: content}); N stands for the first free id
    "tokenizer.json alone": ({}, {}),
    "BOS": ({"bos": "<s>"}, {"tokenizer_config": FAST}),
    "Llama 2's normalizer": ({"bos": "<s>", "byte_level": False}, {"tokenizer_config": FAST}),
    "a BOS that the config does not want": ({"bos": "<s>"}, {
        "tokenizer_config": {**FAST, "add_bos_token": False}}),
    "ChatML inside": ({"added": CHATML}, {"tokenizer_config": {**FAST, "eos_token": CHATML[0]}}),
    "added_tokens.json": ({"bos": "<s>"}, {
        "tokenizer_config": {**FAST, "eos_token": CHATML[0]},
        "added_tokens": {CHATML[0]: "N", CHATML[1]: "N1"}}),
    "special_tokens_map.json": ({}, {"special_tokens_map": {"eos_token": token_of("</s>")}}),
    "added_tokens_decoder": ({"bos": "<s>"}, {"tokenizer_config": {**FAST, "added_tokens_decoder": {
        "N": token_of(CHATML[0]), "N1": token_of(CHATML[1], rstrip=True)}}}),
    "added twice": ({"bos": "<s>", "byte_level": False, "added": CHATML}, {
        "tokenizer_config": {**FAST, "eos_token": CHATML[0]},
        "added_tokens": {CHATML[0]: "N-2", CHATML[1]: "N-1"}}),
    "tokens without an id": ({"bos": "<s>"}, {"tokenizer_config": {
        **FAST, "pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>"]}}),
    "an end without an id": ({}, {
        "special_tokens_map": {"eos_token": CHATML[0], "bos_token": token_of("<s>")}}),
    "a pad token that is a piece": ({}, {"tokenizer_config": {**FAST, "pad_token": "hello"}}),
    "a pad token of the file": ({"added": ("<pad>",)}, {"tokenizer_config": {**FAST, "pad_token": "<pad>"}}),
}


def fill(value, n):
    """The same with "N" and "N1" replaced by n and n + 1, as strings where they are keys."""
    places = {"N-2": n - 2, "N-1": n - 1, "N": n, "N1": n + 1}
    if isinstance(value, dict):
        return {str(places.get(key, key)): fill(v, n) for key, v in value.items()}
    return places.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_equal_transformers(shape, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    how, files = SHAPES[shape]
    n = write_json_tokenizer(tmp_path, **how)
    for name, content in {**files, "config": {"model_type": "llama", "vocab_size": n + 2}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fill(content, n)))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.stream(text).tolist() == theirs(text)["input_ids"], text
    if theirs.eos_token_id is not None:
        assert ours.ends == [theirs.eos_token_id]


# ------------------------------------------------------------------------------------ SentencePiece and files

def sentencepiece_folder(folder, **files):
    """The embedded tokenizer of 1,024 pieces, and JSON files beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.model", folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_special_strings_are_cut_out_of_a_text(tmp_path):
    """<unk>, <s> and </s> are tokens 0, 1 and 2; each part between them is encoded alone."""
    tokenizer = load_tokenizer(TINY)
    encode = tokenizer.encode
    assert encode("a <unk> b</s>") == [*encode("a "), 0, *encode(" b"), 2]
    assert tokenizer.stream("<s>").tolist() == [1, 1] and encode("<s") == [*encode("<s")] != [1]
    added = load_tokenizer(sentencepiece_folder(tmp_path, added_tokens={"<|im_end|>": 1024, "<|im": 1025}))
    assert added.encode("a<|im_end|>b<|im") == [*encode("a"), 1024, *encode("b"), 1025]
    # special and unknown ids give nothing
    assert added.decode([*encode("a"), 1024, 5000, 0, 2]) == "a<|im_end|>"
    flags = {"1024": token_of("<|x|>", lstrip=True, rstrip=True)}
    strips = load_tokenizer(sentencepiece_folder(tmp_path, tokenizer_config={
        "added_tokens_decoder": flags, "pad_token": "<pad>"}))
    assert strips.encode("a  <|x|>\n b<pad>") == [*encode("a"), 1024, *encode("b"), 1025]
    assert strips.decode([*encode("a"), 1024, 1025]) == "a"


@pytest.mark.parametrize("files", [
    {}, {"tokenizer_config": FAST}, {"tokenizer_config": {**FAST, "pad_token": "<pad>"}},
    {"tokenizer_config": {**FAST, "eos_token": CHATML[0]},
     "added_tokens": {CHATML[0]: 1024, CHATML[1]: 1025}},
    {"tokenizer_config": {**FAST, "added_tokens_decoder": {
        "1024": token_of(CHATML[0]), "1025": token_of(CHATML[1])}}},
    {"tokenizer_config": {**FAST, "added_tokens_decoder": {"1024": token_of("foo", single_word=True)}}},
    *({"tokenizer_config": {**FAST, **flags}} for flags in (
        {"add_bos_token": False}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}))])
def test_a_sentencepiece_model_alone_gives_the_ids_of_transformers(files, tmp_path):
    """One difference is allowed. If no file says whether there is a BOS, transformers 5 leaves it out.

    Llama's own code does not, and neither does this project.
    """
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    sentencepiece_folder(tmp_path, config={"model_type": "llama", "vocab_size": 1026}, **files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    bos = [1] * ("add_bos_token" not in files.get("tokenizer_config", {}))
    for text in TEXTS:
        assert ours.stream(text).tolist() == bos + theirs(text)["input_ids"], text
    assert ours.ends == [theirs.eos_token_id]


@pytest.mark.parametrize("config, around", [
    ({}, ([1], [])), ({"add_bos_token": True}, ([1], [])), ({"add_bos_token": False}, ([], [])),
    ({"add_bos_token": False, "add_eos_token": True}, ([], [2]))])
def test_the_config_says_whether_there_is_a_bos(config, around, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, tokenizer_config=config))
    before, after = around
    assert tokenizer.stream("a b").tolist() == [*before, *tokenizer.encode("a b"), *after]


@pytest.mark.parametrize("files, ends", [
    ({}, [2]), ({"config": {"eos_token_id": 401}}, [401]),
    ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [7, 8, 9]}}, [7, 8, 9]),
    ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<unk>"}}, [0]),
    ({"tokenizer_config": {"eos_token": {"content": "<s>"}}}, [1]),
    ({"added_tokens": {"<|im_end|>": 1024}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, [1024])])
def test_the_tokens_that_end_a_text(files, ends, tmp_path):
    assert load_tokenizer(sentencepiece_folder(tmp_path, **files)).ends == ends


def test_a_written_folder_has_the_same_ids_bos_and_ends(tmp_path):
    """It carries all tokenizer files. What only config.json says goes into generation_config.json."""
    folder = sentencepiece_folder(
        tmp_path / "in", config={"eos_token_id": [1024, 2], "bos_token_id": 1},
        added_tokens={"<|im_end|>": 1024}, tokenizer_config={"add_bos_token": False})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    before = load_tokenizer(folder)
    save_checkpoint(load_checkpoint(TINY), tmp_path / "out", {"a": 1}, before.files)
    after = load_tokenizer(tmp_path / "out")
    assert after.stream("a<|im_end|>").tolist() == before.stream("a<|im_end|>").tolist()
    assert after.ends == before.ends == [1024, 2] and after.bos_id is before.bos_id is None
    assert {*before.files} - {"generation_config.json"} == {"tokenizer.model", "added_tokens.json",
                                                           "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads(after.files["generation_config.json"]) == {"eos_token_id": [1024, 2], "bos_token_id": 1}
    save_checkpoint(load_checkpoint(TINY), tmp_path / "out", {"a": 1}, after.files, overwrite=True)


def test_what_only_config_json_says_joins_the_generation_config(tmp_path):
    folder = sentencepiece_folder(tmp_path, config={"eos_token_id": [7, 2]},
                                  generation_config={"temperature": 0.6})
    files = load_tokenizer(folder).files
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.6, "eos_token_id": [7, 2]}


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5",
     "a Git LFS pointer"),
    ("added_tokens.json", '{"<x>": "many"}', "tokenizer_config.json, added_tokens.json: invalid literal"),
    ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id: invalid literal"),
    ("tokenizer_config.json", "[1]", "a JSON list, expected an object")])
def test_files_that_do_not_fit_are_named(name, content, message, tmp_path):
    sentencepiece_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_of_another_id_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    n = write_json_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n + 7}))
    with pytest.raises(ValueError, match=rf"<\|im_end\|> is {n}, elsewhere {n + 7}"):
        load_tokenizer(tmp_path)
