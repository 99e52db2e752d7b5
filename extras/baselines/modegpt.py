"""A baseline that shrinks the inner dimension of three pairs of matrices in every block.

    name        modegpt
    paper       MoDeGPT, arXiv 2408.09632
    equation    MLP (Nystroem): the channels of highest ridge leverage diag(C2 (C2 + lambda I)^-1) stay, w2 is refitted;
                query-key (CR): the rotary pairs of highest |q_i| |k_i| stay;
                value-output (SVD): of [wo_h] wv L = U S Vh, L L^T = C1, the k largest;
                sparsity of block l: proportional to softmax(-s_l / epsilon), s_l its Block Influence, at most 1
    liberties   lambda is 1 % of C2's mean diagonal, in the refit too (the paper: 1, with C2 a sum over all tokens);
                epsilon is 0.03 (of 0.03, 0.05 and 0.1 the best on held-out training text of SmolLM2); the query heads
                of one key/value head share one SVD of all their products; the common calibration set

    C1, C2   sums of x x^T over the calibration tokens: x the inputs of wq, wk, wv (dim, dim); of w2 (hidden, hidden)
    group    query heads that share a key/value head
"""
import math

import torch
from torch import nn

from attribution import top_k
from extras import linear
from extras.baselines import damped, gram, input_sums, keep_channels
from extras.baselines.decomposition import triangular
from grasp import find_redundant
from model import apply_rotary, attend

DAMPING = 0.01  # fraction of the mean diagonal of C2 that is added to it
MOMENTS = ("attention.wq", "feed_forward.w2")  # whose inputs' C1 and C2 are taken


class NarrowAttention(nn.Module):
    """Attention whose heads keep some rotary pairs and a narrower value: (B, T, dim) -> (B, T, dim).

    pairs: (n_kv_heads, p) indices of the pairs that each key/value head and its queries keep. wq is scaled so that
    attend's 1 / sqrt(2p) stands for the dense model's 1 / sqrt(head_dim).
    """
    def __init__(self, wq, wk, wv, wo, pairs, head_dim):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = map(linear, (wq * math.sqrt(2 * pairs.shape[1] / head_dim), wk, wv, wo))
        self.register_buffer("pairs", pairs)

    def forward(self, x, rotary):
        heads, p = self.pairs.shape
        q, k = (w(x).unflatten(-1, (-1, 2 * p)) for w in (self.wq, self.wk))
        q, k = (apply_rotary(t, rotary[:, 0, self.pairs].repeat_interleave(t.shape[2] // heads, 1)) for t in (q, k))
        v = self.wv(x).unflatten(-1, (heads, -1))
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)))  # (B, n_heads, T, width of a value)
        return self.wo(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def modegpt(model, sweep, budget, epsilon=0.03):
    """Remove `budget` parameters from the model, in place, and return it. ValueError if there is less to remove."""
    names = [f"layers.{i}.{matrix}" for i in range(len(model.layers)) for matrix in MOMENTS]
    with input_sums(model, names, lambda x: gram(x.double())) as sums:
        c, _ = find_redundant(model, sweep, 1, all_sequences=True)
    shares = torch.softmax((c.mean(1) - 1) / epsilon, 0)
    for layer, (pairs, width, channels) in enumerate(sizes_for(model, shares, budget)):
        block, (C1, C2) = model.layers[layer], (sums[f"layers.{layer}.{matrix}"] for matrix in MOMENTS)
        block.attention = narrow_attention(block.attention, C1, pairs, width, model.args)
        leverage = 1 - torch.linalg.inv(damped(C2, DAMPING)).diagonal()  # without the factor lambda: the order is the same
        keep_channels(model, f"layers.{layer}.feed_forward", top_k(leverage, channels), C2, DAMPING)
    return model


def sizes_for(model, shares, budget):
    """[(rotary pairs of a head, width of its value, channels)] of each block, that remove at least `budget` parameters.

    shares (n_layers,): sparsities up to a common factor, the least one that meets the budget. Then the blocks get
    channels back, one each in turn, until less than a channel is removed beyond the budget.
    """
    a, channel = model.args, 3 * model.args.dim

    def sizes(factor):
        return [[max(1, round(left * whole)) for whole in (a.head_dim // 2, a.head_dim, a.hidden_dim)]
                for left in (1 - factor * shares).tolist()]

    def removed(factor):
        heads = a.dim * (a.n_heads + a.n_kv_heads)
        return sum(heads * (2 * a.head_dim - 2 * pairs - width) + channel * (a.hidden_dim - channels)
                   for pairs, width, channels in sizes(factor))

    low, high = 0.0, 1 / float(shares.min())
    if removed(high) < budget:
        raise ValueError(f"cannot remove {budget:,} parameters: {removed(high):,} at most")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= budget else (middle, high)
    found, over = sizes(high), removed(high) - budget
    while over >= channel and any(size[2] < a.hidden_dim for size in found):
        for size in found:
            if over >= channel and size[2] < a.hidden_dim:
                size[2], over = size[2] + 1, over - channel
    return found


def narrow_attention(attention, C, pairs, width, args):
    """The Attention with `pairs` rotary pairs and `width` numbers of its values left in each head."""
    wq, wk, wv, wo = (getattr(attention, name).weight for name in ("wq", "wk", "wv", "wo"))
    kept = strongest_pairs(wq.double(), wk.double(), C, pairs, args)
    values, outputs = low_rank_values(wv.double(), wo.double(), C, width, args)

    def rows(w):
        w = w.view(args.n_kv_heads, -1, args.head_dim // 2, 2, args.dim)  # key/value head, its group, pair
        return w[torch.arange(len(w))[:, None], :, kept].transpose(1, 2).flatten(0, 3)

    return NarrowAttention(rows(wq), rows(wk), values.to(wv), outputs.to(wo), kept, args.head_dim)


def strongest_pairs(wq, wk, C, count, args):
    """Indices (n_kv_heads, count) of the rotary pairs of highest |q_i| |k_i|, norms over tokens and the group.

    The norm of a pair does not change when the pair is turned, so no position is needed.
    """
    def squares(w):
        return (w @ C * w).sum(1).view(args.n_kv_heads, -1, args.head_dim // 2, 2).sum((1, 3))

    return (squares(wq) * squares(wk)).topk(count).indices


def low_rank_values(wv, wo, C, width, args):
    """wv and wo whose product is that of rank `width`, for each key/value head, with the least error on its inputs.

    A head's product is P = [wo of its queries, one below the other] wv. With P L = U S Vh, C = L L^T, it is
    U_k (U_k^T P): the values become U_k^T P x, and nothing is divided by L or S.
    """
    L, values, outputs = triangular(C), [], []
    heads = wo.view(args.dim, args.n_kv_heads, -1, args.head_dim)  # (dim, key/value head, group, head_dim)
    for v, o in zip(wv.view(args.n_kv_heads, args.head_dim, -1), heads.unbind(1)):
        Q, R = torch.linalg.qr(o.transpose(0, 1).flatten(0, 1))  # P = Q R wv
        U = torch.linalg.svd(R @ v @ L, full_matrices=False)[0][:, :width]
        values.append(U.mT @ R @ v)
        outputs.append((Q @ U).view(-1, args.dim, width).transpose(0, 1).flatten(1))
    return torch.cat(values), torch.cat(outputs, 1)
