"""The lesson: the peak can be computed.

The attribution sweep holds the weights, a wide sum of the gradients of the redundant layers' matrices, and what one
micro-batch needs: nothing of the one before it, and nothing of the blocks below the lowest redundant one.
`sweep_bytes` says how much that is from the sizes alone. It is compared with what torch's allocator was asked for: the
profiler writes down every request, those inside the kernels too.
"""
import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from attribution import weight_gradients
from tests.conftest import random_model, random_tokens
from data.checkpoint import load_checkpoint, save_checkpoint
from extras.bench.memory import offload_bytes, sweep_bytes
from model import MATRICES, ModelArgs, Transformer

GIB = 2 ** 30
CONTEXT = 0.5 * GIB  # of a GPU's memory, what CUDA itself takes


def sweep(model, layer_ids, batches):
    return weight_gradients(model, [f"layers.{i}.{matrix}" for i in layer_ids for matrix in MATRICES], batches)


def measured_bytes(model, layer_ids, batches, tmp_path):
    """The most bytes that the sweep had on top of the weights at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sweep(model, layer_ids, batches)
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    totals = [(event["Total Allocated"], event["Bytes"]) for event in events]  # after the event; what it added
    return max(after for after, _ in totals) - min(after - added for after, added in totals)


def grouped():
    """2 key/value heads for 8 query heads, but 8 where torch (2.5) has no flash attention for groups on the CPU."""
    q, k = (torch.zeros(1, heads, 2, 8, requires_grad=True) for heads in (8, 2))
    y = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    return 2 if "Flash" in y.grad_fn.name() else 8


TABLE = [  # dtype, key/value heads, redundant layers of 6, vocabulary, B, T
    (torch.float32, 8, [5], 1000, 1, 64),               # the peak comes with a matrix's gradient,
    (torch.float32, 8, [0], 1000, 1, 64),               # which here comes when little else is left
    (torch.float32, 8, [5], 1000, 2, 256),
    (torch.float32, grouped(), [4], 1000, 3, 128),      # with the gradients in the last block's SwiGLU
    (torch.float32, grouped(), [4], 32000, 3, 128),     # with the logits, as in all that follow
    (torch.float32, 8, [1, 3, 4], 2000, 2, 64),
    (torch.bfloat16, 8, [5], 1000, 1, 64),              # but here with a gradient's copy in fp32
    (torch.bfloat16, 8, [0], 2000, 3, 256),
    (torch.bfloat16, grouped(), [5], 2000, 2, 256),
    (torch.bfloat16, grouped(), [0, 2, 5], 2000, 2, 128),
    (torch.bfloat16, 8, [2, 3, 4, 5], 2000, 2, 64),
    (torch.bfloat16, 8, [2], 32000, 1, 256),
    (torch.bfloat16, grouped(), [1, 2, 3], 8000, 3, 64),
]


def row_model(dtype, n_kv_heads, vocab_size):
    return random_model(dtype, dim=256, n_layers=6, n_heads=8, n_kv_heads=n_kv_heads, head_dim=32, hidden_dim=1024,
                        vocab_size=vocab_size)


@pytest.mark.parametrize("dtype, n_kv_heads, layer_ids, vocab_size, B, T", TABLE)
def test_the_computed_peak_is_the_measured_one(dtype, n_kv_heads, layer_ids, vocab_size, B, T, tmp_path):
    """Within 4 % of the activations alone, the part that takes some thought: the sum is closer."""
    model = row_model(dtype, n_kv_heads, vocab_size)
    tokens, computed = random_tokens(model, B, T), sweep_bytes(model, layer_ids, B, T)
    measured = measured_bytes(model, layer_ids, [tokens], tmp_path)
    assert computed["weights"] == sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert computed["gradients"] == sum(G.nbytes for G in sweep(model, layer_ids, [tokens]).values())
    assert computed["activations"] == pytest.approx(measured - computed["gradients"], rel=0.04)


def test_each_part_is_the_largest_somewhere():
    """A table in which one of them never mattered would not hold the others to account."""
    rows = [sweep_bytes(row_model(*row[:2], row[3]), row[2], *row[4:]) for row in TABLE]
    assert {max(row, key=row.get) for row in rows} == {"weights", "gradients", "activations"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_does_not_grow_with_the_calibration_set(dtype, tmp_path):
    model = row_model(dtype, 8, 2000)
    batches = random_tokens(model, 12, 64).split(2)
    twice, often = (measured_bytes(model, [2, 4], some, tmp_path) for some in (batches[:2], batches))
    assert len(batches) == 6 and often == twice  # to the byte; the first batch alone lacks the count of tokens


# ------------------------------------------------------------------------------------------------ --offload

def offloaded(model, folder):
    """The model as it is loaded with offload; on the CPU the device is another part of the same memory."""
    save_checkpoint(model, folder)
    return load_checkpoint(folder, offload=True)


@pytest.mark.parametrize("dtype, layer_ids, vocab_size, B, T", [
    (torch.float32, [5], 1000, 2, 128), (torch.float32, [0], 500, 2, 128), (torch.float32, [1, 4], 1000, 1, 64),
    (torch.float32, [1, 4], 32000, 1, 64), (torch.bfloat16, [2, 3], 1000, 4, 128), (torch.bfloat16, [0, 1], 2000, 2, 128)])
def test_offloaded_the_graph_holds_one_block_and_the_states(dtype, layer_ids, vocab_size, B, T, tmp_path):
    model = offloaded(row_model(dtype, 8, vocab_size), tmp_path / "model")
    tokens, computed = random_tokens(model, B, T), offload_bytes(model, layer_ids, B, T)
    on_the_host = sum(G.nbytes for G in sweep(model, layer_ids, [tokens]).values())
    measured = measured_bytes(model, layer_ids, [tokens], tmp_path) - on_the_host
    outside = sum(p.nbytes for name, p in model.named_parameters() if not (name.startswith("layers.") and p.ndim == 2))
    assert measured == pytest.approx(computed["device"] - outside, rel=0.1)


def test_offloaded_another_layer_costs_its_state_alone(tmp_path):
    """Of 4 * dim bytes a token; whole, it would cost the activations of a block."""
    peaks, whole = [], []
    for n_layers in (4, 8):
        model = random_model(torch.float32, dim=64, n_layers=n_layers, n_heads=4, n_kv_heads=4, head_dim=16, hidden_dim=256)
        tokens = random_tokens(model, 4, 64)
        whole.append(measured_bytes(model, [0], [tokens], tmp_path))
        peaks.append(measured_bytes(offloaded(model, tmp_path / str(n_layers)), [0], [tokens], tmp_path))
    assert (peaks[1] - peaks[0]) / (4 * 4 * 64 * tokens.numel()) == pytest.approx(1, rel=0.1)
    assert whole[1] - whole[0] > 10 * (peaks[1] - peaks[0])


# ------------------------------------------------------------------------------------------------ models of real size

LLAMA_2_7B = ModelArgs(4096, 32, 32, 32, 128, 11008, 32000, 1e-5)
LLAMA_3_8B = ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 1e-5)
LLAMA_2_13B = ModelArgs(5120, 40, 40, 40, 128, 13824, 32000, 1e-5)


def computed_bytes(args, lowest, B, T=512):
    """The peak for seven neighbouring layers in bf16; a model on the meta device has sizes and no memory."""
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
    return sum(sweep_bytes(model, range(lowest, lowest + 7), B, T).values())


@pytest.mark.parametrize("args, lowest, gpu", [(LLAMA_2_7B, 21, 24 * GIB), (LLAMA_3_8B, 21, 24 * GIB),
                                               (LLAMA_2_13B, 26, 40e9)])
def test_seven_layers_fit_with_1024_tokens(args, lowest, gpu):
    assert computed_bytes(args, lowest, B=2) < gpu - CONTEXT


def test_where_the_lowest_layer_lies_decides():
    """Autograd keeps every block from it up: from the first one on, 8B needs a smaller micro-batch, 13B another GPU."""
    assert computed_bytes(LLAMA_2_7B, 0, B=2) < 24 * GIB - CONTEXT < computed_bytes(LLAMA_3_8B, 0, B=2)
    assert computed_bytes(LLAMA_3_8B, 0, B=1) < 24 * GIB - CONTEXT
    assert computed_bytes(LLAMA_2_13B, 0, B=2) > 40e9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peaks_as_computed():
    """Large enough (2 GiB) for cuBLAS's workspace not to matter."""
    with torch.device("cuda"):
        model = random_model(torch.bfloat16, dim=2048, n_layers=8, n_heads=16, n_kv_heads=4, head_dim=128,
                             hidden_dim=5632, vocab_size=32000)
    computed, others = sweep_bytes(model, [3, 6], 2, 512), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sweep(model, [3, 6], [random_tokens(model, 2, 512)])
    peak = torch.cuda.max_memory_allocated() - others + computed["weights"]
    assert sum(computed.values()) == pytest.approx(peak, rel=0.1)
