"""A LLaMA in plain PyTorch, with Meta's names. Every linear layer is y = W x without bias, W (out, in).

    dim, hidden_dim       width of the residual stream, of the feed-forward
    n_heads, n_kv_heads   query heads; key/value heads, each shared by n_heads / n_kv_heads query heads
    wq wk wv wo           attention projections;  w1 gate, w3 up, w2 down:  w2(silu(w1 x) * w3 x)
    h                     residual stream (B, T, dim): B sequences, T tokens
"""
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.checkpoint import gather, read_folder, write_folder
from runtime import distributed
from runtime.files import error_prefix

MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
SMALL, THREADS = 10 ** 7, torch.get_num_threads()  # a model of fewer parameters is faster on one thread


def matrix_names(*layer_ids: int) -> list[str]:
    """The names of these layers' matrices, seven each: "layers.22.attention.wq" ..."""
    return [f"layers.{layer}.{matrix}" for layer in layer_ids for matrix in MATRICES]


@dataclass
class ModelArgs:
    """Hyper-parameters, under the names of Meta's and Mistral's params.json."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1 and later: factor, low_freq_factor, high_freq_factor ...
    max_seq_len: int | None = None    # None: the folder does not say


def upcast(x: Tensor) -> Tensor:
    """x in fp32 at least: half precision is widened, fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finite(t: Tensor) -> bool:
    """Whether no entry of t is NaN or infinite. Allocates nothing of t's size."""
    return not t.numel() or all(end.isfinite() for end in t.aminmax())  # a NaN makes both ends NaN


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight; x fp32 at least, the result in weight's dtype [arXiv 1910.07467]."""
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, eps=self.eps).type_as(self.weight) * self.weight


class LowRankLinear(nn.Module):
    """y = A (B x), with A (m, k) and B (k, n), in the place of a dense W (m, n)."""
    def __init__(self, A, B):
        super().__init__()
        self.A, self.B = (nn.Parameter(factor, requires_grad=False) for factor in (A, B))

    def forward(self, x):
        return F.linear(F.linear(x, self.B), self.A)


def rotary_frequencies(args: ModelArgs, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of positions 0..T-1, each (T, 1, head_dim / 2), fp32 [arXiv 2104.09864]."""
    freqs = args.rope_theta ** (-torch.arange(0, args.head_dim, 2, device=device).float() / args.head_dim)
    if args.rope_scaling:  # Llama 3.1: divide low frequencies, keep high ones, blend between
        s = args.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = torch.outer(torch.arange(T, device=device).float(), freqs)[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x (B, T, heads, head_dim) by their angles."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def repeats_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether CUDA has no fused kernel for fewer key/value heads than query heads (docs/numerics.md)."""
    return device.type == "cuda" and not (
        dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0))


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """Attention of q (B, n_heads, T, head_dim) to k, v (B, n_kv_heads, T', head_dim): the shape of q."""
    if q.shape[1] > k.shape[1] and repeats_heads(q.device, q.dtype):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


class Attention(nn.Module):
    """Causal attention with grouped queries, (B, T, dim) -> (B, T, dim) [arXiv 2305.13245]."""
    def __init__(self, args):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk, self.wv = (nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False) for _ in "kv")
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)  # (B, T, heads, head_dim)
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)))          # (B, n_heads, T, head_dim)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU [arXiv 2002.05202], (B, T, dim) -> (B, T, dim)."""
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.attention_norm = Attention(args), RMSNorm(args.dim, args.norm_eps)
        self.feed_forward, self.ffn_norm = FeedForward(args), RMSNorm(args.dim, args.norm_eps)

    def forward(self, h, cos, sin):
        h = h + self.attention(self.attention_norm(h), cos, sin)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs, tied: bool = False):
        super().__init__()
        self.args = args
        empty = torch.empty(args.vocab_size, args.dim)  # its random init on meta imports sympy: 1.5 s
        self.tok_embeddings = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def residual_stream(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield h_0 (the embeddings), then h_{l+1} after each block l: n_layers + 1 states (B, T, dim), fp32.

        tokens: (B, T) int64. The last state is not normalised yet. Raises ValueError if T > max_seq_len.
        """
        T, limit = tokens.shape[1], self.args.max_seq_len
        if limit and T > limit:
            raise ValueError(f"sequences of {T} tokens, but this model's positions end at {limit}")
        cos, sin = rotary_frequencies(self.args, T, tokens.device)
        h = upcast(self.tok_embeddings(tokens))  # in half precision many small sums would be lost
        yield h
        for block in self.layers:
            h = block(h, cos, sin)
            yield h

    def final_state(self, tokens: Tensor) -> Tensor:
        """The residual stream after the last block, before the final norm: (B, T, dim)."""
        for h in self.residual_stream(tokens):
            pass
        return h

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, vocab_size)."""
        return self.output(self.norm(self.final_state(tokens)))

    def losses(self, h: Tensor, labels: Tensor, shift: int = 1) -> Iterator[Tensor]:
        """Yield the summed negative log-likelihood (nats) of the next tokens, head_chunk positions at a time.

        h: (B, T, dim), the final state. labels: (B, T), the tokens; positions set to -100 are not predicted.
        """
        h, labels = h[:, :-shift].flatten(0, 1), labels[:, shift:].flatten()  # position t predicts t + shift
        for h_part, label in zip(h.split(self.head_chunk), labels.split(self.head_chunk)):
            yield F.cross_entropy(upcast(self.output(self.norm(h_part))), label,  # logits are freed at once
                                  ignore_index=-100, reduction="sum")

    @property
    def head_chunk(self) -> int:
        """How many positions' logits exist at once: 24 MiB in fp32 on the CPU, 168 MiB on CUDA."""
        return max(1, (6 if self.device.type == "cpu" else 42) * 2 ** 20 // self.args.vocab_size)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())  # tied embeddings are one parameter

    @property
    def n_params_dense(self) -> int:
        """The parameters of the dense model with these hyper-parameters."""
        return empty_model(self.args, self.output.weight is self.tok_embeddings.weight, {}).n_params

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype


def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu",
                    split: bool = False) -> Transformer:
    """Read a checkpoint folder of any kind (data/checkpoint.py). No parameter requires a gradient.

    dtype: None keeps the folder's own; on the CPU the weights then stay memory-mapped. split: each process
    holds only its rows of the blocks' matrices (torchrun). Sets torch's number of threads: 1 for a small
    model. Raises FileNotFoundError and ValueError: the file or tensor, what was found and what was expected.
    """
    fields, ranks, shards, hugging_face = read_folder(Path(path))
    dtype = dtype or shards[0]["tok_embeddings.weight"].dtype
    with error_prefix(path):
        model = empty_model(ModelArgs(**fields), "output.weight" not in shards[0], ranks)
        if split:
            distributed.split_linears(model.layers, device, dtype)
        parameters = dict(model.named_parameters())
        if unknown := {name for shard in shards for name in shard} - {*parameters}:
            raise ValueError(f"tensor {min(unknown)} is not one of this model's ({len(unknown)} such)")
        for name, parameter in parameters.items():
            tensor = gather(shards, name, parameter.shape, model.args.head_dim if hugging_face else None)
            tensor = distributed.place(tensor, parameter, device, dtype)
            if not finite(distributed.local(tensor)):
                raise ValueError(f"tensor {name} holds NaN or infinite values in {dtype}")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    if "output.weight" not in parameters:
        model.output.weight = model.tok_embeddings.weight
    torch.set_num_threads(1 if model.n_params < SMALL else THREADS)
    return model


def empty_model(args: ModelArgs, tied: bool, ranks: dict[str, int]) -> Transformer:
    """A model on the meta device, with low-rank matrices and narrower feed-forwards as `ranks` says."""
    with torch.device("meta"):
        model = Transformer(args, tied)
        for name, k in sorted(ranks.items()):  # a feed-forward comes before its matrices
            with error_prefix(f"ranks, {name}"):
                if name.endswith("feed_forward"):
                    model.set_submodule(name, FeedForward(replace(args, hidden_dim=k)))
                else:
                    m, n = model.get_submodule(name).weight.shape
                    model.set_submodule(name, LowRankLinear(torch.empty(m, k), torch.empty(k, n)))
    return model


def save_checkpoint(model: Transformer, path: str | Path, report: dict | None = None,
                    tokenizer: dict[str, bytes] | None = None, overwrite: bool = False) -> None:
    """Write `model` in Meta's layout, atomically. report: for report.json. tokenizer: its files.

    Raises FileExistsError unless overwrite, OSError or ValueError if a file cannot be written, and ValueError
    for weights that are not finite, or that load_checkpoint could not read.
    """
    ranks = {name: m.A.shape[1] for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    widths = {name: [*m.w2.parameters()][-1].shape[1]  # of w2, or of its factor B
              for name, m in model.named_modules() if isinstance(m, FeedForward)}
    ranks |= {name: width for name, width in widths.items() if width < model.args.hidden_dim}
    tied, weights = model.output.weight is model.tok_embeddings.weight, {}
    with error_prefix(f"{path}: not written"):
        readable = {name: p.shape for name, p in empty_model(model.args, tied, ranks).named_parameters()}
        if wrong := {*readable.items()} ^ {(name, p.shape) for name, p in model.named_parameters()}:
            raise ValueError("no folder can hold this model, e.g. tensor {} of {}".format(*min(wrong)))
    for name, p in model.named_parameters():
        tensor = distributed.whole(p.detach())  # needs every process, but only process 0 keeps it
        if not finite(tensor):
            raise ValueError(f"{path}: not written, {name} holds NaN or infinite values in {tensor.dtype}")
        if not distributed.index():
            weights[name] = tensor.cpu()
    if not distributed.index():
        write_folder(path, {**asdict(model.args), "ranks": ranks}, weights, report, tokenizer, overwrite)
