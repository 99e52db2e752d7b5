"""Seconds and memory of every phase of the method, beside the least that arithmetic allows.

    python -m extras.bench --ckpt FOLDER --layers 7 --ratio 0.1
    python -m extras.bench --shape llama2-7b --device cuda --samples 512 --seq-len 512 --layers 7 --ratio 0.1

The weights are a folder's, and the tokens those of grasp.py; or both are random, of a known model's shape.

    sweep       all calibration tokens through the model, in micro-batches of B sequences of T tokens
    operations  floating-point operations that a sweep cannot do without: its matrix products and attention's own
    rate        operations a second of one large matrix product, same dtype and device: the best of many in this run
    floor       operations / rate; of SVD and scores the bare torch.linalg.svd of the same matrices, in fp32
    turn        all phases and their floors once, side by side; of --repeats turns each phase's and floor's best counts
    peak        of a turn before those; CUDA: allocated, CPU: resident beyond what was before the model was there
    computed    what the attribution sweep's peak should be, by sweep_bytes

--autograd adds the algorithm as published, an independent check: each half of a block has a sweep of its own, in
which autograd differentiates the singular values. --svd compares ways to the same decompositions; alone, only
those. --growth shows, on random models, whether seconds over floor stay while tokens, layers and width grow.
--memory only computes what the known shapes need, without and with grasp.py's --offload. --report FILE measures
everything that a GPU is for, once.
"""
import torch

from evaluate import markdown
from model import ModelArgs, Transformer

SHAPES = {  # dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, whether the embeddings are tied
    "llama2-7b": (4096, 32, 32, 32, 11008, 32000, False), "llama3-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama2-13b": (5120, 40, 40, 40, 13824, 32000, False), "codellama-34b": (8192, 48, 64, 8, 22016, 32000, False),
    "llama3-70b": (8192, 80, 64, 8, 28672, 128256, False),
    "tinyllama-1.1b": (2048, 22, 32, 4, 5632, 32000, False), "smollm2-135m": (576, 30, 9, 3, 1536, 49152, True)}
SEED = 0  # of random weights and tokens
GIB = 2 ** 30


def random_weights(shape, dtype, device):
    """A model whose matrices are normal, of deviation 0.02, made where it is to be; it asks for no gradient."""
    model = meta_model(shape, dtype).to_empty(device=device)
    if shape[-1]:  # tied, of which to_empty has made two
        model.output.weight = model.tok_embeddings.weight
    torch.manual_seed(SEED)
    for p in model.parameters():
        p.fill_(1) if p.ndim == 1 else p.normal_(std=0.02)
    return model


def meta_model(shape, dtype):
    """A model that has shapes, dtype and no weights."""
    dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, tied = shape
    args = ModelArgs(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, hidden_dim, vocab_size, norm_eps=1e-5)
    with torch.device("meta"):
        return Transformer(args, tied).to(dtype).requires_grad_(False)


def show(rows):
    """Rows {head: text, whole number, figure or None} as a Markdown table."""
    ways = {str: "{}", int: "{:,}", float: "{:.2f}", type(None): "-"}
    return markdown([*rows[0]], [[ways[type(value)].format(value) for value in row.values()] for row in rows])
