"""Ways to the same singular value decompositions: their seconds, and whether they keep what fp64 keeps."""
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from attribution import importance, rank_for_ratio, sigma_gradients, svd, top_k, weight_gradients
from model import matrix_names
from runtime import cli

bare_svd = partial(torch.linalg.svd, full_matrices=False)


def by_shape(model, layer_ids):
    """[[names of these layers' matrices of one shape] ...]."""
    groups = {}
    for name in matrix_names(*layer_ids):
        groups.setdefault(model.get_submodule(name).weight.shape, []).append(name)
    return list(groups.values())


def time_by_shape(f, model, groups, every=True, together=False):
    """(seconds of f on the named matrices, widened to fp32; what it gave for the first of each group).

    every False: only the first of each group, times the group's size. together: f takes and gives lists.
    """
    total, firsts = 0.0, []
    for names in groups:
        seconds, taken = {}, [model.get_submodule(name).weight.float() for name in (names if every else names[:1])]
        with cli.timed(seconds, "SVD", model.device):
            firsts.append((f(taken) if together else [f(W) for W in taken])[0])
        total += seconds["SVD"] * len(names) / len(taken)
    return total, firsts


def ways_to_svd(cuda):
    """{name: (function of W in fp32 that gives U, S, Vh, or of a list of W of one shape; which of the two)}."""
    ways = {"attribution.svd": (svd, False)}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        ways[f"Gram matrix, fp{bits}"] = partial(gram_svd, dtype=dtype), False
        ways[f"Gram matrices, fp{bits}, batched"] = partial(batched, dtype=dtype), True
    if cuda:
        ways["attribution.svd, on streams"] = on_streams, True
    for driver in ["gesvdj", "gesvda", "gesvd"] if cuda else [None]:  # the slow ones last
        ways[driver or "LAPACK"] = partial(bare_svd, driver=driver), False
    return ways


def gram_svd(W, dtype):
    """U, S, Vh of W (..., m, n) in fp32, one or many, from the eigenvectors of the smaller Gram matrix in `dtype`."""
    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    squares, V = torch.linalg.eigh(tall.to(dtype).mT @ tall.to(dtype))
    S, V = squares.flip(-1).clamp(min=1e-30).sqrt().float(), V.flip(-1).float()
    U = tall @ V / S[..., None, :]
    return (U, S, V.mT) if tall is W else (V, S, U.mT)


def batched(weights, dtype, chunk=8):
    """At most `chunk` matrices at once, for the memory."""
    parts = (torch.stack(weights[i:i + chunk]) for i in range(0, len(weights), chunk))
    return [usv for part in parts for usv in zip(*gram_svd(part, dtype))]


def on_streams(weights, count=4):
    """attribution.svd on several CUDA streams, each with a thread as each is waited for; the first of W comes first."""
    def work(stream, part):
        with torch.cuda.stream(stream):
            return [svd(W) for W in part]

    streams = [torch.cuda.Stream(weights[0].device) for _ in range(count)]
    torch.cuda.synchronize(weights[0].device)  # no stream waits for what another still does to W
    with ThreadPoolExecutor(count) as pool:
        parts = pool.map(work, streams, [weights[i::count] for i in range(count)])
    return [usv for part in parts for usv in part]


def svd_study(model, groups, sweep, ratio, end=math.inf):
    """A row for each way: seconds for all matrices of `groups`, and how far it keeps what an SVD in fp64 keeps.

    The latter over the components kept at `ratio` of one matrix of each shape. Ways that take one matrix at a time are
    timed on that one, times the number of its shape. A way that fails has no figures. None starts after the time `end`.
    """
    rows = []
    G = weight_gradients(model, [names[0] for names in groups], sweep("attribution"))
    exact = [chosen([t.to(model.device) for t in bare_svd(model.get_submodule(name).weight.cpu().double())], G[name], ratio)
             for name in G]  # on the CPU, for CUDA is slow at fp64
    for way, (f, together) in ways_to_svd(model.device.type == "cuda").items():
        seconds, agreement, small = None, None, torch.eye(8, device=model.device)
        try:
            if time.monotonic() > end:
                raise TimeoutError
            f([small] if together else small)  # what libraries do only once
            seconds, firsts = time_by_shape(f, model, groups, together, together)
            common = sum(in_common(chosen(usv, g, ratio), truth) for usv, g, truth in zip(firsts, G.values(), exact))
            agreement = 100 * common / sum(len(Vh) for _, Vh in exact)
        except TimeoutError:
            way = f"{way}, no time left"
        except RuntimeError:  # does not converge, out of memory, not supported
            way = f"{way}, failed"
        rows.append({"way": way, "seconds": seconds, "kept as in fp64 %": agreement})
        print(way, "" if seconds is None else f"{seconds:.2f} s", file=sys.stderr)  # some take minutes
    return rows


def chosen(usv, G, ratio):
    """The kept components of a decomposition: U_K (m, k) and Vh_K (k, n), in fp64."""
    U, S, Vh = usv
    kept = top_k(importance(S, sigma_gradients(U, G.to(S.dtype), Vh)), rank_for_ratio(*G.shape, ratio))
    return U[:, kept].double(), Vh[kept].double()


def in_common(ours, theirs):
    """How many components two sets share: (u . u') (v . v') is 1 for the same, whatever their order and sign, or 0."""
    (U, Vh), (U2, Vh2) = ours, theirs
    return int(((U.mT @ U2) * (Vh @ Vh2.mT) > 0.5).sum())
