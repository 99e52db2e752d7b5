"""The lesson: which blocks go, found again by hand, by brute force and with blocks that do nothing."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import random_model, random_tokens
from evaluate import perplexity
from extras.baselines import block_params, removal
from model import MATRICES, LowRankLinear


def silence(block):
    """A block that adds nothing is the identity."""
    block.attention.wo.weight.zero_()
    block.feed_forward.w2.weight.zero_()


def own_text(model, T):
    """T tokens, each the one that the model expects most after those before: what it says with little loss."""
    tokens = torch.tensor([[1]])
    while tokens.shape[1] < T:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def slimmed(model):
    """The blocks that hold low-rank factors."""
    return [block for block in model.layers if any(isinstance(m, LowRankLinear) for m in block.modules())]


def perplexity_without(model, blocks, tokens):
    """Of the model without these blocks, computed from the tokens on."""
    layers = model.layers
    model.layers = nn.ModuleList(block for block in layers if block not in blocks)
    result = perplexity(model, [tokens])
    model.layers = layers
    return result


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_block_that_does_nothing_goes_first_and_is_not_missed(method, layer):
    model = random_model()
    silence(model.layers[layer])
    model.output.weight.mul_(10)  # so that the model is sure of what it says, and every other block is missed
    tokens, idle = own_text(model, 12), model.layers[layer]
    before, logits = model.n_params, model(tokens)
    small = method(model, lambda label: [tokens], block_params(model))
    assert idle not in small.layers and len(small.layers) == small.args.n_layers == 3
    assert small.n_params == before - sum(p.numel() for p in idle.parameters()) and not slimmed(small)
    torch.testing.assert_close(small(tokens), logits)


def test_shortgpt_takes_the_blocks_by_their_cosine_in_the_dense_model():
    model = random_model(n_layers=6)
    for block, scale in zip(model.layers, (1.0, 0.1, 0.7, 0.3, 0.05, 0.5)):  # what a block adds turns the stream
        block.attention.wo.weight.mul_(scale)
        block.feed_forward.w2.weight.mul_(scale)
    tokens, blocks = random_tokens(model, 3, 12), [*model.layers]
    h = [*model.residual_stream(tokens)]
    influence = [1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean() for x, y in zip(h, h[1:])]
    order = sorted(range(6), key=influence.__getitem__)
    small = removal.shortgpt(model, lambda label: [tokens[:1], tokens[1:]], block_params(model) * 5 // 2)
    assert [*small.layers] == [block for layer, block in enumerate(blocks) if layer not in order[:2]]
    assert slimmed(small) == [blocks[order[2]]]


@pytest.mark.parametrize("seed", range(4))
def test_sleb_is_brute_force_over_all_candidates(seed):
    model = random_model(n_layers=6, seed=seed)
    tokens = random_tokens(model, 4, 12, seed)
    gone = []
    for _ in range(3):
        gone.append(min((block for block in model.layers if block not in gone),
                        key=lambda block: perplexity_without(model, [*gone, block], tokens)))
    left = [block for block in model.layers if block not in gone[:2]]
    small = removal.sleb(model, lambda label: tokens.split(3), block_params(model) * 5 // 2)
    assert [*small.layers] == left and slimmed(small) == [gone[2]]


def test_sleb_walks_every_prefix_once():
    """n candidates cost n (n - 1) blocks from scratch; with shared prefixes n - 1 and the n (n - 1) / 2 behind them."""
    model, calls = random_model(n_layers=6), []
    for block in model.layers:
        block.register_forward_hook(lambda *_: calls.append(1))
    removal.least_missed(model, [random_tokens(model, 1, 5)])
    assert len(calls) == 5 + 6 * 5 / 2


def test_only_so_many_sequences_are_used():
    assert [len(t) for t in removal.first_sequences(torch.arange(30).view(10, 3).split(4), 6)] == [4, 2]
    assert [len(t) for t in removal.first_sequences(torch.arange(30).view(10, 3).split(4), 8)] == [4, 4]
    assert [len(t) for t in removal.first_sequences(torch.arange(30).view(10, 3).split(4), 99)] == [4, 4, 2]

    def sweep(label):
        yield random_tokens(model, 3, 8)
        pytest.fail("a batch too many")

    for method in (removal.sleb, removal.laco):
        model = random_model()
        method(model, sweep, block_params(model), samples=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_laco_adds_the_differences_of_the_following_blocks(dtype):
    model = random_model(dtype, n_layers=5)
    before, blocks = copy.deepcopy(model.state_dict()), [*model.layers]
    theta = [{name: blocks[layer].get_submodule(name).weight.double() for name in MATRICES} for layer in range(5)]
    new = removal.collapse(model, ((3, 1), (1, 2)))  # 4 into 3, and then 2 and what 3 has become into 1
    assert new[0] is blocks[0] and len(new) == 2
    for name in MATRICES:
        by_hand = theta[1][name] + (theta[2][name] - theta[1][name]) + (theta[4][name] - theta[1][name])
        torch.testing.assert_close(new[1].get_submodule(name).weight, by_hand.to(dtype))
    for norm in ("attention_norm.weight", "ffn_norm.weight"):
        assert torch.equal(new[1].get_parameter(norm), blocks[1].get_parameter(norm))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_laco_walks_down_as_its_algorithm_says():
    """10 blocks, C = 3, L = 1, H = 9, I = 2: one down after a merge that is not kept, two after one that is."""
    scores = {((6, 2),): 0.4, ((5, 2),): 0.8, ((5, 2), (3, 2)): 0.8, ((5, 2), (3, 2), (1, 2)): 0.2}
    tried = []

    def similarity(merges):
        tried.append(merges)
        return scores[merges]

    assert removal.kept_merges(similarity, 0.5, 9, 10, 3, 1, 9, 2) == ((5, 2), (3, 2)) and tried == [*scores]
    scores[(5, 2), (3, 1)] = 0.9  # three blocks are to go: the second merge takes one, and that is all
    assert removal.kept_merges(similarity, 0.5, 3, 10, 3, 1, 9, 2) == ((5, 2), (3, 1))
    scores = {((8, 1),): 0.1, ((7, 2),): 0.9, ((7, 2), (6, 1)): 0.9}  # H = 11: no more is merged than there is
    assert removal.kept_merges(similarity, 0.5, 3, 10, 3, 6, 11, 1) == ((7, 2), (6, 1))


def test_laco_compares_whole_sequences_after_the_final_norm():
    model = random_model(n_layers=5)
    tokens, blocks = random_tokens(model, 3, 7), removal.collapse(model, ((2, 2),))
    streams = [[*model.residual_stream(part)] for part in tokens.split(2)]
    found = removal.last_state_cosine(model, blocks, 2, streams)
    dense = model.norm(model.final_state(tokens)).flatten(1)
    model.layers = nn.ModuleList(blocks)
    ours = model.norm(model.final_state(tokens)).flatten(1)
    assert found == pytest.approx(F.cosine_similarity(ours, dense).mean().item(), abs=1e-12)


def test_laco_takes_the_highest_threshold_of_its_steps_that_will_do():
    """Blocks 4 and 5 do nothing, nor does their merge: any T keeps it. Of the pairs below, which T allows one more?"""
    model = random_model(n_layers=6)
    silence(model.layers[4]), silence(model.layers[5])
    tokens = random_tokens(model, 2, 9)
    logits, streams = model(tokens), [[*model.residual_stream(tokens)]]
    scores = {l: removal.last_state_cosine(model, removal.collapse(model, ((4, 1), (l, 1))), l, streams)
              for l in (2, 1)}  # two down from 4, then one by one
    T = next(step / 20 for step in range(19, -21, -1) if max(scores.values()) > step / 20)
    wanted = removal.collapse(model, ((4, 1), (next(l for l in scores if scores[l] > T), 1)))
    one = removal.laco(copy.deepcopy(model), lambda label: [tokens], block_params(model), interval=2)
    assert len(one.layers) == 5
    torch.testing.assert_close(one(tokens), logits)
    two = removal.laco(model, lambda label: [tokens], 2 * block_params(model), interval=2)
    for block, other in zip(two.layers, wanted, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb, removal.laco])
@pytest.mark.parametrize("blocks, more", [(0.6, 0), (2.4, 0), (4, 0), (2, -1), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_is_met(method, blocks, more, dtype):
    model = random_model(dtype, tied=True, dim=96, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=160, n_layers=8)
    tokens, before, budget = random_tokens(model, 2, 16), model.n_params, int(blocks * block_params(model)) + more
    small = method(model, lambda label: [tokens], budget)
    assert abs(before - small.n_params - budget) <= 0.005 * budget
    assert len(small.layers) == small.args.n_layers == 8 - int(blocks) and len(slimmed(small)) == (blocks % 1 > 0)
    assert not any(p.requires_grad or p.dtype != dtype for p in small.parameters())
    assert small(tokens).isfinite().all()


def test_laco_slims_the_most_redundant_block_that_is_left():
    model = random_model(n_layers=6)
    silence(model.layers[0])  # l = 1 is the last that LaCo tries
    idle, tokens = model.layers[0], random_tokens(model, 2, 9)
    assert slimmed(removal.laco(model, lambda label: [tokens], block_params(model) * 3 // 2)) == [idle]


def test_laco_begins_within_the_model():
    model = random_model()
    tokens, other = random_tokens(model, 2, 9), copy.deepcopy(model)
    small = removal.laco(model, lambda label: [tokens], 2 * block_params(model), highest=99)
    other = removal.laco(other, lambda label: [tokens], 2 * block_params(other))
    assert torch.equal(small(tokens), other(tokens))


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb, removal.laco])
def test_one_block_has_to_stay(method):
    model = random_model()
    with pytest.raises(ValueError, match="cannot remove .*: expected 0 to 3 blocks of .* to go, got 4"):
        method(model, None, 4 * block_params(model))


def test_laco_says_what_its_options_can_merge():
    model = random_model()
    tokens = random_tokens(model, 1, 5)
    with pytest.raises(ValueError, match="of their 3 blocks, merges of 2 from block 2 down to 1 take out 2"):
        removal.laco(model, lambda label: [tokens], 3 * block_params(model))
