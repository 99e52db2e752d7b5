"""Beyond the paper: the price of every component, by the second-order term that GRASP's Eq. 5 leaves out.

    python -m extras.fisher --ckpt FOLDER --budget 0.2

GRASP ranks a component by the first-order change of the loss. At a trained model that term is small and of either sign.
The second-order term is the one that grows. Two moments per matrix y = W x estimate it [K-FAC: arXiv 1503.05671, §3]:

    C            E[x x^T]      (n, n)    x: the matrix's inputs, over all calibration tokens
    H            E[d d^T]      (m, m)    d: dL/dy, L the summed negative log-likelihood (nats) of next tokens that the
                                         model itself draws: its Fisher information
    cost of dW   tr(H dW C dW^T)         estimates twice the second-order change of the loss (nats per token)

Assumptions: x and d are independent, and tokens are uncorrelated. A channel's cost is corrected for the first, by the
exact E[(x_c w_c^T d)^2], w_c its column of w2. All costs have one unit, so one ranking of cost per parameter
distributes the budget over the whole model. A component is a singular component of a matrix or, in an MLP, a channel:
row c of w1 and w3, column c of w2. At the end w2 is fitted once more, to the dense model's residual stream (refit.py).

Published before or beside it: the basis that both moments make (GFWSVD, arXiv 2505.17974; OBD-LLM, 2604.00821, at equal
ranks; IO-SVD, 2605.15626, with one first-order ranking), and rows and columns pruned by K-FAC (LLM Surgeon, 2312.17244).
New here is one price for singular components and channels, in one ranking.
"""
from attribution import importance, sigma_gradients, top_k, weight_gradients
from extras import keep, shared_copy
from extras.baselines import keep_channels, uniform_ranks
from extras.fisher.moments import second_moments
from extras.fisher.prices import DAMPING, channel_costs, components
from extras.fisher.ranking import component_size, global_ranks
from extras.fisher.refit import refit
from model import matrix_names

BASES = ("plain", "whitened", "kfac")


def compress(model, sweep, budget, layers=None, basis="kfac", allocate="global", score="magnitude", channels=True):
    """Remove `budget` parameters from the blocks `layers` (None: all), in place: {name: kept (k,)} of what was changed.

    basis: see `components`. score: as in grasp.py; with `magnitude`, sigma^2 is what a component costs in that basis.
    allocate: `global`, one ranking, or `ratio`, the same share of every matrix. channels: an MLP, under the name
    "layers.3.feed_forward", loses channels, else its three matrices become low-rank too. Holds the fp32 moments of all
    these blocks (1 GB for each of LLaMA-2-7B's, 2 GB without channels), and the dense weights to the end. ValueError if
    there is less to remove.
    """
    if channels and (basis, allocate, score) != ("kfac", "global", "magnitude"):
        raise ValueError("MLPs by channels need basis kfac, allocation global and score magnitude; got "
                         f"{basis}, {allocate}, {score}")
    names = matrix_names(*range(len(model.layers)) if layers is None else layers)
    if channels:  # rows of w1 and w3 go with their channel, whose cost is counted at w2
        names = [name for name in names if not name.endswith((".w1", ".w3"))]
    moments = second_moments(model, names, sweep("second moments"), basis, channels) if basis != "plain" else {}
    G = weight_gradients(model, names, sweep("attribution")) if score != "magnitude" else {}

    def decomposed(name):
        U, S, Vh = components(model.get_submodule(name).weight, *moments.get(name, ()))
        return (U, S, Vh), importance(S, sigma_gradients(U, G[name], Vh) if G else None, score)

    def cost(name):
        if channels and name.endswith(".w2"):
            return channel_costs(model.get_submodule(name).weight, *moments[name])
        scores = decomposed(name)[1]
        return scores ** 2 if score == "magnitude" else scores

    if allocate == "global":  # costs alone are held; U and Vh, too large for that, are taken again
        costs = {name: cost(name) for name in names}
        ranks = global_ranks(costs, {name: component_size(model, name, channels) for name in names}, budget)
    else:
        ranks = uniform_ranks(model, names, budget)
    changed, dense = {}, shared_copy(model) if channels else None
    for name, k in ((name, k) for name, k in ranks.items() if k):
        if channels and name.endswith(".w2"):
            kept, C, name = top_k(costs[name], k), moments[name][0], name.removesuffix(".w2")
            keep_channels(model, name, kept, C, DAMPING)
        else:
            usv, scores = decomposed(name)
            kept = top_k(scores, k)
            keep(model, name, usv, kept)
        changed[name] = kept.tolist()
    if channels:
        moments.clear()  # make room for the streams
        refit(model, dense, sweep("embeddings"))
    return changed
