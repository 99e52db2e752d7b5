"""Seconds of every phase beside their floors, the algorithm as published, and how seconds grow with the model."""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attribution import rank_for_ratio, top_k
from extras import keep, peak_bytes, reset_peak
from extras.bench import GIB, SEED, meta_model, random_weights, show
from extras.bench.memory import sweep_bytes
from extras.bench.svds import bare_svd, by_shape, time_by_shape
from extras.throughput import random_prompt, weight_bytes
from grasp import compress, find_redundant
from model import MATRICES, matrix_names, upcast
from runtime import cli

SMALLEST = 256, 8, 4, 2, 1024, 8192, False  # what --growth starts from; by which factors what grows, and where here
GROWTH = {"tokens": ((1, 2, 4), ()), "layers": ((1, 2, 4), (1,)), "width": ((1, 1.5, 2), (0, 2, 3, 4))}
PHASES = {"redundancy sweep": ["redundancy"], "attribution sweep": ["attribution"],
          "both sweeps": ["redundancy", "attribution"], "SVD and scores": ["SVD"],
          "whole": ["redundancy", "attribution", "SVD"]}
EXAMPLE = 64, 1, 2, 1, 96, 128, False  # the shape of a model to warm up with
PRODUCT = {"cpu": 2048, "cuda": 8192}  # size of the two matrices whose product gives the rate


def measure(model, windows, size, n, ratio, repeats, before):
    """The method on windows (samples, T) in micro-batches of `size`, repeats times; the model stays as it was.

    {rows: of PHASES, redundant: ids, operations: of each sweep, rate, computed}. before: bytes besides.
    """
    peaks, turns, rates = {}, [], [matrix_rate(model.device, model.dtype)]
    _, redundant = turn(model, windows, size, n, ratio, peaks)  # to reset a peak costs time: a turn of its own
    for _ in range(repeats):
        turns.append(turn(model, windows, size, n, ratio)[0])
        rates.append(matrix_rate(model.device, model.dtype))
    work = operations(model, redundant, *windows.shape)
    computed = sweep_bytes(model, redundant, min(size, len(windows)), windows.shape[1])
    floors = {"SVD": min(t["bare SVD"] for t in turns), **{name: work[name] / max(rates) for name in work}}
    rows = []
    for phase, parts in PHASES.items():
        seconds = min(sum(seconds[part] for part in parts) for seconds in turns)
        floor, peak = sum(floors[part] for part in parts), max(peaks[part] for part in parts) - before
        rows.append({"phase": phase, "seconds": seconds, "floor s": floor, "ratio": seconds / floor,
                     "peak GiB": peak / GIB,
                     "computed GiB": sum(computed.values()) / GIB if parts == ["attribution"] else None})
    return {"rows": rows, "redundant": redundant, "operations": work, "rate": max(rates), "computed": computed}


def matrix_rate(device, dtype):
    """Floating-point operations a second of a large matrix product, the best of five."""
    seconds, size = [{} for _ in range(5)], PRODUCT[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    for one in seconds:
        with cli.timed(one, "product", device):
            a @ b
    return 2 * size ** 3 / min(one["product"] for one in seconds)


def turn(model, windows, size, n, ratio, peaks=None, bare=True):
    """(seconds of each phase, the redundant layers). peaks: a dict for bytes of each phase. bare: bare SVDs, too."""
    seconds, device = {}, model.device

    def sweep(label):
        with cli.timed(seconds, label, device):
            yield from cli.batches(windows, size, label)

    def watched(label):
        reset_peak(device)
        yield from sweep(label)
        peaks[label] = peak_bytes(device)
        reset_peak(device)  # for the SVDs, which follow the last sweep

    look = sweep if peaks is None else watched
    *_, redundant = find_redundant(model, look, n, all_sequences=True)
    with borrowed(model, redundant), cli.timed(seconds, "SVD", device):
        list(compress(model, redundant, look, ratio))
    seconds["SVD"] -= seconds["attribution"]
    if peaks is not None:
        peaks["SVD"] = peak_bytes(device)
    if bare:
        every = device.type == "cpu"  # on CUDA, where it is slow, one of each shape
        seconds["bare SVD"], _ = time_by_shape(bare_svd, model, by_shape(model, redundant), every)
    return seconds, redundant


def warm_up(device, dtype):
    """A turn of a small model: what libraries do and take only once."""
    model = random_weights(EXAMPLE, dtype, device)
    turn(model, random_prompt(model, 2, 64, SEED), 2, 1, 0.5)


@contextmanager
def borrowed(model, layer_ids):
    """The dense matrices of these layers are in their places again at the end."""
    dense = {name: model.get_submodule(name) for name in matrix_names(*layer_ids)}
    try:
        yield
    finally:
        for name, module in dense.items():
            model.set_submodule(name, module)


def operations(model, redundant, samples, T):
    """{sweep: the least floating-point operations of it} over `samples` sequences of T tokens.

    A product with a matrix of P parameters is 2 P a token, and so is each of its two gradients. Gradients of
    activations go down to the lowest redundant block, whose wq, wk and wv need none below them; gradients of weights
    are the redundant blocks' only. The head scores all tokens but each sequence's last. Attention itself, causal, sees
    T / 2 keys on average: 2 products of 2 (T / 2) n_heads head_dim a token and block, and twice that backward.
    """
    a, tokens, depth = model.args, samples * T, model.args.n_layers - min(redundant)
    sizes = {name: model.layers[0].get_submodule(name).weight.numel() for name in MATRICES}
    block, first = sum(sizes.values()), sum(sizes[f"attention.w{x}"] for x in "qkv")
    head, attention = 2 * a.dim * a.vocab_size * samples * (T - 1), 2 * T * a.n_heads * a.head_dim
    forward = (2 * block + attention) * a.n_layers * tokens
    activations = ((2 * block + 2 * attention) * depth - 2 * first) * tokens
    weights = 2 * block * len(redundant) * tokens
    return {"redundancy": forward, "attribution": forward + head + head + activations + weights}


# ------------------------------------------------------------------------------------------------ as published

class Spectral(nn.Module):
    """y = U diag(S) Vh x, S a leaf that autograd differentiates; U diag(S) Vh is multiplied out at every call."""
    def __init__(self, W):
        super().__init__()
        self.U, S, self.Vh = (t.to(W.dtype) for t in bare_svd(upcast(W)))
        self.S = nn.Parameter(S)

    def forward(self, x):
        return F.linear(x, (self.U * self.S) @ self.Vh)


def autograd_compress(model, layer_ids, sweep, ratio, seconds):
    """grasp.compress as published, in place: {name: kept (k,) int64, or None where the matrix stays dense}.

    From the deepest block up, the MLP and then the attention: a sweep with the full cross entropy, for these matrices
    only, whose low-rank factors then take their place. seconds: a dict to add "gradients" and "SVD" to.
    """
    kept = {}
    for half in [[name for name in matrix_names(layer) if part in name]
                 for layer in sorted(layer_ids, reverse=True) for part in ("feed_forward", "attention")]:
        with cli.timed(seconds, "SVD", model.device):
            old = {name: model.get_submodule(name) for name in half}
            for name, linear in old.items():
                model.set_submodule(name, Spectral(linear.weight))
        with cli.timed(seconds, "gradients", model.device):
            for tokens in sweep(f"autograd, {half[0].rpartition('.')[0]}"):
                tokens = tokens.to(model.device)
                logits = upcast(model(tokens))[:, :-1].flatten(0, 1)
                F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
        with cli.timed(seconds, "SVD", model.device):
            for name, linear in old.items():
                (m, n), spectral = linear.weight.shape, model.get_submodule(name)
                model.set_submodule(name, linear)
                k, S = rank_for_ratio(m, n, ratio), spectral.S.detach()
                kept[name] = top_k((S * spectral.S.grad).abs(), k) if k * (m + n) < m * n else None
                if kept[name] is not None:
                    keep(model, name, (spectral.U, S, spectral.Vh), kept[name])
    return kept


def beside(model, windows, size, ratio, measured, before):
    """Two rows: what `measure` gave of the method with one sweep, and the published way with many, once."""
    (_, sweep, _, svds, _), redundant, seconds = measured["rows"], measured["redundant"], {}
    reset_peak(model.device)
    with borrowed(model, redundant):
        autograd_compress(model, redundant, partial(cli.batches, windows, size), ratio, seconds)
    return [{"method": "one sweep", "gradients s": sweep["seconds"], "SVD s": svds["seconds"],
             "peak GiB": max(sweep["peak GiB"], svds["peak GiB"])},
            {"method": "autograd, as published", "gradients s": seconds["gradients"], "SVD s": seconds["SVD"],
             "peak GiB": (peak_bytes(model.device) - before) / GIB}]


# ------------------------------------------------------------------------------------------------ as the model grows

def growth(smallest, samples, T, size, ratio, repeats, before):
    """A table for each axis, of models of which a quarter of the layers is redundant: the report."""
    report, before = {}, before + weight_bytes(smallest)  # which only says where and in which dtype
    plan = {axis: [([int(factor * x) if i in grows else x for i, x in enumerate(SMALLEST)],
                    samples * (1 if grows else factor)) for factor in factors]
            for axis, (factors, grows) in GROWTH.items()}
    work = sum(sum(operations(meta_model(shape, smallest.dtype), [3 * shape[1] // 4], count, T).values())
               for models in plan.values() for shape, count in models)
    floor = (repeats + 1) * work / matrix_rate(smallest.device, smallest.dtype)
    print(f"the sweeps take about {1.5 * floor / 60:.1f} min (1.5 times their floor); SVDs and rates come on top\n")
    for axis, models in plan.items():
        rows = report[axis] = []
        for shape, count in models:
            model = random_weights(shape, smallest.dtype, smallest.device)
            windows = random_prompt(model, count, T, SEED)
            measured = measure(model, windows, size, model.args.n_layers // 4, ratio, repeats, before)["rows"]
            phases = {PHASES[row["phase"]][0]: row for row in measured if len(PHASES[row["phase"]]) == 1}
            row = {axis: {"tokens": windows.numel(), "layers": shape[1], "width": shape[0]}[axis]}
            for name, phase in phases.items():
                row |= {f"{name} s": phase["seconds"], f"{name} ratio": phase["ratio"]}
            rows.append(row | {head: phases["attribution"][head] for head in ("peak GiB", "computed GiB")})
        print(show(rows) + "\n")
    return {"growth": report}
