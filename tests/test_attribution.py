"""The lesson: a singular value's gradient needs no autograd of its own.

With W = U diag(sigma) V^T the loss depends on sigma through W alone, and dW/d sigma_k = u_k v_k^T. Therefore

    dL/d sigma_k = <dL/dW, u_k v_k^T> = u_k^T G v_k.

G comes from one ordinary backward pass. Here autograd computes the same numbers without that formula.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attribution import (cosine, importance, layer_cosines, low_rank_factors, rank_for_ratio,
                         rank_for_threshold, sigma_gradients, svd, top_k, weight_gradients)
from evaluate import perplexity
from grasp import find_redundant, standard_error
from tests.conftest import random_model, random_tokens
from model import LowRankLinear, matrix_names

NAMES = matrix_names(1, 3)


class Spectral(nn.Module):
    """y = U diag(sigma) V^T x, with sigma a leaf that autograd differentiates."""
    def __init__(self, W):
        super().__init__()
        self.U, S, self.Vh = torch.linalg.svd(W, full_matrices=False)
        self.S = nn.Parameter(S)

    def forward(self, x):
        return F.linear(x, self.U @ torch.diag(self.S) @ self.Vh)


def autograd_sigma_gradients(model, names, tokens, shift=1):
    """{name: dL/d sigma} by autograd, from the logits and a loss written out here: an independent check."""
    old = {name: model.get_submodule(name) for name in names}
    for name, linear in old.items():
        model.set_submodule(name, Spectral(linear.weight))
    log_p = torch.log_softmax(model(tokens), dim=-1)
    B, T = tokens.shape
    nll = -sum(log_p[b, t, tokens[b, t + shift]] for b in range(B) for t in range(T - shift)) / (B * (T - shift))
    nll.backward()
    gradients = {name: model.get_submodule(name).S.grad for name in names}
    for name, module in old.items():
        model.set_submodule(name, module)
    return gradients


def test_sigma_gradients_of_one_matrix_are_autograds():
    torch.manual_seed(0)
    for m, n in ((7, 5), (5, 7), (6, 6)):
        W, X, Y = (torch.randn(*shape, dtype=torch.float64) for shape in ((m, n), (n, 30), (m, 30)))
        layer = Spectral(W)
        ((layer.U @ torch.diag(layer.S) @ layer.Vh @ X - Y) ** 2).mean().backward()
        G = 2 * (W @ X - Y) @ X.T / Y.numel()  # the same loss's gradient to W, by hand
        assert torch.allclose(sigma_gradients(layer.U, G, layer.Vh), layer.S.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_sigma_gradients_through_the_whole_model_are_autograds(shift):
    """shift: position t predicts token t + shift. The authors' code shifts the labels twice."""
    model = random_model()
    tokens = random_tokens(model, 3, 12)
    truth = autograd_sigma_gradients(model, NAMES, tokens, shift)
    G = weight_gradients(model, NAMES, tokens.split(2), shift)
    for name in NAMES:
        U, _, Vh = svd(model.get_submodule(name).weight)
        assert truth[name].abs().max() > 1e-4
        assert torch.allclose(sigma_gradients(U, G[name], Vh), truth[name], rtol=0, atol=1e-10), name


def test_sigma_gradients_predict_what_a_nudge_does():
    """Central differences use neither autograd nor the formula."""
    model, name = random_model(), "layers.2.feed_forward.w2"
    tokens = random_tokens(model, 2, 10)
    W = model.get_submodule(name).weight
    U, S, Vh = svd(W)
    gradient = sigma_gradients(U, weight_gradients(model, [name], [tokens])[name], Vh)

    def loss():
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    dense, step = W.clone(), 1e-5
    for k in (0, 3, len(S) - 1):
        W.data = dense + step * torch.outer(U[:, k], Vh[k])
        above = loss()
        W.data = dense - step * torch.outer(U[:, k], Vh[k])
        assert (above - loss()) / (2 * step) == pytest.approx(gradient[k].item(), abs=1e-8)


def test_the_three_members_of_a_singular_group_agree():
    """u . dL/du = v . dL/dv = sigma dL/d sigma: the whole group's score orders as sigma's [App. A.1]."""
    torch.manual_seed(1)
    W, X = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    U, S, Vh = (t.clone().requires_grad_() for t in torch.linalg.svd(W, full_matrices=False))
    (U @ torch.diag(S) @ Vh @ X).tanh().sum().backward()
    for other in ((U * U.grad).sum(0), (Vh * Vh.grad).sum(1)):
        assert torch.allclose(other, S.detach() * S.grad, atol=1e-12)


def test_gradients_are_linear_over_batches():
    """G of the whole set is the mean of its parts', weighted by tokens. The micro-batches do not matter."""
    model = random_model()
    tokens = random_tokens(model, 6, 9)
    whole, again = (weight_gradients(model, NAMES, tokens.split(size)) for size in (6, 1))
    first, second = (weight_gradients(model, NAMES, [part]) for part in tokens.split(4))
    for name in NAMES:
        assert torch.allclose(whole[name], again[name], rtol=0, atol=1e-12)
        assert torch.allclose(whole[name], (4 * first[name] + 2 * second[name]) / 6, rtol=0, atol=1e-12)


def test_autograd_stops_at_the_lowest_redundant_block():
    model = random_model()
    tokens = random_tokens(model, 1, 5)
    seen = []
    model.layers[1].attention.wv.register_forward_pre_hook(lambda module, x: seen.append(x[0].requires_grad))
    model.layers[3].attention.wv.register_forward_pre_hook(lambda module, x: seen.append(x[0].requires_grad))
    weight_gradients(model, ["layers.2.feed_forward.w1"], [tokens])
    assert seen == [False, True]  # below block 2 no graph is built
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())  # and nothing is left over


def test_half_precision_gradients_are_summed_wide():
    """A bf16 sum of 300 batches would stop growing: each adds less than half a unit in its last place."""
    model = random_model(torch.bfloat16)
    tokens, name = random_tokens(model, 1, 8), "layers.3.feed_forward.w2"
    once = weight_gradients(model, [name], [tokens])[name]
    often = weight_gradients(model, [name], [tokens] * 300)[name]
    assert often.dtype == torch.float32
    assert torch.allclose(often, once, rtol=1e-4, atol=1e-8)


def test_gradients_that_overflow_are_refused():
    model = random_model()
    model.layers[3].ffn_norm.weight.data *= 1e200
    with pytest.raises(ValueError, match="gradient of layers.2.attention.wq is not finite"):
        weight_gradients(model, ["layers.2.attention.wq"], [random_tokens(model, 1, 5)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_gradients():
    model = random_model(torch.float32)
    tokens = random_tokens(model, 4, 16)
    here = weight_gradients(model, NAMES, tokens.split(2))
    there = weight_gradients(model.to("cuda"), NAMES, tokens.split(2))
    for name in NAMES:
        assert torch.allclose(here[name], there[name].cpu(), rtol=1e-3, atol=1e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_sweep_waits_for_the_gpu():
    """After the first micro-batch, nothing waits for a value until the last one has been started."""
    def watched(tokens):
        try:
            for i, part in enumerate(tokens.to("cuda").split(1)):
                torch.cuda.set_sync_debug_mode("error" if i else "default")
                yield part
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = random_model(torch.bfloat16).to("cuda")
    tokens = random_tokens(model, 4, 16)
    assert torch.cat([*layer_cosines(model, watched(tokens))], 1).isfinite().all()
    assert len(weight_gradients(model, NAMES, watched(tokens))) == len(NAMES)


# ------------------------------------------------------------------------------------------------ the batches

def empty():
    return iter(())


def used_up():
    batches = iter([torch.zeros(1, 4, dtype=torch.int64)])
    next(batches)
    return batches


@pytest.mark.parametrize("batches", [list, empty, used_up])
def test_a_sweep_without_batches_is_an_error(batches):
    """An iterator can be used once; without this check the second sweep would divide by zero."""
    model = random_model()
    with pytest.raises(ValueError, match="no batches"):
        find_redundant(model, lambda label: batches(), 2)
    with pytest.raises(ValueError, match="no batches"):
        perplexity(model, batches())
    with pytest.raises(ValueError, match="no batches"):
        weight_gradients(model, NAMES, batches())
    assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- the SVD

@pytest.mark.parametrize("m, n", [(40, 40), (60, 20), (20, 60)])
def test_the_svd_by_the_gram_matrix_is_an_svd(m, n, monkeypatch):
    """The reference is LAPACK in fp64. LAPACK's fp32 SVD is switched off, so that it cannot answer."""
    monkeypatch.setattr(torch.linalg, "svd", None)
    torch.manual_seed(3)
    W = torch.randn(m, n) * torch.logspace(0, -3, n)  # the columns' sizes span three decades
    U, S, Vh = svd(W)
    monkeypatch.undo()
    r, exact = min(m, n), torch.linalg.svdvals(W.double())
    assert U.shape == (m, r) and Vh.shape == (r, n) and S.dtype == torch.float32
    assert (S - exact).abs().max() < 1e-6 * exact[0] and (S.diff() <= 0).all()
    assert torch.allclose(U @ S.diag() @ Vh, W, rtol=0, atol=1e-5 * exact[0])
    for Q in (U.T, Vh):
        assert torch.allclose(Q @ Q.T, torch.eye(r), atol=1e-5)


@pytest.mark.parametrize("m, n", [(60, 20), (20, 60)])
def test_singular_vectors_are_orthogonal_where_the_smallest_value_is_tiny(m, n):
    """At 3e-6 of the largest value the Gram matrix no longer gives orthogonal columns; LAPACK does."""
    torch.manual_seed(5)
    U, V = (torch.linalg.qr(torch.randn(size, 20, dtype=torch.float64)).Q for size in (m, n))
    S = torch.logspace(0, math.log10(3e-6), 20, dtype=torch.float64)
    U, _, Vh = svd((U @ S.diag() @ V.T).float())
    for Q in (U.T, Vh):
        assert (Q @ Q.T - torch.eye(20)).abs().max() <= 5e-6


@pytest.mark.parametrize("W", [torch.zeros(5, 3), torch.ones(4, 6), torch.eye(6)[:, :4] * 1e-20,
                               torch.diag(torch.tensor([1.0, 1e-3, 1e-9]))])
def test_the_svd_of_a_matrix_without_full_rank(W):
    U, S, Vh = svd(W)
    assert torch.allclose(U @ S.diag() @ Vh, W, rtol=1e-5, atol=1e-12)
    for Q in (U.T, Vh):
        assert torch.allclose(Q @ Q.T, torch.eye(min(W.shape)), atol=1e-5)


# ---------------------------------------------------------------------------------------------- which to keep

def test_importance_is_not_magnitude():
    """By hand: W = diag(3, 2, 1), G = diag(0.1, 0, -5).

    The smallest sigma matters most, the middle one not at all.
    """
    W, G = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([0.1, 0.0, -5.0]))
    U, S, Vh = svd(W)
    gradient = sigma_gradients(U, G, Vh)
    assert gradient.tolist() == pytest.approx([0.1, 0.0, -5.0])
    assert importance(S, gradient).tolist() == pytest.approx([0.3, 0.0, 5.0])
    assert importance(S, gradient, "gradient").tolist() == pytest.approx([0.1, 0.0, 5.0])
    assert top_k(importance(S, gradient), 2).tolist() == [0, 2]
    assert top_k(importance(S, score="magnitude"), 2).tolist() == [0, 1]


def test_the_absolute_value_comes_after_the_sum():
    """The score of the whole set is that of the summed gradient, not the sum of its batches' scores."""
    model, name = random_model(), NAMES[4]
    parts = random_tokens(model, 2, 9).split(1)
    U, S, Vh = svd(model.get_submodule(name).weight)
    whole, *each = (importance(S, sigma_gradients(U, weight_gradients(model, [name], batches)[name], Vh))
                    for batches in (parts, parts[:1], parts[1:]))
    signed = [sigma_gradients(U, weight_gradients(model, [name], [part])[name], Vh) for part in parts]
    assert torch.allclose(whole, (S * (signed[0] + signed[1]) / 2).abs(), atol=1e-12)
    assert (whole < (each[0] + each[1]) / 2 - 1e-6).any()  # somewhere they pull opposite ways


@pytest.mark.parametrize("m, n, rank", [
    (4096, 4096, 204), (1024, 4096, 81), (11008, 4096, 298), (14336, 4096, 318), (4096, 14336, 318),
    (3, 3, 1)])
def test_rank_for_ratio(m, n, rank):
    assert rank_for_ratio(m, n, 0.1) == rank
    assert rank == 1 or rank * (m + n) <= 0.1 * m * n < (rank + 1) * (m + n)


def test_ratios_are_decimals():
    assert rank_for_ratio(200, 200, 0.29) == 29  # the binary 0.29 is a little less


def test_rank_for_threshold_takes_the_fewest():
    scores = torch.tensor([1.0, 5.0, 3.0, 1.0])  # 5, 5+3, 5+3+1, all of 10
    assert [rank_for_threshold(scores, t) for t in (0.1, 0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_for_threshold(torch.zeros(4), 0.5) == 1


def test_ties_go_to_the_earlier():
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert top_k(torch.tensor([0.9, 0.5, 0.9, 0.9]), 2).tolist() == [0, 2]


def test_factors_are_the_kept_part_of_the_sum():
    """A B = sum over the kept k of sigma_k u_k v_k^T. Its squared error is that of the dropped sigmas."""
    torch.manual_seed(2)
    W = torch.randn(9, 6, dtype=torch.float64)
    U, S, Vh = svd(W)
    kept, dropped = torch.tensor([0, 3, 5]), [1, 2, 4]
    A, B = low_rank_factors(U, S, Vh, kept)
    assert A.shape == (9, 3) and B.shape == (3, 6)
    assert torch.allclose(A.norm(dim=0), S[kept].sqrt()) and torch.allclose(B.norm(dim=1), S[kept].sqrt())
    assert ((W - A @ B) ** 2).sum().item() == pytest.approx((S[dropped] ** 2).sum().item())


def test_full_rank_leaves_the_logits():
    model = random_model()
    tokens = random_tokens(model, 2, 8)
    before = model(tokens)
    for name in NAMES:
        U, S, Vh = svd(model.get_submodule(name).weight)
        model.set_submodule(name, LowRankLinear(*low_rank_factors(U, S, Vh, torch.arange(len(S)))))
    assert torch.allclose(model(tokens), before, rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------- redundant layers

def means(model, batches):
    """s_l of every layer: (n_layers,)."""
    return torch.cat([*layer_cosines(model, batches)], 1).mean(1)


def test_a_layer_that_does_nothing_has_cosine_1():
    model = random_model()
    for w in (model.layers[2].attention.wo, model.layers[2].feed_forward.w2):
        w.weight.data.zero_()
    cosines = means(model, random_tokens(model, 4, 7).split(3))
    assert cosines[2] == pytest.approx(1.0, abs=1e-12) and cosines.argmax() == 2 and cosines.min() < 0.99


def test_half_precision_streams_are_compared_wide():
    """In bf16 two nearly parallel vectors would have cosine 1 or 0.996, and nothing in between."""
    model = random_model(torch.bfloat16)
    tokens = random_tokens(model, 2, 9)
    states = [h.double() for h in model.residual_stream(tokens)]
    expected = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(states, states[1:])]
    assert means(model, [tokens]).tolist() == pytest.approx(expected, abs=1e-6)


class Stream:
    """A model that has only a residual stream: two blocks, two sequences of two tokens, dim 2."""
    device = "cpu"
    h = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]]],
                      [[[0.0, 1.0], [0.0, 9.0]], [[3.0, 3.0], [1.0, 0.0]]],
                      [[[0.0, -1.0], [0.0, 1.0]], [[-2.0, 2.0], [5.0, 0.0]]]])

    def residual_stream(self, tokens):
        return iter(self.h)


def test_cosines_by_hand():
    """Two layers, two sequences: the mean over each sequence's two tokens."""
    tokens, root = torch.zeros(2, 2, dtype=torch.int64), math.sqrt(0.5)
    (c,) = layer_cosines(Stream(), [tokens])
    expected = torch.tensor([[(0 + 1) / 2, (root + root) / 2], [(-1 + 1) / 2, (0 + 1) / 2]], dtype=torch.float64)
    torch.testing.assert_close(c, expected)


def test_equal_vectors_have_cosine_1_exactly():
    """So that layers which do nothing tie, and rounding does not order them."""
    a = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0))
    assert (cosine(a, a.clone()) == 1).all() and (cosine(a, 2 * a) == 1).all() and (cosine(0 * a, 0 * a) == 1).all()
    wide = torch.randn(50, 8192, generator=torch.Generator().manual_seed(0))
    assert (cosine(wide, wide) == 1).all() and (cosine(wide, wide * (1 + 1e-5 * wide)) < 1).all()


def test_a_norm_that_is_known_is_not_taken_again():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = F.cosine_similarity(a.double(), b.double(), dim=-1)
    torch.testing.assert_close(cosine(a, b), expected)
    torch.testing.assert_close(cosine(a, b, 2 * a.double().norm(dim=-1)), expected / 2)  # the norm given counts
    torch.testing.assert_close(cosine(a, b, None, 4 * b.double().norm(dim=-1)), expected / 4)


def test_cosines_are_of_each_sequence():
    """So that their mean and its standard error can be taken where they are needed."""
    model = random_model()
    tokens = random_tokens(model, 7, 9)
    parts = [*layer_cosines(model, tokens.split(3))]
    assert [part.shape for part in parts] == [(4, 3), (4, 3), (4, 1)]
    c = torch.cat(parts, 1)
    assert c.dtype == torch.float64
    torch.testing.assert_close(c, torch.cat([next(layer_cosines(model, [row[None]])) for row in tokens], 1))
    torch.testing.assert_close(standard_error(c), c.std(1) / 7 ** 0.5)
    assert standard_error(c[:, :1]).isnan().all()  # of one sequence nothing is known
