"""Pictures of what a compression did and why: `python -m extras.plot FOLDER`, a folder that grasp.py wrote.

    overview.png         the cosines, and beside them the spectrum of one matrix
    cosines.png          the cosine of every layer, the redundant ones marked [GRASP §2.1]
    spectra-LAYER.png    the singular values of a layer's seven matrices, the kept ones marked             [§2.2]
    groups-MATRIX.png    with --matrix: ten singular values at a time set to zero, against the perplexity  [Fig. 2]
    groups-MATRIX.json   the numbers of that experiment, as `zero_groups` gives them

A folder made with --layer-ids has no cosines, so not the first two. The cosines and the kept components are
report.json's; the spectra and the experiment are of the dense weights that FOLDER was made from. Every plot_
function takes numbers and returns a matplotlib Figure; a draw_ function draws one panel.
"""
import io
import math
import os
import time
from pathlib import Path

import torch
from torch import nn

from attribution import importance, sigma_gradients, svd, weight_gradients
from data import need
from data.corpus import text_names
from data.files import atomic_write, write_json
from evaluate import evaluation_windows, perplexity
from extras import open_original, read_report
from model import matrix_names, upcast
from runtime import cli

GROUP = 10  # singular values set to zero together, as in the paper's figure
DARK, LIGHT, GREY = "#00437a", "#f5a623", "#8c8c8c"  # blue, orange: apart for colour-blind eyes and in grey print
TICKS = (-0.9, -0.5, 0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


def new_figure(width, height, title):
    """A matplotlib Figure of width x height inches under a title; nothing of pyplot, so no display and no state."""
    from matplotlib.figure import Figure
    figure = Figure((width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def draw_cosines(axes, cosines, redundant):
    """Draw the cosine of every layer's input and output, a list (n_layers,), with the redundant ids marked.

    The axis is logarithmic in 1 - cosine: near 1, where layers are told apart, a linear one would show a flat line.
    """
    axes.set_yscale("function", functions=(lambda c: -torch.as_tensor(1 - c).clamp(min=1e-6).log10().numpy(),
                                           lambda y: 1 - 10.0 ** -y))
    axes.plot(range(len(cosines)), cosines, "o-", color=GREY, linewidth=0.8, markerfacecolor="white",
              label="other layers")
    axes.plot(redundant, [cosines[layer] for layer in redundant], "s", color=DARK, markersize=7,
              label=f"redundant: {len(redundant)} of {len(cosines)} layers")
    axes.set(xlabel="layer (0 = first)", ylabel="mean cosine over the calibration tokens\n(logarithmic in 1 - cosine)")
    for layer in redundant:
        axes.annotate(str(layer), (layer, cosines[layer]), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(ticks if len(ticks) > 1 else sorted({round(min(cosines), 4), round(max(cosines), 4)}))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right")


def draw_spectrum(axes, S, record):
    """Draw singular values S (r,), those that grasp.compress's record kept, and where plain SVD would cut."""
    (m, n), k, kept = record["shape"], record["rank"], record["kept"]
    words = "stays dense"
    axes.plot(range(len(S)), S, "-", color=GREY, linewidth=1, label="all singular values")
    if k:
        words = f"{sum(i < k for i in kept)} of {k} kept are among the {k} largest"
        axes.plot(kept, S[kept], "o", color=DARK, markersize=3.5, label="kept: as many as the rank")
        axes.axvline(k - 0.5, color=LIGHT, linestyle="--", zorder=1, label="plain SVD of that rank ends here")
    name = record["name"].split(".", 2)[2]
    axes.set_title(f"{name}  {m} x {n}, rank {k or min(m, n)}\n{words}", fontsize=9)
    axes.set_yscale("log", subs=())
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if S[0] < 100 * S[-1] else (1,))
    axes.yaxis.set_major_formatter("{x:g}")


def plot_cosines(cosines, redundant, model_name):
    title = f"{model_name}: how parallel each layer's output is to its input"
    figure = new_figure(max(8, 0.2 * len(cosines)), 4, title)
    draw_cosines(figure.subplots(), cosines, redundant)
    return figure


def plot_spectra(layer, records, spectra, model_name, score):
    """Figure of a layer's matrices, at most seven, a panel each; spectra: {name: singular values (r,)}."""
    figure = new_figure(12, 6, f"{model_name}, layer {layer}: which singular components are kept (score: {score})")
    panels = figure.subplots(2, 4).flat
    for record, axes in zip(records, panels):
        draw_spectrum(axes, spectra[record["name"]], record)
    for axes in panels:  # at least one is left, for the legend
        axes.axis("off")
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels())}
    axes.legend(handles.values(), handles.keys(), loc="center", fontsize=9)
    figure.supxlabel("index of the singular value (0 = largest)", fontsize=10)
    figure.supylabel("singular value (logarithmic)", fontsize=10)
    return figure


def plot_overview(cosines, redundant, S, record, model_name):
    """Figure of two panels: which layers are redundant; what is kept of one matrix, of singular values S."""
    from matplotlib import rc_context
    with rc_context({"font.size": 8.5}):
        figure = new_figure(7.5, 3.4, None)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_cosines(left, cosines, redundant)
        draw_spectrum(right, S, record)
        left.lines[1].set_markersize(5.5)
        for text in left.texts:
            text.set(rotation=90, fontsize=7.5)  # neighbours need the room
        left.set_title(f"{model_name}: the layers that change\ntheir input least are redundant", fontsize=9.5)
        right.set_title(f"{record['name']}:\n{right.get_title().splitlines()[1]}", fontsize=9.5)
        right.set(xlabel="index of the singular value (0 = largest)", ylabel="singular value (logarithmic)")
        right.legend(loc="lower left", fontsize=8)
    return figure


def zero_groups(model, name, windows, size):
    """Set the singular values of the dense matrix `name` to zero, ten at a time: what the perplexity does [Fig. 2].

    windows (n, seq_len) int64, taken in micro-batches of `size`; W = U diag(S) Vh. A dict with, for each group,
        groups       indices of its first singular value and its last; the last group may be a smaller one
        change       perplexity without the group, minus `perplexity`, that of the dense model
        predicted    the first-order one, -perplexity * sum of sigma dL/dsigma, from the gradient on the same windows
        score        sum of |sigma dL/dsigma|, which is what GRASP ranks by, nats
        sigma        sum of sigma, which is what plain SVD ranks by

    The model is left as it was: W itself is put back. Half precision rounds most of the smallest groups' removal away.
    """
    linear = model.get_submodule(name)
    W, first, seconds = linear.weight, windows[:size], []
    groups = torch.arange(min(W.shape), device=W.device).split(GROUP)
    for _ in range(3):  # the first one warms up
        start = time.monotonic()
        perplexity(model, [first])
        seconds.append(time.monotonic() - start)
    passes = len(groups) + 1 + 3  # the gradient counts as three
    minutes = passes * min(seconds) * len(windows) / len(first) / 60
    print(f"{name}  {len(groups)} groups of {GROUP}, each a pass over the text; about {minutes:.1f} min")
    U, S, Vh = svd(W)
    dense = perplexity(model, cli.batches(windows, size, f"{name}  as it is"))
    G = weight_gradients(model, [name], cli.batches(windows, size, f"{name}  gradient"))[name]
    sigma_grad, change = sigma_gradients(U, G, Vh), []
    try:
        for i, g in enumerate(groups):
            without = W - (U[:, g] * S[g]) @ Vh[g]
            linear.weight = nn.Parameter(without.to(W.dtype), requires_grad=False)
            part = cli.batches(windows, size, f"{name}  group {i + 1}/{len(groups)}")
            change.append(perplexity(model, part) - dense)
    finally:
        linear.weight = W
    sums = {"predicted": -dense * S * sigma_grad, "score": importance(S, sigma_grad), "sigma": S}
    return {"matrix": name, "perplexity": dense, "change": change,
            "groups": [[int(g[0]), int(g[-1])] for g in groups],
            **{what: [values[g].sum().item() for g in groups] for what, values in sums.items()}}


def rank_correlation(x, y):
    """Spearman's, of two lists of numbers: the correlation of their ranks, equal ones sharing theirs; -1 to 1.

    None where there is no order to compare: of one number, or where all of a list are equal.
    """
    t = torch.tensor([x, y], dtype=torch.float64)
    ranks = (t[:, :, None] > t[:, None]).double().sum(-1) + (t[:, :, None] == t[:, None]).double().sum(-1) / 2
    found = torch.corrcoef(ranks)[0, 1].item() if len(x) > 1 else math.nan
    return None if math.isnan(found) else found


def shown(correlation):
    return "-" if correlation is None else f"{correlation:.2f}"


def plot_groups(result, model_name, text):
    """Figure of what zero_groups gave: measured change of perplexity as bars, the first-order prediction as marks."""
    count = len(result["groups"])
    title = (f"{model_name}, {result['matrix']}: {GROUP} singular values at a time set to zero\n"
             f"perplexity {result['perplexity']:.2f} with all of them, on {text}")
    figure = new_figure(max(8, count / 30), 4.2, title)
    axes, agreement = figure.subplots(), rank_correlation(result["predicted"], result["change"])
    centres = [(first + last) / 2 for first, last in result["groups"]]
    widths = [0.75 * (last - first + 1) for first, last in result["groups"]]
    axes.bar(centres, result["change"], widths, color=DARK, label="measured")
    axes.plot(centres, result["predicted"], "D", color=LIGHT, markeredgecolor="black",
              markersize=5 if count < 100 else 2, markeredgewidth=1 if count < 100 else 0.3,
              label=r"predicted to first order: $-$perplexity $\cdot \sum \sigma_k\ \partial L/\partial\sigma_k$"
                    f"\nrank correlation with the measured: {shown(agreement)}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="index of the singular values set to zero (0 = largest)", ylabel="change of perplexity")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1])
    return figure


def plot_ratios(curves, dense, model_name):
    """Figure of a panel for each text: perplexity against the ratio kept, a line for each score.

    curves: {text: {score: {ratio: (mean, standard deviation)}}}, ratio None: one value for all (layers dropped).
    dense: {text: perplexity of the dense model}.
    """
    figure = new_figure(4 * len(curves) + 2, 4, f"{model_name}: perplexity after compression (mean and standard deviation)")
    for axes, (text, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for i, (name, points) in enumerate(lines.items()):
            if None in points:
                axes.axhline(points[None][0], color=GREY, linestyle=":", label=name)
                continue
            middle, deviation = zip(*points.values())
            axes.errorbar([*points], middle, deviation, marker="osD^vPX*"[i % 8], markersize=5, capsize=3, linewidth=1,
                          color=f"C{i}", linestyle="--" if "shift 2" in name else "-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="fraction of each matrix's parameters kept", ylabel="perplexity")
        axes.set_title(f"{text} (dense: {dense[text]:.2f})", fontsize=10)
        ticks = sorted({ratio for points in lines.values() for ratio in points if ratio})
        axes.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [tick for tick in (*range(10, 200, 10), *range(200, 2000, 200)) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def write(file, content):
    """Write a Figure (as PNG) or a dict (as JSON) to a file, atomically."""
    if isinstance(content, dict):
        write_json(file, content)
    else:
        from PIL import Image  # matplotlib brings it
        png = io.BytesIO()
        content.savefig(png, format="png")
        with atomic_write(file) as new:
            Image.open(png).convert("RGB").quantize(64).save(new, format="png", optimize=True)  # a quarter
    print(f"written: {file}")


def main():
    a = parse()
    report = read_report(a.ckpt)
    records = {record["name"]: record for record in report["matrices"]}
    layers = {layer: [records[name] for name in matrix_names(layer) if name in records]
              for layer in report["redundant"]}
    compressed = [layer for layer in layers if layers[layer]]  # others came to grasp.py as low-rank ones
    if not set(a.layer_ids or []) <= set(compressed):
        raise ValueError(f"--layer-ids {a.layer_ids}: {a.ckpt} has compressed layers {compressed}")
    if a.overview and a.overview not in records:
        raise ValueError(f"--overview {a.overview}: expected a matrix of the compressed layers {compressed}")
    need("matplotlib", "extras.plot")
    dense, model, tokenizer = open_original(report, a.dense, a.device, a.dtype, a.matrix)
    if a.matrix:
        seq_len = cli.sequence_length(a.seq_len, 2048, model)
        name = a.data or ("embedded" if cli.made_on_embedded(dense) else "wikitext2")
        (label, (windows, protocol)), = evaluation_windows([name], tokenizer, seq_len, a.windows, a.data_dir).items()
    a.out.mkdir(exist_ok=True)
    drawn, cosines = a.layer_ids or compressed, report["cosines"]
    if not cosines:
        print(f"no overview.png, no cosines.png: {a.ckpt} was made with --layer-ids and has no cosines")
    elif drawn:
        record = records[a.overview] if a.overview else layers[drawn[-1]][-2:][0]  # w2, if all are there
        S = singular_values(model, record["name"])
        write(a.out / "overview.png", plot_overview(cosines, report["redundant"], S, record, dense.name))
        write(a.out / "cosines.png", plot_cosines(cosines, report["redundant"], dense.name))
    for layer in drawn:
        spectra = {r["name"]: singular_values(model, r["name"]) for r in layers[layer]}
        write(a.out / f"spectra-{layer}.png",
              plot_spectra(layer, layers[layer], spectra, dense.name, report["settings"]["score"]))
    for name in a.matrix:
        model.to(torch.promote_types(model.dtype, torch.float32))
        print(f"{name}  in {str(model.dtype)[6:]}: half precision would round small changes away")
        result = zero_groups(model, name, windows, cli.batch_size(a.batch_size, seq_len))
        result["rank_correlation"] = {by: rank_correlation(result[by], result["change"])
                                      for by in ("predicted", "score", "sigma")}
        print(f"{name}  perplexity {result['perplexity']:.4f}; rank correlation with its change: "
              + ", ".join(f"{by} {shown(value)}" for by, value in result["rank_correlation"].items()))
        text = f"{label}, {protocol['windows']} windows of {seq_len:,} tokens"
        write(a.out / f"groups-{name}.png", plot_groups(result, dense.name, text))
        write(a.out / f"groups-{name}.json", {"model": str(dense), "protocol": protocol, **result})


def singular_values(model, name):
    """Of the matrix `name`: (r,), descending, fp32 at least, on the CPU."""
    return torch.linalg.svdvals(upcast(model.get_submodule(name).weight)).cpu()


def parse():
    p = cli.Parser(__doc__)
    p.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="a folder that grasp.py wrote")
    add = cli.model_flags(p, "what to draw", default=None,
                          help="another way to give FOLDER, as other commands do").add_argument
    add("--dense", type=Path, metavar="DENSE", help="the dense folder that it was made from (default: as its report says)")
    add("--layer-ids", type=int, nargs="+", metavar="ID", help="draw spectra of these only (default: all)")
    add("--overview", metavar="NAME", help="the matrix on overview.png, such as layers.5.feed_forward.w2 "
        "(default: w2 of the last layer drawn)")
    add = p.add_argument_group("experiment").add_argument
    add("--matrix", nargs="+", metavar="NAME", default=[], help="experiment on these, minutes for each, such as "
        "layers.5.feed_forward.w2, in float32 or --dtype float64 (default: none)")
    add("--data", metavar="TEXT", help=f"one of {text_names('test')} or a file (default: wikitext2; with the embedded "
        "model, embedded)")
    add("--seq-len", type=cli.positive, metavar="T", help="tokens in a window (default: 2048, or all positions)")
    add("--windows", type=cli.positive, metavar="N", help="only the first N windows (default: all)")
    add("--data-dir", metavar="DIR", help="with wikitext-2-raw/ and ptb/ (default: $GRASP_DATA, else ~/.cache/grasp)")
    p.add_argument_group("output").add_argument("--out", type=Path, metavar="DIR",
                                                help="to draw into (default: NAME-plots here)")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if (a.folder is None) == (a.ckpt is None):
        raise ValueError("give one FOLDER, that grasp.py wrote")
    a.ckpt = a.folder or a.ckpt
    a.out = a.out or Path(f"{a.ckpt.name}-plots")
    if not a.matrix and any((a.data, a.data_dir, a.seq_len, a.windows, a.batch_size)):
        raise ValueError("--data, --data-dir, --seq-len, --windows, --batch-size: these need --matrix NAME")
    folder = a.out if a.out.exists() else a.out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {a.out}: {folder} is not a folder or read-only")
    return a


if __name__ == "__main__":
    cli.command(main)
