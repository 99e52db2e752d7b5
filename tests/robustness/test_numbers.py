"""The lesson: a number is right, or it is refused in one line. None is NaN.

The references are computed in fp64 by other means: LAPACK's singular values, the product of the factors,
a cosine of vectors scaled to 1. The weights are extreme: zeros, equal singular values, the largest and the
smallest numbers of a dtype.
"""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

import evaluate
import grasp
from attribution import (importance, layer_cosines, low_rank_factors, rank_for_threshold, svd,
                         weight_gradients)
from tests.conftest import error_of, outcome, output_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from evaluate import perplexity
from extras.baselines.patch import angular_distances
from grasp import compress, find_redundant
from model import matrix_names
from runtime.cli import TINY

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def hostile(dtype):
    """{what it is: W (m, n)} of extreme matrices in that dtype."""
    torch.manual_seed(0)
    W, info = torch.randn(20, 12, dtype=torch.float64), torch.finfo(dtype)
    large = min(1e30, info.max / 8)
    one = W.clone()
    one[3, 5] = large
    found = {"zero": W * 0, "rank 1": W[:, :1] @ W[:1], "rank 1 of ones": torch.ones(12, 20),
             "identity": torch.eye(12),
             "orthogonal": torch.linalg.qr(W).Q, "a column of zeros": W * (torch.arange(12) != 5),
             "large": W / W.abs().max() * large, "one large, all others not": one,
             "denormal": W * info.tiny / 100,
             "one entry": W[:1, :1], "a row": W[:1], "a column": W[:, :1]}
    return {name: W.to(dtype) for name, W in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_svd_is_an_svd(dtype):
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, W in hostile(dtype).items():
        U, S, Vh = (t.double() for t in svd(W))
        exact = torch.linalg.svdvals(W.double())
        least = 100 * torch.finfo(dtype).smallest_normal * eps * (name == "denormal")  # few bits are left
        assert (S - exact).abs().max() <= 30 * eps * exact[0] + least, name
        assert (U @ S.diag() @ Vh - W.double()).abs().max() <= 30 * eps * exact[0] + least, name
        for Q in (U.T, Vh):
            assert (Q @ Q.T - torch.eye(len(S))).abs().max() < 100 * eps, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_as_good_as_their_dtype(dtype):
    """With all components kept, A B is W to the precision of its dtype. No sqrt(sigma) overflows."""
    for name, W in hostile(dtype).items():
        U, S, Vh = svd(W)
        A, B = (factor.to(dtype) for factor in low_rank_factors(U, S, Vh, torch.arange(len(S))))
        assert A.isfinite().all() and B.isfinite().all(), name
        error = (A.double() @ B.double() - W.double()).abs().max()
        assert error <= 16 * torch.finfo(dtype).eps * S[0].double() + torch.finfo(dtype).tiny * 1e-3, name


def kept_of_one_matrix(W, G, **settings):
    """The record of compress() for the matrix wq of a model, made to be W (16, 16) with gradient G."""
    model, name = random_model(torch.float32), "layers.1.attention.wq"
    model.get_submodule(name).weight.data = W
    gradients = {other: torch.zeros_like(model.get_submodule(other).weight) for other in matrix_names(1)}
    return next(compress(model, [1], lambda label: [], gradients={**gradients, name: G}, **settings)), model


def test_equal_scores_go_to_the_largest_singular_values():
    W = torch.diag(torch.tensor([1.0, 4.0, 3.0, 2.0])).repeat(4, 4)
    for score in ("taylor", "gradient", "magnitude"):
        record, model = kept_of_one_matrix(W, torch.zeros_like(W), ratio=0.25, score=score)
        assert record["kept"] == [0, 1] and model.layers[1].attention.wq.A.isfinite().all()
    record, _ = kept_of_one_matrix(W, torch.zeros_like(W), threshold=0.5)
    assert record["kept"] == [0]  # the sum of all scores is 0, and one component reaches it
    assert rank_for_threshold(torch.zeros(4), 1.0) == 1


def test_scores_neither_overflow_nor_vanish():
    """1e30 * 1e20 and 1e-40 * 1e-10 are beyond fp32, but in fp64 such scores have an order."""
    for scale, gradient in ((1e30, 1e20), (1e-40, 1e-10)):
        scores = importance(torch.tensor([3.0, 2.0, 1.0]) * scale, torch.tensor([1.0, 3.0, 2.0]) * gradient)
        assert (scores / scores.max()).tolist() == pytest.approx([0.5, 1, 1 / 3], rel=1e-4)


def test_scores_that_are_not_finite_are_refused():
    largest = torch.full((16, 16), torch.finfo(torch.float32).max)
    for W, G in ((largest, torch.eye(16)), (torch.randn(16, 16), largest)):
        with pytest.raises(ValueError, match="score.* not finite"):
            kept_of_one_matrix(W, G, ratio=0.5)


class States:
    """A model that has only a residual stream."""
    device, dtype = "cpu", torch.float32

    def __init__(self, *states):
        self.states = [torch.tensor(h).reshape(1, -1, 2) for h in states]
        self.layers, self.args = states[1:], SimpleNamespace(n_layers=len(states) - 1)

    def residual_stream(self, tokens):
        return iter(self.states)


@pytest.mark.parametrize("scale", [1, 1e30, 3e38, 1e-20, 1e-40])
def test_cosines_do_not_depend_on_scale(scale):
    """In fp32 the squares of 1e30 and of 1e-30 are infinity and 0: the cosine of equal vectors would be 0."""
    model = States([scale, 0.0], [scale, 0.0], [scale, scale])
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    (c,) = layer_cosines(model, [tokens])
    assert c.shape == (2, 1) and c[:, 0].tolist() == pytest.approx([1, math.sqrt(0.5)], rel=1e-4)
    assert angular_distances(model, [tokens], 1).tolist() == pytest.approx([0, 0.25], abs=1e-4)


def test_cosines_of_zeros():
    """A layer that leaves zeros as they are is redundant. Zeros and other vectors count as orthogonal."""
    model, tokens = States([0.0, 0.0], [0.0, 0.0], [1.0, 0.0]), torch.zeros(1, 1, dtype=torch.int64)
    assert next(layer_cosines(model, [tokens])).tolist() == [[1], [0]]
    assert angular_distances(model, [tokens], 1).tolist() == pytest.approx([0, 0.5], abs=1e-12)


def test_a_cosine_that_is_not_finite_is_refused():
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cosine of layer 1 is not a number in torch.float32"):
        find_redundant(States([1.0, 0.0], [1.0, 0.0], [math.nan, 0.0]), lambda label: [tokens], 1)
    with pytest.raises(ValueError, match="cosine of layer 0 is not a number"):
        find_redundant(States([1.0, 0.0], [math.inf, 0.0], [1.0, 0.0]), lambda label: [tokens], 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_cosine_that_is_not_finite_is_refused_also_if_the_others_decide(n):
    """40 sequences: NaN sorts first, so the margin between two other layers can be wide at the first 32."""
    model = random_model(torch.float32)
    for w in (model.layers[3].attention.wo, model.layers[3].feed_forward.w2):
        w.weight.data *= 1e38
    tokens = random_tokens(model, 40, 7)
    with pytest.raises(ValueError, match="cosine of layer 3 is not a number"):
        find_redundant(model, lambda label: tokens.split(8), n)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 710.0])
def test_a_perplexity_that_is_not_finite_is_refused(loss, monkeypatch):
    """exp(710) is beyond fp64, though the loss is finite."""
    model = random_model()
    tokens = random_tokens(model, 2, 5)
    monkeypatch.setattr(model, "losses", lambda h, tokens: [torch.tensor(8 * loss)])
    with pytest.raises(ValueError, match=f"no finite perplexity: the mean loss is {loss:.4g} nats per token"):
        perplexity(model, [tokens])


def test_a_vocabulary_of_one_token():
    """Perplexity is exactly 1 and the gradient 0. Equal scores keep the largest components."""
    model = random_model(torch.float32, vocab_size=1)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    assert perplexity(model, [tokens]) == 1
    records = list(compress(model, [1, 2], lambda label: [tokens], 0.4))
    assert all(r["kept"] == list(range(r["rank"])) for r in records) and perplexity(model, [tokens]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_zeros_is_the_most_redundant(dtype):
    """Only its cosine is 1. Its gradients may be 0, and its factors are."""
    model = random_model(dtype)
    tokens = random_tokens(model, 3, 9)
    for name in matrix_names(2):
        model.get_submodule(name).weight.data.zero_()
    before, sweep = model(tokens), lambda label: tokens.split(2)
    c, redundant = find_redundant(model, sweep, 1)
    assert redundant == [2] and c[2].tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert angular_distances(model, sweep(""), 1).argmin() == 2
    for settings in ({"ratio": 0.3}, {"threshold": 0.5}):
        compressed = copy.deepcopy(model)
        list(compress(compressed, redundant, sweep, **settings))
        assert torch.equal(compressed(tokens), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_component_is_enough_for_a_matrix_of_rank_1(dtype):
    """All other components have a singular value of 0, and so a score of 0."""
    model = random_model(dtype)
    tokens = random_tokens(model, 3, 9)
    for name in matrix_names(1, 2):
        W = model.get_submodule(name).weight
        W.data = W[:, :1].sign() * W[:1]  # of rank 1 in every dtype: no product is rounded
    before = perplexity(model, [tokens])
    records = list(compress(model, [1, 2], lambda label: tokens.split(2), 1e-9))
    assert all(r["kept"] == [0] for r in records)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-5)
    assert perplexity(model, [tokens]) == pytest.approx(before, rel=tolerance)


def test_zero_norms_predict_nothing():
    model = random_model(torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.zero_()
    tokens = random_tokens(model, 2, 7)
    assert perplexity(model, [tokens]) == pytest.approx(model.args.vocab_size, rel=1e-5)
    assert next(layer_cosines(model, [tokens])).flatten().tolist() == pytest.approx([1] * 8, abs=1e-12)
    assert all(not G.any() for G in weight_gradients(model, matrix_names(1), [tokens]).values())


def test_embeddings_of_absent_tokens_do_not_matter():
    model = random_model()
    tokens = torch.full((2, 6), 7)
    found = next(layer_cosines(model, [tokens])), weight_gradients(model, matrix_names(2), [tokens])
    model.tok_embeddings.weight.data[torch.arange(50) != 7] = 1e30
    assert torch.equal(next(layer_cosines(model, [tokens])), found[0])
    for name, G in weight_gradients(model, matrix_names(2), [tokens]).items():
        assert torch.equal(G, found[1][name]), name


# --------------------------------------------------------------------------------------- through the commands

def folder(nowhere, change, dtype=torch.float32):
    """The embedded model with one thing changed, as a folder."""
    model = load_checkpoint(TINY, dtype)
    for p in model.parameters():
        p.data = p.data.clone()
    change(model)
    save_checkpoint(model, nowhere / "model", tokenizer=load_tokenizer(TINY).files)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("what", ["zero layer", "rank 1", "identity", "denormal", "large", "zero norm",
                                  "zero embeddings"])
def test_extreme_weights_are_compressed_and_read_back(what, dtype, nowhere, capsys):
    def change(model):
        for name in matrix_names(3):
            W = model.get_submodule(name).weight
            W.data = {"zero layer": W * 0, "rank 1": (W[:, :1].float() @ W[:1].float()).to(dtype),
                      "identity": torch.eye(*W.shape).to(dtype),
                      "denormal": W * torch.finfo(dtype).tiny}.get(what, W)
        if what == "large":  # attention then sees one token only
            model.layers[3].attention.wq.weight.data *= 30 if dtype == torch.float16 else 1e6
        if what == "zero norm":
            model.layers[3].attention_norm.weight.data.zero_()
        if what == "zero embeddings":
            model.tok_embeddings.weight.data[::2] = 0

    folder(nowhere, change, dtype)
    words = ("--ckpt model --layer-ids 3 --samples 1 --seq-len 2 --windows 1 --out out "
             "--calibration embedded --eval embedded")
    code, out, err = outcome(grasp.main, words, capsys)
    if code:  # gradients through norms of zeros can exceed fp16's range
        assert dtype == torch.float16 and "is not finite" in err
        assert not (nowhere / "out").exists()
        return
    rows = json.loads((nowhere / "out/report.json").read_text(), parse_constant=pytest.fail)["results"]
    ours, = (row["perplexity"] for row in rows if row["model"] == "GRASP")
    out += output_of(evaluate.main, "--ckpt out --data embedded --windows 1 --json e.json", capsys)
    again = json.loads((nowhere / "e.json").read_text())["perplexity"]
    assert again == pytest.approx(ours, rel=1e-6 if dtype == torch.float32 else 1e-3) and "nan" not in out


@pytest.mark.parametrize("name, value, words, message", [
    ("layers.3.feed_forward.w2.weight", 3e38, "",
     "error: the cosine of layer 3 is not a number in torch.float32"),
    ("norm.weight", 3e38, "", "error: no finite perplexity: the mean loss is nan nats per token"),
    ("norm.weight", 3e38, "--eval none", "is not finite; try --dtype bfloat16 or float32"),
    ("layers.3.attention.wq.weight", 1e30, "--dtype float16 --eval embedded",
     "holds NaN or infinite values in torch.float16"),
    ("tok_embeddings.weight", 1e30, "", "error: the gradient of layers.0.attention.wq is not finite"),
    ("layers.7.feed_forward.w2.weight", 6e4, "--dtype float16 --eval embedded",
     "cosine of layer 7 is not a number in torch.float16")])
def test_an_overflow_is_one_line_and_no_folder(name, value, words, message, nowhere, monkeypatch, capsys):
    folder(nowhere, lambda model: model.get_parameter(name).data.fill_(value))
    words = f"{words or '--eval embedded'} --calibration embedded --samples 2 --seq-len 16 --windows 1"
    assert message in error_of(grasp.main, f"--ckpt model --layers 2 --out out {words}", monkeypatch, capsys)
    assert not (nowhere / "out").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = random_model()
    model.layers[1].ffn_norm.weight.data[2] = math.inf
    with pytest.raises(ValueError,
                       match="not written: layers.1.ffn_norm.weight holds NaN or infinite values"):
        save_checkpoint(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [
    "--layers 8 --ratio 1", "--layers 8 --ratio 1e-300",
    "--layers 1 --threshold 1e-300", "--layers 1 --threshold 1"])
def test_extreme_settings(words, nowhere, capsys):
    assert "| GRASP " in output_of(grasp.main, f"{words} --samples 1 --seq-len 2 --windows 1", capsys)
