"""A baseline with training: a small network learns what a run of blocks did, and takes its place.

    name        streamline
    paper       LLM-Streamline, arXiv 2403.19135
    equation    the run whose ends have the highest cosine goes; |network(h_i) - h_j|^2 is minimised
    liberties   the network's form and its training, see `streamline`

    h <- h + w2(silu(w1 norm(h)) * w3 norm(h))     the network: a block without its attention, `width` channels

The network sees one token at a time, so training needs only the residual stream before the run (x) and after it (y).
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from extras.baselines import block_params
from extras.baselines.patch import run_cosines, run_ends
from extras.controls import drop_layers
from extras.recover import learning_rate
from model import FeedForward, RMSNorm
from runtime.cli import show


class HalfBlock(nn.Module):
    """h + FFN(norm(h)), (B, T, dim) -> (B, T, dim). It starts as the identity: w2 = 0."""
    def __init__(self, args, generator):
        super().__init__()
        self.feed_forward, self.ffn_norm = FeedForward(args), RMSNorm(args.dim, args.norm_eps)
        for w in (self.feed_forward.w1, self.feed_forward.w3):
            nn.init.normal_(w.weight, std=args.dim ** -0.5, generator=generator)
        nn.init.zeros_(self.feed_forward.w2.weight)

    def forward(self, h, cos=None, sin=None):
        return h + self.feed_forward(self.ffn_norm(h))


def streamline(model, sweep, budget, steps=512, batch=1024, peak=1e-3, seed=0):
    """LLM-Streamline with a feed-forward network, trained by MSE [arXiv 2403.19135].

    The run of N blocks whose ends have the highest cosine goes. N is the smallest number that leaves room for a network
    as wide as the residual stream at least, and the width is what then meets the budget to less than 3 dim parameters.
    `steps` updates of AdamW on the mean squared error of h_j, each on `batch` random tokens of the calibration set:
    weight decay 1e-3, gradients clipped at 5, `learning_rate` with its `peak`, fp32 at least. The states before and
    after the run are kept for the whole calibration set, in main memory and the model's dtype (twice, while joined).

    Liberties: the paper has a two-layer ReLU network 4 dim wide without norm and residual, a SwiGLU of the model's
    width and a whole block, which starts as the run's first; ours has the form of the block's second half, starts as
    the identity, and its width is free. Its code trains on far more text, at a rate of 2e-4 with cosine decay, and
    keeps what validates best; here the text is every method's calibration set, the rate is higher, its decay linear.
    Its last hidden state is the one after the final norm (ours before), and AdamW's betas are PyTorch's.
    args.n_layers counts the blocks, not what stands in for the run.
    """
    n, width = run_and_width(model, budget)
    i = int(run_cosines(model, sweep("cosines of runs"), n).argmax())
    x, y = end_states(model, sweep("states"), i, i + n)
    generator = torch.Generator().manual_seed(seed)
    network = HalfBlock(replace(model.args, hidden_dim=width), generator)
    network = network.to(model.device, torch.promote_types(model.dtype, torch.float32))
    train(network, x, y, steps, batch, peak, generator)
    drop_layers(model, range(i, i + n))
    model.layers.insert(i, network.to(model.dtype).requires_grad_(False))
    return model


def run_and_width(model, budget):
    """(N, width): how many blocks go, how many channels the network has. ValueError if no block would be left."""
    dim, block, most = model.args.dim, block_params(model), len(model.layers) - 1
    smallest = dim + 3 * dim * dim  # parameters of the network, dim + 3 dim width, where width is dim
    n = -(-(budget + smallest) // block)
    if n > most:
        raise ValueError(f"cannot remove {budget:,} parameters: {most} blocks, less a network of width {dim}, are "
                         f"{most * block - smallest:,}")
    return n, (n * block - budget - dim) // (3 * dim)


@torch.no_grad()
def end_states(model, batches, i, j):
    """All tokens' h_i and h_j, each (tokens, dim) in the model's dtype and in main memory."""
    ends = [[h.flatten(0, 1).cpu() for h in run_ends(model, tokens, i, j)] for tokens in batches]
    return (torch.cat(states) for states in zip(*ends))


def train(network, x, y, steps, batch, peak, generator):
    """`steps` updates of AdamW on |network(x) - y|^2, mean over `batch` random tokens and all channels."""
    weight = network.ffn_norm.weight
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    for step in range(steps):
        drawn = torch.randint(len(x), (batch,), generator=generator)
        loss = F.mse_loss(network(x[drawn].to(weight)), y[drawn].to(weight))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        show(f"training  step {step + 1}/{steps}  squared error {loss:.4f}", last=step + 1 == steps)
