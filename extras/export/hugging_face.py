"""Hugging Face's folder: config.json and the weights, in Hugging Face's names and order of rows."""
import json
import shutil
from pathlib import Path

import torch

from data.checkpoint import HF_FIELDS, HF_TENSORS, own_storage, ranks, widths
from data.files import write_json
from extras.export.dense import dense_shapes, dense_weight
from extras.export.tokenizer import write_tokenizer

CODE = Path(__file__).parent / "modeling_lowrank.py"  # what transformers runs for a low-rank folder


def write_hf(model, tokenizer, folder, shard, changes=None, code=None):
    """config.json, the weights in files of at most `shard` (one after the other in memory), the tokenizer.

    changes: what config.json says instead, where factors and widths stay as they are. code: the file that reads it.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    config, shapes, weight = hf_config(model, tokenizer), dense_shapes(model), dense_weight
    if changes:
        config, weight = {**config, **changes}, torch.nn.Module.get_parameter
        shapes = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
        shutil.copyfile(code, folder / code.name)
    write_json(folder / "config.json", config)
    write_tokenizer(tokenizer, folder, config["max_position_embeddings"])
    names = {their_name(name): name for name in shapes}
    plan = split_torch_state_dict_into_shards({name: shapes[ours] for name, ours in names.items()},
                                              max_shard_size=shard)
    for file, inside in plan.filename_to_tensors.items():
        try:
            save_file({name: hf_weight(model, names[name], weight) for name in inside}, folder / file, {"format": "pt"})
        except SafetensorError as e:  # a full disk, too
            raise OSError(f"{file}: could not be written: {e}") from None
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read it
    if plan.is_sharded:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def their_name(name):
    """our_name's inverse: "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    for theirs, ours in HF_TENSORS[1:]:  # the first takes "model." away
        name = name.replace(ours, theirs, 1)
    name += ".weight" * name.endswith((".A", ".B"))
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_weight(model, name, weight):
    """The tensor weight(model, name) on the CPU, alone in its storage, rows of wq and wk in Hugging Face's order."""
    W = weight(model, name)
    if name.endswith(("wq.weight", "wk.weight", "wq.A", "wk.A")):
        W = halve_rows(W, model.args.head_dim)
    return own_storage(W.detach())


def halve_rows(W, head_dim):
    """pair_rows' inverse: each head's rows x0 y0 x1 y1 .. (Meta turns its pairs) as x0 x1 .. y0 y1 .. (halves)."""
    return W.view(-1, head_dim // 2, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def hf_config(model, tokenizer):
    """config.json's table, its rotary settings in the form that transformers 4 wrote and 5 still reads."""
    generation = json.loads(tokenizer.files.get("generation_config.json", "{}"))
    args, scaling = model.args, model.args.rope_scaling
    family = "Mistral" if args.dim % args.n_heads else "Llama"  # one architecture, but LlamaConfig wants it divisible
    positions = args.max_seq_len
    if positions is None:
        positions, like = ((131072, "Llama 3.1") if scaling else
                           (8192, "Llama 3") if args.rope_theta > 10000 else (4096, "Llama 2"))
        print(f"positions    --ckpt does not say how many the model has; the export says {positions:,}, as {like} has")
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "hidden_act": "silu",
            **{theirs: getattr(args, ours) for ours, theirs in HF_FIELDS.items()},
            "max_position_embeddings": positions, "sliding_window": None, "head_dim": args.head_dim,
            "vocab_size": args.vocab_size, "tie_word_embeddings": model.tied, "rope_theta": args.rope_theta,
            "rope_scaling": scaling and {"rope_type": "llama3", **scaling, "original_max_position_embeddings":
                                         int(scaling["original_max_position_embeddings"])},
            "torch_dtype": str(model.dtype).removeprefix("torch."), "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.ends if len(tokenizer.ends) > 1 else next(iter(tokenizer.ends), None),
            **{name: i for name, i in generation.items() if name.endswith("_token_id")}}


def low_rank_config(model):
    """What config.json says instead where factors and narrow feed-forwards stay: the code and the table of ranks."""
    table = {their_name(name): k for name, k in ranks(model).items()}
    table |= {f"model.layers.{i}.mlp": n for i, n in enumerate(widths(model).values()) if n < model.args.hidden_dim}
    classes = {"AutoConfig": "LowRankConfig", "AutoModel": "LowRankModel", "AutoModelForCausalLM": "LowRankForCausalLM"}
    return {"architectures": ["LowRankForCausalLM"], "model_type": "llama-lowrank", "ranks": table,
            "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in classes.items()}}
