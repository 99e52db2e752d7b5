"""The lesson: attention is cut by what its inputs weigh, the MLP by its least important channels, and every block sees
what the blocks before it have become."""
import json
from copy import deepcopy

import pytest
import torch
from torch import nn

import grasp
from tests.conftest import error_of, output_of, random_model, random_tokens
from data.tokenizer import load_tokenizer
from extras.recover import LoRALinear
from extras.baselines import block_params
from extras.baselines.lorap import (SCRIPT, affine_moments, allot, basis, lorap, main, multiply_out, prune_channels,
                                 redecompose, squares)
from data.checkpoint import load_checkpoint, save_checkpoint
from model import MATRICES, FeedForward, LowRankLinear
from runtime.cli import TINY

QKVO = MATRICES[:4]
WIDE = dict(dim=48, n_heads=6, n_kv_heads=2, head_dim=8, hidden_dim=120)  # grouped queries


def compressed(budget, tokens=None, model=None, **options):
    model = random_model(**WIDE) if model is None else model
    tokens = random_tokens(model, 4, 12) if tokens is None else tokens
    return lorap(model, lambda label: tokens.split(2), budget, **options)


# ------------------------------------------------------------------------------------------------ ranks and budget

@pytest.mark.parametrize("rho, vo, qk", [(0.5, 24, 8),        # K = 16: 2 * 3 * 16 / 4 and 2 * 16 / 4
                                         (0.25, 12, 4),
                                         (0.75, None, 16),    # 36 is over d/2 = 32: dense, and 0.75 * 64 - 32
                                         (1.0, None, None)])
def test_ranks_of_square_matrices_are_the_papers(rho, vo, qk):
    block = random_model(dim=64, n_heads=4, n_kv_heads=4, head_dim=16).layers[0]
    wanted = {name: k for name, k in zip(QKVO, (qk, qk, vo, vo)) if k}
    assert allot(block, rho, "attention", "prune") == (wanted, 0)
    held = sum(2 * 64 * wanted[name] if name in wanted else 64 * 64 for name in QKVO)
    assert held == rho * 4 * 64 * 64


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_grouped_queries_keep_the_same_share_and_allocation(rho):
    block = random_model(dim=576, n_heads=9, n_kv_heads=3, head_dim=64, n_layers=1).layers[0]
    ranks, _ = allot(block, rho, "attention", "prune")
    shapes = {name: block.get_submodule(name).weight.shape for name in QKVO}
    q, k, v, o = (ranks[name] * sum(shapes[name]) if name in ranks else shapes[name].numel() for name in QKVO)
    assert q + k + v + o == pytest.approx(rho * sum(shape.numel() for shape in shapes.values()), rel=0.01)
    if rho < 2 / 3:
        assert (v + o) / (q + k) == pytest.approx(3, rel=0.02)
    else:
        assert v + o == shapes[QKVO[2]].numel() + shapes[QKVO[3]].numel()


@pytest.mark.parametrize("budget, options", [
    (123_456, {}), (101_234, {"sublayer": "attention"}), (210_987, {"sublayer": "mlp"}),
    (300_000, {"mlp": "decompose"}), (210_987, {"sublayer": "mlp", "mlp": "decompose", "decomposition": "afm"})])
def test_the_budget_is_met_and_only_what_was_asked_for_is_touched(budget, options):
    sizes = dict(dim=96, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=240, n_layers=6)
    dense, tokens = random_model(**sizes), random_tokens(random_model(), 2, 12)
    model = compressed(budget, model=random_model(**sizes), **options)
    assert budget <= dense.n_params - model.n_params <= 1.005 * budget
    assert model(tokens).isfinite().all()
    changed = {name.split(".")[2] for name, p in dense.named_parameters()
               if name.startswith("layers") and not torch.equal(p, dict(model.named_parameters()).get(name, p[:0]))}
    assert changed == {"attention": {"attention"}, "mlp": {"feed_forward"}}.get(options.get("sublayer"),
                                                                               {"attention", "feed_forward"})


def test_of_a_budget_no_more_than_one_blocks_step_is_too_much():
    for budget in range(1000, 60_000, 2345):  # a block's largest step: a channel and a rank of each matrix
        before = random_model(**WIDE).n_params
        assert 0 <= before - compressed(budget).n_params - budget < 3 * 48 + 2 * (48 + 48) + 2 * (48 + 16)


def test_a_budget_of_nothing_changes_nothing_and_one_too_large_is_refused():
    dense, tokens = random_model(**WIDE), random_tokens(random_model(**WIDE), 2, 12)
    assert torch.equal(compressed(0)(tokens), dense(tokens))
    with pytest.raises(ValueError, match=f"cannot remove {4 * block_params(dense):,} parameters: LoRAP removes"):
        compressed(4 * block_params(dense))


@pytest.mark.parametrize("decomposition", ["awsvd", "afm"])
def test_half_precision_stays_and_is_computed_wide(decomposition):
    model = compressed(23_456, model=random_model(torch.bfloat16, **WIDE), decomposition=decomposition)
    wide = compressed(23_456, model=random_model(torch.bfloat16, **WIDE).float(), decomposition=decomposition)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.n_params == wide.n_params
    m, w = (x.layers[0].attention.wq for x in (model, wide))  # block 0 sees all but the same states
    assert (m.A.float() @ m.B.float() - w.A @ w.B).norm() < 0.1 * (w.A @ w.B).norm()


# ------------------------------------------------------------------------------------------------ three decompositions

def problem(m=10, n=14, tokens=200):
    """A matrix W (m, n) and inputs X (tokens, n), correlated, of unlike size and not centred, all from one seed."""
    g = torch.Generator().manual_seed(3)
    W, mix, mean = (torch.randn(*shape, generator=g).double() for shape in ((m, n), (n, n), (n,)))
    return W, torch.randn(tokens, n, generator=g).double() @ mix * torch.arange(1, n + 1) / 4 + mean


def product(U, W, k):
    return U[:, :k] @ (U[:, :k].mT @ W)


def awsvd_by_hand(W, X, k):
    """U_k S_k Vh_k D^-1 of W D, with d = 1e-4 where an input is always zero, as the paper's code has it."""
    d = X.norm(dim=0)
    d[d == 0] = 1e-4
    U, S, Vh = torch.linalg.svd(W @ torch.diag(d), full_matrices=False)
    return U[:, :k] @ torch.diag(S[:k]) @ Vh[:k] @ torch.linalg.inv(torch.diag(d))


def test_awsvd_is_the_papers_product_and_the_best_under_its_weights():
    W, X = problem()
    AB = product(basis(W, squares(X), "awsvd"), W, 4)
    torch.testing.assert_close(AB, awsvd_by_hand(W, X, 4))
    d = X.norm(dim=0)
    dropped = torch.linalg.svdvals(W * d)[4:].square().sum()  # [Eckart and Young]
    assert ((W - AB) * d).square().sum().item() == pytest.approx(dropped.item())


def test_awsvd_of_equal_inputs_is_plain_svd():
    W, _ = problem()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = U[:, :4] * S[:4] @ Vh[:4]
    torch.testing.assert_close(product(basis(W, torch.ones(14), "awsvd"), W, 4), plain)
    torch.testing.assert_close(product(basis(W, None, "svd"), W, 4), plain)


def test_an_input_that_is_always_zero_needs_no_small_number():
    W, X = problem()
    X[:, 5] = 0
    torch.testing.assert_close(product(basis(W, squares(X), "awsvd"), W, 4), awsvd_by_hand(W, X, 4),
                               rtol=1e-6, atol=1e-6)


def test_afm_is_the_pca_of_the_outputs():
    W, X = problem()
    Y, k = X @ W.mT, 3
    centred = Y - Y.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)  # PCA without a covariance
    sums = affine_moments(X[:70]) + affine_moments(X[70:])
    AB = product(basis(W, sums, "afm"), W, k)
    torch.testing.assert_close(AB, Vh[:k].mT @ Vh[:k] @ W)
    assert (centred - (X - X.mean(0)) @ AB.mT).square().sum().item() == pytest.approx(S[k:].square().sum().item())
    assert not torch.allclose(AB, product(basis(W, squares(X), "awsvd"), W, k), rtol=0.1)


# ------------------------------------------------------------------------------------------------ channels

def scores_by_hand(ff, X1, X2):
    """One channel after the other, one weight after the other: the importance that `prune_channels` sorts by."""
    d, d2 = X1.square().sum(0).sqrt(), X2.square().sum(0).sqrt()
    def norm(weights, inputs):
        return sum((w.abs() * x) ** 2 for w, x in zip(weights, inputs)) ** 0.5
    return torch.stack([norm(ff.w3.weight[c], d) + norm(ff.w1.weight[c], d) + norm(ff.w2.weight[:, c], [d2[c]] * len(d))
                        for c in range(len(d2))])


def test_the_least_important_percent_stays_and_the_next_channels_go():
    args, g = random_model(dim=6, hidden_dim=210).args, torch.Generator().manual_seed(4)
    ff = FeedForward(args).double().requires_grad_(False)
    X1, X2 = torch.randn(30, 6, generator=g).double(), torch.randn(30, 210, generator=g).double()
    order, dense = scores_by_hand(ff, X1, X2).argsort(), deepcopy(ff)
    prune_channels(ff, 5, squares(X1), squares(X2))
    kept = sorted(set(range(210)) - set(order[2:7].tolist()))  # 1 % of 210 is 2
    assert torch.equal(ff.w1.weight, dense.w1.weight[kept]) and torch.equal(ff.w3.weight, dense.w3.weight[kept])
    assert torch.equal(ff.w2.weight, dense.w2.weight[:, kept])
    assert (ff.w1.out_features, ff.w3.out_features, ff.w2.in_features) == (205, 205, 205)


def test_dead_channels_go_first_where_one_percent_is_none():
    """silu(0) w3 x = 0: a channel without a gate adds nothing, so a budget of one channel a block costs nothing."""
    model, tokens = random_model(**{**WIDE, "hidden_dim": 90}), random_tokens(random_model(**WIDE), 4, 12)
    for layer, block in enumerate(model.layers):
        block.feed_forward.w1.weight[7 * layer] = 0
    dense = deepcopy(model)
    compressed(4 * 3 * 48, tokens, model, sublayer="mlp")
    assert [block.feed_forward.w1.out_features for block in model.layers] == [89] * 4
    assert all(block.feed_forward.w1.weight.any(1).all() for block in model.layers)
    torch.testing.assert_close(model(tokens), dense(tokens))


# ------------------------------------------------------------------------------------------------ block after block

def inputs(model, tokens, layer):
    """{matrix: X (tokens, n)} that this layer's matrices are given, by hooks of our own."""
    X, hooks = {}, []
    for name in MATRICES:
        module = model.layers[layer].get_submodule(name)
        hooks.append(module.register_forward_pre_hook(
            lambda module, given, name=name: X.update({name: given[0].flatten(0, 1)})))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return X


def check_low_rank(half, dense, model, X, naive):
    """This half of block 1 has the factors of its dense matrices for the inputs X, and not for the naive ones."""
    for name in (name for name in MATRICES if name.startswith(half)):
        W, m = dense.layers[1].get_submodule(name).weight, model.layers[1].get_submodule(name)
        torch.testing.assert_close(m.A @ m.B, awsvd_by_hand(W, X[name], len(m.B)))
        assert not torch.allclose(m.A @ m.B, awsvd_by_hand(W, naive[name], len(m.B)), rtol=1e-3)


def check_pruned(ff, pruned, X, naive):
    count = 120 - pruned.w1.out_features
    gone, other = (set(scores_by_hand(ff, x["feed_forward.w1"], x["feed_forward.w2"]).argsort()[1:1 + count].tolist())
                   for x in (X, naive))  # 1 % of 120 is 1
    assert torch.equal(pruned.w1.weight, ff.w1.weight[sorted(set(range(120)) - gone)]) and gone != other


@pytest.mark.parametrize("mlp", ["prune", "decompose"])
def test_every_half_is_measured_behind_what_is_compressed_already(mlp):
    """Block 1 by brute force: its attention behind the compressed block 0, its MLP behind its compressed attention."""
    dense = random_model(**WIDE, n_layers=2)
    tokens = random_tokens(dense, 4, 12)
    model, mixed = compressed(20_000, tokens, deepcopy(dense), mlp=mlp), deepcopy(dense)
    mixed.layers[0] = model.layers[0]
    naive = inputs(dense, tokens, 1)
    check_low_rank("attention", dense, model, inputs(mixed, tokens, 1), naive)
    naive, mixed.layers[1].attention = inputs(mixed, tokens, 1), model.layers[1].attention
    if mlp == "decompose":
        check_low_rank("feed_forward", dense, model, inputs(mixed, tokens, 1), naive)
    else:
        check_pruned(dense.layers[1].feed_forward, model.layers[1].feed_forward, inputs(mixed, tokens, 1), naive)


# ------------------------------------------------------------------------------------------------ after training

def test_decomposed_again_with_the_adapters_ranks_nothing_is_lost():
    model, tokens = compressed(40_000), random_tokens(random_model(**WIDE), 2, 12)
    logits, n_params, g = model(tokens), model.n_params, torch.Generator().manual_seed(5)
    ranks = multiply_out(model)
    assert not any(isinstance(m, LowRankLinear) for m in model.modules()) and len(ranks) == 4 * 4
    torch.testing.assert_close(model(tokens), logits)
    for name in ranks:
        adapter = LoRALinear(model.get_submodule(name).weight, 2, g)
        adapter.A.data.normal_(generator=g)
        model.set_submodule(name, adapter.merged())
    trained = model(tokens)
    assert not torch.allclose(trained, logits, rtol=0.01)
    redecompose(model, ranks, 2)
    torch.testing.assert_close(model(tokens), trained)
    assert model.n_params - n_params == 4 * 2 * (2 * (48 + 48) + 2 * (48 + 16))
    multiply_out(model)
    redecompose(model, ranks)
    assert model.n_params == n_params and not torch.allclose(model(tokens), trained)


def test_what_factors_would_not_make_smaller_stays_dense():
    model = random_model()
    redecompose(model, {"layers.0.attention.wq": 6, "layers.0.attention.wo": 6}, 2)  # 16 x 16: 8 * 32 = 256
    assert isinstance(model.layers[0].attention.wq, nn.Linear)
    redecompose(model, {"layers.0.attention.wq": 6}, 1)
    assert model.layers[0].attention.wq.A.shape == (16, 7)


# ------------------------------------------------------------------------------------------------ the command

QUICK = ["--samples", "4", "--seq-len", "64", "--windows", "2", "--ratio", "0.6"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """main with these words in an empty folder: {first cell: the row's other cells} of its table."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        lines = [line for line in output_of(main, [*QUICK, *words], capsys).splitlines() if line.startswith("| ")][2:]
        return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    return run


def records(tmp_path, count):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{"instruction": f"Say {i}.", "output": f"{i} is said."} for i in range(count)]))
    return str(file)


def test_the_command_compresses_trains_and_decomposes_again(run, tmp_path, monkeypatch):
    monkeypatch.setitem(SCRIPT, "held_out", 8)
    monkeypatch.setitem(SCRIPT, "lr", 1e-3)
    rows = run("--recover", records(tmp_path, 40), "--lora", "4")
    assert list(rows) == ["dense", "LoRAP", "recovered, multiplied out", "re-decomposed, rank + 4", "re-decomposed"]
    parameters = [int(cells[0].replace(",", "")) for cells in rows.values()]
    assert 0.598 < parameters[1] / parameters[0] <= 0.6 and parameters[4] == parameters[1]
    assert parameters[1] < parameters[3] < parameters[2] < parameters[0]
    dense, small, recovered, exact, again = (float(cells[2]) for cells in rows.values())
    assert dense < small < 3 * dense and exact == pytest.approx(recovered, rel=1e-3)
    assert recovered != small and again == pytest.approx(recovered, rel=0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


@pytest.mark.parametrize("words", ["--sublayer attention --decomposition svd", "--mlp decompose --decomposition afm"])
def test_the_commands_options_reach_the_method(words, run):
    rows, model = run("--ratio", "0.9", *words.split()), load_checkpoint(TINY)
    names = words.split()
    options = dict(zip([name[2:] for name in names[::2]], names[1::2]))
    compressed(int(0.1 * model.n_params) + 1, model=model, tokens=torch.arange(64).view(2, 32), **options)
    assert list(rows) == ["dense", "LoRAP"] and rows["LoRAP"][0] == f"{model.n_params:,}"


@pytest.mark.parametrize("words, message", [
    ("--ratio 0.01", "cannot remove"),
    ("--ratio 0", "argument --ratio"),
    ("--sublayer heads", "invalid choice: 'heads'"),
    ("--recover nowhere.json", "nowhere.json"),
    ("--recover records.json", "100 records, too few to hold out 128"),
    ("--records 5", "--lora, --records: are for --recover FILE"),
    ("--ckpt small", "is compressed already, expected a dense folder")])
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records(tmp_path, 100)
    model = load_checkpoint(TINY)
    list(grasp.compress(model, [5], lambda label: [], ratio=0.2, score="magnitude"))
    save_checkpoint(model, tmp_path / "small", tokenizer=load_tokenizer(TINY).files)
    assert message in error_of(main, " ".join(QUICK) + " " + words, monkeypatch, capsys)
