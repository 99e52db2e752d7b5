"""A baseline of low-rank attention and pruned MLP channels, block after block, and its recovery training.

    python -m extras.baselines.lorap --ckpt FOLDER --ratio 0.8 --recover alpaca.json

    name        lorap
    paper       LoRAP, arXiv 2404.09695, and its code at commit 4e34b7f
    equation    attention: U of W diag(d) = U S V^T (AWSVD); MLP: the channels of lowest |W1[c] d| + |W3[c] d| +
                |W2[:, c] d2| go, but for the very least 1 %
    liberties   an MLP sees what its block's compressed attention gives (the code takes a block's statistics all at
                once, from the block still dense); rho is found from the budget; grouped queries, see `allot`

The command prints a table: the dense model, LoRAP and, with --recover, the model after training adapters and after its
re-decomposition. It writes no folder.

    rho      share of a block's parameters that stays, the same for its attention and its MLP
    d        (n,) weights of a matrix's inputs: root of their sums of squares over the calibration set
    states   h of all calibration batches, each (B, T, dim), just before the step that is compressed next
    ranks    {matrix: k}; a matrix that is not in it stays dense
"""
import math
from bisect import bisect_left
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from attribution import rank_for_ratio, svd
from extras import DENSE, keep, linear, open_dense, product, recover
from extras.baselines import gram, input_of, input_sums
from extras.controls import truncate
from model import MATRICES, LowRankLinear, rotations, upcast
from runtime import cli
from runtime.job import Job

# as its post_training.py has them; but that holds out 2,000 records, and trains its adapters with dropout 0.05
SCRIPT = {"epochs": 2, "batch_size": 64, "micro_batch": 4, "lr": 1e-4, "held_out": 128, "response_only": True}


@torch.no_grad()
def lorap(model, sweep, budget, sublayer="both", mlp="prune", decomposition="awsvd"):
    """Remove `budget` parameters from the model, in place, and return it.

    sublayer: attention, mlp or both. mlp: prune (channels) or decompose. decomposition: awsvd, afm or svd (`basis`).
    Holds the states of the whole calibration set, as its code does: samples * seq_len * dim numbers.
    Raises ValueError if less can be removed.
    """
    shares = shares_for(model, budget, sublayer, mlp)
    states = [next(model.residual_stream(tokens.to(model.device))) for tokens in sweep("LoRAP")]
    rotary = rotations(model.args, states[0].shape[1], model.device)
    for layer, (block, rho) in enumerate(zip(model.layers, shares)):
        ranks, pruned = allot(block, rho, sublayer, mlp)
        for half, step in halves(block, rotary):
            low_rank = {f"layers.{layer}.{name}": k for name, k in ranks.items() if name.startswith(half)}
            term = affine_moments if decomposition == "afm" else squares
            needed = map(input_of, low_rank) if decomposition != "svd" else ()
            sums = sums_in_step(model, needed, term, step, states)
            for name, k in low_rank.items():
                W = upcast(model.get_submodule(name).weight)
                U = basis(W, sums.get(input_of(name)), decomposition)
                keep(model, name, (U, torch.ones_like(U[0]), U.mT @ W), torch.arange(k, device=model.device))
            if half == "feed_forward" and pruned:
                names = (f"layers.{layer}.feed_forward.{name}" for name in ("w1", "w2"))
                sums = sums_in_step(model, names, squares, step, states)
                prune_channels(block.feed_forward, pruned, *sums.values())
            for i, h in enumerate(states):
                states[i] = step(h)
        cli.show(f"LoRAP  layer {layer + 1}/{len(shares)}", last=layer + 1 == len(shares))
    return model


def halves(block, rotary):
    """A block's two steps h -> h, as Block.forward takes them one after the other."""
    return (("attention", lambda h: h + block.attention(block.attention_norm(h), rotary)),
            ("feed_forward", lambda h: h + block.feed_forward(block.ffn_norm(h))))


def allot(block, rho, sublayer, mlp, a=3):
    """(ranks, how many channels go) of a dense block of which the share rho stays.

    wv and wo get a times the parameters of wq and wk. In the paper all four are d x d and K = rho d / 2: ranks
    2aK / (1 + a) and 2K / (1 + a); or, where the first reaches d/2 and factors would not be smaller, wv and wo stay
    dense and wq and wk get rho d - d/2. Divided by d/2 these are shares of a matrix's parameters, 2a rho / (1 + a) and
    2 rho / (1 + a), or 1 and 2 rho - 1, and so they fit grouped queries: k = share * m n / (m + n). Since wv and wo
    hold as many parameters as wk and wq there too, rho and 1 : a come out the same. (Its code floors K as well as k.)
    Each matrix of an MLP to be decomposed gets rho; its code computes that rank, but then uses wq's.
    """
    shares, pruned = {}, 0
    if sublayer in ("attention", "both"):
        high, low = 2 * a * rho / (1 + a), 2 * rho / (1 + a)
        high, low = (high, low) if high < 1 else (1, 2 * rho - 1)
        shares = dict(zip(MATRICES[:4], (low, low, high, high)))
    if sublayer in ("mlp", "both"):
        if mlp == "decompose":
            shares.update(dict.fromkeys(MATRICES[4:], rho))
        else:  # the least important 1 % stay in any case
            hidden = block.feed_forward.w2.in_features
            pruned = hidden - max(1, hidden // 100, math.floor(rho * hidden))
    return {name: rank_for_ratio(*block.get_submodule(name).weight.shape, part)
            for name, part in shares.items() if part < 1}, pruned


def shares_for(model, budget, sublayer, mlp):
    """rho of every block: the largest with which the blocks together lose at least `budget` parameters.

    Searched in cuts of a millionth that go round the blocks. So the blocks' rho are as good as equal, and yet they do
    not all lose a rank or a channel in the same cut: what goes beyond the budget is one block's, not every block's.
    """
    block, count, fine = model.layers[0], len(model.layers), 10 ** 6
    sizes = {name: block.get_submodule(name).weight.shape for name in MATRICES}

    def shares(cuts):
        return [1 - (cuts + layer) // count / fine for layer in range(count)]

    def removed(cuts):
        total = 0
        for ranks, pruned in (allot(block, rho, sublayer, mlp) for rho in shares(cuts)):
            total += pruned * 3 * model.args.dim + sum(math.prod(sizes[name]) - k * sum(sizes[name])
                                                       for name, k in ranks.items())
        return total

    cuts = bisect_left(range(fine * count + 1), budget, key=removed)
    if cuts > fine * count:
        raise ValueError(f"cannot remove {budget:,} parameters: LoRAP removes {removed(fine * count):,} at most "
                         f"(sublayer {sublayer}, mlp {mlp})")
    return shares(cuts)


def sums_in_step(model, names, term, step, states):
    """{name: sum of term(x)} over the inputs x (B * T, n), fp64, that the named matrices have in this step."""
    with input_sums(model, names, lambda x: term(x.double())) as sums:
        for state in states if sums else ():
            step(state)
    return sums


def squares(x):
    """x (tokens, n) -> (n,): the sums of squares."""
    return x.square().sum(0)


def affine_moments(x):
    """x (tokens, n) -> (n + 1, n + 1): the sum of (x, 1)(x, 1)^T, which is count, sums and products of x in one."""
    return gram(F.pad(x, (0, 1), value=1.0))


def basis(W, sums, decomposition):
    """U (m, at least k) orthonormal, most important direction of the outputs first: W (m, n) ~ U_k (U_k^T W).

    svd: U of W = U S Vh. awsvd: U of W D = U S Vh, D = diag(d); U_k S_k Vh_k D^-1 = U_k U_k^T W, so nothing is divided
    by a d, and one that is 0 needs none of the 1e-4 in its code. afm, atomic feature mimicking [Yu and Wu, AAAI 2023]:
    principal components of the outputs y = W x, without AFM's bias (I - U_k U_k^T) E[y], as in LoRAP's code.
    """
    if decomposition == "afm":
        E = sums / sums[-1, -1]  # E[(x, 1)(x, 1)^T]
        covariance = W.double() @ (E[:-1, :-1] - torch.outer(E[-1, :-1], E[-1, :-1])) @ W.double().mT
        return torch.linalg.eigh(covariance).eigenvectors.flip(1).type_as(W)
    return svd(W * sums.sqrt().type_as(W) if decomposition == "awsvd" else W)[0]


def prune_channels(ff, count, squares1, squares2):
    """Take `count` channels out of a FeedForward: the least important, but for the very least 1 %, which matter.

    Importance of channel c: |W1[c] d| + |W3[c] d| + |W2[:, c] d2[c]|, Euclidean norms. squares1 (dim,) is d^2 of the
    inputs of w1 and w3, squares2 (hidden_dim,) of w2's.
    """
    d, d2 = squares1.sqrt(), squares2.sqrt()
    scores = (ff.w1.weight * d).norm(dim=1) + (ff.w3.weight * d).norm(dim=1) + (ff.w2.weight * d2).norm(dim=0)
    order, least = scores.argsort(stable=True), len(scores) // 100
    kept = torch.cat([order[:least], order[least + count:]]).sort().values
    ff.w1, ff.w3, ff.w2 = (linear(W) for W in (ff.w1.weight[kept], ff.w3.weight[kept], ff.w2.weight[:, kept]))


def multiply_out(model):
    """Dense products A B in the place of all factors: the ranks that they had, {name: k}."""
    factors = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for name, m in factors.items():
        model.set_submodule(name, linear(product(m)))
    return {name: m.A.shape[1] for name, m in factors.items()}


def redecompose(model, ranks, more=0):
    """Plain SVD of the dense matrices that `ranks` names, to rank k + more, in place [its code's After_tune.py].

    LoRAP's `more` is the rank of the trained adapters: A B + 2 A' B' has no higher rank than k and it together, so
    nothing is lost, but the budget is exceeded; 0, ours, meets it again. (Its code truncates wv and wo at wq's rank, a
    slip.) A matrix whose factors would not be smaller stays dense.
    """
    shapes = {name: model.get_submodule(name).weight.shape for name in ranks}
    truncate(model, {name: ranks[name] + more for name, (m, n) in shapes.items()
                     if (ranks[name] + more) * (m + n) < m * n})


def train_adapters(model, rank, examples, held_out, settings):
    """Train adapters beside all matrices of a dense model, as `extras.recover --lora` does, and add them in."""
    dtype = model.dtype
    factors = recover.prepare(model, rank, settings["seed"])
    with TemporaryDirectory() as folder:
        recover.train(model, factors, examples, held_out, settings, Path(folder) / "state", save_every=100)
    recover.finish(model, dtype)


def main():
    a = parse()
    records = recover.read_records(a.recover)[0] if a.recover else None
    model, tokenizer = open_dense(a.ckpt, a.device, a.dtype)
    job = Job(model, a.samples, a.seq_len, a.batch_size)
    budget = math.ceil((1 - a.ratio) * job.before)
    settings = {**SCRIPT, "seq_len": cli.sequence_length(None, 256, model), "samples": a.records, "seed": a.seed}
    examples, held_out = recover.split(records, tokenizer, settings) if a.recover else (None, None)
    print(f"method       LoRAP of {a.sublayer}, mlp {a.mlp}, {a.decomposition}; {budget:,} parameters to remove")
    job.calibrate(tokenizer, a.calibration, a.seed, a.data_dir)
    job.read_texts(tokenizer, a.eval, a.windows, a.data_dir)
    job.evaluate()
    with cli.timed(job.seconds, "compression", model.device):
        lorap(model, job.sweep, budget, a.sublayer, a.mlp, a.decomposition)
    job.evaluate("LoRAP", job.seconds["compression"])
    achieved = job.achieved()
    if a.recover:
        ranks = multiply_out(model)
        with cli.timed(job.seconds, "training", model.device):
            train_adapters(model, a.lora, examples, held_out, settings)
        job.evaluate("recovered, multiplied out", job.seconds["training"])
        for more in (a.lora, 0) if ranks else ():
            redecompose(model, ranks, more)
            job.evaluate(f"re-decomposed, rank + {more}" if more else "re-decomposed")
            multiply_out(model)
    print(f"\n{job.table()}\nasked: {a.ratio} of the model's parameters; achieved: {achieved}")


def parse():
    p = cli.Parser(__doc__)
    add = cli.model_flags(p, "what to compress", help=DENSE).add_argument
    add("--ratio", type=cli.fraction, default=0.8, help="fraction of the model's parameters to keep (default: 0.8)")
    add("--sublayer", choices=["attention", "mlp", "both"], default="both", help="what to compress (default: both)")
    add("--mlp", choices=["prune", "decompose"], default="prune", help="how to compress the MLPs (default: prune)")
    add("--decomposition", choices=["awsvd", "afm", "svd"], default="awsvd",
        help="which decomposition gives the kept directions (default: awsvd)")
    add = p.add_argument_group("recovery, with --seed's draws").add_argument
    add("--recover", type=Path, metavar="FILE", help="train on Alpaca's JSON list, then decompose again")
    add("--lora", type=cli.positive, metavar="R", help="rank of the adapters (default: 8)")
    add("--records", type=cli.positive, metavar="N", help="records to train on, at random (default: all)")
    cli.calibration_flags(p)
    cli.evaluation_flags(p)
    cli.machine_flags(p, batches=True)
    a = p.parse_args()
    if not a.recover and (a.lora or a.records):
        raise ValueError("--lora, --records: are for --recover FILE")
    a.lora = a.lora or 8
    return a


if __name__ == "__main__":
    cli.command(main)
