"""The paper's ablations: GRASP with one setting varied and all others unchanged, a table for each study.

    python -m extras.ablation STUDY --ckpt FOLDER --layers 7 --ratio 0.1

    STUDY        what varies                                                             with these values
    calibration  the text by which layers and components are judged                      --calibration wikitext2 c4.txt
    samples      how many windows of it; smaller sets begin larger ones                  --samples 64 128 256 512
    schedule     one-shot, or iterative: half a block at a time, with fresh gradients
    budget       a threshold for each matrix, against one ratio for all, of equal size   --thresholds 0.1 0.2 0.4
    seeds        where the windows lie; their mean and standard deviation                --seeds 42 43 44 45 46
    score        what ranks the components, each for every ratio and seed                --ratio 0.05 0.1 0.2 0.4
    labels       as score, each for several distances of the label, too                  --label-shifts 1 2

`score` and `labels` have three rows beside the scores: random components, plain SVD (magnitude), and the redundant
layers dropped. They print mean and standard deviation over the seeds; --figure FILE draws them.

Every variant starts from the same model: its matrices are put back after each. Variants on the same windows share the
sweep that finds the layers and the sweep that takes the gradients. Both count in the seconds of each that uses them.
"""
from bisect import bisect_left
from functools import partial
from operator import itemgetter
from statistics import mean, stdev

import torch

from attribution import weight_gradients
from data import need
from data.corpus import load_text, random_windows, text_names
from data.files import write_json
from evaluate import markdown, protocols
from extras import held, short_names
from extras.baselines.patch import angular_distances
from extras.controls import drop_layers
from extras.plot import plot_ratios, write
from grasp import SCORES, check_layers, compress, dense_matrices, find_redundant
from runtime import cli
from runtime.job import Job

EQUAL = "equal"                                          # as a ratio: the one that keeps what the variant before kept
DRAWN_BY = itemgetter("calibration", "samples", "seed")  # the settings that say which windows are drawn
GRIDS = ("score", "labels")                              # the studies of every score, ratio and seed
VALUES = {  # flag: (the studies that vary it, its values there, its value in the others)
    "calibration": (("calibration",), ["wikitext2", "ptb"], ["wikitext2"]),
    "samples": (("samples",), [64, 128, 256, 512], [512]),
    "seeds": (("seeds", *GRIDS), [42, 43, 44, 45, 46], [42]),
    "ratio": (GRIDS, [0.05, 0.1, 0.2, 0.4], [0.1]),
    "label_shifts": (("labels",), [1, 2], [1]),
    "thresholds": (("budget",), [0.1, 0.2, 0.4], [])}


def studies(calibration=(), samples=(), seeds=(), thresholds=(), ratios=(), shifts=(1,)):
    """{study: [(name of a variant, what it changes)]}. Those of one "group" are compared with the first of it."""
    pairs = [((f"threshold {t}", {"ratio": None, "threshold": t, "group": t}), ("ratio", {"ratio": EQUAL, "group": t}))
             for t in thresholds]
    return {
        "calibration": [(name, {"calibration": text}) for name, text in zip(short_names(calibration), calibration)],
        "samples": [(f"{count} samples", {"samples": count}) for count in samples],
        "schedule": [("one-shot", {"iterative": False}), ("iterative", {"iterative": True})],
        "budget": [variant for pair in pairs for variant in pair],
        "seeds": [(f"seed {s}", {"seed": s}) for s in seeds],
        "score": grid(ratios, seeds, [1]), "labels": grid(ratios, seeds, sorted(shifts))}


def grid(ratios, seeds, shifts):
    """The variants of the studies `score` and `labels`. What no seed changes is there once.

    Those of one label shift follow each other, so that they share a sweep; what needs none comes with the first.
    """
    ranked = [(f"{score}, label shift {shift}", score, shift) for shift in shifts for score in SCORES
              if score != "magnitude"]
    rows = []
    for seed in seeds:
        beside = ["random", "magnitude", "dropped"] if seed == seeds[0] else ["random"]
        shared = sorted([*ranked, *((score, score, shifts[0]) for score in beside)], key=itemgetter(2))
        rows += [(name, {"score": score, "label_shift": shift, "seed": seed, "ratio": ratio, "group": (seed, ratio)})
                 for name, score, shift in shared for ratio in (ratios if score != "dropped" else [None])]
    return rows


def ablate(job, variants, windows, layers=None, layer_ids=None, contiguous=False):
    """Compress and evaluate job.model for each variant (name, settings), yielding a row. Restores it after each.

    windows: {DRAWN_BY(settings): (samples, seq_len) int64}. layers, layer_ids, contiguous: see `find`. Row: that of the
    table, and the settings, the redundant layers, the matrices as `compress` records them, and the fraction of its
    components kept `in_common` with the first variant of its group.
    """
    drawn, shift, row, firsts, model = None, None, None, {}, job.model
    blocks, args = model.layers, model.args
    for name, s in variants:
        if drawn != DRAWN_BY(s):
            drawn, shift, job.windows, seconds = DRAWN_BY(s), None, windows[DRAWN_BY(s)], {}
            redundant, dense = find(model, job.sweep, layers, layer_ids, contiguous, seconds)
        if shift != s["label_shift"]:
            shift, G = s["label_shift"], None  # the old gradients make room
            seconds["attribution"] = 0.0
            with cli.timed(seconds, "attribution", model.device):
                G = weight_gradients(model, list(dense), job.sweep("attribution"), shift)
        if s["ratio"] == EQUAL:
            shapes = [module.weight.shape for module in dense.values()]
            s = {**s, "ratio": ratio_of_size(shapes, row["parameters"] - model.n_params + held(shapes))}
            name = f"{name} {s['ratio']}"
        seconds["compression"] = 0.0
        try:
            with cli.timed(seconds, "compression", model.device):
                records = compress_as(model, redundant, G, job.sweep, s)
            shared = not s["iterative"] and s["score"] in SCORES and s["score"] != "magnitude"
            row = job.evaluate(name, seconds["redundancy"] + seconds["compression"] + shared * seconds["attribution"])
        finally:
            model.layers, model.args = blocks, args
            for matrix, module in dense.items():
                model.set_submodule(matrix, module)
        first = firsts.setdefault(s["group"], records)
        row.update(settings=s, redundant=redundant, matrices=records,
                   in_common=None if records is first else in_common(records, first))
        yield row


def find(model, sweep, layers, layer_ids, contiguous, seconds):
    """Find the redundant layers: (their ids, {name: dense matrix}). Adds to `seconds`.

    layers: how many to find; contiguous: the neighbours with the smallest angular distance between their two ends
    [arXiv 2403.17887 §3.2]. Or layer_ids: which they are. Raises ValueError if none of their matrices is dense.
    """
    with cli.timed(seconds, "redundancy", model.device):
        if layer_ids:
            redundant = sorted(layer_ids)
        elif contiguous:
            first = int(angular_distances(model, sweep("angular distances"), layers).argmin())
            redundant = list(range(first, first + layers))
        else:
            _, redundant = find_redundant(model, sweep, layers)
    return redundant, {name: model.get_submodule(name) for name in dense_matrices(model, redundant)}


def compress_as(model, redundant, G, sweep, s):
    """Run grasp.compress with the settings s. One-shot uses the given gradients G (m, n) of the dense model.

    Score `random`: u_k^T R v_k of a matrix R of Gaussian numbers is one independent number for each component.
    Score `dropped`: the layers go.
    """
    score, records = s["score"], []
    if score == "dropped":
        drop_layers(model, redundant)
        return records
    if score == "random":
        generator = torch.Generator().manual_seed(s["seed"])
        score, G = "gradient", {name: torch.randn(g.shape, generator=generator).to(g) for name, g in G.items()}
    for record in compress(model, redundant, sweep, s["ratio"], s["threshold"], score, s["iterative"],
                           None if s["iterative"] else G, s["label_shift"]):
        cli.show(record["name"], last=False)  # the evaluation that follows takes the line away
        records.append(record)
    return records


def ratio_of_size(shapes, size):
    """The ratio, of five decimals, at which matrices of these shapes hold as nearly `size` parameters as possible.

    Found by bisection, as a larger ratio never holds less. Ranks are whole numbers, so a small difference remains.
    """
    ratios = [i / 10 ** 5 for i in range(1, 10 ** 5 + 1)]
    i = bisect_left(ratios, size, key=partial(held, shapes))  # the first that holds `size` or more, if one does
    return min(ratios[max(i - 1, 0):i + 1], key=lambda ratio: abs(held(shapes, ratio) - size))


def in_common(records, first):
    """The fraction of the kept components that `first` keeps too, in matrices that both compressed; None if none."""
    theirs = {r["name"]: r["kept"] for r in first}
    both = [(set(r["kept"]), set(theirs[r["name"]])) for r in records if r["kept"] and theirs.get(r["name"])]
    return sum(len(a & b) for a, b in both) / sum(len(a) for a, _ in both) if both else None


def describe(row):
    results = ", ".join(f"{text} {value:.2f}" for text, value in row["perplexity"].items())
    common = "" if row["in_common"] is None else f"  kept in common {100 * row['in_common']:.1f} %"
    return f"{row['model']:<20}  layers {row['redundant']}  {results}  {row['seconds']:.1f} s{common}"


def spread(rows, texts):
    """Mean and sample standard deviation (n - 1) of the perplexities of rows, one line for all texts."""
    columns = {text: [row["perplexity"][text] for row in rows] for text in texts}
    return f"{len(rows)} seeds, mean and standard deviation (n - 1): " + ", ".join(
        f"{text} {mean(column):.2f} and {stdev(column):.2f}" for text, column in columns.items())


def by_ratio(rows, text):
    """{name: {ratio: (mean, standard deviation, 0 for one seed)}} of the perplexities of a grid's rows on a text."""
    found = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["settings"]["ratio"], []).append(row["perplexity"][text])
    return {name: {ratio: (mean(values), stdev(values) if len(values) > 1 else 0.0) for ratio, values in ratios.items()}
            for name, ratios in found.items()}


def grid_table(curves, ratios):
    """A row for each score: mean and standard deviation of each ratio on each text; then the dropped layers.

    curves: {text: what by_ratio gives}.
    """
    head, cells = ["score"], {}
    for text, ratio in ((text, ratio) for text in curves for ratio in ratios):
        head.append(f"{text}, {ratio}")
        for name, values in curves[text].items():
            if ratio in values:
                middle, deviation = values[ratio]
                cells.setdefault(name, [name]).append(f"{middle:.2f}" + f" ± {deviation:.2f}" * bool(deviation))
    dropped = ", ".join(f"{text} {curves[text]['dropped'][None][0]:.2f}" for text in curves)
    return f"{markdown(head, list(cells.values()))}\n\nthe layers dropped: {dropped}"


def main():
    a = parse()
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    n = a.layers or len(a.layer_ids)
    check_layers(model, a.layers or a.layer_ids)
    job = Job(model, max(a.samples), a.seq_len, a.batch_size, n)
    if max(a.label_shifts) >= job.seq_len:
        raise ValueError(f"--label-shifts {a.label_shifts}: expected less than {job.seq_len}, the window")
    base = {"calibration": a.calibration[0], "samples": a.samples[0], "seed": a.seeds[0], "score": "taylor", "group":
            None, "iterative": False, "ratio": a.ratio[0], "threshold": None, "label_shift": a.label_shifts[0]}
    variants = [(name, {**base, **changes}) for name, changes in
                studies(a.calibration, a.samples, a.seeds, a.thresholds, a.ratio, a.label_shifts)[a.study]]
    tokens, job.calibration = read_calibration(a.calibration, tokenizer, a.data_dir)
    windows = {DRAWN_BY(s): random_windows(tokens[s["calibration"]], s["samples"], job.seq_len, s["seed"])[0]
               for _, s in variants}
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)
    fixed = {"budget": f"ratio {a.ratio[0]}", "samples": f"{a.samples[0]} samples", "seeds": f"seed {a.seeds[0]}",
             "score": f"score taylor, label shift {a.label_shifts[0]}", "schedule": "one-shot"}
    if a.study in GRIDS:
        fixed = {"samples": fixed["samples"], "schedule": "one-shot", "seeds": f"{len(a.seeds)} seeds"}
    print(f"study        {a.study}, {len(variants)} variants, each of {n} layer{'s' * (n > 1)}; "
          f"{', '.join(fixed[s] for s in fixed if s != a.study)}; windows of {job.seq_len}, batches of {job.size}\n")
    job.evaluate()
    for row in ablate(job, variants, windows, a.layers, a.layer_ids, a.contiguous):
        print(describe(row))
    if a.json:
        write_json(a.json, job.report(vars(a)))
    dense, *rows = job.rows
    curves = {text: by_ratio(rows, text) for text in job.texts}
    print("\n" + (f"{grid_table(curves, a.ratio)}\n\n{protocols(job.texts)}" if a.study in GRIDS else job.table()))
    if a.study == "seeds":
        print(spread(rows, job.texts))
    if a.figure:
        write(a.figure, plot_ratios(curves, dense["perplexity"], a.ckpt.name))


def read_calibration(names, tokenizer, data_dir):
    """({name: its tokens (N,) int64}, {name: what it is}), with a line for each."""
    tokens, sources = {}, {}
    for name in names:
        text, sources[name] = load_text(name, "train", data_dir)
        tokens[name] = tokenizer.stream(text)
        print(f"calibration  {name}: {sources[name]}; {len(tokens[name]):,} tokens")
    return tokens, sources


def parse():
    p, known = cli.Parser(__doc__), tuple(studies([], [], [], []))
    p.add_argument("study", choices=known, metavar="STUDY", help=f"what to vary: {', '.join(known)}")
    add = cli.model_flags(p, "what to compress").add_argument
    add("--layers", type=cli.positive, metavar="N", help="how many redundant layers to compress")
    add("--layer-ids", type=int, nargs="+", metavar="ID", help="compress these layers instead")
    add("--contiguous", action="store_true", help="with --layers: N neighbours, by angular distance [arXiv 2403.17887]; "
        "each row says which, for --layer-ids of other commands")
    add("--ratio", type=cli.fraction, nargs="+", metavar="FRACTION", help="of each matrix's parameters to keep (default: "
        "0.1; studies score, labels: 0.05 0.1 0.2 0.4)")
    add("--label-shifts", type=cli.positive, nargs="+", metavar="N", help="study labels: position t predicts token t + N "
        "(default: 1 2)")
    add("--thresholds", type=cli.fraction, nargs="+", metavar="FRACTION", help="study budget: fraction of the sum of "
        "scores that the kept components reach (default: 0.1 0.2 0.4)")
    add = p.add_argument_group("calibration").add_argument  # as cli.calibration_flags, with several values
    add("--calibration", nargs="+", metavar="TEXT", help=f"{text_names('train')} or a file (default: wikitext2; study "
        f"calibration: wikitext2 ptb; {cli.EMBEDDED})")
    add("--samples", type=cli.positive, nargs="+", metavar="N", help="sequences (default: 512; study samples: 64 128 "
        "256 512)")
    add("--seq-len", type=cli.positive, metavar="T", help="tokens in each (default: 512, or all positions)")
    add("--seeds", type=cli.seed, nargs="+", metavar="SEED", help="of the windows' random offsets (default: 42; studies "
        "seeds, score, labels: 42 43 44 45 46)")
    cli.evaluation_flags(p)
    add = p.add_argument_group("output").add_argument
    add("--json", type=cli.json_file, metavar="FILE", help="write layers, components and results there too")
    add("--figure", type=cli.json_file, metavar="FILE", help="studies score, labels: draw them there (PNG)")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if (a.layers is None) == (a.layer_ids is None):
        raise ValueError("give one of --layers N and --layer-ids ID ...")
    if a.contiguous and a.layer_ids:
        raise ValueError("--contiguous finds the layers itself: it goes with --layers, not with --layer-ids")
    if a.ratio and a.study == "budget":
        raise ValueError("--ratio: the budget study finds its ratios itself, by --thresholds")
    if a.figure and (a.study not in GRIDS or not need("matplotlib", "--figure")):
        raise ValueError(f"--figure: for the studies {' and '.join(GRIDS)}")
    if a.study in GRIDS and not a.eval:
        raise ValueError(f"--eval none: the {a.study} study compares perplexities")
    for flag in VALUES:
        setattr(a, flag, values(flag, getattr(a, flag), a.study, a.ckpt))
    return a


def values(flag, given, study, ckpt):
    """The values of one flag of VALUES in a study: as given, or the defaults. Raises ValueError for a wrong number."""
    vary, several, one = VALUES[flag]
    if flag == "calibration" and cli.made_on_embedded(ckpt):
        several, one = [], ["embedded"]  # the embedded model has but one text
    chosen = given or (several if study in vary else one)
    name = flag.replace("_", "-")
    if study not in vary and len(chosen) != len(one):
        raise ValueError(f"--{name} {chosen}: the {vary[0]} study varies it, the {study} study takes "
                         f"{len(one) or 'none'}")
    fewest = 1 if study in GRIDS or flag == "thresholds" else 2
    if study in vary and (len(chosen) < fewest or len(set(chosen)) < len(chosen)):
        raise ValueError(f"--{name}: the {study} study takes at least {fewest}, each once; got {chosen or 'none'}")
    return chosen


if __name__ == "__main__":
    cli.command(main)
