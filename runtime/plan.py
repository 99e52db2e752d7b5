"""What a run would do, known before it: how many layers, which ratio, how large, how much memory."""
import math
from collections.abc import Iterable

from torch import nn

from attribution import rank_for_ratio
from model import Transformer, matrix_names
from runtime.cli import sweep_memory


def check_layers(count: int, layers: int | None, layer_ids: list[int] | None = None) -> None:
    """Raise ValueError if a model of `count` layers has fewer, or if an id is out of range or given twice."""
    ids = range(layers) if layer_ids is None else layer_ids
    if not 0 < len(ids) <= count or len(set(ids)) < len(ids) or not all(0 <= layer < count for layer in ids):
        raise ValueError(f"--layers, --layer-ids: this model has {count} layers, 0 to {count - 1}; asked for "
                         f"{layers if layer_ids is None else layer_ids}")


def parameters_left(model: Transformer, layer_ids: Iterable[int], ratio: float | None) -> int:
    """The model's parameters after compress(model, layer_ids, ratio=ratio); ratio None: as many as now."""
    dense = (m.weight.shape for m in map(model.get_submodule, matrix_names(*layer_ids))
             if isinstance(m, nn.Linear) and ratio)
    return model.n_params - sum(max(0, m * n - rank_for_ratio(m, n, ratio) * (m + n)) for m, n in dense)


def check_dense(model: Transformer, layer_ids: list[int]) -> None:
    """Raise ValueError if nothing in these layers is dense; print which of them are low-rank already."""
    done = [layer for layer in layer_ids if parameters_left(model, [layer], 1e-9) == model.n_params]
    if done == layer_ids:
        raise ValueError(f"--ckpt: layers {done} are low-rank already; ask for more layers or others")
    if done:
        print(f"layers {done} are low-rank already, and count among the {len(layer_ids)}")


def plan(model: Transformer, layers: int | None, layer_ids: list[int] | None, ratio: float | None,
         remove: float | None) -> tuple[int, float | None]:
    """Return (how many layers to compress, ratio). remove: fraction of the model's parameters that goes.

    It sets the ratio. If the layers are not given either, it takes the fewest that reach it at ratio 0.1.
    """
    n, count = layers or len(layer_ids or []), model.args.n_layers
    if remove:
        target = (1 - remove) * model.n_params
        n = n or next((i for i in range(1, count) if parameters_left(model, range(i), 0.1) <= target), count)
        check_layers(count, n, layer_ids)
        low, high = 1e-9, 1.0
        for _ in range(50):
            ratio = (low + high) / 2
            fits = parameters_left(model, layer_ids or range(n), ratio) <= target
            low, high = (ratio, high) if fits else (low, ratio)
        ratio = low
        if parameters_left(model, layer_ids or range(n), ratio) > target:
            raise ValueError(f"--remove {remove}: {n} of {count} layers cannot lose that many parameters")
    check_layers(count, n, layer_ids)
    return n, ratio


def print_plan(model: Transformer, layer: int, ratio: float | None, left: int, tokens: int, n: int) -> None:
    """Print what a run would do: the ranks of one layer, the parameters and the memory that it needs."""
    for name in matrix_names(layer) if ratio else ():
        if isinstance(matrix := model.get_submodule(name), nn.Linear):
            shape = list(matrix.weight.shape)
            k = rank_for_ratio(*shape, ratio)
            smaller = k * sum(shape) < math.prod(shape)
            print(f"{name:<26} {shape}  " + (f"rank {k}" if smaller else "stays dense"))
    removed = f"{100 * (1 - left / model.n_params):.1f} % removed" if ratio else "if every score counts"
    print(f"{left:,} parameters would be left of {model.n_params:,}, {removed}\nmemory needed: at most "
          f"{(sweep_memory(model, tokens, n) + model.n_params * model.dtype.itemsize) / 2 ** 30:.2f} GiB")
