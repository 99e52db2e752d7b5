"""The lesson: a folder of the nemotron-nas kind holds an MLP width for each layer, and its readers compute that width.

The independent implementation is mlx-lm's nemotron-nas, on the CPU.
"""
import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import LLAMA31, ROOT, error_of, output_of, random_model, random_tokens
from data.checkpoint import save_checkpoint
from data.tokenizer import load_tokenizer
from extras import export
from extras.export.__main__ import main
from extras.export.deci import changes
from grasp import compress
from model import FeedForward

TINY = ROOT / "data/tiny"
SCALED = {name: value for name, value in LLAMA31.items() if name != "rope_type"}


def narrow_model(widths, **settings):
    """A random model with the vocabulary of data/tiny, whose MLPs have these widths."""
    fields = dict(dtype=torch.float32, dim=64, head_dim=16, hidden_dim=512, vocab_size=1024, n_layers=len(widths))
    model = random_model(**{**fields, **settings})
    for layer, width in zip(model.layers, widths):
        layer.feed_forward = FeedForward(replace(model.args, hidden_dim=width)).to(model.dtype).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("settings", [
    {}, {"tied": True}, {"rope_theta": 5e5, "rope_scaling": SCALED}, {"n_kv_heads": 4}])
def test_mlx_gives_the_same_logits(settings, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="the independent implementation: pip install -r requirements-test.txt")
    from mlx_lm.utils import load_model
    mx.set_default_device(mx.cpu)
    model = narrow_model([512, 256, 256, 512], **settings)
    export.export(model, load_tokenizer(TINY), tmp_path / "out", "deci", shard="300KB")
    theirs, _ = load_model(tmp_path / "out")  # strict: no tensor missing, none left over
    assert [layer.mlp.gate_proj.weight.shape[0] for layer in theirs.layers] == [512, 256, 256, 512]
    tokens = random_tokens(model, 2, 60)
    logits = torch.tensor(theirs(mx.array(tokens.numpy())).tolist())
    assert logits.abs().max() > 1 and torch.allclose(logits, model(tokens), rtol=0, atol=1e-4)


def counted(ffn_mult, dim):
    """A width as vLLM and llama.cpp's converter count it; mlx-lm rounds ffn_mult to six digits first."""
    return -(-int(2 * ffn_mult * dim / 3) // 256) * 256


def test_every_reader_computes_the_width():
    for dim in (64, 576, 2048, 3072, 4096, 5120, 8192, 16384):
        with torch.device("meta"):
            model = narrow_model([256], dim=dim, head_dim=dim // 4)
            for width in range(256, 60000, 256 * 7):
                model.layers[0].feed_forward.w2 = torch.nn.Linear(width, 1, bias=False)
                ffn_mult = changes(model)["block_configs"][0]["ffn"]["ffn_mult"]
                assert isinstance(ffn_mult, float)  # llama.cpp's converter asks for it
                assert counted(ffn_mult, dim) == counted(round(ffn_mult, 6), dim) == width


def test_vllm_finds_the_settings_as_attributes(tmp_path):
    """The class beside config.json, as vLLM loads it with trust_remote_code; it is saved as it was read."""
    pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    from extras.export.configuration_decilm import DeciLMConfig
    export.export(narrow_model([512, 256]), load_tokenizer(TINY), tmp_path / "out", "deci")
    table = json.loads((tmp_path / "out/config.json").read_text())
    file, name = table["auto_map"]["AutoConfig"].split(".")
    assert f"class {name}(" in (tmp_path / "out" / f"{file}.py").read_text()
    config = DeciLMConfig.from_pretrained(tmp_path / "out")
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 2]
    assert [block.ffn.ffn_mult for block in config.block_configs] == [12.0, 6.0]
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["block_configs"] == table["block_configs"]


@pytest.mark.parametrize("widths, settings, message", [
    ([512, 300], {}, "layers.1.feed_forward has 300 channels, expected a multiple of 256; use --format hf-lowrank or "
                     "gguf, or extras.fisher with --shape widths --multiple 256"),
    ([512, 256], {"head_dim": 8}, "4 heads of 8 in a model of width 64, expected heads of 16; use --format hf-lowrank "
                                  "or gguf"),
])
def test_what_it_cannot_hold(widths, settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"--format deci: {message}"):
        export.export(narrow_model(widths, **settings), load_tokenizer(TINY), tmp_path / "out", "deci")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = narrow_model([512, 256])
    save_checkpoint(model, "narrow", tokenizer=load_tokenizer(TINY).files)
    said = output_of(main, "--ckpt narrow --out out --format deci", capsys)
    assert f"exported     {model.n_params:,} parameters, widths as they are" in said
    assert "vllm serve out --trust-remote-code" in (tmp_path / "out/README.md").read_text()
    list(compress(model, [1], None, ratio=0.6, score="magnitude"))
    save_checkpoint(model, "low-rank", tokenizer=load_tokenizer(TINY).files)
    for layout in ("deci", "gguf"):
        said = error_of(main, f"--ckpt low-rank --out no --format {layout}", monkeypatch, capsys)
        assert f"--format {layout}: layers.1.attention.wq is low-rank, expected dense matrices; use --format hf" in said
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "out", "low-rank"}
