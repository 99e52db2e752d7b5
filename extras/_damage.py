"""Good checkpoint folders of every kind, and the ways in which extras/faults.py breaks them.

A damage is a function of (folder, rng) that changes the folder's files and says in words what it did. It may raise
where it has nothing to break: a .safetensors file in a folder of .pth files, or in one that was broken before.
"""
import base64
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import torch

from data.corpus import embedded_text
from evaluate import TINY
from model import FeedForward, LowRankLinear, ModelArgs, Transformer, save_checkpoint

NAMES = {"tok_embeddings": "embed_tokens", "output.": "lm_head.", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
         "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}  # parts of Meta's -> Hugging Face's
COLUMNS = ("wo.weight", "w2.weight", "tok_embeddings.weight")  # what Meta's shards split over columns
PAYLOAD = "touch code-was-run; touch model/code-was-run"
BIG = 2 ** 34  # bytes of a sparse file, and what a bomb asks for


# ------------------------------------------------------------------------------------------------ good folders

def good_model(vocab_size, dtype, tied=False, **changes):
    """A LLaMA of 3 layers and half a million parameters, whose predictions are sure of something."""
    torch.manual_seed(0)
    args = ModelArgs(**{**dict(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=80, norm_eps=1e-5,
                               vocab_size=vocab_size, max_seq_len=128), **changes})
    model = Transformer(args, tied).requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
    return model.to(dtype)


def meta_table(args, **more):
    return {name: value for name, value in {**vars(args), **more}.items() if value is not None}


def write_meta(folder, model, shards=1, **more):
    (folder / "params.json").write_text(json.dumps(meta_table(model.args, **more)))
    for i in range(shards):
        part = {name: p.clone() if p.ndim == 1 else p.chunk(shards, int(name.endswith(COLUMNS)))[i].clone()
                for name, p in model.state_dict().items()}
        torch.save(part, folder / f"consolidated.{i:02}.pth")


def write_hf(folder, model, shards=1):
    from safetensors.torch import save_file
    a = model.args
    table = {"model_type": "llama", "hidden_size": a.dim, "num_hidden_layers": a.n_layers, "vocab_size": a.vocab_size,
             "num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads, "rms_norm_eps": a.norm_eps,
             "intermediate_size": a.hidden_dim, "max_position_embeddings": a.max_seq_len, "hidden_act": "silu",
             "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": shards == 1}
    (folder / "config.json").write_text(json.dumps(table))
    tensors = {}
    for name, p in model.named_parameters():
        if name.endswith(("wq.weight", "wk.weight")):  # each head's pairs -> its two halves
            p = p.unflatten(0, (-1, a.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name if name.startswith("lm_head") else "model." + name] = p.contiguous()
    files = ["model.safetensors"] if shards == 1 else [
        f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in list(tensors)[i::shards]}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for i, file in enumerate(files) for name in list(tensors)[i::shards]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_json_tokenizer(folder):
    """A byte-level BPE of 600 tokens, with a BOS that its post-processor puts in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([embedded_text("test")[:20000]], trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))


def write_tiktoken(folder):
    words = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    folder.joinpath("tokenizer.model").write_bytes(b"".join(
        base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))


def write_good(kind, folder):
    """A good folder of one of faults.KINDS, of 0.2 to 0.8 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind.startswith("hf"):
        write_json_tokenizer(folder)
        return write_hf(folder, good_model(600, torch.float16 if "-" in kind else torch.float32, "-" not in kind),
                        3 if "-" in kind else 1)
    if kind == "llama3":
        write_tiktoken(folder)
        return write_meta(folder, good_model(517, torch.bfloat16, rope_theta=5e5), use_scaled_rope=True)
    name = "tokenizer.model.v3" if kind == "mistral" else "tokenizer.model"
    if kind == "compressed":
        model = good_model(1024, torch.float32)
        model.layers[1].feed_forward = FeedForward(ModelArgs(**{**vars(model.args), "hidden_dim": 40}))
        model.layers[1].feed_forward.requires_grad_(False)
        for matrix in ("layers.2.attention.wq", "layers.2.feed_forward.w1"):
            m, n = model.get_submodule(matrix).weight.shape
            model.replace_matrix(matrix, LowRankLinear(torch.randn(m, 7) / 10, torch.randn(7, n) / 5))
        folder.rmdir()
        return save_checkpoint(model, folder, {"made": "by extras.faults"}, TINY / "tokenizer.model")
    shutil.copyfile(TINY / "tokenizer.model", folder / name)
    if kind == "mistral":
        from safetensors.torch import save_file
        model = good_model(1024, torch.bfloat16)
        (folder / "params.json").write_text(json.dumps(meta_table(model.args, sliding_window=4096)))
        return save_file(dict(model.state_dict()), folder / "consolidated.safetensors")
    write_meta(folder, good_model(1024, torch.float32), 2 if kind == "meta2" else 1, multiple_of=16)


# ------------------------------------------------------------------------------------------------ whole files

def files_of(folder, *endings):
    """Its files of such names, but none that is vast since the damage before."""
    return sorted(f for f in folder.iterdir() if f.is_file() and f.name.endswith(endings or "")
                  and f.stat().st_size < 2 ** 26)


def pick(folder, rng, *endings):
    return rng.choice(files_of(folder, *endings))


def place(rng, size):
    """A position in a file: anywhere, or near one of its ends, where the headers and directories are."""
    return rng.choice([rng.randrange(size), rng.randrange(min(size, 600)), size - 1 - rng.randrange(min(size, 1200))])


def flip(folder, rng):
    file, count = pick(folder, rng), rng.choice([1, 1, 1, 8, 64])
    content = bytearray(file.read_bytes())
    places = [place(rng, len(content)) for _ in range(count)]
    for at in places:
        content[at] ^= 1 << rng.randrange(8) if count < 64 else rng.randrange(1, 256)
    file.write_bytes(content)
    return f"{file.name} at {places[:3]}"


def splice(folder, rng):
    """Bytes cut out, put in, or moved, so that what follows stands at the wrong place."""
    file, how = pick(folder, rng), rng.choice(["cut the end", "cut out", "put in", "append", "swap halves"])
    content = file.read_bytes()
    at, n = place(rng, len(content)), rng.choice([1, 2, 7, 64, 4096])
    file.write_bytes({"cut the end": content[:at], "cut out": content[:at] + content[at + n:],
                      "put in": content[:at] + rng.randbytes(n) + content[at:], "append": content + rng.randbytes(n),
                      "swap halves": content[at:] + content[:at]}[how])
    return f"{file.name} {how} at {at}, {n}"


def replace_file(folder, rng):
    """Something else stands where a file stood."""
    file = pick(folder, rng)
    how = rng.choice(["nothing", "empty", "folder", "loop", "far link", "good link", "dangling", "link to folder",
                      "pipe", "sparse", "zeros", "other", "long link"])
    content = file.read_bytes()
    other = pick(folder, rng).read_bytes()
    file.unlink()
    if how == "good link":  # as Hugging Face's cache is made
        (folder.parent / "blobs").mkdir(exist_ok=True)
        (folder.parent / "blobs" / file.name).write_bytes(content)
        file.symlink_to(f"../blobs/{file.name}")
    elif how in ("empty", "zeros", "other"):
        file.write_bytes({"empty": b"", "zeros": bytes(len(content)), "other": other}[how])
    elif how == "sparse":
        file.write_bytes(content[:rng.choice([0, 100, len(content)])])
        os.truncate(file, BIG)
    elif how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how != "nothing":
        file.symlink_to({"loop": file.name, "far link": "/proc/self/mem", "dangling": "gone", "link to folder": ".",
                         "long link": "x/" * 2000}[how])
    return f"{file.name} is {how}"


def rename(folder, rng):
    """Shards and other files under wrong names, doubled or lost."""
    file, how = pick(folder, rng), rng.choice(["swap", "copy", "move", "double"])
    if how == "swap":
        other = rng.choice(files_of(folder, file.suffix))
        a, b = file.read_bytes(), other.read_bytes()
        file.write_bytes(b)
        other.write_bytes(a)
        return f"{file.name} and {other.name} swapped"
    to = folder / rng.choice(["consolidated.00.pth", "consolidated.01.pth", "consolidated.02.pth", "params.json",
                              "consolidated.safetensors", "model.safetensors", "config.json", "tokenizer.json",
                              "tokenizer.model", "model.safetensors.index.json", "consolidated.é\n.pth"])
    (shutil.copy if how in ("copy", "double") else shutil.move)(file, to)
    return f"{file.name} {how} {to.name!r}"


# ------------------------------------------------------------------------------------------------ JSON

def json_text(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


HARD = (None, True, False, 0, -1, 1, 2, 3, 4, 5, 8, 1.5, 48.0, 47, 96, 1e-300, 1e-5, 1e300, 10 ** 9, 2 ** 31, 2 ** 53,
        2 ** 63, 10 ** 400, float("nan"), float("inf"), -float("inf"), "", "48", "nan", [], {}, [1], {"a": 1}, [[[[]]]],
        b"[" * 10 ** 5 + b"]" * 10 ** 5, b'{"a":' * 10 ** 5, b"1" * 10 ** 5, b"-0", b"1e999", b"0x10", b'"\\ud800"',
        b'"' + b"a" * 10 ** 6 + b'"', "\x00", "../x", "llama3", b'{"factor": 2, "factor": 3}')


def nodes(tree):
    """Every (table or list, its key) in a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def field(folder, rng):
    """A field of a JSON file, at any depth, is gone, of another type, or of an absurd value."""
    file = rng.choice([*files_of(folder, "params.json", "config.json") * 6, pick(folder, rng, ".json")])
    tree = json.loads(file.read_text())
    top = [(tree, key) for key in tree]
    where, key = rng.choice(rng.choice([top, list(nodes(tree))]))
    old, how = where[key], rng.choice(["gone", "hard", "hard", "hard", "scaled", "renamed"])
    value = rng.choice(HARD)
    if how == "gone":
        where.pop(key)
    elif how == "renamed":
        where["x" + key] = where.pop(key)
    elif how == "scaled" and isinstance(old, (int, float)):
        value = where[key] = old * rng.choice([2, 0.5, -1, 1.0001, 3, 10])
    else:
        where[key] = "THE VALUE" if isinstance(value, bytes) else value
    text = json.dumps(tree).encode()
    file.write_bytes(text.replace(b'"THE VALUE"', value) if isinstance(value, bytes) else text)
    return f"{file.name}: {key} {how} {str(value)[:40]}"


def new_field(folder, rng):
    """Fields that good files may have, or other models' files do, with every kind of value."""
    file = pick(folder, rng, "params.json", "config.json")
    names = ("ranks", "moe", "sliding_window", "rope_scaling", "rope_parameters", "vocab_size", "ffn_dim_multiplier",
             "multiple_of", "head_dim", "max_seq_len", "use_scaled_rope", "tie_word_embeddings", "rope_theta",
             "attention_bias", "quantization_config", "n_kv_heads", "num_key_value_heads", "hidden_dim", "__class__")
    value = rng.choice([*HARD, {"layers.0.attention.wq": rng.choice([0, 7, 10 ** 9, 2 ** 40])},
                        {"layers.9.attention.wq": 3}, {"layers.0.feed_forward": rng.choice([40, 10 ** 9])},
                        {"rope_type": "llama3", "factor": 2.0}, {"factor": float("nan")}, {"layers.0": 3}, {"": 3},
                        {"rope_type": ["llama3"]}, -1])
    name = rng.choice(names)
    head, tail = json.dumps(name).encode() + b": " + json_text(value), file.read_bytes().strip()
    file.write_bytes(b"{" + head + b", " + tail[1:] if rng.random() < 0.3 else tail[:-1] + b", " + head + b"}")
    return f"{file.name} {name} {str(value)[:60]} (also)"


def sizes(folder, rng):
    """Sizes that fit each other, but no memory."""
    file = pick(folder, rng, "params.json", "config.json")
    table, hf = json.loads(file.read_text()), file.name == "config.json"
    big = rng.choice([10 ** 6, 10 ** 9, 2 ** 31, 2 ** 40, 2 ** 52])
    change = rng.choice([{"n_layers": big}, {"dim": 4 * big, "hidden_dim": big}, {"hidden_dim": big},
                         {"n_heads": big, "n_kv_heads": big}, {"vocab_size": big}, {"head_dim": 2 * big},
                         {"multiple_of": big}, {"max_seq_len": big}])
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size",
             "max_seq_len": "max_position_embeddings"} if hf else {}
    file.write_text(json.dumps({**table, **{names.get(name, name): value for name, value in change.items()}}))
    return f"{file.name} {change}"


def json_file(folder, rng):
    """A JSON file that is another thing as a whole."""
    file = pick(folder, rng, ".json")
    text = file.read_bytes()
    how = rng.choice(["list", "deep", "bomb", "bom", "utf-16", "nul", "latin", "twice", "number", "spaces", "nan"])
    file.write_bytes({"list": b"[" + text + b"]", "deep": b'{"a":' * 10 ** 6 + b"1" + b"}" * 10 ** 6,
                      "bomb": text.rstrip()[:-1] + b', "bomb": [' + b"[]," * 10 ** 7 + b"1]}",
                      "bom": b"\xef\xbb\xbf" + text, "utf-16": text.decode().encode("utf-16"), "nul": text + b"\0",
                      "latin": text.replace(b'"', b'"\xe9', 1), "twice": text + text, "number": b"7",
                      "spaces": b" " * 1000 + text + b"\n" * 1000, "nan": b"NaN"}[how])
    return f"{file.name} as {how}"


def index(folder, rng):
    """model.safetensors.index.json: names that leave the folder, loop, or are not those of the files."""
    file = pick(folder, rng, ".index.json")
    table = json.loads(file.read_text())
    names = sorted(table["weight_map"])
    shutil.copy(pick(folder, rng, ".safetensors"), folder.parent / "outside.safetensors")
    value = rng.choice(["../outside.safetensors", str(folder.parent / "outside.safetensors"), file.name, "gone", "",
                        ".", "..", "a/../" + table["weight_map"][names[0]], 3, None, ["model"], {}, "x" * 5000, "\0",
                        "config.json", "line\nline", "\ud800", *sorted(set(table["weight_map"].values()))])
    for name in rng.choice([names[:1], names, names[:5]]):
        table["weight_map"][name] = value
    file.write_text(json.dumps(table))
    return f"{file.name} names {str(value)[:40]!r}"


# ------------------------------------------------------------------------------------------------ tensors

def changed(t, rng):
    """(what was done, whatever stands in the place of the tensor t)."""
    n = t.numel()
    kinds = {
        "transposed": lambda: t.t().contiguous(), "transposed view": lambda: t.t(),
        "strided": lambda: t.repeat(2, 2)[::2, ::2],
        "int8": lambda: t.to(torch.int8), "int32": lambda: t.to(torch.int32), "bool": lambda: t > 0,
        "int64": lambda: t.long(), "complex": lambda: t.to(torch.complex64), "fp8": lambda: t.to(torch.float8_e4m3fn),
        "fp16": lambda: t.half(), "bf16": lambda: t.bfloat16(), "fp32": lambda: t.float(), "fp64": lambda: t.double(),
        "zero dim": lambda: t[:0], "empty": lambda: t.new_empty(0), "scalar": lambda: t.flatten()[0].clone(),
        "flat": lambda: t.flatten(), "more dims": lambda: t[None], "less a row": lambda: t[:-1].clone(),
        "one row more": lambda: torch.cat([t, t[:1]]), "zeros": lambda: torch.zeros_like(t),
        "permuted": lambda: t.flip(0),
        "nan": lambda: poked(t, rng, float("nan")), "inf": lambda: poked(t, rng, float("inf")),
        "huge": lambda: t * torch.finfo(t.dtype).max / 100, "large": lambda: t * 1e18, "tiny": lambda: t * 1e-30,
        "one weight": lambda: poked(t, rng, 0.5), "many dims": lambda: t.flatten()[0].clone()[(None,) * 60],
        "expanded": lambda: t.flatten()[:1].expand(n).view(t.shape) if t.ndim == 1 else t[:1].expand(t.shape),
        "vast": lambda: t.flatten()[:1].expand(2 ** 40), "sparse": lambda: t.to_sparse(),
        "csr": lambda: t.to_sparse_csr(),
        "parameter": lambda: torch.nn.Parameter(t), "meta": lambda: t.to("meta"), "list": lambda: t.tolist(),
        "quantised": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "none": lambda: None,
        "nested": lambda: torch.nested.nested_tensor([t, t]), "storage": lambda: t.untyped_storage(),
        "text": lambda: "W",
        "middle": lambda: torch.cat([t, t, t])[len(t):2 * len(t)], "numpy": lambda: t.float().numpy()}
    how = rng.choice(list(kinds))
    return how, kinds[how]()


def poked(t, rng, value):
    t = t.clone()
    t.view(-1)[rng.randrange(t.numel())] = value
    return t


def tensor(folder, rng):
    """A file of weights written again, whole and with right checksums, after one of its tensors has changed."""
    file = pick(folder, rng, ".pth", ".safetensors")
    if file.suffix == ".pth":
        tensors = torch.load(file, weights_only=True)
    else:
        from safetensors.torch import load_file, save_file
        tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    how = rng.choice(["lost", "renamed", "extra", "doubled", "rope.freqs", *["changed"] * 12])
    if how == "changed":
        how, tensors[name] = changed(tensors[name], rng)
    elif how in ("lost", "renamed"):
        t = tensors.pop(name)
        tensors.update({name + "x": t} if how == "renamed" else {})
    else:
        tensors[{"extra": "x" + name, "doubled": rng.choice(sorted(tensors))}.get(how, how)] = tensors[name].clone()
    if file.suffix == ".pth":
        torch.save(tensors, file)
    else:
        save_file({k: t.contiguous() for k, t in tensors.items()}, file)
    return f"{file.name}: {name} {how}"


def header(folder, rng):
    """The header of a .safetensors file, rewritten: offsets, shapes, types and names that may still add up."""
    file = pick(folder, rng, ".safetensors")
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    table, data = json.loads(content[8:start]), content[start:]
    names = sorted(name for name in table if name != "__metadata__")
    a, b = rng.sample(names, 2)
    same = [name for name in names if name != a and table[name]["shape"] == table[a]["shape"]]
    how = rng.choice(["swap", "swap", "swap", "overlap", "overlap all", "out", "negative", "float", "length", "type",
                      "type", "shape", "huge shape", "many dims", "double", "double other", "deep", "metadata", "hole",
                      "odd", "reversed", "null", "checks"])
    size, length, text = table[a]["data_offsets"], None, None
    if how in ("swap", "overlap all"):
        other = rng.choice(same or [b])
        table[other]["data_offsets"], old = size, table[other]["data_offsets"]
        table[a]["data_offsets"] = old if how == "swap" else size
    elif how in ("overlap", "out", "negative", "float", "reversed", "null"):
        table[a]["data_offsets"] = {"overlap": [size[0] + 4, size[1] + 4], "out": [len(data), len(data) + 64],
                                    "negative": [-8, size[1]], "float": [float(size[0]), size[1]],
                                    "reversed": size[::-1], "null": None}[how]
    elif how == "type":
        table[a]["dtype"] = rng.choice(["I32", "I16", "F16", "BF16", "F32", "F64", "F8_E4M3", "BOOL", "U8", "C64", "x",
                                        None, "F4"])
    elif how in ("shape", "huge shape", "many dims"):
        table[a]["shape"] = {"shape": rng.choice([table[a]["shape"][::-1], [-1], [], [0, 5], [1.0], None]),
                             "huge shape": [2 ** 32, 2 ** 32], "many dims": [1] * 10 ** 5 + table[a]["shape"]}[how]
    elif how == "metadata":
        table["__metadata__"] = rng.choice([3, {"a": 3}, {"format": "np"}, [], {"format": "pt", "x": "y" * 10 ** 6}])
    elif how == "hole":
        data += b"\0" * rng.choice([1, 8])
    elif how == "odd":
        text = json.dumps(table) + " " * rng.randrange(1, 9)
    elif how == "length":
        length = rng.choice([2 ** 63, 2 ** 64 - 1, 0, 10 ** 8, 10 ** 8 + 1, start, len(content)])
    text = (text or json.dumps(table)).encode()
    if how.startswith("double"):
        text = b"{" + json.dumps({a: table[a if how == "double" else b]}).encode()[1:-1] + b"," + text[1:]
    elif how == "deep":
        text = b'{"a":' * 10 ** 5 + text
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return f"{file.name}: {how} {a}"


# ------------------------------------------------------------------------------------------------ pickles

class Code:
    """What a pickle calls when it is read."""
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def copies(rng):
    """A small pickle whose reader makes a large dict and copies it a hundred thousand times."""
    table = pickle.dumps({str(i): i for i in range(5000)}, 2)[2:-1]
    one = b"ccollections\nOrderedDict\nq\xff" + b"h\xfe\x85R0" * 10 ** 5
    return b"\x80\x02" + table + b"r\xfe\x00\x00\x00" + one.replace(b"q\xff", b"r\xff\x00\x00\x00").replace(
        b"h\xfe", b"h\xffh\xfe") + b"."


PICKLES = {
    "system": lambda rng: pickle.dumps({"a": Code(os.system, PAYLOAD)}, rng.choice([0, 2, 4])),
    "eval": lambda rng: pickle.dumps(Code(eval, f"__import__('os').system('{PAYLOAD}')"), rng.choice([0, 2, 4])),
    "inst": lambda rng: b"(S'" + PAYLOAD.encode() + b"'\nios\nsystem\n.",
    "getattr": lambda rng: pickle.dumps(Code(getattr, torch.Tensor, "share_memory_"), 2),
    "bytearray": lambda rng: b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85Rs.",
    "bytearray8": lambda rng: b"\x80\x05\x96" + struct.pack("<Q", BIG) + b".",
    "long memo": lambda rng: b"\x80\x02}r\xf0\xff\xff\x7f.",
    "long text": lambda rng: b"\x80\x02X\xff\xff\xff\xff.", "long int": lambda rng: b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "copies": copies, "nothing": lambda rng: b"", "stop": lambda rng: b"\x80\x02.",
    "deep": lambda rng: b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".",
    "deep tuples": lambda rng: b"\x80\x02)" + b"\x85" * 10 ** 6 + b".",
    "a tensor": lambda rng: b"\x80\x02ctorch\nTensor\n)R.", "list": lambda rng: pickle.dumps([1, 2], 2),
    "rebuild": lambda rng: b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n)R.",
    "hub": lambda rng: b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R.",
    "random": lambda rng: b"\x80\x02" + rng.randbytes(rng.randrange(1, 200)) + b"."}


def archive(folder, rng):
    """A .pth file as another archive: a pickle with code or a bomb in it, records lost, doubled, swapped, packed."""
    file = pick(folder, rng, ".pth")
    with zipfile.ZipFile(file) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    root = records[0][0].partition("/")[0]
    how = rng.choice([*PICKLES, *["flip"] * 3, *["flip data.pkl"] * 3, "swap", "lost", "packed", "big endian",
                      "doubled", "constants.pkl", "script", "legacy", "plain", "comment", "prefix", "no sums", "short",
                      "long"])
    packed, order = zipfile.ZIP_STORED, [name for name, _ in records]
    if how == "legacy":
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
        return f"{file.name}: {how}"
    if how == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
        return f"{file.name}: {how}"
    if how == "plain":
        file.write_bytes(PICKLES[rng.choice(list(PICKLES))](rng))
        return f"{file.name}: {how}"
    if how == "no sums":  # as torch.serialization.set_crc32_options(False) writes it
        content = file.read_bytes()
        for _, record in records:
            content = content.replace(struct.pack("<I", zlib.crc32(record)), bytes(4))
        file.write_bytes(content)
        return f"{file.name}: {how}"
    data = dict(records)
    which = rng.choice([name for name in order if "/data/" in name])
    if how in PICKLES:
        data[f"{root}/data.pkl"] = PICKLES[how](rng)
    elif how.startswith("flip"):  # with the right checksum: other weights, or another pickle
        name = f"{root}/data.pkl" if how == "flip data.pkl" else which
        content = bytearray(data[name])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        data[name] = bytes(content)
    elif how == "swap":
        other = rng.choice([name for name in order if "/data/" in name])
        data[which], data[other] = data[other], data[which]
    elif how in ("short", "long"):
        data[which] = data[which][:-4] if how == "short" else data[which] + bytes(64)
    elif how == "lost":
        data.pop(rng.choice(order))
    elif how == "packed":
        packed = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
        data[which] = rng.choice([data[which], bytes(2 ** 27)])
    elif how == "big endian":
        data[f"{root}/byteorder"] = rng.choice([b"big", b"", b"odd", b"x" * 1000])
    elif how == "constants.pkl":
        data[f"{root}/constants.pkl"] = pickle.dumps(Code(os.system, PAYLOAD))
    buffer = io.BytesIO(b"prefix" * 100 if how == "prefix" else b"")
    with zipfile.ZipFile(buffer, "a", packed) as new:
        for name, content in data.items():
            pad = -(buffer.tell() + 30 + len(name) + 4) % 64  # torch aligns what it maps
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = packed, b"FB" + struct.pack("<H", pad) + b"Z" * pad
            new.writestr(info, content)
        if how == "doubled":
            new.writestr(rng.choice([f"{root}/data.pkl", which]), PICKLES["system"](rng))
        if how == "comment":
            new.comment = b"PK\5\6" + rng.randbytes(60)
    file.write_bytes(buffer.getvalue())
    return f"{file.name}: {how}"


# ------------------------------------------------------------------------------------------------ tokenizers

def tokenizer_bytes(folder, rng):
    """Many flips in a tokenizer's file, which its library reads in C++ or Rust."""
    file = rng.choice([f for f in files_of(folder) if f.name.startswith("tokenizer")])
    content = bytearray(file.read_bytes())
    start = rng.choice([0, max(0, len(content) - 400)])  # SentencePiece: pieces, then what it was trained with
    end = rng.choice([min(len(content), start + 400), len(content)])
    for _ in range(rng.choice([1, 2, 5, 30, 200])):
        content[rng.randrange(start, end)] = rng.choice([0, 0x7f, 0x80, 0xff, rng.randrange(256)])
    file.write_bytes(content)
    return f"{file.name} from {start}"


def tokenizer_lines(folder, rng):
    """tiktoken's lines: ranks doubled, absurd or lost, words not base64; in any other file, its lines."""
    file = rng.choice([f for f in files_of(folder) if f.name.startswith("tokenizer")])
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    how = rng.choice(["lost", "doubled", "digits", "negative", "word", "swap", "blank", "many"])
    lines[at:at + 1] = {"lost": [], "doubled": [lines[at]] * 2, "digits": [b"IQ== " + b"1" * 10 ** 5],
                        "blank": [b""] * 3, "negative": [b"IQ== -1"], "word": [b"= 3"], "swap": [lines[at - 1]],
                        "many": [b"%s %d" % (base64.b64encode(b"x%d" % i), i) for i in range(256, 10 ** 4)]}[how]
    file.write_bytes(b"\n".join(lines))
    return f"{file.name} line {at} {how}"


def tokenizer_json(folder, rng):
    """A tokenizer.json with a vocabulary, merges or steps that do not hold together."""
    file = pick(folder, rng, "tokenizer.json")
    table = json.loads(file.read_text())
    vocab, merges = table["model"]["vocab"], table["model"]["merges"]
    word = rng.choice(sorted(vocab))
    change = rng.choice([
        lambda: vocab.update({word: rng.choice([2 ** 31, 2 ** 32 - 1, 2 ** 32, -1, 10 ** 6, 1.5, 0, 600, 599])}),
        lambda: vocab.pop(word), lambda: merges.pop(rng.randrange(len(merges))), lambda: merges.reverse(),
        lambda: merges.append(["no", "such"]), lambda: merges.insert(0, merges[-1]), lambda: merges.append(["a"]),
        lambda: table["model"].update(type=rng.choice(["WordLevel", "Unigram", "WordPiece", "x", None])),
        lambda: table["model"].update(dropout=rng.choice([0.5, 2.0, -1, 1.0])), lambda: table["model"].update(
            byte_fallback=True, unk_token=rng.choice(["<unk>", "<s>"])), lambda: vocab.clear(),
        lambda: table["model"].update(continuing_subword_prefix=rng.choice(["é", "##"]), end_of_word_suffix="</w>"),
        lambda: table.update(pre_tokenizer={"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {
            "Regex": rng.choice(["(a+)+$", "(", "(x*)*y", ""])}}),
        lambda: table.update(pre_tokenizer=None), lambda: table.update(normalizer={"type": "Replace", "pattern": {
            "Regex": rng.choice(["", "e", "(.*)*"])}, "content": rng.choice(["", "xx" * 100])}),
        lambda: table["added_tokens"][0].update(id=rng.choice([2 ** 31, 600, 5, -1]),
                                                content=rng.choice(["", "e", "<s>"])),
        lambda: table.update(truncation={"direction": "Right", "max_length": rng.choice([0, 2]),
                                         "strategy": "LongestFirst", "stride": rng.choice([0, 5])}),
        lambda: table.update(padding={"strategy": {"Fixed": 2 ** 30}, "direction": "Right", "pad_to_multiple_of": None,
                                      "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}),
        lambda: table["post_processor"].update(special_tokens={"<s>": {
            "id": "<s>", "ids": rng.choice([[], [2 ** 31], [5, 6], [700]]), "tokens": ["<s>"]}}),
        lambda: table.update(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 700],
                                             "trim_offsets": True, "add_prefix_space": False}),
        lambda: table.update(model={"type": "Unigram", "unk_id": rng.choice([None, 0, 99]), "vocab": rng.choice(
            [[], [["a", 0.0]], [["a", 1e308], ["b", -1e308]]]), "byte_fallback": rng.random() < 0.5})])
    change()
    file.write_text(json.dumps(table))
    return f"{file.name} {word!r} {len(vocab)} {len(merges)}"


DAMAGES = (*[flip] * 3, splice, replace_file, rename, *[field] * 3, new_field, sizes, json_file, index, *[tensor] * 3,
           *[header] * 3, *[archive] * 3, *[tokenizer_bytes] * 2, tokenizer_lines, *[tokenizer_json] * 2)
