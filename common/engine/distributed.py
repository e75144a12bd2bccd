# SPDX-License-Identifier: Apache-2.0
"""Ranks: the identity on one process, collectives when torch.distributed runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device_type: str) -> torch.device:
    """Meet the other processes that torchrun started, and give this one's device: a GPU of its own, or the CPU."""
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not _running():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return device


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


def average_(gradients: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, in place; nothing to do on one rank.

    Every rank must pass the same shapes in the same order. One all-reduce per dtype and device: hundreds of small
    gradients in a bucket each would be bound by latency.
    """
    if world_size() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        buckets.setdefault((gradient.dtype, gradient.device), []).append(gradient.detach())
    for tensors in buckets.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)  # a sum: gloo has no mean
        flat /= world_size()
        pieces = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)])


def sum_(tensor: Tensor) -> Tensor:
    """Replace the tensor by its sum over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


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
