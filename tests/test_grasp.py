"""The lesson: compress() is its parts in order, and it changes nothing else."""
import math

import pytest
import torch

import grasp
from attribution import (importance, layer_cosines, low_rank_factors, rank_for_ratio, sigma_gradients, svd,
                         top_k, weight_gradients)
from tests.conftest import random_model, random_tokens
from grasp import compress, find_redundant
from model import MATRICES, LowRankLinear, matrix_names


def setup(**changes):
    model = random_model(dim=32, head_dim=8, hidden_dim=56, **changes)
    tokens = random_tokens(model, 4, 12)
    return model, tokens, lambda label: tokens.split(2)


def test_one_shot_is_every_part_in_order():
    """All gradients from the dense model; each matrix replaced by the kept part of its own SVD."""
    model, tokens, sweep = setup()
    dense, _, _ = setup()
    records = list(compress(model, [1, 2], sweep, ratio=0.4))
    names = matrix_names(1, 2)
    assert [r["name"] for r in records] == names
    G = weight_gradients(dense, names, [tokens])
    for record in records:
        W = dense.get_submodule(record["name"]).weight
        U, S, Vh = svd(W)
        k = rank_for_ratio(*W.shape, 0.4)
        kept = top_k(importance(S, sigma_gradients(U, G[record["name"]], Vh)), k)
        A, B = low_rank_factors(U, S, Vh, kept)
        module = model.get_submodule(record["name"])
        assert record == {"name": record["name"], "shape": list(W.shape), "rank": k, "kept": kept.tolist()}
        assert torch.allclose(module.A @ module.B, A @ B, rtol=0, atol=1e-10)
    for name, p in dense.named_parameters():  # all others stay as they were
        if not name.startswith(("layers.1.a", "layers.1.feed", "layers.2.a", "layers.2.feed")):
            assert torch.equal(model.get_parameter(name), p)
    assert model.n_params_dense == dense.n_params


def test_iterative_goes_deepest_first_with_fresh_gradients(monkeypatch):
    model, tokens, sweep = setup()
    calls = []

    def spy(model, names, batches, label_shift):
        calls.append((names, sum(isinstance(m, LowRankLinear) for m in model.modules())))
        return weight_gradients(model, names, batches)

    monkeypatch.setattr(grasp, "weight_gradients", spy)
    list(compress(model, [0, 2], sweep, ratio=0.4, iterative=True))
    attention, mlp = MATRICES[:4], MATRICES[4:]
    expected = [(2, mlp, 0), (2, attention, 3), (0, mlp, 7), (0, attention, 10)]
    assert calls == [([f"layers.{layer}.{m}" for m in half], done) for layer, half, done in expected]


def test_signed_keeps_what_would_raise_the_loss():
    """taylor keeps a component whose loss would fall without it, signed does not."""
    S, gradient = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, -1.0, -1.5])
    assert importance(S, gradient, "signed").tolist() == [-4, 2, 1.5]
    assert top_k(importance(S, gradient, "signed"), 2).tolist() == [1, 2]
    assert top_k(importance(S, gradient), 2).tolist() == [0, 1]


def test_the_label_shift_reaches_the_gradients():
    model, tokens, sweep = setup()
    names = matrix_names(1, 3)
    G = weight_gradients(model, names, [tokens], label_shift=2)
    given, shifted, other = ([record["kept"] for record in compress(setup()[0], [1, 3], sweep, 0.4, **how)]
                             for how in ({"gradients": G}, {"label_shift": 2}, {}))
    assert given == shifted != other


def test_magnitude_takes_no_gradients_and_keeps_the_largest():
    model, _, _ = setup()
    records = list(compress(model, [3], None, ratio=0.4, score="magnitude"))  # no sweep to call
    assert all(r["kept"] == list(range(r["rank"])) for r in records)


def test_threshold_adapts_the_rank():
    model, _, sweep = setup()
    records = list(compress(model, [0, 1, 2, 3], sweep, threshold=0.3))
    ranks = [r["rank"] for r in records]
    assert len(set(ranks)) > 2
    for r in (r for r in records if r["rank"]):
        m, n = r["shape"]
        assert r["rank"] * (m + n) < m * n


def test_a_matrix_whose_factors_are_no_smaller_stays():
    model, _, sweep = setup()
    before = model.n_params
    records = list(compress(model, [1], sweep, ratio=1.0))
    square = next(r for r in records if r["name"].endswith("wq"))  # 32 x 32: 16 (32 + 32) = 32 * 32
    assert square["rank"] is None and isinstance(model.layers[1].attention.wq, torch.nn.Linear)
    assert model.n_params < before


def test_low_rank_matrices_are_left_alone(monkeypatch):
    """A second call compresses what is still dense. If that is nothing it says so, before any sweep."""
    model, _, sweep = setup()
    list(compress(model, [1], sweep, ratio=0.4))
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith("layers.1.")}
    assert {record["name"][:8] for record in compress(model, [1, 2], sweep, ratio=0.2)} == {"layers.2"}
    monkeypatch.setattr(grasp, "weight_gradients", None)
    with pytest.raises(ValueError, match=r"layers \[2, 1\] are low-rank already; take more, others, or the dense"):
        list(compress(model, [2, 1], sweep, ratio=0.2))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_it_is_a_generator():
    """Each record comes as soon as its matrix is replaced; nothing happens before the first is asked for."""
    model, _, sweep = setup()
    records = compress(model, [1], sweep, ratio=0.4)
    assert isinstance(model.layers[1].attention.wq, torch.nn.Linear)
    assert next(records)["name"] == "layers.1.attention.wq"
    assert isinstance(model.layers[1].attention.wq, LowRankLinear)
    assert isinstance(model.layers[1].attention.wk, torch.nn.Linear)


def test_gradients_can_be_given():
    """The result is the same as with a sweep, and no sweep is needed."""
    (model, tokens, sweep), (other, *_) = setup(), setup()
    G = weight_gradients(other, matrix_names(1, 2), [tokens])
    expected = list(compress(model, [1, 2], sweep, 0.4))
    assert list(compress(other, [1, 2], None, 0.4, gradients=G)) == expected


@pytest.mark.parametrize("changes, message", [
    ({"score": "taylr"}, "score 'taylr': expected one of taylor, signed, gradient, magnitude"),
    ({"ratio": 10}, "ratio 10, .*expected .*above 0 and at most 1"),
    ({"ratio": -1}, "ratio -1, .*expected .*above 0 and at most 1"),
    ({"ratio": None, "threshold": 0}, "threshold 0: expected .*above 0 and at most 1"),
    ({"threshold": 0.5}, "ratio 0.4, threshold 0.5: expected one of them"),
    ({"ratio": None}, "ratio None, threshold None: expected one of them"),
    ({"layer_ids": [99]}, r"this model has 4 layers, 0 to 3; asked for \[99\]"),
    ({"layer_ids": [-1]}, r"this model has 4 layers, 0 to 3; asked for \[-1\]"),
    ({"layer_ids": [1, 1]}, r"asked for \[1, 1\]"),
    ({"layer_ids": []}, r"asked for \[\]"),
    ({"label_shift": 0}, "label shift 0: expected 1 to 11"),
    ({"label_shift": -1}, "label shift -1: expected 1 to 11"),
    ({"label_shift": 12}, "label shift 12: expected 1 to 11"),
    ({"sweep": [1, 2]}, "sweep is a list, expected a function"),
    ({"sweep": None}, "sweep is a NoneType, expected a function"),
    ({"ratio": None, "threshold": 0.5, "score": "signed"}, "signed scores may sum to 0"),
    ({"iterative": True, "gradients": {}}, "iterative takes fresh gradients"),
])
def test_arguments_out_of_range_are_refused(changes, message):
    """The message names what was given and what was expected. The model stays as it was."""
    model, _, sweep = setup()
    with pytest.raises(ValueError, match=message):
        list(compress(model, **{"layer_ids": [1], "sweep": sweep, "ratio": 0.4, **changes}))
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


@pytest.mark.parametrize("n", [0, 5])
def test_a_number_of_layers_out_of_range_is_refused(n):
    model, _, sweep = setup()
    with pytest.raises(ValueError, match=f"this model has 4 layers, 0 to 3; asked for {n}"):
        find_redundant(model, sweep, n)


def test_a_sweep_that_gives_no_batches_is_an_error():
    model, tokens, _ = setup()
    batches = iter(tokens.split(2))
    find_redundant(model, lambda label: batches, 2)
    with pytest.raises(ValueError, match="no batches"):
        list(compress(model, [1], lambda label: batches, 0.4))


def test_redundant_layers_change_their_input_least():
    model, tokens, sweep = setup(n_layers=6)
    for layer in (1, 4):
        for w in (model.layers[layer].attention.wo, model.layers[layer].feed_forward.w2):
            w.weight.data *= 1e-3
    c, redundant = find_redundant(model, sweep, 2)
    assert redundant == [1, 4] and c.shape == (6, len(tokens)) and c[1].mean() > 0.999


def nearly_idle(scale, layers):
    """A model whose `layers` change their input by a share `scale` only."""
    model = random_model()
    for layer in layers:
        for w in (model.layers[layer].attention.wo, model.layers[layer].feed_forward.w2):
            w.weight.data *= scale
    return model


@pytest.mark.parametrize("size, seen", [(1, 32), (4, 32), (5, 35), (48, 48), (80, 80)])
def test_the_sequences_that_count_do_not_hang_on_the_batch_size(size, seen):
    """Layers 1 and 3 hardly change their input, so 32 sequences are enough. Exactly the first 32 count."""
    model = nearly_idle(1e-3, (1, 3))
    tokens, read = random_tokens(model, 80, 7), []

    def sweep(label):
        for batch in tokens.split(size):
            read.append(len(batch))
            yield batch

    c, redundant = find_redundant(model, sweep, 2)
    assert sum(read) == seen and redundant == [1, 3]
    torch.testing.assert_close(c, torch.cat([*layer_cosines(model, [tokens[:32]])], 1))


def test_all_sequences_are_read_while_the_layers_tie():
    """With scale 0 the states before and after layers 0, 1 and 2 are the same, and so are their cosines."""
    model = nearly_idle(0.0, (0, 1, 2))
    tokens = random_tokens(model, 80, 7)
    assert find_redundant(model, lambda label: tokens.split(4), 2)[0].shape == (4, 80)


def test_all_sequences_are_read_if_asked():
    model = nearly_idle(1e-3, (1, 3))
    tokens = random_tokens(model, 80, 7)
    c, redundant = find_redundant(model, lambda label: tokens.split(4), 2, all_sequences=True)
    assert c.shape == (4, 80) and redundant == [1, 3] == top_k(c.mean(1), 2).tolist()


def test_the_margin_is_the_paired_standard_error():
    """Layers 0 and 1 rise and fall together: their difference is sure though neither mean is."""
    g = torch.Generator().manual_seed(0)
    common, noise = torch.randn(64, generator=g).double(), torch.randn(64, generator=g).double()
    c = torch.stack([common + 0.01 + 0.001 * noise, common, common - 100])
    far, pair = grasp.margin(c, 1)
    difference = c[0] - c[1]
    assert pair == [0, 1] and far == pytest.approx(float(difference.mean() / (difference.std() / 8)))
    assert far > 50 > 1 > 0.01 / float(grasp.standard_error(c[:2]).norm())  # taken as independent: not even one
    assert grasp.margin(c, 2)[1] == [1, 2] and grasp.margin(c, 3) == (math.inf, [2])
    assert math.isnan(grasp.margin(c[:, :1], 1)[0]) and math.isnan(grasp.margin(c[[0, 0]], 1)[0])  # nothing is known


@pytest.mark.parametrize("score", ["taylor", "gradient"])
def test_half_precision_weights_keep_their_dtype(score):
    model, tokens, sweep = setup(dtype=torch.bfloat16)
    list(compress(model, [2], sweep, ratio=0.4, score=score))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens).isfinite().all()


@pytest.mark.parametrize("gap, tied", [(0.001, True), (0.1, False)])
def test_a_near_tie_is_said(gap, tied, capsys):
    noise = torch.tensor([[-0.02, 0.02] * 16, [0.02, -0.02] * 16, [0.02, -0.02] * 16], dtype=torch.float64)
    c = torch.tensor([[0.9], [0.5], [0.9 - gap]], dtype=torch.float64) + noise
    grasp.print_cosines(c, [0])
    out = capsys.readouterr().out
    assert "layer   0  cosine 0.9000 ± 0.0036  redundant" in out and "32 sequences read" in out
    assert ("layers 0 and 2 nearly tie" in out) == tied


def test_of_one_sequence_no_error_is_known(capsys):
    grasp.print_cosines(torch.tensor([[0.9], [0.5]]), [0])
    out = capsys.readouterr().out
    assert "cosine 0.9000 ± nan" in out and "layers 0 and 1 nearly tie" in out
