"""Export a folder for other tools, with dense matrices: `python -m extras.export --ckpt COMPRESSED --out FOLDER`.

Every product A B becomes W (m, n) again, and every lost channel becomes zeros. A dense folder is only converted.

    --format hf     config.json, model*.safetensors, tokenizer.json: what transformers and the tools around it read
    --format meta   params.json, consolidated.00.pth, tokenizer.model: what Meta's own code reads of its Llama 2 and 3

hf needs the packages safetensors, huggingface_hub and tokenizers. A sliding window is not exported: the positions of the
exported model end where the window does, and up to there full attention gives the same logits.
"""
import base64
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from data import need
from data.checkpoint import HF_FIELDS, HF_TENSORS, own_storage, read_args
from data.corpus import embedded_text
from extras import is_tied, product
from model import LowRankLinear, Transformer
from runtime import cli
from runtime.files import atomic_write, check_output, write_json

# A converted tokenizer must give the same ids here, and on the embedded text with its tables and indented code.
PROBE = "  Two  spaces,\ttabs\r\nand\n\n\nlines; 1234567 3.14; naïve été e\u0301 ½ ﬁ, 日本語 🙂 \x00 don't WE'RE ▁ a<s>b </s> <unk> "


def dense_weight(model, name):
    """W (m, n) of "layers.22.attention.wq.weight" in the model's dtype; A B is multiplied in fp32 at least.

    Channels that an MLP has lost are zeros again: silu(0) * 0 = 0.
    """
    module, hidden_dim = model.get_submodule(name.removesuffix(".weight")), model.args.hidden_dim
    W = product(module) if isinstance(module, LowRankLinear) else module.weight
    if "feed_forward" in name and (lost := hidden_dim - W.shape[name.endswith("w2.weight")]):
        W = F.pad(W, (0, lost) if name.endswith("w2.weight") else (0, 0, 0, lost))
    return W


def dense_shapes(model):
    """{name: meta tensor} of the dense model that `model` stands for; a tied head is not named."""
    with torch.device("meta"):
        dense = Transformer(model.args, tied=is_tied(model)).to(model.dtype)
    return dict(dense.named_parameters())


def export(model, tokenizer, out, layout="hf", shard="5GB"):
    """Write `model` with dense matrices as a new folder `out`, atomically; layout: "hf" or "meta".

    shard: how large a safetensors file may be, and so about the memory that this takes besides the model.
    ValueError where the layout cannot say what the model is, OSError where `out` cannot be written.
    """
    check_output(out)
    with atomic_write(out) as folder:
        folder.mkdir()
        if layout == "hf":
            write_hf(model, tokenizer, folder, shard)
        else:
            write_meta(model, tokenizer, folder)


# ------------------------------------------------------------------------------------------------ Hugging Face

def write_hf(model, tokenizer, folder, shard):
    """config.json, the weights in files of at most `shard` (one after the other in memory), the tokenizer."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    config, shapes = hf_config(model, tokenizer), dense_shapes(model)
    write_json(folder / "config.json", config)
    write_tokenizer(tokenizer, folder, config["max_position_embeddings"])
    names = {their_name(name): name for name in shapes}
    plan = split_torch_state_dict_into_shards({name: shapes[ours] for name, ours in names.items()},
                                              max_shard_size=shard)
    for file, inside in plan.filename_to_tensors.items():
        try:
            save_file({name: hf_weight(model, names[name]) for name in inside}, folder / file, {"format": "pt"})
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
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_weight(model, name):
    """The tensor on the CPU, alone in its storage, rows of wq and wk in Hugging Face's order."""
    W = dense_weight(model, name)
    if name.endswith(("wq.weight", "wk.weight")):
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
        print(f"positions    --ckpt does not say how many the model has; config.json says {positions:,}, as {like} has "
              "(to be edited there)")
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "hidden_act": "silu",
            **{theirs: getattr(args, ours) for ours, theirs in HF_FIELDS.items()},
            "max_position_embeddings": positions, "sliding_window": None, "head_dim": args.head_dim,
            "vocab_size": args.vocab_size, "tie_word_embeddings": is_tied(model), "rope_theta": args.rope_theta,
            "rope_scaling": scaling and {"rope_type": "llama3", **scaling, "original_max_position_embeddings":
                                         int(scaling["original_max_position_embeddings"])},
            "torch_dtype": str(model.dtype).removeprefix("torch."), "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.ends if len(tokenizer.ends) > 1 else next(iter(tokenizer.ends), None),
            **{name: i for name, i in generation.items() if name.endswith("_token_id")}}


def write_tokenizer(tokenizer, folder, positions):
    """All files of the tokenizer, and where there is none a tokenizer.json and a tokenizer_config.json."""
    from tokenizers import Tokenizer
    files = dict(tokenizer.files)
    if is_json(content := files[tokenizer.file.name]):
        made, files["tokenizer.json"] = Tokenizer.from_buffer(content), files.pop(tokenizer.file.name)
    else:
        sentencepiece = content[:1] == b"\n"  # a protocol buffer that starts with its first piece
        made = from_sentencepiece(tokenizer) if sentencepiece else from_tiktoken(content)
        words = " ".join(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))  # some may be split off first
        same = all(made.encode(text).ids == [*tokenizer.before, *tokenizer.encode(text), *tokenizer.after]
                   for text in (PROBE, words, embedded_text("test"), *tokenizer.special))
        if same:
            made.save(str(folder / "tokenizer.json"))
        else:
            print(f"tokenizer    {tokenizer.file.name} could not be converted to the same ids: copied as it is; "
                  "transformers may give other ids, or load the model but not the tokenizer")
        if same and not sentencepiece:  # under this name it would be taken for a SentencePiece model
            del files[tokenizer.file.name]
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    if "tokenizer_config.json" in files and str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 would give other ids for spaces
        files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if (folder / "tokenizer.json").is_file() and "tokenizer_config.json" not in files:
        named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.ends), None)}
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": positions, **{name: made.id_to_token(i) for name, i in named.items() if i is not None}})


def is_json(content):
    return content.lstrip()[:1] == b"{"


def merges(ranks):
    """[(left, right)] for every way that two tokens make a third, of {token: rank}; the lowest rank first.

    BPE merges in this order. Of equal ranks (Llama 2's runs of spaces) the one with the longest left part comes first,
    so that a run grows from its left end, as in SentencePiece.
    """
    pairs = [(rank, -i, token[:i], token[i:]) for token, rank in ranks.items() for i in range(1, len(token))
             if token[:i] in ranks and token[i:] in ranks]
    return [(left, right) for *_, left, right in sorted(pairs)]


def from_sentencepiece(tokenizer):
    """A `tokenizers` one of a SentencePiece BPE with byte fallback that, like Llama's, only turns spaces into "▁"."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers
    model = SentencePieceProcessor(model_file=str(tokenizer.file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    ranks = {piece: -model.get_score(i) for i, piece in enumerate(pieces)
             if not (i in special or model.is_byte(i) or model.is_unused(i))}
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges(ranks), byte_fallback=True,
                                unk_token=pieces[model.unk_id()], fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return with_special(made, sorted(tokenizer.special, key=tokenizer.special.get), tokenizer.bos_id)


def from_tiktoken(content):
    """A `tokenizers` one of Llama 3's lines of base64 and rank, its 256 special tokens after them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from data.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a letter for each byte: its own if that can be shown,
    others = iter(letter for letter in alphabet if ord(letter) > 255)  # else the next one from 256 on
    letters = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]

    def shown(token):
        return "".join(letters[byte] for byte in token)

    made = Tokenizer(models.BPE({shown(token): rank for token, rank in ranks.items()},
                                [(shown(left), shown(right)) for left, right in merges(ranks)], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    numbers, named = iter(range(256)), {place: token for token, place in LLAMA3_SPECIAL.items()}
    special = [named.get(i) or f"<|reserved_special_token_{next(numbers)}|>" for i in range(256)]
    return with_special(made, special, len(ranks))


def with_special(made, special, bos_id):
    """`made` with its special tokens, which are those of its vocabulary or come after it, and a BOS (or None)."""
    from tokenizers import AddedToken, processors
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos_id is not None:
        bos = made.id_to_token(bos_id)
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    return made


# ------------------------------------------------------------------------------------------------ Meta

def write_meta(model, tokenizer, folder):
    """params.json, consolidated.00.pth and the tokenizer's file. A tied head is named too: Meta's code asks for it."""
    write_json(folder / "params.json", meta_params(model.args))
    tensors = {name: own_storage(dense_weight(model, name).detach()) for name in dense_shapes(model)}
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


def main():
    p = cli.Parser(__doc__)
    cli.model_flags(p, "what to export", default=None, required=True,
                    help="a compressed folder, or a dense one of Meta's, Mistral's or Hugging Face's")
    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write, a new one")
    add("--format", choices=("hf", "meta"), default="hf", help="Hugging Face's or Meta's (default: hf)")
    cli.machine_flags(p)
    a = p.parse_args()
    check_output(a.out)
    for package in ("safetensors", "huggingface_hub", "tokenizers") if a.format == "hf" else ():
        need(package, "--format hf")  # before the long work
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    export(model, tokenizer, a.out, a.format)
    before, after = (f"{n:,} parameters, {n * model.dtype.itemsize / 2 ** 30:.3g} GiB"
                     for n in (model.n_params, model.n_params_dense))
    if before == after:
        print(f"exported     {after}: dense before and after, only converted")
    else:
        print(f"compressed   {before}\nexported     {after}\nThe exported weights are dense again: the logits of the "
              f"compressed model (but for A B's rounding to\n{str(model.dtype).removeprefix('torch.')}), not its size "
              f"and speed. For those, use {a.ckpt} with this project.")
    print(f"written to {a.out}")


if __name__ == "__main__":
    cli.command(main)
