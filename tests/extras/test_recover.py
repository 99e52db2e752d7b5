"""The lesson: recovery trains the factors and nothing else, on the mean loss of real tokens, and can be interrupted."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

import grasp
from tests.conftest import error_of, random_model
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from extras import recover
from runtime.cli import TINY

RECORDS = [{"instruction": f"Say {'very ' * (i % 7)}{i}.", "input": "to me {now}" * (i % 3 == 0),
            "output": f"{i} is said."} for i in range(40)]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The embedded model with layer 5 compressed."""
    folder = tmp_path_factory.mktemp("recover") / "small"
    model, windows = load_checkpoint(TINY), torch.arange(256).view(2, 128)
    list(grasp.compress(model, [5], lambda label: iter([windows]), ratio=0.2))
    save_checkpoint(model, folder, {"redundant": [5]}, load_tokenizer(TINY).files)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, compressed):
    """recover's main with these words, on forty made-up records, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))

    def run(*words, ckpt=compressed, data="records.json"):
        monkeypatch.setattr("sys.argv", ["recover", "--ckpt", str(ckpt), "--data", data, "--seq-len", "64", "--held-out",
                                         "8", "--batch-size", "8", "--save-every", "2", *map(str, words)])
        recover.main()
    return run


def test_help_names_the_defaults_that_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.json").touch()
    words = "recover --ckpt there --data records.json".split()
    monkeypatch.setattr("sys.argv", [*words, "--help"])
    with pytest.raises(SystemExit):
        recover.parse()
    text = " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.argv", words)
    a, named = recover.parse(), re.findall(r"--([a-z-]+) [A-Z]+ [^()]*\(default: ([\d.]+|\./\S+)\)", text)
    named = {flag.replace("-", "_"): default.replace("./CKPT", "there") for flag, default in named}
    assert named == {flag: str(getattr(a, flag)) for flag in named}
    assert {*named} == {"held_out", "epochs", "batch_size", "micro_batch", "lr", "seed", "save_every", "out"}
    assert "--seq-len T of each (default: 256, or the model's maximum)" in text and a.seq_len is None


def weights(folder):
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


# ------------------------------------------------------------------------------------------------ records to tokens

def test_both_templates_and_the_end_and_what_is_predicted():
    tokenizer = load_tokenizer(TINY)
    for record, parts in (
            (RECORDS[0], ["### Instruction:\nSay 0.", "### Input:\nto me {now}", "### Response:\n0 is said."]),
            (RECORDS[1], ["### Instruction:\nSay very 1.", "### Response:\n1 is said."])):
        tokens, labels = recover.tokenize(record, tokenizer, 500)
        text = tokenizer.decode(tokens.tolist())
        assert text.startswith("Below is an instruction") and text.endswith("\n\n".join(parts))
        assert ("paired with an input" in text) == ("### Input" in text) == bool(record["input"])
        assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.ends[0] and torch.equal(tokens, labels)
        _, labels = recover.tokenize(record, tokenizer, 500, response_only=True)
        assert tokenizer.decode(labels[labels != -100].tolist()).strip() == record["output"]
        assert torch.equal(recover.tokenize(record, tokenizer, 20)[0], tokens[:20])


def test_an_epoch_takes_every_record_once_and_like_lengths_together():
    lengths = torch.randint(10, 200, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(1)
    first, second = recover.order(lengths, 8, generator), recover.order(lengths, 8, generator)
    assert first != second and recover.order(lengths, 8, torch.Generator().manual_seed(1)) == first
    for batches in (first, second):
        assert sorted(sum(batches, [])) == list(range(103)) and [len(b) for b in batches].count(8) == 12
        ends = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))  # no batch reaches into another's lengths
        assert batches != sorted(batches, key=lambda b: lengths[b[0]])


# ------------------------------------------------------------------------------------------------ one step

def small_problem(dtype=torch.float64):
    """A random model with factors in its block 2, and five sequences of unlike length."""
    model = random_model(dtype, n_layers=4)
    batch = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
    list(grasp.compress(model, [2], lambda label: iter([batch]), ratio=0.5))
    model.output.weight.mul_(5)  # for a gradient that is long enough to be clipped
    examples = []
    for T in (3, 9, 5, 12, 7):
        tokens = torch.randint(50, (T,), generator=torch.Generator().manual_seed(T))
        labels = tokens.clone()
        labels[:T // 3] = -100
        examples.append((tokens, labels))
    return model, recover.prepare(model), examples


def loss_by_hand(model, examples):
    """Mean over all predicted tokens, each sequence alone: no padding, no micro-batches, no chunks."""
    nll = torch.cat([F.cross_entropy(model(tokens[None])[0, :-1], labels[1:], reduction="none")[labels[1:] != -100]
                     for tokens, labels in examples])
    return nll.mean()


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_step_follows_the_gradient_of_the_mean_loss_per_token(micro_batch):
    """SGD with rate 1 moves each factor by minus its gradient, all together clipped to the norm 1."""
    model, factors, examples = small_problem()
    wanted = torch.autograd.grad(loss_by_hand(model, examples), list(factors.values()))
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    assert norm > 1.2
    before = {name: p.detach().clone() for name, p in factors.items()}
    expected_loss = loss_by_hand(model, examples).item()
    assert recover.mean_loss(model, examples, micro_batch) == pytest.approx(expected_loss, rel=1e-12)
    loss = recover.update(model, factors, torch.optim.SGD(factors.values(), lr=1.0), examples, micro_batch)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for (name, p), g in zip(factors.items(), wanted):
        torch.testing.assert_close(before[name] - p.detach(), g / norm, rtol=1e-5, atol=1e-12)
        assert p.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_products_are_bf16_and_factors_fp32(dtype):
    model, _, examples = small_problem(dtype)
    expected = recover.mean_loss(model.float(), examples, 2)
    factors = recover.prepare(model.to("cuda", dtype))
    before = {name: p.detach().clone() for name, p in factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-3)
    assert recover.update(model, factors, optimizer, examples, 2) == pytest.approx(expected, rel=0.05)
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert all(p.isfinite().all() and not torch.equal(before[name], p) for name, p in factors.items())


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_line():
    rates = [recover.learning_rate(step, 2000, 1.0) for step in range(2000)]
    assert rates[0] == pytest.approx(1 / 101) and rates[49] == pytest.approx(50 / 101) and rates[100] == max(rates) == 1
    assert rates[1050] == pytest.approx(0.5) and rates[-1] == pytest.approx(1 / 1900)
    assert recover.learning_rate(6, 64, 1.0) == 1  # a short run warms up in a tenth of its steps


# ------------------------------------------------------------------------------------------------ the command

def test_only_the_factors_learn_and_the_held_out_loss_falls(run, tmp_path, compressed, capsys):
    before = (compressed / "consolidated.00.pth").read_bytes()
    run("--out", "better", "--epochs", 3, "--lr", 0.003)
    old, new = weights(compressed), weights(tmp_path / "better")
    assert (compressed / "consolidated.00.pth").read_bytes() == before and old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) != name.endswith((".A", ".B")) for name in old)
    report = json.loads((tmp_path / "better/report.json").read_text())
    log = report["recovery"]["log"]
    assert [entry["step"] for entry in log] == [0, 2, 4, 6, 8, 10, 12] and report["redundant"] == [5]
    assert log[-1]["held_out"] < log[0]["held_out"] - 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["better", "records.json"]  # the state has gone
    assert f"held out {log[-1]['held_out']:.4f}" in capsys.readouterr().out

    model, tokenizer = load_checkpoint(tmp_path / "better"), load_tokenizer(TINY)
    held_out = [RECORDS[i] for i in torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()[:8]]
    examples = [recover.tokenize(record, tokenizer, 64) for record in held_out]
    assert loss_by_hand(model, examples).item() == pytest.approx(log[-1]["held_out"], rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_run_ends_bit_identical(stop, run, tmp_path, monkeypatch, capsys):
    run("--out", "straight", "--epochs", 2)
    step, count = recover.update, iter(range(100))

    def interrupted(*args):
        if next(count) == stop:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(recover, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--out", "again", "--epochs", 2)
    assert not (tmp_path / "again").exists()
    assert [p.name for p in tmp_path.glob("again*")] == (["again.state"] if stop > 1 else [])
    run("--out", "again", "--epochs", 2)
    assert ("going on from" in capsys.readouterr().out) == (stop > 1)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [json.loads((tmp_path / out / "report.json").read_text())["recovery"]["log"]
            for out in ("straight", "again")]
    assert logs[0] == logs[1] and not (tmp_path / "again.state").exists()


def test_the_steps_get_their_rates_and_never_a_held_out_record(run, tmp_path, monkeypatch):
    step, seen = recover.update, []

    def watched(model, factors, optimizer, examples, micro_batch):
        seen.append((optimizer.param_groups[0]["lr"], [tuple(labels.tolist()) for _, labels in examples]))
        return step(model, factors, optimizer, examples, micro_batch)

    monkeypatch.setattr(recover, "update", watched)
    run("--out", "x", "--epochs", 4, "--samples", 24, "--response-only", "--micro-batch", 3, "--seq-len", 200)
    assert [rate for rate, _ in seen] == [recover.learning_rate(i, 12, 3e-4) for i in range(12)]
    tokenizer, drawn = load_tokenizer(TINY), torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()
    expected = sorted(tuple(recover.tokenize(RECORDS[i], tokenizer, 200, response_only=True)[1].tolist())
                      for i in drawn[8:8 + 24])
    for epoch in range(4):
        assert sorted(sum((labels for _, labels in seen[3 * epoch:3 * epoch + 3]), [])) == expected


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_the_factors():
    model, factors, examples = small_problem()
    before = {name: p.detach().clone() for name, p in factors.items()}
    model.layers[3].ffn_norm.weight[0] = math.inf
    with pytest.raises(ValueError, match="the gradient is not finite"):
        recover.update(model, factors, torch.optim.SGD(factors.values(), lr=1.0), examples, 2)
    assert all(torch.equal(before[name], p) for name, p in factors.items())


def test_adapters_start_as_nothing_and_end_inside_their_matrices(run, tmp_path):
    model, tokens = load_checkpoint(TINY), torch.arange(40)[None]
    logits = model(tokens)
    factors = recover.prepare(model, lora=3)
    assert torch.equal(model(tokens), logits) and len(factors) == 8 * 7 * 2
    W = model.layers[1].attention.wq.W
    for p in factors.values():
        torch.nn.init.normal_(p, std=0.05)
    logits = model(tokens)
    A, B = factors["layers.1.attention.wq.A"].detach(), factors["layers.1.attention.wq.B"].detach()
    recover.finish(model, torch.float32)
    torch.testing.assert_close(model.layers[1].attention.wq.weight, W + 2 * A @ B)
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
    run("--out", "wide", "--lora", 2, "--dtype", "float64", ckpt=TINY)
    run("--out", "adapted", "--lora", 2, ckpt=TINY)
    old, new = weights(TINY), weights(tmp_path / "adapted")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], t) == ("layers" not in name or "norm" in name) for name, t in old.items())


def test_half_precision_weights_have_fp32_factors_while_they_learn(run, tmp_path, compressed):
    model = load_checkpoint(compressed, torch.bfloat16)
    factors = recover.prepare(model)
    assert {p.dtype for p in factors.values()} == {torch.float32} and model.dtype == torch.bfloat16
    run("--out", "half", "--dtype", "bfloat16")
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.bfloat16}
    log = json.loads((tmp_path / "half/report.json").read_text())["recovery"]["log"]
    run("--out", "full")
    full = json.loads((tmp_path / "full/report.json").read_text())["recovery"]["log"]
    assert log[-1]["held_out"] == pytest.approx(full[-1]["held_out"], abs=0.02) and math.isfinite(log[-1]["loss"])


@pytest.mark.parametrize("words, content, message", [
    ("", "[1, 2", "not JSON"),
    ("", "{}", "record 0: expected a list of records"),
    ("", '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 1: expected a list of records"),
    ("", '[{"instruction": "a", "output": "b"}]', "1 records, too few to hold out 8"),
    ("--lora 2", None, "--lora is for dense matrices"),
    ("--seq-len 300", None, "--seq-len 300: expected 2 to 256"),
    ("--seq-len 2 --response-only", None, "nothing to predict within the first 2 tokens"),
    ("--lr 0", None, "--lr 0.0"),
    ("--lr nan", None, "--lr nan"),
    ("--seed -1", None, "argument --seed"),
    ("--data nowhere.json", None, "--data nowhere.json: no such file"),
    ("--out records.json", None, "records.json: exists")])
def test_mistakes_are_one_line(words, content, message, run, tmp_path, monkeypatch, capsys):
    if content:
        (tmp_path / "records.json").write_text(content)
    assert message in error_of(lambda: run(*words.split()), "", monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


def test_a_state_of_other_weights_is_refused(run, tmp_path, compressed, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(recover, "save_checkpoint", interrupted)  # after the last state
    with pytest.raises(KeyboardInterrupt):
        run("--out", "x")
    model = load_checkpoint(compressed, torch.float32)
    model.layers[5].feed_forward.w1.A.data *= 1 + 1e-6  # the folder made again, a little different
    save_checkpoint(model, tmp_path / "again", {}, load_tokenizer(TINY).files)
    with pytest.raises(ValueError, match="x.state: begun with other settings \\(weights_sha256"):
        run("--out", "x", ckpt=tmp_path / "again")
    monkeypatch.undo()


def test_a_dense_folder_and_a_strange_state_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no low-rank matrices to train"):
        run(ckpt=TINY)
    (tmp_path / "x.state").write_bytes(b"no state")
    with pytest.raises(ValueError, match="x.state: not a state of this command"):
        run("--out", "x")
    torch.save({"settings": {"lr": 1}}, tmp_path / "x.state")
    with pytest.raises(ValueError, match="begun with other settings"):
        run("--out", "x")
