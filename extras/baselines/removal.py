"""Rivals that make the model shallower.

    shortgpt   drop the blocks whose output is most parallel to their input       arXiv 2403.03853
    sleb       again and again drop the block without which the loss is lowest    arXiv 2402.09025
    laco       merge blocks into the one before them, from the top down           arXiv 2402.11187

Each takes out as many whole blocks as the budget holds, and plain SVD of one more (baselines.slim) takes out the rest:
none of the papers meets a budget that is no whole number of blocks.
"""
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from attribution import layer_cosines, top_k
from extras.controls import drop_layers
from extras.baselines import slim, whole_blocks
from model import MATRICES, Block, rotary_frequencies, upcast


def shortgpt(model, sweep, budget):
    """Drop the blocks of lowest Block Influence, 1 - E[cos(h_l, h_{l+1})], all measured on the dense model [ShortGPT].

    Liberty: the block next in line is slimmed to meet the budget.
    ValueError if all blocks would have to go, or the block to be slimmed cannot lose the rest.
    """
    n, rest = whole_blocks(model, budget, 0, len(model.layers) - 1)
    cosines = layer_cosines(model, sweep("ShortGPT"))[0]
    dropped = top_k(cosines, n).tolist()
    cosines[dropped] = -2  # less than any cosine
    slim(model, *top_k(cosines, 1).tolist(), rest)
    drop_layers(model, dropped)
    return model


def sleb(model, sweep, budget, samples=8):
    """Drop block after block, each time the one without which the loss, as things then are, is lowest [SLEB, Metric 3].

    samples: sequences of the calibration set to use; its authors use 128 of 2,048 tokens.
    Liberties: that; the next greedy choice is slimmed to meet the budget; the first and the last block are candidates
    like any other (the authors' code leaves them out).
    ValueError if all blocks would have to go, or the block to be slimmed cannot lose the rest.
    """
    n, rest = whole_blocks(model, budget, 0, len(model.layers) - 1)
    for i in range(n):
        drop_layers(model, [least_missed(model, first_sequences(sweep(f"SLEB {i + 1}/{n}"), samples))])
    if rest:
        slim(model, least_missed(model, first_sequences(sweep("SLEB, the rest"), samples)), rest)
    return model


@torch.no_grad()
def least_missed(model, batches):
    """The id of the block without which the summed loss (nats) is lowest, the first of equal ones.

    What comes before a candidate does not depend on it: each state h_l is computed once and goes on from block l + 1,
    which halves the work of a round.
    """
    n = len(model.layers)
    losses = torch.zeros(n, dtype=torch.float64, device=model.device)
    for tokens in batches:
        tokens = tokens.to(model.device)
        for layer, h in zip(range(n), model.residual_stream(tokens)):
            h = through(model, model.layers[layer + 1:], h)
            losses[layer] += sum(nll.double() for nll in model.losses(h, tokens))
    return int(losses.argmin())


@torch.no_grad()
def laco(model, sweep, budget, merge=2, lowest=1, highest=None, interval=None, samples=5):
    """Merge blocks l+1 .. l+K into block l, from the top down, if the last hidden state stays similar [LaCo, Alg. 1].

    merge: C, blocks that become one in a merge (K = C - 1). lowest, highest: L and H, the last l tried is L, the first
    H - C. interval: I, how far to go down after a merge that was kept. L is 1; H and I are by default 32 and 2 of 32
    blocks, scaled. samples: sequences to compare on, as many as the authors' code has sentences; all their hidden
    states in the dense model are kept in memory.

    Liberties: the threshold T is the first of 0.95, 0.90 ... at which all the whole blocks of the budget are merged
    away; there the method stops, and its last merge takes only as many as are left to go. C is 2, not 4, so that
    nothing is summed: a merge deletes block l and leaves its norms to block l + 1, see `merged`; sums of more blocks
    left nothing of SmolLM2's last hidden state (cosine 0.1 and less after one merge of 4 on 1,024 tokens). The most
    redundant block of the merged model, by its cosine, is slimmed to meet the budget.
    ValueError if no T merges so many blocks, all would have to go, or the block to be slimmed cannot lose the rest.
    """
    size = len(model.layers)
    n, rest = whole_blocks(model, budget, 0, size - 1)
    H, interval = min(highest or size, size + merge - 2), interval or max(1, round(size / 16))
    streams = [[*model.residual_stream(tokens.to(model.device))] for tokens in first_sequences(sweep("LaCo"), samples)]

    @cache  # a lower T tries many of the same merges again
    def similarity(merges):
        return last_state_cosine(model, collapse(model, merges), merges[-1][0], streams)

    for step in range(19, -21, -1):
        merges = kept_merges(similarity, step / 20, n, size, merge, lowest, H, interval)
        gone = sum(K for _, K in merges)
        if gone == n:
            break
    else:
        raise ValueError(f"cannot remove {budget:,} parameters: of their {n} blocks, merges of {merge} from block "
                         f"{H - merge} down to {lowest} take out {gone}")
    model.layers = nn.ModuleList(collapse(model, merges))
    model.args = replace(model.args, n_layers=len(model.layers))
    if rest:
        slim(model, *top_k(layer_cosines(model, sweep("LaCo, the rest"))[0], 1).tolist(), rest)
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
    cos, sin = rotary_frequencies(model.args, h.shape[1], h.device)
    for block in blocks:
        h = block(h, cos, sin)
    return h


def first_sequences(batches, samples):
    """The first `samples` sequences of these batches."""
    for tokens in batches:
        yield tokens[:samples]
        samples -= len(tokens)
        if samples <= 0:
            return
