"""The command `python -m extras.bench`."""
from functools import partial

import torch

from data.corpus import calibration_windows
from data.files import write_json
from extras import DENSE, bench, open_dense, peak_bytes, reset_peak
from extras.bench import SEED, SHAPES, random_weights, show
from extras.bench.memory import memory
from extras.bench.report import measure_all
from extras.bench.speed import SMALLEST, beside, growth, measure, warm_up
from extras.bench.svds import by_shape, svd_study
from extras.throughput import random_prompt
from grasp import check_layers, find_redundant
from runtime import cli


def run(model, windows, size, n, ratio, repeats, before, autograd, svds):
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
        report["svd"] = svd_study(model, by_shape(model, report["redundant"]), sweep, ratio)
        print(show(report["svd"]))
    return report


def main():
    a, cpu = parse(), torch.device("cpu")
    if a.memory:
        shapes = {a.shape: SHAPES[a.shape]} if a.shape else SHAPES
        dtype = cli.DTYPES.get(a.dtype, torch.bfloat16)
        whole, offloaded = memory(shapes, dtype, a.layers, a.seq_len or 512)
        print(f"{show(whole)}\n\nwith --offload\n\n{show(offloaded)}\n")
        return print(f"in GiB, and tokens of the micro-batch that grasp.py chooses on such a card; {str(dtype)[6:]} "
                     f"weights; {a.layers or 'a fifth of the'} layers redundant; bus: host to GPU and back, for each "
                     "micro-batch, and in all (both sweeps of 512 sequences on the smallest card that can)")
    if a.report:
        device = torch.device(cli.pick_device(a.device))
        if device.type != "cuda":
            raise ValueError("--report measures models of 7B: it needs a CUDA device")
        return measure_all(device, a.report)
    warm_up(cpu, torch.float32)  # before memory is looked at
    resets, resident = reset_peak(cpu), peak_bytes(cpu)
    model, tokenizer = open_weights(a.ckpt, a.shape, a.growth, a.device, a.dtype)
    before = resident if model.device.type == "cpu" else 0
    n, T = a.layers or max(1, model.args.n_layers // 4), cli.sequence_length(a.seq_len, 512, model)
    check_layers(model, n)
    size = min(cli.batch_size(a.batch_size, T, model, n), a.samples)
    text = "as grasp.py takes them" if tokenizer else "random"
    peak = "of each phase" if resets or not before else "of the process so far"
    turns = f"\nturns        {a.repeats}, the best one counts; peak GiB {peak}" * (a.autograd or not a.svd)
    print(f"tokens       {a.samples} x {T}, {text}, batches of {size}; ratio {a.ratio}{turns}\n")
    if a.growth:
        report = growth(model, a.samples, T, size, a.ratio, a.repeats, before)
    else:
        windows = (calibration_windows(tokenizer, a.calibration, a.samples, T, a.seed)[0] if tokenizer else
                   random_prompt(model, a.samples, T, SEED))
        report = run(model, windows, size, n, a.ratio, a.repeats, before, a.autograd, a.svd)
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
    p = cli.Parser(bench.__doc__)
    add = cli.model_flags(p, "what to measure", help=DENSE).add_argument
    add("--shape", choices=SHAPES, help="random weights of this shape instead, in bfloat16 unless --dtype is given")
    add("--layers", type=cli.positive, metavar="N", help="how many are redundant (default: a quarter; --memory: a fifth)")
    add("--ratio", type=cli.fraction, default=0.1, help="fraction of each matrix's parameters to keep (default: 0.1)")
    add("--repeats", type=cli.positive, metavar="N", default=3, help="turns, of which the best counts (default: 3)")
    add("--autograd", action="store_true", help="the algorithm as published beside it, once")
    add("--svd", action="store_true", help="ways to the same SVDs, once; alone: no phases")
    add("--growth", action="store_true", help="instead: small random models, as tokens, layers and width grow")
    add("--report", type=cli.json_file, metavar="FILE", help="instead: everything that a GPU is for, in at most eight "
        "minutes on an H100, to FILE.json and FILE.md")
    add("--memory", action="store_true", help="instead: compute the GiB that known shapes need")
    cli.calibration_flags(p, samples=16)
    p.add_argument_group("output").add_argument("--json", type=cli.json_file, metavar="FILE",
                                                help="write all figures there too")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if a.shape and a.ckpt != cli.TINY:
        raise ValueError("give one of --ckpt and --shape")
    if (a.growth or a.report) and (a.shape or a.ckpt != cli.TINY or a.layers or a.autograd or a.svd):
        raise ValueError("--ckpt, --shape, --layers, --autograd, --svd have no use with --growth and --report, which "
                         "have models of their own")
    return a


if __name__ == "__main__":
    cli.command(main)
