"""Several processes on one job, as torchrun starts them: each has its share of the sequences, and sums come together.

One process alone is the usual case, in which nothing here does anything. Of several, process 0 writes and prints.
A sharded matrix (FSDP2) is a DTensor of which each process holds some rows; every other tensor is whole everywhere.
"""
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

store = None  # torchrun's, through which processes hear of each other even when one has failed; None: there is but one


@contextmanager
def joined():
    """Join the processes that torchrun started, if it did; all but process 0 fall silent."""
    global store
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, place, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=place, world_size=size)
        sys.stdout = open(os.devnull, "w") if place else sys.stdout
    yield
    if store:
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if store else 0


def count():
    return dist.get_world_size() if store else 1


def fails_first():
    """Whether this process is the first to fail: it tells the user why, and the others need not."""
    return store is None or store.add("failures", 1) == 1


def lost(error):
    """Whether an error says no more than that another process is gone."""
    return store is not None and (isinstance(error, dist.DistError) or "by peer" in str(error))


def share(windows, size):
    """This process's micro-batches of windows (n, T): `size` sequences in each, as many as any other process has.

    Where sequences run out the last ones are fewer or none, (0, T): sharded layers need all processes at every step.
    One process alone may also ask for a list of sizes.
    """
    if count() == 1:
        return windows.split(size)
    mine, most = windows.tensor_split(count())[rank()].split(size), -(-len(windows) // count())
    return [*mine, *[windows[:0]] * (-(-most // size) - len(mine))]


def add_up(t):
    """The sum of every process's t, on every process, in place."""
    if store:
        dist.all_reduce(t)
    return t


def agreed(find):
    """What find() gives process 0, on every process; the others do not call it."""
    found = [None if rank() else find()]
    if store:
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]


def mean(total, n):
    """Every process's total, a tensor, over every process's number n; on the CPU."""
    return (add_up(total) / add_up(total.new_tensor(n))).cpu()


def summed(t, owner):
    """The sum of every process's t on the process `owner`, on others nothing of use; a sharded t is summed already."""
    if store and not sharded(t):
        dist.reduce(t, owner)
    return whole(t)


def broadcast(tensors, owner, device):
    """The list of tensors of the process `owner`, on every process; what the others give does not matter."""
    if store:
        kinds = [[(t.shape, t.dtype) for t in tensors]]
        dist.broadcast_object_list(kinds, owner, device=torch.device("cpu"))
        tensors = ([t.contiguous() for t in tensors] if rank() == owner else
                   [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds[0]])
        for t in tensors:
            dist.broadcast(t, owner)
    return tensors


def shard(linears, device, dtype):
    """Let each process hold only its rows of the matrices of linear layers, all gathered for each use (FSDP2)."""
    if store is None:
        raise ValueError("--shard divides the weights among processes: start them with torchrun")
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx
    except ImportError:
        raise ValueError(f"--shard needs torch 2.10 or later, this is {torch.__version__}") from None
    mesh = dist.init_device_mesh(torch.device(device).type, (count(),))
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    for linear in linears:
        fully_shard(linear, mesh=mesh, reshard_after_forward=True, mp_policy=wide)
    share_comm_ctx(linears)  # or each would keep its whole wide gradient until the backward pass ends


def placed(t, like, device, dtype):
    """t (m, n) there; where `like` is sharded, only this process's rows of it, as its part of such a tensor."""
    if not sharded(like):
        return t.to(device, dtype)
    rows = (*t.chunk(count()), *[t[:0]] * count())[rank()].to(device, dtype)
    return type(like.data).from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                                      stride=like.stride())


def sharded(t):
    return hasattr(t, "full_tensor")  # a DTensor, whose import takes long


def own(t):
    """What this process holds of t."""
    return t.to_local() if sharded(t) else t


def whole(t):
    """All rows of t; every process must ask for them."""
    return t.full_tensor() if sharded(t) else t
