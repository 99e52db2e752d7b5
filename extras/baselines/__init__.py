"""Published ways to make a LLaMA smaller, a file a family. `python -m extras.compare` holds them against GRASP.

A method that meets any budget is a function (model, sweep, budget) -> model: `budget` is the number of parameters to
remove, met to 0.5 %. A method that takes out whole blocks is a function (model, sweep, n) -> model: n blocks go.
`model` is dense and may be changed in place. `sweep(label)` is a fresh iterator over the calibration set's batches
(B, T) int64. What a method adds (a patch, a rotation) counts among the parameters of the model that it returns.
"""
from contextlib import contextmanager

import torch

from attribution import rank_for_ratio
from extras import linear

SAME_INPUT = {"wk": "wq", "wv": "wq", "w3": "w1"}


def block_params(model):
    """The parameters of one dense block."""
    return sum(p.numel() for p in model.layers[0].parameters())


def blocks_params(model):
    """The parameters of all blocks of a dense model."""
    return model.args.n_layers * block_params(model)


def check_blocks(model, n, spared):
    """Raise ValueError if a method that leaves at least `spared` blocks cannot take out n."""
    most = len(model.layers) - spared
    if not 1 <= n <= most:
        raise ValueError(f"cannot take out {n} blocks: expected 1 to {most} of {len(model.layers)}")


def uniform_ranks(model, names, budget):
    """{name: k}: low-rank factors of one ratio for all named matrices that remove at least `budget` parameters.

    The largest such ratio, ranks as rank_for_ratio gives them, and one more for the first ones while the budget is
    still met. ValueError if even rank 1 everywhere removes less.
    """
    shapes = {name: model.get_submodule(name).weight.shape for name in names}

    def ranks(ratio):
        return {name: rank_for_ratio(m, n, ratio) for name, (m, n) in shapes.items()}

    def removed(ratio):
        return sum(m * n - k * (m + n) for k, (m, n) in zip(ranks(ratio).values(), shapes.values()))

    if removed(0) < budget:
        raise ValueError(f"cannot remove {budget:,} parameters: low-rank factors of these {len(names)} matrices remove "
                         f"{removed(0):,} at most")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) >= budget else (low, middle)
    k, over = ranks(low), removed(low) - budget
    for name, (m, n) in shapes.items():  # one rank more of everything was too much, but some can still have it
        if m + n <= over and (k[name] + 1) * (m + n) < m * n:
            k[name], over = k[name] + 1, over - m - n
    return k


def input_of(name):
    """The matrix whose input stands for this one's: wq's for wk and wv, w1's for w3."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{SAME_INPUT.get(leaf, leaf)}"


@contextmanager
def watch_inputs(model, names, visit):
    """While open, every forward pass calls visit(name, x) with the named linear layers' inputs x (B * T, n)."""
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs, name=name: visit(name, inputs[0].detach().flatten(0, -2))) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def input_sums(model, names, term):
    """Yield {name: the sum of term(x)}, x (B * T, n) the inputs of the named linear layers in every forward pass."""
    sums = dict.fromkeys(names, 0)

    def visit(name, x):
        sums[name] += term(x)

    with watch_inputs(model, sums, visit):
        yield sums


def gram(x):
    """x^T x (n, n): the sum of the outer products of the rows of x (tokens, n)."""
    return x.mT @ x


def damped(moment, fraction):
    """The moment in fp64, `fraction` of its mean diagonal added to its diagonal: few tokens leave it singular."""
    moment = moment.to(torch.float64, copy=True)
    moment.diagonal().add_(fraction * moment.diagonal().mean() + 1e-60)  # all 0: its factor, 1e-30, is not 0 in fp32
    return moment


def keep_channels(model, name, kept, C, fraction):
    """Leave the kept channels (k,) of the feed-forward `name`; w2 takes over by least squares what the others did.

    fraction: C (n, n), the second moment of w2's inputs, is damped by it.
    """
    ff, C = model.get_submodule(name), damped(C, fraction)
    w2 = torch.linalg.solve(C[kept][:, kept], C[kept] @ ff.w2.weight.double().mT).mT
    ff.w1, ff.w3, ff.w2 = (linear(W.to(model.dtype)) for W in (ff.w1.weight[kept], ff.w3.weight[kept], w2))
