"""The lesson: the network starts as the identity, learns the run's last state, and is as wide as the budget allows."""
from copy import deepcopy

import pytest
import torch

from tests.conftest import random_model, random_tokens
from extras.baselines import block_params
from extras.baselines.patch import run_cosines
from extras.baselines.streamline import HalfBlock, streamline


def replaced_run(model, tokens, budget, **options):
    """(the compressed model, i, j, h_i, h_j): its network stands where the dense model's blocks i .. j - 1 did."""
    states, n_layers = list(model.residual_stream(tokens)), len(model.layers)
    model = streamline(model, lambda label: tokens.split(1), budget, **options)
    i = [isinstance(block, HalfBlock) for block in model.layers].index(True)
    j = i + n_layers - (len(model.layers) - 1)
    return model, i, j, states[i], states[j]


def test_without_a_step_the_run_of_highest_cosine_is_dropped():
    model = random_model(n_layers=6)
    tokens, dense = random_tokens(model, 4, 12), deepcopy(model)
    model, i, j, _, _ = replaced_run(model, tokens, block_params(model), steps=0)
    assert j - i == 2 and i == run_cosines(dense, [tokens], 2).argmax()
    del dense.layers[i:j]
    torch.testing.assert_close(model(tokens), dense(tokens))


def test_a_run_that_does_nothing_leaves_nothing_to_learn():
    model = random_model(n_layers=6)
    tokens = random_tokens(model, 4, 12)
    for block in model.layers[2:4]:
        block.attention.wo.weight.zero_()
        block.feed_forward.w2.weight.zero_()
    logits = model(tokens)
    model, i, j, _, _ = replaced_run(model, tokens, block_params(model), steps=20)
    assert (i, j) == (2, 4)
    torch.testing.assert_close(model(tokens), logits)


def test_training_lowers_the_squared_error_and_is_the_same_every_time():
    model = random_model(n_layers=6)
    tokens = random_tokens(model, 8, 32)
    model, i, _, x, y = replaced_run(model, tokens, block_params(model), steps=200, batch=64, peak=1e-2)
    learnt = list(model.residual_stream(tokens))[i + 1]
    torch.testing.assert_close(learnt, x + model.layers[i].feed_forward(model.layers[i].ffn_norm(x)))
    assert (learnt - y).pow(2).mean() < 0.5 * (x - y).pow(2).mean()
    torch.manual_seed(99)
    again = replaced_run(random_model(n_layers=6), tokens, block_params(model), steps=200, batch=64, peak=1e-2)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 1, 2.4, 3.3])
def test_the_width_meets_the_budget_with_the_fewest_blocks(share, dtype):
    model = random_model(dtype, tied=True, n_layers=6, dim=32, head_dim=8, hidden_dim=96)
    tokens, before, block = random_tokens(model, 4, 32), model.n_params, block_params(model)
    budget = round(share * block)
    model, i, j, _, _ = replaced_run(model, tokens, budget, steps=2)
    width = model.layers[i].feed_forward.w1.out_features
    assert width >= 32 and width * 3 * 32 + 32 == sum(p.numel() for p in model.layers[i].parameters())
    assert 0 <= before - model.n_params - budget < 3 * 32
    assert (j - i - 1) * block - budget < 32 + 3 * 32 * 32  # one block fewer leaves no room for a network of width dim
    assert all(p.dtype == dtype and not p.requires_grad for p in model.parameters())
    assert model(tokens).isfinite().all()


def test_a_budget_that_leaves_no_room_for_the_network_is_a_mistake():
    model = random_model()
    most = 3 * block_params(model) - 16 - 3 * 16 * 16  # one of the four blocks stays
    with pytest.raises(ValueError, match=f"are {most:,}"):
        streamline(model, lambda label: [], most + 1)
    model = streamline(model, lambda label: [random_tokens(model, 2, 8)], most, steps=0)
    width, = (block.feed_forward.w1.out_features for block in model.layers if isinstance(block, HalfBlock))
    assert len(model.layers) == 2 and width == 16
