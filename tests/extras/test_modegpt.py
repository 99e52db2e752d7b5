"""The lesson: each pair of matrices loses inner dimensions where that changes its output least, and nothing else."""
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_model, random_tokens
from extras.baselines import modegpt as here
from extras.baselines.modegpt import low_rank_values, modegpt, narrow_attention, sizes_for, strongest_pairs
from model import apply_rotary, rotations


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
    rotary = rotations(args, 12, x.device)
    torch.testing.assert_close(narrow(x, rotary), attention(x, rotary), atol=1e-10, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_pairs_are_ranked_by_the_norms_that_they_have_after_the_rotary_embedding(n_kv_heads):
    model = random_model(n_kv_heads=n_kv_heads, head_dim=8)
    args, attention, (X, C) = model.args, model.layers[0].attention, moment(16)
    rotary = rotations(args, len(X), X.device)
    q, k = (apply_rotary(w(X).view(1, len(X), -1, 8), rotary)[0] for w in (attention.wq, attention.wk))
    squares = [t.view(len(X), n_kv_heads, -1, 4, 2).square().sum((0, 2, 4)) for t in (q, k)]
    expected = (squares[0].sqrt() * squares[1].sqrt()).topk(2).indices.sort().values
    found = strongest_pairs(attention.wq.weight, attention.wk.weight, C, 2, args).sort().values
    assert found.tolist() == expected.tolist()


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


def by_hand(model, tokens):
    """The dense model's Block Influence (n_layers,), and of each block X (tokens, n) at wq and at w2."""
    states, inputs = [*model.residual_stream(tokens)], {}
    influence = [1 - F.cosine_similarity(h, after, dim=-1).mean() for h, after in pairwise(states)]
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, x, name=name: inputs.update({name: x[0].flatten(0, -2)}))
        for layer in range(len(model.layers)) for name in (f"layers.{layer}.attention.wq", f"layers.{layer}.feed_forward.w2")]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(influence), inputs


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_the_whole_is_the_papers_formulas_on_the_dense_models_inputs(epsilon, monkeypatch):
    model = random_model(dim=32, head_dim=8, hidden_dim=72)
    tokens, calls = random_tokens(model, 6, 24), []
    influence, X = by_hand(model, tokens)

    def spy(name, function):
        monkeypatch.setattr(here, name, lambda *args: calls.append((name, args)) or function(*args))

    for name in ("sizes_for", "narrow_attention", "keep_channels"):
        spy(name, getattr(here, name))
    w2 = [block.feed_forward.w2.weight for block in model.layers]
    modegpt(model, sweep_of(tokens), 9_000, epsilon)
    (_, (_, shares, budget)), *calls = calls
    torch.testing.assert_close(shares, torch.softmax(-influence / epsilon, 0), atol=1e-9, rtol=0)
    assert budget == 9_000 and len(calls) == 8
    for layer in range(4):
        (_, (_, C1, pairs, width, _)), (_, (_, name, kept, C2, _)) = calls[2 * layer:2 * layer + 2]
        assert name == f"layers.{layer}.feed_forward"
        for C, inputs in (C1, X[f"layers.{layer}.attention.wq"]), (C2, X[f"{name}.w2"]):
            torch.testing.assert_close(C, inputs.mT @ inputs, atol=1e-9, rtol=1e-9)
        ridge = 0.01 * C2.diagonal().mean() * torch.eye(72, dtype=C2.dtype)
        leverage = (C2 @ torch.linalg.inv(C2 + ridge)).diagonal()
        assert kept.tolist() == leverage.topk(len(kept)).indices.sort().values.tolist()
        block = model.layers[layer]
        assert block.attention.pairs.shape == (2, pairs) and block.attention.wv.weight.shape == (2 * width, 32)
        refit = torch.linalg.lstsq(torch.cat([X[f"{name}.w2"][:, kept], ridge[:len(kept), :len(kept)].sqrt()]),
                                   torch.cat([X[f"{name}.w2"] @ w2[layer].mT, ridge[kept][:, kept].sqrt() @ w2[layer].mT[kept]]))
        torch.testing.assert_close(block.feed_forward.w2.weight, refit.solution.mT, atol=1e-7, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_budget_is_met_to_a_channel_and_layers_that_do_little_lose_more(share):
    model = random_model(dim=128, n_layers=8, n_heads=8, head_dim=16, hidden_dim=256, vocab_size=100)
    tokens, dense = random_tokens(model, 5, 12), model.n_params
    influence = by_hand(model, tokens)[0]
    budget = int(share * sum(p.numel() for p in model.layers.parameters()))
    assert modegpt(model, sweep_of(tokens), budget) is model
    assert 0 <= dense - model.n_params - budget < 3 * 128
    left = [sum(p.numel() for p in block.parameters()) for block in model.layers]
    assert left[int(influence.argmin())] < left[int(influence.argmax())]
    assert not any(p.requires_grad for p in model.parameters())
    assert model(tokens).isfinite().all()


@pytest.mark.parametrize("budget", [300_000, 1_000_000])
def test_every_size_of_a_block_follows_its_share(budget):
    model = random_model(dim=128, n_layers=3, n_heads=8, head_dim=64, hidden_dim=2048)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    sizes = sizes_for(model, shares, budget)
    factor = (1 - sizes[0][2] / 2048) / 0.5
    for size, share in zip(sizes, shares.tolist()):
        for left, whole in zip(size, (32, 64, 2048)):
            assert abs(left - (1 - factor * share) * whole) < 0.51 + 4 * (whole == 2048)  # channels given back


def test_equal_shares_lose_equally():
    """All blocks step by a pair at once: what is too much goes back to all of them."""
    model = random_model(dim=128, n_layers=8, n_heads=8, head_dim=64, hidden_dim=2048)
    channels = [size[2] for size in sizes_for(model, torch.full((8,), 1 / 8, dtype=torch.float64), 600_000)]
    assert max(channels) - min(channels) <= 1


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
    assert model(random_tokens(model, 5, 12)).isfinite().all()


def test_dead_channels_and_inputs_with_a_large_mean_are_no_error():
    model = random_model(torch.float32, dim=128, hidden_dim=64)
    model.tok_embeddings.weight += 3
    model.layers[1].feed_forward.w3.weight.zero_()
    tokens = random_tokens(model, 4, 16)
    modegpt(model, sweep_of(tokens), 20_000)
    assert model(tokens).isfinite().all()
