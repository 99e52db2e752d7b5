"""w2 of the narrower MLPs, chosen again so that errors of the layers before are made good for."""
import torch
import torch.nn.functional as F

from model import rotary_frequencies, upcast

RIDGE = 0.3  # fraction of C's mean diagonal by which w2 is drawn to what it was


@torch.no_grad()
def refit(model, dense, batches):
    """Fit w2 of each MLP of `model` that is narrower than in `dense`, block by block, in place.

    h is the dense model's residual stream after a block, g the compressed one's before the MLP, z the input of w2. The
    MLP should add h - g to g [AA-SVD, arXiv 2604.02119: the target has the dense model's inputs, the fit the compressed
    one's]. Least squares over all tokens, each divided by the mean square of its h, as the next RMSNorm divides it:

        w2 = argmin E[|h - g - w2 z|^2 / mean h^2] + ridge |w2 - w2 before|^2

    batches: (B, T) int64, all of one T. Holds both streams in fp32: 2 GB for 128 x 512 tokens of LLaMA-2-7B.
    """
    streams = [(h, h) for h in (upcast(dense.tok_embeddings(tokens.to(dense.device))) for tokens in batches)]
    cos, sin = rotary_frequencies(dense.args, streams[0][0].shape[1], dense.device)
    for old, new in zip(dense.layers, model.layers):
        C, target, ff = 0, 0, new.feed_forward
        for i, (h, g) in enumerate(streams):
            h, g = old(h, cos, sin), g + new.attention(new.attention_norm(g), cos, sin)
            x = new.ffn_norm(g)
            z = upcast(F.silu(ff.w1(x)) * ff.w3(x)).flatten(0, 1)
            weighted = (z / h.square().mean(-1).view(-1, 1)).mT
            C, target = C + weighted @ z, target + weighted @ (h - g).flatten(0, 1)
            streams[i] = h, g
        if ff.w2.weight.shape[1] < old.feed_forward.w2.weight.shape[1]:
            C, ridge = C.double(), RIDGE * C.diagonal().mean().double() + 1e-60
            C.diagonal().add_(ridge)
            before = ff.w2.weight.mT.double()
            ff.w2.weight.copy_(torch.linalg.solve(C, target.double() + ridge * before).mT)
        streams = [(h, g + ff(new.ffn_norm(g))) for h, g in streams]
