"""The command `python -m extras.fisher`."""
import torch

from data.checkpoint import save_checkpoint
from data.files import check_output, optional_json
from extras import DENSE, fisher, open_dense
from extras.baselines import blocks_params
from extras.fisher import shapes
from grasp import SCORES, check_layers, find_redundant
from runtime import cli
from runtime.job import Job


def main():
    a = parse()
    earlier = optional_json(a.ckpt / "report.json")
    model, tokenizer = open_dense(a.ckpt, a.device, a.dtype)
    if a.layers or a.layer_ids:
        check_layers(model, a.layers or a.layer_ids)
    blocks, job = blocks_params(model), Job(model, a.samples, a.seq_len, a.batch_size)
    budget = round(a.remove * job.before if a.remove else a.budget * blocks)
    if not 0 < budget < blocks:
        raise ValueError(f"{f'--remove {a.remove}' if a.remove else f'--budget {a.budget}'}: {budget:,} parameters "
                         f"of the {blocks:,} in the blocks, expected at least 1 and not all")
    print(f"method       {method(a)}; {budget:,} parameters to remove, {100 * budget / blocks:.1f} % of the blocks' and "
          f"{100 * budget / job.before:.1f} % of the model's")
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)
    job.evaluate()
    torch.manual_seed(a.seed)  # of the labels that the model draws
    with cli.timed(job.seconds, "compression", model.device):
        layers = find_redundant(model, job.sweep, a.layers)[-1] if a.layers else a.layer_ids
        if a.shape == "free":
            kept = fisher.compress(model, job.sweep, budget, layers, a.basis, a.allocate, a.score, a.mlp == "channels")
        else:
            kept = shapes.widths(model, job.sweep, budget, layers, a.multiple, a.shape == "llama")
    for name, indices in kept.items():
        print(f"{name:<26} keeps {len(indices):5} {'channels' if name.endswith('feed_forward') else 'components'}")
    job.evaluate("compressed", job.seconds["compression"])
    gone = job.before - model.n_params
    print(f"\n{job.table()}\nasked: {budget:,} parameters less; achieved: {job.achieved()}, "
          f"{100 * gone / blocks:.1f} % of the blocks'")
    report = job.report(vars(a), layers=layers, kept=kept, input=earlier)
    save_checkpoint(model, a.out, report, tokenizer.files, a.overwrite)
    print(f"written to {a.out}")


def method(a):
    """What the run does, in a line."""
    return {"free": f"{a.basis} basis, {a.allocate} allocation, score {a.score}, MLPs by {a.mlp}",
            "widths": f"a width for each MLP, a multiple of {a.multiple}",
            "llama": f"one width for all MLPs, a multiple of {a.multiple}"}[a.shape]


def parse():
    p = cli.Parser(fisher.__doc__)
    group = cli.model_flags(p, "what to compress", help=DENSE)
    add = group.add_argument
    either = group.add_mutually_exclusive_group(required=True).add_argument
    either("--budget", type=cli.fraction, help="fraction of all blocks' parameters to remove")
    either("--remove", type=cli.fraction, metavar="P", help="fraction of the whole model's parameters to remove")
    add("--shape", choices=["free", "widths", "llama"], default="free", help="free: low-rank attention and narrower "
        "MLPs; widths: narrower MLPs alone; llama: MLPs of one width (default: free)")
    add("--multiple", type=cli.positive, metavar="N", help="with --shape widths or llama: widths are multiples of N "
        "(default: 64, as GPUs and quantised formats want; --format deci of extras.export needs 256)")
    either = group.add_mutually_exclusive_group().add_argument
    either("--layers", type=cli.positive, metavar="N",
           help="take the budget from the N redundant layers (default: from all)")
    either("--layer-ids", type=int, nargs="+", metavar="ID", help="take it from these layers instead")
    add("--basis", choices=fisher.BASES, default="kfac", help="of the decompositions (default: kfac)")
    add("--allocate", choices=["ratio", "global"], default="global", help="one ratio, or one ranking (default: global)")
    add("--mlp", choices=["channels", "components"], help="how an MLP shrinks (default: channels, where "
        "basis and ranking allow it)")
    add("--score", choices=[score for score in SCORES if score != "signed"], default="magnitude",
        help="what ranks the components (default: magnitude)")
    cli.calibration_flags(p)
    cli.evaluation_flags(p)
    cli.output_flags(p, "fisher")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    free = a.basis == "kfac" and a.allocate == "global" and a.score == "magnitude"
    if a.mlp == "channels" and not free:
        raise ValueError("--mlp channels needs --basis kfac, --allocate global and --score magnitude")
    if a.shape != "free" and (a.mlp == "components" or not free):
        raise ValueError(f"--shape {a.shape}: --basis, --allocate, --mlp and --score are for --shape free")
    if a.shape == "llama" and (a.layers or a.layer_ids):
        raise ValueError("--shape llama: all layers have one width; --layers and --layer-ids are for other shapes")
    if a.shape == "free" and a.multiple:
        raise ValueError("--multiple is for --shape widths or llama")
    a.mlp = a.mlp or ("channels" if free else "components")
    a.multiple = a.multiple or 64
    check_output(a.out, a.overwrite)
    return a


if __name__ == "__main__":
    cli.command(main)
