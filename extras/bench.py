"""Seconds and memory of every phase of the method, beside the least that arithmetic allows.

    python -m extras.bench --ckpt FOLDER --layers 7 --ratio 0.1
    python -m extras.bench --shape llama2-7b --device cuda --samples 512 --seq-len 512 --layers 7 --ratio 0.1

The weights are a folder's, and the tokens those of grasp.py; or both are random, of a known model's shape.

    sweep       all calibration tokens through the model, in micro-batches of B sequences of T tokens
    operations  floating-point operations that a sweep cannot do without: its matrix products and attention's own
    rate        operations a second of one large matrix product, same dtype and device: the best of many in this run
    floor       operations / rate; of SVD and scores the bare torch.linalg.svd of the same matrices, in fp32
    turn        all phases and their floors once, side by side; of --repeats turns each phase's and floor's best counts
    peak        of a turn before those; CUDA: allocated, CPU: resident beyond what was before the model was there
    computed    what the attribution sweep's peak should be, by sweep_bytes

--autograd adds the algorithm as published, an independent check: each half of a block has a sweep of its own, in
which autograd differentiates the singular values. --svd compares ways to the same decompositions; alone, only
those. --growth shows, on random models, whether seconds over floor stay while tokens, layers and width grow.
--memory only computes what the known shapes need.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attribution import importance, rank_for_ratio, sigma_gradients, svd, top_k, weight_gradients
from data.corpus import calibration_windows
from evaluate import markdown
from extras import DENSE, keep, open_dense, peak_bytes, reset_peak
from extras.throughput import random_prompt, weight_bytes
from grasp import compress, find_redundant
from model import MATRICES, ModelArgs, Transformer, matrix_names, repeats_heads, upcast
from runtime import cli
from runtime.files import write_json
from runtime.job import check_layers

SHAPES = {  # dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, whether the embeddings are tied
    "llama2-7b": (4096, 32, 32, 32, 11008, 32000, False), "llama3-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama2-13b": (5120, 40, 40, 40, 13824, 32000, False), "llama3-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "tinyllama-1.1b": (2048, 22, 32, 4, 5632, 32000, False), "smollm2-135m": (576, 30, 9, 3, 1536, 49152, True)}
SMALLEST = 256, 8, 4, 2, 1024, 8192, False  # what --growth starts from; by which factors what grows, and where here
GROWTH = {"tokens": ((1, 2, 4), ()), "layers": ((1, 2, 4), (1,)), "width": ((1, 1.5, 2), (0, 2, 3, 4))}
PHASES = {"redundancy sweep": ["redundancy"], "attribution sweep": ["attribution"],
          "both sweeps": ["redundancy", "attribution"], "SVD and scores": ["SVD"],
          "whole": ["redundancy", "attribution", "SVD"]}
PRODUCT = {"cpu": 2048, "cuda": 8192}  # size of the two matrices whose product gives the rate
SEED = 0  # of random weights and tokens
GIB = 2 ** 30
bare_svd = partial(torch.linalg.svd, full_matrices=False)


def random_weights(shape, dtype, device):
    """A model whose matrices are normal, of deviation 0.02, made where it is to be; it asks for no gradient."""
    model = meta_model(shape, dtype).to_empty(device=device)
    if shape[-1]:  # tied, of which to_empty has made two
        model.output.weight = model.tok_embeddings.weight
    torch.manual_seed(SEED)
    for p in model.parameters():
        p.fill_(1) if p.ndim == 1 else p.normal_(std=0.02)
    return model


def meta_model(shape, dtype):
    """A model that has shapes, dtype and no weights."""
    dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, tied = shape
    args = ModelArgs(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, hidden_dim, vocab_size, norm_eps=1e-5)
    with torch.device("meta"):
        return Transformer(args, tied).to(dtype).requires_grad_(False)


def show(rows):
    """Rows {head: text, whole number, figure or None} as a Markdown table."""
    ways = {str: "{}", int: "{:,}", float: "{:.2f}", type(None): "-"}
    return markdown([*rows[0]], [[ways[type(value)].format(value) for value in row.values()] for row in rows])


# ------------------------------------------------------------------------------------------------ the phases

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


def turn(model, windows, size, n, ratio, peaks=None):
    """(seconds of each phase and of the bare SVDs, the redundant layers); peaks: a dict for bytes of each phase."""
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
    *_, redundant = find_redundant(model, look, n)
    with borrowed(model, redundant), cli.timed(seconds, "SVD", device):
        list(compress(model, redundant, look, ratio))
    seconds["SVD"] -= seconds["attribution"]
    if peaks is not None:
        peaks["SVD"] = peak_bytes(device)
    every = device.type == "cpu"  # on CUDA, where it is slow, one of each shape
    seconds["bare SVD"], _ = time_by_shape(bare_svd, model, by_shape(model, redundant), every)
    return seconds, redundant


@contextmanager
def borrowed(model, layer_ids):
    """The dense matrices of these layers are in their places again at the end."""
    dense = {name: model.get_submodule(name) for name in matrix_names(*layer_ids)}
    yield
    for name, module in dense.items():
        model.set_submodule(name, module)


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


# ------------------------------------------------------------------------------------------------ ways to an SVD

def ways_to_svd(cuda):
    """{name: (function of W in fp32 that gives U, S, Vh, or of a list of W of one shape; which of the two)}."""
    ways = {driver or "LAPACK": (partial(bare_svd, driver=driver), False)
            for driver in (["gesvd", "gesvdj", "gesvda"] if cuda else [None])}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        ways[f"Gram matrix, fp{bits}"] = partial(gram_svd, dtype=dtype), False
        ways[f"Gram matrices, fp{bits}, batched"] = partial(batched, dtype=dtype), True
    ways["attribution.svd"] = svd, False
    if cuda:
        ways["attribution.svd, on streams"] = on_streams, True
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


def svd_study(model, layer_ids, sweep, ratio):
    """A row for each way: seconds for all matrices of these layers, and how far it keeps what an SVD in fp64 keeps.

    The latter over the components kept at `ratio` of one matrix of each shape. Ways that take one matrix at a time are
    timed on that one, times the number of its shape. A way that fails has no figures.
    """
    groups, rows = by_shape(model, layer_ids), []
    G = weight_gradients(model, [names[0] for names in groups], sweep("attribution"))
    exact = [chosen(bare_svd(model.get_submodule(name).weight.double()), G[name], ratio) for name in G]
    for way, (f, together) in ways_to_svd(model.device.type == "cuda").items():
        seconds, agreement, small = None, None, torch.eye(8, device=model.device)
        try:
            f([small] if together else small)  # what libraries do only once
            seconds, firsts = time_by_shape(f, model, groups, together, together)
            common = sum(in_common(chosen(usv, g, ratio), truth) for usv, g, truth in zip(firsts, G.values(), exact))
            agreement = 100 * common / sum(len(Vh) for _, Vh in exact)
        except torch.linalg.LinAlgError:
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


# ------------------------------------------------------------------------------------------------ computed alone

def sweep_bytes(model, layer_ids, B, T, gpus=1):
    """{"weights", "gradients", "activations"}: bytes; their sum is the peak of weight_gradients over these layers.

    B sequences of T tokens a micro-batch; a model on the meta device counts as one on a GPU. No T x T probabilities are
    counted: fused attention keeps none. Torch 2.5 lacks it for grouped queries on the CPU. Each of several `gpus` has
    its rows of the blocks' matrices and of the gradient sums; embeddings and head whole; and of the largest matrix,
    while it is used, all rows (twice: as they come and in their place), its gradient, and that in fp32 at least.
    """
    a, s, wide, top = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize), model.args.n_layers - 1
    matrices = [p.numel() for layer in layer_ids for p in model.layers[layer].parameters() if p.ndim == 2]
    heads = a.n_heads if repeats_heads(model.device, model.dtype) else a.n_kv_heads
    q, kv, norm = a.n_heads * a.head_dim, heads * a.head_dim, wide * (a.dim + 1)
    # What autograd keeps of a token, from the lowest layer up, whose first norm it does not see: both norms' widened
    # inputs and scales; q, the attention's output, k, v; w1 x, silu(w1 x), w3 x; the attention's log-sum-exps.
    block = 2 * norm + s * (2 * q + 2 * kv + 3 * a.hidden_dim) + wide * a.n_heads
    inputs = s * (2 * a.dim + a.hidden_dim)  # of a redundant layer's wq, wk, wv; w1, w3; w2 (wo's is there already)
    kept = B * T * (block * (top - min(layer_ids) + 1) - norm + inputs * len(layer_ids))
    # What comes on top of it at the moments that can be the peak, with the final state h and its gradient in each:
    h, hidden = B * T * s * a.dim, B * T * s * a.hidden_dim
    widened = wide * (model.device.type == "cpu" and s < wide) * max(matrices)  # a gradient's copy, before it is added
    moments = (3 * h + min(model.head_chunk, B * T) * 3 * wide * a.vocab_size,  # a chunk's log p and two gradients
               2 * h + hidden * (2 if top in layer_ids else 3),  # the last SwiGLU's gradients; w2's input may be gone
               2 * h + s * max(matrices) + max(hidden, widened)  # the first of a matrix; or its copy, w2's input gone
               - B * T * block * (top - max(layer_ids)))
    split = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    use = max(matrices) * (3 * s + wide) if gpus > 1 else 0
    return {"weights": s * (model.n_params - split + split // gpus), "gradients": wide * sum(matrices) // gpus,
            "activations": kept + max(moments) + use}


def memory(shapes, dtype, layers, T, gpus):
    """Rows of GiB that the attribution sweep takes by sweep_bytes, in micro-batches of 1,024 or of 8,192 tokens.

    The redundant layers begin at two thirds of the depth. Of several GPUs: what each has under --shard.
    """
    rows = []
    for name, shape in shapes.items():
        model = meta_model(shape, dtype)
        first = 2 * model.args.n_layers // 3
        ids = range(first, min(first + (layers or model.args.n_layers // 5), model.args.n_layers))
        few, many, each = (sweep_bytes(model, ids, cli.batch_size(None, T) * times, T, parts)
                           for times, parts in ((1, 1), (8, 1), (1, gpus)))
        rows.append({"model": name, "layers": f"{ids[0]}-{ids[-1]}", "weights": few["weights"] / GIB,
                     "gradients": few["gradients"] / GIB, "peak, 1,024 tokens": sum(few.values()) / GIB,
                     "8,192 tokens": sum(many.values()) / GIB,
                     f"on each of {gpus}, 1,024 tokens": sum(each.values()) / GIB})
    return rows


# ------------------------------------------------------------------------------------------------ the command

def bench(model, windows, size, n, ratio, repeats, before, autograd, svds):
    """The phases (not for svds alone) and what else is asked for, each printed as it is there: the report."""
    sweep = partial(cli.batches, windows, size)
    if svds and not autograd:
        report = {"redundant": find_redundant(model, sweep, n)[-1]}
    else:
        report = measure(model, windows, size, n, ratio, repeats, before)
        print(f"{show(report['rows'])}\n\nredundant {report['redundant']}; floors of the sweeps: "
              f"{' and '.join(f'{work / 1e12:.3f}' for work in report['operations'].values())} Tflop at "
              f"{report['rate'] / 1e12:.3f} Tflop/s\n")
    if autograd:
        report["autograd"] = beside(model, windows, size, ratio, report, before)
        ours, theirs = (row["gradients s"] + row["SVD s"] for row in report["autograd"])
        print(f"{show(report['autograd'])}\n\nas published it takes {theirs / ours:.1f} times as long; "
              f"{theirs / (ours + report['rows'][0]['seconds']):.1f} times, the redundancy sweep added to ours alone\n")
    if svds:
        report["svd"] = svd_study(model, report["redundant"], sweep, ratio)
        print(show(report["svd"]))
    return report


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


def main():
    a, cpu = parse(), torch.device("cpu")
    if a.memory:
        shapes = {a.shape: SHAPES[a.shape]} if a.shape else SHAPES
        dtype = cli.DTYPES.get(a.dtype, torch.bfloat16)
        print(show(memory(shapes, dtype, a.layers, a.seq_len or 512, a.memory)))
        return print(f"\nin GiB; {str(dtype)[6:]} weights; {a.layers or 'a fifth of the'} layers redundant")
    example = random_weights((64, 1, 2, 1, 96, 128, False), torch.float32, cpu)
    turn(example, random_prompt(example, 2, 64, SEED), 2, 1, 0.5)  # what libraries do and take only once, before all
    resets, resident = reset_peak(cpu), peak_bytes(cpu)
    model, tokenizer = open_weights(a.ckpt, a.shape, a.growth, a.device, a.dtype)
    before = resident if model.device.type == "cpu" else 0
    n, T = a.layers or max(1, model.args.n_layers // 4), cli.sequence_length(a.seq_len, 512, model)
    check_layers(model.args.n_layers, n)
    size = min(cli.batch_size(a.batch_size, T), a.samples)
    text = "as grasp.py takes them" if tokenizer else "random"
    peak = "of each phase" if resets or not before else "of the process so far"
    turns = f"\nturns        {a.repeats}, the best one counts; peak GiB {peak}" * (a.autograd or not a.svd)
    print(f"tokens       {a.samples} x {T}, {text}, batches of {size}; ratio {a.ratio}{turns}\n")
    if a.growth:
        report = growth(model, a.samples, T, size, a.ratio, a.repeats, before)
    else:
        windows = (calibration_windows(tokenizer, a.calibration, a.samples, T, a.seed)[0] if tokenizer else
                   random_prompt(model, a.samples, T, SEED))
        report = bench(model, windows, size, n, a.ratio, a.repeats, before, a.autograd, a.svd)
    if a.json:
        write_json(a.json, {"settings": {**vars(a), "seq_len": T}, "dtype": str(model.dtype),
                            "device": str(model.device), **report})


def open_weights(ckpt, shape, smallest, device, dtype):
    """(the dense model that the flags name, its tokenizer or None); smallest: the one that --growth starts from."""
    if smallest or shape:
        sizes, usual = (SHAPES[shape], torch.bfloat16) if shape else (SMALLEST, torch.float32)
        device = cli.pick_device(device)
        model = random_weights(sizes, cli.DTYPES.get(dtype, usual), device)
        cli.introduce(f"{shape or 'the smallest'}, random weights", model)
        return model, None
    return open_dense(ckpt, device, dtype)


def parse():
    p = cli.Parser(__doc__)
    add = cli.model_flags(p, "what to measure", help=DENSE).add_argument
    add("--shape", choices=SHAPES, help="random weights of this shape instead, in bfloat16 unless --dtype is given")
    add("--layers", type=cli.positive, metavar="N", help="how many are redundant (default: a quarter; --memory: a fifth)")
    add("--ratio", type=cli.fraction, default=0.1, help="fraction of each matrix's parameters to keep (default: 0.1)")
    add("--repeats", type=cli.positive, metavar="N", default=3, help="turns, of which the best counts (default: 3)")
    add("--autograd", action="store_true", help="the algorithm as published beside it, once")
    add("--svd", action="store_true", help="ways to the same SVDs, once; alone: no phases")
    add("--growth", action="store_true", help="instead: small random models, as tokens, layers and width grow")
    add("--memory", type=cli.positive, metavar="GPUS", help="instead: compute the GiB that known shapes need")
    cli.calibration_flags(p, samples=16)
    p.add_argument_group("output").add_argument("--json", metavar="FILE",
                                                help="write all figures there too")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if a.shape and a.ckpt != cli.TINY:
        raise ValueError("give one of --ckpt and --shape")
    if a.growth and (a.shape or a.ckpt != cli.TINY or a.layers or a.autograd or a.svd):
        raise ValueError("--ckpt, --shape, --layers, --autograd, --svd have no use with --growth and its own models")
    return a


if __name__ == "__main__":
    cli.command(main)
