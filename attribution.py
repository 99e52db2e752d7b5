"""What decides: which layers are redundant, and which singular components of their matrices to keep.

Every function stands alone. Those that sweep over a model take an iterable of token batches (B, T) int64.

    here         paper           shape                what
    U, S, Vh     U, Sigma, V^T   (m, r) (r,) (r, n)   thin SVD of a weight matrix W (m, n), r = min(m, n)
    G            dL/dW           (m, n)               L: mean nats per predicted token over the calibration set
    sigma_grad   dL/d sigma      (r,)                 u_k, sigma_k, v_k: component k; elsewhere k is how many are kept
    importance   I(sigma)        (r,)
    kept         top-k           (k,)                 indices of the components that stay, ascending

[GRASP]: arXiv 2501.00339.  [Gromov]: arXiv 2403.17887.
"""
import math
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F

from data import processes
from model import finite, upcast

SCORES = ("taylor", "gradient", "magnitude")


@torch.no_grad()
def layer_cosines(model, batches):
    """s_l, mean over all tokens of cos(h_l, h_{l+1}), block l's ends: (n_layers,) fp64 [GRASP §2.1, Eq. 1].

    The last block's output is taken before the final norm, as every other's is. ValueError if a state is not finite.
    """
    total, count = 0, 0
    for tokens in batches:
        cosines, h = [], None
        for h_next in model.residual_stream(tokens.to(model.device)):
            if h is not None:
                cosines.append(cosine(h, h_next).sum())
            h = h_next
        total, count = total + torch.stack(cosines), count + tokens.numel()
    cosines = processes.mean(total, count)
    if not finite(cosines):
        layer = int(cosines.isfinite().int().argmin())
        raise ValueError(f"the cosine of layer {layer} is not a number in {model.dtype}; try --dtype float32")
    return cosines


def cosine(a, b):
    """Of vectors (..., dim), in fp64: no square of an fp32 number overflows or vanishes there. Equal ones have 1.

    Vectors of zeros, too: a block that changes nothing is redundant, whatever stands there. Only one of zeros: 0.
    """
    cosines = F.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-300)
    return cosines.masked_fill((a == b).all(-1), 1)


@torch.no_grad()
def angular_distances(model, batches, n):
    """arccos(cos(h_l, h_{l+n})) / pi on the last token, mean over sequences: (n_layers - n + 1,) [Gromov §3.2]."""
    total, count = 0, 0
    for tokens in batches:
        last = torch.stack([h[:, -1] for h in model.residual_stream(tokens.to(model.device))])
        angles = cosine(last[:-n], last[n:]).clamp(-1, 1).arccos() / math.pi
        total, count = total + angles.sum(1), count + len(tokens)
    return processes.mean(total, count)


def weight_gradients(model, names, batches):
    """{name: G = dL/dW (m, n), fp32 at least} of the named matrices, by one backward sweep over the calibration set.

    names: "layers.22.attention.wq", dense matrices. L is the mean negative log-likelihood per predicted token, in nats.
    Only these matrices ask for gradients, so autograd stops at the lowest block that holds one. Each micro-batch's
    gradient of the SUMMED likelihood is added into a wide sum and freed at once, and the sum is divided at the end:
    gradients of half-precision weights do not underflow, and small ones are not lost. ValueError if one overflows.
    Of several processes each returns what its own batches add to G; processes.summed brings that together.
    """
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    sums = {name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}

    def add_into(total, w):  # in parts: on the CPU half precision is widened in a copy first
        for rows, grad in zip(*(processes.own(t).split(1024) for t in (total, w.grad))):
            rows.add_(grad)
        w.grad = None

    hooks = [w.register_post_accumulate_grad_hook(partial(add_into, sums[name])) for name, w in weights.items()]
    count = 0
    try:
        for tokens in batches:
            tokens = tokens.to(model.device)
            backward(model, tokens, tokens)
            count += tokens[:, 1:].numel()
    finally:
        for w, hook in zip(weights.values(), hooks):
            hook.remove()
            w.requires_grad_(False)
            w.grad = None
    count = processes.add_up(torch.tensor(count)).item()
    for name, total in sums.items():
        if processes.sharded(total):
            total *= processes.count()  # FSDP2 takes the mean over the processes
        if not finite(processes.own(total.div_(count))):
            raise ValueError(f"the gradient of {name} is not finite; try --dtype bfloat16 or float32")
    return sums


def backward(model, tokens, labels, scale=1.0):
    """Add d(scale * L)/dp to p.grad of every p that asks for it; returns L, the SUMMED negative log-likelihood (nats).

    tokens, labels (B, T): where they differ, labels hold -100, and what stands there is not predicted.
    """
    h = model.final_state(tokens)
    leaf, total = h.detach().requires_grad_(), 0
    for nll in model.losses(leaf, labels):  # the head's share of the gradient first, chunk by chunk ...
        (scale * nll).backward()
        total += nll.detach()
    h.backward(leaf.grad)                   # ... then the blocks', down to the lowest one asked for
    return total


def sweep_bytes(model, layer_ids, B, T):
    """{"weights", "gradients", "activations"}: bytes; their sum is the peak of weight_gradients over these layers.

    B sequences of T tokens a micro-batch; a model on the meta device counts as one on a GPU. No T x T probabilities are
    counted: fused attention keeps none. Torch 2.5 lacks it for grouped queries on the CPU. Of sharded weights only this
    process's rows count, and all of the largest matrix while it is used: as it comes and in its place, its gradient,
    and that widened.
    """
    a, s, wide, top = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize), model.args.n_layers - 1
    matrices = [p for layer in layer_ids for p in model.layers[layer].parameters() if p.ndim == 2]
    q, kv, norm = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, wide * (a.dim + 1)
    # What autograd keeps of a token, from the lowest layer up, whose first norm it does not see: both norms' widened
    # inputs and scales; q, the attention's output, k, v; w1 x, silu(w1 x), w3 x; the attention's log-sum-exps.
    block = 2 * norm + s * (2 * q + 2 * kv + 3 * a.hidden_dim) + wide * a.n_heads
    inputs = s * (2 * a.dim + a.hidden_dim)  # of a redundant layer's wq, wk, wv; w1, w3; w2 (wo's is there already)
    kept = B * T * (block * (top - min(layer_ids) + 1) - norm + inputs * len(layer_ids))
    # What comes on top of it at the moments that can be the peak, with the final state h and its gradient in each:
    h, hidden = B * T * s * a.dim, B * T * s * a.hidden_dim
    moments = (3 * h + min(model.head_chunk, B * T) * 2 * wide * a.vocab_size,  # a chunk's logits and log p
               2 * h + hidden * (2 if top in layer_ids else 3),  # the last SwiGLU's gradients; w2's input may be gone
               2 * h + hidden + s * max(p.numel() for p in matrices)  # the first of a matrix
               - B * T * block * (top - max(layer_ids)))
    weights, gradients = (sum(processes.own(p).numel() for p in parameters)
                          for parameters in (model.parameters(), matrices))
    use = max(p.numel() for p in matrices) * (3 * s + wide) if processes.sharded(matrices[0]) else 0
    return {"weights": s * weights, "gradients": wide * gradients, "activations": kept + max(moments) + use}


def svd(W):
    """U (m, r), S (r,) descending, Vh (r, n), in fp32 at least (there is no SVD in half precision).

    In fp32 by the eigenvectors of the smaller Gram matrix in fp64, W^T W = V S^2 V^T and U = W V / S: faster, and
    as exact as long as no singular value is below a millionth of the largest; then, and in fp64, LAPACK's own SVD.
    """
    W = upcast(W.detach())
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    if W.dtype == torch.float32:
        wide = tall.double()
        squares, V = torch.linalg.eigh(wide.mT @ wide)
        S, V = squares.flip(0).clamp(min=0).sqrt(), V.flip(1)
        if S[-1] > 1e-6 * S[0]:
            U, S, V = (t.float() for t in (wide @ V / S, S, V))
            return (U, S, V.mT) if tall is W else (V, S, U.mT)
    return torch.linalg.svd(W, full_matrices=False)


def sigma_gradients(U, G, Vh):
    """dL/d sigma_k = u_k^T G v_k for all k at once: (r,), i.e. the diagonal of U^T G V [GRASP §2.2, Eqs. 3-5]."""
    return (U * (G @ Vh.mT)).sum(0)


def importance(S, sigma_grad=None, score="taylor"):
    """The score of every component, (r,): `taylor` is I_k = |sigma_k dL/d sigma_k|, in fp64 [GRASP §2.2, Eq. 6].

    The first-order term of the whole group {u_k, sigma_k, v_k} is three times that (App. A.1): the same order.
    `gradient` is |dL/d sigma_k|; `magnitude` is sigma_k itself, plain SVD, and needs no gradient.
    """
    if score == "magnitude":
        return S
    return (S.double() * sigma_grad).abs() if score == "taylor" else sigma_grad.abs()


def rank_for_ratio(m, n, ratio):
    """k so that A (m, k) and B (k, n) hold at most `ratio` of the m n parameters, but at least 1 [GRASP §2.3]."""
    return max(1, math.floor(Fraction(str(ratio)) * m * n / (m + n)))  # exact: 0.29 * 100 is below 29 in floats


def rank_for_threshold(scores, threshold):
    """Size of the smallest set of components whose scores reach the share `threshold` of their sum (adaptive rank)."""
    shares = scores.double().sort(descending=True).values.cumsum(0)
    return int((shares < threshold * shares[-1]).sum()) + 1


def top_k(scores, k):
    """Indices (k,) of the k highest scores, of layers or components, ascending; of equal ones the earlier."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def low_rank_factors(U, S, Vh, kept):
    """A = U_K diag(sqrt S_K) (m, k) and B = diag(sqrt S_K) Vh_K (k, n), so that A B = sum over K of sigma u v^T."""
    root = S[kept].sqrt()
    return U[:, kept] * root, root[:, None] * Vh[kept]


def decompose(W, G, ratio, threshold, score):
    """[kept (k,), A (m, k), B (k, n)] of W (m, n): SVD, scores, top-k [GRASP §2.2-2.3]; [] where it stays dense.

    ValueError if a singular value or a score is beyond what its dtype can hold.
    """
    m, n = W.shape
    U, S, Vh = svd(W)
    scores = importance(S, None if G is None else sigma_gradients(U, G, Vh), score)
    if not (finite(S) and finite(scores)):
        raise ValueError(f"a matrix {m} x {n} has singular values or scores that are not finite; try --dtype float64")
    k = rank_for_threshold(scores, threshold) if threshold else rank_for_ratio(m, n, ratio)
    if k * (m + n) >= m * n:
        return []
    kept = top_k(scores, k)
    return [kept, *(factor.to(W.dtype) for factor in low_rank_factors(U, S, Vh, kept))]
