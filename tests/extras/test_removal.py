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


def perplexity_without(model, blocks, tokens):
    """Of the model without these blocks, computed from the tokens on."""
    layers = model.layers
    model.layers = nn.ModuleList(block for block in layers if block not in blocks)
    result = perplexity(model, [tokens])
    model.layers = layers
    return result


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_block_that_does_nothing_goes_first_and_is_not_missed(method, layer):
    model = random_model()
    silence(model.layers[layer])
    model.output.weight.mul_(10)  # so that the model is sure of what it says, and every other block is missed
    tokens, idle = own_text(model, 12), model.layers[layer]
    before, logits = model.n_params, model(tokens)
    small = method(model, lambda label: [tokens], 1)
    assert idle not in small.layers and len(small.layers) == small.args.n_layers == 3
    assert small.n_params == before - sum(p.numel() for p in idle.parameters())
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
    small = removal.shortgpt(model, lambda label: [tokens[:1], tokens[1:]], 2)
    assert [*small.layers] == [block for layer, block in enumerate(blocks) if layer not in order[:2]]


@pytest.mark.parametrize("seed", range(4))
def test_sleb_is_brute_force_over_all_blocks_between_the_ends(seed, capsys):
    model = random_model(n_layers=6, seed=seed)
    tokens = random_tokens(model, 4, 12, seed)
    blocks, gone = [*model.layers], []
    for _ in range(3):
        gone.append(min((block for block in [*model.layers][1:-1] if block not in gone),
                        key=lambda block: perplexity_without(model, [*gone, block], tokens)))
    two, three = ([block for block in model.layers if block not in gone[:n]] for n in (2, 3))
    small = removal.sleb(model, lambda label: tokens.split(3), 2)
    assert [*small.layers] == two
    assert capsys.readouterr().out == "SLEB drops layers {} {} of 6\n".format(*sorted(map(blocks.index, gone[:2])))
    assert [*removal.sleb(small, lambda label: tokens.split(3), 1).layers] == three  # 2 and then 1 are 3


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_loss_that_is_no_number_is_not_the_lowest(layer):
    """Every model that holds this block has no finite loss: the block itself has to go."""
    model = random_model(n_layers=5)
    model.layers[layer].feed_forward.w2.weight.fill_(float("nan"))
    assert removal.least_missed(model, [random_tokens(model, 2, 8)]) == layer


def test_sleb_walks_every_prefix_once():
    """Of 6 blocks 4 are candidates: 4 * 5 block passes from scratch. Shared prefixes leave 4 and the 4 + 3 + 2 + 1 behind."""
    model, calls = random_model(n_layers=6), []
    for block in model.layers:
        block.register_forward_hook(lambda *_: calls.append(1))
    removal.least_missed(model, [random_tokens(model, 1, 5)])
    assert len(calls) == 4 + 4 + 3 + 2 + 1


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb, removal.laco])
def test_all_sequences_are_used(method):
    """Every method reads as much of the calibration set as the others: all of it."""
    model, read = random_model(), []

    def sweep(label):
        for tokens in random_tokens(model, 6, 8).split(2):
            read.append(len(tokens))
            yield tokens

    method(model, sweep, 1)
    assert read == [2, 2, 2]


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
    one = removal.laco(copy.deepcopy(model), lambda label: [tokens], 1, interval=2)
    assert len(one.layers) == 5
    torch.testing.assert_close(one(tokens), logits)
    two = removal.laco(model, lambda label: [tokens], 2, interval=2)
    for block, other in zip(two.layers, wanted, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", [removal.shortgpt, removal.sleb, removal.laco])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_n_whole_blocks_go_and_nothing_else(method, n, dtype):
    model = random_model(dtype, tied=True, dim=96, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=160, n_layers=8)
    tokens, before, size = random_tokens(model, 2, 16), model.n_params, block_params(model)
    small = method(model, lambda label: [tokens], n)
    assert before - small.n_params == n * size and len(small.layers) == small.args.n_layers == 8 - n
    assert not any(isinstance(m, LowRankLinear) for m in small.modules())
    assert not any(p.requires_grad or p.dtype != dtype for p in small.parameters())
    assert small(tokens).isfinite().all()


def test_laco_begins_within_the_model():
    model = random_model()
    tokens, other = random_tokens(model, 2, 9), copy.deepcopy(model)
    small = removal.laco(model, lambda label: [tokens], 2, highest=99)
    other = removal.laco(other, lambda label: [tokens], 2)
    assert torch.equal(small(tokens), other(tokens))


@pytest.mark.parametrize("method, most", [(removal.shortgpt, 3), (removal.sleb, 2), (removal.laco, 3)])
def test_some_blocks_have_to_stay(method, most):
    """One at least; SLEB leaves the first and the last one alone."""
    for n in (0, most + 1):
        with pytest.raises(ValueError, match=f"cannot take out {n} blocks: expected 1 to {most} of 4"):
            method(random_model(), None, n)


def test_laco_says_what_its_options_can_merge():
    model = random_model()
    tokens = random_tokens(model, 1, 5)
    with pytest.raises(ValueError, match="cannot merge away 3 blocks: merges of 2 from block 2 down to 1 take out 2"):
        removal.laco(model, lambda label: [tokens], 3)
