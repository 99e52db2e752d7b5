"""The lesson: what goes together can be taken out together, and a first-order score says which to take.

A channel of the MLP is a row of w1, a row of w3 and a column of w2; a key/value head is its rows of wk and wv, and its
query heads' rows of wq and columns of wo. Setting a weight to zero changes the loss by w dL/dw, to first order.
"""
import pytest
import torch

from tests.conftest import random_model, random_tokens
from evaluate import perplexity
from extras.baselines.pruner import group_counts, llm_pruner, pruned_blocks
from model import MATRICES

HEAD, CHANNEL = 384, 48  # of random_model: 4 of wk's and wv's 8 rows, 8 of wq's 16 and of wo's columns; 3 * dim


@pytest.fixture
def tokens():
    return random_tokens(random_model(), 3, 12)


def pruned(model, tokens, budget):
    return llm_pruner(model, lambda label: tokens.split(2), budget)


def shapes(model, layer):
    return [tuple(model.get_submodule(f"layers.{layer}.{matrix}").weight.shape) for matrix in MATRICES]


def test_the_first_blocks_and_the_last_are_left_alone():
    assert pruned_blocks(32) == range(4, 30)  # LLaMA-7B
    assert pruned_blocks(30) == range(4, 28) and pruned_blocks(8) == range(1, 7) and pruned_blocks(4) == range(1, 3)


def test_dead_channels_go_first_and_take_nothing_with_them(tokens):
    """A column of zeros in w2 makes a channel idle: dL/dw is zero for its rows of w1 and w3, and w for the column."""
    model = random_model()
    for layer, dead in ((1, [2, 5]), (2, [7, 23])):
        model.layers[layer].feed_forward.w2.weight[:, dead] = 0
    dense = model(tokens)
    small = pruned(model, tokens, 4 * CHANNEL)
    assert shapes(small, 1) == shapes(small, 2) == [(16, 16), (8, 16), (8, 16), (16, 16), (22, 16), (16, 22), (22, 16)]
    torch.testing.assert_close(small(tokens), dense, rtol=0, atol=1e-12)


def test_a_dead_head_goes_first_with_its_queries(tokens):
    """Key/value head 0 serves query heads 0 and 1, the columns 0 to 7 of wo; head 1 the columns 8 to 15."""
    model = random_model()
    for layer, columns in ((1, slice(8, 16)), (2, slice(0, 8))):
        model.layers[layer].attention.wo.weight[:, columns] = 0
        model.layers[layer].feed_forward.w2.weight[:, 5:15] = 0  # ten channels, which the budget takes besides
    dense = model(tokens)
    small = pruned(model, tokens, 2 * (HEAD + 10 * CHANNEL))
    assert shapes(small, 1) == shapes(small, 2) == [(8, 16), (4, 16), (4, 16), (16, 8), (14, 16), (16, 14), (14, 16)]
    assert shapes(small, 0) == shapes(small, 3) == shapes(random_model(), 0)
    torch.testing.assert_close(small(tokens), dense, rtol=0, atol=1e-12)


def test_the_groups_of_lowest_score_go(tokens):
    """sum |w dL/dw| by loops over the single weights, with autograd's gradients of a loss written out here."""
    model = random_model()
    block = model.layers[2].requires_grad_()
    log_p = torch.log_softmax(model(tokens), dim=-1)
    B, T = tokens.shape
    (-sum(log_p[b, t, tokens[b, t + 1]] for b in range(B) for t in range(T - 1)) / (B * (T - 1))).backward()
    a, f = block.attention, block.feed_forward

    def score(*cuts):
        cells = [(m.weight, i, j) for m, rows, columns in cuts for i in rows for j in columns]
        return sum(abs(w[i, j] * w.grad[i, j]).item() for w, i, j in cells)

    every, twice, once = range(16), (range(0, 8), range(8, 16)), (range(0, 4), range(4, 8))  # lines of q, of k and v
    heads = [score((a.wq, twice[g], every), (a.wk, once[g], every), (a.wv, once[g], every), (a.wo, every, twice[g]))
             for g in range(2)]
    channels = torch.tensor([score((f.w1, [c], every), (f.w3, [c], every), (f.w2, every, [c])) for c in range(24)])
    head, kept = heads.index(max(heads)), channels.argsort()[10:].sort().values
    expected = {"wq": a.wq.weight[8 * head:8 * head + 8], "wk": a.wk.weight[4 * head:4 * head + 4],
                "wv": a.wv.weight[4 * head:4 * head + 4], "wo": a.wo.weight[:, 8 * head:8 * head + 8],
                "w1": f.w1.weight[kept], "w3": f.w3.weight[kept], "w2": f.w2.weight[:, kept]}
    small = pruned(random_model(), tokens, 2 * (HEAD + 10 * CHANNEL)).layers[2]
    for matrix, W in expected.items():
        half = small.feed_forward if matrix in ("w1", "w2", "w3") else small.attention
        assert torch.equal(getattr(half, matrix).weight, W), matrix


def test_channels_absorb_what_heads_leave():
    """The budget is 0.45 of three blocks' 5,760 weights: 0.9 of two heads each, so one head, and the rest channels."""
    model = random_model(n_layers=5)
    budget = 2592
    heads, channels = group_counts(model, budget, 3)
    assert heads == 1 and channels == [10, 10, 10]  # 3 * 384 + 30 * 48 = 2,592
    assert group_counts(model, budget + 1, 3) == (1, [11, 10, 10])
    assert group_counts(model, 3 * HEAD // 2, 3)[0] == 0  # 0.2 of a head is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv_heads", [1, 3, 9])
def test_budget_is_met_within_a_channel(dtype, n_kv_heads):
    """Nine query heads, over one (which stays), over three as in SmolLM2, or each with its own."""
    model = random_model(dtype, tied=True, dim=72, n_layers=6, n_heads=9, n_kv_heads=n_kv_heads, head_dim=8,
                         hidden_dim=192)
    tokens, before, dense = random_tokens(model, 2, 8), model.n_params, shapes(model, 1)
    budget = int(0.3 * before)
    small = pruned(model, tokens, budget)
    assert budget <= before - small.n_params < budget + 3 * 72 <= 1.005 * budget
    assert shapes(small, 1)[4] != dense[4] and (shapes(small, 1)[0] != dense[0]) == (n_kv_heads > 1)
    assert {p.dtype for p in small.parameters()} == {dtype} and not any(p.requires_grad for p in small.parameters())
    assert 1 < perplexity(small, [tokens]) < float("inf")


def test_a_budget_too_large_is_said(tokens):
    most = 2 * (HEAD + 23 * CHANNEL)
    small = pruned(random_model(), tokens, most)
    assert random_model().n_params - small.n_params == most and shapes(small, 1)[4] == (1, 16)
    with pytest.raises(ValueError, match="cannot remove 2,977 parameters: LLM-Pruner takes 2,976 at most"):
        pruned(random_model(), tokens, most + 1)
    with pytest.raises(ValueError, match="takes 0 at most from 0 blocks"):
        pruned(random_model(n_layers=2), tokens, CHANNEL)
