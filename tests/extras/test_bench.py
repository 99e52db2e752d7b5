"""The lesson: a measure is held against a count that knows nothing of it, a method against the slow way to the same."""
import json
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attribution import layer_cosines, svd, weight_gradients
from tests.conftest import error_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras.bench import GIB, SHAPES, memory, random_weights, speed, svds
from extras.bench import report as reports
from extras.bench import __main__ as command
from extras.bench.speed import autograd_compress, borrowed, measure, operations, turn
from extras.bench.svds import batched, by_shape, in_common, svd_study, time_by_shape
from grasp import compress, find_redundant
from model import LowRankLinear, matrix_names
from runtime import cli

TINY_SHAPE = 16, 4, 4, 2, 24, 50, False
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes that a test has time for."""
    monkeypatch.setattr(speed, "PRODUCT", {"cpu": 64, "cuda": 512})
    monkeypatch.setattr(speed, "SMALLEST", TINY_SHAPE)
    monkeypatch.setattr(command, "SMALLEST", TINY_SHAPE)
    monkeypatch.setitem(SHAPES, "tinyllama-1.1b", TINY_SHAPE)


@pytest.fixture
def run(nowhere, monkeypatch, capsys):
    """The command: (what it printed, what it wrote with --json)."""
    def run(words):
        monkeypatch.setattr(sys, "argv", ["command", *words.split(), "--json", "a.json"])
        cli.command(command.main)
        return capsys.readouterr().out, json.loads((nowhere / "a.json").read_text())
    return run


def columns(out):
    """The heads of every table in what was printed."""
    lines = out.splitlines()
    return [[head.strip() for head in line.strip("| ").split("|")]
            for line, rule in zip(lines, lines[1:]) if rule.startswith("| -")]


# ------------------------------------------------------------------------------------------------ floors

@pytest.mark.parametrize("redundant", [[0], [3], [1, 3], [0, 1, 2, 3]])
def test_operations_are_what_torch_counts(redundant):
    """Every matrix product, exactly; of attention, here as plain products over all T x T pairs, the causal half."""
    model, (B, T) = random_model(), (3, 12)
    tokens, expected = random_tokens(model, B, T), operations(random_model(), redundant, B, T)
    names = matrix_names(*redundant)
    for sweep, work in (("redundancy", lambda batches: [*layer_cosines(model, batches)]),
                        ("attribution", partial(weight_gradients, model, names))):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work(tokens.split(2))
        counts = counter.get_flop_counts()["Global"]
        assert set(counts) == {torch.ops.aten.mm, torch.ops.aten.bmm}
        assert counts[torch.ops.aten.mm] + counts[torch.ops.aten.bmm] / 2 == expected[sweep]


def test_a_phase_is_the_best_of_its_turns(monkeypatch):
    """By hand: a machine of two turns, the first slow in one phase and the second in the others; before, the peaks."""
    model = random_model(torch.float32)
    turns = iter([{"redundancy": 9.0, "attribution": 9.0, "SVD": 9.0, "bare SVD": 9.0},
                  {"redundancy": 1.0, "attribution": 5.0, "SVD": 2.0, "bare SVD": 4.0},
                  {"redundancy": 2.0, "attribution": 2.0, "SVD": 3.0, "bare SVD": 8.0}])

    def by_hand(*words):
        if len(words) == 6:
            words[-1].update({"redundancy": 4 * GIB, "attribution": 5 * GIB, "SVD": 2 * GIB})
        return next(turns), [1]

    rates = iter([10.0, 40.0, 20.0])
    monkeypatch.setattr(speed, "turn", by_hand)
    monkeypatch.setattr(speed, "matrix_rate", lambda *words: next(rates))
    measured = measure(model, random_tokens(model, 3, 8), 2, 1, 0.5, 2, before=GIB)
    work = operations(model, [1], 3, 8)
    first, second = work["redundancy"] / 40, work["attribution"] / 40
    for row, (phase, seconds, floor, peak) in zip(measured["rows"], [
            ("redundancy sweep", 1, first, 3), ("attribution sweep", 2, second, 4),
            ("both sweeps", 4, first + second, 4),
            ("SVD and scores", 2, 4, 1), ("whole", 7, first + second + 4, 4)], strict=True):
        assert [row["phase"], row["seconds"], row["peak GiB"]] == [phase, seconds, peak]
        assert row["floor s"] == pytest.approx(floor) and row["ratio"] == pytest.approx(seconds / floor)
    assert [bool(row["computed GiB"]) for row in measured["rows"]] == [False, True, False, False, False]


def test_a_turn_is_the_method_and_leaves_the_model_as_it_was():
    model = random_model()
    windows, before = random_tokens(model, 5, 12), dict(model.named_modules())
    peaks = {}
    seconds, redundant = turn(model, windows, 2, 2, 0.5, peaks)
    assert redundant == find_redundant(model, lambda label: windows.split(2), 2)[-1]
    assert set(seconds) == {"redundancy", "attribution", "SVD", "bare SVD"} and min(seconds.values()) > 0
    assert set(peaks) == {"redundancy", "attribution", "SVD"} and min(peaks.values()) > 0
    assert all(module is before[name] for name, module in model.named_modules())


def test_what_is_timed_once_counts_for_all_of_its_shape():
    model, seen = random_model(torch.bfloat16), []

    def look(W):
        seen.append((tuple(W.shape), W.dtype))
        return len(seen)

    groups = by_shape(model, [1, 2])
    assert [len(names) for names in groups] == [4, 4, 4, 2]
    assert groups[3] == ["layers.1.feed_forward.w2", "layers.2.feed_forward.w2"]
    assert time_by_shape(look, model, groups)[1] == [1, 5, 9, 13] and len(seen) == 14
    assert time_by_shape(look, model, groups, every=False)[1] == [15, 16, 17, 18]
    assert seen[14:] == [(shape, torch.float32) for shape in ((16, 16), (8, 16), (24, 16), (16, 24))]


# ------------------------------------------------------------------------------------------------ autograd beside it

def test_autograd_of_the_dense_model_keeps_the_same_components(monkeypatch):
    """Two roads to one set: dL/dW once and projected, and the singular values as parameters, a sweep a half block."""
    model, seconds = random_model(dim=32, head_dim=8, hidden_dim=56), {}
    windows = random_tokens(model, 5, 12)
    with borrowed(model, [1, 2]):
        monkeypatch.setattr(speed, "keep", lambda *words: None)  # W goes back: all gradients are the dense model's
        theirs = autograd_compress(model, [1, 2], lambda label: windows.split(2), 0.3, seconds)
        ours = list(compress(model, [1, 2], lambda label: windows.split(3), 0.3))
    assert {record["name"]: record["kept"] for record in ours} == {name: kept.tolist() for name, kept in theirs.items()}
    assert len(theirs) == 14 and set(seconds) == {"gradients", "SVD"}


def test_autograd_as_published_sees_what_it_replaced(monkeypatch):
    """Deepest first: there the gradients are the dense model's, further up the replaced matrices change them."""
    model, dense, last = random_model(), random_model(), "layers.3.feed_forward"
    windows = random_tokens(model, 3, 12)
    kept = autograd_compress(model, [1, 3], lambda label: [windows], 0.5, {})
    monkeypatch.setattr(speed, "keep", lambda *words: None)
    same = autograd_compress(dense, [1, 3], lambda label: [windows], 0.5, {})
    low_rank = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert low_rank == set(kept) == set(matrix_names(1, 3))
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
    agree = {name: torch.equal(kept[name], same[name]) for name in kept}
    assert all(agree[name] for name in agree if name.startswith(last)) and not all(agree.values())
    W = model.get_submodule("layers.3.feed_forward.w1")
    U, S, Vh = svd(dense.get_submodule("layers.3.feed_forward.w1").weight)
    k = kept["layers.3.feed_forward.w1"]
    assert torch.allclose(W.A @ W.B, U[:, k] * S[k] @ Vh[k], atol=1e-12)


def test_autograd_leaves_dense_what_would_not_be_smaller():
    model = random_model()
    kept = autograd_compress(model, [2], lambda label: [random_tokens(model, 1, 9)], 1.0, {})
    assert [name for name in kept if kept[name] is None] == ["layers.2.attention.wq", "layers.2.attention.wo"]
    assert isinstance(model.layers[2].attention.wo, torch.nn.Linear)


# ------------------------------------------------------------------------------------------------ the SVDs

def test_components_are_the_same_whatever_their_order_and_sign():
    torch.manual_seed(0)
    U, _, Vh = svd(torch.randn(9, 7, dtype=torch.float64))
    turned = torch.tensor([1.0, -1, 1, -1, 1, -1, 1], dtype=torch.float64)
    mixed = [5, 0, 3]
    assert in_common((U[:, :4], Vh[:4]), ((U * turned)[:, mixed], (turned[:, None] * Vh)[mixed])) == 2
    assert in_common((U[:, :4], Vh[:4]), (U[:, :4], Vh.flip(0)[:4])) == 1  # of 7 only the middle one has its own v


@pytest.mark.parametrize("m, n", [(20, 12), (12, 20), (12, 12)])
def test_batched_gram_matrices_are_svds(m, n):
    torch.manual_seed(1)
    weights = list(torch.randn(5, m, n))
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-5)):
        for W, (U, S, Vh) in zip(weights, batched(weights, dtype, chunk=2), strict=True):
            assert torch.allclose(U @ S.diag() @ Vh, W, atol=tolerance) and U.dtype == torch.float32
            assert torch.allclose(S, torch.linalg.svdvals(W), atol=tolerance)


def test_a_way_that_is_wrong_or_fails_shows(monkeypatch):
    def fail(W):
        raise torch.linalg.LinAlgError("svd: does not converge")

    def wrong(W):
        U, S, Vh = svd(W)
        return U, S, Vh.flip(0)

    model = random_model(torch.float32, dim=32, head_dim=8, hidden_dim=56)
    monkeypatch.setattr(svds, "ways_to_svd", lambda cuda: {"right": (svd, False), "wrong": (wrong, False),
                                                            "all": (lambda Ws: [svd(W) for W in Ws], True),
                                                            "fails": (fail, False)})
    right, bad, together, failed = svd_study(model, by_shape(model, [1, 2]), lambda label: [random_tokens(model, 2, 12)], 0.3)
    assert right["kept as in fp64 %"] == together["kept as in fp64 %"] == 100 > 50 > bad["kept as in fp64 %"]
    assert failed == {"way": "fails, failed", "seconds": None, "kept as in fp64 %": None}


# ------------------------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_of_the_shape_and_harmless(tied, dtype):
    model = random_weights((*TINY_SHAPE[:-1], tied), dtype, "cpu")
    assert model.dtype == dtype and not any(p.requires_grad for p in model.parameters())
    assert (model.output.weight is model.tok_embeddings.weight) == tied and model.n_params == model.n_params_dense
    assert model.layers[0].attention.wk.weight.shape == (8, 16) and (model.norm.weight == 1).all()
    assert model(random_tokens(model, 2, 9)).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_one_command_prints_and_writes_all(device, run):
    out, report = run("--shape tinyllama-1.1b --samples 3 --seq-len 8 --batch-size 2 --layers 2 --ratio 0.5 "
                      f"--repeats 2 --autograd --svd --device {device}")
    phases = ["phase", "seconds", "floor s", "ratio", "peak GiB", "computed GiB"]
    assert columns(out) == [phases, ["method", "gradients s", "SVD s", "peak GiB"],
                            ["way", "seconds", "kept as in fp64 %"]]
    assert [row["phase"] for row in report["rows"]] == [*speed.PHASES] and [*report["rows"][0]] == phases
    assert all(row["seconds"] > 0 and row["ratio"] == row["seconds"] / row["floor s"] for row in report["rows"])
    assert report["operations"] == operations(random_model(), report["redundant"], 3, 8) and report["rate"] > 0
    assert [row["method"] for row in report["autograd"]] == ["one sweep", "autograd, as published"]
    ways = {row["way"]: row["kept as in fp64 %"] for row in report["svd"]}
    assert ways["attribution.svd"] == 100 and ("gesvdj" in ways) == (device == "cuda") == ("LAPACK" not in ways)
    assert report["settings"]["shape"] == "tinyllama-1.1b" and report["dtype"] == "torch.bfloat16"
    assert f"device       {device}" in out and ", dtype bfloat16\n" in out


def test_the_ways_to_an_svd_alone_are_one_table(run, monkeypatch):
    monkeypatch.setattr(command, "measure", None)  # no phase is
    out, report = run("--shape tinyllama-1.1b --samples 3 --seq-len 8 --layers 2 --ratio 0.5 --svd")
    assert columns(out) == [["way", "seconds", "kept as in fp64 %"]]
    assert "peak" not in out and "turns" not in out
    assert len(report["redundant"]) == 2 and report["svd"] and "rows" not in report


def test_a_folder_is_measured_as_it_is(run):
    out, report = run("--samples 2 --seq-len 16 --repeats 1")
    assert "data/tiny  8 layers" in out and len(report["redundant"]) == 2 and columns(out)[1:] == []


@pytest.mark.parametrize("device", DEVICES)
def test_growth_is_a_table_for_each_axis(device, run):
    out, report = run(f"--growth --samples 2 --seq-len 8 --repeats 1 --device {device}")
    heads = ["redundancy s", "redundancy ratio", "attribution s", "attribution ratio", "SVD s", "SVD ratio", "peak GiB",
             "computed GiB"]
    assert columns(out) == [[axis, *heads] for axis in ("tokens", "layers", "width")]
    assert {axis: [row[axis] for row in rows] for axis, rows in report["growth"].items()} == {
        "tokens": [16, 32, 64], "layers": [4, 8, 16], "width": [16, 24, 32]}


def test_growth_says_before_its_first_pass_how_long_it_will_take(run, monkeypatch, capsys):
    """All sweeps of nine models, twice, at 1e6 operations a second."""
    def measured(model, windows, *words):
        work.append(sum(operations(model, [3 * model.args.n_layers // 4], *windows.shape).values()))
        said.append(capsys.readouterr().out)
        figures = dict.fromkeys(["seconds", "ratio", "peak GiB", "computed GiB"], 1.0)
        return {"rows": [{"phase": phase, **figures} for phase in speed.PHASES]}

    work, said = [], []
    monkeypatch.setattr(speed, "measure", measured)
    monkeypatch.setattr(speed, "matrix_rate", lambda *words: 1e6)
    run("--growth --samples 2 --seq-len 8 --repeats 1")
    line = f"the sweeps take about {1.5 * 2 * sum(work) / 1e6 / 60:.1f} min (1.5 times their floor); "
    assert len(work) == 9 and line in said[0]


def test_the_memory_table_names_its_unit_dtype_and_share(monkeypatch, capsys):
    for words, line in (("", "bfloat16 weights; a fifth of the layers redundant"),
                        ("--layers 7 --dtype float32", "float32 weights; 7 layers redundant")):
        monkeypatch.setattr(sys, "argv", ["bench", "--memory", "--shape", "llama2-7b", *words.split()])
        cli.command(command.main)
        out = capsys.readouterr().out
        assert "|\n\nin GiB, and tokens of the micro-batch" in out and f"card; {line}; bus:" in out
        assert out.count("| llama2-7b ") == 2 and "\n\nwith --offload\n\n" in out


@pytest.mark.parametrize("words, message", [
    ("--shape gpt2", "--shape: invalid choice: gpt2 (choose from llama2-7b"),
    ("--shape llama2-7b --ckpt small", "give one of --ckpt and --shape"),
    ("--growth --layers 2", "have no use with --growth"),
    ("--growth --svd", "have no use with --growth"),
    ("--report a --device cpu", "--report measures models of 7B: it needs a CUDA device"),
    ("--report a --shape llama2-7b", "have no use with --growth and --report"),
    ("--layers 9", "this model has 8 layers, 0 to 7; asked for 9"),
    ("--seq-len 257", "--seq-len 257: expected 2 to 256"),
    ("--ratio 2", "--ratio: 2, expected more than 0 and at most 1"),
    ("--repeats 0", "--repeats: 0, expected"),
    ("--device nonsense", "--device nonsense: "),
    ("--ckpt small", "small: is compressed already, expected a dense folder")])
def test_mistakes_are_one_line(words, message, nowhere, monkeypatch, capsys):
    model = load_checkpoint(cli.TINY)
    list(compress(model, [3], lambda label: [], 0.1, score="magnitude"))
    save_checkpoint(model, nowhere / "small", tokenizer=load_tokenizer(cli.TINY).files)
    monkeypatch.setattr(command, "measure", None)
    error = error_of(command.main, words, monkeypatch, capsys)
    assert message in error.replace("'", "")


def test_the_memory_of_known_shapes_is_computed_without_weights():
    """LLaMA-2-7B by hand: 6,738,415,616 parameters, of which a block's matrices are 202,375,168."""
    (row,), (offloaded,) = memory.memory({"llama2-7b": SHAPES["llama2-7b"]}, torch.bfloat16, 7, 512)
    weights, gradients = 6_738_415_616 * 2, 7 * 202_375_168 * 4
    assert row["layers"] == "21-27" and row["weights"] * 2 ** 30 == weights and row["gradients"] * 2 ** 30 == gradients
    assert weights + gradients < row["peak, 1,024 tokens"] * 2 ** 30 < 8 * row["8,192 tokens"] * 2 ** 30
    blocks, largest = 32 * 202_375_168 * 2, 11008 * 4096 * 2
    assert offloaded["host"] * GIB == blocks + gradients + largest and offloaded["bus, forward"] * GIB == blocks
    back = 11 / 32 * blocks + gradients / 2  # the blocks from 21 on once more, and the gradients, which are in bf16
    assert offloaded["backward"] * GIB == back
    assert offloaded["tokens, 24 GB"] == 25_600  # so 11 micro-batches of 512 x 512 tokens, in two sweeps
    assert offloaded["in all"] * GIB == 11 * (2 * blocks + back)
    assert offloaded["peak, 16,384 tokens"] < 8 < row["peak, 1,024 tokens"]


HEAD = 3 * 1024 * 4, 12  # the final state and two gradients; log p and two gradients of a chunk, in fp32


@pytest.mark.parametrize("shape, weights, matrices, token, dim, chunk, vocab_size", [
    # a token, from the lowest layer on: norms' inputs and scales, in bf16 q, k, v, output and the SwiGLU, log-sum-exps;
    # then the inputs of the redundant layers' matrices
    ("llama2-7b", 6_738_415_616, 202_375_168,
     11 * (2 * 16_388 + 2 * (4 * 4096 + 3 * 11008) + 128) - 16_388 + 7 * 2 * (2 * 4096 + 11008), 4096, 1024, 32000),
    ("llama3-8b", 8_030_261_248, 218_103_808,
     11 * (2 * 16_388 + 2 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 128) - 16_388 + 7 * 2 * (2 * 4096 + 14336),
     4096, 343, 128256),
    ("llama2-13b", 13_015_864_320, 317_194_240,
     14 * (2 * 20_484 + 2 * (4 * 5120 + 3 * 13824) + 160) - 20_484 + 7 * 2 * (2 * 5120 + 13824), 5120, 1024, 32000)])
def test_the_computed_peak_is_the_sum_made_by_hand(shape, weights, matrices, token, dim, chunk, vocab_size):
    """bf16, 7 layers from two thirds of the depth on, 2 sequences of 512 tokens: the peak is at the head."""
    (row,), _ = memory.memory({shape: SHAPES[shape]}, torch.bfloat16, 7, 512)
    state, log_p = HEAD
    by_hand = 2 * weights + 7 * 4 * matrices + 1024 * token + state * dim + log_p * chunk * vocab_size
    assert row["peak, 1,024 tokens"] * GIB == by_hand


def test_the_chosen_micro_batch_fits_and_is_the_commands_own():
    """A card of 24 GB holds LLaMA-2-7B and half of the usual micro-batch, but not 13B."""
    rows, _ = memory.memory({name: SHAPES[name] for name in ("llama2-7b", "llama2-13b")}, torch.bfloat16, 7, 512)
    assert [[row[f"tokens, {card}"] for card in memory.GPUS] for row in rows] == [
        [512, 4608, 8192, 8192], [None, 1536, 5120, 8192]]
    for row, name in zip(rows, ("llama2-7b", "llama2-13b")):
        model = bench_model(name)
        for card, size in memory.GPUS.items():
            if B := (row[f"tokens, {card}"] or 0) // 512:
                assert sum(memory.sweep_bytes(model, range(21, 28), B, 512).values()) <= size * GIB
                weights = 2 * model.n_params
                assert B == cli.fitting(model, 512, 7, size * GIB - weights)


def bench_model(name):
    return memory.meta_model(SHAPES[name], torch.bfloat16)


# ------------------------------------------------------------------------------------------------ the report

@pytest.fixture
def small_report(monkeypatch):
    """The report's parts in sizes that a test has time for, on the CPU too."""
    for name, value in {"PHASES": ("tinyllama-1.1b",), "MAIN": "tinyllama-1.1b", "GROUPED": "tinyllama-1.1b",
                        "SAMPLES": 4, "T": 8, "LAYERS": 2, "RATIO": 0.5, "BATCHES": (8, 16), "FEW": 4, "PROMPT": 4,
                        "NEW": 3, "BATCH_SIZES": (1, 2), "TESTS": ["tests/test_job.py", "-k", "report"]}.items():
        monkeypatch.setattr(reports, name, value)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_measured_once(device, small_report, nowhere, monkeypatch):
    """By the command, which needs a GPU for models of 7B; on the CPU by its function."""
    if device == "cuda":
        monkeypatch.setattr(sys, "argv", ["command", "--report", "found", "--device", device])
        cli.command(command.main)
    else:
        reports.measure_all(torch.device(device), nowhere / "found")
    parts = json.loads((nowhere / "found.json").read_text())
    text = (nowhere / "found.md").read_text()
    names = ["phases, tinyllama-1.1b", "batches", "generation", "fp32", "tests", "fisher", "svd"]
    assert [*parts] == ["device", *names]
    for name in names:
        rows = parts[name]["rows"]
        assert "not measured" not in rows[0] and f"## {name}\n\n| " in text
        assert all(value is None or value > 0 for row in rows for key, value in row.items()
                   if "seconds" in key or "tokens/s" in key)
    assert [row["phase"] for row in parts["phases, tinyllama-1.1b"]["rows"]][:3] == ["redundancy", "attribution", "SVD"]
    assert parts["svd"]["rows"][0]["way"] == "attribution.svd" and parts["svd"]["rows"][0]["seconds"] > 0
    assert [row["tokens"] for row in parts["batches"]["rows"]] == [8, 16]
    sizes = {row["model"].partition(",")[0]: row["parameters"] for row in parts["generation"]["rows"]}
    assert sizes["dense"] > sizes["plain"] >= sizes["GRASP's factors"]


def test_a_part_that_fails_or_comes_too_late_says_so(small_report, nowhere, monkeypatch):
    def fail(device, end):
        raise RuntimeError("no kernel image is available\nmore lines")

    def late(device, end):
        assert json.loads((nowhere / "found.json").read_text())["batches"]  # written before the next part starts
        monkeypatch.setattr(reports.time, "monotonic", lambda: end + 1)
        return [{"phase": "late"}]

    monkeypatch.setattr(reports, "batches", fail)
    monkeypatch.setattr(reports, "generation", late)
    reports.measure_all(torch.device("cpu"), nowhere / "found.json")
    parts = json.loads((nowhere / "found.json").read_text())
    assert parts["batches"]["rows"] == [{"not measured": "RuntimeError: no kernel image is available"}]
    assert parts["generation"]["rows"] == [{"phase": "late"}]
    assert all(parts[name]["rows"] == [{"not measured": "no time left"}] for name in ("fp32", "tests", "fisher", "svd"))
