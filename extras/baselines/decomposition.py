"""Baselines by weighted SVD: the same low-rank factors, with four answers to which inputs of a matrix matter.

y = W x becomes y = A (B x) with k components: the A B of rank k that minimises ||(W - A B) D||.

    name        plain_svd
    paper       Eckart and Young 1936
    equation    D = 1
    liberties   none

    name        fwsvd
    paper       FWSVD, arXiv 2207.00112
    equation    D = diag sqrt(sum_i E[(dL/dW_ij)^2]), E over sequences, L the next token's loss
    liberties   that loss, where the paper has a task's; no training afterwards

    name        asvd
    paper       ASVD, arXiv 2312.05821, §3
    equation    D = diag (mean |x_j|)^alpha, x (n,) the matrix's inputs
    liberties   ranks of one ratio, where the paper searches one for every matrix by its effect on the perplexity

    name        svd_llm
    paper       SVD-LLM, arXiv 2403.07378, §3.1
    equation    D lower triangular, D D^T = X X^T, X (n, tokens) the matrix's inputs
    liberties   without the update of the factors (its §3.2)

layers: ids of the blocks whose seven matrices are decomposed (None: all), with ranks of one ratio. As in the papers,
every D comes from the dense model, in one sweep. A constant factor of D cancels in A B, so sums stand for means.
"""
from functools import partial

import torch

from attribution import backward, svd
from extras import keep
from extras.baselines import gram, input_of, input_sums, uniform_ranks
from extras.controls import truncate
from model import matrix_names, upcast


def plain_svd(model, sweep, budget, layers=None):
    """Keep the largest singular values of W itself. `sweep` is not used."""
    truncate(model, ranks_of(model, layers, budget))
    return model


def fwsvd(model, sweep, budget, layers=None):
    """Weight inputs by the Fisher information of their column of W (the paper writes y = x W: its rows)."""
    ranks = ranks_of(model, layers, budget)
    return decompose(model, ranks, fisher_weights(model, ranks, sweep("FWSVD")))


def asvd(model, sweep, budget, layers=None, alpha=0.5):
    """Weight inputs by their mean size, d_j = (mean |x_j|)^alpha."""
    ranks = ranks_of(model, layers, budget)
    sums = moments(model, ranks, sweep("ASVD"), lambda x: upcast(x).abs().sum(0))
    return decompose(model, ranks, {name: sums[input_of(name)] ** alpha for name in ranks})


def svd_llm(model, sweep, budget, layers=None):
    """Whiten the inputs: SVD-LLM (W), truncation-aware whitening.

    With D D^T = X X^T the loss on the calibration set is known, ||(W - A B) X||^2 = the sum of the dropped sigma^2, and
    no A B of rank k has less. Holds an fp64 n x n moment for each of the four different inputs of every block.
    """
    ranks = ranks_of(model, layers, budget)
    sums = moments(model, ranks, sweep("SVD-LLM"), lambda x: gram(x.double()))
    for source, moment in sums.items():
        sums[source] = triangular(moment)
    return decompose(model, ranks, {name: sums[input_of(name)] for name in ranks})


def ranks_of(model, layers, budget):
    """{name: k} of the layers' matrices, as uniform_ranks gives them."""
    layers = range(len(model.layers)) if layers is None else layers
    return uniform_ranks(model, matrix_names(*layers), budget)


def decompose(model, ranks, weights):
    """Replace each named matrix W (m, n) by its factors of rank k for the weights D, (n,) diagonal or (n, n), in place.

    W D = U S Vh, A = U_k sqrt(S_k), B = sqrt(S_k) Vh_k D^-1. Since Vh D^-1 = S^-1 U^T W, no D is ever inverted: one
    that is all but singular costs no digits. A component with sigma = 0 is nothing: its B is 0. Returns the model.
    """
    for name, k in ranks.items():
        W = upcast(model.get_submodule(name).weight)
        D = weights[name].to(W.dtype)
        U, S, _ = svd(W * D if D.ndim == 1 else W @ D)
        Vh = (U.mT @ W / S[:, None]).where(S[:, None] > torch.finfo(S.dtype).eps * S[0], 0)
        keep(model, name, (U, S, Vh), torch.arange(k, device=model.device))
    return model


def fisher_weights(model, names, batches):
    """{name: d (n,), fp32 at least}, d_j = sqrt(sum over sequences and rows i of (dL/dW_ij)^2), L a sequence's nats.

    The sample of the empirical Fisher information is one sequence, whatever the batches: each has a backward pass of
    its own, in which a matrix's gradient is squared, summed over its rows and freed at once; only vectors are held.
    """
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: torch.zeros_like(upcast(module.weight[0])) for name, module in modules.items()}

    def add_into(total, w):
        total.add_(upcast(w.grad).square().sum(0))
        w.grad = None

    hooks = [module.weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(add_into, sums[name]))
             for name, module in modules.items()]
    try:
        for tokens in batches:
            for sequence in tokens.to(model.device).split(1):
                backward(model, sequence, sequence)
    finally:
        for module, hook in zip(modules.values(), hooks):
            hook.remove()
            module.weight.requires_grad_(False)
    return {name: total.sqrt() for name, total in sums.items()}


@torch.no_grad()
def moments(model, names, batches, term):
    """{input_of(name): the sum of term(x) over the inputs x (B * T, n)}; matrices with one input share its sum."""
    with input_sums(model, map(input_of, names), term) as sums:
        for tokens in batches:
            model.final_state(tokens.to(model.device))
    return sums


def triangular(moment):
    """L (n, n) with L L^T = the moment X X^T. Where that is singular (fewer tokens than inputs, an input that is always
    zero), 1e-6 of its mean diagonal is added to it, in place."""
    L, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        moment.diagonal().add_(1e-6 * moment.diagonal().mean())
        L = torch.linalg.cholesky(moment)
    return L
