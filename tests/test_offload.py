"""The lesson: a model whose blocks are copied to the device one at a time is the same model.

Here the device is the CPU itself: the copies are other memory, and all else runs as it does on a GPU.
"""
import pytest
import torch

import evaluate
import grasp
from attribution import layer_cosines, weight_gradients
from tests.conftest import error_of, random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from evaluate import perplexity
from extras.bench import SHAPES, meta_model
from extras.bench.memory import offload_bytes
from grasp import compress, find_redundant
from model import Transformer, matrix_names
from runtime import cli

GIB = 2 ** 30


@pytest.fixture(params=["dense", "compressed"])
def pair(request, tmp_path):
    """(a model, the same one offloaded). 12 of the matrices of the compressed one are low-rank."""
    model = random_model(torch.float32, dim=32, head_dim=8, hidden_dim=56)
    if request.param == "compressed":
        list(compress(model, [0, 2], lambda label: [], 0.4, score="magnitude"))
    save_checkpoint(model, tmp_path / "model")
    return load_checkpoint(tmp_path / "model"), load_checkpoint(tmp_path / "model", offload=True)


def test_cosines_gradients_and_perplexity_are_the_same(pair):
    (model, offloaded), names = pair, matrix_names(1, 3)
    batches = random_tokens(model, 5, 12).split(2)
    assert offloaded.offload and not model.offload
    for c, expected in zip(layer_cosines(offloaded, batches), layer_cosines(model, batches), strict=True):
        torch.testing.assert_close(c, expected)
    assert perplexity(offloaded, batches) == pytest.approx(perplexity(model, batches), rel=1e-6)
    G = weight_gradients(model, names, batches)
    for name, found in weight_gradients(offloaded, names, batches).items():
        torch.testing.assert_close(found, G[name], rtol=1e-5, atol=1e-5 * float(G[name].abs().max()))
    assert not any(p.requires_grad or p.grad is not None for p in offloaded.parameters())


@pytest.mark.parametrize("iterative", [False, True])
def test_the_same_bytes_are_written(iterative, tmp_path):
    """The same operations on the same numbers, in another place of memory."""
    for name, offload in (("whole", False), ("offloaded", True)):
        model = load_checkpoint(cli.TINY, offload=offload)
        sweep = random_tokens(model, 6, 64).split
        c, redundant = find_redundant(model, lambda label: sweep(2), 2)
        list(compress(model, redundant, lambda label: sweep(2), 0.1, iterative=iterative))
        save_checkpoint(model, tmp_path / name)
    whole, offloaded = ((tmp_path / name / "consolidated.00.pth").read_bytes() for name in ("whole", "offloaded"))
    assert whole == offloaded


def test_a_block_has_copies_of_its_own_for_each_call(monkeypatch):
    """Once in the forward pass and once more for the gradients; only where a gradient is asked for."""
    model, made = random_model(), []
    model.offload = True
    to = torch.Tensor.to

    def watched(t, *where, **how):
        if how.get("copy"):
            made.append(t.data_ptr())
        return to(t, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    weight_gradients(model, matrix_names(2), [random_tokens(model, 2, 7)])
    blocks = [[made.count(p.data_ptr()) for p in block.parameters()] for block in model.layers]
    assert blocks == [[1] * 9, [1] * 9, [2] * 9, [2] * 9]


def test_micro_batches_are_larger_for_each_costs_a_pass_over_the_bus():
    for name in ("llama2-7b", "llama2-13b", "codellama-34b", "llama3-70b"):
        model = meta_model(SHAPES[name], torch.bfloat16)
        model.offload = True
        outside = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
        for card in (24, 48, 80):
            B = cli.fitting(model, 512, 7, card * GIB - outside)
            assert 4096 <= B * 512 <= 32768 and (card < 80 or B * 512 > 8192)
            for layers in (range(7), range(model.args.n_layers - 7, model.args.n_layers), [0, model.args.n_layers - 1]):
                assert offload_bytes(model, layers, B, 512)["device"] <= card * GIB


@pytest.mark.parametrize("command", ["grasp", "evaluate"])
def test_out_of_memory_names_offload(command, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Transformer, "residual_stream", full)
    main, words = (grasp.main, "--layers 2 --samples 2") if command == "grasp" else (evaluate.main, "")
    assert "--offload" in error_of(main, words, monkeypatch, capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_blocks_stay_in_host_memory(tmp_path):
    model = random_model(torch.float32, dim=64, head_dim=16, hidden_dim=256)
    save_checkpoint(model, tmp_path / "model")
    tokens, names = random_tokens(model, 4, 32), matrix_names(1, 3)
    whole, offloaded = (load_checkpoint(tmp_path / "model", device="cuda", offload=offload) for offload in (False, True))
    assert offloaded.device.type == "cuda" and offloaded.layers[0].attention.wq.weight.device.type == "cpu"
    assert perplexity(offloaded, [tokens]) == pytest.approx(perplexity(whole, [tokens]), rel=1e-5)
    G = weight_gradients(whole, names, [tokens])
    for name, found in weight_gradients(offloaded, names, [tokens]).items():
        assert found.device.type == "cpu" and (found - G[name].cpu()).norm() < 1e-4 * G[name].norm().cpu()
    kept, expected = ([record["kept"] for record in compress(m, [1, 3], lambda label: [tokens], 0.4)]
                      for m in (offloaded, whole))
    assert kept == expected and {p.device.type for p in offloaded.layers[1].attention.wq.parameters()} == {"cpu"}
