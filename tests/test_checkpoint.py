"""The lesson: each format of checkpoint gives the same weights, and a bad folder is refused in one line."""
import json
import os
import shutil
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch

from tests.conftest import LLAMA31, random_model, random_tokens, transformers_model
from data.checkpoint import load_checkpoint, pair_rows, read_args, save_checkpoint
from runtime.cli import open_checkpoint


# ------------------------------------------------------------------------------------- Hugging Face's folders

def hf_folder(folder, **changes):
    """A Hugging Face folder of random weights: (folder, its tensors)."""
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    transformers_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder, safetensors.load_file(folder / "model.safetensors")


def test_sharded_safetensors(tmp_path):
    theirs = transformers_model("llama 3.1")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = torch.arange(60)[None]
    assert torch.allclose(load_checkpoint(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", [{"rope_theta": 500.0, "rope_scaling": LLAMA31},
                                  {"rope_parameters": {"rope_theta": 500.0, **LLAMA31}}])
def test_both_spellings_of_rotary_scaling(rope, tmp_path):
    """transformers 4 writes theta and scaling apart, transformers 5 together."""
    transformers_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **rope}))
    args = load_checkpoint(tmp_path).args
    assert args.rope_theta == 500.0
    assert args.rope_scaling == {name: value for name, value in LLAMA31.items() if name != "rope_type"}


def test_pair_rows_moves_halves_to_pairs():
    """Two heads of 4 rows: rows 0 1 | 2 3 (real | imaginary halves) become 0 2 1 3."""
    W = torch.arange(8.0)[:, None].expand(8, 3)
    assert pair_rows(W, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["one", "parts"])
def test_pytorch_bin(kind, tmp_path):
    folder, theirs = hf_folder(tmp_path)
    expected = load_checkpoint(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if kind == "one":
        torch.save(theirs, folder / "pytorch_model.bin")
    else:
        names = sorted(theirs)
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in {*files.values()}:
            torch.save({name: theirs[name] for name in names if files[name] == file}, folder / file)
    found = load_checkpoint(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_one_file_beats_parts_that_an_earlier_save_left(tmp_path):
    """Two sets of parts are refused: which is the right one is not known."""
    folder, theirs = hf_folder(tmp_path)
    expected = load_checkpoint(folder).tok_embeddings.weight.clone()
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: t + 1 for name, t in theirs.items()}, folder / "model-00001-of-00001.safetensors")
    assert torch.equal(load_checkpoint(folder).tok_embeddings.weight, expected)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors: duplicate tensor"):
        load_checkpoint(folder)


def test_a_missing_part_is_a_missing_tensor(tmp_path):
    transformers_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="tensor .* is missing|weights of . layers, expected 3"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ raw folders

META = {"dim": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 24,
        "ffn_dim_multiplier": 0.55, "norm_eps": 1e-5, "vocab_size": -1}


def write_meta(folder, model, shards=1, embedding_dim=1, **changes):
    """Meta's raw folder, cut into model-parallel shards by Meta's rule."""
    cut = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1,
           "tok_embeddings": embedding_dim}
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**META, **changes}))
    for i in range(shards):
        part = {name: p.chunk(shards, cut[name.split(".")[-2]])[i].clone()
                if name.split(".")[-2] in cut else p
                for name, p in model.state_dict().items()}
        torch.save({**part, "rope.freqs": torch.ones(2),
                    "layers.0.attention.rotary_emb.inv_freq": torch.ones(2)},
                   folder / f"consolidated.{i:02}.pth")
    return folder


@pytest.mark.parametrize("shards, embedding_dim", [(1, 1), (2, 1), (2, 0)])
def test_meta_folders(shards, embedding_dim, tmp_path):
    model = random_model()
    loaded = load_checkpoint(write_meta(tmp_path / "meta", model, shards, embedding_dim))
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens)) and loaded.args.vocab_size == 50
    assert not any(p.requires_grad for p in loaded.parameters())


def test_an_equal_head_is_the_embedding(tmp_path):
    """Meta's tied models store the embeddings twice.

    Here they are one parameter, counted once and written once.
    """
    model = random_model(tied=True)
    folder = write_meta(tmp_path / "meta", model)
    table = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save({name: t.clone() for name, t in table.items()}, folder / "consolidated.00.pth")
    loaded = load_checkpoint(folder)
    assert loaded.output.weight is loaded.tok_embeddings.weight and loaded.n_params == model.n_params


@pytest.mark.parametrize("params, hidden, scaled", [
    ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008, None),  # Llama 2 7B
    ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672,
     None),  # Llama 2 70B
    ({"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0,
      "use_scaled_rope": True}, 14336, 8.0),  # Llama 3.1 8B
    ({"dim": 2048, "n_heads": 32, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5,
      "use_scaled_rope": True}, 8192, 32.0),  # Llama 3.2 1B
    ({"dim": 4096, "n_heads": 32, "hidden_dim": 14336, "head_dim": 128}, 14336, None),  # Mistral 7B
])
def test_feed_forward_sizes_of_released_models(params, hidden, scaled):
    shards = [{"tok_embeddings.weight": torch.empty(32000, params["dim"], device="meta")}]
    args = read_args({"n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1, **params}, False, shards)
    assert args["hidden_dim"] == hidden and args["vocab_size"] == 32000
    assert args["n_kv_heads"] == params["n_heads"]  # none given: no grouped queries
    assert (args["rope_scaling"] or {}).get("factor") == scaled


@pytest.mark.parametrize("changes, theta", [
    ({}, 1e4), ({"hidden_dim": 24}, 1e6), ({"hidden_dim": 24, "sliding_window": 32}, 1e4),
    ({"hidden_dim": 24, "rope_theta": 500.0}, 500.0)])
def test_rope_theta_where_params_json_does_not_say_it(changes, theta):
    """hidden_dim is Mistral's key: its own code takes 1e6, and 1e4 where there is a sliding window."""
    embedding = {"tok_embeddings.weight": torch.empty(50, 16, device="meta")}
    assert read_args({**META, "multiple_of": 24, **changes}, False, [embedding])["rope_theta"] == theta


@pytest.mark.parametrize("family, changes, positions", [
    ("mistral", {}, 4096), ("mistral", {"sliding_window": None}, 32768),
    ("mistral", {"sliding_window": 100}, 100), ("llama", {"sliding_window": 100}, 32768)])
def test_positions_end_where_the_sliding_window_does(family, changes, positions):
    """Mistral's default is 4,096; a llama config's window is ignored, as transformers does."""
    config = {"model_type": family, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 32768, **changes}
    embedding = {"tok_embeddings.weight": torch.empty(50, 16, device="meta")}
    assert read_args(config, True, [embedding])["max_seq_len"] == positions
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = read_args({**config, "rope_scaling": rope}, True, [embedding])["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == 32768


def test_mistral_raw_safetensors_and_its_window(tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    model = random_model(torch.bfloat16, head_dim=6)
    save_file(dict(model.state_dict()), tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(
        {"dim": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "hidden_dim": 24,
         "norm_eps": 1e-5, "vocab_size": 50, "sliding_window": 16}))
    loaded, tokens = load_checkpoint(tmp_path), random_tokens(model, 1, 17)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    assert loaded(tokens[:, :16]).isfinite().all()
    with pytest.raises(ValueError, match="17 tokens.*end at 16"):
        loaded(tokens)


def test_on_the_cpu_weights_stay_mapped(tmp_path):
    """A loaded matrix lies where the kernel mapped the file. It has no memory of its own."""
    loaded = load_checkpoint(write_meta(tmp_path / "meta", random_model()))
    address = loaded.layers[2].attention.wq.weight.data_ptr()
    try:
        maps = open("/proc/self/maps").read().splitlines()
    except FileNotFoundError:
        pytest.skip("needs Linux's /proc/self/maps")
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps
              if "consolidated.00.pth" in line]
    assert any(start <= address < end for start, end in ranges)


def test_of_two_layouts_hugging_faces_is_read_and_named(tmp_path, capsys):
    folder, _ = hf_folder(tmp_path)
    expected = load_checkpoint(folder).n_params
    write_meta(folder, random_model(torch.float32))
    (folder / "adapter_config.json").write_text("{}")
    assert load_checkpoint(folder).n_params == expected
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        open_checkpoint(folder, "cpu", "auto")
    out = capsys.readouterr().out
    assert out.startswith(f"reading      model.safetensors of {folder}, without the adapter beside them\n")


# ------------------------------------------------------------------------------------------------ bad folders

class Payload:
    """Unpickling this would create a file."""
    def __reduce__(self):
        return open, ("code-was-run", "w")


class Beyond:
    """Unpickling this makes a tensor of 16 x 16 numbers from a storage of one."""
    def __reduce__(self):
        storage = torch.storage.TypedStorage(wrap_storage=torch.ones(1).untyped_storage(),
                                             dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, (16, 16), (16, 1), False, OrderedDict())


def edit(**changes):
    def spoil(folder):
        params = {**json.loads((folder / "params.json").read_text()), **changes}
        (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v != "remove"}))
    return spoil


def tensors(change):
    def spoil(folder):
        table = torch.load(folder / "consolidated.00.pth", weights_only=True)
        change(table)
        torch.save(table, folder / "consolidated.00.pth")
    return spoil


def cut(folder):
    content = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.00.pth").write_bytes(content[:len(content) // 2])


WQ = "layers.1.attention.wq.weight"
BAD = {
    "no weights": (lambda f: (f / "consolidated.00.pth").unlink(), "looked for config.json with"),
    "not JSON": (lambda f: (f / "params.json").write_text("{dim: 16"), "params.json: not JSON"),
    "not an object": (lambda f: (f / "params.json").write_text("[1]"), "expected an object"),
    "no dim": (edit(dim="remove"), "params.json: lacks dim"),
    "text for a number": (edit(n_heads="four"), "n_heads is 'four', expected a positive int"),
    "negative": (edit(n_layers=-4), "n_layers is -4, expected"),
    "NaN": (edit(norm_eps=float("nan")), "norm_eps is nan, expected"),
    "absurd depth": (edit(n_layers=10 ** 9), "weights of 4 layers, expected 1000000000"),
    "absurd width": (edit(dim=2 ** 52), "meta: .*sizes"),
    "rope list": (edit(rope_scaling=[8]), r"params.json: .*\[8\]"),
    "heads": (edit(n_kv_heads=3), r"wk.weight is \(8, 16\), expected \(12, 16\)"),
    "odd head": (edit(n_heads=2, n_kv_heads=2, head_dim=3), r"wq.weight is \(16, 16\), expected \(6, 16\)"),
    "nested": (tensors(lambda t: t.update({WQ: torch.nested.nested_tensor([torch.ones(3)])})),
               "not readable|not read"),
    "experts": (edit(moe={"num_experts": 8}), "params.json: moe .*unsupported architecture"),
    "ranks": (edit(ranks={"layers.9.attention.wq": 3}), "meta: .*9"),
    "ranks list": (edit(ranks=[1]), "params.json: "),
    "missing": (tensors(lambda t: t.pop(WQ)), f"tensor {WQ} is missing"),
    "extra": (tensors(lambda t: t.update(surplus=torch.ones(2))),
              "tensor surplus is not one of this model's"),
    "misshapen": (tensors(lambda t: t.update({WQ: torch.ones(16, 15)})),
                  rf"{WQ} is \(16, 15\), expected \(16, 16\)"),
    "transposed vector": (tensors(lambda t: t.update({"norm.weight": torch.ones(1, 16)})),
                          r"\(1, 16\), expected \(16,"),
    "integers": (tensors(lambda t: t.update({WQ: torch.ones(16, 16).int()})), f"{WQ} is .*float32"),
    "infinite": (tensors(lambda t: t[WQ].view(-1)[7:8].fill_(float("inf"))), f"{WQ} holds NaN or infinite"),
    "minus infinite": (tensors(lambda t: t[WQ].view(-1)[7:8].fill_(-float("inf"))),
                       f"{WQ} holds NaN or infinite"),
    "not a number": (tensors(lambda t: t[WQ].view(-1)[7:8].fill_(float("nan"))),
                     f"{WQ} holds NaN or infinite"),
    "no storage": (tensors(lambda t: t.update({WQ: torch.empty(16, 16, device="meta")})),
                   "not readable as plain"),
    "beyond its storage": (tensors(lambda t: t.update({WQ: Beyond()})), "not readable as plain tensors"),
    "a pipe": (lambda f: ((f / "consolidated.00.pth").unlink(), os.mkfifo(f / "consolidated.00.pth")),
               "no checkpoint here"),
    "not a table": (lambda f: torch.save([torch.ones(1)], f / "consolidated.00.pth"),
                    "not readable as plain tensors.*list"),
    "an object": (tensors(lambda t: t.update(code=Payload())),
                  "not readable as plain tensors .*: it holds more than tensors"),
    "cut": (cut, "not readable as plain tensors"),
    "empty": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), "not readable as plain tensors"),
    "a shard too many": (lambda f: shutil.copy(f / "consolidated.00.pth", f / "consolidated.01.pth"),
                         r"wq.weight is \(32, 16\), expected \(16, 16\)"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_folders_are_refused(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, message = BAD[fault]
    folder = write_meta(tmp_path / "meta", random_model(torch.float32))
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load_checkpoint(folder)
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("change, message", [
    ({"model_type": "qwen2"}, "model_type is 'qwen2'; supported: llama, mistral"),
    ({"attention_bias": True}, "config.json: attention_bias is True.* (un)?supported"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
     "the rotary embedding is .*'yarn'.*; supported"),
    ({"rope_parameters": "llama3"}, "the rotary embedding is 'llama3'; supported"),
    ({"hidden_size": None}, "config.json: lacks hidden_size"),
    ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
    ({"vocab_size": 98}, r"tok_embeddings.weight is \(99, 32\), expected \(98, 32\)"),
])
def test_bad_configs_are_refused(change, message, tmp_path):
    folder, _ = hf_folder(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    folder, table = hf_folder(tmp_path)
    del table["lm_head.weight"]
    pytest.importorskip("safetensors.torch").save_file(table, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is missing, and tie_word_embeddings is not true"):
        load_checkpoint(folder)


def test_a_tied_flag_with_another_head_is_refused(tmp_path):
    """transformers 4 would drop the head, transformers 5 keep it."""
    folder, theirs = hf_folder(tmp_path, tie_word_embeddings=True)
    assert not torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
    message = "tie_word_embeddings is true, but lm_head.weight is not embed_tokens"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_weights_too_large_for_the_dtype_are_refused(tmp_path):
    model = random_model()
    model.layers[0].attention.wv.weight.data[0, 0] = 70000.0
    folder = write_meta(tmp_path / "meta", model)
    load_checkpoint(folder, torch.bfloat16)
    with pytest.raises(ValueError, match="wv.weight holds NaN or infinite values in torch.float16"):
        load_checkpoint(folder, torch.float16)


def test_a_compressed_record_is_refused(tmp_path):
    """Mapped, its compressed bytes would be read as numbers; zip's own checksums are right."""
    folder = write_meta(tmp_path / "meta", random_model(torch.float32))
    file = folder / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            how = zipfile.ZIP_DEFLATED if name.endswith("data/3") else zipfile.ZIP_STORED
            archive.writestr(name, content, how)
    with pytest.raises(ValueError, match="consolidated.00.pth: not readable .*: the sizes of the tensors' storages are not those"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["output", "layers.1.attention", "layers.1.attention_norm",
                                  "tok_embeddings"])
def test_ranks_are_of_matrices_only(name, tmp_path):
    save_checkpoint(random_model(), tmp_path / "out")
    edit(ranks={name: 4})(tmp_path / "out")
    with pytest.raises(ValueError, match=f"out: .*{name}"):
        load_checkpoint(tmp_path / "out")


def test_shards_that_differ_are_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", random_model(), shards=2)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    part["norm.weight"] += 1
    torch.save(part, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="norm.weight differs between the shards"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named(name, tmp_path):
    folder, _ = hf_folder(tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    message = f"{name}: a Git LFS pointer, not the file itself; fetch it: git lfs pull"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_without_safetensors_the_package_is_named(tmp_path, monkeypatch):
    transformers_model("llama").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        load_checkpoint(tmp_path)
