"""A nemotron-nas folder (DeciLM): Hugging Face's layout with a width for each feed-forward, in `block_configs`.

vLLM, mlx-lm and llama.cpp's converter compute a width from `ffn_mult`: int(2 * ffn_mult * dim / 3), rounded up to a
multiple of 256. Other widths cannot be written.
"""
from pathlib import Path

from data.checkpoint import ranks, widths

CODE = Path(__file__).with_name("configuration_decilm.py")  # what vLLM and transformers run to read config.json
MULTIPLE = 256


def refuse_low_rank(model, layout):
    """Raise ValueError if a matrix is low-rank, which `layout` cannot hold."""
    if low_rank := ranks(model):
        raise ValueError(f"--format {layout}: {next(iter(low_rank))} is low-rank, expected dense matrices; use --format "
                         "hf-lowrank or extras.fisher with --shape widths")


def changes(model):
    """What config.json says instead of a Llama's. Raises ValueError for a model that it cannot describe."""
    refuse_low_rank(model, "deci")
    args, channels = model.args, [*widths(model).values()]
    if args.head_dim * args.n_heads != args.dim:
        raise ValueError(f"--format deci: {args.n_heads} heads of {args.head_dim} in a model of width {args.dim}, "
                         f"expected heads of {args.dim / args.n_heads:g}; use --format hf-lowrank or gguf")
    for layer, width in enumerate(channels):
        if width % MULTIPLE:
            raise ValueError(f"--format deci: layers.{layer}.feed_forward has {width} channels, expected a multiple of "
                             f"{MULTIPLE}; use --format hf-lowrank or gguf, or extras.fisher with --shape widths "
                             f"--multiple {MULTIPLE}")
    whole = {"no_op": False, "replace_with_linear": False}
    blocks = [{"attention": {**whole, "n_heads_in_group": args.n_heads // args.n_kv_heads},
               "ffn": {**whole, "ffn_mult": 3 * width / (2 * args.dim)}} for width in channels]
    return {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "block_configs": blocks,
            "auto_map": {"AutoConfig": f"{CODE.stem}.DeciLMConfig"}}
