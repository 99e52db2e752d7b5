"""The lesson: a patch is worked out, not trained, and what it promises about the state at the cut is exact."""
from copy import deepcopy

import pytest
import torch
from torch import nn

from attribution import layer_cosines
from tests.conftest import random_model, random_tokens
from tests.test_attribution import Stream
from extras.baselines import block_params, patch
from extras.baselines.patch import Patch, angular_distances, hadamard, linearpatch, replaceme, run_cosines


def removed_run(dense, model):
    """(i, j): blocks i .. j - 1 of `dense` are not in the model, which otherwise has the very same modules."""
    gone = [layer for layer, block in enumerate(dense) if all(block is not other for other in model.layers)]
    assert gone == list(range(gone[0], gone[-1] + 1))
    return gone[0], gone[-1] + 1


@pytest.mark.parametrize("n", [1, 2, 12, 16, 20, 48, 96, 104, 576])
def test_hadamard_is_orthonormal_and_all_entries_are_of_one_size(n):
    H = hadamard(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(H.abs(), torch.full_like(H, n ** -0.5))


@pytest.mark.parametrize("n", [3, 6, 28, 36])  # 1, 2 and multiples of 4 alone can have one; 28 and 36 have, not from us
def test_no_hadamard_matrix_is_said_so(n):
    with pytest.raises(ValueError, match=f"no Hadamard matrix for dim {n}"):
        hadamard(n)


def test_cosines_of_runs_are_those_between_their_ends():
    model = random_model()
    tokens = random_tokens(model, 3, 7)
    (c,) = layer_cosines(model, [tokens])
    torch.testing.assert_close(run_cosines(model, tokens.split(2), 1), c.mean(1))
    states = [h.flatten(0, 1) for h in model.residual_stream(tokens)]
    by_hand = [torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(states[l], states[l + 3])]).mean()
               for l in range(2)]
    torch.testing.assert_close(run_cosines(model, tokens.split(2), 3), torch.stack(by_hand))


def test_cosines_of_large_states_do_not_overflow():
    """Blocks that do nothing leave states whose squares are no fp32 numbers."""
    model = random_model(torch.float32)
    model.tok_embeddings.weight.mul_(1e25)
    for block in model.layers:
        block.attention.wo.weight.zero_()
        block.feed_forward.w2.weight.zero_()
    assert run_cosines(model, [random_tokens(model, 2, 5)], 2).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


@pytest.mark.parametrize("method", [linearpatch, replaceme])
def test_a_run_that_does_nothing_is_found_and_its_patch_is_the_identity(method):
    model = random_model(n_layers=6)
    tokens = random_tokens(model, 4, 12)
    for block in model.layers[2:4]:
        block.attention.wo.weight.zero_()
        block.feed_forward.w2.weight.zero_()
    dense, logits = list(model.layers), model(tokens)
    model = method(model, lambda label: [tokens], 2)
    assert removed_run(dense, model) == (2, 4) and model.args.n_layers == 4
    for added in (block for block in model.layers if isinstance(block, Patch)):
        torch.testing.assert_close(added.P, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)  # replaceme's ridge is one part in 10^6


def test_linearpatch_restores_the_mean_size_of_every_rotated_channel():
    model = random_model()
    tokens, dense, H = random_tokens(model, 4, 12), list(model.layers), hadamard(16)
    states = list(model.residual_stream(tokens))
    cosines = run_cosines(model, [tokens], 2)
    model = linearpatch(model, lambda label: tokens.split(1), 2)
    i, j = removed_run(dense, model)
    assert (i, j) == (1, 3) and cosines.argmax() != 1  # the only run between the first block and the last
    patch, patched = model.layers[i].P, list(model.residual_stream(tokens))[i + 1]
    torch.testing.assert_close(patch, patch.T)
    sizes = [(h @ H).abs().mean((0, 1)) for h in (states[i], states[j], patched)]
    torch.testing.assert_close(sizes[2], sizes[1])
    assert (sizes[0] / sizes[1] - 1).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0, 0.1])
def test_replaceme_is_ridge_regression_on_all_tokens_at_once(alpha):
    """min |A M - Y|^2 + alpha s |M|^2 is plain least squares with the rows sqrt(alpha s) I under A, and 0 under Y."""
    model = random_model(n_layers=6)
    tokens, dense = random_tokens(model, 6, 12), list(model.layers)
    before = deepcopy(model)
    model = replaceme(model, lambda label: tokens.split(2), 2, alpha=alpha)
    i, j = removed_run(dense, model)
    outputs = []
    before.layers[i - 1].feed_forward.register_forward_hook(lambda module, inputs, y: outputs.append(y.flatten(0, 1)))
    states = [h.flatten(0, 1) for h in before.residual_stream(tokens)]
    A, Y = outputs[0], states[j] - (states[i] - outputs[0])
    ridge = (alpha * A.pow(2).sum(0).mean()).sqrt() * torch.eye(16, dtype=torch.float64)
    M = torch.linalg.lstsq(torch.cat([A, ridge]), torch.cat([Y, torch.zeros_like(ridge)])).solution
    w2 = before.layers[i - 1].feed_forward.w2.weight
    torch.testing.assert_close(model.layers[i - 1].feed_forward.w2.weight, M.T @ w2)
    patched = list(model.residual_stream(tokens))[i].flatten(0, 1)
    torch.testing.assert_close(patched, states[i] - A + A @ M)
    assert (patched - states[j]).norm() < (states[i] - states[j]).norm()


class Echo(nn.Module):
    """Adds a linear image of what another block's feed-forward last gave."""
    def __init__(self, feed_forward, K):
        super().__init__()
        feed_forward.register_forward_hook(lambda module, inputs, y: setattr(self, "heard", y))
        self.K = K

    def forward(self, h, rotary):
        return h + self.heard @ self.K


def test_replaceme_loses_nothing_where_the_run_is_linear_in_what_it_can_change():
    model = random_model(n_layers=3)
    tokens = random_tokens(model, 4, 12)
    model.layers[1] = Echo(model.layers[0].feed_forward, torch.randn(16, 16, dtype=torch.float64))
    logits, unpatched = model(tokens), deepcopy(model)
    model = replaceme(model, lambda label: [tokens], 1, alpha=0)
    del unpatched.layers[1]
    assert len(model.layers) == 2 and (unpatched(tokens) - logits).abs().max() > 1
    torch.testing.assert_close(model(tokens), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, added", [(linearpatch, 96 * 96), (replaceme, 0)])
def test_n_blocks_go_and_the_patch_counts(method, added, dtype):
    for n in (1, 3, 5):
        model = random_model(dtype, tied=True, n_layers=7, dim=96, head_dim=24, hidden_dim=128)
        tokens, before, size = random_tokens(model, 4, 32), model.n_params, block_params(model)
        model = method(model, lambda label: tokens.split(2), n)
        assert before - model.n_params == n * size - added
        assert all(p.dtype == dtype and not p.requires_grad for p in model.parameters())
        assert model(tokens).isfinite().all()


@pytest.mark.parametrize("method", [linearpatch, replaceme])
@pytest.mark.parametrize("n", [0, 3])
def test_a_run_has_to_lie_between_the_ends(method, n):
    with pytest.raises(ValueError, match=f"cannot take out {n} blocks: expected 1 to 2 of 4"):
        method(random_model(), lambda label: [], n)


def test_angles_by_hand():
    """On the last tokens only: angles 0 and 45 degrees, then 0 and 0; from end to end 0 and 45."""
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    assert angular_distances(Stream(), [tokens], 1).tolist() == pytest.approx([0.125, 0.0], abs=1e-8)
    assert angular_distances(Stream(), [tokens], 2).tolist() == pytest.approx([0.125])


def test_angles_of_no_batches_are_an_error():
    with pytest.raises(ValueError, match="no batches"):
        angular_distances(Stream(), [], 1)


def test_angles_of_equal_vectors_are_zero(monkeypatch):
    """Rounding can put a cosine just above 1, where arccos is not a number."""
    monkeypatch.setattr(patch, "cosine", lambda a, b: torch.full(a.shape[:-1], 1 + 1e-15, dtype=torch.float64))
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    assert angular_distances(Stream(), [tokens], 1).tolist() == pytest.approx([0, 0], abs=1e-12)
