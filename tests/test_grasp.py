"""The lesson: Algorithm 1 is its parts in order, and nothing else happens on the way."""
import pytest
import torch

import grasp
from attribution import importance, low_rank_factors, rank_for_ratio, sigma_gradients, svd, top_k, weight_gradients
from conftest import random_model, random_tokens
from grasp import compress, find_redundant
from model import MATRICES, LowRankLinear


def setup(**changes):
    model = random_model(dim=32, head_dim=8, hidden_dim=56, **changes)
    tokens = random_tokens(model, 4, 12)
    return model, tokens, lambda label: tokens.split(2)


def silent(line):
    pass


def test_one_shot_is_every_part_in_order():
    """All gradients from the dense model; each matrix replaced by the kept part of its own SVD."""
    model, tokens, sweep = setup()
    dense, _, _ = setup()
    records = compress(model, [1, 2], sweep, ratio=0.4, log=silent)
    names = [f"layers.{layer}.{matrix}" for layer in (1, 2) for matrix in MATRICES]
    assert [r["name"] for r in records] == names
    G = weight_gradients(dense, names, [tokens])
    for record in records:
        W = dense.get_submodule(record["name"]).weight
        U, S, Vh = svd(W)
        k = rank_for_ratio(*W.shape, 0.4)
        kept = top_k(importance(S, sigma_gradients(U, G[record["name"]], Vh)), k)
        A, B = low_rank_factors(U, S, Vh, kept)
        module = model.get_submodule(record["name"])
        assert record["kept"] == kept.tolist() and record["rank"] == k and record["shape"] == list(W.shape)
        assert torch.allclose(module.A @ module.B, A @ B, rtol=0, atol=1e-10)
    for name, p in dense.named_parameters():  # all else is untouched
        if not name.startswith(("layers.1.a", "layers.1.feed", "layers.2.a", "layers.2.feed")):
            assert torch.equal(model.get_parameter(name), p)
    assert model.n_params_dense == dense.n_params


def test_iterative_goes_deepest_first_with_fresh_gradients(monkeypatch):
    model, tokens, sweep = setup()
    calls = []

    def spy(model, names, batches):
        calls.append((names, sum(isinstance(m, LowRankLinear) for m in model.modules())))
        return weight_gradients(model, names, batches)

    monkeypatch.setattr(grasp, "weight_gradients", spy)
    compress(model, [0, 2], sweep, ratio=0.4, iterative=True, log=silent)
    attention, mlp = MATRICES[:4], MATRICES[4:]
    expected = [(2, mlp, 0), (2, attention, 3), (0, mlp, 7), (0, attention, 10)]
    assert calls == [([f"layers.{layer}.{m}" for m in half], done) for layer, half, done in expected]


def test_magnitude_takes_no_gradients_and_keeps_the_largest(monkeypatch):
    model, _, _ = setup()
    records = compress(model, [3], None, ratio=0.4, score="magnitude", log=silent)  # no sweep to call
    assert all(r["kept"] == list(range(r["rank"])) for r in records)


def test_threshold_adapts_the_rank():
    model, _, sweep = setup()
    records = compress(model, [0, 1, 2, 3], sweep, threshold=0.3, log=silent)
    ranks = [r["rank"] for r in records]
    assert len(set(ranks)) > 2
    for r in (r for r in records if r["rank"]):
        m, n = r["shape"]
        assert r["rank"] * (m + n) < m * n


def test_a_matrix_whose_factors_are_no_smaller_stays():
    model, _, sweep = setup()
    before = model.n_params
    records = compress(model, [1], sweep, ratio=1.0, log=silent)
    square = next(r for r in records if r["name"].endswith("wq"))  # 32 x 32: 16 (32 + 32) = 32 * 32
    assert square["rank"] is None and isinstance(model.layers[1].attention.wq, torch.nn.Linear)
    assert model.n_params < before


def test_what_is_already_low_rank_is_left_alone():
    model, _, sweep = setup()
    compress(model, [1], sweep, ratio=0.4, log=silent)
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith("layers.1.")}
    lines = []
    assert compress(model, [1], sweep, ratio=0.2, log=lines.append) == []
    assert len(lines) == 7 and all("low-rank already" in line for line in lines)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_redundant_layers_alone_or_in_a_row():
    model, tokens, sweep = setup(n_layers=6)
    for layer in (1, 4):
        for w in (model.layers[layer].attention.wo, model.layers[layer].feed_forward.w2):
            w.weight.data *= 1e-3
    model.layers[5].feed_forward.w2.weight.data *= 0.1
    model.layers[5].attention.wo.weight.data *= 0.1
    cosines, redundant = find_redundant(model, sweep, 2)
    assert redundant == [1, 4] and cosines.shape == (6,) and cosines[1] > 0.999
    assert find_redundant(model, sweep, 2, contiguous=True)[1] == [4, 5]


@pytest.mark.parametrize("score", ["taylor", "gradient"])
def test_half_precision_weights_keep_their_dtype(score):
    model, tokens, sweep = setup(dtype=torch.bfloat16)
    compress(model, [2], sweep, ratio=0.4, score=score, log=silent)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens).isfinite().all()
