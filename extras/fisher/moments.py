"""C = E[x x^T] and H = E[d d^T]: the two moments of a matrix by which all prices are counted."""
from functools import partial

import torch
import torch.nn.functional as F

from extras.baselines import gram, input_of, input_sums
from model import upcast


def second_moments(model, names, batches, basis="kfac", channels=False):
    """{name: (C, H)} of the named matrices, fp32 at least, by one sweep; H None for `whitened`, which needs no loss.

    Matrices with one input share one C. No weight's gradient is taken: d is caught on its way down to the lowest one.
    Labels are drawn by torch's global generator.
    channels: of each w2 (C, H, gates), gates = E[(x * W^T d)^2] (n,): the Fisher information of a gate on each channel.
    """
    H, count = dict.fromkeys(names if basis == "kfac" else (), 0), 0
    gates = {name: 0 for name in names if channels and name.endswith(".w2")}

    def on_output(name, module, inputs, y):
        def on_gradient(d):
            H[name] += gram(upcast(d.flatten(0, -2)))
            if name in gates:
                gates[name] += (upcast(inputs[0]) * upcast(d @ module.weight)).square().flatten(0, -2).sum(0)

        y.requires_grad_().register_hook(on_gradient)

    hooks = [model.get_submodule(name).register_forward_hook(partial(on_output, name)) for name in H]
    try:
        with input_sums(model, map(input_of, names), lambda x: gram(upcast(x))) as C:
            for tokens in batches:
                h = model.final_state(tokens.to(model.device))
                if H:
                    backward_of_draws(model, h)
                count += tokens.numel()
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in [*C.items(), *H.items(), *gates.items()]:
        if not total.div_(count).isfinite().all():
            raise ValueError(f"a second moment at {name} is not finite; try --dtype bfloat16 or float32")
    return {name: (C[input_of(name)], H.get(name), *([gates[name]] if name in gates else [])) for name in names}


def backward_of_draws(model, h):
    """Backpropagate the NLL of next tokens that the model itself draws, from its final state h (B, T, dim)."""
    leaf = h.detach().requires_grad_()
    for part in leaf.flatten(0, 1).split(model.head_chunk):
        logits = upcast(model.output(model.norm(part)))
        F.cross_entropy(logits, draw(logits.detach()), reduction="sum").backward()
    h.backward(leaf.grad)


def draw(logits):
    """Draw a token (n,) from each row of logits (n, vocab_size). torch.multinomial does the same, but raises on NaN."""
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)  # the first of exponential times with rates p
