"""GRASP and published baselines on one model, one calibration set and one budget, ranked by perplexity.

    python -m extras.compare --ckpt FOLDER --layers 7 --ratio 0.1 --methods shortgpt svd grasp

The budget is what GRASP removes from the N redundant layers at that ratio, or --budget, a fraction of all blocks'
parameters. Methods that take out whole blocks cannot meet it: they have two rows, with the whole blocks below the
budget and above it. Each method is described in its file in extras/baselines/. svd, fwsvd, asvd, svd-llm, kfac and
grasp work on the N redundant layers, which each finds for itself, in its own seconds. A name that ends in -all works on
every layer. kfac (low-rank, one ratio), kfac-all (low-rank, one ranking), fisher (channels of the MLPs too),
fisher-widths (channels alone) and fisher-llama (one width) are variants of extras.fisher, here with --multiple 1. So
are obd-llm (kfac-all at one ratio: OBD-LLM, arXiv 2604.00821) and io-svd (kfac-all ranked by first order, as IO-SVD,
2605.15626, whose H is of the top tokens' probabilities).

--calibration A+B takes half of the windows from each text. Every row starts from a freshly loaded dense model and a
freshly seeded generator: none depends on the rows before it. sleb is greedy: its second row drops one more block from
its first row's model, and its seconds count both. Seconds and peak memory are the method's own: loading comes before
them, evaluation after.
"""
import gc
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from data.checkpoint import load_checkpoint, save_checkpoint
from data.files import check_output, write_json
from evaluate import markdown, protocols, result_row
from extras import DENSE, fisher, held, open_dense, peak_bytes, reset_peak
from extras.ablation import ratio_of_size
from extras.baselines import block_params, blocks_params
from extras.baselines.decomposition import asvd, fwsvd, plain_svd, svd_llm
from extras.baselines.lorap import lorap
from extras.baselines.modegpt import modegpt
from extras.baselines.patch import linearpatch, replaceme
from extras.baselines.pruner import llm_pruner
from extras.baselines.removal import laco, shortgpt, sleb
from extras.baselines.slicegpt import slicegpt
from extras.baselines.streamline import streamline
from extras.fisher.shapes import widths
from grasp import check_layers, compress, dense_matrices, find_redundant
from runtime import cli
from runtime.job import Job

BLOCKS = {"shortgpt": shortgpt, "sleb": sleb, "laco": laco, "linearpatch": linearpatch, "replaceme": replaceme}
CLOSE = 0.005  # of the budget: off by more than that is said


def methods(n):
    """{name: function (model, sweep, budget) -> model}. What is `here` works on the n redundant layers alone."""
    def here(method):
        return partial(on_redundant, method, n)

    return {"streamline": streamline,
            "svd": here(plain_svd), "fwsvd": here(fwsvd), "asvd": here(asvd), "svd-llm": here(svd_llm),
            "svd-all": plain_svd, "fwsvd-all": fwsvd, "asvd-all": asvd, "svd-llm-all": svd_llm,
            "lorap": lorap, "modegpt": modegpt, "slicegpt": slicegpt, "llm-pruner": llm_pruner,
            "grasp": here(grasp),
            "kfac": here(partial(in_place, fisher.compress, allocate="ratio", channels=False)),
            "kfac-all": partial(in_place, fisher.compress, channels=False),
            "obd-llm": partial(in_place, fisher.compress, allocate="ratio", channels=False),
            "io-svd": partial(in_place, fisher.compress, score="taylor", channels=False),
            "fisher": partial(in_place, fisher.compress), "fisher-widths": partial(in_place, widths, multiple=1),
            "fisher-llama": partial(in_place, widths, multiple=1, equal=True)}


def rows_of(name, n, model, budget):
    """[(name of a row, function (model, sweep) -> model, whether it continues the row before)] of a method.

    A method of whole blocks has two: the most blocks that the budget holds and one more. If the budget is a whole
    number of blocks but for CLOSE, it has one.
    """
    if name not in BLOCKS:
        return [(name, lambda model, sweep: methods(n)[name](model, sweep, budget), False)]
    added, size = model.args.dim ** 2 if name == "linearpatch" else 0, block_params(model)
    below, rest = divmod(budget + added, size)
    counts = [below, below + 1]
    if min(rest, size - rest) <= CLOSE * budget:
        counts = [below + (rest > size / 2)]
    rows = [(f"{name}, {count} block{'s' * (count > 1)}", partial(BLOCKS[name], n=count), False)
            for count in counts if count]
    if name == "sleb" and len(rows) == 2:  # greedy: n + 1 blocks are n blocks and one more
        rows[1] = rows[1][0], partial(sleb, n=1), True
    return rows


def on_redundant(method, n, model, sweep, budget):
    """A method that can be kept to some layers, on the n redundant ones [GRASP §2.1]."""
    return method(model, sweep, budget, layers=find_redundant(model, sweep, n)[-1])


def grasp(model, sweep, budget, layers):
    """The paper's method with its defaults, at the one ratio by which these layers lose `budget` parameters."""
    shapes = shapes_of(model, layers)
    most = held(shapes) - held(shapes, 0)  # of rank 1
    if budget > most:
        raise ValueError(f"cannot remove {budget:,} parameters: GRASP of {len(layers)} layers removes {most:,} at most")
    list(compress(model, layers, sweep, ratio_of_size(shapes, held(shapes) - budget)))
    return model


def shapes_of(model, layers):
    return [model.get_submodule(name).weight.shape for name in dense_matrices(model, layers)]


def in_place(method, model, sweep, budget, **settings):
    """A method that changes the model and returns what it kept, as one that returns the model."""
    method(model, sweep, budget, **settings)
    return model


def budget_of(model, n, ratio, part=None):
    """How many parameters to remove: as GRASP does from n layers at `ratio`; or the fraction `part` of all blocks'."""
    if part:
        return round(part * blocks_params(model))
    shapes = shapes_of(model, range(n))  # all layers are alike
    return held(shapes) - held(shapes, ratio)


def run(name, method, job, budget, before=None):
    """Run a method, put its result into job.model, evaluate it, and return its row.

    Row: {method, removed (parameters), off (relative distance from the budget), perplexity, seconds, peak_bytes}. If a
    method cannot do it, or its perplexity is no number (ValueError, LinAlgError), {method, error}.
    before: the row that this one continues.
    """
    seconds, device, before = {}, job.model.device, before or {"seconds": 0.0, "peak_bytes": 0}
    if "error" in before:
        return {"method": name, "error": before["error"]}
    reset_peak(device)
    try:
        with cli.timed(seconds, name, device):
            job.model = method(job.model, job.sweep)
        peak, removed = max(peak_bytes(device), before["peak_bytes"]), job.before - job.model.n_params
        return {"method": name, "removed": removed, "off": removed / budget - 1,
                "perplexity": result_row(name, job.model, job.texts, job.eval_batches)["perplexity"],
                "seconds": before["seconds"] + seconds[name], "peak_bytes": peak}
    except (ValueError, torch.linalg.LinAlgError) as e:
        return {"method": name, "error": " ".join(str(e).split())}


def columns(row, texts):
    """{head of a column: what the row has there}, as strings; "-" for what it does not have."""
    def cell(field, show):
        return show(row[field]) if field in row else "-"

    return {"method": row["method"], "removed": cell("removed", "{:,}".format),
            "off budget": cell("off", lambda off: f"{100 * off:+.2f} %"),
            **{f"{text} ppl": cell("perplexity", lambda results: f"{results[text]:.2f}") for text in texts},
            "seconds": cell("seconds", "{:.1f}".format),
            "peak GiB": cell("peak_bytes", lambda peak: f"{peak / 2 ** 30:.2f}")}


def ranked(rows):
    """The rows in the order of the first text's perplexity; the dense model comes first, methods that failed last."""
    return rows[:1] + sorted(rows[1:], key=lambda row: next(iter(row.get("perplexity", {}).values()), float("inf")))


def compared(rows, texts, notes):
    """The Markdown table; under it which methods failed or are off the budget, the notes and the texts' protocols."""
    shown = [columns(row, texts) for row in ranked(rows)]
    off = [row["method"] for row in rows if abs(row.get("off", 0)) > CLOSE]
    return "\n".join([markdown([*shown[0]], [[*row.values()] for row in shown]), "",
                      *(f"{row['method']}: {row['error']}" for row in rows if "error" in row),
                      *[f"off the budget by more than {100 * CLOSE} %: {'; '.join(off)}"] * bool(off), *notes,
                      protocols(texts)])


def main():
    a = parse()
    model, tokenizer = open_dense(a.ckpt, a.device, a.dtype)
    check_layers(model, a.layers)
    budget = budget_of(model, a.layers, a.ratio, a.budget)
    job = Job(model, a.samples, a.seq_len, a.batch_size)
    if not budget:
        raise ValueError("--ratio, --budget: leave nothing to remove")
    which = f"{a.layers} layer{'s' * (a.layers > 1)}"
    of = f"{100 * a.budget:g} % of its blocks" if a.budget else f"as GRASP of {which} at ratio {a.ratio}"
    notes = [f"budget       {budget:,} parameters, {100 * budget / model.n_params:.1f} % of the model, {of}",
             "measured     seconds of the method alone; peak GiB "
             f"{'of the method alone' if reset_peak(model.device) else 'of the process so far'}"]
    print("\n".join(notes))
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)
    notes.append(f"calibration  {job.calibration['protocol']}, batches of {job.size}")

    def add(row):
        job.rows.append(row)
        _, *values = columns(row, job.texts).items()
        print(f"{row['method']:<22} " + (row.get("error") or "  ".join(map(" ".join, values))))
        if a.json:
            write_json(a.json, job.report(vars(a), parameters=job.before, budget=budget, notes=notes))

    dense = result_row("dense", model, job.texts, job.eval_batches)
    add({"method": "dense", "removed": 0, "perplexity": dense["perplexity"]})
    dtype, device = model.dtype, model.device
    plan = [row for name in dict.fromkeys(a.methods) for row in rows_of(name, a.layers, model, budget)]
    del model
    for name, method, continues in plan:
        torch.manual_seed(a.seed)
        if not continues:
            job.model = None
            gc.collect()  # the model before goes even where a cycle of objects holds it
            job.model = load_checkpoint(a.ckpt, dtype, device)
        add(run(name, method, job, budget, job.rows[-1] if continues else None))
        if a.keep and "error" not in job.rows[-1]:
            keep_folder(job, a, tokenizer)
    print("\n" + compared(job.rows, job.texts, notes))


def keep_folder(job, a, tokenizer):
    """Write the model of the last row as a folder in --keep, if it is one that a folder can hold."""
    path = a.keep / job.rows[-1]["method"].replace(", ", "-").replace(" ", "-")
    a.keep.mkdir(exist_ok=True)
    try:
        save_checkpoint(job.model, path, job.report(vars(a), results=job.rows[-1:]), tokenizer.files)
        print(f"written to {path}")
    except ValueError as e:
        print(e)
    with suppress(OSError):
        a.keep.rmdir()  # if nothing was written


def parse():
    p, known = cli.Parser(__doc__), [*BLOCKS, *methods(1)]
    add = cli.model_flags(p, "what to compress", help=DENSE).add_argument
    add("--methods", nargs="+", choices=known, default=known, metavar="NAME",
        help=f"run in this order; the table is ranked (default: {' '.join(known)})")
    add("--layers", type=cli.positive, metavar="N", required=True,
        help="how many redundant layers grasp, svd, ... compress; sets the budget too, unless --budget does")
    add("--ratio", type=cli.fraction, help="fraction of their matrices that GRASP would keep (default: 0.1)")
    add("--budget", type=cli.fraction, metavar="FRACTION",
        help="instead: fraction of all blocks' parameters to remove")
    cli.calibration_flags(p, samples=128)
    cli.evaluation_flags(p)
    add = p.add_argument_group("output").add_argument
    add("--json", type=cli.json_file, metavar="FILE", help="write everything there too, after every row")
    add("--keep", type=Path, metavar="DIR",
        help="write the model of every row that a folder can hold into DIR, a new one")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if a.ratio and a.budget:
        raise ValueError("give one of --ratio and --budget")
    a.ratio = a.ratio or (None if a.budget else 0.1)
    if a.keep:
        check_output(a.keep)
    return a


if __name__ == "__main__":
    cli.command(main)
