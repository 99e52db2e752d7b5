"""A LLaMA in plain PyTorch, and its folders of weights: read (Meta, Mistral, Hugging Face) and written (Meta).

Nothing here knows the method. The names are Meta's, every linear layer is y = W x without bias, W (out, in):

    dim, hidden_dim       width of the residual stream, of the feed-forward
    n_heads, n_kv_heads   query heads; key/value heads, each shared by n_heads / n_kv_heads query heads
    wq wk wv wo           attention projections;  w1 gate, w3 up, w2 down:  w2(silu(w1 x) * w3 x)
    h                     residual stream (B, T, dim): B sequences, T tokens
"""
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import processes
from data.checkpoint import gather, pair_rows, read_folder, whole_storage
from data.target import check_target, written_whole

# the seven weight matrices of a block; with "layers.22." before it, a name means one of the model's
MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


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
    rope_scaling: dict | None = None  # Llama 3.1 and later: factor, low_freq_factor, high_freq_factor, original_...
    max_seq_len: int | None = None    # None: the folder does not say


def upcast(x):
    """x in fp32 at least: half precisions are widened, fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finite(t):
    """Whether no entry of t is NaN or infinite; no second tensor of its size is made."""
    return not t.numel() or all(end.isfinite() for end in t.aminmax())  # NaN is both its ends


class CrossEntropy(torch.autograd.Function):
    """Summed negative log-likelihood (nats) of targets (N,) under logits (N, vocab); a target of -100 does not count.

    Its gradient softmax(logits) - onehot(target) overwrites what the forward pass kept: one (N, vocab), not three.
    """
    @staticmethod
    def forward(ctx, logits, targets):
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p, targets)
        return F.nll_loss(log_p, targets, reduction="sum", ignore_index=-100)

    @staticmethod
    def backward(ctx, grad):
        log_p, targets = ctx.saved_tensors
        p, counts, ours = log_p.exp_(), grad * (targets != -100), targets.clamp(min=0)[:, None]
        p.scatter_add_(1, ours, p.new_full(ours.shape, -1))
        return p.mul_(counts[:, None]), None


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension [arXiv 1910.07467]."""
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = upcast(x)
        square = wide.pow(2).mean(-1, keepdim=True) + self.eps
        square = square + (square - square)  # if it overflows NaN, which is seen and refused, where rsqrt would give 0
        return (wide * torch.rsqrt(square)).type_as(x) * self.weight


class LowRankLinear(nn.Module):
    """y = A (B x), with A (m, k) and B (k, n): what stands in for a dense W (m, n)."""
    def __init__(self, A, B):
        super().__init__()
        self.A, self.B = (nn.Parameter(factor, requires_grad=False) for factor in (A, B))

    def forward(self, x):
        return F.linear(F.linear(x, self.B), self.A)


def rotary_frequencies(args, T, device):
    """cos and sin of the rotary angles of positions 0..T-1, each (T, 1, head_dim / 2), fp32 [arXiv 2104.09864]."""
    freqs = args.rope_theta ** (-torch.arange(0, args.head_dim, 2, device=device).float() / args.head_dim)
    if args.rope_scaling:  # Llama 3.1: slow the long waves, keep the short ones, blend between
        s = args.rope_scaling
        turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)  # full turns within the first context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s["factor"]
    angles = torch.outer(torch.arange(T, device=device).float(), freqs)[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """Turn the pairs (2i, 2i+1) of x (B, T, heads, head_dim) by their angles."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal attention (B, T, dim) -> (B, T, dim); groups of query heads share a key/value head [arXiv 2305.13245]."""
    def __init__(self, args):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, heads, hd)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                          # (B, heads, T, hd)
        y = (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) if len(x) else
             q * (k.sum() + v.sum()))  # of no sequences, which CUDA's attention refuses before torch 2.10
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
    def __init__(self, args, tied=False):
        super().__init__()
        self.args = args
        empty = torch.empty(args.vocab_size, args.dim)  # to draw it on the meta device, torch would import sympy: 1.3 s
        self.tok_embeddings = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def residual_stream(self, tokens):
        """Yield h_0 (the embeddings), then h_{l+1} after each block l: n_layers + 1 states (B, T, dim).

        tokens (B, T) int64. The last state is the one BEFORE the final norm. ValueError if T is over max_seq_len.
        """
        T, limit = tokens.shape[1], self.args.max_seq_len
        if limit and T > limit:
            raise ValueError(f"sequences of {T} tokens, but this model's positions end at {limit}")
        cos, sin = rotary_frequencies(self.args, T, tokens.device)
        h = self.tok_embeddings(tokens)
        yield h
        for block in self.layers:
            h = block(h, cos, sin)
            yield h

    def final_state(self, tokens):
        """The residual stream after the last block, before the final norm: (B, T, dim)."""
        for h in self.residual_stream(tokens):
            pass
        return h

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, vocab_size)."""
        return self.output(self.norm(self.final_state(tokens)))

    def losses(self, h, tokens):
        """Yield the SUMMED negative log-likelihood (nats) of the next tokens, head_chunk positions at a time.

        h (B, T, dim) is the final state of tokens (B, T), of which those that read -100 here are not predicted.
        The (B, T, vocab) logits never exist at once; half-precision ones are widened, and gone before their logarithms.
        """
        h, targets = h[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()  # the one shift: position t predicts t + 1
        for h_part, target in zip(h.split(self.head_chunk), targets.split(self.head_chunk)):
            yield CrossEntropy.apply(upcast(self.output(self.norm(h_part))), target)

    def replace_matrix(self, name, module):
        """Put `module` where the linear layer `name` ("layers.22.attention.wq") stands; return the old one."""
        parent, _, leaf = name.rpartition(".")
        old = self.get_submodule(name)
        setattr(self.get_submodule(parent), leaf, module)
        return old

    @property
    def head_chunk(self):
        """How many positions' logits exist at once: on the CPU they stay in the cache (24 MiB in fp32)."""
        return max(1, (6 if self.device.type == "cpu" else 64) * 2 ** 20 // self.args.vocab_size)

    @property
    def n_params(self):
        return sum(p.numel() for p in self.parameters())  # tied embeddings are one parameter

    @property
    def n_params_dense(self):
        """The parameters of the dense model that a compressed one stands for."""
        with torch.device("meta"):
            return Transformer(self.args, self.output.weight is self.tok_embeddings.weight).n_params

    @property
    def device(self):
        return self.tok_embeddings.weight.device

    @property
    def dtype(self):
        return self.tok_embeddings.weight.dtype


def load_checkpoint(path, dtype=None, device="cpu", shard=False):
    """Read a folder of weights into a Transformer whose parameters ask for no gradient.

    path: Meta's or Mistral's raw folder (params.json + consolidated.*), a Hugging Face one (config.json +
    *.safetensors), or a compressed one. dtype None keeps the folder's own; on the CPU the weights then stay
    memory-mapped. shard: of each block's matrices only this process's rows are read and held (torchrun).
    FileNotFoundError, ValueError: the file or tensor, what was found and what was expected.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: " + ("a file, expected a folder" if folder.exists() else "no such folder"))
    fields, ranks, shards, halves = read_folder(folder)
    args = ModelArgs(**fields)
    found = sum(name.endswith(".attention_norm.weight") for name in shards[0])
    if found != args.n_layers:  # seen before a model of any size is built
        raise ValueError(f"{folder}: weights of {found} layers, expected {args.n_layers}")
    wrong = set(ranks) - {f"layers.{i}.{part}" for i in range(args.n_layers) for part in (*MATRICES, "feed_forward")}
    if wrong:
        raise ValueError(f"{folder}: ranks names {min(wrong)}, which this model does not have")
    embedding, heads = shards[0]["tok_embeddings.weight"], [shard.get("output.weight") for shard in shards]
    tied = all(head is None for head in heads) or len(shards) == 1 and torch.equal(heads[0], embedding)
    try:
        with torch.device("meta"):
            model = Transformer(args, tied)
            for name, k in sorted(ranks.items()):  # a feed-forward, whose rank is its channels, before its matrices
                if name.endswith("feed_forward"):
                    model.replace_matrix(name, FeedForward(replace(args, hidden_dim=k)))
                else:
                    m, n = model.get_submodule(name).weight.shape
                    model.replace_matrix(name, LowRankLinear(torch.empty(m, k), torch.empty(k, n)))
    except (RuntimeError, TypeError):  # sizes whose product no tensor can have
        raise ValueError(f"{folder}: no model can be of these sizes: {args}") from None
    if shard:
        processes.shard([linear for linear in model.layers.modules() if isinstance(linear, nn.Linear)], device,
                        dtype or embedding.dtype)
    return fill(model, shards, folder, halves, dtype or embedding.dtype, device)


def fill(model, shards, folder, halves, dtype, device):
    """Give every parameter of the meta model its tensor, one after the other; tied embeddings are one."""
    tied = model.output.weight is model.tok_embeddings.weight
    places = dict(model.named_parameters())
    known = {*places, "rope.freqs", *(["output.weight"] if tied else [])}
    extra = sorted(name for shard in shards for name in shard if name not in known and "rotary_emb.inv" not in name)
    if extra:
        raise ValueError(f"{folder}: tensor {extra[0]} is not one of this model's ({len(extra)} such)")
    for name, place in places.items():
        tensor = gather([shard.get(name) for shard in shards], name, place.shape, folder)
        if halves and name.endswith(("wq.weight", "wk.weight")):
            tensor = pair_rows(tensor, model.args.head_dim)
        tensor = processes.placed(tensor, place, device, dtype)
        if not finite(processes.own(tensor)):
            raise ValueError(f"{folder}: tensor {name} holds NaN or infinite values in {dtype}")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def save_checkpoint(model, path, report=None, tokenizer=None, overwrite=False):
    """Write `model` as Meta's layout: params.json (with the ranks), consolidated.00.pth, tokenizer, report.json.

    report: a dict; tokenizer: a file to copy. Whole or not at all: FileExistsError unless overwrite, OSError (disk
    full, read-only), and ValueError for weights that load_checkpoint would refuse, with `path` as it was before.
    """
    ranks = {name: m.A.shape[1] for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    mlps = {name: [*m.w2.parameters()][-1] for name, m in model.named_modules() if isinstance(m, FeedForward)}
    ranks.update({name: w.shape[1] for name, w in mlps.items() if w.shape[1] < model.args.hidden_dim})  # w2 or its B
    weights = {name: whole_storage(p) for name, p in model.named_parameters()}
    if processes.rank():
        return
    check_target(path, overwrite)
    for name, tensor in weights.items():
        if not finite(tensor):
            raise ValueError(f"{path}: not written, {name} holds NaN or infinite values in {tensor.dtype}")
    with written_whole(path) as folder:
        folder.mkdir()
        torch.save(weights, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps({**asdict(model.args), "ranks": ranks}, indent=1) + "\n")
        if report:
            (folder / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        if tokenizer:
            shutil.copyfile(tokenizer, folder / Path(tokenizer).name)
