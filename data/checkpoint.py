"""What a folder of weights says: its tensors, memory-mapped, and its hyper-parameters, all under Meta's names.

Meta's raw folders (params.json + consolidated.NN.pth, one file a model-parallel shard), Mistral's (the same, or
consolidated.safetensors), Hugging Face's (config.json + *.safetensors), and this project's own (Meta's, with ranks).
"""
import json
from pathlib import Path

import torch

from data import need, processes, read_bytes
from data.pth import LARGEST, read_pth

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HF_FIELDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
             "max_seq_len": "max_position_embeddings"}  # Meta's -> Hugging Face's; the others have one name

HF_TENSORS = (("model.", ""), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
              ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
              ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
              ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
              ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
              ("mlp.up_proj", "feed_forward.w3"))  # parts of a name, Hugging Face's -> Meta's


def read_folder(folder):
    """(fields of ModelArgs, ranks, shards, halves) of any folder of weights.

    ranks: {matrix: rank} and {feed-forward: its channels} of a compressed folder. shards: [{name: tensor}], one for
    each model-parallel part. halves: whether the rows of wq and wk are in Hugging Face's order. Raises
    FileNotFoundError and ValueError.
    """
    raw = [sorted(f for f in folder.glob(f"consolidated*{kind}") if f.is_file()) for kind in (".pth", ".safetensors")]
    raw = raw[0] or raw[1]
    for i, f in enumerate(raw if len(raw) > 1 else []):
        if f.name != f"consolidated.{i:02}{f.suffix}":
            raise FileNotFoundError(f"{folder}: found {f.name} where consolidated.{i:02}{f.suffix} was expected")
    if (folder / "params.json").is_file() and raw:
        file, shards, names = folder / "params.json", [read_tensors(f) for f in raw], {}
        params = read_json(file)
    elif (folder / "config.json").is_file():
        file, index = folder / "config.json", folder / "model.safetensors.index.json"
        params, names = check_config(read_json(file), file), HF_FIELDS
        files = weight_files(folder, read_json(index) if index.is_file() else None)
        named = [(our_name(name), t) for f in files for name, t in read_tensors(f).items()]
        shards = [dict(named)]
        if len(named) > len(shards[0]):
            raise ValueError(f"{folder}: a tensor stands there twice")
        if params.get("tie_word_embeddings"):
            shards[0].pop("output.weight", None)
        elif "output.weight" not in shards[0]:
            raise ValueError(f"{folder}: tensor lm_head.weight is missing, and tie_word_embeddings is not true")
    else:
        raise FileNotFoundError(f"{folder}: no checkpoint here; looked for params.json with consolidated.*.pth or "
                                "consolidated.*.safetensors (Meta, Mistral) and config.json (Hugging Face)")
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or embedding.ndim != 2:
        raise ValueError(f"{folder}: no matrix {'model.embed_tokens' if names else 'tok_embeddings'}.weight in it")
    ranks = params.get("ranks") or {}
    if not isinstance(ranks, dict):
        raise ValueError(f"{file}: ranks is a {type(ranks).__name__}, expected an object")
    ranks = {name: number(ranks, name, file) for name in ranks}
    return read_args(params, file, names, shards), ranks, shards, bool(names)


def our_name(name):
    """"model.layers.3.self_attn.q_proj.weight" -> "layers.3.attention.wq.weight"."""
    for theirs, ours in HF_TENSORS:
        name = name.replace(theirs, ours, 1)
    return name


def pair_rows(W, head_dim):
    """Rows of wq or wk: each head's x0 x1 .. y0 y1 .. (Hugging Face turns its halves) as x0 y0 x1 y1 .. (Meta)."""
    return W.view(-1, 2, head_dim // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def gather(parts, name, shape, folder):
    """One tensor from its model-parallel shards: vectors are repeated, matrices split over rows (wo, w2: columns).

    The embeddings were split over columns (Llama 1, 2) or rows (Llama 3): seen from where the sizes add up.
    """
    if any(part is None for part in parts):
        raise ValueError(f"{folder}: tensor {name} is missing")
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"{folder}: tensor {name} has not one dtype in all shards")
    if parts[0].shape == shape and (len(parts) == 1 or len(shape) == 1):
        if all(torch.equal(parts[0], part) for part in parts[1:]):
            return parts[0]
        raise ValueError(f"{folder}: tensor {name} differs between the shards")
    sides = (0, 1) if "tok_embeddings" in name else (1,) if name.endswith(("wo.weight", "w2.weight")) else (0,)
    for dim in sides if all(part.ndim == len(shape) == 2 for part in parts) else ():
        sizes = {part.shape[:dim] + part.shape[dim + 1:] for part in parts}
        if sizes == {shape[:dim] + shape[dim + 1:]} and sum(part.shape[dim] for part in parts) == shape[dim]:
            return torch.cat(parts, dim)
    found = " and ".join(str(tuple(part.shape)) for part in parts)
    raise ValueError(f"{folder}: tensor {name} is {found}, expected {tuple(shape)}")


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


def read_tensors(file):
    """{name: memory-mapped tensor} of one .pth or .safetensors file; nothing but plain float tensors is let in."""
    try:
        if file.suffix == ".pth":
            tensors = read_pth(file)
        else:
            with need("safetensors", f"reading {file}").safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (ModuleNotFoundError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as e:  # the readers raise many kinds; each means that the file is not what it should be
        raise ValueError(f"{file}: not readable as plain tensors (cut, corrupt, or holding other objects): "
                         f"{str(e).strip().splitlines()[0] if str(e) else type(e).__name__}") from e
    for name, t in tensors.items() if isinstance(tensors, dict) else [("the file", None)]:
        if not (isinstance(t, torch.Tensor) and t.dtype in FLOATS and t.numel()):
            found = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise ValueError(f"{file}: {name} is {found}, expected a dense tensor in "
                             "float16, bfloat16, float32 or float64")
    return tensors


def read_json(file, largest=LARGEST):
    """The object in a JSON file, as a dict; ValueError if there is anything else, or more than `largest` bytes."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return dict(pairs)

    content = read_bytes(file, largest)
    try:
        table = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not JSON ({e})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file}: a JSON {type(table).__name__}, expected an object")
    return table


def number(table, name, file, default=None, kind=int):
    """table[name], a positive finite number of that kind; ValueError where it is missing or anything else."""
    if not isinstance(table, dict):
        raise ValueError(f"{file}: {table!r} where an object with {name} was expected")
    value = table.get(name) if table.get(name) is not None else default
    if value is None:
        raise ValueError(f"{file}: lacks {name}")
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2 ** 53
    if not good or value != kind(value):
        raise ValueError(f"{file}: {name} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)


def read_args(p, file, names, shards):
    """The fields of ModelArgs from the table of a params.json or, with `names` (ours -> theirs), of a config.json."""
    def get(name, default=None, kind=int):
        return number(p, names.get(name, name), file, default, kind)

    for name in ("use_scaled_rope", "tie_word_embeddings"):
        if p.get(name) not in (None, True, False):
            raise ValueError(f"{file}: {name} is {p[name]!r}, expected true or false")
    for name in ("moe", "vision_chunk_size", "yarn", "quantization_args", "quantization_config"):
        if p.get(name):
            raise ValueError(f"{file}: {name} means an unsupported architecture; supported: dense Llama 1-3.2, Mistral")
    dim, n_heads = get("dim"), get("n_heads")
    rows, width = shards[0]["tok_embeddings.weight"].shape  # vocab_size -1: Llama 1 and 2 leave it to the tokenizer
    hidden = int(get("ffn_dim_multiplier", 1.0, float) * int(2 * 4 * dim / 3))
    multiple = get("multiple_of", 256)
    scaling = p.get("rope_scaling") or ({} if p.get("use_scaled_rope") else None)
    factor = 32.0 if (dim, get("n_layers")) in ((2048, 16), (3072, 28)) else 8.0  # Llama 3.2 1B and 3B; 3.1 and others
    # full attention is a sliding window's attention only within that window
    limits = [get(name) for name in ("max_seq_len", "sliding_window")
              if p.get(names.get(name, name)) is not None]
    args = dict(
        dim=dim, n_layers=get("n_layers"), n_heads=n_heads, n_kv_heads=get("n_kv_heads", n_heads),
        head_dim=get("head_dim", dim // n_heads), hidden_dim=get("hidden_dim", -(-hidden // multiple) * multiple),
        vocab_size=get("vocab_size") if p.get("vocab_size", -1) != -1 else rows * (len(shards) if width == dim else 1),
        norm_eps=get("norm_eps", kind=float), rope_theta=get("rope_theta", 10000.0, float),
        rope_scaling=scaling if scaling is None else {  # Llama 3.1's values where the file gives none
            name: number(scaling, name, file, default, float)
            for name, default in (("factor", factor), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0),
                                  ("original_max_position_embeddings", 8192.0))},
        max_seq_len=min(limits, default=None))
    rope = args["rope_scaling"]
    if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{file}: low_freq_factor must be less than high_freq_factor, found {rope}")
    if n_heads % args["n_kv_heads"] or args["head_dim"] % 2:
        raise ValueError(f"{file}: {n_heads} query heads, {args['n_kv_heads']} key/value heads, head size "
                         f"{args['head_dim']}: the first must be a multiple of the second, the last even")
    return args


def whole_storage(p):
    """p alone in its storage, without a copy: torch.save writes whole storages, and a mapped file is a single one.

    None on all processes but the one that writes.
    """
    t = processes.whole(p.detach())
    if processes.rank():
        return None
    t = t.cpu().contiguous()
    return torch.from_numpy(t.view(torch.uint8).numpy()).view(t.dtype)
