"""The dense matrices that a compressed model stands for."""
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F

from data.checkpoint import ranks, widths
from extras import product
from model import LowRankLinear, Transformer


def dense_weight(model, name):
    """W (m, n) of "layers.22.attention.wq.weight" in the model's dtype; A B is multiplied in fp32 at least.

    Channels that an MLP has lost are zeros again: silu(0) * 0 = 0.
    """
    module, hidden_dim = model.get_submodule(name.removesuffix(".weight")), model.args.hidden_dim
    W = product(module) if isinstance(module, LowRankLinear) else module.weight
    if "feed_forward" in name and (lost := hidden_dim - W.shape[name.endswith("w2.weight")]):
        W = F.pad(W, (0, lost) if name.endswith("w2.weight") else (0, 0, 0, lost))
    return W


def dense_shapes(model):
    """{name: meta tensor} of the dense model that `model` stands for; a tied head is not named."""
    with torch.device("meta"):
        dense = Transformer(model.args, model.tied).to(model.dtype)
    return dict(dense.named_parameters())


def narrowed(model):
    """`model`, with a smaller hidden_dim if all feed-forwards have that width and nothing is low-rank."""
    channels = {*widths(model).values()}
    if len(channels) == 1 and not ranks(model):
        model = copy(model)  # shares the weights
        model.args = replace(model.args, hidden_dim=channels.pop())
    return model


def exported_params(model, layout):
    """How many parameters an exported folder of that layout has."""
    return narrowed(model).n_params_dense if layout in ("hf", "meta") else model.n_params
