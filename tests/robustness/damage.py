"""Good checkpoint folders of seven kinds, and the ways in which tests/robustness/faults.py breaks them.

A damage is a function of (folder, rng) that changes the folder's files and says in words what it did. It may raise
where it has nothing to break: a .safetensors file in a folder of .pth files, or in one that was broken before.

    record    one of the files in the zip archive that a .pth is: data.pkl (the names and sizes), data/0, data/1, ...
    header    of a .safetensors: 8 bytes that say how long the JSON after them is, and that JSON,
              {tensor's name: {"dtype": , "shape": , "data_offsets": [start, end]}}
"""
import base64
import io
import json
import math
import os
import shutil
import struct
import zipfile
import zlib

import torch

from data.checkpoint import save_checkpoint
from data.corpus import embedded_text
from data.tokenizer import load_tokenizer
from extras.export.hugging_face import write_hf
from model import FeedForward, LowRankLinear, ModelArgs, Transformer
from runtime.cli import TINY

KINDS = "meta", "meta2", "llama3", "mistral", "hf", "hf-sharded", "compressed"
COLUMNS = "wo.weight", "w2.weight", "tok_embeddings.weight"  # what Meta's shards split over columns
TOKENIZERS = "tokenizer.model", "tokenizer.model.v3", "tokenizer.json"
PAYLOAD = b"touch code-was-run; touch model/code-was-run"
BIG = 2 ** 34  # bytes of a sparse file, and what a pickle asks for


# ------------------------------------------------------------------------------------------------ good folders

def write_good(kind, folder):
    """A good folder of one of KINDS, of 0.2 to 0.8 MB; its parent is there."""
    if kind == "compressed":
        return save_checkpoint(compressed_model(), folder, {"made": "by tests.robustness.faults"}, load_tokenizer(TINY).files)
    folder.mkdir()
    if kind.startswith("hf"):
        write_json_tokenizer(folder)
        dtype, shard = (torch.float32, "5GB") if kind == "hf" else (torch.float16, "100KB")
        write_hf(good_model(dtype, tied=kind == "hf", vocab_size=600), load_tokenizer(folder), folder, shard)
        return (folder / "tokenizer_config.json").unlink()  # it says what tokenizer.json says
    if kind == "llama3":
        write_tiktoken(folder)
        return write_meta(folder, good_model(torch.bfloat16, vocab_size=517, rope_theta=5e5), use_scaled_rope=True)
    shutil.copyfile(TINY / "tokenizer.model", folder / ("tokenizer.model" + ".v3" * (kind == "mistral")))
    if kind == "mistral":
        model = good_model(torch.bfloat16)
        write_meta(folder, model, shards=0, sliding_window=4096)
        return write_tensors(dict(model.state_dict()), folder / "consolidated.safetensors")
    write_meta(folder, good_model(torch.float32), 2 if kind == "meta2" else 1, multiple_of=16)


def good_model(dtype, tied=False, **changes):
    """A LLaMA of 3 layers and less than 200,000 parameters, whose predictions are sure of something."""
    torch.manual_seed(0)
    args = ModelArgs(**{**dict(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=80, norm_eps=1e-5,
                               vocab_size=1024, max_seq_len=512), **changes})
    model = Transformer(args, tied).requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
    return model.to(dtype)


def compressed_model():
    """good_model with an MLP of half the channels and two matrices of rank 7."""
    model = good_model(torch.float32)
    model.layers[1].feed_forward = FeedForward(ModelArgs(**{**vars(model.args), "hidden_dim": 40}))
    for matrix in ("layers.2.attention.wq", "layers.2.feed_forward.w1"):
        m, n = model.get_submodule(matrix).weight.shape
        model.set_submodule(matrix, LowRankLinear(torch.randn(m, 7) / 10, torch.randn(7, n) / 5))
    return model.requires_grad_(False)


def write_meta(folder, model, shards=1, **more):
    table = {name: value for name, value in {**vars(model.args), **more}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(table))
    for i in range(shards):
        part = {name: p.clone() if p.ndim == 1 else p.chunk(shards, int(name.endswith(COLUMNS)))[i].clone()
                for name, p in model.state_dict().items()}
        write_tensors(part, folder / f"consolidated.{i:02}.pth")


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
    lines = [base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


# ------------------------------------------------------------------------------------------------ any file

def pick(folder, rng, *endings):
    """One of its files of such names, but none that is vast since the damage before."""
    return rng.choice([file for file in sorted(folder.iterdir()) if file.is_file()
                       and file.name.endswith(endings or "") and file.stat().st_size < 2 ** 26])


def written(rng, file, made):
    """Write one of {how: content} to the file, and say which."""
    how = rng.choice(list(made))
    file.write_bytes(made[how])
    return f"{file.name}: {how}"


def flipped(content, rng):
    """The content with a bit turned: anywhere, or near one of its ends, where headers and directories are."""
    size = len(content)
    at = rng.choice([rng.randrange(size), rng.randrange(min(size, 600)), size - 1 - rng.randrange(min(size, 1200))])
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def flip(folder, rng):
    """Bits turned; every other time in the tokenizer's file, which a library in C++ or Rust reads."""
    file, count = pick(folder, rng, *rng.choice([(), TOKENIZERS])), rng.choice([1, 1, 1, 8, 64])
    content = file.read_bytes()
    for _ in range(count):
        content = flipped(content, rng)
    return written(rng, file, {f"{count} bits": content})


def splice(folder, rng):
    """Bytes cut off or out, put in or appended, so that what follows stands at the wrong place."""
    file = pick(folder, rng)
    content = file.read_bytes()
    at, n = rng.choice([rng.randrange(len(content)), rng.randrange(600)]), rng.choice([1, 7, 64, 4096])
    head, tail = content[:at], content[at:]
    return written(rng, file, {f"cut at {at}": head, f"less {n} at {at}": head + tail[n:],
                               f"{n} more at {at}": head + rng.randbytes(n) + tail, f"{n} more": content + bytes(n)})


LINKS = {"loop": "{}", "dangling": "gone", "link to a device": "/proc/self/mem", "link to its folder": ".",
         "long link": "x/" * 2000, "good link": "../moved-{}"}


def replace(folder, rng):
    """Something else stands where a file stood, which is beside the folder now: what a good link leads to."""
    file, other = pick(folder, rng), pick(folder, rng).read_bytes()
    contents = {"empty": b"", "zeros": bytes(file.stat().st_size), "another": other, "sparse": other[:100]}
    how = rng.choice(["nothing", "folder", "pipe", *contents, *LINKS])
    file.rename(folder.parent / f"moved-{file.name}")
    if how in LINKS:
        file.symlink_to(LINKS[how].format(file.name))
    elif how in contents:
        file.write_bytes(contents[how])
        if how == "sparse" and file.suffix in (".pth", ".safetensors"):  # other files are read whole
            os.truncate(file, BIG)
    elif how != "nothing":
        (os.mkdir if how == "folder" else os.mkfifo)(file)
    return f"{file.name} is {how}"


def rename(folder, rng):
    """Two files swapped, one copied over the other, or one copied or moved to a name that another has elsewhere."""
    file = pick(folder, rng)
    to = rng.choice([pick(folder, rng), *map(folder.joinpath, (
        "consolidated.00.pth", "consolidated.01.pth", "consolidated.02.pth", "consolidated.safetensors", "params.json",
        "model.safetensors", "model.safetensors.index.json", "config.json", "consolidated.é\n.pth"))])
    content, there, moved = file.read_bytes(), to.read_bytes() if to.exists() else None, rng.random() < 0.5
    if moved:
        file.unlink() if there is None else file.write_bytes(there)
    to.write_bytes(content)
    return f"{file.name} {'swapped with' if moved and there else 'moved to' if moved else 'copied to'} {to.name!r}"


# ------------------------------------------------------------------------------------------------ JSON

VALUES = [*'null true false 0 -1 1 2 3 4 5 8 47 96 1.5 48.0 -0 0x10 1e-300 1e-5 1e300 1e999 NaN Infinity -Infinity '
          '1000000000 2147483648 9007199254740992 9223372036854775808 "" "48" "nan" "llama3" "../x" "\\u0000" "\\ud800"'
          ' "\\n" [] {} [1] [[[[]]]] {"a":1} {"factor":2,"factor":3} {"factor":NaN} {"rope_type":"llama3","factor":2} '
          '{"rope_type":["llama3"]} {"layers.0.attention.wq":7} {"layers.0.attention.wq":1099511627776} {"layers.0":3} '
          '{"layers.9.attention.wq":3} {"layers.0.feed_forward":40} {"layers.0.feed_forward":1e9} {"":3}'.split(),
          "1" + "0" * 400, "1" * 10 ** 5, "[" * 10 ** 5 + "]" * 10 ** 5, '{"a":' * 10 ** 5, f'"{"a" * 10 ** 6}"']
FACTORS = 2, 0.5, -1, 1.0001, 3, 10
FIELDS = ("ranks", "moe", "sliding_window", "rope_scaling", "rope_parameters", "rope_theta", "vocab_size", "head_dim",
          "ffn_dim_multiplier", "multiple_of", "max_seq_len", "use_scaled_rope", "tie_word_embeddings", "hidden_dim",
          "attention_bias", "quantization_config", "n_kv_heads", "num_key_value_heads", "__class__")


def nodes(tree):
    """Every (table or list, its key) in a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def field(folder, rng):
    """A field of a JSON file, at any depth or a new one, is gone, renamed, scaled, there twice, or of any value."""
    file = pick(folder, rng, rng.choice([".json", *["params.json", "config.json"] * 2]))
    tree = json.loads(file.read_text())
    where, key = rng.choice(rng.choice([[(tree, key) for key in tree], [(tree, key) for key in FIELDS],
                                        list(nodes(tree))]))
    how, value = rng.choice(["gone", "renamed", "scaled", "twice", *["of value"] * 5]), rng.choice(VALUES)
    if how == "gone":
        del where[key]
    elif how == "renamed":
        where[f"x{key}"] = where.pop(key)
    elif how == "scaled":
        where[key] *= rng.choice(FACTORS)
    else:
        value += f', "{key}": {json.dumps(where[key])}' if how == "twice" else ""
        where[key] = "THE VALUE"
    file.write_text(json.dumps(tree).replace('"THE VALUE"', value))
    return f"{file.name}: {key} {how} {value[:60]}"


def json_file(folder, rng):
    """A JSON file that is another thing as a whole."""
    file = pick(folder, rng, ".json")
    text = file.read_bytes()
    return written(rng, file, {
        "in a list": b"[" + text + b"]", "deep": b'{"a":' * 10 ** 6 + b"1" + b"}" * 10 ** 6, "a number": b"7",
        "with NUL": text + b"\0", "byte order mark": b"\xef\xbb\xbf" + text, "UTF-16": text.decode().encode("utf-16"), "twice": text + text,
        "Latin-1": text.replace(b'"', b'"\xe9', 1), "spaces": b" " * 1000 + text + b"\n" * 1000})


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}  # a step of a tokenizer.json
PUT = {  # file: {where in it: what may stand there}
    "model.safetensors.index.json": {("weight_map", "model.norm.weight"): [
        "../model/model-00001-of-00003.safetensors", "model-00001-of-00003.safetensors", "gone", "", ".", "..", 3, None,
        ["model"], "x" * 5000, "\0", "config.json", "line\nline", "\ud800", "model.safetensors.index.json"]},
    "tokenizer.json": {
        ("model", "vocab", "e"): [2 ** 31, 2 ** 32 - 1, 2 ** 32, -1, 10 ** 6, 1.5, 0, 600, 599],
        ("model", "vocab"): [{}, {"e": 0}], ("model", "merges", 0): [["no", "such"], ["a"], ["e", "e"], None],
        ("model", "type"): ["WordLevel", "Unigram", "WordPiece", "x", None], ("model", "unk_token"): ["<unk>", "<s>"],
        ("model",): [{"type": "Unigram", "unk_id": unk, "vocab": vocab} for unk in (None, 0, 99) for vocab in (
            [], [["a", 0.0]], [["a", 1e308], ["b", -1e308]])],
        ("pre_tokenizer",): [None, *({**SPLIT, "pattern": {"Regex": r}} for r in ("(a+)+$", "(", "(x*)*y", ""))],
        ("normalizer",): [{"type": "Replace", "pattern": {"Regex": r}, "content": content}
                          for r in ("", "e", "(.*)*") for content in ("", "xx" * 100)],
        ("added_tokens", 0, "id"): [2 ** 31, 600, 5, -1], ("added_tokens", 0, "content"): ["", "e", "</s>"],
        ("truncation",): [{"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}
                          for length in (0, 2) for stride in (0, 5)],
        ("padding",): [{"strategy": {"Fixed": 2 ** 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<s>"}],
        ("post_processor", "special_tokens", "<s>", "ids"): [[], [2 ** 31], [5, 6], [700]],
        ("post_processor",): [None, {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 700],
                                     "trim_offsets": True, "add_prefix_space": False}]}}


def put(folder, rng):
    """One place of a tokenizer.json or an index does not hold together with the others, or leads out of the folder."""
    file = pick(folder, rng, *PUT)
    where = rng.choice(list(PUT[file.name]))
    tree = node = json.loads(file.read_text())
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value = rng.choice(PUT[file.name][where])
    file.write_text(json.dumps(tree))
    return f"{file.name}: {where} is {str(value)[:40]!r}"


def tokenizer_lines(folder, rng):
    """tiktoken's lines: ranks doubled, absurd or lost, words not base64; in any other tokenizer's file, its lines."""
    file = pick(folder, rng, *TOKENIZERS)
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    made = {"lost": [], "doubled": [lines[at]] * 2, "many digits": [b"IQ== " + b"1" * 10 ** 5], "blank": [b""] * 3,
            "negative": [b"IQ== -1"], "no base64": [b"= 3"], "swapped": [lines[at], lines[at - 1]],
            "many": [base64.b64encode(b"x%d" % i) + b" %d" % i for i in range(256, 10 ** 4)]}
    return written(rng, file, {f"line {at} {how}": b"\n".join(lines[:at] + new + lines[at + 1:])
                               for how, new in made.items()})


# ------------------------------------------------------------------------------------------------ tensors

CHANGES = {  # how a tensor is changed: what stands in its place
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in (
        torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16,
        torch.float32, torch.float64)},
    "transposed": lambda t: t.t().contiguous(), "seen transposed": lambda t: t.t(), "no rows": lambda t: t[:0],
    "a number": lambda t: t.flatten()[0].clone(), "flat": lambda t: t.flatten(), "a dimension more": lambda t: t[None],
    "60 dimensions": lambda t: t.flatten()[0].clone()[(None,) * 60], "a row less": lambda t: t[:-1].clone(),
    "a row more": lambda t: torch.cat([t, t[:1]]), "zeros": torch.zeros_like, "turned": lambda t: t.flip(0),
    **{f"a row of {x}": lambda t, x=x: t.index_fill(0, torch.tensor(len(t) // 2), x) for x in (math.nan, math.inf, 1)},
    "huge": lambda t: t * torch.finfo(t.dtype).max / 100, "large": lambda t: t * 1e18, "tiny": lambda t: t * 1e-30,
    "one row for all": lambda t: t[:1].expand(t.shape), "2^40 times one": lambda t: t.flatten()[:1].expand(2 ** 40),
    "part of another": lambda t: torch.cat([t, t, t])[len(t):2 * len(t)], "a parameter": torch.nn.Parameter,
    "sparse": lambda t: t.to_sparse(), "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "on no device": lambda t: t.to("meta"), "a list": lambda t: t.tolist(), "None": lambda t: None}


def read_tensors(file):
    """{name: tensor} of a .pth or .safetensors file."""
    from safetensors.torch import load_file
    if file.suffix == ".pth":
        return torch.load(file, weights_only=True)
    return load_file(file)


def write_tensors(tensors, file):
    """Write such a file anew, whole and with right checksums."""
    from safetensors.torch import save_file
    if file.suffix == ".pth":
        torch.save(tensors, file)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def tensor(folder, rng):
    """A tensor is lost, renamed, there under a second name, or changed."""
    file = pick(folder, rng, ".pth", ".safetensors")
    tensors = read_tensors(file)
    name, other = rng.sample(sorted(tensors), 2)
    t = tensors.pop(name)
    made = {"lost": {}, "renamed": {name + "x": t}, f"also {other}": {name: t, other: t.clone()},
            "also rope.freqs": {name: t, "rope.freqs": t.clone()}, "twice": {name: t, "x" + name: t.clone()}}
    how = rng.choice([*made, *CHANGES])
    write_tensors({**tensors, **(made[how] if how in made else {name: CHANGES[how](t)})}, file)
    return f"{file.name}: {name} {how}"


# ------------------------------------------------------------------------------------------------ .safetensors

def read_header(file):
    """(the header's table, the bytes after it)."""
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def headed(text, data, length=None):
    """The content of a file. length: what it is to say of its header, which is `text`; None for the truth."""
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def header(folder, rng):
    """What the header says of a tensor, the text that it is, or its length; offsets and shapes may still add up."""
    file = pick(folder, rng, ".safetensors")
    table, data = read_header(file)
    names, text = sorted(table.keys() - {"__metadata__"}), json.dumps(table)
    a = rng.choice(names)
    (start, end), shape = table[a]["data_offsets"], table[a]["shape"]
    b = rng.choice([name for name in names if name != a and table[name]["shape"] == shape] or names)
    offsets = [table[b]["data_offsets"], [start + 4, end + 4], [len(data), len(data) + 64], [-8, end], [end, start],
               [float(start), end], None]
    types = ["I32", "I16", "F16", "BF16", "F32", "F64", "F8_E4M3", "BOOL", "U8", "C64", "F4", "x", None]
    shapes = [shape[::-1], [-1], [], [0, 5], [1.0], None, [2 ** 32, 2 ** 32], [1] * 10 ** 5 + shape]
    entries = [{"data_offsets": rng.choice(offsets)}, {"dtype": rng.choice(types)}, {"shape": rng.choice(shapes)}]
    length = rng.choice([2 ** 63, 2 ** 64 - 1, 0, 10 ** 8, 10 ** 8 + 1, len(text) + 8, len(text) + 8 + len(data)])
    metadata = rng.choice([3, {"a": 3}, [], {"format": "pt", "x": "y" * 10 ** 6}])
    made = {f"{a}, {b} swapped": {**table, a: table[b], b: table[a]}, "metadata": {**table, "__metadata__": metadata},
            **{f"{a} has {str(new)[:60]}": {**table, a: {**table[a], **new}} for new in entries}}
    return written(rng, file, {
        **{how: headed(json.dumps(new), data) for how, new in made.items()}, "spaces": headed(text + "   ", data),
        "deep": headed('{"a":' * 10 ** 5 + text, data), "hole": headed(text, data + bytes(8)),
        "twice": headed("{" + json.dumps({a: table[b]})[1:-1] + "," + text[1:], data),
        f"length {length}": headed(text, data, length)})


# ------------------------------------------------------------------------------------------------ .pth

def text(word):
    """The step that puts a word on the stack (BINUNICODE)."""
    return b"X" + struct.pack("<I", len(word)) + word


SYSTEM, EVALUATED = b"cos\nsystem\n", b"__import__('os').system('" + PAYLOAD + b"')"
PICKLES = {  # steps of pickles [pickletools]; obeyed, the first six run PAYLOAD
    "system, protocol 0": SYSTEM + b"(V" + PAYLOAD + b"\ntR.",
    "system, protocol 2": b"\x80\x02" + SYSTEM + text(PAYLOAD) + b"\x85R.",
    "system, protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(PAYLOAD) + b"\x85R.",
    "system in a table": b"\x80\x02}" + text(b"a") + SYSTEM + text(PAYLOAD) + b"\x85Rs.",
    "system, INST": b"(S'" + PAYLOAD + b"'\nios\nsystem\n.",
    "eval": b"\x80\x02cbuiltins\neval\n" + text(EVALUATED) + b"\x85R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\nctorch\nTensor\n" + text(b"share_memory_") + b"\x86R.",
    "hub": b"\x80\x02ctorch.hub\nload\n" + text(b"a") + b"\x85R.", "a class": b"\x80\x02ctorch\nTensor\n)R.",
    "1 GiB": b"\x80\x02}" + text(b"a") + b"cbuiltins\nbytearray\n\x8a\x04\x00\x00\x00\x40\x85Rs.",
    "16 GiB said": b"\x80\x05\x96" + struct.pack("<Q", BIG) + b".", "4 GiB said": b"\x80\x02X\xff\xff\xff\xff.",
    "2 GiB said": b"\x80\x02\x8b\xff\xff\xff\x7f1.", "long memo": b"\x80\x02}r\xf0\xff\xff\x7f.",
    "copies": b"\x80\x02}(" + b"".join(text(b"%d" % i) + b"K\x01" for i in range(5000)) + b"uq\x00" + (
        b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 10 ** 5 + b"."),
    "deep": b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b".", "a list": b"\x80\x02](K\x01K\x02e.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 10 ** 6 + b".", "nothing": b"", "stop": b"\x80\x02."}


def read_records(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_records(file, records, packed=zipfile.ZIP_STORED):
    """An archive of (name, content), with right checksums."""
    with zipfile.ZipFile(file, "w", packed) as archive:
        for name, content in records:
            archive.writestr(name, content)


def record(folder, rng):
    """A record of a .pth becomes another, with the right checksum: code, a bomb, other bits, other lengths."""
    file = pick(folder, rng, ".pth")
    records = read_records(file)
    pickled, *numbers = [name for name in records if "/data" in name and "/." not in name]
    name, other = rng.sample(numbers, 2)
    content, bomb = records[name], rng.choice(list(PICKLES))
    made = {"lost": [], "short": [(name, content[:-4])], "long": [(name, content + bytes(64))],
            "flipped": [(name, flipped(content, rng))], "another's": [(name, records[other])],
            "swapped": [(name, records[other]), (other, content)], "twice": [(name, content)] * 2,
            "packed": [(name, rng.choice([content, bytes(2 ** 27)]))]}
    pickles = {"pickle flipped": flipped(records[pickled], rng), f"pickle: {bomb}": PICKLES[bomb]}
    how = rng.choice([*made, *[*pickles] * 3])
    if how in pickles:
        name, made = pickled, {how: [(pickled, pickles[how])]}
    rest = [item for item in records.items() if item[0] not in (name, *dict(made[how]))]
    write_records(file, made[how] + rest, zipfile.ZIP_DEFLATED if how == "packed" else zipfile.ZIP_STORED)
    return f"{file.name}: {name} {how}"


def archive(folder, rng):
    """A .pth as another kind of file: without checksums, of torch before 1.6, a pickle alone, or after other bytes."""
    file, old = pick(folder, rng, ".pth"), io.BytesIO()
    torch.save(torch.load(file, weights_only=True), old, _use_new_zipfile_serialization=False)
    content = unsummed = file.read_bytes()
    for inside in read_records(file).values():  # as torch.serialization.set_crc32_options(False) writes it
        unsummed = unsummed.replace(struct.pack("<I", zlib.crc32(inside)), bytes(4))
    return written(rng, file, {
        "old": old.getvalue(), "a pickle": PICKLES[rng.choice(list(PICKLES))], "prefix": b"prefix" * 100 + content,
        "no sums": unsummed, "no sums and a bit": flipped(unsummed, rng)})


DAMAGES = (*[flip] * 4, splice, replace, rename, *[field] * 4, json_file, *[put] * 2, tokenizer_lines,
           *[tensor] * 3, *[header] * 3, *[record] * 3, archive)
