"""The lesson: transformers runs a compressed model with its factors and narrow feed-forwards, and so with its size.

`--format hf-lowrank` writes the folder; the `transformers` library loads it and runs the code in it, as for any user.
"""
import ast
import json
import sys

import pytest
import torch

from tests.conftest import error_of, output_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras import export, generate, linear
from extras.export.__main__ import main
from extras.export.hugging_face import CODE
from model import LowRankLinear
from tests.extras.test_export import FOLDERS, TINY, compressed

transformers = pytest.importorskip("transformers", reason="the independent implementation: pip install -r requirements-test.txt")


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """transformers copies a folder's code before it imports it: here to a temporary place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", sys.path[:])
        yield


def shrunk(model):
    """The model itself: layer 1 low-rank, layer 2's feed-forward with 10 channels and one matrix of these low-rank."""
    ff = compressed(model).layers[2].feed_forward
    ff.w1, ff.w3, ff.w2 = (linear(W) for W in (ff.w1.weight[:10], ff.w3.weight[:10], ff.w2.weight[:, :10]))
    U, S, Vh = torch.linalg.svd(ff.w3.weight, full_matrices=False)
    ff.w3 = LowRankLinear(U[:, :4] * S[:4], Vh[:4])
    return model


def exported(model, folder, **how):
    export.export(model, load_tokenizer(TINY), folder, "hf-lowrank", **how)
    return folder


def loaded(folder, dtype="auto", **how):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype,
                                                                    output_loading_info=True, **how)
    assert not any(info.values()), info  # no tensor missing, none left over
    return model.eval().requires_grad_(False)


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind.startswith(("mistral", "hugging face"))])
def test_same_logits_and_as_many_parameters(kind, tmp_path):
    """Tied heads, grouped queries, heads of a size of their own; fp64, but for their norms and angles."""
    FOLDERS[kind](tmp_path / "in")
    model = shrunk(load_checkpoint(tmp_path / "in"))
    theirs, tokens = loaded(exported(model, tmp_path / "out")), random_tokens(model, 2, 60)
    assert theirs.dtype == torch.float64 and size(theirs) == model.n_params < model.n_params_dense
    assert torch.allclose(theirs(tokens).logits, model(tokens), rtol=0, atol=5e-5)


def test_the_config_names_ranks_and_widths(tmp_path):
    """A table like that of params.json, in Hugging Face's names; the heads need not divide the width."""
    model = shrunk(random_model(dim=18))
    config = json.loads((exported(model, tmp_path / "out") / "config.json").read_text())
    ranks = config["ranks"]
    assert len(ranks) == 9 and ranks["model.layers.2.mlp"] == 10 and ranks["model.layers.2.mlp.up_proj"] == 4
    assert ranks["model.layers.1.self_attn.q_proj"] == model.layers[1].attention.wq.A.shape[1]
    theirs, tokens = loaded(tmp_path / "out"), random_tokens(model, 1, 9)
    assert torch.allclose(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)


def test_generation_with_and_without_a_cache(tmp_path):
    model = shrunk(random_model(tied=True))
    theirs, prompt = loaded(exported(model, tmp_path / "out")), random_tokens(model, 2, 7)
    ours = torch.stack(list(generate.generate(model, prompt, 12)), dim=1)
    for cached in (True, False):
        found = theirs.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached, eos_token_id=None,
                                attention_mask=torch.ones_like(prompt))
        assert torch.equal(found[:, 7:], ours)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_such_a_folder_again(tied, tmp_path):
    model = shrunk(random_model(tied=tied))
    theirs, tokens = loaded(exported(model, tmp_path / "out", shard="8KB")), random_tokens(model, 1, 9)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE.name).read_text() == CODE.read_text()
    again = loaded(tmp_path / "again")
    assert torch.allclose(again(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)
    assert size(again) == model.n_params
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_devices_and_half_precision(where, tmp_path):
    pytest.importorskip("accelerate")
    model = shrunk(random_model())
    theirs = loaded(exported(model, tmp_path / "out"), dtype=torch.bfloat16, device_map=where)
    tokens = random_tokens(model, 1, 9)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    logits = theirs(tokens.to(theirs.device)).logits.cpu().double()
    assert (logits - model(tokens)).abs().max() < 0.1 * model(tokens).abs().max()


def test_the_base_model_is_the_changed_one(tmp_path):
    """What vLLM's backend for transformers asks for: AutoModel, from the config alone, with a choice of attention."""
    model = shrunk(random_model())
    config = transformers.AutoConfig.from_pretrained(exported(model, tmp_path / "out"), trust_remote_code=True)
    base = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert size(base) == model.n_params - model.output.weight.numel()
    assert base._supports_attention_backend and config.base_model_tp_plan is None
    base, info = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True,
                                                        output_loading_info=True)
    assert [*info["unexpected_keys"]] == ["lm_head.weight"] and not info["missing_keys"]
    assert base(random_tokens(model, 1, 9)).last_hidden_state.shape == (1, 9, 16)


def test_modules_with_the_same_children_have_the_same_low_rank_matrices(tmp_path):
    """vLLM's backend decides once for a class and its child names which linear layers it fuses."""
    kinds = {}
    for module in loaded(exported(shrunk(random_model()), tmp_path / "out")).modules():
        key = type(module), tuple(name for name, _ in module.named_children())
        found = [type(child) for child in module.children()]
        assert kinds.setdefault(key, found) == found, key


@pytest.mark.parametrize("target, adapters", [("all-linear", 36), (["A", "B"], 16), (["up_proj.A"], 2)])
def test_lora_trains_on_the_factors(target, adapters, tmp_path):
    """PEFT takes A and B for the plain linear layers that they are: 20 dense matrices and 8 pairs of factors."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = shrunk(random_model(torch.float32))
    tokens = random_tokens(model, 2, 9)
    trained = peft.get_peft_model(loaded(exported(model, tmp_path / "out")), peft.LoraConfig(
        r=2, target_modules=target, task_type="CAUSAL_LM"))
    names = {name.partition(".lora_")[0] for name, p in trained.named_parameters() if p.requires_grad}
    assert len(names) == adapters, sorted(names)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        losses.append(trained(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(tmp_path / "out"), tmp_path / "adapter").eval()
    assert torch.allclose(again(tokens).logits, trained(tokens).logits, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    assert size(merged) == model.n_params
    assert torch.allclose(merged(tokens).logits, trained(tokens).logits, rtol=0, atol=1e-4)


def test_the_code_needs_transformers_and_nothing_of_this_project():
    found = [node for node in ast.walk(ast.parse(CODE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module for node in found} == {"collections", "copy", "torch", "transformers"}


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture
def small(tmp_path, monkeypatch):
    """The embedded model, compressed, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model = shrunk(load_checkpoint(TINY))
    save_checkpoint(model, "small", tokenizer=load_tokenizer(TINY).files)
    return model


def test_the_command_says_what_it_did(small, capsys):
    said = output_of(main, "--ckpt small --out out --format hf-lowrank", capsys)
    assert f"exported     {small.n_params:,} parameters" in said and "dense" not in said
    assert "as they are; transformers needs trust_remote_code=True\nwritten to out" in said
    theirs, tokens = loaded("out"), torch.arange(50)[None]
    assert size(theirs) == small.n_params
    assert torch.allclose(theirs(tokens).logits, small(tokens), rtol=0, atol=1e-4)
    assert "--format hf-lowrank" in output_of(main, "--ckpt small --out dense", capsys)


def test_mistakes_are_one_line(small, monkeypatch, capsys):
    assert "model_type is 'llama-lowrank'; supported: llama, mistral" in error_of(
        main, f"--ckpt {exported(small, 'out')} --out again", monkeypatch, capsys)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "--format hf-lowrank needs the package safetensors: pip install safetensors" in error_of(
        main, "--ckpt small --out again --format hf-lowrank", monkeypatch, capsys)
