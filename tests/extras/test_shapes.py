"""The lesson: with channels of MLPs alone a model keeps a shape that other tools load, up to a plain, smaller LLaMA."""
import itertools
import json
from functools import partial

import pytest
import torch

from tests.conftest import error_of, output_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras.export import export
from extras import fisher
from extras.baselines import damped
from extras.fisher import compress, shapes
from extras.fisher.__main__ import main
from extras.fisher.moments import second_moments
from extras.fisher.prices import channel_costs
from extras.fisher.shapes import widths
from runtime.cli import TINY
from tests.extras.test_fisher import sweep_of

CHANNEL = 3 * 16  # parameters of a channel of random_model: dim 16, 24 channels


def channels_of(model):
    return [block.feed_forward.w1.weight.shape[0] for block in model.layers]


@pytest.mark.parametrize("multiple", [1, 4, 5])
def test_widths_are_multiples_and_the_budget_is_met(multiple):
    model, dense = random_model(), random_model()
    kept = widths(model, sweep_of(model), 1000, multiple=multiple)
    assert 0 <= dense.n_params - model.n_params - 1000 < CHANNEL * multiple
    found = channels_of(model)
    assert all(n == 24 or n % multiple == 0 for n in found) and len({*found}) > 1
    for name, channels in kept.items():
        assert channels == sorted({*channels}) and len(channels) == found[int(name.split(".")[1])]
        rows = dense.get_submodule(name).w1.weight[channels]
        assert torch.equal(model.get_submodule(name).w1.weight, rows)
    for ours, theirs in zip(model.layers, dense.layers):
        assert all(torch.equal(p, q) for p, q in zip(ours.attention.parameters(), theirs.attention.parameters()))


def test_the_cheapest_groups_go():
    """No other widths that remove as much cost less, by the channels' own prices."""
    model = random_model()
    names = [f"layers.{i}.feed_forward.w2" for i in range(4)]
    moments = second_moments(model, names, sweep_of(model)("moments"), channels=True)
    costs = [channel_costs(model.get_submodule(name).weight, *moments[name]).sort(descending=True).values for name in names]
    widths(model, sweep_of(model), 40 * CHANNEL, multiple=8)
    found = channels_of(model)

    def price(widths):
        return sum(cost[n:].sum().item() for cost, n in zip(costs, widths))

    every = itertools.product((8, 16, 24), repeat=4)
    assert price(found) == pytest.approx(min(price(ws) for ws in every if sum(ws) <= 4 * 24 - 40))


def test_only_the_layers_that_are_named_become_narrower():
    model = random_model()
    assert {*widths(model, sweep_of(model), 900, layers=[1, 2], multiple=4)} == {
        "layers.1.feed_forward", "layers.2.feed_forward"}
    assert [n < 24 for n in channels_of(model)] == [False, True, True, False]


# ------------------------------------------------------------------------------------------------ one width

def test_a_plain_llama_for_every_tool(tmp_path):
    """No table of ranks, and a plain LlamaForCausalLM in transformers with the same logits."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    model = random_model()
    before = model.n_params
    kept = widths(model, sweep_of(model), 1000, multiple=4, equal=True)
    assert {*channels_of(model)} == {model.args.hidden_dim} and model.args.hidden_dim % 4 == 0
    assert before - model.n_params >= 1000 and model.n_params == model.n_params_dense
    assert {len(channels) for channels in kept.values()} == {model.args.hidden_dim}
    assert len(kept) == len(model.layers) == model.args.n_layers == 4
    save_checkpoint(model, tmp_path / "small")
    assert json.loads((tmp_path / "small/params.json").read_text())["ranks"] == {}
    again, tokens = load_checkpoint(tmp_path / "small"), random_tokens(model, 2, 9)
    assert torch.equal(again(tokens), model(tokens))
    export(again, load_tokenizer(TINY), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.config.intermediate_size == model.args.hidden_dim
    assert torch.allclose(theirs(tokens).logits, model(tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("multiple, budget, width", [(1, 1, 23), (1, 4 * CHANNEL, 23), (1, 4 * CHANNEL + 1, 22),
                                                     (4, 1, 20), (5, 1000, 15), (8, 3072, 8)])
def test_the_largest_width_that_meets_the_budget(multiple, budget, width):
    model, dense = random_model(), random_model()
    kept = widths(model, sweep_of(model), budget, multiple=multiple, equal=True)
    assert channels_of(model) == [width] * 4 and model.args.hidden_dim == width
    assert dense.n_params - model.n_params >= budget
    for name, channels in kept.items():
        assert torch.equal(model.get_submodule(name).w1.weight, dense.get_submodule(name).w1.weight[channels])


METHODS = {"free": compress, "widths": partial(widths, multiple=4), "llama": partial(widths, multiple=4, equal=True)}


@pytest.mark.parametrize("method", METHODS)
def test_w2_is_fitted_to_the_dense_stream_at_the_end(method):
    """In place of the last sweep's text, another: only w2 changes with it."""
    models = [random_model(), random_model()]
    for seed, model in enumerate(models):
        tokens = {"second moments": random_tokens(model, 4, 9), "embeddings": random_tokens(model, 4, 9, seed)}
        torch.manual_seed(0)
        METHODS[method](model, lambda label: [tokens[label]], 1000)
    changed = [name for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()) if not torch.equal(p, q)]
    assert changed and all(name.endswith("w2.weight") for name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_before_that_w2_is_fitted_to_its_own_dense_output(method, monkeypatch):
    """By least squares of C, damped by 0.1."""
    for module in (fisher, shapes):
        monkeypatch.setattr(module, "refit", lambda model, dense, batches: None)
    model, dense = random_model(), random_model()
    kept = METHODS[method](model, sweep_of(model), 1000)
    mlps = [name for name in kept if name.endswith("feed_forward")]
    moments = second_moments(dense, [f"{name}.w2" for name in mlps], sweep_of(dense)(""), "whitened")
    for name in mlps:
        C, W, k = damped(moments[f"{name}.w2"][0], 0.1), dense.get_submodule(name).w2.weight, kept[name]
        expected = torch.linalg.solve(C[k][:, k], C[k] @ W.mT).mT
        torch.testing.assert_close(model.get_submodule(name).w2.weight.data, expected)
    assert mlps


# ------------------------------------------------------------------------------------------------ the command

QUICK = "--samples 8 --seq-len 64 --windows 2"


@pytest.mark.parametrize("shape", ["widths", "llama"])
def test_the_command(shape, nowhere, capsys):
    """A fifth less of the whole model, as asked; the table counts from the dense model."""
    said = output_of(main, f"--remove 0.2 --shape {shape} --multiple 16 {QUICK} --out small", capsys)
    report, model = json.loads((nowhere / "small/report.json").read_text()), load_checkpoint("small")
    assert report["parameters_before"] == 886368 and model.n_params == report["parameters_after"]
    assert 0.2 <= 1 - model.n_params / 886368 < 0.24 and "20.0 % of the model's" in said
    assert f"{100 * model.n_params / 886368:.1f}" in said and "a multiple of 16" in said
    assert all(n % 16 == 0 for n in channels_of(model)) and (len({*channels_of(model)}) == 1) == (shape == "llama")
    assert said.count(" channels\n") == 8


@pytest.mark.parametrize("words, message", [
    ("--budget 0.2 --remove 0.2", "not allowed with argument"),
    ("--remove 0.95", "--remove 0.95: 842,050 parameters of the 787,968 in the blocks, expected at least 1 and not all"),
    ("--remove 0.2 --multiple 64", "--multiple is for --shape widths or llama"),
    ("--remove 0.2 --shape llama --layers 2", "--layers and --layer-ids are for other shapes"),
    ("--remove 0.2 --shape widths --basis plain", "--basis, --allocate, --mlp and --score are for --shape free"),
    ("--remove 0.2 --shape widths --mlp components", "--mlp and --score are for --shape free"),
    (f"--remove 0.85 --shape llama {QUICK} --eval none", "cannot remove 753,413 parameters: 442,368 at most, by MLPs of 64 channels"),
    (f"--remove 0.8 --shape widths {QUICK} --eval none", "cannot remove 709,094 parameters")])
def test_mistakes_are_one_line(words, message, nowhere, monkeypatch, capsys):
    assert message in error_of(main, words, monkeypatch, capsys)
    assert not list(nowhere.iterdir())
