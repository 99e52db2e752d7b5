"""GRASP: a low-rank layer where a redundant one stood, with no training [arXiv 2501.00339, Algorithm 1].

    python grasp.py --ckpt FOLDER --layers 7 --ratio 0.1

1. find_redundant   the layers whose output is most parallel to their input, by cosine                 [§2.1]
2. compress         gradients of the loss to their seven matrices, on a little calibration text        [§2.2]
                    for each matrix: W = U diag(S) Vh, a score for every sigma, the top k kept         [§2.2]
                    y = W x becomes y = A (B x), A = U_k sqrt(S_k), B = sqrt(S_k) Vh_k                 [§2.3]

`sweep(label)` is a fresh iterator over the calibration set's batches (B, T) int64; the label names its progress line.
attribution.py holds the mathematics.
"""
import argparse
from functools import partial
from pathlib import Path

from data.target import check_target, obey_signals

if __name__ == "__main__":
    obey_signals()  # before torch, whose import takes seconds

import torch
from torch import nn

from attribution import (SCORES, angular_distances, decompose, layer_cosines, low_rank_factors, svd, sweep_bytes, top_k,
                         weight_gradients)
from data import processes
from data.corpus import batches, random_windows, text_names, text_or_embedded
from evaluate import (TINY, Parser, batch_size, command, load_windows, open_checkpoint, peak_bytes, perplexities,
                      positive, sequence_length, table, timed)
from model import MATRICES, LowRankLinear, save_checkpoint


def find_redundant(model, sweep, n, contiguous=False):
    """(cosine of every layer (n_layers,), ids of the n redundant ones, ascending) [GRASP §2.1].

    contiguous: the n neighbours of smallest angular distance between their two ends instead [Gromov §3.2].
    """
    cosines = layer_cosines(model, sweep("redundancy"))
    if contiguous:
        first = int(angular_distances(model, sweep("angular distances"), n).argmin())
        return cosines, list(range(first, first + n))
    return cosines, top_k(cosines, n).tolist()


def compress(model, layer_ids, sweep, ratio=None, threshold=None, score="taylor", iterative=False, log=print,
             seconds=None):
    """Replace the matrices of the redundant layers, in place: a record for each, as `replace` gives it.

    ratio: the share of each matrix's parameters to keep; threshold instead: the share of the sum of its scores.
    One-shot (default): all gradients from the dense model, in one sweep. iterative: from the deepest block to the
    shallowest, the MLP and then the attention, gradients taken again before each, so that each sees those already
    replaced [GRASP Alg. 1]. seconds: a dict to add the wall time of each phase to.
    """
    seconds = {} if seconds is None else seconds
    groups = [matrices(*layer_ids)]
    if iterative:
        groups = [[name for name in matrices(layer) if half in name]
                  for layer in sorted(layer_ids, reverse=True) for half in ("feed_forward", "attention")]
    records = []
    for group in groups:
        dense = [name for name in group if isinstance(model.get_submodule(name), nn.Linear)]
        for name in group:
            if name not in dense:
                log(f"{name:<26} is low-rank already: left as it is")
        G = {}
        if dense and score != "magnitude":
            with timed(seconds, "attribution", model.device):
                G = weight_gradients(model, dense, sweep("attribution"))
        size = processes.count()
        if size > 1:  # each decomposes one at a time: the like beside the like, so that none waits for long
            dense.sort(key=lambda name: -model.get_submodule(name).weight.numel())
        for i in range(0, len(dense), size):
            before = seconds.get("SVD", 0.0)
            with timed(seconds, "SVD", model.device):
                done = replace(model, dense[i:i + size], G, ratio, threshold, score)
            for record in done:
                log(f"{describe(record)}  {(seconds['SVD'] - before) / len(done):.2f} s")
            records += done
    return records


def matrices(*layer_ids):
    """The names of the layers' matrices, seven each: "layers.22.attention.wq" ..."""
    return [f"layers.{layer}.{matrix}" for layer in layer_ids for matrix in MATRICES]


def replace(model, names, G, ratio, threshold, score):
    """Put factors where matrices W (m, n) stand, whose gradients leave G: {name, shape, rank, kept} for each of them.

    Each of several processes decomposes one and sends it to all. A matrix whose factors would not be smaller stays
    dense: rank and kept None. G: {name: (m, n)}, empty where the score needs none.
    """
    found, records = [], []
    for owner, name in enumerate(names):  # first what they need of each other, so that all work at once
        W = processes.whole(model.get_submodule(name).weight)
        g = processes.summed(G.pop(name), owner) if G else None
        if owner == processes.rank():
            mine = W, g
    if processes.rank() < len(names):
        found = decompose(*mine, ratio, threshold, score)
    for owner, name in enumerate(names):
        records.append({"name": name, "shape": [*model.get_submodule(name).weight.shape], "rank": None, "kept": None})
        if done := processes.broadcast(found, owner, model.device):
            kept, A, B = done
            model.replace_matrix(name, LowRankLinear(A, B))
            records[-1].update(rank=len(kept), kept=kept.tolist())
    return records


def keep(model, name, usv, kept):
    """Put the factors of the kept components, in the model's dtype, where `name` stands; return what stood there."""
    A, B = low_rank_factors(*usv, kept)
    return model.replace_matrix(name, LowRankLinear(A.to(model.dtype), B.to(model.dtype)))


def describe(record):
    (m, n), k = record["shape"], record["rank"]
    kept = "stays dense: its factors would not be smaller" if k is None else f"kept {100 * k * (m + n) / (m * n):.2f} %"
    return f"{record['name']:<26} rank {k or min(m, n):4}/{min(m, n):<5} {kept}"


def main():
    a = parse()
    seconds = {}
    with timed(seconds, "load"):
        model, tokenizer = open_checkpoint(a.ckpt, a.device, a.dtype, a.shard)
    a.device, a.dtype, before, dense_params = model.device, model.dtype, model.n_params, model.n_params_dense
    check_layers(model.args.n_layers, a.layers, a.layer_ids)
    windows, calibration = calibration_windows(a, model, tokenizer)
    size = min(batch_size(a.batch_size, a.seq_len), a.samples)
    sweep = partial(batches, windows.to(a.device), size)  # on the device at once, so that no sweep waits for the CPU
    eval_len = sequence_length(None, 2048, model)
    texts = {} if a.eval == ["none"] else load_windows(a.eval, tokenizer, eval_len, a.ckpt, a.windows, a.data_dir)
    asked = f"threshold {a.threshold}" if a.threshold else f"ratio {a.ratio}"
    print(f"calibration  {calibration['text']}; {calibration['tokens']:,} tokens, {a.samples} random windows of "
          f"{a.seq_len}, seed {a.seed}, batches of {size}\n"
          f"method       {asked} of {a.layers or len(a.layer_ids)} layers{' in a row' * a.contiguous}, score "
          f"{a.score}, {'iterative' if a.iterative else 'one-shot'}; to {a.out}\n")
    with timed(seconds, "redundancy", a.device):
        cosines, redundant = find_redundant(model, sweep, a.layers or 1, a.contiguous)
    redundant = sorted(a.layer_ids) if a.layer_ids else redundant
    for layer, cosine in enumerate(cosines):
        print(f"layer {layer:3}  cosine {cosine:.4f}{'  redundant' * (layer in redundant)}")
    parts = sweep_bytes(model, redundant, size, a.seq_len)
    peak = (f"computed peak {sum(parts.values()) / 2 ** 30:.2f} GiB: "
            + ", ".join(f"{part} {count / 2 ** 30:.2f}" for part, count in parts.items()))
    print(f"\nattribution  {peak}\n")
    rows = []

    def add_row(name, phases):
        with timed(seconds, "evaluation", a.device):
            results = perplexities(model, texts, batch_size(a.batch_size, eval_len), name)
        rows.append({"model": name, "parameters": model.n_params, "perplexity": results,
                     "seconds": sum(seconds[phase] for phase in phases) if phases else None,
                     "peak_bytes": peak_bytes(a.device)})

    add_row("dense" if before == dense_params else "input", [])
    dense = {name: model.get_submodule(name) for name in matrices(*redundant)} if a.compare else {}
    try:
        with timed(seconds, "compression", a.device):
            records = compress(model, redundant, sweep, a.ratio, a.threshold, a.score, a.iterative, seconds=seconds)
    except torch.OutOfMemoryError as e:  # which says what was free
        raise MemoryError(f"{peak}. {e}") from None
    if a.compare:
        add_comparisons(model, dense, records, redundant, add_row, seconds)
    add_row("GRASP" if a.score == "taylor" else f"GRASP, {a.score}", ["redundancy", "compression"])
    print(f"\n{table(rows, texts, dense_params)}\nasked: {asked} of layers {redundant}; achieved: {model.n_params:,} "
          f"parameters left of {before:,}, {100 * (1 - model.n_params / before):.1f} % removed")
    report = {"settings": vars(a), "cosines": cosines.tolist(), "redundant": redundant, "matrices": records,
              "parameters_before": before, "parameters_after": model.n_params, "calibration": calibration,
              "protocol": {label: protocol for label, (_, protocol) in texts.items()}, "results": rows,
              "seconds": seconds, "peak_bytes": peak_bytes(a.device)}
    save_checkpoint(model, a.out, report, tokenizer.file, a.overwrite)
    print(f"written to {a.out}")


def check_layers(count, layers, layer_ids):
    if (layers or 1) > count or not all(0 <= layer < count for layer in layer_ids or []):
        raise ValueError(f"--layers, --layer-ids: this model has {count} layers, 0 to {count - 1}; asked for "
                         f"{layers or layer_ids}")


def calibration_windows(a, model, tokenizer):
    """(windows (samples, seq_len) int64, what they are and where they lie in the token stream)."""
    name = a.calibration or ("embedded" if a.ckpt == TINY else "wikitext2")
    _, text, source = text_or_embedded(name, "train", a.data_dir, a.calibration)
    tokens = tokenizer.stream(text)
    a.seq_len = sequence_length(a.seq_len, 512, model)
    windows, offsets = random_windows(tokens, a.samples, a.seq_len, a.seed)
    return windows, {"text": source, "tokens": len(tokens), "offsets": offsets.tolist()}


def add_comparisons(model, dense, records, redundant, add_row, seconds):
    """Two rows to compare with: redundant layers dropped, and plain SVD of GRASP's ranks; the model stays GRASP's."""
    layers = model.layers
    model.layers = nn.ModuleList(block for layer, block in enumerate(layers) if layer not in redundant)
    add_row("layers dropped", ["redundancy"])
    model.layers = layers
    ours = {}
    with timed(seconds, "plain SVD", model.device):
        for name, k in ((record["name"], record["rank"]) for record in records if record["rank"]):
            usv = svd(processes.whole(dense[name].weight))
            ours[name] = keep(model, name, usv, torch.arange(k, device=model.device))  # the k largest
    add_row("plain SVD", ["redundancy", "plain SVD"])
    for name, module in ours.items():
        model.replace_matrix(name, module)


def parse():
    p, embedded = Parser(__doc__.splitlines()[0]), "with the embedded model, embedded"
    p.add_texts(shard=True)
    p.add_argument("--layers", type=positive, metavar="N", help="how many redundant layers to compress")
    p.add_argument("--layer-ids", type=int, nargs="+", metavar="ID", help="compress these layers instead")
    p.add_argument("--contiguous", action="store_true", help="take neighbouring layers, by angular distance")
    p.add_argument("--ratio", type=share, help="share of each matrix's parameters to keep (default: 0.1)")
    p.add_argument("--threshold", type=share, help="instead: share of the sum of scores that the kept components reach")
    p.add_argument("--score", choices=SCORES, default="taylor", help="what ranks the components (default: taylor)")
    p.add_argument("--iterative", action="store_true", help="half a block at a time, with fresh gradients")
    p.add_argument("--calibration", metavar="TEXT", help=f"{text_names('train')} or a file (default: wikitext2; "
                   f"{embedded})")
    p.add_argument("--samples", type=positive, metavar="N", default=512, help="calibration sequences (default: 512)")
    p.add_argument("--seq-len", type=positive, metavar="T", help="tokens in each (default: 512, or all positions)")
    p.add_argument("--seed", type=seed, default=42, help="of the windows' random offsets (default: 42)")
    p.add_argument("--eval", nargs="+", metavar="TEXT", help=f"none, or any of {text_names('test')} and files "
                   f"(default: wikitext2 ptb; {embedded})")
    p.add_argument("--compare", action="store_true", help="add rows: the layers dropped, and plain SVD")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="to write (default: NAME-grasp here)")
    p.add_argument("--overwrite", action="store_true", help="replace a folder that an earlier run wrote")
    a = p.parse_args()
    if (a.layers is None) == (a.layer_ids is None):
        raise ValueError("give one of --layers N and --layer-ids ID ...")
    if a.layer_ids and (len(set(a.layer_ids)) < len(a.layer_ids) or a.contiguous):
        raise ValueError(f"--layer-ids {a.layer_ids}: expected each id once, and no --contiguous")
    if a.ratio and a.threshold:
        raise ValueError("give one of --ratio and --threshold")
    a.ratio = a.ratio or (None if a.threshold else 0.1)
    a.out = a.out or Path(f"{a.ckpt.name}-grasp")
    check_target(a.out, a.overwrite, [a.ckpt])
    return a


def share(text):
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected more than 0 and at most 1")
    return float(text)


def seed(text):
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0 to 2^63 - 1")
    return int(text)


if __name__ == "__main__":
    command(main, parallel=True)
