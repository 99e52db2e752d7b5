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

from torch import Tensor

from attribution import (angular_distances, importance, layer_cosines, low_rank_factors, rank_for_ratio,
                         rank_for_threshold, sigma_gradients, svd, top_k, weight_gradients)
from model import LowRankLinear, Transformer, finite, save_checkpoint
from runtime import cli, distributed
from runtime.files import check_output, check_space, optional_json
from runtime.job import Job, check_dense, check_layers, dense_matrices

SCORES = {  # of importance, and what the table calls a model made by it
    "taylor": "GRASP", "signed": "GRASP, signed", "gradient": "GRASP, gradient", "magnitude": "plain SVD"}
Sweep = Callable[[str], Iterable[Tensor]]  # label of its progress line -> fresh iterator over batches (B, T)


def find_redundant(model: Transformer, sweep: Sweep, n: int, contiguous: bool = False,
                   all_sequences: bool = False) -> tuple[Tensor, Tensor, int, list[int]]:
    """Return (cosine of every layer, its standard error, how many sequences were read, ids of the n redundant
    layers) [GRASP §2.1].

    Stops once the n layers are known (see `margin`): 4 standard errors, after 32 sequences or more.
    all_sequences: reads all in any case. contiguous: the n neighbours with the smallest angular distance
    between their two ends, over all sequences [arXiv 2403.17887 §3.2].
    """
    def known(cosines, errors, sequences):
        return sequences >= 32 and margin(cosines, errors, n)[0] > 4

    check_layers(model.args.n_layers, n)
    stop = None if all_sequences or contiguous else known
    cosines, errors, sequences = layer_cosines(model, sweep("redundancy"), stop)
    redundant = top_k(cosines, n).tolist()
    if contiguous:
        first = int(angular_distances(model, sweep("redundancy"), n).argmin())
        redundant = list(range(first, first + n))
    return cosines, errors, sequences, redundant


def margin(cosines: Tensor, errors: Tensor, n: int) -> tuple[float, list[int]]:
    """Return (by how many standard errors the nth highest cosine is above the next, those two layers).

    Layers' errors are taken as independent.
    """
    pair = cosines.argsort(descending=True, stable=True)[n - 1:n + 1]
    if len(pair) < 2:  # all layers are redundant
        return math.inf, pair.tolist()
    return float(-cosines[pair].diff() / errors[pair].norm()), pair.tolist()


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
    stays dense: rank and kept are None. Raises ValueError for arguments out of range.
    """
    check_layers(model.args.n_layers, None, layer_ids)
    check_settings(sweep, ratio, threshold, score, iterative, gradients)
    groups = [(layer_ids, "")]
    if iterative:
        groups = [([layer], half) for layer in sorted(layer_ids, reverse=True)
                  for half in ("feed_forward", "attention")]
    for layers, half in groups:
        names = [name for name in dense_matrices(model, layers) if half in name]
        G = gradients
        if names and G is None and score != "magnitude":
            G = weight_gradients(model, names, sweep("attribution"), label_shift)
        for name in names:
            U, S, Vh = svd(distributed.whole(model.get_submodule(name).weight))
            m, n = len(U), Vh.shape[1]
            sigma_grad = None if score == "magnitude" else sigma_gradients(U, distributed.whole(G[name]), Vh)
            scores = importance(S, sigma_grad, score)
            if not finite(scores):
                raise ValueError(f"{name}: a score is not finite; try --dtype float64")
            k = rank_for_threshold(scores, threshold) if threshold else rank_for_ratio(m, n, ratio)
            kept = top_k(scores, k)
            record = {"name": name, "shape": [m, n], "rank": None, "kept": None}
            if k * (m + n) < m * n:
                A, B = low_rank_factors(U, S, Vh, kept)
                model.set_submodule(name, LowRankLinear(A, B).to(model.dtype))
                record.update(rank=k, kept=kept.tolist())
            yield record


def check_settings(sweep: Sweep, ratio: float | None, threshold: float | None, score: str, iterative: bool,
                   gradients: dict[str, Tensor] | None) -> None:
    """Raise ValueError for arguments that compress cannot take."""
    if score not in SCORES:
        raise ValueError(f"score {score!r}: expected one of {', '.join(SCORES)}")
    if (ratio is None) == (threshold is None) or not 0 < (threshold if ratio is None else ratio) <= 1:
        raise ValueError(f"ratio {ratio}, threshold {threshold}: expected one of them, above 0 and at most 1")
    if threshold and score == "signed":
        raise ValueError("threshold: a fraction of a sum of scores, and signed scores may sum to 0")
    if iterative and gradients is not None:
        raise ValueError("iterative takes fresh gradients before each half block: give it no gradients")
    if score != "magnitude" and gradients is None and not callable(sweep):
        raise ValueError(f"sweep is a {type(sweep).__name__}, expected a function that gives batches")


def main() -> None:
    a, records = parse(), []
    earlier = optional_json(a.ckpt / "report.json")  # of the run that made the folder, if one did
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype, a.shard)
    check_layers(model.args.n_layers, a.layers, a.layer_ids)
    check_space(a.out, model.n_params * model.dtype.itemsize)
    job = Job(model, a.samples, a.seq_len, a.batch_size, a.layers or len(a.layer_ids))
    asked = f"threshold {a.threshold}" if a.threshold else f"ratio {a.ratio}"
    which = f"layers {a.layer_ids}" if a.layer_ids else f"{a.layers} layer{'s' * (a.layers > 1)}"
    print(f"method       {asked} of {which}{' in a row' * a.contiguous}, score {a.score}, "
          f"label shift {a.label_shift}, {'iterative' if a.iterative else 'one-shot'}; to {a.out}")
    check_settings(job.sweep, a.ratio, a.threshold, a.score, a.iterative, None)
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)

    cosines, redundant = None, sorted(a.layer_ids or [])
    if not a.layer_ids:
        cosines, *found, redundant = find_redundant(model, job.sweep, a.layers, a.contiguous, a.all_sequences)
        print_cosines(cosines, *found, redundant, a.contiguous)
    check_dense(model, redundant)
    job.evaluate()
    with cli.timed(job.seconds, "compression", model.device):
        for record in compress(model, redundant, job.sweep, a.ratio, a.threshold, a.score, a.iterative,
                               label_shift=a.label_shift):
            records.append(record)
            print_record(record)
    job.evaluate(SCORES[a.score], job.seconds.get("redundancy", 0) + job.seconds["compression"])
    print(f"\n{job.table()}\nasked: {asked} of layers {redundant}; achieved: {job.achieved()}")
    report = job.report(vars(a), cosines=None if cosines is None else cosines.tolist(),
                        redundant=redundant, matrices=records, input=earlier)
    save_checkpoint(model, a.out, report, tokenizer.files, a.overwrite)
    print(f"written to {a.out}")


def print_cosines(cosines: Tensor, errors: Tensor, sequences: int, redundant: list[int],
                  contiguous: bool) -> None:
    """Print each layer's cosine with its standard error, and whether the choice is close."""
    for layer, (cosine, error) in enumerate(zip(cosines.tolist(), errors.tolist())):
        print(f"layer {layer:3}  cosine {cosine:.4f} ± {error:.4f}{'  redundant' * (layer in redundant)}")
    print(f"{sequences} sequence{'s' * (sequences > 1)} read for the cosines")
    far, pair = margin(cosines, errors, len(redundant))
    if not far >= 2 and not contiguous:  # NaN: two layers are equal, or one sequence was read
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
    group.add_argument("--contiguous", action="store_true", help="take neighbours [arXiv 2403.17887]")
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
    cli.machine_flags(p, batches=True, several=True)
    a = p.parse_args()
    if a.layer_ids and a.contiguous:
        raise ValueError("--contiguous finds the layers itself: it goes with --layers, not with --layer-ids")
    a.ratio = None if a.threshold else a.ratio or 0.1
    check_output(a.out, a.overwrite)
    return a


if __name__ == "__main__":
    cli.command(main, parallel=True)
