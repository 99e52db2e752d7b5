"""What a run would do, known before it: how many layers, which ratio, how large, how much memory."""
from bisect import bisect_right
from collections.abc import Iterable

import torch
from torch import nn

from attribution import rank_for_ratio
from model import Transformer, matrix_names
from runtime.cli import sweep_memory


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
    """Raise ValueError if nothing in these layers is dense; print which of them are low-rank already."""
    done = [layer for layer in layer_ids if not dense_matrices(model, [layer])]
    if done == layer_ids:
        raise ValueError(f"--ckpt: layers {done} are low-rank already; ask for more layers or others")
    if done:
        print(f"layers {done} are low-rank already, and count among the {len(layer_ids)}")


def plan(model: Transformer, layers: int | None, layer_ids: list[int] | None, ratio: float | None,
         remove: float | None) -> tuple[int, float | None, int]:
    """Return (how many layers to compress, ratio, how many parameters the model will have at most).

    remove: fraction of the model's parameters that goes. It sets the ratio, in millionths. If the layers are
    not given either, it takes the fewest that reach it at ratio 0.1. All layers of a dense model are alike:
    it does not matter which they will be.
    """
    n, count = layers or len(layer_ids or []), model.args.n_layers
    target, dense = (1 - (remove or 0)) * model.n_params, model.n_params == model.n_params_dense
    if remove and not (layer_ids or dense):
        raise ValueError("--remove needs --layer-ids on a compressed folder, whose layers are not alike")
    n = n or next((i for i in range(1, count) if parameters_left(model, range(i), 0.1) <= target), count)
    check_layers(count, n, layer_ids)
    if remove:
        ids, millionths = layer_ids or range(n), range(1, 10 ** 6)
        fitting = bisect_right(millionths, target, key=lambda i: parameters_left(model, ids, i / 10 ** 6))
        if not fitting:
            raise ValueError(f"--remove {remove}: {n} of {count} layers cannot lose that many parameters")
        ratio = fitting / 10 ** 6
    return n, ratio, parameters_left(model, layer_ids or range(n), ratio if layer_ids or dense else None)


def print_plan(model: Transformer, layer: int, ratio: float | None, left: int, tokens: int,
               layers: int) -> None:
    """Print what a run would do: the ranks of one layer, the parameters and the memory that it needs."""
    if ratio is None:
        print("the ranks depend on the scores: with --threshold they are not known before the run")
    for name, (m, n) in dense_matrices(model, [layer]).items() if ratio else ():
        smaller = held([(m, n)], ratio) < m * n
        rank = f"rank {rank_for_ratio(m, n, ratio)}" if smaller else "stays dense"
        print(f"{name.removeprefix(f'layers.{layer}.'):<16} [{m}, {n}]  {rank}")
    most = "at most " * (left == model.n_params)  # with a threshold, or on a compressed folder
    memory = sweep_memory(model, tokens, layers) + model.n_params * model.dtype.itemsize
    print(f"{most}{left:,} parameters would be left of {model.n_params:,}, "
          f"{100 * (1 - left / model.n_params):.1f} % removed\n"
          f"memory needed: at most {memory / 2 ** 30:.2f} GiB")
