"""The lesson: weighting its inputs changes which low-rank matrix is the nearest, and each method has its own weights.

Of all A B of rank k, U_k U_k^T W is the nearest to W in the norm ||(W - A B) D||, U the left singular vectors of W D.
"""
import pytest
import torch

from attribution import low_rank_factors
from tests.conftest import random_model, random_tokens
from evaluate import perplexity
from extras.baselines import decomposition
from extras.baselines.decomposition import asvd, decompose, fisher_weights, fwsvd, plain_svd, svd_llm
from model import LowRankLinear, matrix_names

METHODS = [plain_svd, fwsvd, asvd, svd_llm]
NAMES = matrix_names(1, 2)


def compressed(method, tokens, budget=2500, **options):
    """{name: (A, B)} of what the method puts into blocks 1 and 2 of the random model."""
    model = method(random_model(), lambda label: tokens.split(2), budget, [1, 2], **options)
    low_rank = {name: (m.A, m.B) for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert list(low_rank) == NAMES
    return low_rank


def inputs(model, tokens):
    """{name: X (n, tokens)}, what each of the named matrices of the dense model is given, every one by its own hook."""
    X = {}
    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: X.update({name: given[0].flatten(0, 1).mT}))
    model(tokens)
    return X


@pytest.fixture
def tokens():
    return random_tokens(random_model(), 5, 16)


def test_the_weighted_matrix_decides_which_component_stays():
    for d, kept in (([1.0, 1.0], [3.0, 0.0]), ([1.0, 4.0], [0.0, 2.0])):  # 3 * 1 > 2 * 1, but 3 * 1 < 2 * 4
        model, D = random_model(), torch.ones(16)
        W, D[:2] = model.layers[0].attention.wq.weight.zero_(), torch.tensor(d)
        W[0, 0], W[1, 1] = 3, 2
        m = decompose(model, {"layers.0.attention.wq": 1}, {"layers.0.attention.wq": D}).layers[0].attention.wq
        torch.testing.assert_close((m.A @ m.B).diagonal()[:2], torch.tensor(kept, dtype=torch.float64))


def test_factors_are_those_of_the_papers():
    """A = U_k sqrt(S_k), B = sqrt(S_k) Vh_k D^-1 with the inverse written out, for a diagonal and a triangular D."""
    torch.manual_seed(2)
    name, k = "layers.0.feed_forward.w2", 5
    for D in (torch.rand(24).double() + 0.1, torch.randn(24, 24).double().tril() + 5 * torch.eye(24)):
        model, full = random_model(), torch.diag(D) if D.ndim == 1 else D
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight @ full, full_matrices=False)
        A, B = low_rank_factors(U, S, Vh @ torch.linalg.inv(full), torch.arange(k))
        m = decompose(model, {name: k}, {name: D}).get_submodule(name)
        signs = (m.A * A).sum(0).sign()  # of a pair u, v both may be turned
        assert torch.allclose(m.A * signs, A, atol=1e-10) and torch.allclose(m.B * signs[:, None], B, atol=1e-10)


def test_plain_svd_loses_the_dropped_singular_values(tokens):
    dense = random_model()
    for name, (A, B) in compressed(plain_svd, tokens).items():
        W = dense.get_submodule(name).weight
        dropped = torch.linalg.svdvals(W)[A.shape[1]:].square().sum().item()
        assert 0.1 < dropped == pytest.approx((W - A @ B).square().sum().item(), rel=1e-10)


def test_svd_llm_knows_its_loss_and_no_other_has_less(tokens):
    """||(W - A B) X||^2 on the calibration inputs = the sum of the dropped sigma^2 of W L, L L^T = X X^T."""
    dense, ours = random_model(), compressed(svd_llm, tokens)
    X, others = inputs(dense, tokens), [compressed(method, tokens) for method in (plain_svd, fwsvd, asvd)]
    for name, (A, B) in ours.items():
        W, k = dense.get_submodule(name).weight, A.shape[1]
        sigma = torch.linalg.svdvals(W @ torch.linalg.cholesky(X[name] @ X[name].mT))
        loss = ((W - A @ B) @ X[name]).square().sum().item()
        assert loss == pytest.approx(sigma[k:].square().sum().item(), rel=1e-9)
        for other in others:
            A, B = other[name]
            assert A.shape[1] == k and loss < ((W - A @ B) @ X[name]).square().sum().item()


def test_svd_llm_with_fewer_tokens_than_ranks_loses_nothing():
    """The moment of 3 tokens is singular until the ridge is added; the outputs span 3 directions, and all are kept."""
    dense, few = random_model(), random_tokens(random_model(), 1, 3)
    X = inputs(dense, few)
    for name, (A, B) in compressed(svd_llm, few, 1500).items():
        W = dense.get_submodule(name).weight
        assert A.shape[1] >= 3 == torch.linalg.matrix_rank(X[name])
        assert ((W - A @ B) @ X[name]).norm() < 1e-3 * (W @ X[name]).norm()


def test_asvd_by_hand(tokens):
    """The first block's wv reads the normalised embeddings; D = diag(mean |x_j|)^alpha."""
    for alpha in (0.5, 1.0):
        model = random_model()
        block = model.layers[0]
        W, h = block.attention.wv.weight, model.tok_embeddings.weight[tokens.flatten()]
        x = h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt() * block.attention_norm.weight
        U = torch.linalg.svd(W @ torch.diag(x.abs().mean(0) ** alpha))[0]
        asvd(model, lambda label: tokens.split(2), 1000, [0], **({} if alpha == 0.5 else {"alpha": alpha}))
        m = model.layers[0].attention.wv
        U = U[:, :m.A.shape[1]]
        assert torch.allclose(m.A @ m.B, U @ U.mT @ W, atol=1e-10)


def test_equal_weights_are_plain_svd(tokens, monkeypatch):
    plain = compressed(plain_svd, tokens)
    monkeypatch.setattr(decomposition, "fisher_weights", lambda model, names, batches: {
        name: torch.full_like(model.get_submodule(name).weight[0], 7.0) for name in names})
    for other in (compressed(asvd, tokens, alpha=0), compressed(fwsvd, tokens)):
        for name, (A, B) in plain.items():
            assert torch.allclose(A @ B, other[name][0] @ other[name][1], atol=1e-12)


def test_fisher_weights_are_autograds(tokens):
    """d_j^2 = sum over sequences and rows of the squared gradient: of each sequence, then squared, not of the batch."""
    model = random_model()
    weights = [model.get_submodule(name).weight.requires_grad_() for name in NAMES]
    truth = [0] * len(NAMES)
    for sequence in tokens:
        log_p = torch.log_softmax(model(sequence[None])[0], dim=-1)
        nll = -sum(log_p[t, sequence[t + 1]] for t in range(len(sequence) - 1))
        truth = [d2 + g.square().sum(0) for d2, g in zip(truth, torch.autograd.grad(nll, weights))]
    model.requires_grad_(False)
    for batches in ([tokens], tokens.split(2)):
        d = fisher_weights(model, NAMES, batches)
        for name, d2 in zip(NAMES, truth):
            assert d[name].min() > 0.01 and torch.allclose(d[name], d2.sqrt(), rtol=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())  # nothing is left behind


def test_fwsvd_is_the_nearest_by_its_weights(tokens):
    dense = random_model()
    ours, plain, d = compressed(fwsvd, tokens), compressed(plain_svd, tokens), fisher_weights(dense, NAMES, [tokens])
    for name, (A, B) in ours.items():
        W, k = dense.get_submodule(name).weight, A.shape[1]
        error, other = (((W - A @ B) * d[name]).square().sum().item() for A, B in (ours[name], plain[name]))
        assert error == pytest.approx(torch.linalg.svdvals(W * d[name])[k:].square().sum().item(), rel=1e-9)
        assert error < other


@pytest.mark.parametrize("method", METHODS)
def test_an_input_that_is_always_zero(method, tokens):
    model = random_model()
    model.layers[1].attention_norm.weight[3] = 0  # d_3 = 0, and the moment is singular
    method(model, lambda label: [tokens], 2500)
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_budget_is_met(method, dtype):
    """0.6 of one block, six query heads over two: in matrices of this size a rank is less than 0.5 % of the budget."""
    model = random_model(dtype, n_layers=2, dim=384, hidden_dim=1024, n_heads=6, head_dim=64, tied=True)
    tokens, before, untouched = random_tokens(model, 2, 8), model.n_params, model.layers[0].attention.wq.weight.clone()
    budget = int(0.6 * sum(p.numel() for p in model.layers[1].parameters()))
    small = method(model, lambda label: [tokens], budget, [1])
    assert budget <= before - small.n_params <= 1.005 * budget
    assert {p.dtype for p in small.parameters()} == {dtype} and not any(p.requires_grad for p in small.parameters())
    assert torch.equal(small.layers[0].attention.wq.weight, untouched)
    assert 1 < perplexity(small, [tokens]) < float("inf")


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_too_large_is_said(method, tokens):
    with pytest.raises(ValueError, match="cannot remove 5,000 parameters"):
        method(random_model(), lambda label: [tokens], 5000, [1])
