"""load_checkpoint and save_checkpoint, and the formats behind them. Tensors have Meta's names.

    Meta            params.json + consolidated.NN.pth, one file for each model-parallel shard
    Mistral         the same, or consolidated.safetensors
    Hugging Face    config.json + model.safetensors, or its parts; or the same as pytorch_model.bin
    compressed      Meta's, with a table of ranks in params.json

The format is detected from the files; the folder's name does not matter.
"""
import json
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data import need
from data.files import atomic_write, check_output, error_prefix, read_json, refuse_pointer
from model import FeedForward, LowRankLinear, ModelArgs, Transformer, finite

SMALL, THREADS = 10 ** 7, torch.get_num_threads()  # a model of fewer parameters is faster on one thread
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LAYOUTS = {  # hyper-parameters: weights, the first that is there
    "config.json": ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"),
    "params.json": ("consolidated*.pth", "consolidated*.safetensors"),
}

HF_FIELDS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
             "norm_eps": "rms_norm_eps", "max_seq_len": "max_position_embeddings"}  # Meta's -> Hugging Face's

HF_TENSORS = (("model.", ""), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"),
              ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
              ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
              ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
              ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
              ("mlp.up_proj", "feed_forward.w3"))  # parts of tensor names, Hugging Face's -> Meta's


def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu",
                    offload: bool = False) -> Transformer:
    """Read a checkpoint folder of any kind. No parameter requires a gradient.

    dtype: None keeps the folder's own; in host memory the weights then stay memory-mapped. offload: the
    blocks' matrices stay in host memory; embeddings, norms and head go to the device. Sets torch's number of
    threads: 1 for a small model. Raises FileNotFoundError and ValueError: the file or tensor, what was found
    and what was expected.
    """
    fields, table, shards, hugging_face = read_folder(Path(path))
    dtype = dtype or shards[0]["tok_embeddings.weight"].dtype
    with error_prefix(path):
        model = empty_model(ModelArgs(**fields), "output.weight" not in shards[0], table)
        parameters = dict(model.named_parameters())
        model.offload = offload
        if unknown := {name for shard in shards for name in shard} - {*parameters}:
            raise ValueError(f"tensor {min(unknown)} is not one of this model's ({len(unknown)} such)")
        for name, parameter in parameters.items():
            tensor = gather(shards, name, parameter.shape, model.args.head_dim if hugging_face else None)
            host = offload and name.startswith("layers.") and tensor.ndim == 2
            tensor = tensor.to("cpu" if host else device, dtype)
            if not finite(tensor):
                raise ValueError(f"tensor {name} holds NaN or infinite values in {dtype}")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    if "output.weight" not in parameters:
        model.output.weight = model.tok_embeddings.weight
    torch.set_num_threads(1 if model.n_params < SMALL else THREADS)
    return model


def empty_model(args: ModelArgs, tied: bool, table: dict[str, int]) -> Transformer:
    """A model on the meta device. table: {low-rank matrix: rank}, {narrower feed-forward: its channels}."""
    with torch.device("meta"):
        model = Transformer(args, tied)
        for name, k in sorted(table.items()):  # a feed-forward comes before its matrices
            with error_prefix(f"ranks, {name}"):
                if name.endswith("feed_forward"):
                    model.set_submodule(name, FeedForward(replace(args, hidden_dim=k)))
                else:
                    m, n = model.get_submodule(name).weight.shape
                    model.set_submodule(name, LowRankLinear(torch.empty(m, k), torch.empty(k, n)))
    return model


def ranks(model: Transformer) -> dict[str, int]:
    """{name: rank} of the low-rank matrices."""
    return {name: m.A.shape[1] for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def widths(model: Transformer) -> dict[str, int]:
    """{name: channels} of the feed-forwards."""
    return {name: m.width for name, m in model.named_modules() if isinstance(m, FeedForward)}


def save_checkpoint(model: Transformer, path: str | Path, report: dict | None = None,
                    tokenizer: dict[str, bytes] | None = None, overwrite: bool = False) -> None:
    """Write `model` in Meta's layout, atomically. report: for report.json. tokenizer: its files.

    Raises FileExistsError unless overwrite, OSError or ValueError if a file cannot be written, and ValueError
    for weights that are not finite, or that load_checkpoint could not read.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    table = ranks(model) | {name: n for name, n in widths(model).items() if n < model.args.hidden_dim}
    with error_prefix(f"{path}: not written"):
        empty = empty_model(model.args, model.tied, table)
        readable = {name: p.shape for name, p in empty.named_parameters()}
        if wrong := {*readable.items()} ^ {(name, p.shape) for name, p in weights.items()}:
            raise ValueError("no folder can hold this model, e.g. tensor {} of {}".format(*min(wrong)))
        for name, p in weights.items():
            if not finite(p):
                raise ValueError(f"{name} holds NaN or infinite values in {p.dtype}")
    check_output(path, overwrite)
    with error_prefix(f"{path}: not written"), atomic_write(path) as folder:
        folder.mkdir()
        torch.save({name: own_storage(p) for name, p in weights.items()}, folder / "consolidated.00.pth")
        params = {**asdict(model.args), "ranks": table}
        (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n")
        (folder / "report.json").write_text(json.dumps(report or {}, indent=1, default=str) + "\n")
        for name, content in (tokenizer or {}).items():
            (folder / name).write_bytes(content)


def own_storage(t: Tensor) -> Tensor:
    """t on the CPU, contiguous and alone in its storage, because torch.save writes whole storages."""
    t = t.cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def read_folder(folder: Path) -> tuple[dict, dict[str, int], list[dict[str, Tensor]], bool]:
    """Read any checkpoint folder.

    Returns (fields of ModelArgs, table, shards, whether the rows of wq and wk are in Hugging Face's order).
    table: {matrix: rank} and {feed-forward: its channels} of a compressed folder. shards: {name: tensor}, one
    for each model-parallel shard. Raises FileNotFoundError and ValueError with the file or tensor at fault.
    """
    config, files = weight_files(folder)
    hugging_face, shards = config == "config.json", [read_tensors(f) for f in files]
    if hugging_face:
        shards = [merge_hf(dict(zip(files, shards)))]
    params, embedding = read_json(folder / config), shards[0].get("tok_embeddings.weight")
    with error_prefix(folder):
        if embedding is None:
            raise ValueError("the token embeddings are missing")
        head, tied = shards[0].get("output.weight"), hugging_face and params.get("tie_word_embeddings")
        if hugging_face and head is None and not tied:
            raise ValueError("tensor lm_head.weight is missing, and tie_word_embeddings is not true")
        equal = head is None or len(shards) == 1 and torch.equal(head, embedding)
        if tied and not equal:
            raise ValueError("tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")
        if equal:
            shards[0].pop("output.weight", None)
    with error_prefix(folder / config):
        args, table = read_args(params, hugging_face, shards), params.get("ranks") or {}
        table = {name: number(table, name) for name in table}
        found = sum(name.endswith(".attention_norm.weight") for name in shards[0])
        if found != args["n_layers"]:  # checked before a model of any size is built
            raise ValueError(f"weights of {found} layers, expected {args['n_layers']}")
    return args, table, shards, hugging_face


def weight_files(folder: Path) -> tuple[str, list[Path]]:
    """Return (the name of the file of hyper-parameters, the files of weights).

    If both layouts are there, Hugging Face's is read, as transformers does. One file of all weights beats
    its parts.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for config, patterns in LAYOUTS.items():
        for pattern in patterns if (folder / config).is_file() else ():
            if files := [f for f in sorted(folder.glob(pattern)) if f.is_file()]:
                return config, files
    looked_for = "; ".join(f"{config} with {' or '.join(patterns)}" for config, patterns in LAYOUTS.items())
    raise FileNotFoundError(f"{folder}: no checkpoint here; looked for {looked_for}")


def merge_hf(files: dict[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files of a Hugging Face folder, under Meta's names."""
    tensors = {}
    for file, found in files.items():
        for theirs, tensor in found.items():
            name = theirs
            for old, new in HF_TENSORS:
                name = name.replace(old, new, 1)
            if name in tensors:
                raise ValueError(f"{file}: duplicate tensor {theirs}")
            tensors[name] = tensor
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """{name: memory-mapped tensor} of a .pth or .safetensors file. Only float tensors are accepted."""
    refuse_pointer(file)
    with error_prefix(f"{file}: not readable as plain tensors (truncated, corrupt, or other objects)"):
        if file.suffix != ".safetensors":
            tensors = read_pth(file)
        else:
            with need("safetensors", f"reading {file}").safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        for name, t in tensors.items():
            if t.dtype not in FLOATS:
                raise ValueError(f"{name} is {t.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        computed = ("rope.freqs", "rotary_emb.inv_freq")  # not parameters
        return {name: t for name, t in tensors.items() if not name.endswith(computed)}


def read_pth(file: Path) -> dict[str, Tensor]:
    """{name: memory-mapped tensor} of a file that torch.save wrote. No code in it is run (weights_only).

    Mapping skips the checksums and the sizes of the zip archive's records, so both are compared here.
    """
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        sizes = [record.compress_size for record in records if "/data/" in record.filename]
        if bad := archive.testzip():
            raise ValueError(f"wrong CRC-32 of {bad}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        if "weights_only" not in str(e):
            raise
        raise ValueError("it holds more than tensors") from None  # torch says how to run the code inside
    if wrong := next((name for name, t in tensors.items() if not isinstance(t, Tensor)), None):
        raise ValueError(f"{wrong} is a {type(tensors[wrong]).__name__}, expected a tensor")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    if [storages[place] for place in sorted(storages)] != sizes:  # in the file's order
        raise ValueError("the sizes of the tensors' storages are not those of the archive's records")
    return tensors


def number(table: dict, name: str, default=None, kind: type = int) -> int | float:
    """table[name], or the default: a positive finite number of that kind. ValueError for anything else."""
    value = default if table.get(name) is None else table[name]
    if value is None:
        raise ValueError(f"lacks {name}")
    if type(value) not in (int, float) or not 0 < value < 2 ** 53 or value != kind(value):
        raise ValueError(f"{name} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)


def check_supported(p: dict, hugging_face: bool) -> None:
    """Raise ValueError if a config asks for anything that the model of this project does not have."""
    if hugging_face and p.get("model_type") not in ("llama", "mistral"):
        raise ValueError(f"model_type is {p.get('model_type')!r}; supported: llama, mistral")
    for name in ("moe", "vision_chunk_size", "yarn", "quantization_args", "quantization_config",
                 "attention_bias", "mlp_bias", "hidden_act"):
        if p.get(name) and (name, p[name]) != ("hidden_act", "silu"):
            raise ValueError(f"{name} is {p[name]!r}, which is an unsupported architecture")


def read_args(p: dict, hugging_face: bool, shards: list[dict[str, Tensor]]) -> dict:
    """The fields of ModelArgs from the content of Hugging Face's config.json, or of params.json."""
    def get(name, default=None, kind=int):
        return number(p, HF_FIELDS.get(name, name) if hugging_face else name, default, kind)

    check_supported(p, hugging_face)
    dim, n_heads, n_layers = get("dim"), get("n_heads"), get("n_layers")
    n_kv_heads, head_dim = get("n_kv_heads", n_heads), get("head_dim", dim // n_heads)
    rows, width = shards[0]["tok_embeddings.weight"].shape
    vocab_size = rows * (len(shards) if width == dim else 1)
    hidden, multiple = get("ffn_dim_multiplier", 1.0, float) * int(2 * 4 * dim / 3), get("multiple_of", 256)
    hidden = None if hugging_face else -(-int(hidden) // multiple) * multiple  # Meta's rule
    limits = [get("max_seq_len")] if hugging_face or p.get("max_seq_len") else []
    window = p.get("sliding_window", 4096 if p.get("model_type") == "mistral" else None)
    if window is not None and p.get("model_type") != "llama":  # within its window, attention is full
        limits.append(number({"sliding_window": window}, "sliding_window"))
    factor = 32.0 if (dim, n_layers) in ((2048, 16), (3072, 28)) else 8.0  # Llama 3.2's 1B and 3B; others
    scaling, theta = read_rope(p, hugging_face, factor)
    return dict(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        hidden_dim=get("hidden_dim", hidden), norm_eps=get("norm_eps", kind=float),
        vocab_size=vocab_size if p.get("vocab_size", -1) == -1 else get("vocab_size"),  # Llama 1 and 2: -1
        rope_theta=theta, rope_scaling=scaling, max_seq_len=min(limits, default=None))


def read_rope(p: dict, hugging_face: bool, factor: float) -> tuple[dict | None, float]:
    """Return (rope_scaling, rope_theta). factor: for a params.json that says only use_scaled_rope.

    rope_theta defaults to 1e4; for Mistral's params.json (it has hidden_dim) without a sliding window to 1e6.
    """
    rope = p.get("rope_scaling") or hugging_face and p.get("rope_parameters") or {}  # transformers 4, Meta; 5
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if kind not in ("default", "llama3"):
        raise ValueError(f"the rotary embedding is {rope!r}; supported: rope_type default, llama3")
    mistral = not hugging_face and "hidden_dim" in p and not p.get("sliding_window")
    theta = number(rope if rope.get("rope_theta") else p, "rope_theta", 1e6 if mistral else 1e4, float)
    if not (kind == "llama3" if hugging_face or "rope_type" in rope else rope or p.get("use_scaled_rope")):
        return None, theta
    defaults = {"factor": p.get("rope_scaling_factor") or factor, "low_freq_factor": 1.0,
                "high_freq_factor": p.get("rope_high_freq_factor") or 4.0,
                "original_max_position_embeddings": p.get("max_position_embeddings", 8192.0)}
    return {name: number(rope, name, default, float) for name, default in defaults.items()}, theta


def pair_rows(W: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, reordered within each head from halves (Hugging Face) to pairs (Meta)."""
    return W.view(-1, 2, head_dim // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def gather(shards: list[dict[str, Tensor]], name: str, shape: torch.Size, head_dim: int | None) -> Tensor:
    """One tensor from its model-parallel shards. Raises ValueError if they do not fit together.

    head_dim: of a Hugging Face folder, whose rows of wq and wk are brought into Meta's order.
    Vectors are repeated in all shards. Matrices are split over rows; wo and w2 over columns; the embeddings
    over columns (Llama 1, 2) or rows (Llama 3), as the sizes tell.
    """
    parts = [shard[name] for shard in shards if name in shard]
    if len(parts) < len(shards):
        raise ValueError(f"tensor {name} is missing")
    tensor = parts[0]
    if len(parts) > 1 and len(shape) == 2:
        by_columns = name.endswith(("wo.weight", "w2.weight"))
        if name == "tok_embeddings.weight":
            by_columns = tensor.shape[0] == shape[0]
        tensor = torch.cat(parts, 1 if by_columns else 0)
    elif not all(torch.equal(tensor, part) for part in parts[1:]):
        raise ValueError(f"tensor {name} differs between the shards")
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
    return pair_rows(tensor, head_dim) if head_dim and name.endswith(("wq.weight", "wk.weight")) else tensor
