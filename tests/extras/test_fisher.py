"""The lesson: two moments of a matrix price all its components in one unit, and the cheapest of the whole model go."""
import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F

import evaluate
from attribution import sigma_gradients
from tests.conftest import error_of, output_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from extras.baselines import damped as damped_by, keep_channels
from extras.baselines.decomposition import plain_svd, svd_llm
from extras.export.dense import dense_weight
from extras import fisher
from extras.fisher import compress, moments, prices
from extras.fisher.__main__ import main
from extras.fisher.prices import channel_costs, components
from extras.fisher.moments import second_moments
from extras.fisher.ranking import component_size, global_ranks
from model import Transformer, matrix_names
from runtime import cli


def moment(n, seed, samples=None):
    X = torch.randn(samples or 3 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X.mT @ X / len(X)


def weight(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cost_of(D, C, H):
    return torch.trace(H @ D @ C @ D.mT).item()


def damped(moment):
    return damped_by(moment, prices.DAMPING)


@pytest.fixture
def undamped(monkeypatch):
    for module in (fisher, prices):
        monkeypatch.setattr(module, "DAMPING", 0.0)


def second_best(logits):
    """Instead of a draw, so that a test knows which label it is."""
    return logits.argsort()[:, -2]


def backward_of_second_best(model, tokens):
    logits = model(tokens).flatten(0, 1)
    F.cross_entropy(logits, second_best(logits), reduction="sum").backward()


# ------------------------------------------------------------------------------------------------ moments

def test_moments_are_those_of_inputs_and_output_gradients(monkeypatch):
    """Against autograd: a zero added to every output, whose gradient is d, and all inputs stacked."""
    monkeypatch.setattr(moments, "draw", second_best)
    monkeypatch.setattr(Transformer, "head_chunk", 4)  # positions whose logits exist at once
    model, names = random_model(), matrix_names(1, 2)
    batches = [random_tokens(model, 2, 7), random_tokens(model, 1, 5, seed=3)]
    found = second_moments(model, names, batches)
    X, D = {name: [] for name in names}, {name: [] for name in names}
    for name in names:
        def add_zero(module, args, y, name=name):
            zero = torch.zeros_like(y).requires_grad_()
            X[name].append(args[0].detach().flatten(0, 1)), D[name].append(zero)
            return y + zero
        model.get_submodule(name).register_forward_hook(add_zero)
    for tokens in batches:
        backward_of_second_best(model, tokens)
    for name in names:
        x, d = torch.cat(X[name]), torch.cat([zero.grad.flatten(0, 1) for zero in D[name]])
        assert len(x) == len(d) == 19  # every token, the last of a sequence too
        assert torch.allclose(found[name][0], x.mT @ x / 19) and torch.allclose(found[name][1], d.mT @ d / 19)
    assert found["layers.1.attention.wq"][0] is found["layers.1.attention.wv"][0]  # one input, one moment


def test_gates_are_exact_where_the_moments_are_an_estimate(monkeypatch):
    """Against autograd: the gradient at a gate of ones on each channel, one for every token. And independent inputs
    and gradients are priced as without them."""
    monkeypatch.setattr(moments, "draw", second_best)
    model, name, found = random_model(), "layers.2.feed_forward.w2", []
    batches = [random_tokens(model, 2, 7), random_tokens(model, 1, 5, seed=3)]
    C, H, gates = second_moments(model, [name], batches, channels=True)[name]

    def gate(module, args):
        found.append(torch.ones_like(args[0]).requires_grad_())
        return args[0] * found[-1]
    model.get_submodule(name).register_forward_pre_hook(gate)
    for tokens in batches:
        backward_of_second_best(model, tokens)
    assert torch.allclose(gates, torch.cat([g.grad.flatten(0, 1) for g in found]).square().mean(0))
    W = model.get_submodule(name).weight
    estimate = C.diagonal() * (W * (damped(H) @ W)).sum(0)
    assert not torch.allclose(gates, estimate, rtol=0.2)
    assert torch.allclose(channel_costs(W, C, H, estimate), channel_costs(W, C, H))
    assert torch.allclose(channel_costs(W, C, H, gates), channel_costs(W, C, H) * gates / estimate)


def test_labels_are_drawn_as_the_model_predicts():
    logits = weight(1, 6).log_softmax(-1)
    torch.manual_seed(0)
    draws = moments.draw(logits.expand(20_000, -1))
    assert torch.allclose(draws.bincount(minlength=6) / 20_000, logits[0].exp().float(), atol=0.01)


def test_the_moment_of_the_gradients_is_the_fisher_information():
    """On average over draws H is sum_t J_t^T (diag(p_t) - p_t p_t^T) J_t, J_t the Jacobian of position t's logits."""
    model, name, T = random_model(), "layers.2.attention.wv", 4
    tokens = random_tokens(model, 1, T)

    def logits(shift):
        hook = model.get_submodule(name).register_forward_hook(lambda module, args, y: y + shift)
        try:
            return model(tokens)[0]
        finally:
            hook.remove()

    zero = torch.zeros(T, 8, dtype=torch.float64)  # added to wv's outputs
    J, exact = torch.autograd.functional.jacobian(logits, zero), 0  # (T, vocab, T, 8)
    for p, at in zip(logits(zero).softmax(-1), J):
        exact = exact + torch.einsum("vsi,vw,wsj->ij", at, p.diag() - torch.outer(p, p), at) / T
    torch.manual_seed(0)
    _, H = second_moments(model, [name], tokens.expand(20_000, T).split(4000))[name]
    assert torch.allclose(H, exact, atol=0.03 * exact.diagonal().max().item())


def test_without_output_gradients_no_loss_is_taken(monkeypatch):
    model = random_model()
    tokens = random_tokens(model, 2, 7)
    both = second_moments(model, matrix_names(1), [tokens])
    monkeypatch.setattr(moments, "backward_of_draws", None)
    for name, (C, H) in second_moments(model, matrix_names(1), [tokens], "whitened").items():
        assert torch.allclose(C, both[name][0]) and H is None


def test_no_hook_or_gradient_is_left_even_after_an_error():
    model = random_model()

    def broken():
        yield random_tokens(model, 1, 5)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        second_moments(model, matrix_names(1), broken())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_moments_that_overflow_are_refused(monkeypatch):
    model = random_model(torch.float32)
    model.layers[1].feed_forward.w3.weight.data *= 1e25
    for basis in ("whitened", "kfac"):  # kfac: there are no labels to draw from logits that are NaN
        with pytest.raises(ValueError, match="layers.1.feed_forward.w2 is not finite"):
            second_moments(model, matrix_names(1), [random_tokens(model, 1, 5)], basis)
    monkeypatch.setattr(moments, "draw", second_best)  # a label of probability 0
    model = random_model(torch.float32)
    model.output.weight.data *= 1e25
    with pytest.raises(ValueError, match="layers.1.attention.w. is not finite"):
        second_moments(model, matrix_names(1), [random_tokens(model, 1, 5)])


# ------------------------------------------------------------------------------------------------ components

@pytest.mark.parametrize("m, n", [(5, 8), (8, 5)])
@pytest.mark.parametrize("basis", ["plain", "whitened", "kfac"])
def test_components_sum_up_to_the_matrix_and_the_dropped_ones_to_the_cost(m, n, basis):
    W, C, H = weight(m, n), moment(n, 1), moment(m, 2)
    given = {"plain": (), "whitened": (C,), "kfac": (C, H)}[basis]
    U, S, Vh = components(W, *given)
    assert torch.allclose(U * S @ Vh, W)
    metric_C = damped_by(C, 0.1) if "plain" != basis else torch.eye(n, dtype=torch.float64)
    metric_H = damped_by(H, 0.1) if basis == "kfac" else torch.eye(m, dtype=torch.float64)
    for k in range(1, 5):
        D = U[:, k:] * S[k:] @ Vh[k:]
        assert cost_of(D, metric_C, metric_H) == pytest.approx(S[k:].square().sum().item())


def test_no_other_matrix_of_that_rank_costs_less(undamped):
    """Eckart and Young in the basis: local search from the best known methods does not get below it."""
    W, C, H, k = weight(6, 7), moment(7, 1), moment(6, 2), 2
    _, S, _ = components(W, C, H)
    best = S[k:].square().sum().item()
    for start in ((), (C,), None):
        if start is None:
            A, B = weight(6, k, 5), weight(k, 7, 6)
        else:
            U, s, Vh = components(W, *start)
            A, B = U[:, :k] * s[:k], Vh[:k]
            assert cost_of(W - A @ B, C, H) > best * 1.001  # the plain and the whitened SVD are not yet the best
        for _ in range(2000):  # alternating least squares in the metric: each half has a closed form
            A = torch.linalg.solve(B @ C @ B.mT, B @ C @ W.mT).mT
            B = torch.linalg.solve(A.mT @ H @ A, A.mT @ H @ W)
        assert cost_of(W - A @ B, C, H) == pytest.approx(best, rel=1e-6)


def test_sigma_gradients_hold_in_any_basis():
    """dL/d sigma_k = u_k^T G v_k, against autograd through W = U diag(S) Vh."""
    U, S, Vh = components(weight(5, 6), moment(6, 1), moment(5, 2))
    S, target = S.requires_grad_(), weight(5, 6, 9)
    W = (U * S @ Vh).detach().requires_grad_()
    loss = ((U * S @ Vh) * target).sin().sum()
    loss.backward()
    (W * target).sin().sum().backward()
    assert torch.allclose(sigma_gradients(U, W.grad, Vh), S.grad)


# ------------------------------------------------------------------------------------------------ channels

def least_squares_cost(W, C, H, gone):
    """What is left of W's output when only the other channels are there, chosen by least squares."""
    stay = [c for c in range(len(C)) if c not in gone]
    D = W.clone()
    D[:, stay] -= torch.linalg.solve(C[stay][:, stay], C[stay] @ W.mT).mT
    return cost_of(D, C, H)


def test_channels_cost_what_least_squares_cannot_make_good_for(undamped):
    """One at a time: each is the cheapest of those left, and their sum is the cost of all that are gone."""
    W, C, H = weight(4, 7), moment(7, 1), moment(4, 2)
    costs = channel_costs(W, C, H, rounds=7)
    order = costs.argsort().tolist()
    alone = [least_squares_cost(W, C, H, [c]) for c in range(7)]
    assert order[0] == min(range(7), key=alone.__getitem__) and costs.min().item() == pytest.approx(min(alone))
    second = {c: least_squares_cost(W, C, H, [order[0], c]) for c in order[1:]}
    assert order[1] == min(second, key=second.get)
    raised = costs.sort().values.diff().eq(0).nonzero()[:, 0].tolist() + [6]  # to the level of the one before it
    assert raised[0] >= 3
    for k in range(1, 7):
        exact = least_squares_cost(W, C, H, order[:k])
        assert costs[order[:k]].sum().item() == pytest.approx(exact) if k <= raised[0] + 1 else (
            costs[order[:k]].sum() > exact)


def test_channels_in_rounds_of_several():
    W, C, H = weight(4, 20), moment(20, 1), moment(4, 2)
    costs = channel_costs(W, C, H, rounds=5)
    order = costs.argsort(stable=True)
    k = 4  # after a whole round the sum is exact
    exact = least_squares_cost(W, damped(C), damped(H), order[:k].tolist())
    assert costs[order[:k]].sum().item() == pytest.approx(exact, rel=1e-6)
    assert costs[order[:12]].sum() >= least_squares_cost(W, damped(C), damped(H), order[:12].tolist())


def test_a_channel_that_others_repeat_costs_nothing(undamped):
    """Channel 2 is always channel 0 plus channel 1: w2 can take it over, and does, and the logits stay."""
    model = random_model()
    ff = model.layers[1].feed_forward
    X = weight(40, 24)
    X[:, 2] = X[:, 0] + X[:, 1]
    C = X.mT @ X / 40 + 1e-12 * torch.eye(24, dtype=torch.float64)
    costs = channel_costs(ff.w2.weight, C, torch.eye(16, dtype=torch.float64), rounds=24)
    assert int(costs.argmin()) in (0, 1, 2) and costs.min() < 1e-6 < costs.sort().values[1]
    kept, y = torch.tensor([c for c in range(24) if c != 2]), X @ ff.w2.weight.mT
    keep_channels(model, "layers.1.feed_forward", kept, C, 0)
    assert torch.allclose(X[:, kept] @ ff.w2.weight.mT, y, atol=1e-4)
    assert ff.w1.weight.shape == ff.w3.weight.shape == (23, 16) and ff.w2.weight.shape == (16, 23)


def test_all_channels_kept_is_no_change():
    model = random_model()
    tokens = random_tokens(model, 2, 9)
    logits = model(tokens)
    keep_channels(model, "layers.2.feed_forward", torch.arange(24), moment(24, 1), 0.01)
    assert torch.allclose(model(tokens), logits)


# ------------------------------------------------------------------------------------------------ allocation

def test_one_ranking_is_the_best_allocation():
    """Against all allocations: none removes as much at less cost. Two matrices and an MLP, whose channels remove from
    the first on; budgets at which the ranking need not pass over an entry that is too large."""
    sizes = {"a": (5, 6), "b": (4, 10), "c": (3, 12)}
    costs = {"a": weight(3, 1, 1).abs()[:, 0], "b": weight(4, 1, 2).square()[:, 0], "c": weight(4, 1, 3).abs()[:, 0]}

    def tell(ranks):
        """(parameters removed, cost)"""
        return (sum(sizes[n][1] - k * sizes[n][0] for n, k in ranks.items() if k),
                sum(costs[n].sort(descending=True).values[k:].sum().item() for n, k in ranks.items() if k))

    every = [tell(dict(zip(sizes, ks))) for ks in itertools.product(*([None, *range(1, len(costs[n]) + 1)]
                                                                       for n in sizes))]
    for budget in range(1, 17):
        removed, cost = tell(global_ranks(costs, sizes, budget))
        assert removed >= budget
        assert cost == pytest.approx(min(c for r, c in every if r >= removed))


def test_a_budget_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="cannot remove 16 parameters: 15 at most"):
        global_ranks({"a": torch.ones(3), "b": torch.ones(3)}, {"a": (5, 11), "b": (1, 10)}, 16)


def test_an_entry_far_beyond_the_budget_is_passed_over():
    """Matrix a is the cheapest per parameter but can only lose 90 or more; 10 are asked for, and c gives them."""
    costs = {"a": torch.tensor([9.0, 1e-9, 1e-9]), "c": torch.ones(30)}
    assert global_ranks(costs, {"a": (10, 100), "c": (1, 30)}, 10) == {"a": None, "c": 20}


def test_but_entered_as_far_as_it_must_be():
    """Without c, a gives 10 by its rank 9, and 11 by its rank 8."""
    costs = {"a": torch.arange(10.0)}
    assert global_ranks(costs, {"a": (10, 100)}, 10) == {"a": 9}
    assert global_ranks(costs, {"a": (10, 100)}, 11) == {"a": 8}


# ------------------------------------------------------------------------------------------------ the whole

def sweep_of(model, B=6, T=12):
    tokens = random_tokens(model, B, T)
    return lambda label: [tokens[:2], tokens[2:]]


@pytest.mark.parametrize("settings", [{}, {"channels": False}, {"channels": False, "allocate": "ratio"},
                                      {"channels": False, "basis": "whitened"}, {"layers": [1, 2]},
                                      {"channels": False, "basis": "plain", "score": "taylor"}])
def test_the_budget_is_met(settings):
    model = random_model(dim=48, n_heads=6, n_kv_heads=2, head_dim=8, hidden_dim=96)
    before, budget = model.n_params, 30_000
    kept = compress(model, sweep_of(model), budget, **settings)
    assert 0 <= before - model.n_params - budget <= 0.005 * budget
    assert model.n_params_dense == before
    assert {int(name.split(".")[1]) for name in kept} <= set(settings.get("layers", range(4)))
    assert any(name.endswith("feed_forward") for name in kept) == settings.get("channels", True)


@pytest.mark.parametrize("hidden_dim", [1, 5, 16])
def test_mlps_of_few_channels(hidden_dim):
    """Fewer channels than rounds; as wide as the residual stream, so that no side tells w1 from w2."""
    model = random_model(hidden_dim=hidden_dim)
    tokens, before = random_tokens(model, 2, 9), model.n_params
    compress(model, sweep_of(model), 1200)
    assert before - model.n_params >= 1200 and model(tokens).isfinite().all()
    dense = random_model(hidden_dim=hidden_dim)
    for name, p in dense.named_parameters():
        p.data = dense_weight(model, name).view(p.shape)
    assert torch.allclose(dense(tokens), model(tokens), atol=1e-9)


def test_dead_channels_and_dead_matrices_go_first():
    """Columns of w2 that are zero, and a wv that is: nothing is lost with them, and nothing becomes NaN."""
    model = random_model()
    model.layers[2].feed_forward.w2.weight.data[:, ::8] = 0
    model.layers[1].attention.wv.weight.data.zero_()
    tokens = random_tokens(model, 2, 9)
    logits = model(tokens)
    kept = compress(model, sweep_of(model), 3 * 3 * 16 + 10)
    assert torch.allclose(model(tokens), logits, atol=1e-6) and {*kept} <= {
        "layers.2.feed_forward", "layers.1.attention.wv", "layers.1.attention.wo"}


@pytest.mark.parametrize("settings", [{"basis": "plain"}, {"basis": "whitened"}, {"allocate": "ratio"},
                                      {"score": "taylor"}])
def test_channels_have_a_price_in_one_unit_only(settings):
    with pytest.raises(ValueError, match="MLPs by channels need"):
        compress(random_model(), None, 1000, **settings)


def test_special_cases_are_plain_svd_and_svd_llm(undamped):
    """basis plain or whitened, one ratio: methods that are known under other names."""
    for basis, known in (("plain", plain_svd), ("whitened", svd_llm)):
        models = [random_model(), random_model()]
        tokens = random_tokens(models[0], 8, 12)
        compress(models[0], lambda label: [tokens], 1500, [0, 2], basis, "ratio", channels=False)
        known(models[1], lambda label: [tokens], 1500, [0, 2])
        assert models[0].n_params == models[1].n_params
        assert torch.allclose(models[0](tokens), models[1](tokens), atol=1e-8)


def test_grouped_queries_tied_embeddings_and_half_precision():
    model = random_model(torch.bfloat16, tied=True)
    before = model.n_params
    compress(model, sweep_of(model), 1000)
    assert before - model.n_params >= 1000 and model.output.weight is model.tok_embeddings.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(random_tokens(model, 1, 5)).isfinite().all()


def test_a_written_folder_gives_the_same_logits(tmp_path):
    """Channels stand in params.json as the rank of the feed-forward; export gives the full width back."""
    model = random_model(tied=True)
    compress(model, sweep_of(model), 2500)
    save_checkpoint(model, tmp_path / "small", {"a": 1})
    again, tokens = load_checkpoint(tmp_path / "small"), random_tokens(model, 2, 9)
    assert torch.equal(again(tokens), model(tokens)) and again.n_params == model.n_params
    assert again.n_params_dense == random_model(tied=True).n_params
    ranks = json.loads((tmp_path / "small" / "params.json").read_text())["ranks"]
    narrow = [name for name in ranks if name.endswith("feed_forward")]
    assert narrow and all(0 < ranks[name] < 24 for name in narrow)
    dense = random_model(tied=True)
    for name, p in dense.named_parameters():
        p.data = dense_weight(again, name).data
    assert torch.allclose(dense(tokens), model(tokens), atol=1e-9)
    ranks_file = tmp_path / "small" / "params.json"
    ranks_file.write_text(ranks_file.read_text().replace(f'"{narrow[0]}": {ranks[narrow[0]]}', f'"{narrow[0]}": 25'))
    with pytest.raises(ValueError, match="expected"):
        load_checkpoint(tmp_path / "small")


def test_sizes_of_a_component():
    model = random_model()
    assert component_size(model, "layers.0.attention.wk", True) == (8 + 16, 8 * 16)
    assert component_size(model, "layers.0.feed_forward.w2", True) == (3 * 16, 3 * 16 * 24)
    assert component_size(model, "layers.0.feed_forward.w2", False) == (16 + 24, 16 * 24)


# ------------------------------------------------------------------------------------------------ the command

def test_the_command(nowhere, monkeypatch, capsys):
    """Three tenths of the embedded model's block parameters go, and its perplexity rises by less than a tenth."""
    out = output_of(main, "--budget 0.3 --samples 48 --windows 20", capsys)
    report = json.loads((nowhere / "tiny-fisher" / "report.json").read_text())
    dense, small = (row["perplexity"]["embedded"] for row in report["results"])
    assert small < 1.1 * dense and report["parameters_after"] < 0.74 * report["parameters_before"]
    assert f"{small:.2f}" in out and "channels" in out
    assert "parameters to remove, 30.0 % of the blocks' and 26.7 % of the model's" in out
    assert re.search(r"achieved: [\d,]+ parameters left of 886,368, 26.7 % removed, 30.0 % of the blocks'", out)
    words = "--ckpt tiny-fisher --windows 20 --json a.json".split()  # made on the embedded text, so evaluated on it
    monkeypatch.setattr("sys.argv", ["evaluate", *words])
    cli.command(evaluate.main)
    again = json.loads((nowhere / "a.json").read_text())["perplexity"]["embedded"]
    assert again == pytest.approx(small, rel=1e-6)


@pytest.mark.parametrize("words, message", [
    ("", "--budget"),
    ("--budget 0", "'0', expected more than 0"),
    ("--budget 0.2 --layers 9", "this model has 8 layers"),
    ("--budget 0.2 --layers 2 --layer-ids 3", "not allowed with argument --layers"),
    ("--budget 0.2 --layer-ids 3 3", "expected some of them, each once"),
    ("--budget 0.2 --mlp channels --basis plain", "--mlp channels needs"),
    ("--budget 0.2 --layer-ids 3 --samples 2 --eval none", "cannot remove"),
    ("--budget 1e-9 --samples 2 --eval none", "--budget 1e-09: 0 parameters of the 787,968 in the blocks, expected at least 1"),
    ("--budget 0.2 --out /nowhere/at/all", "/nowhere/at is no folder that can be written to")])
def test_mistakes_are_one_line(words, message, nowhere, monkeypatch, capsys):
    assert message in error_of(main, words, monkeypatch, capsys)
    assert not list(nowhere.iterdir())


def test_a_compressed_folder_is_refused(nowhere, monkeypatch, capsys):
    output_of(main, "--budget 0.1 --samples 4 --eval none --out small", capsys)
    assert "compressed already" in error_of(main, "--ckpt small --budget 0.1", monkeypatch, capsys)
