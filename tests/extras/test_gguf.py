"""The lesson: llama.cpp reads the GGUF file to the same model and the same tokenizer.

The independent implementation is llama.cpp itself, in the package xllamacpp. Here it computes in fp32: by default its
cache is fp16, and so is a part of its flash attention.
"""
import json
import sys
import urllib.request

import pytest
import torch

from tests.conftest import ROOT, error_of, random_model, random_tokens, run
from tests.extras.test_deci import SCALED, narrow_model
from tests.extras.test_export import TEXT, chatml_folder, json_folder, llama3_folder, narrow
from tests.test_tokenizer import TEXTS
from data.checkpoint import load_checkpoint
from data.tokenizer import load_tokenizer
from extras import export
from extras.export.__main__ import main
from extras.export.tokenizer import PROBE

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
TINY = ROOT / "data/tiny"


class LlamaCpp:
    """llama.cpp's server in this process, asked over its HTTP port."""
    def __init__(self, file):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install -r requirements-test.txt")
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads = str(file), 4096, 1, 1
        p.verbosity, p.warmup = 0, False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(p)

    def ask(self, path, **question):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(question).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ids(self, text):
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def log_probabilities(self, tokens, n):
        """Of the n tokens that may come next. One is forced: a part of a character would not be answered."""
        answer = self.ask("/completion", prompt=tokens.tolist(), n_predict=1, n_probs=n, logit_bias=[[" the", 1000]])
        found = {token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]}
        return torch.tensor([found[i] for i in range(n)])

    def greedy(self, prompt, n):
        return self.ask("/completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True)["tokens"]


def exported(model, tokenizer, folder, **how):
    """The path of the one file that is written, beside the model card."""
    export.export(model, tokenizer, folder / "out", "gguf", **how)
    file, _ = sorted((folder / "out").iterdir(), reverse=True)
    return file


# ------------------------------------------------------------------------------------------------ the model

@pytest.mark.parametrize("arch, widths, changes", [
    ("llama", [512] * 3, {}),
    ("llama", [512] * 3, {"tied": True, "rope_theta": 5e5, "rope_scaling": SCALED}),
    ("llama", [40] * 3, {"head_dim": 24}),  # narrower than hidden_dim, and heads that are not dim / n_heads
    ("deci", [40, 72, 33], {}),
    ("deci", [512, 256, 40], {"tied": True, "head_dim": 24, "rope_scaling": SCALED})])
def test_llama_cpp_gives_the_same_probabilities(arch, widths, changes, tmp_path):
    model = narrow_model(widths, **changes)
    file = exported(model, load_tokenizer(TINY), tmp_path)
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == arch
    tokens = random_tokens(model, 1, 100)
    ours = model(tokens)[0, -1].log_softmax(-1)
    assert torch.allclose(LlamaCpp(file).log_probabilities(tokens[0], 1024), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, outtype, found", [
    (torch.float64, None, "f32"), (torch.bfloat16, None, "bf16"), (torch.float16, None, "f16"),
    (torch.float32, "f16", "f16"), (torch.bfloat16, "q8_0", "q8_0")])
def test_types(dtype, outtype, found, tmp_path):
    """Matrices in the type that is asked for, vectors in fp32; q8_0 rounds to 1/254 of a block's largest entry."""
    model = narrow_model([64, 40], dtype=dtype)
    file = exported(model, load_tokenizer(TINY), tmp_path, outtype=outtype)
    assert file.name == f"model-{found}.gguf"
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert {t.tensor_type.name for t in stored.values() if len(t.shape) == 1} == {"F32"}
    kinds = {name: t.tensor_type.name.lower() for name, t in stored.items() if len(t.shape) == 2}
    if found == "q8_0":
        assert kinds.pop("blk.1.ffn_down.weight") == "f16"  # rows of 40 are not made of blocks of 32
    assert {*kinds.values()} == {found}
    blocks = model.layers
    for name, layer in (("blk.1.ffn_down", blocks[1].feed_forward.w2), ("blk.0.attn_q", blocks[0].attention.wq)):
        t = stored[f"{name}.weight"]
        W, back = layer.weight.double(), torch.tensor(gguf.dequantize(t.data, t.tensor_type)).double()
        assert (back - W).abs().max() <= W.abs().max() / (250 if found == "q8_0" else 1000)
    assert LlamaCpp(file).log_probabilities(torch.arange(9), 1024).isfinite().all()


def test_weights_that_overflow(tmp_path):
    model = narrow_model([64])
    model.layers[0].attention.wo.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="--outtype f16: blk.0.attn_output.weight overflows, use f32 or bf16"):
        exported(model, load_tokenizer(TINY), tmp_path, outtype="f16")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the tokenizer

def both_files(folder):
    """A tokenizer.json with the SentencePiece model that it was made from, as in Llama 2's folders."""
    export.export(random_model(), load_tokenizer(TINY), folder / "both")
    return folder / "both"


def llama3_json(folder):
    export.export(random_model(), load_tokenizer(llama3_folder(folder)), folder / "json")
    return folder / "json"


def smollm_folder(folder):
    """json_folder with SmolLM2's way to split a text, and a token that is not special."""
    from tokenizers import Tokenizer, pre_tokenizers
    made = Tokenizer.from_file(str(json_folder(folder) / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.post_processor = None
    made.add_tokens(["<file>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def same_ids(ours, file, *more):
    llama_cpp = LlamaCpp(file)
    for text in (TEXT, PROBE, "", " ", " a", "a<s>b </s> <unk>", "<|im_start|>user\nHi<|im_end|>", "<file> <|eot_id|>x",
                 *TEXTS, *more):
        assert llama_cpp.ids(text) == ours.stream(text).tolist(), text


@pytest.mark.parametrize("folder", [
    lambda f: TINY, both_files, chatml_folder, llama3_folder, llama3_json, smollm_folder])
def test_llama_cpp_gives_the_same_ids(folder, tmp_path):
    ours = load_tokenizer(folder(tmp_path))
    rows = ours.vocab_size + 3  # more rows than tokens, as models have
    same_ids(ours, exported(random_model(dim=32, head_dim=8, vocab_size=rows), ours, tmp_path))


def test_llama2s_own_tokenizer(data_dir, tmp_path):
    ours = load_tokenizer(data_dir / "llama2-tokenizer")
    text = (data_dir / "wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    same_ids(ours, exported(random_model(vocab_size=32000), ours, tmp_path), text)


def test_special_ids_and_the_chat_template(tmp_path):
    ours = load_tokenizer(chatml_folder(tmp_path))
    fields = gguf.GGUFReader(exported(random_model(vocab_size=1026), ours, tmp_path)).fields
    found = {name: fields[f"tokenizer.{name}"].contents() for name in (
        "ggml.bos_token_id", "ggml.eos_token_id", "ggml.add_bos_token", "chat_template")}
    assert [*found.values()] == [1, 1024, False, "{{ messages }}"]


@pytest.mark.parametrize("folder, rows, message", [
    (json_folder, 400, "tokenizer.json is not one of the tokenizers that it knows .* use --format hf and llama.cpp's "
                       "convert_hf_to_gguf.py on its folder"),
    (lambda f: TINY, 50, "tokenizer.model has 1,024 tokens, expected at most 50, the rows of the model's embeddings")])
def test_tokenizers_that_it_does_not_have(folder, rows, message, tmp_path):
    ours = load_tokenizer(folder(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        exported(random_model(vocab_size=rows), ours, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFC"}}, {"model": {"ignore_merges": True}}, {"pre_tokenizer": None}])
def test_a_tokenizer_is_never_guessed(change, tmp_path):
    """One that differs from SmolLM2's in a single setting is another one."""
    file = smollm_folder(tmp_path) / "tokenizer.json"
    table = json.loads(file.read_text())
    for name, value in change.items():
        table[name] = {**table[name], **value} if name == "model" else value
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="not one of the tokenizers that it knows"):
        exported(random_model(vocab_size=400), load_tokenizer(tmp_path), tmp_path)


# ------------------------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("words, package, message", [
    ("--format gguf", "gguf", "--format gguf needs the package gguf: pip install gguf"),
    ("--format gguf --outtype q4_0", None, "--outtype: invalid choice: 'q4_0'"),
    ("--outtype f16", None, "--outtype is for --format gguf, found --format hf")])
def test_mistakes_are_one_line(words, package, message, tmp_path, monkeypatch, capsys):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    assert message in error_of(main, f"--ckpt {TINY} --out {tmp_path / 'out'} {words}", monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """Here: files may not grow past 1 MiB."""
    code = ("import resource, signal, sys; from extras.export.__main__ import main; from runtime import cli\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)\n"
            "cli.command(main)")
    done = run("-c", code, "--ckpt", TINY, "--format", "gguf", "--out", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 2 and "error: model-f32.gguf: could not be written" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ a real model

PROMPT = "The capital of France"


def test_smollm2_greedy_tokens_equal_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    ours = load_tokenizer(smollm2)
    file = exported(load_checkpoint(smollm2), ours, tmp_path)
    same_ids(ours, file)
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval(), ours.stream(PROMPT)[None]
    expected = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1]:]
    assert LlamaCpp(file).greedy(PROMPT, 40) == expected.tolist()


@pytest.mark.parametrize("widths", [[1088] * 30, [1536, 1280, 1333] * 10])
def test_narrower_smollm2(widths, smollm2, tmp_path):
    """All MLPs cut to one width (llama), and each to its own (deci)."""
    model, ours = load_checkpoint(smollm2), load_tokenizer(smollm2)
    file, tokens = exported(narrow(model, *widths), ours, tmp_path), ours.stream(PROMPT + TEXT)
    theirs = LlamaCpp(file).log_probabilities(tokens, 49152)
    assert torch.allclose(theirs, model(tokens[None])[0, -1].log_softmax(-1), rtol=0, atol=2e-3)
