"""The names of Hugging Face's folders in Meta's words: hyper-parameters (config.json) and tensors (*.safetensors).

Two differences are more than names: their wq and wk rotate a head's halves where Meta's rotate neighbouring pairs
(model.py turns the rows), and a config.json may ask for things that this project's model does not have.
"""
from pathlib import Path

FIELDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
          "max_seq_len": "max_position_embeddings"}  # ours -> theirs; the other fields have one name

TENSORS = (("model.", ""), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
           ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
           ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
           ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
           ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
           ("mlp.up_proj", "feed_forward.w3"))  # theirs -> ours, parts of a name


def our_name(name):
    """"model.layers.3.self_attn.q_proj.weight" -> "layers.3.attention.wq.weight"."""
    for theirs, ours in TENSORS:
        name = name.replace(theirs, ours, 1)
    return name


def check_config(config, file):
    """config.json's table with rope_theta and rope_scaling in one place (transformers 5 and 4 write them differently).

    ValueError if it asks for anything that the model of this project does not have.
    """
    if config.get("model_type") not in ("llama", "mistral"):
        raise ValueError(f"{file}: model_type is {config.get('model_type')!r}; supported: llama, mistral")
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{file}: {name} is {config[name]!r}; supported: {wanted!r}")
    for name in ("intermediate_size", "max_position_embeddings"):  # Meta's files may leave these out, theirs may not
        if config.get(name) is None:
            raise ValueError(f"{file}: lacks {name}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: the rotary embedding is {rope!r}; supported: rope_type default, llama3")
    return {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
            "rope_scaling": rope if kind == "llama3" else None}


def weight_files(folder, index):
    """The folder's weight files: model.safetensors, or those that the index (a table, or None) names."""
    names = index.get("weight_map") if index else {"": "model.safetensors"}
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    for name in names or ["a weight_map of files"]:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; looked for model.safetensors, or the files that "
                                    "model.safetensors.index.json names in this folder")
    return [folder / name for name in names]
