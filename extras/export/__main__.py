"""The command `python -m extras.export`."""
from pathlib import Path

from data import need
from data.files import check_output
from extras import export
from extras.export.dense import exported_params
from extras.export.llama_cpp import OUTTYPES
from runtime import cli

HF = ("safetensors", "huggingface_hub", "tokenizers")
PACKAGES = {"hf": HF, "hf-lowrank": HF, "meta": (), "deci": HF, "gguf": ("gguf", "tokenizers")}  # what a format needs


def main():
    p = cli.Parser(export.__doc__)
    cli.model_flags(p, "what to export", default=None, required=True,
                    help="a compressed folder, or a dense one of Meta's, Mistral's or Hugging Face's")
    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write, a new one")
    add("--format", choices=[*PACKAGES], default="hf", help="Hugging Face's dense, Hugging Face's with the factors as "
        "they are, Meta's, DeciLM's (nemotron-nas) or llama.cpp's (default: hf)")
    add("--outtype", choices=[*OUTTYPES], help="of the matrices in a GGUF file (default: the dtype)")
    cli.machine_flags(p)
    a = p.parse_args()
    check_output(a.out)
    if a.outtype and a.format != "gguf":
        raise ValueError(f"--outtype is for --format gguf, found --format {a.format}")
    for package in PACKAGES[a.format]:
        need(package, f"--format {a.format}")  # before the long work
    model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    export.export(model, tokenizer, a.out, a.format, source=a.ckpt, outtype=a.outtype)
    before, after = (f"{n:,} parameters, {n * model.dtype.itemsize / 2 ** 30:.3g} GiB"
                     for n in (model.n_params, exported_params(model, a.format)))
    if a.format == "hf-lowrank":
        print(f"exported     {after}: factors and widths as they are; transformers needs trust_remote_code=True")
    elif a.format in ("deci", "gguf"):
        print(f"exported     {model.n_params:,} parameters, widths as they are")
    elif before == after:
        print(f"exported     {after}: dense before and after, only converted")
    else:
        print(f"compressed   {before}\nexported     {after}\nThe exported weights are dense again: the logits of the "
              f"compressed model (but for A B's rounding to\n{str(model.dtype).removeprefix('torch.')}), not its size "
              f"and speed. For those, use --format hf-lowrank, or {a.ckpt} with this project.")
    print(f"written to {a.out}")


if __name__ == "__main__":
    cli.command(main)
