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

from attribution import layer_cosines, weight_gradients
from evaluate import perplexity
from extras import recover
from extras.baselines.patch import angular_distances
from extras.fisher.moments import second_moments
from extras.generate import empty_cache, sample, step
from grasp import compress, find_redundant
from model import matrix_names, replace, rotations
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
    "find_redundant": (lambda model, batches: find_redundant(model, lambda label: batches, 2), "finite"),
    "angular_distances": (lambda model, batches: angular_distances(model, batches, 2), "angular_distances"),
    "weight_gradients": (lambda model, batches: weight_gradients(model, NAMES, batches), "finite"),
    "perplexity": (perplexity, "perplexity"),
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
    rotary = rotations(model.args, 8, model.device)
    with OneDevice(), torch.no_grad():
        tokens = sample(step(model, prompt, cache, 0, rotary), None)[:, None]
        logits = step(model, tokens, cache, 5, rotary)
    assert logits.shape == (2, 50) and logits.device.type == "meta"


class HostAndDevice(OneDevice):
    """The CPU is the host, meta the device: a copy back to the host, which has no values, gives zeros."""
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return super().__torch_dispatch__(operation, types, args, kwargs)


def offloaded_to_the_host(dtype):
    """A model on the meta device, the matrices of its blocks, one of them low-rank, on the CPU."""
    model = random_model(dtype)
    list(compress(model, [2], lambda label: [], 0.4, score="magnitude"))
    for name, p in model.named_parameters():
        if not name.startswith("layers.") or p.ndim == 1:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(p.to("meta"), requires_grad=False))
    model.offload = True
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_offload_no_operation_mixes_devices(dtype):
    """The blocks' weights are on the host, and so are their gradients; all else is on the device."""
    model, tokens = offloaded_to_the_host(dtype), random_tokens(random_model(), 2, 9)
    with HostAndDevice():
        (c,) = layer_cosines(model, [tokens])
        with torch.no_grad():
            losses = [*model.losses(model.final_state(tokens.to("meta")), tokens.to("meta"))]
        G = weight_gradients(model, NAMES, [tokens, tokens])
    assert {t.device.type for t in (c, *losses)} == {"meta"} and {g.device.type for g in G.values()} == {"cpu"}
    assert {p.device.type for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name} == {"cpu"}


def test_without_offload_such_a_model_does_not_run():
    """So that the test above can fail."""
    model, tokens = offloaded_to_the_host(torch.float32), random_tokens(random_model(), 2, 9)
    model.offload = False
    with HostAndDevice(), pytest.raises(AssertionError, match="mixes devices"):
        list(layer_cosines(model, [tokens]))


def test_factors_go_where_the_matrix_was():
    model = offloaded_to_the_host(torch.float32)
    name = NAMES[0]
    assert model.device.type == "meta" and model.weight(name).device.type == "meta"  # where it is decomposed
    replace(model, name, torch.ones(16, 2, dtype=torch.float64), torch.ones(2, 16, dtype=torch.float64))
    factors = model.get_submodule(name)
    assert {(p.device.type, p.dtype) for p in factors.parameters()} == {("cpu", torch.float32)}


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
