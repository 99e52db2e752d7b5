"""Baselines that take out a run of n neighbouring blocks and mend the cut by a linear map. No training.

    name        linearpatch
    paper       LinearPatch, arXiv 2505.24680
    equation    h <- H diag(d) H^T h at the cut: each channel of a Hadamard basis gets its mean size after the run
    liberties   means, cosine, dtype and H, see `linearpatch`; without its fine-tuning

    name        replaceme
    paper       ReplaceMe, arXiv 2505.02819
    equation    least squares from the feed-forward before the cut to the run's last state
    liberties   a small ridge; its other objective, a cosine, is left out

    here          the papers      shape            meaning
    i, j          l*, l* + n                       the run is blocks i .. j - 1; block j is the first after the cut
    h_i, h_j      X^(l)           (B, T, dim)      residual stream before block i and before block j
    H             H               (dim, dim)       orthonormal Hadamard matrix, entries +-1 / sqrt(dim)
    A, M          M, T            (tokens, dim)    block i - 1's feed-forward output; (dim, dim) its linear map

Both runs begin after block 0 and end before the last block: LinearPatch's code looks no further, and ReplaceMe needs a
block before the cut.
"""
import math
from collections import deque
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from attribution import cosine
from extras.baselines import check_blocks, watch_inputs
from extras.controls import drop_layers
from model import upcast


class Patch(nn.Module):
    """h -> P h at every token, in the place of the blocks that are gone; P (dim, dim)."""
    def __init__(self, P):
        super().__init__()
        self.P = nn.Parameter(P, requires_grad=False)

    def forward(self, h, rotary=None):
        return F.linear(h, upcast(self.P))


@torch.no_grad()
def linearpatch(model, sweep, n):
    """Take out the run of n blocks whose ends have the highest cosine, and patch the cut [LinearPatch].

    d_c = mean |h_j H|_c / mean |h_i H|_c for each channel c. The product is a dense matrix of dim^2 parameters, which
    count, as in its code.

    Liberties: the means are over all tokens before the one division (its code averages the ratios of single
    sequences); the cosine is that of a token's two states (its code's, with dim=1, is that of a channel over the
    tokens); the matrix has the model's dtype (there fp32); H is another for sizes that are no power of two.
    args.n_layers counts the blocks, not the patch.
    """
    check_blocks(model, n, spared=2)
    H = hadamard(model.args.dim).to(model.device)
    i = 1 + int(run_cosines(model, sweep("cosines of runs"), n)[1:-1].argmax())
    before, after = rotated_magnitudes(model, sweep("magnitudes"), H, i, i + n)
    P = H * (after / before) @ H.T
    drop_layers(model, range(i, i + n))
    model.layers.insert(i, Patch(P.to(model.dtype)))
    return model


@torch.no_grad()
def replaceme(model, sweep, n, alpha=1e-6):
    """Take out the run of n blocks whose ends have the smallest angle, and fit the block before it [ReplaceMe].

    M = (A^T A + alpha s I)^-1 A^T (h_j + A - h_i), rows are tokens, so that block i - 1 gives (h_i - A) + A M, which is
    near h_j. w2 <- M^T w2 takes it in and costs no parameter. Sums and solution are fp64. s is the mean diagonal of
    A^T A, so that alpha means the same whatever the size of A and the number of tokens. The released settings have
    alpha = 0, which needs at least dim tokens; ours only keeps the system solvable. As in its code the angle is the
    last token's.
    """
    check_blocks(model, n, spared=2)
    i = 1 + int(angular_distances(model, sweep("angular distances"), n)[1:-1].argmin())
    AtA, AtY = normal_equations(model, sweep("normal equations"), i, i + n)
    M = torch.linalg.solve(AtA + alpha * AtA.diagonal().mean() * torch.eye(len(AtA)).to(AtA), AtY)
    w2 = model.layers[i - 1].feed_forward.w2
    w2.weight.data = (M.T @ w2.weight.double()).to(model.dtype)
    drop_layers(model, range(i, i + n))
    return model


@torch.no_grad()
def run_cosines(model, batches, n):
    """Mean over all tokens of cos(h_i, h_{i+n}), the ends of every run of n blocks: (n_layers - n + 1,) fp64."""
    total, count = 0, 0
    for tokens in batches:
        states, cosines = deque(maxlen=n + 1), []
        for h in model.residual_stream(tokens.to(model.device)):
            states.append(h)
            if len(states) > n:
                cosines.append(cosine(states[0], states[-1]).sum())
        total, count = total + torch.stack(cosines), count + tokens.numel()
    return (total / count).cpu()


@torch.no_grad()
def angular_distances(model, batches, n):
    """arccos(cos(h_l, h_{l+n})) / pi, on the last tokens: (n_layers - n + 1,) fp64 [arXiv 2403.17887 §3.2]."""
    total, count = 0, 0
    for tokens in batches:
        last = torch.stack([h[:, -1].clone() for h in model.residual_stream(tokens.to(model.device))])
        total = total + cosine(last[:-n], last[n:]).clamp(-1, 1).arccos().sum(1) / math.pi
        count += len(tokens)
    if not count:
        raise ValueError("no batches of tokens: the sweep is empty or used up")
    return (total / count).cpu()


def run_ends(model, tokens, i, j):
    """[h_i, h_j], each (B, T, dim); the blocks from j on are not computed."""
    states = islice(model.residual_stream(tokens.to(model.device)), j + 1)
    return [h for layer, h in enumerate(states) if layer in (i, j)]


def rotated_magnitudes(model, batches, H, i, j):
    """Sum over all tokens of |h_i H| and of |h_j H|, channel by channel: (2, dim) fp64."""
    return sum((torch.stack(run_ends(model, tokens, i, j)).to(H) @ H).abs().sum((1, 2)) for tokens in batches)


def normal_equations(model, batches, i, j):
    """A^T A and A^T (h_j + A - h_i) over all tokens: (dim, dim) each, fp64. No activation outlives its batch."""
    AtA, AtY, inputs, name = 0, 0, {}, f"layers.{i - 1}.feed_forward.w2"
    w2 = model.get_submodule(name).weight
    with watch_inputs(model, [name], inputs.__setitem__):
        for tokens in batches:
            h_i, h_j = (h.flatten(0, 1).double() for h in run_ends(model, tokens, i, j))
            A = F.linear(inputs.pop(name), w2).double()
            AtA, AtY = AtA + A.T @ A, AtY + A.T @ (h_j + A - h_i)
    return AtA, AtY


def hadamard(n):
    """H (n, n) fp64 on the CPU with H H^T = I and entries +-1 / sqrt(n). ValueError where we know of none.

    H_n = H_2 (x) H_{n/2} [Sylvester] down to 1 or to the smallest order whose predecessor is a prime [Paley]: 4096 is
    2^12, 576 is 2^3 72, 3584 is 2^4 224. Orders of prime powers are left out: no LLaMA we know of needs them.
    """
    powers = n & -n  # the largest power of two that divides n
    orders = [n // powers << k for k in range(powers.bit_length())]
    core = next((order for order in orders if order == 1 or order % 4 == 0 and is_prime(order - 1)), None)
    if core is None:
        raise ValueError(f"no Hadamard matrix for dim {n}: none of {orders} is 1, or 4 k with 4 k - 1 a prime")
    H = paley(core - 1) if core > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.kron(H.new_tensor([[1, 1], [1, -1]]), H)
    return H / math.sqrt(n)


def paley(q):
    """I + S (q + 1, q + 1), entries +-1, rows orthogonal, q = 4 k - 1 a prime: S is skew, its core chi(a - b)."""
    a = torch.arange(q)
    chi = -torch.ones(q, dtype=torch.float64)  # is it a square modulo q: 1 yes, -1 no, 0 for 0
    chi[a ** 2 % q] = 1
    chi[0] = 0
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, chi[(a[:, None] - a) % q]
    return torch.eye(q + 1) + S


def is_prime(q):
    return all(q % p for p in range(2, math.isqrt(q) + 1))
