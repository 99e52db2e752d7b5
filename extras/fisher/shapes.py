"""Shapes that other tools load: MLPs lose channels and attention stays as it is.

    widths   each MLP has a width of its own, a multiple of `multiple`
    llama    all MLPs have one width, and whole layers may go: a plain, smaller LLaMA

A whole layer costs what is lost if the outputs of its wo and of its w2 become zero, tr(H W C W^T) each. That price is
rougher than a channel's, so `llama` builds the cheapest shapes and takes the one with the lowest perplexity.
"""
from dataclasses import replace

import torch
from torch import nn

from attribution import top_k
from evaluate import perplexity
from extras import shared_copy
from extras.baselines import block_params, keep_channels
from extras.fisher.moments import second_moments
from extras.fisher.prices import DAMPING, channel_costs
from extras.fisher.ranking import global_ranks
from extras.fisher.refit import refit

TRIED = 3  # how many of the cheapest shapes are built


def widths(model, sweep, budget, layers=None, multiple=64):
    """Remove at least `budget` parameters from the MLPs of `layers` (None: all), in place: {name: kept channels (k,)}.

    One ranking of groups of `multiple` channels. Holds the fp32 moments of all these MLPs: 0.6 GB for each of
    LLaMA-2-7B's. ValueError if there is less to remove.
    """
    names = [f"layers.{i}.feed_forward" for i in (range(len(model.layers)) if layers is None else layers)]
    channel, hidden = 3 * model.args.dim, model.args.hidden_dim
    if budget > (most := len(names) * channel * max(0, hidden - multiple)):
        raise ValueError(f"cannot remove {budget:,} parameters: {most:,} at most, by MLPs of {multiple} channels")
    moments = second_moments(model, [f"{name}.w2" for name in names], sweep("second moments"), channels=True)
    costs = {name: channel_costs(model.get_submodule(f"{name}.w2").weight, *moments[f"{name}.w2"]) for name in names}
    groups = {name: torch.stack([group.sum() for group in cost.sort(descending=True).values.split(multiple)])
              for name, cost in costs.items()}
    sizes = dict.fromkeys(names, (channel * multiple, channel * hidden))
    changed, dense = {}, shared_copy(model)
    for name, k in global_ranks(groups, sizes, budget).items():
        if k:
            kept = top_k(costs[name], k * multiple)
            keep_channels(model, name, kept, moments[f"{name}.w2"][0], DAMPING)
            changed[name] = kept.tolist()
    refit(model, dense, sweep("refit"))
    return changed


def llama(model, sweep, budget, batches=None, multiple=64):
    """Make a plain LLaMA with at least `budget` parameters less, in place: ({name: kept channels}, ids of lost layers).

    batches: a list of (B, T) int64, on which the shapes are compared; None takes the sweeps' own. The names are those
    of the dense model. Holds the fp32 moments of all layers, 0.7 GB for each of LLaMA-2-7B's, and one shape's MLPs.
    ValueError if there is less to remove.
    """
    dense, hidden = range(len(model.layers)), model.args.hidden_dim
    cheapest_shapes(torch.zeros(len(dense), hidden), torch.zeros(len(dense)), model, budget, multiple)  # is there one?
    wo, w2 = ([f"layers.{i}.{matrix}" for i in dense] for matrix in ("attention.wo", "feed_forward.w2"))
    moments = second_moments(model, wo + w2, sweep("second moments"), channels=True)
    whole = torch.stack([sum(output_cost(model, name, moments) for name in names) for names in zip(wo, w2)])
    costs = torch.stack([channel_costs(model.get_submodule(name).weight, *moments[name]) for name in w2])

    def cut(model, width, lost):
        kept = {f"layers.{i}.feed_forward": top_k(costs[i], width) for i in dense if i not in lost}
        for name, channels in kept.items():
            keep_channels(model, name, channels, moments[f"{name}.w2"][0], DAMPING)
        model.layers = nn.ModuleList(block for i, block in enumerate(model.layers) if i not in lost)
        model.args = replace(model.args, hidden_dim=width, n_layers=len(model.layers))
        return model, kept

    shapes = cheapest_shapes(costs, whole, model, budget, multiple)[:TRIED]
    losses = []
    for shape in shapes:
        copy = shared_copy(model)
        losses.append(perplexity(cut(copy, *shape)[0], batches or sweep("shapes")))
        del copy
    for (width, lost), loss in zip(shapes, losses):
        print(f"width {width:,}, {len(dense) - len(lost)} layers: perplexity {loss:.2f} on "
              f"{'other windows of ' * bool(batches)}the calibration text")
    width, lost = shapes[losses.index(min(losses))]
    original, (_, kept) = shared_copy(model), cut(model, width, lost)
    refit(model, original, sweep("refit"), lost)
    return {name: channels.tolist() for name, channels in kept.items()}, lost


def output_cost(model, name, moments):
    """What is lost, by the moments, if the output of the matrix `name` becomes zero: tr(H W C W^T)."""
    C, H, *_ = moments[name]
    W = model.get_submodule(name).weight.type_as(C)
    return torch.sum(H @ W * (W @ C)).double()


def cheapest_shapes(costs, whole, model, budget, multiple):
    """[(width, ids of the layers that go)] that remove at least `budget` parameters, the cheapest first.

    costs: (n_layers, hidden_dim), of each channel. whole: (n_layers,), of each layer.
    """
    n, hidden = costs.shape
    kept = costs.sort(1, descending=True).values.cumsum(1)
    narrower = kept[:, -1:] - torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)  # [l, w]: of leaving w channels in l
    layer, channel, shapes = block_params(model), 3 * model.args.dim, []
    for count in range(n):
        left = max(0, budget - count * layer)
        width = (hidden - -(-left // (channel * (n - count)))) // multiple * multiple if left else hidden
        if width > 0:
            instead = whole - narrower[:, width]  # what a layer costs beyond its own channels
            lost = instead.argsort()[:count].tolist()
            shapes.append((float(narrower[:, width].sum() + instead[lost].sum()), width, sorted(lost)))
        if not left:
            break
    if not shapes:
        raise ValueError(f"cannot remove {budget:,} parameters with MLPs of at least {multiple} channels")
    return [shape for _, *shape in sorted(shapes)]
