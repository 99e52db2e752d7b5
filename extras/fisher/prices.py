"""What the components of a matrix and the channels of an MLP cost."""
import math

import torch

from attribution import svd
from extras.baselines import damped
from model import upcast

DAMPING = 0.1  # fraction of the mean diagonal of C and of H that is added to it


def components(W, C=None, H=None):
    """U (m, r), S (r,) descending, Vh (r, n) with W = U diag(S) Vh, fp32 at least, in the basis that C and H make.

    plain     C, H None: the SVD; the sigma^2 dropped sum up to |W - A B|^2
    whitened  C = L L^T: W L = U S V^T, Vh = V^T L^-1; they sum up to E|y - A B x|^2 [SVD-LLM, arXiv 2403.07378, §3.1]
    kfac      H = M M^T too: M^T W L = U' S V^T, U = M^-T U'; they sum up to the cost tr(H dW C dW^T)

    C and H are damped here. U and Vh are not orthonormal then, but what attribution.py does with them holds: A B = sum
    of sigma u v^T over the kept, and dL/d sigma_k = u_k^T G v_k.
    """
    W = upcast(W.detach())
    L, M = (None if moment is None else torch.linalg.cholesky(damped(moment, DAMPING)).to(W.dtype) for moment in (C, H))
    X = W if L is None else W @ L
    U, S, Vh = svd(X if M is None else M.mT @ X)
    return (U if M is None else torch.linalg.solve_triangular(M.mT, U, upper=True), S,
            Vh if L is None else torch.linalg.solve_triangular(L, Vh, upper=False, left=False))


def channel_costs(W, C, H, gates=None, rounds=16):
    """What it costs to remove each input channel of w2, (n,) fp64. The other columns of W = w2 (m, n) are refitted.

    Optimal brain surgeon [Hassibi and Stork 1993], a sixteenth of the channels at a time. Of those left, channels R
    cost tr(H W_R P^-1 W_R^T), P = (C^-1)_RR, if the rest of W is chosen anew by least squares; one alone costs
    w_c^T H w_c / P_cc, by which each round takes the cheapest. A channel of a later round is given no lower cost than
    one of an earlier round.

    gates (n,): E[(x_c w_c^T d)^2], exact. C and H, taken for independent, estimate it by C_cc w_c^T H w_c. At the end
    each cost is multiplied by gates / estimate. None: costs stay as C and H give them. The estimate's C is not damped:
    damping makes channels of small inputs dearer.
    """
    W, inverse, H = W.double(), torch.linalg.inv(damped(C, DAMPING)), damped(H, DAMPING)
    missed = 1 if gates is None else gates / (C.diagonal() * (W * (H @ W)).sum(0)).clamp(min=1e-300)
    m, n = W.shape
    costs, left, least = torch.zeros_like(W[0]), torch.arange(n, device=W.device), 0.0
    rounds = min(rounds, n)
    for i in range(rounds):
        alone = (W * (H @ W)).sum(0) / inverse.diagonal()
        order = alone.argsort()
        gone, stay = order.tensor_split([math.ceil(len(left) / (rounds - i))])
        solved = torch.linalg.solve(inverse[gone][:, gone], torch.cat([W[:, gone].mT, inverse[gone][:, stay]], 1))
        together = ((H @ W[:, gone]) * solved[:, :m].mT).sum()
        share = alone[gone] / alone[gone].sum().clamp(min=1e-300)  # dead channels cost nothing, not 0 / 0
        costs[left[gone]] = (share * together).clamp(min=least)
        least = costs[left[gone[-1]]]
        W, inverse = (X[:, stay] - X[:, gone] @ solved[:, m:] for X in (W, inverse))
        inverse, left = inverse[stay], left[stay]
    return costs * missed
