"""The lesson: each pair of matrices loses inner dimensions where that changes its output least, and nothing else."""
import pytest
import torch

from tests.conftest import random_model, random_tokens
from extras.baselines import modegpt as here
from extras.baselines.modegpt import (RIDGE, leverage, low_rank_values, modegpt, narrow_attention, sizes_for,
                                      strongest_pairs)
from model import apply_rotary, rotary_frequencies


def sweep_of(tokens):
    return lambda label: tokens.split(3)  # two batches, not of one size


def moment(n, tokens=200, seed=5):
    X = torch.randn(tokens, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, n + 1)
    return X, X.mT @ X


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_with_everything_kept_attention_is_the_dense_one(n_kv_heads):
    model = random_model(n_kv_heads=n_kv_heads)
    tokens, args = random_tokens(model, 2, 12), model.args
    dense = model(tokens)
    for block in model.layers:
        block.attention = narrow_attention(block.attention, moment(16)[1], 2, 4, args)
    torch.testing.assert_close(model(tokens), dense, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_narrow_attention_is_the_dense_one_with_zeros_for_what_went(n_kv_heads):
    """Pairs that are not kept are zero rows of wq and wk; values are projected by U U^T, folded into wo here."""
    model = random_model(n_kv_heads=n_kv_heads, head_dim=8)
    args, attention, C = model.args, model.layers[0].attention, moment(16)[1]
    narrow = narrow_attention(attention, C, 3, 5, args)
    kept = strongest_pairs(attention.wq.weight, attention.wk.weight, C, 3, args)
    values, outputs = low_rank_values(attention.wv.weight, attention.wo.weight, C, 5, args)
    mask = torch.zeros(n_kv_heads, 4).scatter(1, kept, 1).repeat_interleave(2, 1).flatten()
    attention.wk.weight.mul_(mask[:, None])
    group = 4 // n_kv_heads
    for head in range(4):
        kv = head // group
        product = outputs[:, 5 * head:5 * head + 5] @ values[5 * kv:5 * kv + 5]
        w = attention.wv.weight[8 * kv:8 * kv + 8]  # solve wo_new w = product: exact, as product's rows are in w's
        attention.wo.weight[:, 8 * head:8 * head + 8] = product @ torch.linalg.pinv(w)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    rotary = rotary_frequencies(args, 12, x.device)
    torch.testing.assert_close(narrow(x, *rotary), attention(x, *rotary), atol=1e-10, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_pairs_are_ranked_by_the_norms_that_they_have_after_the_rotary_embedding(n_kv_heads):
    model = random_model(n_kv_heads=n_kv_heads, head_dim=8)
    args, attention, (X, C) = model.args, model.layers[0].attention, moment(16)
    rotary = rotary_frequencies(args, len(X), X.device)
    q, k = (apply_rotary(w(X).view(1, len(X), -1, 8), *rotary)[0] for w in (attention.wq, attention.wk))
    squares = [t.view(len(X), n_kv_heads, -1, 4, 2).square().sum((0, 2, 4)) for t in (q, k)]
    expected = (squares[0].sqrt() * squares[1].sqrt()).topk(2).indices.sort().values
    assert strongest_pairs(attention.wq.weight, attention.wk.weight, C, 2, args).tolist() == expected.tolist()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_values_and_outputs_are_the_best_of_their_rank(n_kv_heads):
    """Eckart and Young: the error of a head's product on its inputs is the sum of the dropped sigma^2."""
    model, k, (X, C) = random_model(n_kv_heads=n_kv_heads), 3, moment(16)
    wv, wo = model.layers[0].attention.wv.weight, model.layers[0].attention.wo.weight
    values, outputs = low_rank_values(wv, wo, C, k, model.args)
    group, error, dropped = 4 // n_kv_heads, 0, 0
    for kv in range(n_kv_heads):
        heads = range(kv * group, (kv + 1) * group)
        dense = torch.cat([wo[:, 4 * h:4 * h + 4] @ wv[4 * kv:4 * kv + 4] for h in heads])
        ours = torch.cat([outputs[:, k * h:k * h + k] @ values[k * kv:k * kv + k] for h in heads])
        error += ((dense - ours) @ X.mT).square().sum()
        dropped += torch.linalg.svdvals(dense @ X.mT)[k:].square().sum()
    assert error == pytest.approx(dropped.item(), rel=1e-9)


def test_leverage_is_the_papers_formula_and_spares_what_others_can_stand_in_for():
    X, _ = moment(5)
    X[:, 1] = X[:, 3] + 1e-3 * X[:, 0]
    C = X.mT @ X
    ridge = RIDGE * C.diagonal().mean()
    expected = (C @ torch.linalg.inv(C + ridge * torch.eye(5, dtype=C.dtype))).diagonal()
    torch.testing.assert_close(leverage(C), expected, atol=1e-12, rtol=0)
    assert {*leverage(C).argsort()[:2].tolist()} <= {0, 1, 3}  # the smallest, or one of the twins


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_budget_is_met_and_layers_that_do_little_lose_more(share):
    model = random_model(dim=128, n_layers=8, n_heads=8, head_dim=16, hidden_dim=256, vocab_size=100)
    tokens, dense = random_tokens(model, 5, 12), model.n_params
    budget = int(share * sum(p.numel() for p in model.layers.parameters()))
    assert modegpt(model, sweep_of(tokens), budget) is model
    assert budget <= dense - model.n_params <= 1.005 * budget
    assert not any(p.requires_grad for p in model.parameters())
    assert model(tokens).isfinite().all()


def test_sparsity_follows_the_softmax_of_block_influence():
    model = random_model(dim=128, n_layers=3, n_heads=8, head_dim=64, hidden_dim=2048)
    shares = torch.softmax(-torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64) / 0.1, 0)
    sizes = sizes_for(model, shares, 300_000)
    lost = torch.tensor([[1 - size / whole for size, whole in zip(layer, (32, 64, 2048))] for layer in sizes])
    ratio = (lost / shares[:, None] / lost[0, 2] * shares[0]).flatten()
    assert (ratio[2::3] - 1).abs().max() < 0.02  # channels, the finest of the three
    assert sizes == sorted(sizes)


def test_moments_are_those_of_the_dense_model(monkeypatch):
    model = random_model()
    tokens, seen = random_tokens(model, 5, 12), []
    monkeypatch.setattr(here, "keep_channels", lambda model, name, kept, C: seen.append((name, C)))
    modegpt(model, sweep_of(tokens), 500)
    dense, inputs = random_model(), []
    dense.layers[3].feed_forward.w2.register_forward_pre_hook(lambda module, x: inputs.append(x[0].flatten(0, 1)))
    dense(tokens)
    assert seen[3][0] == "layers.3.feed_forward"
    torch.testing.assert_close(seen[3][1], inputs[0].mT @ inputs[0], atol=1e-9, rtol=1e-9)


def test_a_budget_out_of_reach_says_what_can_be_removed():
    model = random_model()
    dense = model.n_params
    with pytest.raises(ValueError, match=f"cannot remove {dense:,} parameters: ") as error:
        modegpt(model, sweep_of(random_tokens(model, 5, 12)), dense)
    possible = int(str(error.value).split()[-3].replace(",", ""))
    modegpt(model, sweep_of(random_tokens(model, 5, 12)), possible)
    assert dense - model.n_params == possible


def test_the_model_stays_in_its_dtype():
    model = random_model(torch.bfloat16)
    modegpt(model, sweep_of(random_tokens(model, 5, 12)), 500)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
