"""Baselines that make the model shallower: they take out n whole blocks.

    name        shortgpt
    paper       ShortGPT, arXiv 2403.03853
    equation    Block Influence 1 - E[cos(h_l, h_{l+1})] of the dense model: the n lowest blocks go
    liberties   the common calibration set

    name        sleb
    paper       SLEB, arXiv 2402.09025
    equation    Metric 3: the loss without a block, measured anew after each of n greedy steps
    liberties   the common calibration set (128 sequences of 2,048 tokens there)

    name        laco
    paper       LaCo, arXiv 2402.11187
    equation    Alg. 1: merge blocks l+1 .. l+K into block l if the last hidden state's cosine stays above T
    liberties   the choice of T, C, H and I, see `laco`
"""
from dataclasses import replace
from functools import cache
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from extras.baselines import check_blocks
from extras.controls import drop_layers
from grasp import find_redundant
from model import MATRICES, Block, rotations, upcast


def shortgpt(model, sweep, n):
    """Drop the n blocks of lowest Block Influence, all measured on the dense model [ShortGPT]."""
    check_blocks(model, n, spared=1)
    drop_layers(model, find_redundant(model, sweep, n, all_sequences=True)[1])
    return model


def sleb(model, sweep, n):
    """Drop n blocks, each time the one without which the loss is lowest as things then are [SLEB, Metric 3].

    The first and the last block stay, as in the authors' code. To drop n blocks and then one more is to drop n + 1.
    """
    check_blocks(model, n, spared=2)
    left, gone = [*range(len(model.layers))], []
    for i in range(n):
        least = least_missed(model, sweep(f"SLEB {i + 1}/{n}"))
        drop_layers(model, [least])
        gone.append(left.pop(least))
    print(f"SLEB drops layers {' '.join(map(str, sorted(gone)))} of {len(left) + n}")
    return model


@torch.no_grad()
def least_missed(model, batches):
    """Return the id of the block without which the summed loss is lowest. The first and the last one stay.

    Each state h_l is computed once and goes on from block l + 1: this halves the work.
    """
    candidates = range(1, len(model.layers) - 1)
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=model.device)
    for tokens in batches:
        tokens = tokens.to(model.device)
        for layer, h in zip(candidates, islice(model.residual_stream(tokens), 1, None)):
            h = through(model, model.layers[layer + 1:], h)
            losses[layer - 1] += sum(nll.double() for nll in model.losses(h, tokens))
    return candidates[int(losses.nan_to_num(nan=float("inf")).argmin())]


@torch.no_grad()
def laco(model, sweep, n, merge=2, lowest=1, highest=None, interval=None):
    """Merge blocks l+1 .. l+K into block l, from the top down, if the last hidden state stays similar [LaCo, Alg. 1].

    Args:
        merge: C, how many blocks become one in a merge (K = C - 1).
        lowest, highest: L and H. The last l tried is L, the first H - C. By default 1 and the number of blocks.
        interval: I, how far to go down after a merge that was kept. By default 2 of 32 blocks, scaled.

    Liberties: the threshold T is the first of 0.95, 0.90 ... at which n blocks are merged away. There the method stops,
    and its last merge takes only as many blocks as are left to go. C is 2, not 4: then nothing is summed, and a merge
    deletes block l and leaves its norms to block l + 1 (see `merged`). Sums of more blocks left nothing of SmolLM2's
    last hidden state: its cosine was 0.1 or less after one merge of 4 blocks. The dense model's states of the whole
    calibration set are kept in memory. The code stays general in C, as the paper's algorithm is.

    Raises ValueError if no T merges n blocks, or if no block would be left.
    """
    size = len(model.layers)
    check_blocks(model, n, spared=1)
    H, interval = min(highest or size, size + merge - 2), interval or max(1, round(size / 16))
    streams = [[*model.residual_stream(tokens.to(model.device))] for tokens in sweep("LaCo")]

    @cache  # a lower T tries many of the same merges again
    def similarity(merges):
        return last_state_cosine(model, collapse(model, merges), merges[-1][0], streams)

    for step in range(19, -21, -1):
        merges = kept_merges(similarity, step / 20, n, size, merge, lowest, H, interval)
        gone = sum(K for _, K in merges)
        if gone == n:
            break
    else:
        raise ValueError(f"cannot merge away {n} blocks: merges of {merge} from block {H - merge} down to {lowest} "
                         f"take out {gone}")
    model.layers = nn.ModuleList(collapse(model, merges))
    model.args = replace(model.args, n_layers=len(model.layers))
    return model


def kept_merges(similarity, T, n, n_layers, C, L, H, interval):
    """The merges ((l, K), ...) that Algorithm 1 keeps at threshold T, until n blocks have gone.

    similarity(merges): the cosine of the last hidden state with all these merges to the dense model's.
    """
    merges, l = (), H - C
    while l >= L and n > 0:
        tried = (*merges, (l, min(C - 1, n_layers - 1 - l, n)))
        if similarity(tried) > T:
            merges, K = tried, tried[-1][1]
            n, n_layers, l = n - K, n_layers - K, l - interval
        else:
            l -= 1
    return merges


def collapse(model, merges):
    """The model's blocks with the blocks l+1 .. l+K merged into block l, for each (l, K) in turn; the model stays."""
    blocks = [*model.layers]
    for l, K in merges:
        blocks[l:l + K + 1] = [merged(model.args, blocks[l], blocks[l + 1:l + K + 1])]
    return blocks


def merged(args, block, following):
    """A new block of theta_l + sum_j (theta_{l+j} - theta_l) for its seven matrices, and of block l's norms.

    For one following block that is theta_{l+1}: block l is dropped and leaves its norms. The authors' code adds in
    place and subtracts the sum so far instead of theta_l, so that it comes to theta_{l+K} for any K.
    """
    state = block.state_dict()
    for name in (f"{matrix}.weight" for matrix in MATRICES):
        W = upcast(state[name])
        state[name] = (W + sum(upcast(other.get_parameter(name)) - W for other in following)).type_as(state[name])
    with torch.device("meta"):  # deepcopy of a memory-mapped block would copy all of its file
        new = Block(args).requires_grad_(False)
    new.load_state_dict(state, assign=True)
    return new


def last_state_cosine(model, blocks, l, streams):
    """Mean over sequences of the cosine between the dense model's last hidden state and that of `blocks`.

    Below l the blocks are the dense model's. streams: its residual stream [h_0, h_1 ...] of every batch. A sequence's
    state is taken after the final norm, as one vector of T * dim, as in the authors' code.
    """
    cosines = []
    for stream in streams:
        ours, dense = (upcast(model.norm(h)).flatten(1) for h in (through(model, blocks[l:], stream[l]), stream[-1]))
        cosines.append(F.cosine_similarity(ours, dense))
    return torch.cat(cosines).mean().item()


def through(model, blocks, h):
    """The residual stream h (B, T, dim) after these blocks."""
    rotary = rotations(model.args, h.shape[1], h.device)
    for block in blocks:
        h = block(h, rotary)
    return h
