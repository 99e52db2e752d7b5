"""Meta's folder: params.json, consolidated.00.pth and the tokenizer's file, as Meta's own code reads them."""
from dataclasses import asdict

import torch

from data.checkpoint import own_storage, read_args
from data.files import error_prefix, write_json
from extras.export.dense import dense_shapes, dense_weight
from extras.export.tokenizer import is_json


def write_meta(model, tokenizer, folder):
    """params.json, consolidated.00.pth and the tokenizer's file. A tied head is named too: Meta's code asks for it."""
    write_json(folder / "params.json", meta_params(model.args))
    tensors = {name: own_storage(dense_weight(model, name).detach()) for name in dense_shapes(model)}
    with error_prefix("consolidated.00.pth: could not be written"):
        torch.save({"output.weight": tensors["tok_embeddings.weight"], **tensors}, folder / "consolidated.00.pth")
    if is_json(tokenizer.files[tokenizer.file.name]):
        print("tokenizer    a tokenizer.json, copied as it is: Meta's own code reads only a tokenizer.model")
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)


def meta_params(args):
    """params.json's table, with no key that Meta's code does not know. ValueError for a model that it cannot say.

    hidden_dim is said by its own multiple: int(ffn_dim_multiplier * int(2 * 4 * dim / 3)) is hidden_dim or, by a
    float's rounding, one less, and is rounded up to a multiple of hidden_dim.
    """
    params = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
              "vocab_size": args.vocab_size, "norm_eps": args.norm_eps, "multiple_of": args.hidden_dim,
              "ffn_dim_multiplier": args.hidden_dim / int(2 * 4 * args.dim / 3)}
    if args.rope_theta != 10000:  # Llama 2's code has no such key
        params["rope_theta"] = args.rope_theta
    if args.rope_scaling:
        params["use_scaled_rope"] = True
    embedding = torch.empty(args.vocab_size, args.dim, device="meta")
    read = read_args(params, False, [{"tok_embeddings.weight": embedding}])
    for name, value in asdict(args).items():
        if name != "max_seq_len" and read[name] != value:  # Meta's callers give that one themselves
            raise ValueError(f"--format meta: Meta's params.json cannot say {name} {value}; this model's would be read "
                             f"as {read[name]}; use --format hf")
    return params
