"""Controls: folders to compare a compressed folder with.

    python -m extras.controls KIND --ckpt COMPRESSED --out FOLDER

    dropped   the dense model without the redundant layers
    svd       plain SVD: the largest singular values of each matrix, as many as the compressed folder kept
    random    the same shapes and norms in random directions: where recovery training would start without GRASP
"""
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from attribution import svd
from data.checkpoint import save_checkpoint
from data.files import check_output
from extras import keep, open_original, read_report
from runtime import cli


def drop_layers(model, layer_ids):
    """Take these layers out of the model, in place. Raises ValueError if that leaves none."""
    left = [block for layer, block in enumerate(model.layers) if layer not in layer_ids]
    if not left:
        raise ValueError(f"no layer would be left of {len(model.layers)}")
    model.layers = nn.ModuleList(left)
    model.args = replace(model.args, n_layers=len(left))


def truncate(model, ranks):
    """{name: k}: keep the k largest singular values of each of these matrices, in place."""
    for name, k in ranks.items():
        keep(model, name, svd(model.get_submodule(name).weight), torch.arange(k, device=model.device))


def randomize(model, seed):
    """Replace every factor A, B by Gaussian noise of the same norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith((".A", ".B")):
            noise = torch.randn(p.shape, generator=generator).to(p.device)  # the same on every device
            p.data = (noise * (p.float().norm() / noise.norm())).to(p)


def main():
    p = cli.Parser(__doc__)
    p.add_argument("kind", choices=["dropped", "svd", "random"], help="dropped: without the redundant layers; svd: plain "
                   "SVD of the same ranks; random: random directions")
    add = cli.model_flags(p, "what to compare with", default=None, required=True,
                          help="a compressed folder").add_argument
    add("--dense", type=Path, metavar="FOLDER", help="the dense folder that it was made from (default: as its report says)")
    add("--seed", type=cli.seed, default=42, help="of random's factors (default: 42)")
    cli.output_flags(p, "KIND")
    p.suffix = None  # main knows the kind
    cli.machine_flags(p)
    a = p.parse_args()
    if a.dense and a.kind == "random":
        raise ValueError("--dense has no use with random, which draws in the place of the compressed folder's factors")
    report = read_report(a.ckpt)
    out = a.out or Path(f"{a.ckpt.name}-{a.kind}")
    check_output(out, a.overwrite)
    if a.kind == "random":
        model, tokenizer = cli.open_checkpoint(a.ckpt, a.device, a.dtype)
    else:
        _, model, tokenizer = open_original(report, a.dense, a.device, a.dtype)
    dense_params = model.n_params_dense
    if a.kind == "dropped":
        drop_layers(model, report["redundant"])
    elif a.kind == "svd":
        truncate(model, {record["name"]: record["rank"] for record in report["matrices"] if record["rank"]})
    else:
        randomize(model, a.seed)
    made = {"control": a.kind, "of": str(a.ckpt), "settings": report["settings"], "parameters_after": model.n_params}
    save_checkpoint(model, out, made, tokenizer.files, a.overwrite)
    print(f"{a.kind:<12} {model.n_params:,} parameters left of {dense_params:,}; written to {out}")


if __name__ == "__main__":
    cli.command(main)
