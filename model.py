"""A LLaMA in plain PyTorch, with Meta's names. This file imports nothing of the project.

Every linear layer is y = W x without bias, W (out, in).

    dim, hidden_dim       width of the residual stream, of the feed-forward
    n_heads, n_kv_heads   query heads; key/value heads, each shared by n_heads / n_kv_heads query heads
    wq wk wv wo           attention projections;  w1 gate, w3 up, w2 down:  w2(silu(w1 x) * w3 x)
    h                     residual stream (B, T, dim): B sequences, T tokens
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


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


def rotations(args: ModelArgs, T: int, device: torch.device) -> Tensor:
    """exp(i * angle) of positions 0..T-1: (T, 1, head_dim / 2) complex64 [arXiv 2104.09864]."""
    freqs = args.rope_theta ** (-torch.arange(0, args.head_dim, 2, device=device).float() / args.head_dim)
    if args.rope_scaling:  # Llama 3.1: divide low frequencies, keep high ones, blend between
        s = args.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = torch.outer(torch.arange(T, device=device).float(), freqs)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x (B, T, heads, head_dim), as complex numbers, by `rotations`."""
    pairs = torch.view_as_complex(upcast(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)


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

    def forward(self, x, rotary):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)  # (B, T, heads, head_dim)
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)))      # (B, n_heads, T, head_dim)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU [arXiv 2002.05202], (B, T, dim) -> (B, T, dim)."""
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    @property
    def width(self) -> int:
        return [*self.w2.parameters()][-1].shape[1]  # columns of w2, or of its factor B

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.attention_norm = Attention(args), RMSNorm(args.dim, args.norm_eps)
        self.feed_forward, self.ffn_norm = FeedForward(args), RMSNorm(args.dim, args.norm_eps)

    def forward(self, h, rotary):
        h = h + self.attention(self.attention_norm(h), rotary)
        return h + self.feed_forward(self.ffn_norm(h))


def run_with_copies(block: Block, h: Tensor, rotary: Tensor) -> Tensor:
    """block(h, rotary), where the block's weights may lie in host memory (`--offload`).

    It runs with copies on h's device that live for this call alone. Autograd keeps only h: the backward pass
    makes the copies again, and the gradients go to where the weights lie.
    """
    def run(block, h, rotary):  # inside the checkpoint, or the backward pass would find other parameters
        copies = {name: p.to(h.device, copy=True) for name, p in block.named_parameters()}
        return torch.func.functional_call(block, copies, (h, rotary))

    return checkpoint(run, block, h, rotary, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs, tied: bool = False):
        super().__init__()
        self.args, self.offload = args, False  # offload: the blocks' matrices are in host memory
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
        rotary = rotations(self.args, T, tokens.device)
        h = upcast(self.tok_embeddings(tokens))  # in half precision many small sums would be lost
        yield h
        for block in self.layers:
            h = run_with_copies(block, h, rotary) if self.offload else block(h, rotary)
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

    def weight(self, name: str) -> Tensor:
        """W (m, n) of a dense matrix, on the model's device."""
        return self.get_submodule(name).weight.detach().to(self.device)

    @property
    def tied(self) -> bool:
        return self.output.weight is self.tok_embeddings.weight  # one parameter, counted and written once

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def n_params_dense(self) -> int:
        with torch.device("meta"):  # the dense model with these hyper-parameters
            return Transformer(self.args, self.tied).n_params

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype


def replace(model: Transformer, name: str, A: Tensor, B: Tensor) -> None:
    """Put y = A (B x) in the place of a dense matrix, in its dtype and where it lay. A (m, k), B (k, n)."""
    W = model.get_submodule(name).weight
    model.set_submodule(name, LowRankLinear(A.to(W), B.to(W)))
