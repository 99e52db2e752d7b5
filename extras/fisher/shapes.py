"""Shapes that other tools load: MLPs lose channels, and attention stays as it is."""
from dataclasses import replace

import torch

from attribution import top_k
from extras import shared_copy
from extras.baselines import keep_channels
from extras.fisher.moments import second_moments
from extras.fisher.prices import DAMPING, channel_costs
from extras.fisher.ranking import global_ranks
from extras.fisher.refit import refit


def widths(model, sweep, budget, layers=None, multiple=64, equal=False):
    """Remove at least `budget` parameters from the MLPs of `layers` (None: all), in place: {name: kept channels (k,)}.

    Each MLP has a width of its own, by one ranking of groups of `multiple` channels. equal: all have one width, a
    multiple of `multiple`: a plain, smaller LLaMA. Holds the fp32 moments of all these MLPs (0.6 GB for each of
    LLaMA-2-7B's), and the dense weights to the end. ValueError if there is less to remove.
    """
    assert layers is None or not equal
    names = [f"layers.{i}.feed_forward" for i in (range(len(model.layers)) if layers is None else layers)]
    channel, hidden = 3 * model.args.dim, model.args.hidden_dim
    if budget > (most := len(names) * channel * max(0, hidden - multiple)):
        raise ValueError(f"cannot remove {budget:,} parameters: {most:,} at most, by MLPs of {multiple} channels")
    moments = second_moments(model, [f"{name}.w2" for name in names], sweep("second moments"), channels=True)
    costs = {name: channel_costs(model.get_submodule(f"{name}.w2").weight, *moments[f"{name}.w2"]) for name in names}
    if equal:
        left = hidden - -(-budget // (channel * len(names)))
        found = dict.fromkeys(names, left // multiple * multiple)
    else:
        groups = {name: torch.stack([group.sum() for group in cost.sort(descending=True).values.split(multiple)])
                  for name, cost in costs.items()}
        ranks = global_ranks(groups, dict.fromkeys(names, (channel * multiple, channel * hidden)), budget)
        found = {name: k * multiple for name, k in ranks.items() if k}
    dense, kept = shared_copy(model), {name: top_k(costs[name], width) for name, width in found.items()}
    for name, channels in kept.items():
        keep_channels(model, name, channels, moments[f"{name}.w2"][0], DAMPING)
    if equal:
        model.args = replace(model.args, hidden_dim=found[names[0]])
    moments.clear()  # make room for the streams
    refit(model, dense, sweep("embeddings"))
    return {name: channels.tolist() for name, channels in kept.items()}
