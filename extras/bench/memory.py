"""What the attribution sweep needs, computed from sizes alone: bytes, and the micro-batch that fits into a GPU."""
from extras.bench import GIB, meta_model
from extras.throughput import weight_bytes
from model import repeats_heads
from runtime import cli

GPUS = {"24 GB": 23.5, "40 GB": 39.0, "80 GB": 79.0}  # card: GiB that it has, half a GiB for CUDA itself taken off


def sweep_bytes(model, layer_ids, B, T, gpus=1):
    """{"weights", "gradients", "activations"}: bytes; their sum is the peak of weight_gradients over these layers.

    B sequences of T tokens a micro-batch; a model on the meta device counts as one on a GPU. No T x T probabilities are
    counted: fused attention keeps none. Torch 2.5 lacks it for grouped queries on the CPU. Each of several `gpus` has
    its rows of the blocks' matrices and of the gradient sums; embeddings and head whole; and of the largest matrix,
    while it is used, all rows (twice: as they come and in their place), its gradient, and that in fp32 at least.
    """
    a, s, wide, top = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize), model.args.n_layers - 1
    matrices = [p.numel() for layer in layer_ids for p in model.layers[layer].parameters() if p.ndim == 2]
    heads = a.n_heads if repeats_heads(model.device, model.dtype) else a.n_kv_heads
    q, kv, norm = a.n_heads * a.head_dim, heads * a.head_dim, wide * (a.dim + 1)
    # What autograd keeps of a token, from the lowest layer up, whose first norm it does not see: both norms' widened
    # inputs and scales; q, the attention's output, k, v; w1 x, silu(w1 x), w3 x; the attention's log-sum-exps.
    block = 2 * norm + s * (2 * q + 2 * kv + 3 * a.hidden_dim) + wide * a.n_heads
    inputs = s * (2 * a.dim + a.hidden_dim)  # of a redundant layer's wq, wk, wv; w1, w3; w2 (wo's is there already)
    kept = B * T * (block * (top - min(layer_ids) + 1) - norm + inputs * len(layer_ids))
    # What comes on top of it at the moments that can be the peak, with the final state h and its gradient in each:
    h, hidden = B * T * wide * a.dim, B * T * s * a.hidden_dim
    widened = wide * (model.device.type == "cpu" and s < wide) * max(matrices)  # a gradient's copy, before it is added
    moments = (3 * h + min(model.head_chunk, B * T) * 3 * wide * a.vocab_size,  # a chunk's log p and two gradients
               2 * h + hidden * (2 if top in layer_ids else 3),  # the last SwiGLU's gradients; w2's input may be gone
               2 * h + s * max(matrices) + max(hidden, widened)  # the first of a matrix; or its copy, w2's input gone
               - B * T * block * (top - max(layer_ids)))
    split = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    use = max(matrices) * (3 * s + wide) if gpus > 1 else 0
    return {"weights": s * (model.n_params - split + split // gpus), "gradients": wide * sum(matrices) // gpus,
            "activations": kept + max(moments) + use}


def memory(shapes, dtype, layers, T, gpus):
    """Rows of GiB that the attribution sweep takes by sweep_bytes, in micro-batches of 1,024 or of 8,192 tokens.

    The redundant layers begin at two thirds of the depth. Of several GPUs: what each has under --shard. A column for
    each of GPUS: the tokens of the micro-batch that the commands choose there; None if its computed peak is too large.
    """
    rows = []
    for name, shape in shapes.items():
        model = meta_model(shape, dtype)
        ids = late_layers(model, layers or model.args.n_layers // 5)
        few, many, each = (sweep_bytes(model, ids, cli.batch_size(None, T) * times, T, parts)
                           for times, parts in ((1, 1), (8, 1), (1, gpus)))
        rows.append({"model": name, "layers": f"{ids[0]}-{ids[-1]}", "weights": few["weights"] / GIB,
                     "gradients": few["gradients"] / GIB, "peak, 1,024 tokens": sum(few.values()) / GIB,
                     "8,192 tokens": sum(many.values()) / GIB,
                     f"on each of {gpus}, 1,024 tokens": sum(each.values()) / GIB,
                     **{f"tokens, {card}": chosen_tokens(model, ids, T, size * GIB) for card, size in GPUS.items()}})
    return rows


def late_layers(model, n):
    """The ids of n layers from two thirds of the depth on, or as many as there are."""
    first = 2 * model.args.n_layers // 3
    return range(first, min(first + n, model.args.n_layers))


def chosen_tokens(model, layer_ids, T, size):
    """Tokens of the micro-batch that the commands choose on a GPU of `size` bytes; None if that is too small."""
    B = cli.fitting(model, T, len(layer_ids), size - weight_bytes(model))
    return B * T if sum(sweep_bytes(model, layer_ids, B, T).values()) <= size else None
