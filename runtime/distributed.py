"""Several processes on one job, as torchrun starts them. With one process, nothing here has an effect.

Each process works on its part of the sequences. Sums are taken over all processes, so that all continue with
the same numbers. Process 0 prints and writes. A matrix split by FSDP2 is a DTensor, of which each process
holds some rows.
"""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

store = None  # torchrun's key-value store; None with one process


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. All but process 0 print nothing."""
    global store
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ours, process, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=ours, rank=process, world_size=size)
        store = ours
        sys.stdout = open(os.devnull, "w") if process else sys.stdout
    yield
    if store:
        dist.destroy_process_group()
        leave(0)


def leave(code: int) -> NoReturn:
    """End this process. Its lines are written already: `cli.command` has made stdout line-buffered.

    One of several ends at once, without taking Python down first: the caches of a DTensor keep gloo's threads
    alive, and one that still holds a tensor then aborts the process.
    """
    if store:
        os._exit(code)
    sys.exit(code)


def index() -> int:
    return dist.get_rank() if store else 0


def count() -> int:
    return dist.get_world_size() if store else 1


def fails_first() -> bool:
    """Whether this process is the first to fail. Only that one prints its error."""
    return store is None or store.add("failures", 1) == 1


def lost(error: Exception) -> bool:
    """Whether an error only says that another process has ended."""
    return store is not None and (isinstance(error, dist.DistError) or "by peer" in str(error))


def local_batches(windows: Tensor, size: int) -> list[Tensor]:
    """This process's micro-batches of windows (n, T), up to `size` sequences each.

    Every process gets equally many, because layers split by FSDP2 need all processes at every step. A process
    that has no sequence left gets one whose tokens are all -100, which no sum counts.
    """
    if count() == 1:
        return list(windows.split(size))
    mine = windows.tensor_split(count())[index()]
    batches = list(mine.split(size)) if len(mine) else []
    largest = -(-len(windows) // count())  # sequences of the process that has most
    return batches + [torch.full_like(windows[:1], -100)] * (-(-largest // size) - len(batches))


def all_sum(t: Tensor) -> Tensor:
    """The sum of t over the processes, in place. Raises ValueError for a sweep without batches (t is 0)."""
    if not isinstance(t, Tensor):
        raise ValueError("no batches: the sweep is empty or used up, expected batches (B, T) of tokens")
    if store and is_split(t):
        return t.mul_(count())  # FSDP2 has averaged a gradient already
    if store:
        dist.all_reduce(t)
    return t


def smallest(number: int) -> int:
    """The smallest of the processes' numbers."""
    t = torch.tensor(number)
    if store:
        dist.all_reduce(t, dist.ReduceOp.MIN)
    return int(t)


def mean(numbers: Tensor, n: Tensor) -> Tensor:
    """The sum of numbers over the sum of n, over all processes, on the CPU."""
    return (all_sum(numbers) / all_sum(n)).cpu()


def split_linears(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Let each process hold only its rows of the module's linear layers, gathered for each use (FSDP2)."""
    if store is None:
        raise ValueError("--shard divides the weights among processes: start them with torchrun")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx  # torch 2.10
    mesh = dist.init_device_mesh(torch.device(device).type, (count(),))
    wide = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        fully_shard(linear, mesh=mesh, reshard_after_forward=True, mp_policy=wide)
    share_comm_ctx(linears)  # otherwise each keeps its whole gradient until the backward pass ends


def place(t: Tensor, like: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """t (m, n) on the device; if `like` is split, a DTensor with this process's rows."""
    if not is_split(like):
        return t.to(device, dtype)
    rows = (*t.chunk(count()), *[t[:0]] * count())[index()].to(device, dtype)
    return type(like.data).from_local(rows, like.device_mesh, like.placements, run_check=False,
                                      shape=like.shape, stride=like.stride())


def is_split(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")  # a DTensor, a class that takes long to import


def local(t: Tensor) -> Tensor:
    """The rows of t that this process holds."""
    return t.to_local() if is_split(t) else t


def whole(t: Tensor) -> Tensor:
    """All rows of t. Every process must call this."""
    return t.full_tensor() if is_split(t) else t
