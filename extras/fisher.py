"""Beyond the paper: the price of every component, by the second-order term that GRASP's Eq. 5 leaves out.

    python -m extras.fisher --ckpt FOLDER --budget 0.2

GRASP ranks a component by the first-order change of the loss. At a trained model that term is small and of either sign.
The second-order term is the one that grows. Two moments per matrix y = W x estimate it [K-FAC: arXiv 1503.05671, §3]:

    C            E[x x^T]      (n, n)    x: the matrix's inputs, over all calibration tokens
    H            E[d d^T]      (m, m)    d: dL/dy of the summed negative log-likelihood (nats), over all tokens
    cost of dW   tr(H dW C dW^T)         estimates twice the second-order change of the loss (nats per token)

Assumptions: x and d are independent, tokens are uncorrelated, and the text's own next tokens replace draws from the
model (the empirical Fisher information). All costs have one unit, so one ranking of cost per parameter distributes the
budget over the whole model. A component is a singular component of a matrix or, in an MLP, a channel: row c of w1 and
w3, column c of w2.
"""
import math
from functools import partial

import torch

from attribution import SCORES, backward, importance, sigma_gradients, top_k, weight_gradients
from extras import DENSE, keep, linear, open_dense
from extras.baselines import blocks_params, input_of, uniform_ranks, watch_inputs
from grasp import find_redundant
from model import matrix_names, save_checkpoint, upcast
from runtime import cli
from runtime.files import check_output
from runtime.job import Job
from runtime.plan import check_layers

BASES = ("plain", "whitened", "kfac")
DAMPING = 0.03  # fraction of a moment's mean diagonal that is added to it: few tokens leave it singular


def compress(model, sweep, budget, layers=None, basis="kfac", allocate="global", score="magnitude", channels=True):
    """Remove `budget` parameters from the blocks `layers` (None: all), in place: {name: kept (k,)} of what was changed.

    basis: see `components`. score: as in grasp.py; with `magnitude`, sigma^2 is what a component costs in that basis.
    allocate: `global`, one ranking, or `ratio`, the same share of every matrix. channels: an MLP, under the name
    "layers.3.feed_forward", loses channels, else its three matrices become low-rank too. Holds the fp32 moments of all
    these blocks: 1 GB for each of LLaMA-2-7B's, 2 GB without channels. ValueError if there is less to remove.
    """
    if channels and (basis, allocate, score) != ("kfac", "global", "magnitude"):
        raise ValueError("MLPs by channels need basis kfac, allocation global and score magnitude; got "
                         f"{basis}, {allocate}, {score}")
    names = matrix_names(*range(len(model.layers)) if layers is None else layers)
    if channels:  # w1 and w3 go with their channel, and all that it costs is to be seen at w2
        names = [name for name in names if not name.endswith((".w1", ".w3"))]
    moments = second_moments(model, names, sweep("second moments"), basis) if basis != "plain" else {}
    G = weight_gradients(model, names, sweep("attribution")) if score != "magnitude" else {}

    def decomposed(name):
        U, S, Vh = components(model.get_submodule(name).weight, *moments.get(name, ()))
        return (U, S, Vh), importance(S, sigma_gradients(U, G[name], Vh) if G else None, score)

    def cost(name):
        if channels and name.endswith(".w2"):
            return channel_costs(model.get_submodule(name).weight, *moments[name])
        scores = decomposed(name)[1]
        return scores ** 2 if score == "magnitude" else scores

    if allocate == "global":  # costs alone are held; U and Vh, too large for that, are taken again
        costs = {name: cost(name) for name in names}
        ranks = global_ranks(costs, {name: component_size(model, name, channels) for name in names}, budget)
    else:
        ranks = uniform_ranks(model, names, budget)
    changed = {}
    for name, k in ((name, k) for name, k in ranks.items() if k):
        if channels and name.endswith(".w2"):
            name, kept, (C, _) = name.removesuffix(".w2"), top_k(costs[name], k), moments[name]
            keep_channels(model, name, kept, C)
        else:
            usv, scores = decomposed(name)
            kept = top_k(scores, k)
            keep(model, name, usv, kept)
        changed[name] = kept.tolist()
    return changed


def component_size(model, name, channels):
    """(parameters of a component, of all that it is a part of): of a matrix (m, n), or an MLP at its w2 (dim, n)."""
    m, n = model.get_submodule(name).weight.shape
    return (3 * m, 3 * m * n) if channels and name.endswith(".w2") else (m + n, m * n)


def second_moments(model, names, batches, basis="kfac"):
    """{name: (C, H)} of the named matrices, fp32 at least, by one sweep; H None for `whitened`, which needs no loss.

    Matrices with one input share one C. No weight's gradient is taken: d is caught on its way down to the lowest one.
    """
    C, H, count = dict.fromkeys(map(input_of, names), 0), dict.fromkeys(names if basis == "kfac" else (), 0), 0

    def add(sums, name, rows):
        rows = upcast(rows.flatten(0, -2))
        sums[name] += rows.mT @ rows

    def on_output(name, module, x, y):
        y.requires_grad_().register_hook(partial(add, H, name))

    hooks = [model.get_submodule(name).register_forward_hook(partial(on_output, name)) for name in H]
    try:
        with watch_inputs(model, C, partial(add, C)):
            for tokens in batches:
                tokens = tokens.to(model.device)
                backward(model, tokens, tokens) if H else model.final_state(tokens)
                count += tokens.numel()
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in [*C.items(), *H.items()]:
        if not total.div_(count).isfinite().all():
            raise ValueError(f"a second moment at {name} is not finite; try --dtype bfloat16 or float32")
    return {name: (C[input_of(name)], H.get(name)) for name in names}


def components(W, C=None, H=None):
    """U (m, r), S (r,) descending, Vh (r, n) with W = U diag(S) Vh, fp32 at least, in the basis that C and H make.

    plain     C, H None: the SVD; the sigma^2 dropped sum up to |W - A B|^2
    whitened  C = L L^T: W L = U S V^T, Vh = V^T L^-1; they sum up to E|y - A B x|^2 [SVD-LLM, arXiv 2403.07378, §3.1]
    kfac      H = M M^T too: M^T W L = U' S V^T, U = M^-T U'; they sum up to the cost tr(H dW C dW^T)

    C and H are damped here. U and Vh are not orthonormal then, but what attribution.py does with them holds: A B = sum
    of sigma u v^T over the kept, and dL/d sigma_k = u_k^T G v_k.
    """
    W = upcast(W.detach())
    L, M = (None if moment is None else torch.linalg.cholesky(damped(moment)).to(W.dtype) for moment in (C, H))
    X = W if L is None else W @ L
    U, S, Vh = torch.linalg.svd(X if M is None else M.mT @ X, full_matrices=False)
    return (U if M is None else torch.linalg.solve_triangular(M.mT, U, upper=True), S,
            Vh if L is None else torch.linalg.solve_triangular(L, Vh, upper=False, left=False))


def damped(moment):
    """The moment in fp64, DAMPING of its mean diagonal added to its diagonal."""
    moment = moment.to(torch.float64, copy=True)
    moment.diagonal().add_(DAMPING * moment.diagonal().mean() + 1e-60)  # all 0: its factor, 1e-30, is not 0 in fp32
    return moment


def channel_costs(W, C, H, rounds=16):
    """What the loss of each of w2's input channels costs, (n,) fp64, W = w2 (m, n) making good for it as it can.

    Optimal brain surgeon [Hassibi and Stork 1993], a sixteenth of the channels at a time. Of those left, channels R
    cost tr(H W_R P^-1 W_R^T), P = (C^-1)_RR, if the rest of W is chosen anew by least squares; one alone costs
    w_c^T H w_c / P_cc, by which each round takes the cheapest. A later one is given no less than an earlier one, so
    that costs do not fall from round to round.
    """
    W, inverse, H = W.double(), torch.linalg.inv(damped(C)), damped(H)
    m, n = W.shape
    costs, left, least = torch.zeros_like(W[0]), torch.arange(n, device=W.device), 0.0
    rounds = min(rounds, n)
    for i in range(rounds):
        alone = (W * (H @ W)).sum(0) / inverse.diagonal()
        order = alone.argsort()
        gone, stay = order.tensor_split([math.ceil(len(left) / (rounds - i))])
        solved = torch.linalg.solve(inverse[gone][:, gone], torch.cat([W[:, gone].mT, inverse[gone][:, stay]], 1))
        together = ((H @ W[:, gone]) * solved[:, :m].mT).sum()
        share = alone[gone] / alone[gone].sum().clamp(min=1e-300)  # dead channels cost nothing, not 0 / 0
        costs[left[gone]] = (share * together).clamp(min=least)
        least = costs[left[gone[-1]]]
        W, inverse = (X[:, stay] - X[:, gone] @ solved[:, m:] for X in (W, inverse))
        inverse, left = inverse[stay], left[stay]
    return costs


def keep_channels(model, name, kept, C):
    """Leave the kept channels (k,) of the feed-forward `name`; w2 takes over by least squares what the others did."""
    ff, C = model.get_submodule(name), damped(C)
    w2 = torch.linalg.solve(C[kept][:, kept], C[kept] @ ff.w2.weight.double().mT).mT
    ff.w1, ff.w3, ff.w2 = (linear(W.to(model.dtype)) for W in (ff.w1.weight[kept], ff.w3.weight[kept], w2))


def global_ranks(costs, sizes, budget):
    """{name: how many components stay, None for all}: remove `budget` parameters where that costs least.

    costs: {name: (r,)}, of losing each component; sizes: {name: (parameters of a component, of the whole as it is)}.
    One ranking of cost per parameter. Of a matrix, the first components dropped remove nothing: it enters the ranking
    by the rank whose mean cost per parameter removed is least, and goes on from there component by component.
    ValueError if there is less to remove.
    """
    ranking = []
    for name, cost in costs.items():
        cost, (size, whole) = cost.double().sort(descending=True).values.cpu(), sizes[name]
        removed = whole - size * torch.arange(1, len(cost) + 1)  # where 1, 2 ... components stay
        dropped = cost.flip(0).cumsum(0).flip(0) - cost
        rates = (dropped / removed).where(removed > 0, math.inf)
        if rates.min() == math.inf:  # no rank makes it smaller
            continue
        k = int((rates <= rates.min() * (1 + 1e-9)).nonzero()[-1]) + 1  # of equal ones the smallest step
        ranking.append((float(rates[k - 1]), name, k, True))
        ranking += [(float(cost[i]) / size, name, i, False) for i in range(k - 1, 0, -1)]
    ranking.sort(key=lambda step: step[0])
    ranks, left = dict.fromkeys(costs), budget

    def take(name, k):
        size, whole = sizes[name]
        gain = (ranks[name] * size if ranks[name] else whole) - k * size
        ranks[name] = k
        return left - gain

    for _, name, k, first in ranking:  # an entry far beyond the budget is passed over, ...
        size, whole = sizes[name]
        if left > 0 and (whole - k * size < left + size if first else ranks[name]):
            left = take(name, k)
    for _, name, k, first in ranking:  # ... and cut short if it takes that to meet it
        size, whole = sizes[name]
        if left > 0 and first and not ranks[name]:
            left = take(name, max(k, (whole - left) // size))
    if left > 0:
        raise ValueError(f"cannot remove {budget:,} parameters: {budget - left:,} at most")
    return ranks


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
        kept = compress(model, job.sweep, budget, layers, a.basis, a.allocate, a.score, a.mlp == "channels")
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
    p = cli.Parser(__doc__)
    group = cli.model_flags(p, "what to compress", help=DENSE)
    add = group.add_argument
    add("--budget", type=cli.fraction, required=True, help="fraction of all blocks' parameters to remove")
    either = group.add_mutually_exclusive_group().add_argument
    either("--layers", type=cli.positive, metavar="N", help="take the budget from the N redundant layers (default: from all)")
    either("--layer-ids", type=int, nargs="+", metavar="ID", help="take it from these layers instead")
    add("--basis", choices=BASES, default="kfac", help="of the decompositions (default: kfac)")
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
