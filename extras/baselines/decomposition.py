"""Weighted SVD: the same low-rank factors four times, by four answers to which inputs of a matrix matter.

y = W x becomes y = A (B x) with k components, for the A B of rank k that minimises ||(W - A B) D||:

    method      D                                                           from
    plain_svd   1                                                           -
    fwsvd       diag d_j = sqrt(sum_i E[(dL/dW_ij)^2])                      gradients, E over sequences
    asvd        diag d_j = (mean |x_j|)^alpha                               inputs x (n,) of the matrix
    svd_llm     lower triangular, D D^T = X X^T                             inputs X (n, tokens)

layers: ids of the blocks whose seven matrices are decomposed (None: all), with ranks of one ratio. As in the papers,
every D comes from the dense model, in one sweep. A constant factor of D cancels in A B, so sums stand for means.
"""
from functools import partial

import torch

from attribution import backward, svd
from extras import keep
from extras.baselines import input_of, uniform_ranks, watch_inputs
from model import matrix_names, upcast


def plain_svd(model, sweep, budget, layers=None):
    """The largest singular values of W itself [Eckart and Young 1936]; `sweep` is not used."""
    ranks = ranks_of(model, layers, budget)
    return decompose(model, ranks, {name: torch.ones_like(model.get_submodule(name).weight[0]) for name in ranks})


def fwsvd(model, sweep, budget, layers=None):
    """FWSVD [arXiv 2207.00112]: inputs weighted by the Fisher information of their column of W.

    The paper writes y = x W, so its rows are our columns. Liberties: it takes the loss of a task and trains on that
    afterwards; here the loss is the next token's, and nothing is trained.
    """
    ranks = ranks_of(model, layers, budget)
    return decompose(model, ranks, fisher_weights(model, ranks, sweep("FWSVD")))


def asvd(model, sweep, budget, layers=None, alpha=0.5):
    """ASVD [arXiv 2312.05821, §3]: inputs weighted by their mean size, d_j = (mean |x_j|)^alpha.

    Liberty: ranks of one ratio, where the paper searches one for every matrix by its effect on the perplexity.
    """
    ranks = ranks_of(model, layers, budget)
    sums = input_sums(model, ranks, sweep("ASVD"), lambda x: upcast(x).abs().sum(0))
    return decompose(model, ranks, {name: sums[input_of(name)] ** alpha for name in ranks})


def svd_llm(model, sweep, budget, layers=None):
    """SVD-LLM (W) [arXiv 2403.07378, §3.1]: truncation-aware whitening, without the update of the factors (its §3.2).

    With D D^T = X X^T the loss on the calibration set is known, ||(W - A B) X||^2 = the sum of the dropped sigma^2, and
    no A B of rank k has less. Holds an fp64 n x n moment for each of the four different inputs of every block.
    """
    ranks = ranks_of(model, layers, budget)
    sums = input_sums(model, ranks, sweep("SVD-LLM"), lambda x: x.double().mT @ x.double())
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
def input_sums(model, names, batches, term):
    """{input_of(name): the sum of term(x) over the inputs x (B * T, n)}; matrices with one input share its sum."""
    sums = dict.fromkeys(map(input_of, names), 0)

    def visit(name, x):
        sums[name] += term(x)

    with watch_inputs(model, sums, visit):
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
