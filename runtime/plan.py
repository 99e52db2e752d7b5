"""What a run will do, known before it: how many layers, which ratio, how many parameters."""
import math
from collections.abc import Iterable

import torch
from torch import nn

from attribution import rank_for_ratio
from model import Transformer, matrix_names


def check_layers(count: int, layers: int | None, layer_ids: list[int] | None = None) -> None:
    """Raise ValueError if a model of `count` layers has fewer, or if an id is out of range or given twice."""
    ids = range(layers) if layer_ids is None else layer_ids
    if not 0 < len(ids) <= count or len(set(ids)) < len(ids) or not all(0 <= layer < count for layer in ids):
        raise ValueError(f"--layers, --layer-ids: this model has {count} layers, 0 to {count - 1}; asked for "
                         f"{layers if layer_ids is None else layer_ids}, expected different ones of them")


def dense_matrices(model: Transformer, layer_ids: Iterable[int]) -> dict[str, torch.Size]:
    """{name: shape (m, n)} of those matrices of these layers that are still dense."""
    modules = {name: model.get_submodule(name) for name in matrix_names(*layer_ids)}
    return {name: m.weight.shape for name, m in modules.items() if isinstance(m, nn.Linear)}


def held(shapes: Iterable[tuple[int, int]], ratio: float | None = None) -> int:
    """The parameters in matrices of these shapes, dense or, with a ratio, as grasp.compress leaves them."""
    return sum(m * n if ratio is None else min(m * n, rank_for_ratio(m, n, ratio) * (m + n))
               for m, n in shapes)


def parameters_left(model: Transformer, layer_ids: Iterable[int], ratio: float | None) -> int:
    """The model's parameters after compress(model, layer_ids, ratio=ratio); ratio None: as many as now."""
    shapes = dense_matrices(model, layer_ids).values()
    return model.n_params - held(shapes) + held(shapes, ratio)


def check_dense(model: Transformer, layer_ids: list[int]) -> None:
    """Raise ValueError if nothing in these layers is dense."""
    if not dense_matrices(model, layer_ids):
        raise ValueError(f"--ckpt: layers {layer_ids} are low-rank already; ask for more layers or others")


def plan(model: Transformer, layers: int | None, layer_ids: list[int] | None, ratio: float | None,
         remove: float | None) -> tuple[int, float | None, int]:
    """Return (how many layers to compress, ratio, how many parameters the model will have at most).

    remove: fraction of the model's parameters that goes. It sets the ratio. If the layers are not given
    either, it takes the fewest that reach it at ratio 0.1. All layers of a dense model are alike: it does not
    matter which they will be.
    """
    n, count = layers or len(layer_ids or []), model.args.n_layers
    removed, dense = (remove or 0) * model.n_params, model.n_params == model.n_params_dense
    if remove and not (layer_ids or dense):
        raise ValueError("--remove needs --layer-ids on a compressed folder, whose layers are not alike")
    if not n:
        n = min(count, math.ceil(removed / (model.n_params - parameters_left(model, [0], 0.1))))
    check_layers(count, n, layer_ids)
    ids = layer_ids or range(n)
    if remove:
        before = held(dense_matrices(model, ids).values())
        if removed >= before:
            raise ValueError(f"--remove {remove}: {n} of {count} layers cannot lose that many parameters")
        ratio = math.floor(10 ** 6 * (1 - removed / before)) / 10 ** 6  # ranks are rounded down: enough goes
    return n, ratio, parameters_left(model, ids, ratio if layer_ids or dense else None)
