"""One ranking of cost per parameter for the whole model."""
import math

import torch


def global_ranks(costs, sizes, budget):
    """{name: how many components stay, None for all}: remove `budget` parameters where that costs least.

    costs: {name: (r,)}, of losing each component; sizes: {name: (parameters of a component, of the whole as it is)}.
    One ranking of cost per parameter. Of a matrix, the first components dropped remove nothing: it enters the ranking
    by the rank whose mean cost per parameter removed is least, and goes on from there component by component.
    ValueError if there is less to remove.
    """
    ranking = []
    for name, cost in costs.items():
        cost, (size, whole) = cost.double().sort(descending=True).values.cpu(), sizes[name]
        removed = whole - size * torch.arange(1, len(cost) + 1)  # where 1, 2 ... components stay
        dropped = cost.flip(0).cumsum(0).flip(0) - cost
        rates = (dropped / removed).where(removed > 0, math.inf)
        if rates.min() == math.inf:  # no rank makes it smaller
            continue
        k = int((rates <= rates.min() * (1 + 1e-9)).nonzero()[-1]) + 1  # of equal ones the smallest step
        ranking.append((float(rates[k - 1]), name, k, True))
        ranking += [(float(cost[i]) / size, name, i, False) for i in range(k - 1, 0, -1)]
    ranking.sort(key=lambda step: step[0])
    ranks, left = dict.fromkeys(costs), budget

    def take(name, k):
        size, whole = sizes[name]
        gain = (ranks[name] * size if ranks[name] else whole) - k * size
        ranks[name] = k
        return left - gain

    for _, name, k, first in ranking:  # an entry far beyond the budget is passed over, ...
        size, whole = sizes[name]
        if left > 0 and (whole - k * size < left + size if first else ranks[name]):
            left = take(name, k)
    for _, name, k, first in ranking:  # ... and cut short if it takes that to meet it
        size, whole = sizes[name]
        if left > 0 and first and not ranks[name]:
            left = take(name, max(k, (whole - left) // size))
    if left > 0:
        raise ValueError(f"cannot remove {budget:,} parameters: {budget - left:,} at most")
    return ranks


def component_size(model, name, channels):
    """(parameters of a component, of all that it is a part of): of a matrix (m, n), or an MLP at its w2 (dim, n)."""
    m, n = model.get_submodule(name).weight.shape
    return (3 * m, 3 * m * n) if channels and name.endswith(".w2") else (m + n, m * n)
