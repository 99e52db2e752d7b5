"""GRASP: replace the redundant layers of a LLaMA by low-rank ones, without training [arXiv 2501.00339].

    python grasp.py --ckpt FOLDER --layers 7 --ratio 0.1

1. find_redundant   the layers whose output is most parallel to their input, by cosine             [§2.1]
2. compress         gradients dL/dW of their seven matrices, on a little calibration text          [§2.2]
                    each matrix W = U diag(S) Vh keeps the k largest |sigma dL/d sigma|            [§2.2]
                    y = W x becomes y = A (B x), A = U_K sqrt(S_K), B = sqrt(S_K) Vh_K             [§2.3]

By default all gradients come from the dense model, in one sweep (one-shot). Algorithm 1 of the paper is the
iterative order, `--iterative`; the paper finds them equal (perplexity 37.86 one-shot, 38.39 iterative).
"""
import argparse
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attribution import (importance, layer_cosines, low_rank_factors, rank_for_ratio, rank_for_threshold,
                         sigma_gradients, svd, top_k, weight_gradients)
from data.checkpoint import save_checkpoint
from data.files import check_output, check_space, optional_json
from model import Transformer, finite, matrix_names, replace
from runtime import cli
from runtime.job import Job

SCORES = {  # of importance, and what the table calls a model made by it
    "taylor": "GRASP", "signed": "GRASP, signed", "gradient": "GRASP, gradient", "magnitude": "plain SVD"}
Sweep = Callable[[str], Iterable[Tensor]]  # label of its progress line -> fresh iterator over batches (B, T)


def find_redundant(model: Transformer, sweep: Sweep, n: int,
                   all_sequences: bool = False) -> tuple[Tensor, list[int]]:
    """Return (c (n_layers, N) fp64, the ids of the n redundant layers) [GRASP §2.1].

    c: each layer's mean cosine over each of the N sequences that were read; s = c.mean(1). The first 32, 64,
    128 ... sequences are enough if they decide by 4 standard errors (`margin`); not with all_sequences or
    several processes. Raises ValueError if n is out of range or a cosine is not finite.
    """
    check_layers(model, n)
    c = torch.zeros(model.args.n_layers, 0, dtype=torch.float64, device=model.device)
    ask = [] if all_sequences or dist.is_initialized() else [32 << i for i in range(26)]  # 32, 64, 128 ...
    for part in layer_cosines(model, sweep("redundancy")):
        before, c = c.shape[1], torch.cat([c, part], 1)
        reached = (N for N in ask if before < N <= c.shape[1])
        if enough := next((N for N in reached if margin(c[:, :N], n)[0] > 4), None):
            c = c[:, :enough]
            break
    if dist.is_initialized():  # torchrun: each process has read its part of the sequences
        parts = [c] * dist.get_world_size()
        dist.all_gather_object(parts, c.cpu())
        c = torch.cat(parts, 1)
    if not c.numel():
        raise ValueError("no batches of tokens: the sweep is empty or used up")
    if not finite(c):
        layer = c.isfinite().all(1).tolist().index(False)
        raise ValueError(f"the cosine of layer {layer} is not a number in {model.dtype}; try --dtype float32")
    return c.cpu(), top_k(c.mean(1), n).tolist()


def margin(c: Tensor, n: int) -> tuple[float, list[int]]:
    """Return (how many standard errors the nth highest mean cosine is above the next, those two layers).

    If all n layers are redundant there is no next one: infinity and one layer.
    """
    pair = c.mean(1).argsort(descending=True, stable=True)[n - 1:n + 1].tolist()
    if len(pair) < 2:
        return math.inf, pair
    difference = c[pair[0]] - c[pair[1]]
    return float(difference.mean() / standard_error(difference)), pair


def standard_error(x: Tensor) -> Tensor:
    """Standard error of the mean over the last dimension, the N sequences; NaN if N = 1."""
    return (x.var(-1, correction=0) / (x.shape[-1] - 1)).sqrt()


def compress(model: Transformer, layer_ids: list[int], sweep: Sweep, ratio: float | None = None,
             threshold: float | None = None, score: str = "taylor", iterative: bool = False,
             gradients: dict[str, Tensor] | None = None, label_shift: int = 1) -> Iterator[dict]:
    """Replace the dense matrices of these layers by low-rank ones, in place. Yields a record for each.

    This is a generator: nothing happens until it is iterated, e.g. by list(compress(...)).
    ratio: fraction of each matrix's parameters to keep. threshold: instead, fraction of its sum of scores.
    iterative: from the deepest block to the shallowest, the MLP and then the attention, with fresh gradients
    before each [GRASP Alg. 1]. gradients: {name: (m, n)} of the dense model, if they are known already.
    label_shift: 1, the next token; the authors' code has 2. score: see attribution.importance.
    Record: {name, shape [m, n], rank k, kept (k indices)}. If the factors would not be smaller, the matrix
    stays dense: rank and kept are None. Raises ValueError for arguments out of range, if none of these
    matrices is dense, and for a score that is not finite.
    """
    check_settings(ratio, threshold, score)
    if iterative and gradients is not None:
        raise ValueError("iterative takes fresh gradients before each half block: give it no gradients")
    if score != "magnitude" and gradients is None and not callable(sweep):
        raise ValueError(f"sweep is a {type(sweep).__name__}, expected a function that gives batches")
    for names in groups(dense_matrices(model, layer_ids), iterative):
        G = gradients
        if G is None and score != "magnitude":  # plain SVD needs none
            G = weight_gradients(model, names, sweep("attribution"), label_shift)
        for name in names:
            U, S, Vh = svd(model.weight(name))
            m, n = len(U), Vh.shape[1]
            sigma_grad = None if score == "magnitude" else sigma_gradients(U, G[name], Vh)
            scores = importance(S, sigma_grad, score)
            if not finite(scores):
                raise ValueError(f"{name}: a score is not finite; try --dtype float64")
            k = rank_for_threshold(scores, threshold) if threshold else rank_for_ratio(m, n, ratio)
            kept = top_k(scores, k)
            if smaller := k * (m + n) < m * n:
                replace(model, name, *low_rank_factors(U, S, Vh, kept))
            yield {"name": name, "shape": [m, n], "rank": k if smaller else None,
                   "kept": kept.tolist() if smaller else None}


def groups(names: list[str], iterative: bool) -> list[list[str]]:
    """The matrices that share a sweep: all; iterative: each half of a block, from the deepest block up."""
    if not iterative:
        return [names]
    halves = dict.fromkeys(name.rpartition(".")[0] for name in names)  # "layers.22.attention" ...
    return [[name for name in names if name.startswith(f"{half}.")] for half in reversed(halves)]


def dense_matrices(model: Transformer, layer_ids: list[int]) -> list[str]:
    """The names of these layers' dense matrices, by ascending layer. Raises ValueError if there are none."""
    check_layers(model, layer_ids)
    names = matrix_names(*sorted(layer_ids))
    if not (dense := [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]):
        raise ValueError(f"layers {layer_ids} are low-rank already; take more, others, or the dense model")
    return dense


def check_layers(model: Transformer, asked: int | list[int]) -> None:
    """Raise ValueError unless the model has so many layers, or each of these ids once."""
    count, ids = len(model.layers), range(asked) if isinstance(asked, int) else asked
    if not 0 < len(ids) <= count or len(set(ids)) < len(ids) or not all(0 <= layer < count for layer in ids):
        raise ValueError(f"this model has {count} layers, 0 to {count - 1}; asked for {asked}, expected some "
                         "of them, each once")


def check_settings(ratio: float | None, threshold: float | None, score: str) -> None:
    """Raise ValueError for settings that compress cannot take."""
    if score not in SCORES:
        raise ValueError(f"score {score!r}: expected one of {', '.join(SCORES)}")
    if (ratio is None) == (threshold is None) or not 0 < (threshold if ratio is None else ratio) <= 1:
        raise ValueError(f"ratio {ratio}, threshold {threshold}: expected one of them, above 0 and at most 1")
    if threshold and score == "signed":
        raise ValueError("threshold: a fraction of a sum of scores, and signed scores may sum to 0")


def main() -> None:
    a, records = parse(), []
    earlier = optional_json(a.ckpt / "report.json")  # of the run that made the folder, if one did
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype, a.offload)
    check_layers(model, a.layers or a.layer_ids)
    check_space(a.out, model.n_params * model.dtype.itemsize)
    job = Job(model, a.samples, a.seq_len, a.batch_size, a.layers or len(a.layer_ids))
    asked = f"threshold {a.threshold}" if a.threshold else f"ratio {a.ratio}"
    which = f"layers {a.layer_ids}" if a.layer_ids else f"{a.layers} layer{'s' * (a.layers > 1)}"
    print(f"method       {asked} of {which}, score {a.score}, label shift {a.label_shift}, "
          f"{'iterative' if a.iterative else 'one-shot'}; to {a.out}")
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)

    found, redundant = {"cosines": None}, sorted(a.layer_ids or [])
    if a.layers:
        c, redundant = find_redundant(model, job.sweep, a.layers, a.all_sequences)
        errors = standard_error(c).tolist() if c.shape[1] > 1 else None  # NaN is no JSON
        found = {"cosines": c.mean(1).tolist(), "cosine_errors": errors, "cosine_sequences": c.shape[1]}
        print_cosines(c, redundant)
    dense_matrices(model, redundant)  # fails before the evaluation if none is dense
    job.evaluate()
    with cli.timed(job.seconds, "compression", model.device):
        for record in compress(model, redundant, job.sweep, a.ratio, a.threshold, a.score, a.iterative,
                               label_shift=a.label_shift):
            records.append(record)
            print_record(record)
    job.evaluate(SCORES[a.score], job.seconds.get("redundancy", 0) + job.seconds["compression"])
    print(f"\n{job.table()}\nasked: {asked} of layers {redundant}; achieved: {job.achieved()}")
    report = job.report(vars(a), **found, redundant=redundant, matrices=records, input=earlier)
    if cli.first_process():
        save_checkpoint(model, a.out, report, tokenizer.files, a.overwrite)
    print(f"written to {a.out}")


def print_cosines(c: Tensor, redundant: list[int]) -> None:
    """Print each layer's mean cosine with its standard error, and whether the choice is close."""
    n = c.shape[1]
    for layer, (cosine, error) in enumerate(zip(c.mean(1).tolist(), standard_error(c).tolist())):
        print(f"layer {layer:3}  cosine {cosine:.4f} ± {error:.4f}{'  redundant' * (layer in redundant)}")
    print(f"{n} sequence{'s' * (n > 1)} read for the cosines")
    far, pair = margin(c, len(redundant))
    if not far >= 2:  # NaN: two layers are equal, or one sequence was read
        print(f"layers {pair[0]} and {pair[1]} nearly tie; more --samples or --layer-ids decide between them")


def print_record(record: dict) -> None:
    (m, n), k = record["shape"], record["rank"]
    kept = f"kept {100 * k * (m + n) / (m * n):.2f} %" if k else "dense: factors would be larger"
    print(f"{record['name']:<26} rank {k or min(m, n):4}/{min(m, n):<5} {kept}")


def parse() -> argparse.Namespace:
    p = cli.Parser(__doc__)
    group = cli.model_flags(p, "what to compress")
    either = group.add_mutually_exclusive_group(required=True).add_argument
    either("--layers", type=cli.positive, metavar="N", help="how many redundant layers to compress")
    either("--layer-ids", type=int, nargs="+", metavar="ID", help="compress these layers instead, from 0 on")
    group.add_argument("--all-sequences", action="store_true", help="no early stop of the redundancy sweep")
    either = group.add_mutually_exclusive_group().add_argument
    either("--ratio", type=cli.fraction, help="fraction of each matrix's parameters to keep (default: 0.1)")
    either("--threshold", type=cli.fraction, help="instead: fraction of the sum of scores to keep")
    group.add_argument("--score", choices=SCORES, default="taylor", help="taylor: |sigma dL/dsigma|, "
                       "signed: -sigma dL/dsigma, gradient: |dL/dsigma|, magnitude: sigma (default: taylor)")
    group.add_argument("--label-shift", type=cli.positive, metavar="N", default=1,
                       help="position t predicts token t + N (default: 1; the authors' code: 2)")
    group.add_argument("--iterative", action="store_true", help="Algorithm 1's order, half a block at a time")
    cli.calibration_flags(p)
    cli.evaluation_flags(p)
    cli.output_flags(p, "grasp")
    cli.machine_flags(p, batches=True, offload=True)
    a = p.parse_args()
    a.ratio = None if a.threshold else a.ratio or 0.1
    check_settings(a.ratio, a.threshold, a.score)
    if cli.first_process():
        check_output(a.out, a.overwrite)
    return a


if __name__ == "__main__":
    cli.command(main, parallel=True)
