"""The lesson: a sliced model is the dense one with each signal projected on its principal directions, and no more."""
import copy

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_model, random_tokens
from evaluate import perplexity
from extras.baselines.slicegpt import principal_directions, slice_to, slicegpt, sliced_params, widths_for
from model import rotations

both = pytest.mark.parametrize("tied", [False, True])


def sweep_of(tokens):
    return lambda label: tokens.split(3)  # two batches, not of one size


@both
def test_rotations_alone_change_nothing(tied):
    model = random_model(tied=tied)
    tokens = random_tokens(model, 5, 12)
    logits, before = model(tokens), model.layers[1].attention.wk.weight.clone()
    slice_to(model, sweep_of(tokens), [16] * 9)
    assert (model.layers[1].attention.wk.weight - before).abs().max() > 0.1  # gains and rotations went in
    torch.testing.assert_close(model(tokens), logits, atol=1e-9, rtol=0)


def projected_logits(model, tokens, widths):
    """The dense model, each signal of these very tokens projected on its first right singular vectors."""
    widths = iter(widths)

    def project(x):
        V = torch.linalg.svd(x.flatten(0, 1), full_matrices=False).Vh[:next(widths)]
        return x @ V.mT @ V

    rotary = rotations(model.args, tokens.shape[1], tokens.device)
    h = project(model.tok_embeddings(tokens))
    for block in model.layers:
        h = project(h + block.attention(block.attention_norm(h), rotary))
        h = project(h + block.feed_forward(block.ffn_norm(h)))
    return model.output(model.norm(h))


@pytest.mark.parametrize("tied, widths", [
    (False, [11, 8, 9, 16, 5, 12, 8, 7, 6]), (True, [16, 8, 9, 12, 5, 3, 8, 7, 16])])
def test_slices_are_projections_of_the_signals_in_the_model_sliced_so_far(tied, widths):
    """Norms must divide by the old dim and add the old eps, which is made large here to be seen."""
    model = random_model(tied=tied, norm_eps=0.3)
    tokens = random_tokens(model, 5, 12)
    expected, dense = projected_logits(model, tokens, widths), model(tokens)
    slice_to(model, sweep_of(tokens), widths)
    torch.testing.assert_close(model(tokens), expected, atol=1e-9, rtol=0)
    assert (dense - expected).abs().max() > 0.1  # what was cut mattered


def test_sliced_signals_are_uncorrelated_and_hold_the_largest_variances():
    model = random_model()
    tokens = random_tokens(model, 5, 12)
    stacked = model.tok_embeddings(tokens).flatten(0, 1)
    slice_to(model, sweep_of(tokens), [11, 8, 9, 12, 5, 12, 8, 7, 6])
    for layer, h in enumerate(model.residual_stream(tokens)):
        moment = h.flatten(0, 1).mT @ h.flatten(0, 1)
        variances = moment.diagonal()
        torch.testing.assert_close(moment, variances.diag(), atol=1e-9, rtol=0)
        assert (variances.diff() < 0).all()
        if layer == 0:
            torch.testing.assert_close(variances, torch.linalg.svdvals(stacked)[:11] ** 2)


def test_principal_directions_are_those_of_the_stacked_signal_and_a_ridge_moves_none():
    torch.manual_seed(0)
    signal = [torch.randn(*size, 16, dtype=torch.float64) for size in ((2, 30), (3, 10))]
    stacked = torch.cat([x.flatten(0, 1) for x in signal])
    cut = principal_directions(signal, 6)
    torch.testing.assert_close(cut.mT @ cut, torch.eye(6, dtype=torch.float64))
    kept = (stacked @ cut).pow(2).sum()
    torch.testing.assert_close(kept, torch.linalg.svdvals(stacked)[:6].pow(2).sum())  # no 6 directions hold more
    C = stacked.mT @ stacked
    ridged = torch.linalg.eigh(C + 0.01 * C.diagonal().mean() * torch.eye(16)).eigenvectors[:, -6:]
    torch.testing.assert_close(ridged @ ridged.mT, cut @ cut.mT)


@both
def test_a_stream_within_a_subspace_loses_nothing(tied):
    model = random_model(tied=tied, norm_eps=0.3)
    R = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q
    model.tok_embeddings.weight.copy_(model.tok_embeddings.weight @ R @ R.mT)
    for block in model.layers:
        for W in (block.attention.wo.weight, block.feed_forward.w2.weight):
            W.copy_(R @ R.mT @ W)
    calibration, tokens, end = random_tokens(model, 5, 12), random_tokens(model, 2, 20, seed=2), 16 if tied else 8
    logits, narrower = model(tokens), copy.deepcopy(model)
    slice_to(model, sweep_of(calibration), [end, *[8] * 7, end])
    torch.testing.assert_close(model(tokens), logits, atol=1e-9, rtol=0)
    slice_to(narrower, sweep_of(calibration), [end, 8, 8, 7, 8, 8, 8, 8, end])
    assert (narrower(tokens) - logits).abs().max() > 1e-3


@both
def test_shortcuts_make_full_width_larger_than_the_dense_model(tied):
    model = random_model(tied=tied)
    dense = model.n_params
    slice_to(model, sweep_of(random_tokens(model, 5, 12)), [16] * 9)
    assert model.n_params - dense == 4 * 2 * 16 * 16


@both
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_budget_is_met(tied, share):
    model = random_model(tied=tied, dim=128, n_layers=8, n_heads=8, head_dim=16, hidden_dim=256, vocab_size=100)
    tokens, dense, budget = random_tokens(model, 5, 12), model.n_params, int(share * model.n_params)
    widths = widths_for(model, budget)
    assert slicegpt(model, sweep_of(tokens), budget) is model
    assert budget <= dense - model.n_params <= 1.005 * budget
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    sliced = widths[1:-1] if tied else widths
    assert sliced == sorted(sliced) and sliced[-1] - sliced[0] <= 8 and sum(w % 8 > 0 for w in sliced) <= 1
    assert [h.shape[-1] for h in model.residual_stream(tokens)] == widths[::2]
    nll = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert perplexity(model, [tokens]) == pytest.approx(nll.exp().item())


@both
def test_no_budget_is_overshot_by_a_whole_channel(tied):
    model = random_model(tied=tied, dim=32)
    dearest = 16 + 2 * 24 + 1 + 2 * 32  # a channel before a feed-forward: wo, w1 and w3, the norm, two shortcuts
    for budget in range(0, 9000, 10):
        removed = model.n_params - sliced_params(model, widths_for(model, budget))
        assert budget <= removed < budget + dearest


@both
def test_the_model_stays_in_its_dtype_and_asks_for_no_gradient(tied):
    model = random_model(torch.bfloat16, tied=tied)
    slicegpt(model, sweep_of(random_tokens(model, 5, 12)), 1000)
    assert {p.dtype for p in model.parameters()} == {model.dtype} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


@both
def test_a_budget_out_of_reach_says_what_can_be_removed(tied):
    model = random_model(tied=tied)
    dense = model.n_params
    with pytest.raises(ValueError) as error:
        slicegpt(model, sweep_of(random_tokens(model, 5, 12)), dense)
    possible = int(str(error.value).split()[-3].replace(",", ""))
    assert f"cannot remove {dense:,} parameters" in str(error.value)
    slicegpt(model, sweep_of(random_tokens(model, 5, 12)), possible)
    assert dense - model.n_params == possible
