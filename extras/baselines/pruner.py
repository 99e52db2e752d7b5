"""A baseline that prunes structures: whole heads and channels leave a block, and smaller dense matrices stay.

    name        llm_pruner
    paper       LLM-Pruner, arXiv 2305.11627, §3.2, block-wise, `param_first`
    equation    a group's importance is the sum of its |w dL/dw|
    liberties   the common calibration set (10 sequences of 64 tokens there); channels make up for the rounding of
                heads, which are few and large; no LoRA training afterwards

    half of a block   a group is                                    its rows of      its columns of
    attention         a key/value head with all its query heads     wq, wk, wv       wo
    feed_forward      a channel of the MLP                          w1, w3           w2

Nothing outside a group reads or feeds it, so it leaves whole.
"""
import math

import torch

from attribution import top_k, weight_gradients
from extras import linear
from model import matrix_names, upcast

# where a matrix is cut into its groups, which follow each other and are equally large: rows 0, columns 1
AXES = {"attention": {"wq": 0, "wk": 0, "wv": 0, "wo": 1}, "feed_forward": {"w1": 0, "w3": 0, "w2": 1}}


def llm_pruner(model, sweep, budget):
    """Of every block but the first and last ones, remove the same share of the groups: those of the lowest importance.

    Heads are compared with heads, and channels with channels. Holds the fp32 gradients of all pruned blocks.
    """
    blocks = pruned_blocks(len(model.layers))
    heads, channels = group_counts(model, budget, len(blocks))
    G = weight_gradients(model, matrix_names(*blocks), sweep("LLM-Pruner"))
    for layer, count in zip(blocks, channels):
        prune(model, f"layers.{layer}", "attention", G, model.args.n_kv_heads, heads)
        prune(model, f"layers.{layer}", "feed_forward", G, model.args.hidden_dim, count)
    return model


def pruned_blocks(n_layers):
    """All but the first eighth and the last sixteenth, rounded up: 4 to 29 of LLaMA-7B's 32, as in the scripts."""
    return range(math.ceil(n_layers / 8), n_layers - math.ceil(n_layers / 16))


def group_counts(model, budget, n_blocks):
    """(key/value heads to remove from each block, [MLP channels to remove from each]) that make up the budget.

    Heads: the share that the budget is of all pruned blocks, to the nearest whole head, one at least stays. Channels:
    the rest of the budget, over all blocks rounded up by one channel only, so that they differ by one at most.
    """
    block, n_kv_heads, hidden_dim = model.layers[0], model.args.n_kv_heads, model.args.hidden_dim
    attention, mlp = (sum(p.numel() for p in half.parameters()) for half in (block.attention, block.feed_forward))
    head, channel = attention // n_kv_heads, mlp // hidden_dim
    most = n_blocks * ((n_kv_heads - 1) * head + (hidden_dim - 1) * channel)
    if budget > most:
        raise ValueError(f"cannot remove {budget:,} parameters: LLM-Pruner takes {most:,} at most from {n_blocks} "
                         "blocks, as a head and a channel stay in each")
    fewest = math.ceil((budget - n_blocks * (hidden_dim - 1) * channel) / (n_blocks * head))  # or channels run out
    most = min(n_kv_heads - 1, budget // (n_blocks * head))
    heads = max(fewest, min(most, round(n_kv_heads * budget / (n_blocks * (attention + mlp)))))
    each, extra = divmod(max(0, math.ceil((budget - n_blocks * heads * head) / channel)), n_blocks)
    return heads, [each + (i < extra) for i in range(n_blocks)]


def prune(model, layer, half, G, groups, count):
    """Take the `count` groups of lowest score out of one half of a block: its matrices become smaller ones."""
    axes = {f"{layer}.{half}.{matrix}": axis for matrix, axis in AXES[half].items()}
    kept = top_k(group_scores(model, axes, G, groups), groups - count)
    for name, axis in axes.items():
        W = model.get_submodule(name).weight.detach().unflatten(axis, (groups, -1))
        W = W.index_select(axis, kept).flatten(axis, axis + 1)
        model.set_submodule(name, linear(W))


@torch.no_grad()
def group_scores(model, axes, G, groups):
    """(groups,): the sum of |w dL/dw| over each group's slices of the matrices {name: axis}."""
    return sum((upcast(model.get_submodule(name).weight) * G[name]).abs().sum(1 - axis).view(groups, -1).sum(1)
               for name, axis in axes.items())
