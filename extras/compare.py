"""GRASP and the baselines on one model, one calibration set and one budget: every row removes as many parameters.

    python -m extras.compare --ckpt FOLDER --layers 7 --ratio 0.1 --methods shortgpt svd grasp

The budget is what GRASP removes from the N redundant layers at that ratio, or --budget, a fraction of all blocks'
parameters. svd, fwsvd, asvd, svd-llm, kfac and grasp work on the N redundant layers, which each finds for itself, in
its own seconds; with -all behind them on every layer. What a method is, its file in extras/baselines/ says. kfac
(low-rank, one ratio), kfac-all (low-rank, one ranking) and fisher (channels of the MLPs too) are extras/fisher.py's.

Every method starts from a freshly loaded dense model and a freshly seeded generator, so that no row depends on the rows
before it. Its seconds and its peak memory are the method's own: loading comes before them, evaluation after.
"""
import gc
from functools import partial

import torch

from data.corpus import calibration_windows
from evaluate import evaluation_windows, markdown, result_row, table
from extras import fisher, peak_bytes, reset_peak
from extras.ablation import ratio_of_size
from extras.baselines import block_params
from extras.baselines.decomposition import asvd, fwsvd, plain_svd, svd_llm
from extras.baselines.lorap import lorap
from extras.baselines.patch import linearpatch, replaceme
from extras.baselines.pruner import llm_pruner
from extras.baselines.removal import laco, shortgpt, sleb
from extras.baselines.slicegpt import slicegpt
from extras.baselines.streamline import streamline
from grasp import check_layers, compress, find_redundant
from model import load_checkpoint, matrix_names
from runtime import cli
from runtime.files import write_json
from runtime.plan import held


def methods(n):
    """{name: function (model, sweep, budget) -> model}; what is `here` works on the n redundant layers alone."""
    def here(method):
        return partial(on_redundant, method, n)

    return {"shortgpt": shortgpt, "sleb": sleb, "laco": laco,
            "linearpatch": linearpatch, "replaceme": replaceme, "streamline": streamline,
            "svd": here(plain_svd), "fwsvd": here(fwsvd), "asvd": here(asvd), "svd-llm": here(svd_llm),
            "svd-all": plain_svd, "fwsvd-all": fwsvd, "asvd-all": asvd, "svd-llm-all": svd_llm,
            "lorap": lorap, "slicegpt": slicegpt, "llm-pruner": llm_pruner,
            "grasp": here(grasp),
            "kfac": here(partial(second_order, allocate="ratio", channels=False)),
            "kfac-all": partial(second_order, channels=False), "fisher": second_order}


def on_redundant(method, n, model, sweep, budget):
    """A method that can be kept to some layers, on the n redundant ones [GRASP §2.1]."""
    return method(model, sweep, budget, layers=find_redundant(model, sweep, n)[-1])


def grasp(model, sweep, budget, layers):
    """The paper's method with its defaults, at the one ratio by which these layers lose `budget` parameters."""
    shapes = matrix_shapes(model, layers)
    most = held(shapes) - held(shapes, 0)  # of rank 1
    if budget > most:
        raise ValueError(f"cannot remove {budget:,} parameters: GRASP of {len(layers)} layers removes {most:,} at most")
    list(compress(model, layers, sweep, ratio_of_size(shapes, held(shapes) - budget)))
    return model


def second_order(model, sweep, budget, layers=None, **settings):
    """fisher.compress as a method."""
    fisher.compress(model, sweep, budget, layers, **settings)
    return model


def matrix_shapes(model, layers):
    """[(m, n)] of all matrices of these layers."""
    return [model.get_submodule(name).weight.shape for name in matrix_names(*layers)]


def budget_of(model, n, ratio, part=None):
    """How many parameters to remove: as GRASP does from n layers at `ratio`; or the fraction `part` of all blocks'."""
    if part:
        return round(part * model.args.n_layers * block_params(model))
    shapes = matrix_shapes(model, range(n))  # all layers are alike
    return held(shapes) - held(shapes, ratio)


def measure(name, method, model, sweep, budget, texts, size):
    """The row of one method, run on this dense model and then evaluated in micro-batches of `size` sequences.

    {method, removed (parameters), off (relative distance from the budget), perplexity, seconds, peak_bytes}; of a
    method that cannot do it, or whose perplexity is no number (ValueError, LinAlgError), {method, error}.
    """
    before, seconds = model.n_params, {}
    reset_peak(model.device)
    try:
        with cli.timed(seconds, name, model.device):
            model = method(model, sweep, budget)
        peak, removed = peak_bytes(model.device), before - model.n_params
        return {"method": name, "removed": removed, "off": removed / budget - 1,
                "perplexity": result_row(name, model, texts, size)["perplexity"], "seconds": seconds[name],
                "peak_bytes": peak}
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


def compared(rows, texts, notes):
    """The Markdown table; under it which methods failed or missed the budget, the notes and the texts' protocols."""
    shown = [columns(row, texts) for row in rows]
    off = [row["method"] for row in rows if abs(row.get("off", 0)) > 0.005]
    return "\n".join([markdown([*shown[0]], [[*row.values()] for row in shown]), "",
                      *(f"{row['method']}: {row['error']}" for row in rows if "error" in row),
                      *[f"not comparable, as more than 0.5 % off the budget: {', '.join(off)}"] * bool(off), *notes,
                      table([], texts, 1).partition("\n\n")[2]])  # the protocols, which it puts under every table


def main():
    a = parse()
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    check_layers(model.args.n_layers, a.layers)
    if model.n_params < model.n_params_dense:
        raise ValueError(f"{a.ckpt}: is compressed already, expected a dense folder")
    seq_len, eval_len = cli.sequence_length(a.seq_len, 512, model), cli.sequence_length(None, 2048, model)
    windows, calibration = calibration_windows(tokenizer, a.calibration, a.samples, seq_len, a.seed, a.data_dir)
    texts = evaluation_windows(a.eval, tokenizer, eval_len, a.windows, a.data_dir)
    size, eval_size = cli.batch_size(a.batch_size, seq_len), cli.batch_size(a.batch_size, eval_len, model)
    budget = budget_of(model, a.layers, a.ratio, a.budget)
    if not budget:
        raise ValueError("--ratio, --budget: leave nothing to remove")
    which = f"{a.layers} layer{'s' * (a.layers > 1)}"
    of = f"{100 * a.budget:g} % of its blocks" if a.budget else f"as GRASP of {which} at ratio {a.ratio}"
    notes = [f"calibration  {calibration['protocol']}, batches of {size}",
             f"budget       {budget:,} parameters, {100 * budget / model.n_params:.1f} % of the model, {of}",
             "measured     seconds of the method alone, peak GiB "
             f"{'too' if reset_peak(model.device) else 'of the process so far'}"]
    print("\n".join(notes) + "\n")
    rows, report = [], {
        "settings": {**vars(a), "seq_len": seq_len}, "dtype": str(model.dtype), "parameters": model.n_params,
        "budget": budget, "calibration": calibration, "notes": notes,
        "protocol": {label: protocol for label, (_, protocol) in texts.items()}}

    def add(row):
        rows.append(row)
        _, *values = columns(row, texts).items()
        print(f"{row['method']:<12} " + (row.get("error") or "  ".join(map(" ".join, values))))
        if a.json:
            write_json(a.json, {**report, "results": rows})

    dense = result_row("dense", model, texts, eval_size)
    add({"method": "dense", "removed": 0, "perplexity": dense["perplexity"]})
    load, sweep = partial(load_checkpoint, a.ckpt, model.dtype, model.device), partial(cli.batches, windows, size)
    del model
    for name in a.methods:
        torch.manual_seed(a.seed)
        gc.collect()  # the model before goes even where a cycle of objects holds it
        add(measure(name, methods(a.layers)[name], load(), sweep, budget, texts, eval_size))
    print("\n" + compared(rows, texts, notes))


def parse():
    p, known = cli.Parser(__doc__), list(methods(1))
    add = cli.model_flags(p, "what to compress").add_argument
    add("--methods", nargs="+", choices=known, default=known, metavar="NAME",
        help=f"in this order (default: {' '.join(known)})")
    add("--layers", type=cli.positive, metavar="N", required=True, help="how many layers are redundant")
    add("--ratio", type=cli.fraction, help="fraction of their matrices that GRASP would keep (default: 0.1)")
    add("--budget", type=cli.fraction, metavar="FRACTION",
        help="instead: fraction of all blocks' parameters to remove")
    cli.calibration_flags(p, samples=32)
    cli.evaluation_flags(p)
    p.add_argument_group("output").add_argument("--json", type=cli.json_file, metavar="FILE",
                                                help="write everything there too, after every row")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if a.ratio and a.budget:
        raise ValueError("give one of --ratio and --budget")
    a.ratio = a.ratio or (None if a.budget else 0.1)
    return a


if __name__ == "__main__":
    cli.command(main)
