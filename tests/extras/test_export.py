"""The lesson: what is exported gives others the compressed model's logits, from dense weights.

The independent implementation is the `transformers` library: AutoModelForCausalLM and AutoTokenizer read what this project wrote.
"""
import base64
import collections
import json
import shutil
import sys

import pytest
import torch

from tests.conftest import (LLAMA31, ROOT, error_of, output_of, random_model, random_tokens, run,
                            transformers_model)
from data.tokenizer import load_tokenizer
from extras import export, linear
from extras.export.__main__ import main
from extras.export.hugging_face import halve_rows
from extras.export.meta import meta_params
from grasp import compress
from data.checkpoint import load_checkpoint, pair_rows, save_checkpoint
from model import LowRankLinear, ModelArgs
from tests.test_checkpoint import write_meta

transformers = pytest.importorskip("transformers", reason="the independent implementation: pip install -r requirements-test.txt")
TINY = ROOT / "data/tiny"


def mistral_folder(folder):
    """Mistral's raw layout; heads of 6 in a model of 16, of which 4 heads would have 4."""
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    folder.mkdir()
    safetensors.save_file(dict(random_model(head_dim=6).state_dict()), folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(
        {"dim": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "hidden_dim": 24, "norm_eps": 1e-5,
         "vocab_size": 50, "rope_theta": 1e6, "sliding_window": 4096}))


FOLDERS = {  # how each kind of folder that this project reads comes to be
    "meta": lambda f: write_meta(f, random_model()),
    "meta, two shards": lambda f: write_meta(f, random_model(), shards=2),
    "meta, tied": lambda f: write_meta(f, random_model(tied=True)),
    "mistral": mistral_folder,
    **{f"hugging face, {kind}": lambda f, kind=kind: transformers_model(kind).save_pretrained(f)
       for kind in ("llama", "tied", "llama 3.1", "mistral")},
}


def compressed(model):
    """The model itself, with factors where the matrices of layer 1 stood."""
    list(compress(model, [1], None, ratio=0.6, score="magnitude"))
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    return model


def exact(model):
    """{name: dense weight}, products taken in fp64 and rounded once."""
    dense = {f"{name}.weight": (m.A.double() @ m.B.double()).to(m.A.dtype)
             for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    return dense | {name: p for name, p in model.named_parameters() if not name.endswith((".A", ".B"))}


def their_logits(folder, tokens):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info  # no tensor missing, none left over
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("kind", FOLDERS)
def test_transformers_gives_the_compressed_models_logits(kind, tmp_path):
    """fp64; what is left of a difference are their norms and angles, which are fp32."""
    FOLDERS[kind](tmp_path / "in")
    dense, model = load_checkpoint(tmp_path / "in"), compressed(load_checkpoint(tmp_path / "in"))
    export.export(model, load_tokenizer(TINY), tmp_path / "out")
    tokens = random_tokens(model, 2, 60)
    ours, theirs = model(tokens), their_logits(tmp_path / "out", tokens)
    assert (ours - dense(tokens)).abs().max() > 0.1 and theirs.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=0, atol=5e-5)
    back = load_checkpoint(tmp_path / "out")
    assert back.n_params == model.n_params_dense > model.n_params
    assert {**vars(back.args), "max_seq_len": 0} == {**vars(model.args), "max_seq_len": 0}
    assert back.args.max_seq_len == model.args.max_seq_len or model.args.max_seq_len is None  # a window ends it, too
    for name, W in exact(model).items():
        assert torch.allclose(back.get_parameter(name), W, rtol=0, atol=1e-14), name
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_rounded_once(dtype, tmp_path):
    model = compressed(random_model(dtype))
    export.export(model, load_tokenizer(TINY), tmp_path / "out")
    back = load_checkpoint(tmp_path / "out")
    assert back.dtype == dtype == transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype
    for name, W in exact(model).items():
        same = (back.get_parameter(name) == W).double().mean()
        assert same == 1 or name.startswith("layers.1") and same > 0.99, name  # fp32 sums may differ by a last bit


def test_halve_rows_undoes_pair_rows():
    """Two heads of 6 rows; of 4, the turn would be its own inverse."""
    W = torch.arange(12.0)[:, None].expand(12, 3)
    assert halve_rows(W, 6)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(halve_rows(pair_rows(W, 6), 6), W)


def test_shards_are_small_and_indexed(tmp_path):
    model = compressed(random_model(tied=True))
    export.export(model, load_tokenizer(TINY), tmp_path / "out", shard="8KB")
    files, tokens = sorted((tmp_path / "out").glob("model-*.safetensors")), random_tokens(model, 1, 9)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 8000 + 2000 for f in files)  # names and shapes besides
    assert index["metadata"]["total_size"] == 8 * model.n_params_dense
    assert torch.allclose(their_logits(tmp_path / "out", tokens), model(tokens), rtol=0, atol=1e-5)
    assert torch.allclose(load_checkpoint(tmp_path / "out")(tokens), model(tokens), rtol=0, atol=1e-10)


def test_whoever_reads_the_folder_reads_its_weights(tmp_path):
    export.export(random_model(), load_tokenizer(TINY), tmp_path / "out")
    assert len({f.stat().st_mode for f in (tmp_path / "out").iterdir()}) == 1


def test_positions_that_no_one_says_are_chosen_aloud(tmp_path, capsys):
    for i, (changes, positions) in enumerate([({}, 4096), ({"rope_theta": 5e5}, 8192),
                                              ({"use_scaled_rope": True}, 131072), ({"max_seq_len": 77}, 77)]):
        model = load_checkpoint(write_meta(tmp_path / "in", random_model(), **changes))
        export.export(model, load_tokenizer(TINY), tmp_path / f"out{i}")
        assert (f"the export says {positions:,}" in capsys.readouterr().out) == (positions != 77)
        assert load_checkpoint(tmp_path / f"out{i}").args.max_seq_len == positions


def test_heads_that_do_not_divide_the_width(tmp_path):
    """transformers' LlamaConfig refuses them, its MistralConfig does not."""
    model = random_model(dim=18)
    export.export(model, load_tokenizer(TINY), tmp_path / "out")
    tokens = random_tokens(model, 1, 9)
    assert torch.allclose(their_logits(tmp_path / "out", tokens), model(tokens), rtol=0, atol=1e-5)


def narrow(model, *widths):
    """The model itself, with the first channels of its feed-forwards: widths[i] of layer i's."""
    for block, n in zip(model.layers, widths):
        ff = block.feed_forward
        ff.w1, ff.w3, ff.w2 = linear(ff.w1.weight[:n]), linear(ff.w3.weight[:n]), linear(ff.w2.weight[:, :n])
    return model


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_one_width_for_all_feed_forwards_is_a_plain_model(layout, tmp_path):
    """Nothing is padded: the exported folder is as small as the compressed model."""
    model = narrow(random_model(), 10, 10, 10, 10)
    tokens, before = random_tokens(model, 2, 9), model.args.hidden_dim
    export.export(model, load_tokenizer(TINY), tmp_path / "out", layout)
    back = load_checkpoint(tmp_path / "out")
    assert back.n_params == model.n_params and back.args.hidden_dim == 10 and model.args.hidden_dim == before == 24
    assert torch.allclose(back(tokens), model(tokens), rtol=0, atol=1e-10)
    if layout == "hf":
        assert torch.allclose(their_logits(tmp_path / "out", tokens), model(tokens), rtol=0, atol=1e-5)
        assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 10


def test_other_widths_are_padded(tmp_path):
    """Where widths differ, and where the matrices of one width are low-rank."""
    for i, model in enumerate([narrow(random_model(), 10, 12), compressed(narrow(random_model(), 10, 10, 10, 10))]):
        tokens = random_tokens(model, 2, 9)
        export.export(model, load_tokenizer(TINY), tmp_path / f"out{i}")
        assert load_checkpoint(tmp_path / f"out{i}").args.hidden_dim == 24
        assert torch.allclose(their_logits(tmp_path / f"out{i}", tokens), model(tokens), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ tokenizers

TEXT = ('The cat, 12345 cats; don\'t WE\'LL!\r\n\n\n\tdef f(x):\n        return "naïve été 日本語 🙂"  \n'
        + "".join("|" + " " * n + "|\n" for n in range(40)) + "end. ")


def llama3_folder(folder):
    """Ranks as Llama 3 writes them: the 256 bytes, then what is frequent in TEXT, of two to five bytes."""
    content = TEXT.encode()
    found = collections.Counter(content[i:i + n] for n in (2, 3, 4, 5) for i in range(len(content) - n))
    words = [bytes([i]) for i in range(256)] + [word for word, _ in found.most_common(300)]
    lines = (b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(words))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def json_folder(folder):
    """Byte-level BPE without a BOS, as SmolLM2's."""
    from tokenizers import ByteLevelBPETokenizer
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def chatml_folder(folder):
    """A SentencePiece model without a BOS in front, and two tokens that other files add."""
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": False}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1024, "<|im_start|>": 1025}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 1024}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def exported_tokenizer(tokenizer, tmp_path):
    export.export(random_model(), tokenizer, tmp_path / "out")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("folder", [lambda f: TINY, llama3_folder, json_folder, chatml_folder])
def test_transformers_gives_the_same_ids(folder, tmp_path):
    ours = load_tokenizer(folder(tmp_path))
    theirs = exported_tokenizer(ours, tmp_path)
    for text in (TEXT, " a", "", "a<s>b </s> <unk>", "<|im_start|>user\nHi<|im_end|>", "<|eot_id|> <|endoftext|>x"):
        assert theirs(text).input_ids == ours.stream(text).tolist()
        if text in (TEXT, " a", ""):
            assert theirs.decode(ours.stream(text).tolist(), skip_special_tokens=True) == text
    again = load_tokenizer(tmp_path / "out")
    assert again.stream(TEXT).tolist() == ours.stream(TEXT).tolist()
    assert (again.bos_id, again.ends, again.vocab_size) == (ours.bos_id, ours.ends, ours.vocab_size)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.bos_token_id == theirs.bos_token_id == (1 if folder is chatml_folder else ours.bos_id)
    assert theirs.eos_token_id == ours.ends[0]
    assert {*ours.files} <= {path.name for path in (tmp_path / "out").iterdir()} or folder is llama3_folder
    assert config.eos_token_id == (ours.ends[0] if len(ours.ends) == 1 else list(ours.ends))


def test_llama2s_own_tokenizer(data_dir, tmp_path):
    ours = load_tokenizer(data_dir / "llama2-tokenizer")
    theirs = exported_tokenizer(ours, tmp_path)
    text = (data_dir / "wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")[:200_000] + TEXT
    assert theirs(text).input_ids == ours.stream(text).tolist()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == ours.file.read_bytes()


def test_llama3s_special_tokens_have_their_names(tmp_path):
    theirs = exported_tokenizer(load_tokenizer(llama3_folder(tmp_path)), tmp_path)
    n = theirs.bos_token_id
    assert theirs("<|start_header_id|>a<|end_header_id|><|eot_id|>").input_ids == [n, n + 6, ord("a"), n + 7, n + 9]
    assert theirs.convert_ids_to_tokens(n + 255) == "<|reserved_special_token_250|>"
    assert not (tmp_path / "out/tokenizer.model").exists()  # that name would promise a SentencePiece model


LIKE_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
              "allow_whitespace_only_pieces": True}


@pytest.mark.parametrize("settings", [
    {"byte_fallback": True},                                    # strips and merges spaces before it looks for pieces
    {**LIKE_LLAMA, "user_defined_symbols": ["<fim>", "[X]"]}])  # splits these off before it merges
def test_a_tokenizer_without_a_like_is_copied_and_told(settings, tmp_path, capsys):
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=330, minloglevel=2, **settings)
    export.export(random_model(), load_tokenizer(tmp_path), tmp_path / "out")
    assert "could not be converted to the same ids: copied as it is" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "out").glob("tok*")} == {"tokenizer.model"}


# ------------------------------------------------------------------------------------------------ Meta's layout

def hidden_dim_of(dim, multiple_of, ffn_dim_multiplier, **others):
    """As Meta's FeedForward counts."""
    hidden = int(ffn_dim_multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def test_every_hidden_size_can_be_said():
    for dim in (16, 104, 576, 2048, 4096, 5120, 8192):
        for hidden in [*range(2, 400), *range(1000, 30000, 37), 11008, 14336, 28672]:
            params = meta_params(ModelArgs(dim, 1, 4, 4, dim // 4, hidden, 50, 1e-5))
            assert hidden_dim_of(**params) == hidden


@pytest.mark.parametrize("tied, rope", [(False, {}), (True, {"rope_theta": 5e5, "rope_scaling": {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}})])
def test_metas_layout(tied, rope, tmp_path):
    """Keys that Meta's ModelArgs knows and no others (it takes the table as **params), and a head even when tied."""
    model = compressed(random_model(tied=tied, **rope))
    export.export(model, load_tokenizer(TINY), tmp_path / "out", "meta")
    params = json.loads((tmp_path / "out/params.json").read_text())
    llama2 = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    assert params.keys() == (llama2 | {"rope_theta", "use_scaled_rope"} if rope else llama2)
    table = torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True)
    assert torch.equal(table["output.weight"], table["tok_embeddings.weight"]) == tied
    for name, W in exact(model).items():
        assert torch.allclose(table[name], W, rtol=0, atol=1e-14), name
    back, tokens = load_checkpoint(tmp_path / "out"), random_tokens(model, 2, 30)
    assert back.args == model.args and back.n_params == model.n_params_dense
    assert torch.allclose(back(tokens), model(tokens), rtol=0, atol=1e-10)
    assert load_tokenizer(tmp_path / "out").vocab_size == 1024


def test_a_tokenizer_json_is_no_tokenizer_of_metas(tmp_path, capsys):
    export.export(random_model(), load_tokenizer(json_folder(tmp_path)), tmp_path / "out", "meta")
    assert "Meta's own code reads only a tokenizer.model" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.json").is_file() and not (tmp_path / "out/tokenizer.model").exists()


@pytest.mark.parametrize("changes, message", [
    ({"head_dim": 6}, "cannot say head_dim 6; this model's would be read as 4; use --format hf"),
    ({"rope_scaling": {name: value for name, value in LLAMA31.items() if name != "rope_type"}},
     "cannot say rope_scaling .*32.*; this model's would be read as .*8192"),
])
def test_what_metas_layout_cannot_say(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.export(random_model(**changes), load_tokenizer(TINY), tmp_path / "out", "meta")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture
def small(tmp_path, monkeypatch):
    """The embedded model, compressed, in a folder of its own: its parameters before and after."""
    monkeypatch.chdir(tmp_path)
    model = compressed(load_checkpoint(TINY))
    save_checkpoint(model, tmp_path / "small", tokenizer=load_tokenizer(TINY).files)
    return model.n_params_dense, model.n_params


def test_the_command_says_what_it_did(small, tmp_path):
    done = run("-m", "extras.export", "--ckpt", tmp_path / "small", "--out", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    before, after = small
    assert f"compressed   {after:,} parameters, 0.00315 GiB\n" in done.stdout
    assert f"exported     {before:,} parameters, 0.0033 GiB\n" in done.stdout
    assert "dense again" in done.stdout and "use --format hf-lowrank" in done.stdout and f"written to {tmp_path / 'out'}" in done.stdout
    ours, tokens = load_checkpoint(tmp_path / "small"), torch.arange(50)[None]
    assert torch.allclose(their_logits(tmp_path / "out", tokens), ours(tokens), rtol=0, atol=1e-4)


def test_a_dense_folder_is_only_converted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = output_of(main, f"--ckpt {TINY} --out out --format meta", capsys)
    assert "dense before and after, only converted" in said
    for name, W in load_checkpoint("out").named_parameters():
        assert torch.equal(W, load_checkpoint(TINY).get_parameter(name)), name


def test_equally_narrow_feed_forwards_are_only_converted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = load_checkpoint(TINY)
    narrow(model, *[100] * model.args.n_layers)
    save_checkpoint(model, "narrow", tokenizer=load_tokenizer(TINY).files)
    said = output_of(main, "--ckpt narrow --out out", capsys)
    assert f"exported     {model.n_params:,} parameters" in said and "only converted" in said and "again" not in said


def test_dtype_is_what_is_written(small, capsys):
    assert "A B's rounding to\nbfloat16" in output_of(main, "--ckpt small --out out --dtype bfloat16", capsys)
    assert transformers.AutoConfig.from_pretrained("out").dtype == torch.bfloat16 == load_checkpoint("out").dtype


@pytest.mark.parametrize("words, message", [
    ("--out out", "the following arguments are required: --ckpt"),
    ("--ckpt small", "the following arguments are required: --out"),
    ("--ckpt nowhere --out out", "nowhere: no such folder"),
    ("--ckpt small --out small", "small: exists"),
    ("--ckpt small --out no/such/parent", "no/such is no folder that can be written to"),
    ("--ckpt small --out out --format onnx", "--format: invalid choice: 'onnx'"),
    ("--ckpt small --out out --overwrite", "unrecognized arguments: --overwrite"),
])
def test_mistakes_are_one_line_and_write_nothing(words, message, small, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(main, words, monkeypatch, capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "huggingface_hub"])
def test_missing_packages_are_named(package, small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"--format hf needs the package {package}: pip install {package}" in error_of(
        main, "--ckpt small --out out", monkeypatch, capsys)


def test_a_full_disk_leaves_nothing(tmp_path):
    """Here: files may not grow past 64 KiB."""
    code = ("import resource, signal, sys; from runtime.cli import TINY; from data.tokenizer import load_tokenizer\n"
            "from extras.export import export; from data.checkpoint import load_checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16,) * 2)\n"
            "from pathlib import Path; out = Path(sys.argv[1])\n"
            "for layout in ('hf', 'meta'):\n"
            "    try: export(load_checkpoint(TINY), load_tokenizer(TINY), out, layout)\n"
            "    except (OSError, ValueError) as e: print(layout, 'refused:', e)")
    done = run("-c", code, tmp_path / "out", cwd=ROOT)
    assert "hf refused: model.safetensors: could not be written" in done.stdout, done.stderr
    assert "meta refused: consolidated.00.pth: could not be written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
