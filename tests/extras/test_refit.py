"""The lesson: w2 of a narrower MLP can make good for the errors of the blocks before it, by least squares."""
import pytest
import torch
from torch import nn

from tests.conftest import random_model, random_tokens
from extras import shared_copy
from extras.baselines import keep_channels
from extras.fisher.refit import refit


def narrowed(*layers, dtype=torch.float64):
    """(a model with 15 of 24 channels in these layers' MLPs, the dense one)."""
    model = random_model(dtype)
    dense = shared_copy(model)
    for i in layers:
        keep_channels(model, f"layers.{i}.feed_forward", torch.arange(15), torch.eye(24, dtype=torch.float64), 0)
    return model, dense


def seen(module, model, tokens):
    """What goes into a module when the model reads the tokens, (B * T, n)."""
    found = []
    hook = module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].flatten(0, 1)))
    model(tokens)
    hook.remove()
    return found[0]


def test_a_copy_shares_the_weights_but_not_what_is_replaced():
    model, dense = narrowed(1)
    assert all(p is q for p, q in zip(dense.parameters(), model.parameters()) if p.shape == q.shape)
    assert [tuple(d.layers[1].feed_forward.w2.weight.shape) for d in (model, dense)] == [(16, 15), (16, 24)]


def test_it_is_the_least_squares_fit_to_the_dense_residual_stream():
    """Against torch.linalg.lstsq, for the second narrower MLP; what was before it was fitted or lost something too."""
    model, dense = narrowed(1, 3)
    model.layers[0].attention.wo.weight = nn.Parameter(model.layers[0].attention.wo.weight * 0.7, requires_grad=False)
    tokens, before = random_tokens(model, 4, 9), model.layers[3].feed_forward.w2.weight.clone()
    refit(model, dense, tokens.split(3))
    fitted = model.layers[3].feed_forward.w2.weight
    z = seen(model.layers[3].feed_forward.w2, model, tokens)
    g = model.final_state(tokens).flatten(0, 1) - z @ fitted.mT
    h = dense.final_state(tokens).flatten(0, 1)
    scale = (h.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    root = (0.3 * (z * scale).square().sum(0).mean()).sqrt()
    expected = torch.linalg.lstsq(torch.cat([z * scale, root * torch.eye(15, dtype=torch.float64)]),
                                  torch.cat([(h - g) * scale, root * before.mT])).solution.mT
    assert not torch.allclose(expected, before, rtol=0.1)
    torch.testing.assert_close(fitted.data, expected)


def test_block_by_block_the_stream_comes_nearer_to_the_dense_one():
    model, dense = narrowed(0, 1, 2, 3)
    tokens = random_tokens(model, 8, 16)

    def errors():
        return [((h - g).square().mean(-1) / h.square().mean(-1)).mean().item()
                for h, g in zip(dense.residual_stream(tokens), model.residual_stream(tokens))][1:]

    before = errors()
    refit(model, dense, tokens.split(4))
    assert all(now < 0.9 * then for now, then in zip(errors(), before))


def test_nothing_else_changes():
    model, dense = narrowed(1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    originals = {name: p.clone() for name, p in dense.named_parameters()}
    refit(model, dense, [random_tokens(model, 2, 9)])
    assert [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])] == [
        "layers.1.feed_forward.w2.weight"]
    assert all(torch.equal(p, originals[name]) for name, p in dense.named_parameters())


def test_half_precision_is_near_single_precision():
    (half, dense), (single, dense32) = narrowed(0, 2, dtype=torch.bfloat16), narrowed(0, 2, dtype=torch.float32)
    for p, q in zip([*half.parameters(), *dense.parameters()], [*single.parameters(), *dense32.parameters()]):
        q.data = p.data.float()
    tokens = random_tokens(half, 8, 16)
    refit(half, dense, [tokens])
    refit(single, dense32, [tokens])
    ours, theirs = (model.layers[2].feed_forward.w2.weight for model in (half, single))
    assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() < 0.06 * theirs.norm()


def test_tokens_and_channels_that_are_zero():
    """A token whose embedding is zero, and an MLP whose gates are."""
    model, dense = narrowed(0, 1)
    model.tok_embeddings.weight.data[7] = 0
    for ff in (model.layers[1].feed_forward, dense.layers[1].feed_forward):
        ff.w3.weight.data.zero_()
    tokens = random_tokens(model, 2, 9)
    tokens[:, 0] = 7
    refit(model, dense, [tokens])
    assert model(tokens).isfinite().all()


def test_an_overflow_is_refused():
    model, dense = narrowed(0, dtype=torch.float32)
    model.layers[0].feed_forward.w3.weight.data *= 1e30
    with pytest.raises(ValueError, match="w2 of block 0 is not finite after its refit; try --dtype"):
        refit(model, dense, [random_tokens(model, 2, 9)])
