"""The lesson: with channels of MLPs alone a model keeps a shape that other tools load, up to a plain, smaller LLaMA."""
import itertools
import json

import pytest
import torch

from tests.conftest import error_of, output_of, random_model, random_tokens
from data.tokenizer import load_tokenizer
from extras.baselines import damped
from extras.export import export
from extras.fisher import shapes
from extras.fisher.__main__ import main
from extras.fisher.moments import second_moments
from extras.fisher.prices import channel_costs
from extras.fisher.shapes import cheapest_shapes, llama, output_cost, widths
from model import load_checkpoint, save_checkpoint
from runtime.cli import TINY
from tests.extras.test_fisher import cost_of, sweep_of

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
    kept, lost = llama(model, sweep_of(model), 1000, [random_tokens(model, 2, 9)], multiple=4)
    assert {*channels_of(model)} == {model.args.hidden_dim} and model.args.hidden_dim % 4 == 0
    assert before - model.n_params >= 1000 and model.n_params == model.n_params_dense
    assert {len(channels) for channels in kept.values()} == {model.args.hidden_dim}
    assert len(kept) + len(lost) == 4 and len(kept) == len(model.layers) == model.args.n_layers
    save_checkpoint(model, tmp_path / "small")
    assert json.loads((tmp_path / "small/params.json").read_text())["ranks"] == {}
    again, tokens = load_checkpoint(tmp_path / "small"), random_tokens(model, 2, 9)
    assert torch.equal(again(tokens), model(tokens))
    export(again, load_tokenizer(TINY), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.config.intermediate_size == model.args.hidden_dim
    assert torch.allclose(theirs(tokens).logits, model(tokens), rtol=0, atol=5e-5)


def test_a_layer_that_does_nothing_goes_whole(monkeypatch):
    monkeypatch.setattr(shapes, "TRIED", 1)  # the text is random, the price is not
    model = random_model()
    for matrix in (model.layers[2].attention.wo, model.layers[2].feed_forward.w2):
        matrix.weight.data.zero_()
    tokens = random_tokens(model, 2, 9)
    logits, budget = model(tokens), sum(p.numel() for p in model.layers[2].parameters())
    kept, lost = llama(model, sweep_of(model), budget, [tokens], multiple=8)
    assert lost == [2] and {*kept} == {f"layers.{i}.feed_forward" for i in (0, 1, 3)}
    assert model.args.hidden_dim == 24 and torch.allclose(model(tokens), logits, atol=1e-9)


def test_perplexity_decides_between_the_cheapest(monkeypatch):
    """Prices are estimates: of the shapes that they like best the one with the least loss stays, built on its own."""
    for best in range(3):
        model, losses = random_model(), iter([[1.0, 2.0, 2.0], [2.0, 1.0, 2.0], [2.0, 2.0, 1.0]][best])
        tried = []
        monkeypatch.setattr(shapes, "perplexity", lambda small, text: tried.append(small.args) or next(losses))
        kept, lost = llama(model, sweep_of(model), 3000, [], multiple=2)
        assert len(tried) == 3 and model.args == tried[best] and model.args.n_layers == 4 - len(lost)
        for (name, channels), block in zip(kept.items(), model.layers, strict=True):
            assert torch.equal(block.feed_forward.w1.weight, random_model().get_submodule(name).w1.weight[channels])


@pytest.mark.parametrize("budget", [1, 1000, 2500, 4000])
def test_the_cheapest_shape_of_all(budget):
    """Against every set of layers and every width."""
    model, multiple = random_model(), 4
    generator = torch.Generator().manual_seed(budget)
    costs = torch.rand(4, 24, generator=generator, dtype=torch.float64)
    whole = 12 * torch.rand(4, generator=generator, dtype=torch.float64)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    found = {}
    for count in range(4):
        for lost in itertools.combinations(range(4), count):
            stay = [i for i in range(4) if i not in lost]
            for width in range(multiple, 25, multiple):
                if count * layer + len(stay) * CHANNEL * (24 - width) >= budget:
                    price = whole[[*lost]].sum() + costs[stay].sort(1).values[:, :24 - width].sum()
                    found[width, lost] = price.item()
    width, lost = cheapest_shapes(costs, whole, model, budget, multiple)[0]
    assert found[width, tuple(lost)] == pytest.approx(min(found.values()))


def test_what_the_output_of_a_matrix_costs():
    model = random_model()
    name = "layers.1.attention.wo"
    moments = second_moments(model, [name], sweep_of(model)("moments"))
    W, (C, H) = model.get_submodule(name).weight, moments[name]
    assert output_cost(model, name, moments).item() == pytest.approx(cost_of(W, C, H))
    assert output_cost(model, name, moments) < cost_of(W, damped(C), damped(H))


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
    assert ("on other windows of the calibration text" in said) == ("lost" in report) == (shape == "llama")


@pytest.mark.parametrize("words, message", [
    ("--budget 0.2 --remove 0.2", "not allowed with argument"),
    ("--remove 0.95", "--remove 0.95: 842,050 parameters of the 787,968 in the blocks, expected at least 1 and not all"),
    ("--remove 0.2 --multiple 64", "--multiple is for --shape widths or llama"),
    ("--remove 0.2 --shape llama --layers 2", "--layers and --layer-ids are for other shapes"),
    ("--remove 0.2 --shape widths --basis plain", "--basis, --allocate, --mlp and --score are for --shape free"),
    ("--remove 0.2 --shape widths --mlp components", "--mlp and --score are for --shape free"),
    (f"--remove 0.85 --shape llama {QUICK} --eval none", "cannot remove 753,413 parameters with MLPs"),
    (f"--remove 0.8 --shape widths {QUICK} --eval none", "cannot remove 709,094 parameters")])
def test_mistakes_are_one_line(words, message, nowhere, monkeypatch, capsys):
    assert message in error_of(main, words, monkeypatch, capsys)
    assert not list(nowhere.iterdir())
