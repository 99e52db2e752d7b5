"""Fit w2 of the narrower MLPs once more, to correct the errors of the blocks before."""
import torch
import torch.nn.functional as F

from extras.baselines import damped
from model import finite, rotations, upcast
from runtime import cli

RIDGE = 0.3  # how strongly w2 is held to its value before


@torch.no_grad()
def refit(model, dense, batches):
    """Fit w2 of each MLP of `model` that is narrower than in `dense`, block by block, in place.

    h is the dense model's residual stream after a block, g the compressed one's before the MLP, z the input of w2. The
    MLP should add h - g to g [AA-SVD, arXiv 2604.02119: the target has the dense model's inputs, the fit the compressed
    one's]. Least squares over all tokens, each weighted as the next RMSNorm scales it, C = E[weight z z^T]:

        w2 = argmin E[weight |h - g - w2 z|^2] + ridge |w2 - w2 before|^2      weight = 1 / (mean h^2 + eps)
        ridge = RIDGE * mean diagonal of C

    batches: (B, T) int64, all of one T. Holds both streams in fp32: 2 GB for 128 x 512 tokens of LLaMA-2-7B. ValueError
    if a w2 is not finite then.
    """
    streams = [(h, h) for h in (next(dense.residual_stream(tokens.to(dense.device))) for tokens in batches)]
    rotary = rotations(dense.args, streams[0][0].shape[1], dense.device)
    for i, (old, new) in enumerate(zip(dense.layers, model.layers)):
        cli.show(f"refit  block {i + 1}/{len(model.layers)}", last=False)
        ff, C, target = new.feed_forward, 0, 0
        narrower = ff.w2.weight.shape[1] < old.feed_forward.w2.weight.shape[1]
        for j, (h, g) in enumerate(streams):
            h, g = old(h, rotary), g + new.attention(new.attention_norm(g), rotary)
            if narrower:
                x = new.ffn_norm(g)
                z = upcast(F.silu(ff.w1(x)) * ff.w3(x)).flatten(0, 1)
                weighted = (z / (h.square().mean(-1) + dense.args.norm_eps).view(-1, 1)).mT
                C, target = C + weighted @ z, target + weighted @ (h - g).flatten(0, 1)
            streams[j] = h, g
        if narrower:
            before = ff.w2.weight.mT.double()
            change = torch.linalg.solve(damped(C, RIDGE), target.double() - C.double() @ before)
            ff.w2.weight.copy_((before + change).mT)
            if not finite(ff.w2.weight):
                raise ValueError(f"w2 of block {i} is not finite after its refit; try --dtype bfloat16 or float32")
        for j, (h, g) in enumerate(streams):
            streams[j] = h, g + ff(new.ffn_norm(g))
    cli.show("", last=True)
