# SPDX-License-Identifier: Apache-2.0
"""Ranks: the identity on one process, collectives when torch.distributed runs.

Every rank calls the same functions in the same order. What travels in a step is counted (`counted`), since hundreds of
messages are bound by latency and not by bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


@dataclass
class Traffic:
    """What this rank has handed to reductions: their number, and the bytes of their tensors."""

    messages: int = 0
    bytes: int = 0


_counting: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Within it, reductions are counted."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        # by identity: two that have counted the same are equal
        _counting[:] = [one for one in _counting if one is not traffic]


def _reduce_(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    for traffic in _counting:
        traffic.messages += 1
        traffic.bytes += tensor.numel() * tensor.element_size()
    dist.all_reduce(tensor, operation)
    return tensor


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device_type: str) -> torch.device:
    """Meet the other processes that torchrun started, and give this one's device: a GPU of its own, or the CPU.

    Raises ValueError where there are fewer GPUs than processes.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            processes = os.environ.get("LOCAL_WORLD_SIZE", "more")
            raise ValueError(
                f"--nproc_per_node: {processes} processes, and {there} GPUs here; start {there}, or add --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not _running():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", **_meeting_point())
    return device


def _meeting_point() -> dict[str, Any]:
    """Where the processes of this attempt meet, as arguments of init_process_group.

    torchrun keeps one store for all attempts of a job, and torch 2.15 its keys under the same names: a process that was
    started again could read the address of one that is dead, and wait for it for half an hour. So each attempt has
    names of its own, on one machine: the agents of several need not have counted the same attempts.
    """
    attempt, processes = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("WORLD_SIZE")
    if attempt in (None, "0") or os.environ.get("LOCAL_WORLD_SIZE") != processes:
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world_size}


def leave() -> None:
    """Part from the other processes, where there are any."""
    if _running():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 on one process."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes train together, 1 without torch.distributed."""
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    """True on the one process that names folders and writes files."""
    return rank() == 0


def average_(tensors: Iterable[Tensor], sums: Sequence[Tensor] = ()) -> None:
    """Replace each tensor by its mean over all ranks, in place, and each of `sums` by its sum; nothing on one rank.

    Every rank must pass the same shapes in the same order. One all-reduce per dtype and device: hundreds of small
    gradients in a bucket each would be bound by latency.
    """
    if world_size() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for position, group in enumerate((tensors, sums)):
        for tensor in group:
            bucket = buckets.setdefault((tensor.dtype, tensor.device), ([], []))
            bucket[position].append(tensor.detach())
    for means, totals in buckets.values():
        together = [*means, *totals]
        flat = _reduce_(torch.cat([tensor.reshape(-1) for tensor in together]))  # a sum: gloo has no mean
        if means:  # counts of whole numbers are only summed
            flat[: sum(tensor.numel() for tensor in means)] /= world_size()
        pieces = flat.split([tensor.numel() for tensor in together])
        torch._foreach_copy_(together, [piece.view_as(tensor) for piece, tensor in zip(pieces, together, strict=True)])


def sum_(tensor: Tensor) -> Tensor:
    """Replace the tensor by its sum over all ranks, in place, and return it."""
    return _reduce_(tensor) if world_size() > 1 else tensor


class _Mean(torch.autograd.Function):
    """The mean over the ranks. Its gradient is the mean of theirs: every rank's loss depends on every rank's value, and
    the gradients of all losses together, which `average_` divides by the ranks once more, are what is wanted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduce_(x.detach().clone(memory_format=torch.contiguous_format)) / world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Mean.apply(gradient)


class Reduction:
    """Statistics over the batches of all ranks, for layers that take them from an argument (`--sync-bn`).

    Every rank holds as many images. `mean` is differentiable as often as wanted; each call is one message forward and
    one backward.
    """

    @property
    def ranks(self) -> int:
        """How many share a batch."""
        return world_size()

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, elementwise."""
        return _Mean.apply(x) if world_size() > 1 else x

    @torch.no_grad()
    def maximum(self, x: Tensor) -> Tensor:
        """The largest over the ranks, elementwise, without gradient."""
        return _reduce_(x.detach().clone(), dist.ReduceOp.MAX) if world_size() > 1 else x


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank (strings, numbers, lists, dicts of them)."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_on_its_machine() -> Iterator[None]:
    """One rank of each machine goes through the block first, the others after it: what it downloads is there then."""
    waits = world_size() > 1 and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        dist.barrier()
    yield
    if world_size() > 1 and not waits:
        dist.barrier()


def lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because another process has gone, which has an error of its own to show."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
