"""Everything that a GPU is for, measured once: `python -m extras.bench --device cuda --report FILE`.

    phases       random bf16 weights of two known shapes: seconds, share of the rate of a large matrix product, peak
    batches      the attribution sweep in micro-batches of 1,024 to 16,384 tokens
    generation   tokens/s of the dense model, of GRASP's factors, of a plain LLaMA with as many parameters
    fp32         the peak of the attribution sweep in fp32 with grouped queries, which no flash kernel takes
    tests        this project's tests that need CUDA
    fisher       extras.fisher: its sweep; its decompositions, computed from one matrix of each shape
    svd          ways to an SVD of the 7B shape's matrices

FILE.json and FILE.md are written after each part, so that a run that is cut short keeps the parts before. A part that
fails, or that the time limit leaves no time for, has a line that says so. No data and no network are needed.
"""
import gc
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from attribution import rank_for_ratio, weight_gradients
from data.files import write_json
from extras import peak_bytes, reset_peak
from extras.baselines import keep_channels
from extras.bench import GIB, SEED, SHAPES, random_weights, show
from extras.bench.memory import late_layers, sweep_bytes
from extras.bench.speed import matrix_rate, operations, turn, warm_up
from extras.bench.svds import by_shape, svd_study
from extras.fisher.moments import second_moments
from extras.fisher.prices import DAMPING, channel_costs, components
from extras.throughput import random_prompt, run_this
from model import LowRankLinear, matrix_names
from runtime import cli

LIMIT = 480  # seconds for all parts
ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ["-k", "cuda", "tests"]
PHASES, MAIN, GROUPED = ("llama2-7b", "llama3-8b"), "llama2-7b", "llama3-8b"  # shapes
SAMPLES, T, LAYERS, RATIO = 512, 512, 7, 0.1
BATCHES, FEW = (1024, 2048, 4096, 8192, 16384), 32  # tokens in a micro-batch; sequences of the parts after the first
PROMPT, NEW, BATCH_SIZES = 128, 64, (1, 8)


def measure_all(device, file):
    """Measure all parts on a device; write FILE.json and FILE.md after each, and print its table."""
    end, texts = time.monotonic() + LIMIT, [f"# {describe(device)}"]
    results = {"device": describe(device)}
    warm_up(device, torch.bfloat16)
    parts = {"phases, " + shape: partial(phases, shape) for shape in PHASES}
    parts |= {"batches": batches, "generation": generation, "fp32": fp32, "tests": tests, "fisher": fisher, "svd": svds}
    for name, part in parts.items():
        started = time.monotonic()
        try:
            rows = part(device, end) if started < end else [{"not measured": "no time left"}]
        except Exception as e:  # out of memory, a library's failure: the other parts go on
            rows = [{"not measured": f"{type(e).__name__}: {(str(e).strip() or 'no text').splitlines()[0]}"}]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        results[name] = {"rows": rows, "seconds": time.monotonic() - started}
        texts.append(f"## {name}\n\n{show(rows)}\n\n{results[name]['seconds']:.0f} s")
        print("\n" + texts[-1])
        write_json(file.with_suffix(".json"), results)
        file.with_suffix(".md").write_text("\n\n".join(texts) + "\n")


def describe(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def opened(shape, device, samples, dtype=torch.bfloat16):
    """(random model, ids of the layers that count as redundant, random windows (samples, T))."""
    model = random_weights(SHAPES[shape], dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # no clock starts while weights are drawn
    return model, late_layers(model, LAYERS), random_prompt(model, samples, T, SEED)


def phases(shape, device, end):
    """A row for each phase: seconds, share of the matrix rate in %, peak and computed peak in GiB.

    About one in twelve random square matrices of size 4,096 is too close to singular for the Gram matrix, and takes
    torch's slow SVD on top. A trained model's are not random.
    """
    model, _, windows = opened(shape, device, SAMPLES)
    size, peaks = cli.batch_size(None, T, model, LAYERS), {}
    rate = matrix_rate(device, model.dtype)
    seconds, redundant = turn(model, windows, size, LAYERS, RATIO, peaks, bare=False)
    work, computed = operations(model, redundant, *windows.shape), sweep_bytes(model, redundant, size, T)
    rows = [{"phase": phase, "seconds": seconds[phase], "matrix rate %": 100 * work[phase] / rate / seconds[phase]
             if phase in work else None, "peak GiB": peaks[phase] / GIB,
             "computed GiB": sum(computed.values()) / GIB if phase == "attribution" else None} for phase in peaks]
    return [*rows, {"phase": f"all, batches of {size}, redundant {redundant[0]} to {redundant[-1]}",
                    "seconds": sum(seconds.values()), "matrix rate %": None, "peak GiB": max(peaks.values()) / GIB,
                    "computed GiB": None}]


def sweep_row(model, ids, windows, size):
    """Seconds, tokens/s and peak of one attribution sweep in micro-batches of `size` sequences."""
    seconds = {}
    reset_peak(model.device)
    with cli.timed(seconds, "sweep", model.device):
        weight_gradients(model, matrix_names(*ids), windows.split(size))
    computed = sum(sweep_bytes(model, ids, min(size, len(windows)), windows.shape[1]).values())
    return {"tokens": size * windows.shape[1], "seconds": seconds["sweep"],
            "tokens/s": windows.numel() / seconds["sweep"], "peak GiB": peak_bytes(model.device) / GIB,
            "computed GiB": computed / GIB}


def batches(device, end):
    model, ids, windows = opened(MAIN, device, FEW)
    weight_gradients(model, matrix_names(*ids), windows[:1].split(1))  # what libraries do only once
    rows = []
    for tokens in BATCHES:
        try:
            rows.append(sweep_row(model, ids, windows, max(1, tokens // T)))
        except torch.OutOfMemoryError:
            rows.append({**dict.fromkeys(rows[0] if rows else ["tokens"]), "tokens": tokens})
    return rows


def fp32(device, end):
    """Without fused attention, autograd would keep B x heads x T x T probabilities in each block."""
    model, ids, windows = opened(GROUPED, device, FEW, torch.float32)
    weight_gradients(model, matrix_names(*ids), windows[:1].split(1))  # what libraries do only once
    return [sweep_row(model, ids, windows, max(1, FEW // 8))]


def generation(device, end):
    """Greedy; the median of three. GRASP's factors are random ones of its ranks, which take as long."""
    dense, ids, _ = opened(MAIN, device, 1)
    factors = random_weights(SHAPES[MAIN], dense.dtype, device)
    for name in matrix_names(*ids):
        m, n = factors.get_submodule(name).weight.shape
        k = rank_for_ratio(m, n, RATIO)
        A, B = (torch.randn(shape, device=device, dtype=dense.dtype) * 0.02 for shape in ((m, k), (k, n)))
        factors.set_submodule(name, LowRankLinear(A, B))
    a = dense.args
    width = a.hidden_dim - (dense.n_params - factors.n_params) // (3 * a.dim * a.n_layers)
    shape = list(SHAPES[MAIN])
    shape[4] = width
    rows, models = [], {"dense": dense, "GRASP's factors": factors,
                        f"plain, width {width:,}": random_weights(shape, dense.dtype, device)}
    for B in BATCH_SIZES:
        turns = {name: [] for name in models}
        for _ in range(4):  # the first does not count
            for name, model in models.items():
                turns[name].append(run_this(model, random_prompt(model, B, PROMPT, SEED), NEW))
        for name, times in turns.items():
            first, rest = map(statistics.median, zip(*times[1:]))
            rows.append({"model": name, "parameters": models[name].n_params, "batch": B,
                         "prefill tokens/s": B * PROMPT / first, "decode tokens/s": B * (NEW - 1) / rest})
    return rows


def tests(device, end):
    """pytest's last line. Without CUDA these tests are skipped."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *TESTS]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=end - time.monotonic())
    except subprocess.TimeoutExpired:
        return [{"not measured": "no time left for the tests"}]
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return [{"result": line} for line in [*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1]]]


def fisher(device, end):
    """Of all blocks. A price and the factors are two decompositions; channels have one of each. Without the last fit."""
    model, _, windows = opened(MAIN, device, FEW)
    names = [name for name in matrix_names(*range(model.args.n_layers)) if not name.endswith((".w1", ".w3"))]
    seconds, size = {}, cli.batch_size(None, T)
    reset_peak(device)
    with cli.timed(seconds, "sweep", device):
        moments = second_moments(model, names, windows.split(size), channels=True)
    peak = peak_bytes(device)
    reset_peak(device)
    for name in names[:5]:  # of one block
        W, kind = model.get_submodule(name).weight, name.rpartition(".")[2]
        with cli.timed(seconds, kind, device):
            if kind == "w2":
                kept = channel_costs(W, *moments[name]).argsort()[W.shape[1] // 5:].sort().values
                keep_channels(model, name.removesuffix(".w2"), kept, moments[name][0], DAMPING)
            else:
                components(W, *moments[name])
    block = sum(seconds[kind] * (1 if kind == "w2" else 2) for kind in seconds if kind != "sweep")
    return [{"phase": f"sweep, {FEW} sequences", "seconds": seconds["sweep"], "peak GiB": peak / GIB},
            {"phase": f"decompositions, {model.args.n_layers} times one block's", "seconds":
             block * model.args.n_layers, "peak GiB": peak_bytes(device) / GIB}]


def svds(device, end):
    """Of the first block's square matrices, and of its w1 and w3."""
    model, _, windows = opened(MAIN, device, 2)
    return svd_study(model, by_shape(model, [0])[:2], lambda label: windows.split(1), RATIO, end)
