"""The mathematics: which layers are redundant, and which singular components of their matrices to keep.

Each function can be called alone. Those that run a model take token batches (B, T) int64. A sequence of -100
counts nowhere: a process without work passes it through its model.

    code         paper           shape                meaning
    U, S, Vh     U, Sigma, V^T   (m, r) (r,) (r, n)   thin SVD of a weight matrix W (m, n), r = min(m, n)
    G            dL/dW           (m, n)               L: mean nats per predicted token of the calibration set
    sigma_grad   dL/d sigma      (r,)                 one number for each singular component u_k, sigma_k, v_k
    importance   I(sigma)        (r,)
    kept         top-k           (k,)                 indices of the components that stay, ascending
"""
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer, finite, upcast
from runtime import distributed


@torch.no_grad()
def layer_cosines(model: Transformer, batches: Iterable[Tensor],
                  enough: Callable[[Tensor, Tensor, int], bool] | None = None) -> tuple[Tensor, Tensor, int]:
    """Return (s_l, its standard error, each (n_layers,) fp64; the number of sequences) [GRASP §2.1, Eq. 1].

    s_l is the mean over all tokens of cos(h_l, h_{l+1}). The last block's output is taken before the final
    norm. The error is that over the sequences; not finite for one. enough: whether to stop, given the three
    results so far; called after 1, 2, 4, 8 ... batches. Raises ValueError if a state is not finite.
    """
    sums = 0  # (3, n_layers): of the sequences' mean cosines, of their squares, of 1
    for i, tokens in enumerate(batches, 1):
        tokens = tokens.to(model.device)
        states = pairwise(model.residual_stream(tokens.clamp(min=0)))
        c = torch.stack([cosine(h, h_next).mean(1) for h, h_next in states])  # (n_layers, B)
        sums = sums + (torch.stack([c, c ** 2, torch.ones_like(c)]) * (tokens[:, 0] >= 0)).sum(2)
        if enough and i.bit_count() == 1 and enough(*mean_and_error(sums)):
            break
    cosines, errors, sequences = mean_and_error(sums)
    if not finite(cosines):
        layer = cosines.isfinite().tolist().index(False)
        raise ValueError(f"the cosine of layer {layer} is not a number in {model.dtype}; try --dtype float32")
    return cosines, errors, sequences


def mean_and_error(sums: Tensor) -> tuple[Tensor, Tensor, int]:
    """The results of layer_cosines from its sums over the sequences: of cosines, of their squares, of 1."""
    cosines, squares, n = distributed.all_sum(sums + 0).cpu()
    cosines, squares = cosines / n, squares / n
    return cosines, ((squares - cosines ** 2).clamp(min=0) / (n - 1)).sqrt(), int(n[0])


@torch.no_grad()
def angular_distances(model: Transformer, batches: Iterable[Tensor], n: int) -> Tensor:
    """arccos(cos(h_l, h_{l+n})) / pi, on the last tokens: (n_layers - n + 1,) [arXiv 2403.17887 §3.2]."""
    total = count = 0
    for tokens in batches:
        tokens = tokens.to(model.device)
        last = torch.stack([h[:, -1].clone() for h in model.residual_stream(tokens.clamp(min=0))])
        angles = cosine(last[:-n], last[n:]).clamp(-1, 1).arccos() / math.pi * (tokens[:, -1] >= 0)
        total, count = total + angles.sum(1), count + (tokens[:, -1] >= 0).sum()
    return distributed.mean(total, count)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension, in fp64: no square overflows. Equal vectors, zeros too, give 1."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-300).masked_fill((a == b).all(-1), 1)


def weight_gradients(model: Transformer, names: list[str], batches: Iterable[Tensor],
                     label_shift: int = 1) -> dict[str, Tensor]:
    """{name: G = dL/dW (m, n), fp32 at least} of dense matrices, by one backward sweep over the batches.

    L is the mean negative log-likelihood (nats) of token t + label_shift at position t. Only these matrices
    require gradients, so autograd stops at the lowest block that holds one. Gradients of the summed NLL are
    added in fp32, then divided by the number of tokens: none underflows. Raises ValueError if not finite.
    """
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]

    def move_gradient(G, w):  # frees w.grad at once
        distributed.local(G).add_(distributed.local(w.grad))
        w.grad = None

    hooks = [w.register_post_accumulate_grad_hook(partial(move_gradient, G)) for G, w in zip(sums, weights)]
    count = 0
    try:
        for tokens in batches:
            if not 0 < label_shift < tokens.shape[1]:
                raise ValueError(f"label shift {label_shift}: expected 1 to {tokens.shape[1] - 1}")
            tokens = tokens.to(model.device)
            backward(model, tokens.clamp(min=0), tokens, shift=label_shift)
            count += (tokens[:, label_shift:] >= 0).sum()
    finally:
        for w, hook in zip(weights, hooks):
            hook.remove()
            w.requires_grad_(False).grad = None
    count = distributed.all_sum(count)
    for name, G in zip(names, sums):
        if not finite(distributed.local(distributed.all_sum(G).div_(count))):
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
    return (U * (G @ Vh.mT)).sum(0)


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
