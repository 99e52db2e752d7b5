"""The mathematics: which layers are redundant, and which singular components of their matrices to keep.

Each function can be called alone. Those that run a model take token batches (B, T) int64.

    code         paper           shape                meaning
    h            h_l             (B, T, dim)          residual stream before block l
    c            s_l is its mean (n_layers, N)        each layer's mean cosine over each of N sequences
    U, S, Vh     U, Sigma, V^T   (m, r) (r,) (r, n)   thin SVD of a weight matrix W (m, n), r = min(m, n)
    G            dL/dW           (m, n)               L: mean nats per predicted token of the calibration set
    sigma_grad   dL/d sigma      (r,)                 one number for each singular component u_k, sigma_k, v_k
    importance   I(sigma)        (r,)
    kept         top-k           (k,)                 indices of the components that stay, ascending
"""
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from model import Transformer, finite, upcast


@torch.no_grad()
def layer_cosines(model: Transformer, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield c (n_layers, B) fp64 for each batch: the means of cos(h_l, h_{l+1}) over each sequence's tokens.

    Their mean over all sequences is s_l [GRASP §2.1, Eq. 1]. The last block's output is taken before the
    final norm. c is NaN where a state is not finite.
    """
    for tokens in batches:
        states = map(Tensor.double, model.residual_stream(tokens.to(model.device)))
        with_norms = ((h, h.norm(dim=-1)) for h in states)  # each state's norm is taken once
        yield torch.stack([cosine(h, h_next, norm, norm_next).mean(1)
                           for (h, norm), (h_next, norm_next) in pairwise(with_norms)])


def cosine(a: Tensor, b: Tensor, norm_a: Tensor | None = None, norm_b: Tensor | None = None) -> Tensor:
    """Cosine over the last dimension, in fp64 so that squares cannot overflow. norm_a, norm_b: if known.

    Vectors that differ by rounding give 1, and so do two zero vectors. If only one is zero the result is 0.
    """
    a, b = a.double(), b.double()
    norm_a, norm_b = (v.norm(dim=-1) if norm is None else norm for v, norm in ((a, norm_a), (b, norm_b)))
    cosines = (a * b).sum(-1) / (norm_a * norm_b).clamp(min=1e-300)
    return cosines.masked_fill((cosines > 1 - 1e-14) | (norm_a + norm_b == 0), 1)  # idle layers tie


def weight_gradients(model: Transformer, names: list[str], batches: Iterable[Tensor],
                     label_shift: int = 1) -> dict[str, Tensor]:
    """{name: G = dL/dW (m, n), fp32 at least} of dense matrices, by one backward sweep over the batches.

    L is the mean negative log-likelihood (nats) of token t + label_shift at position t. Only these matrices
    require gradients, so autograd stops at the lowest block that holds one. Gradients of the summed NLL are
    added in fp32, then divided by the number of tokens: none underflows. Raises ValueError for an empty
    sweep, a label shift out of range, and gradients that are not finite.
    """
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]

    def move_gradient(G, w):  # frees w.grad at once
        G.add_(w.grad)
        w.grad = None

    hooks = [w.register_post_accumulate_grad_hook(partial(move_gradient, G)) for G, w in zip(sums, weights)]
    count = torch.zeros((), dtype=torch.int64)  # of predicted tokens
    try:
        for tokens in batches:
            if not 0 < label_shift < tokens.shape[1]:
                raise ValueError(f"label shift {label_shift}: expected 1 to {tokens.shape[1] - 1}")
            tokens = tokens.to(model.device)
            backward(model, tokens, tokens, shift=label_shift)
            count += tokens[:, label_shift:].numel()
    finally:
        for w, hook in zip(weights, hooks):
            hook.remove()
            w.requires_grad_(False).grad = None
    if dist.is_initialized():  # torchrun: each process has read its part of the sequences
        for total in (count, *sums):
            dist.all_reduce(total)
    if not count:
        raise ValueError("no batches of tokens: the sweep is empty or used up")
    for name, G in zip(names, sums):
        if not finite(G.div_(count)):
            raise ValueError(f"the gradient of {name} is not finite; try --dtype bfloat16 or float32")
    return dict(zip(names, sums))


def backward(model: Transformer, tokens: Tensor, labels: Tensor, scale: float = 1, shift: int = 1) -> Tensor:
    """Add the gradient of scale * NLL to p.grad of each p that requires it; return the summed NLL (nats).

    tokens, labels: (B, T) int64; positions whose label is -100 are not predicted.
    """
    h = model.final_state(tokens)
    leaf, total = h.detach().requires_grad_(), 0
    for nll in model.losses(leaf, labels, shift):  # first through the head, chunk by chunk ...
        (scale * nll).backward()
        total += nll.detach()
    h.backward(leaf.grad)                   # ... then through the blocks
    return total


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of W (m, n): U (m, r), S (r,) descending, Vh (r, n), in fp32 at least.

    fp32: by eigenvectors of the smaller Gram matrix, in fp64: W^T W = V S^2 V^T, U = W V / S. For fp64, and
    for singular values below 1e-5 of the largest, where U would not be orthogonal: torch's SVD.
    """
    W = upcast(W.detach())
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    if W.dtype == torch.float32:
        tall64 = tall.double()
        squares, V = torch.linalg.eigh(tall64.mT @ tall64)
        S, V = squares.flip(0).clamp(min=0).sqrt(), V.flip(1)
        if S[-1] > 1e-5 * S[0]:
            U, S, V = (t.float() for t in (tall64 @ V / S, S, V))
            return (U, S, V.mT) if tall is W else (V, S, U.mT)
    return torch.linalg.svd(W, full_matrices=False)


def sigma_gradients(U: Tensor, G: Tensor, Vh: Tensor) -> Tensor:
    """dL/d sigma_k = u_k^T G v_k for all k: (r,), the diagonal of U^T G V [GRASP §2.2, Eqs. 3-5]."""
    return (U * (G.to(U.device) @ Vh.mT)).sum(0)


def importance(S: Tensor, sigma_grad: Tensor | None = None, score: str = "taylor") -> Tensor:
    """The score of every component, (r,) [GRASP §2.2, Eq. 6]. `taylor` and `signed` are fp64.

    taylor      |sigma_k dL/d sigma_k|, summed over the calibration set before the absolute value is taken;
                the group {u_k, sigma_k, v_k} has 3 times that first-order term (App. A.1): the same ranking
    signed      -sigma_k dL/d sigma_k, how much the loss would rise without it, to first order
    gradient    |dL/d sigma_k|;   magnitude    sigma_k, i.e. plain SVD, which needs no gradient
    """
    if score == "magnitude":
        return S
    rise = -S.double() * sigma_grad
    return {"taylor": rise.abs(), "signed": rise, "gradient": sigma_grad.abs()}[score]


def rank_for_ratio(m: int, n: int, ratio: float) -> int:
    """k so that A (m, k), B (k, n) hold `ratio` of the m n parameters or less; at least 1 [GRASP §2.3]."""
    return max(1, math.floor(Fraction(str(ratio)) * m * n / (m + n)))  # exact: in floats 0.29 * 100 < 29


def rank_for_threshold(scores: Tensor, threshold: float) -> int:
    """Size of the smallest set of components whose scores reach the fraction `threshold` of their sum."""
    sums = scores.double().sort(descending=True).values.cumsum(0)
    return int((sums < threshold * sums[-1]).sum()) + 1


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices (k,) of the k highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def low_rank_factors(U: Tensor, S: Tensor, Vh: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A = U_K diag(sqrt S_K) (m, k), B = diag(sqrt S_K) Vh_K (k, n): A B = sum_K sigma_k u_k v_k^T."""
    root = S[kept].sqrt()
    return U[:, kept] * root, root[:, None] * Vh[kept]
