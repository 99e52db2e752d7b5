"""What the attribution sweep needs, computed from sizes alone: bytes, the micro-batch that fits, bytes over the bus."""
from extras.bench import GIB, meta_model
from extras.throughput import weight_bytes
from model import repeats_heads
from runtime import cli

GPUS = {"24 GB": 23.5, "48 GB": 47.0, "80 GB": 79.0, "141 GB": 138.5}  # card: GiB that torch can have, beside CUDA's own
SAMPLES = 512  # sequences of the calibration set


def token_bytes(model):
    """What autograd keeps of a token, in bytes: of a block, of a redundant block besides, of a norm alone."""
    a, s, wide = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize)
    heads = a.n_heads if repeats_heads(model.device, model.dtype) else a.n_kv_heads
    q, kv, norm = a.n_heads * a.head_dim, heads * a.head_dim, wide * (a.dim + 1)
    # Of any block: both norms' widened inputs and scales; q, the attention's output, k, v; w1 x, silu(w1 x), w3 x; the
    # attention's log-sum-exps. Of a redundant one: the inputs of wq, wk, wv; w1, w3; w2 (wo's is there already).
    block = 2 * norm + s * (2 * q + 2 * kv + 3 * a.hidden_dim) + wide * a.n_heads
    return block, s * (2 * a.dim + a.hidden_dim), norm


def sweep_bytes(model, layer_ids, B, T):
    """{"weights", "gradients", "activations"}: bytes; their sum is the peak of weight_gradients over these layers.

    B sequences of T tokens a micro-batch; a model on the meta device counts as one on a GPU. No T x T probabilities are
    counted: fused attention keeps none. Torch 2.5 lacks it for grouped queries on the CPU.
    """
    a, s, wide, top = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize), model.args.n_layers - 1
    block, inputs, norm = token_bytes(model)
    matrices = [p.numel() for layer in layer_ids for p in model.layers[layer].parameters() if p.ndim == 2]
    # What autograd keeps, from the lowest layer up, whose first norm it does not see:
    kept = B * T * (block * (top - min(layer_ids) + 1) - norm + inputs * len(layer_ids))
    # What comes on top of it at the moments that can be the peak, with the final state h and its gradient in each:
    h, hidden = B * T * wide * a.dim, B * T * s * a.hidden_dim
    widened = wide * (model.device.type == "cpu" and s < wide) * max(matrices)  # a gradient's copy, before it is added
    moments = (3 * h + min(model.head_chunk, B * T) * 3 * wide * a.vocab_size,  # a chunk's log p and two gradients
               2 * h + hidden * (2 if top in layer_ids else 3),  # the last SwiGLU's gradients; w2's input may be gone
               2 * h + s * max(matrices) + max(hidden, widened)  # the first of a matrix; or its copy, w2's input gone
               - B * T * block * (top - max(layer_ids)))
    return {"weights": s * model.n_params, "gradients": wide * sum(matrices), "activations": kept + max(moments)}


def offload_bytes(model, layer_ids, B, T):
    """{"device", "host", "forward", "backward"}: bytes of the same sweep with --offload.

    device: the peak on the GPU: embeddings, head and norms; the states from the lowest layer up; a block's copies, its
    activations, and a gradient. host: the blocks' matrices, the gradients' sums, and a gradient. forward, backward: what
    a micro-batch copies over the bus, gradients back included.
    """
    a, s, wide, top = model.args, model.dtype.itemsize, max(4, model.dtype.itemsize), model.args.n_layers - 1
    block, inputs, _ = token_bytes(model)
    matrices = [p.numel() for layer in layer_ids for p in model.layers[layer].parameters() if p.ndim == 2]
    every = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    h, hidden, copies = B * T * wide * a.dim, B * T * s * a.hidden_dim, s * every // a.n_layers
    states = h * (top - min(layer_ids) + 1)
    widened = wide * (model.device.type == "cpu" and s < wide) * max(matrices)
    inside = copies + B * T * block + h  # of a block, when its backward pass begins
    moments = (3 * h + min(model.head_chunk, B * T) * 3 * wide * a.vocab_size,  # at the head, as without --offload
               inside + (B * T * inputs + 2 * hidden if top in layer_ids else 3 * hidden),  # the last SwiGLU
               inside + B * T * inputs + s * max(matrices) + max(hidden, widened)  # the first of a matrix
               - h * (top - max(layer_ids)))
    return {"device": s * (model.n_params - every) + states + max(moments),
            "host": s * every + wide * sum(matrices) + s * max(matrices), "forward": s * every,
            "backward": copies * (top - min(layer_ids) + 1) + s * sum(matrices)}


def memory(shapes, dtype, layers, T):
    """Two tables: rows of GiB that the attribution sweep takes without and with --offload, by the functions above.

    The redundant layers begin at two thirds of the depth. A column for each of GPUS: the tokens of the micro-batch that
    the commands choose there; None if its computed peak is too large.
    """
    whole, offloaded = [], []
    for name, shape in shapes.items():
        model = meta_model(shape, dtype)
        ids = late_layers(model, layers or model.args.n_layers // 5)
        few, many = (sweep_bytes(model, ids, cli.batch_size(None, T) * times, T) for times in (1, 8))
        head = {"model": name, "layers": f"{ids[0]}-{ids[-1]}"}
        whole.append({**head, "weights": few["weights"] / GIB, "gradients": few["gradients"] / GIB,
                      "peak, 1,024 tokens": sum(few.values()) / GIB, "8,192 tokens": sum(many.values()) / GIB,
                      **tokens_of_cards(model, ids, T)})
        model.offload = True
        tokens = tokens_of_cards(model, ids, T)
        need = offload_bytes(model, ids, max(1, 16384 // T), T)
        least = next((t for t in tokens.values() if t), None)  # of the smallest card that can
        steps = least and -(-SAMPLES * T // least)
        offloaded.append({**head, "host": need["host"] / GIB, "peak, 16,384 tokens": need["device"] / GIB, **tokens,
                          "bus, forward": need["forward"] / GIB, "backward": need["backward"] / GIB,
                          "in all": steps and steps * (2 * need["forward"] + need["backward"]) / GIB})
    return whole, offloaded


def tokens_of_cards(model, layer_ids, T):
    """{"tokens, 24 GB": those of the micro-batch that the commands choose, or None if that does not fit ...}."""
    found = {}
    for card, size in GPUS.items():
        held = (sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
                if model.offload else weight_bytes(model))
        B = cli.fitting(model, T, len(layer_ids), size * GIB - held)
        need = (offload_bytes(model, layer_ids, B, T)["device"] if model.offload
                else sum(sweep_bytes(model, layer_ids, B, T).values()))
        found[f"tokens, {card}"] = B * T if need <= size * GIB else None
    return found


def late_layers(model, n):
    """The ids of n layers from two thirds of the depth on, or as many as there are."""
    first = 2 * model.args.n_layers // 3
    return range(first, min(first + n, model.args.n_layers))
