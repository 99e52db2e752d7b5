"""A baseline with a narrower residual stream, by PCA of the signals between the halves of the blocks.

    name        slicegpt
    paper       SliceGPT, arXiv 2401.15024, §3.3 and §3.4
    equation    Q from the eigenvectors of X^T X; D keeps the first d' of them; both are folded into the weights
    liberties   the widths, and the two ends where embeddings are tied, see `slicegpt`

    here     paper   shape        meaning
    signal   X_l     (N, dim)     the residual stream of all N calibration tokens, before a block's attention or its
                                  feed-forward (or the head): 2 n_layers + 1 of them
    width    d'                   channels kept of a signal
    cut      Q_l D   (dim, d')    its principal directions, orthonormal columns: x becomes cut^T x

A sliced model computes what the dense one would if each signal x were replaced by its projection cut cut^T x.
"""
import math
from bisect import bisect_right

import torch
import torch.nn.functional as F
from torch import nn

from extras.baselines import gram
from model import RMSNorm, rotations, upcast


def slicegpt(model, sweep, budget):
    """Slice every signal to about the same width and fold the cuts into the weights [§3.3 rotations, §3.4 slicing].

    Each signal is that of the model sliced so far, taken before its RMSNorm as in the authors' code (the paper's text:
    after it). The current signal of all calibration tokens stays in memory, N * dim numbers of the model's dtype. The
    residual path changes its basis twice a block, and these shortcut matrices count: at full width the model is LARGER
    than the dense one, and SmolLM2-135M (dim 576) has to be cut to 494 on average before it is smaller.
    Left out, as they change no result: the code's ridge on the moments (1 % of the mean diagonal; it moves no
    eigenvector) and its random rotation of what was kept.
    Liberties: (1) Widths are a multiple of 8, but the last signals get 8 channels more and one signal part of that, to
    meet the budget. (2) Tied embeddings would come apart if rotated, so there the first and the last signal keep all
    channels in their own basis: embeddings, final norm and head stay as they are. Untied, both are sliced as in §3.4
    (the code leaves the last one whole unless told otherwise).
    """
    return slice_to(model, sweep, widths_for(model, budget))


def widths_for(model, budget):
    """The widths of the 2 n_layers + 1 signals that remove `budget` parameters or the least possible more.

    ValueError if 8 channels everywhere remove less.
    """
    dim, tied = model.args.dim, model.tied
    count = 2 * model.args.n_layers + (-1 if tied else 1)  # signals to be sliced

    def widths(total):  # `total` channels dealt out to them
        eights, rest = divmod(total, 8 * count)
        wider, part = divmod(rest, 8)
        sliced = [8 * eights] * (count - wider - 1) + [8 * eights + part] + [8 * eights + 8] * wider
        return [dim, *sliced, dim] if tied else sliced

    totals = range(8 * count, dim // 8 * 8 * count + 1)
    fit = bisect_right(totals, model.n_params - budget, key=lambda total: sliced_params(model, widths(total)))
    if not fit:
        raise ValueError(f"cannot remove {budget:,} parameters: slices of 8 channels remove "
                         f"{model.n_params - sliced_params(model, widths(totals[0])):,} at most")
    return widths(totals[fit - 1])


def sliced_params(model, widths):
    """The parameters of the model sliced to these widths."""
    a = model.args
    q, kv, hidden = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, a.hidden_dim
    ends = a.vocab_size * (widths[0] + (0 if model.tied else widths[-1])) + widths[-1]
    return ends + sum(before * (q + 2 * kv + 1) + between * (q + 2 * hidden + 1) + after * hidden
                      + between * (before + after)  # the two shortcuts
                      for before, between, after in zip(widths[0::2], widths[1::2], widths[2::2]))


@torch.no_grad()
def slice_to(model, sweep, widths):
    """Slice the 2 n_layers + 1 signals to these widths, in place; with tied embeddings the two ends must be dim."""
    tied, whole = model.tied, torch.eye(model.args.dim, dtype=torch.float64, device=model.device)
    signal = [upcast(model.tok_embeddings(tokens.to(model.device))) for tokens in sweep("slicing")]
    before = whole if tied else principal_directions(signal, widths[0])
    if not tied:
        model.tok_embeddings = nn.Embedding.from_pretrained(
            (model.tok_embeddings.weight.double() @ before).to(model.dtype))
    for layer, block in enumerate(model.layers):
        def attend(x):
            return block.attention(block.attention_norm(x), rotations(model.args, x.shape[1], x.device))

        advance(signal, before, attend)
        between = principal_directions(signal, widths[2 * layer + 1])
        advance(signal, between, lambda x: block.feed_forward(block.ffn_norm(x)))
        last = layer == len(model.layers) - 1
        after = whole if tied and last else principal_directions(signal, widths[2 * layer + 2])
        model.layers[layer] = SlicedBlock(block, before, between, after)
        before = after
    if not tied:
        model.norm = narrow(model.norm, [model.output], before)
    return model


def principal_directions(signal, width):
    """The first `width` eigenvectors of sum x x^T, largest eigenvalue first: (dim, width) fp64 [§3.3].

    signal: a list of (B, T, dim).
    """
    moment = sum(gram(part.flatten(0, 1).double()) for part in signal)
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :width]


def advance(signal, cut, branch):
    """Replace each x (B, T, dim) of the signal by p + branch(p), where p = cut cut^T x is all that slicing leaves."""
    projection = cut @ cut.mT
    for i, x in enumerate(signal):  # one at a time: two whole signals are never held
        wide = upcast(x)
        p = (wide @ projection.to(wide.dtype)).type_as(x)
        signal[i] = p + branch(p)


class SlicedBlock(nn.Module):
    """A dense block made to read and write cut signals: (B, T, d' before) -> (B, T, d' after)."""
    def __init__(self, block, before, between, after):
        super().__init__()
        self.attention, self.feed_forward, dtype = block.attention, block.feed_forward, block.ffn_norm.weight.dtype
        att, ffn = self.attention, self.feed_forward
        self.attention_norm = narrow(block.attention_norm, [att.wq, att.wk, att.wv], before)
        self.ffn_norm = narrow(block.ffn_norm, [ffn.w1, ffn.w3], between)
        put(att.wo, between.mT @ att.wo.weight.double())
        put(ffn.w2, after.mT @ ffn.w2.weight.double())
        self.attention_shortcut = nn.Parameter((between.mT @ before).to(dtype), requires_grad=False)
        self.ffn_shortcut = nn.Parameter((after.mT @ between).to(dtype), requires_grad=False)

    def forward(self, h, rotary):
        h = F.linear(h, upcast(self.attention_shortcut)) + self.attention(self.attention_norm(h), rotary)
        return F.linear(h, upcast(self.ffn_shortcut)) + self.feed_forward(self.ffn_norm(h))


def narrow(norm, readers, cut):
    """The RMSNorm of a cut signal; cut and gain go into the linear layers that read from it [§3.1, §3.2].

    The mean of squares is still over dim = d channels, of which d' are left and the others zero:
    x / sqrt(sum x^2 / d + eps) = sqrt(d / d') x / sqrt(sum x^2 / d' + eps d / d').
    """
    d, width = cut.shape
    for linear in readers:  # sqrt(d / d') too: as a gain in bf16 it would be off by one and the same error everywhere
        put(linear, linear.weight.double() * norm.weight.double() @ cut * math.sqrt(d / width))
    return RMSNorm(width, norm.eps * d / width).to(norm.weight).requires_grad_(False)


def put(linear, weight):
    """Give a linear layer a weight of another size, in the dtype of its own."""
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
