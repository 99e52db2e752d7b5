"""The lesson: w2 of a narrower MLP can make good for the errors of the layers before it, by least squares."""
import torch
from torch import nn

from tests.conftest import random_model, random_tokens
from extras import shared_copy
from extras.baselines import keep_channels
from extras.fisher.refit import RIDGE, refit


def narrowed(*layers, dtype=torch.float64):
    """(a model with 15 of 24 channels in these layers' MLPs, the dense one)."""
    model = random_model(dtype)
    dense = shared_copy(model)
    for i in layers:
        keep_channels(model, f"layers.{i}.feed_forward", torch.arange(15), torch.eye(24, dtype=torch.float64))
    return model, dense


def seen(module, model, tokens):
    """What goes into a module when the model reads the tokens, (B * T, n)."""
    found = []
    hook = module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].flatten(0, 1)))
    model(tokens)
    hook.remove()
    return found[0]


def test_it_is_the_least_squares_fit_to_the_dense_residual_stream():
    """Against torch.linalg.lstsq, of the first MLP that is narrower; the blocks before it lost something too."""
    model, dense = narrowed(3)
    model.layers[0].attention.wo.weight = nn.Parameter(model.layers[0].attention.wo.weight * 0.7)
    tokens, before = random_tokens(model, 4, 9), model.layers[-1].feed_forward.w2.weight.clone()
    z = seen(model.layers[-1].feed_forward.w2, model, tokens)
    after_attention = [*model.residual_stream(tokens)][-1].flatten(0, 1) - z @ before.mT
    h = [*dense.residual_stream(tokens)][4].flatten(0, 1)
    refit(model, dense, tokens.split(3))
    scale = h.square().mean(1, keepdim=True).rsqrt()
    C = (z * scale).mT @ (z * scale)
    root = (RIDGE * C.diagonal().mean()).sqrt()
    expected = torch.linalg.lstsq(torch.cat([z * scale, root * torch.eye(15, dtype=torch.float64)]),
                                  torch.cat([(h - after_attention) * scale, root * before.mT])).solution.mT
    assert not torch.allclose(expected, before, rtol=0.1)
    torch.testing.assert_close(model.layers[-1].feed_forward.w2.weight.data, expected)


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


def test_half_precision_stays():
    model, dense = narrowed(0, 2, dtype=torch.bfloat16)
    refit(model, dense, [random_tokens(model, 2, 9)])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(random_tokens(model, 1, 5)).isfinite().all()
