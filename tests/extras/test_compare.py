"""The lesson: methods are compared on the same tokens, from the same model, at one size; no row owes another."""
import copy
import gc
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import grasp
from tests.conftest import error_of, job_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from data.corpus import load_text, random_windows
from data.tokenizer import load_tokenizer
from extras import compare, controls, reset_peak
from extras.baselines import block_params, uniform_ranks
from extras.compare import BLOCKS, budget_of, rows_of
from extras.fisher.moments import second_moments
from extras.fisher.prices import components
from extras.fisher.ranking import global_ranks
from grasp import find_redundant
from model import LowRankLinear, Transformer, matrix_names
from runtime import cli
from runtime.cli import TINY

QUICK = "--layers 2 --samples 4 --seq-len 64 --windows 2".split()
CPU = torch.device("cpu")


def report(main, words, monkeypatch, file):
    monkeypatch.setattr(sys, "argv", ["command", *QUICK, *words.split()])
    cli.command(main)
    return json.loads(Path(file).read_text())


@pytest.fixture
def run(nowhere, monkeypatch):
    """compare's main with these functions as its methods: what it wrote with --json."""
    def run(words="", **fakes):
        monkeypatch.setattr(compare, "methods", lambda n: fakes)
        monkeypatch.setattr(compare, "BLOCKS", {})
        return report(compare.main, f"{words} --json a.json", monkeypatch, "a.json")
    return run


def drop(count, model, sweep=None, budget=None):
    """A method that takes the last blocks out."""
    model.layers = model.layers[:-count]
    return model


def models_here():
    """How many models this process holds, without those that only cycles of objects hold."""
    gc.collect()
    return sum(type(thing) is Transformer for thing in gc.get_objects())


def low_rank(model):
    """The layers with low-rank matrices."""
    return {int(name.split(".")[1]) for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


# ------------------------------------------------------------------------------------------------ the budget

@pytest.mark.parametrize("ratio, removed", [
    (0.5, 2 * (256 - 4 * 32) + 2 * (128 - 2 * 24) + 3 * (384 - 4 * 40)),
    (1.0, 2 * 0 + 2 * (128 - 5 * 24) + 3 * (384 - 9 * 40))])  # rank 8 of 16 x 16 is no smaller: it stays dense
def test_the_budget_by_hand(ratio, removed):
    """wq, wo 16 x 16; wk, wv 8 x 16; w1, w2, w3 of 24 and 16: what these lose in three layers."""
    model = random_model()
    before = model.n_params
    assert budget_of(model, 3, ratio) == 3 * removed
    list(grasp.compress(model, [0, 1, 3], lambda label: [random_tokens(model, 2, 9)], ratio))
    assert before - model.n_params == 3 * removed


def test_the_budget_as_a_share_of_the_blocks():
    """Each of four blocks has 2 * 256 + 2 * 128 + 3 * 384 parameters and two norms of 16; embeddings do not count."""
    assert budget_of(random_model(), 2, None, 0.25) == 1952
    assert budget_of(random_model(vocab_size=99), 2, None, 0.3) == round(0.3 * 4 * 1952) == 2342


def test_grasp_meets_any_budget_by_one_ratio():
    tokens = random_tokens(random_model(), 2, 9)
    for budget in (150_000, 400_000, 800_000):
        model = random_model(dim=256, head_dim=64, hidden_dim=384)
        before = model.n_params
        compare.grasp(model, lambda label: [tokens], budget, layers=[1, 2])
        assert before - model.n_params == pytest.approx(budget, rel=0.005) and low_rank(model) == {1, 2}
        shares = [m.A.shape[1] * (1 / m.A.shape[0] + 1 / m.B.shape[1]) for m in model.layers[1].modules()
                  if isinstance(m, LowRankLinear)]
        assert len(shares) == 7 and max(shares) - min(shares) < 0.02
    most = 2 * (2 * (256 * 256 - 512) + 2 * (128 * 256 - 384) + 3 * (384 * 256 - 640))  # all matrices of rank 1
    with pytest.raises(ValueError, match=f"cannot remove 999,999 parameters: GRASP of 2 layers removes {most:,} at"):
        compare.grasp(random_model(dim=256, head_dim=64, hidden_dim=384), lambda label: [tokens], 999_999, [1, 2])


def test_methods_of_whole_blocks_have_a_row_below_the_budget_and_one_above():
    """A row where the budget is a whole number of blocks but for 0.5 %; a patch of 16 x 16 costs a part of a block."""
    model, size = random_model(n_layers=6), 1952

    def names(method, budget):
        return [name for name, *_ in rows_of(method, 2, model, budget)]

    assert names("shortgpt", 5 * size // 2) == ["shortgpt, 2 blocks", "shortgpt, 3 blocks"]
    for budget in (2 * size, 2 * size - 1, 2 * size + 1):
        assert names("shortgpt", budget) == ["shortgpt, 2 blocks"]
    assert names("replaceme", size // 2) == ["replaceme, 1 block"]
    assert names("linearpatch", 2 * size - 256) == ["linearpatch, 2 blocks"]
    assert names("linearpatch", 2 * size) == ["linearpatch, 2 blocks", "linearpatch, 3 blocks"]
    assert names("svd", 5 * size // 2) == ["svd"]


def test_the_second_row_of_sleb_goes_on_from_the_first(nowhere, monkeypatch):
    """Three blocks at once are the same as two and one more, and its seconds count the first two."""
    words = "--budget 0.3 --methods sleb --json a.json --keep kept"  # 2.4 of 8 blocks
    dense, two, three = report(compare.main, words, monkeypatch, "a.json")["results"]
    assert [two["method"], three["method"]] == ["sleb, 2 blocks", "sleb, 3 blocks"]
    assert two["off"] < -0.1 < 0.1 < three["off"] and three["seconds"] > two["seconds"]
    model, tokenizer = load_checkpoint(TINY), load_tokenizer(TINY)
    stream = tokenizer.stream(load_text("embedded", "train")[0])
    windows, _ = random_windows(stream, 4, 64, 42)
    at_once = compare.sleb(model, lambda label: windows.split(4), 3)
    for folder, n in (("sleb-2-blocks", 6), ("sleb-3-blocks", 5)):
        assert load_checkpoint(Path("kept") / folder).args.n_layers == n
    kept = load_checkpoint("kept/sleb-3-blocks")
    assert all(torch.equal(p, q) for p, q in zip(at_once.parameters(), kept.parameters(), strict=True))


def test_if_the_first_row_of_sleb_fails_so_does_the_second(nowhere, monkeypatch):
    """9 tenths of 8 blocks are 7.2, and the first and the last one have to stay."""
    found = report(compare.main, "--budget 0.9 --methods sleb --json a.json --keep kept", monkeypatch, "a.json")
    for row, blocks in zip(found["results"][1:], (7, 8), strict=True):
        assert row == {"method": f"sleb, {blocks} blocks", "error": "cannot take out 7 blocks: expected 1 to 6 of 8"}
    assert not Path("kept").exists()


def test_rows_are_ranked_by_the_first_texts_perplexity(run, capsys):
    def fail(model, sweep, budget):
        raise ValueError("cannot")

    found = run("--methods bad two one", bad=fail, two=partial(drop, 2), one=partial(drop, 1))
    assert [row["method"] for row in found["results"]] == ["dense", "bad", "two", "one"]  # as they were run
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [line.split()[1] for line in lines] == ["dense", "one", "two", "bad"]


def test_what_a_folder_cannot_hold_is_said_and_the_rest_is_kept(nowhere, monkeypatch, capsys):
    words = "--methods svd-all streamline slicegpt llm-pruner shortgpt --budget 0.25 --keep kept --json a.json"
    report(compare.main, words, monkeypatch, "a.json")
    assert sorted(p.name for p in Path("kept").iterdir()) == ["shortgpt-2-blocks", "svd-all"]
    out = capsys.readouterr().out
    assert "written to kept/svd-all" in out and out.count("not written") == 3 and "no folder can hold this model" in out


def test_what_is_kept_to_the_redundant_layers_finds_them_itself():
    for name, everywhere in [("svd", False), ("fwsvd", False), ("asvd", False), ("svd-llm", False),
                             ("grasp", False), ("kfac", False),
                             ("svd-all", True), ("fwsvd-all", True), ("asvd-all", True), ("svd-llm-all", True)]:
        model = random_model(dim=32, head_dim=8, hidden_dim=56)
        windows, before = random_tokens(model, 4, 12), model.n_params
        expected = set(range(4)) if everywhere else set(find_redundant(model, lambda label: [windows], 2)[1])
        model = compare.methods(2)[name](model, lambda label: [windows], 10_000)
        assert low_rank(model) == expected and before - model.n_params > 9_000


def ranks_of(name, model, tokens, budget):
    """{matrix: rank} of what a row of compare makes of a copy of the model."""
    torch.manual_seed(0)  # of the labels that the model draws
    small = compare.methods(1)[name](copy.deepcopy(model), lambda label: tokens.split(2), budget)
    return {matrix: m.A.shape[1] for matrix, m in small.named_modules() if isinstance(m, LowRankLinear)}


def test_the_published_two_sided_settings_give_one_ratio_and_a_ranking_by_first_order():
    model = random_model(dim=32, head_dim=8, hidden_dim=72)
    tokens, budget = random_tokens(model, 6, 24), 12_000
    everywhere = matrix_names(*range(4))
    ratio = uniform_ranks(model, everywhere, budget)
    assert ranks_of("obd-llm", model, tokens, budget) == ratio
    by_first_order = ranks_of("io-svd", model, tokens, budget)
    torch.manual_seed(0)
    moments = second_moments(model, everywhere, tokens.split(2))
    G, costs, sizes = autograd(model, everywhere, tokens), {}, {}
    for name in everywhere:
        U, S, Vh = components(model.get_submodule(name).weight, *moments[name])
        costs[name], (m, n) = S * torch.einsum("mk,mn,kn->k", U, G[name], Vh).abs(), (len(U), Vh.shape[1])
        sizes[name] = m + n, m * n
    assert by_first_order == {name: k for name, k in global_ranks(costs, sizes, budget).items() if k}
    assert by_first_order != ranks_of("kfac-all", model, tokens, budget)


def autograd(model, names, tokens):
    """{name: dL/dW} by one ordinary backward pass."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return dict(zip(names, torch.autograd.grad(loss, weights)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BLOCKS, *compare.methods(1)])
def test_every_method_stays_where_the_model_is(name, dtype, device):
    """Device and dtype of what comes back are the model's, its size what was asked, its losses numbers."""
    model = random_model(dtype, dim=32, head_dim=8, hidden_dim=72, n_layers=8).to(device)
    tokens, before = random_tokens(model, 6, 24), model.n_params
    budget = round(1.9 * block_params(model))
    size = block_params(model)
    _, method, _ = rows_of(name, 3, model, budget)[0]
    small = method(model, lambda label: tokens.split(2))
    assert {(p.device.type, p.dtype) for p in small.parameters()} == {(device, dtype)}
    if name in BLOCKS:
        assert before - small.n_params == (2 * size - 32 ** 2 if name == "linearpatch" else size)
    else:
        step = size if name == "fisher-llama" else 0.02 * budget  # a channel of every layer, or a whole layer
        assert before - small.n_params == pytest.approx(budget, abs=step)
    assert evaluate.perplexity(small, [tokens]) < float("inf")


# ------------------------------------------------------------------------------------------------ rows

def test_a_row_is_what_the_method_returned():
    """Its parameters and perplexity, though it is another object than the model that the method was given."""
    model, other = random_model(), drop(2, random_model(seed=5))
    windows = random_tokens(model, 3, 12)
    before = model.n_params
    row = compare.run("other", lambda model, sweep: other, job_of(model, {"text": (windows, None)}), 4000)
    assert row["removed"] == before - other.n_params == 2 * 1952 and row["off"] == pytest.approx(-0.024)
    assert row["perplexity"] == {"text": evaluate.perplexity(other, windows.split(2))}


def test_every_method_has_the_same_tokens_and_a_fresh_model(run):
    tokens, drawn, others = {}, {}, models_here()

    def spy(name, model, sweep, budget):
        assert models_here() == others + 1  # one model at a time
        tokens[name], drawn[name] = [*sweep(name)], torch.rand(3)
        dense = load_checkpoint(TINY)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))
        for p in model.parameters():
            p.zero_()
        cycle = [model]
        cycle.append(cycle)  # outlives the method until it is collected
        return drop(1, model)

    gc.disable()  # what is collected is collected by the command
    try:
        found = run("--methods b a c --seed 7 --batch-size 3", **{name: partial(spy, name) for name in "abc"})
    finally:
        gc.enable()
    assert list(tokens) == ["b", "a", "c"] == [row["method"] for row in found["results"][1:]]
    stream = load_tokenizer(TINY).stream(load_text("embedded", "train")[0])
    windows, offsets = random_windows(stream, 4, 64, 7)
    assert found["calibration"]["offsets"] == offsets.tolist()
    for name in "abc":
        assert [len(batch) for batch in tokens[name]] == [3, 1] and torch.equal(torch.cat(tokens[name]), windows)
        assert torch.equal(drawn[name], drawn["a"])


def test_seconds_are_the_methods_alone(run, monkeypatch):
    clock = [0.0]

    def slowly(function, *words):
        clock[0] += 5
        return function(*words)

    monkeypatch.setattr(cli, "time", SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic))
    for name in ("load_checkpoint", "result_row"):  # outside of what is timed
        monkeypatch.setattr(compare, name, partial(slowly, getattr(compare, name)))
    quick, slow = run(quick=partial(drop, 1), slow=partial(slowly, partial(drop, 1)))["results"][1:]
    assert quick["seconds"] == 0 and slow["seconds"] == 5


def test_a_peak_is_the_methods_alone_or_the_table_says_so(run, monkeypatch, capsys):
    left = []

    def lavish(model, sweep, budget):
        left.append([torch.ones(4000) for _ in range(15_000)].pop())  # 240 MB, freed but for the end of the heap
        return drop(1, model)

    fakes = {"lavish": lavish, "thrifty": partial(drop, 1)}
    for possible in (reset_peak(CPU), False):
        monkeypatch.setattr(compare, "reset_peak", reset_peak if possible else lambda device: False)
        lavish_row, thrifty_row = run(**fakes)["results"][1:]
        assert (lavish_row["peak_bytes"] > thrifty_row["peak_bytes"] + 10 ** 8) == possible
        assert ("peak GiB of the method alone" if possible else "peak GiB of the process so far") in capsys.readouterr().out
    monkeypatch.setattr(Path, "write_text", lambda *words: open(""))  # as where there is no such file
    assert not reset_peak(CPU)


def test_a_method_that_fails_is_a_row_with_its_reason(run, capsys):
    def fail(model, sweep, budget):
        raise ValueError("too little\nto go by")

    dense, bad, good = run(bad=fail, good=partial(drop, 1))["results"]
    assert bad == {"method": "bad", "error": "too little to go by"} and good["removed"] > 0
    assert dense["removed"] == 0 and dense["perplexity"]["embedded"] < good["perplexity"]["embedded"]
    out = capsys.readouterr().out
    assert re.search("\nbad +too little to go by\ngood ", out) and "\nbad: too little to go by\n" in out
    assert re.search(r"\n\| good +\| .*\n\| bad +\|( +- \|){5}\n", out)


def test_an_interrupted_run_has_shown_and_written_what_it_had(run, capsys):
    def stop(model, sweep, budget):
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        run(first=partial(drop, 1), stop=stop, never=None)
    rows = json.loads(Path("a.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["dense", "first"] and list(Path().iterdir()) == [Path("a.json")]
    assert f"first                  removed {rows[1]['removed']:,}  off budget " in capsys.readouterr().out


def test_a_row_off_the_budget_is_named(run, capsys):
    """The budget is of two layers at ratio 0.1; two whole blocks are more, two layers by GRASP are exactly it."""
    exact, more = run(exact=compare.methods(2)["grasp"], more=partial(drop, 2))["results"][1:]
    assert exact["off"] == 0 and more["off"] == pytest.approx(2 * 98_496 / exact["removed"] - 1)
    out = capsys.readouterr().out
    assert "\noff the budget by more than 0.5 %: more\n" in out
    assert f"{100 * more['off']:+.2f} %" in out and "+0.00 %" in out


# ------------------------------------------------------------------------------------------------ the command

def test_the_rows_are_those_of_grasp_and_of_its_control(nowhere, monkeypatch, capsys):
    ours = report(compare.main, "--ratio 0.1 --methods svd grasp --json a.json", monkeypatch, "a.json")
    out = capsys.readouterr().out
    dense, compressed = report(grasp.main, "--ratio 0.1", monkeypatch, "tiny-grasp/report.json")["results"]
    monkeypatch.setattr("sys.argv", "controls svd --ckpt tiny-grasp --out svd".split())
    controls.main()
    monkeypatch.setattr("sys.argv", "evaluate --ckpt svd --data embedded --windows 2 --json e.json".split())
    evaluate.main()
    plain = json.loads(Path("e.json").read_text())
    for row, theirs in zip(ours["results"], [dense, plain, compressed], strict=True):
        perplexity = theirs["perplexity"]["embedded"]
        assert row["perplexity"]["embedded"] == pytest.approx(perplexity, rel=1e-5)
        assert ours["parameters"] - row["removed"] == theirs["parameters"]
        shown = f"{row['perplexity']['embedded']:.2f}"
        assert re.search(rf"\| {row['method']} +\| +{row['removed']:,} .* {shown} \|", out)
    assert ours["budget"] == ours["results"][1]["removed"] == ours["results"][2]["removed"]
    assert ours["settings"]["methods"] == ["svd", "grasp"] and ours["settings"]["ckpt"] == str(TINY)
    assert ours["protocol"]["embedded"]["windows"] == 2 and "2 windows of 256" in out


def test_texts_of_any_file_are_columns(run, capsys):
    Path("words.txt").write_text("some words here " * 400)
    row = run("--eval embedded words.txt", one=partial(drop, 1))["results"][1]
    assert list(row["perplexity"]) == ["embedded", "words.txt"]
    assert "| embedded ppl | words.txt ppl |" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    ("", "the following arguments are required: --layers"),
    ("--layers 2 --methods grasp magic", "--methods: invalid choice: magic (choose from shortgpt, sleb, laco, "),
    ("--layers 9", "this model has 8 layers, 0 to 7; asked for 9"),
    ("--layers 2 --ratio 0.1 --budget 0.2", "give one of --ratio and --budget"),
    ("--layers 2 --budget 20", "--budget: 20, expected more than 0 and at most 1"),
    ("--layers 2 --budget 1e-9", "--ratio, --budget: leave nothing to remove"),
    ("--layers 2 --samples 0", "--samples: 0, expected"),
    ("--layers 2 --seq-len 257", "--seq-len 257: expected 2 to 256"),
    ("--layers 2 --calibration short", "the calibration text has 3 tokens, too few"),
    ("--layers 2 --eval short", "the evaluation text has 3 tokens, too few"),
    ("--layers 2 --ckpt small", "small: is compressed already, expected a dense folder")])
def test_mistakes_are_one_line_before_any_method(words, message, nowhere, monkeypatch, capsys):
    (nowhere / "short").write_text("if x")
    model = load_checkpoint(TINY)
    list(grasp.compress(model, [3], lambda label: [], 0.1, score="magnitude"))
    save_checkpoint(model, nowhere / "small", tokenizer=load_tokenizer(TINY).files)
    monkeypatch.setattr(compare, "result_row", None)
    error = error_of(compare.main, words, monkeypatch, capsys)
    assert message in error.replace("'", "")  # Pythons differ in whether they quote choices
