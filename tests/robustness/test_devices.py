"""The lesson: a sweep keeps its GPU busy: it takes no tensor from elsewhere and waits for no number.

The meta device stands in for a GPU. Its tensors have no values, so an operation that needs one fails; here an operation
that mixes devices fails too. Each sweep runs all of its batches before it asks for its first value, at the place named.
"""
import traceback
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attribution import angular_distances, layer_cosines, weight_gradients
from evaluate import perplexity
from extras import recover
from extras.fisher.moments import second_moments
from extras.generate import empty_cache, sample, step
from grasp import compress
from model import matrix_names, rotary_frequencies
from tests.conftest import ROOT, random_model, random_tokens


class OneDevice(TorchDispatchMode):
    """Fails on an operation over tensors of two devices; a copy between them and a CPU scalar are allowed."""
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if operation is not torch.ops.aten._to_copy.default and len({t.device for t in tensors}) > 1:
            raise AssertionError(f"{operation} mixes devices")
        return operation(*args, **(kwargs or {}))


def first_value(work, batches):
    """The function that asks for the first value, after all batches. Fails if it comes earlier, or never."""
    left = [True]

    def sweep():
        yield from batches
        left.clear()

    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError), match="meta tensor") as error:
        work(sweep())
    assert not left, "a value is needed before the last batch"
    frames = traceback.extract_tb(error.value.__traceback__)
    return [frame.name for frame in frames if frame.filename.startswith(str(ROOT)) and frame.filename != __file__][-1]


NAMES = matrix_names(1, 3)
SWEEPS = {
    "layer_cosines": (layer_cosines, "mean_and_error"),
    "angular_distances": (lambda model, batches: angular_distances(model, batches, 2), "mean"),
    "weight_gradients": (lambda model, batches: weight_gradients(model, NAMES, batches), "finite"),
    "perplexity": (perplexity, "mean"),
    "second_moments": (lambda model, batches: second_moments(model, NAMES, batches, channels=True), "second_moments"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_needs_no_value_before_its_end(sweep, device, dtype):
    """device: of the batches, which windows on the CPU may be."""
    work, place = SWEEPS[sweep]
    model = random_model(dtype)
    batches = [tokens.to(device) for tokens in random_tokens(model, 6, 9).split(2)]
    model = model.to("meta")
    assert first_value(lambda batches: work(model, batches), batches) == place


def test_recoverys_step_needs_no_value_before_its_end(monkeypatch):
    model = random_model(torch.float32)
    tokens = random_tokens(model, 4, 9)
    list(compress(model, [1, 3], lambda label: [], 0.4, score="magnitude"))
    names = [*recover.prepare(model)]
    model = model.to("meta")
    factors = {name: model.get_parameter(name).requires_grad_() for name in names}
    monkeypatch.setattr(recover, "mixed", lambda model: nullcontext())  # autocast has no meta device
    optimizer = torch.optim.AdamW(factors.values())
    examples = [(row, row) for row in tokens]
    batches = [*recover.micro_batches(examples, 2, model.device)]

    def work(batches):
        monkeypatch.setattr(recover, "micro_batches", lambda *words: batches)
        recover.update(model, factors, optimizer, examples, 2)

    assert first_value(work, batches) == "update"


def test_generations_step_needs_no_value():
    model = random_model(torch.bfloat16).to("meta")
    prompt = random_tokens(model, 2, 5).to("meta")
    cache = empty_cache(model, 2, 8)
    cos, sin = rotary_frequencies(model.args, 8, model.device)
    with OneDevice(), torch.no_grad():
        tokens = sample(step(model, prompt, cache, 0, cos, sin), None)[:, None]
        logits = step(model, tokens, cache, 5, cos, sin)
    assert logits.shape == (2, 50) and logits.device.type == "meta"


@pytest.mark.parametrize("fault", ["a CPU tensor", "a value", "a CPU tensor in the backward pass"])
def test_a_fault_in_a_block_is_found(fault, monkeypatch):
    """So that the tests above can fail."""
    model = random_model().to("meta")
    one = torch.ones(16)

    def wrong(module, inputs, y):
        if fault == "a value":
            return y * (2 if y.sum() > 0 else 1)
        if fault == "a CPU tensor":
            return y @ one.double().diag()
        y.register_hook(lambda d: d @ one.double().diag()) if y.requires_grad else None

    model.layers[2].feed_forward.register_forward_hook(wrong)
    with pytest.raises(AssertionError):
        first_value(lambda batches: weight_gradients(model, NAMES, batches), [random_tokens(model, 2, 9)] * 2)
