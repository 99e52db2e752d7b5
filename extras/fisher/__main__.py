"""The command `python -m extras.fisher`."""
from attribution import SCORES
from extras import DENSE, fisher, open_dense
from extras.baselines import blocks_params
from grasp import find_redundant
from model import save_checkpoint
from runtime import cli
from runtime.files import check_output
from runtime.job import Job
from runtime.plan import check_layers


def main():
    a = parse()
    model, tokenizer = open_dense(a.ckpt, a.device, a.dtype)
    if a.layers or a.layer_ids:
        check_layers(model.args.n_layers, a.layers, a.layer_ids)
    blocks = blocks_params(model)
    budget, job = round(a.budget * blocks), Job(model, a.samples, a.seq_len, a.batch_size)
    if not budget:
        raise ValueError(f"--budget {a.budget}: leaves nothing to remove")
    print(f"method       {a.basis} basis, {a.allocate} allocation, score {a.score}, MLPs by {a.mlp}; {budget:,} "
          f"parameters to remove, {100 * budget / blocks:.1f} % of the blocks' and {100 * budget / job.before:.1f} % "
          "of the model's")
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)
    job.evaluate()
    with cli.timed(job.seconds, "compression", model.device):
        layers = find_redundant(model, job.sweep, a.layers)[-1] if a.layers else a.layer_ids
        kept = fisher.compress(model, job.sweep, budget, layers, a.basis, a.allocate, a.score, a.mlp == "channels")
    for name, indices in kept.items():
        print(f"{name:<26} keeps {len(indices):5} {'channels' if name.endswith('feed_forward') else 'components'}")
    job.evaluate("compressed", job.seconds["compression"])
    gone = job.before - model.n_params
    print(f"\n{job.table()}\nasked: {budget:,} parameters less; achieved: {job.achieved()}, "
          f"{100 * gone / blocks:.1f} % of the blocks'")
    report = job.made(vars(a), layers=layers, kept=kept, input=cli.earlier_report(a.ckpt))
    save_checkpoint(model, a.out, report, tokenizer.files, a.overwrite)
    print(f"written to {a.out}")


def parse():
    p = cli.Parser(fisher.__doc__)
    group = cli.model_flags(p, "what to compress", help=DENSE)
    add = group.add_argument
    add("--budget", type=cli.fraction, required=True, help="fraction of all blocks' parameters to remove")
    either = group.add_mutually_exclusive_group().add_argument
    either("--layers", type=cli.positive, metavar="N", help="take the budget from the N redundant layers (default: from all)")
    either("--layer-ids", type=int, nargs="+", metavar="ID", help="take it from these layers instead")
    add("--basis", choices=fisher.BASES, default="kfac", help="of the decompositions (default: kfac)")
    add("--allocate", choices=["ratio", "global"], default="global", help="one ratio, or one ranking (default: global)")
    add("--mlp", choices=["channels", "components"], help="how an MLP shrinks (default: channels, where "
        "basis and ranking allow it)")
    add("--score", choices=SCORES, default="magnitude", help="what ranks the components (default: magnitude)")
    cli.calibration_flags(p)
    cli.evaluation_flags(p)
    cli.output_flags(p, "fisher")
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    fit = a.basis == "kfac" and a.allocate == "global" and a.score == "magnitude"
    if a.mlp == "channels" and not fit:
        raise ValueError("--mlp channels needs --basis kfac, --allocate global and --score magnitude")
    a.mlp = a.mlp or ("channels" if fit else "components")
    check_output(a.out, a.overwrite, [a.ckpt])
    return a


if __name__ == "__main__":
    cli.command(main)
