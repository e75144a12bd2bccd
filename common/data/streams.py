# SPDX-License-Identifier: Apache-2.0
"""Batches from resident images: training streams whose every batch is a function of its address, and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.augment import Normalizer, crop_flip, cutout_
from common.data.images import DatasetInfo, Split
from common.data.order import Order
from common.data.streamed import StreamedBatches, StreamedSplit


class _Plan(NamedTuple):
    """All random numbers of one epoch, on the device: one entry per position in the epoch's order."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor | None
    cut_y: Tensor | None
    cut_x: Tensor | None


class Stream:
    """An endless stream of shuffled, augmented, normalised batches.

    `batch(epoch, step)` is a pure function of (seed, name, epoch, step): it can be asked in any order, in any process
    and after any restart, with any number of threads, on CPU or GPU, and picks and augments the same images. Draws are
    made on the CPU once per epoch and moved to the device together, so that a step costs no transfer and no wait.
    `notes` holds what its user should be told.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        *,
        indices: Tensor | None = None,
        batch_size: int,
        seed: int,
        name: str,
        augment: bool,
        cutout: int | None = None,
        drop_last: bool = True,
        fill_last: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """indices: int64, the part of `split` to draw from (None: all). augment: pad-crop and mirror as `info` says.

        cutout: side of the square, in pixels (None or 0: off), also without `augment`. drop_last: leave out the last
        incomplete batch of an epoch (another one each epoch, since the order changes); fewer images than one batch
        then fill it by starting over. fill_last: fill that batch too with images of a second order, in place of
        leaving it out. rank of ranks: the processes that share an epoch; a step takes `ranks` batches of
        the one order, the first for rank 0, so that together they see what one process sees at `ranks` x batch_size.
        Raises ValueError for a batch size or cutout below its least value.
        """
        if cutout is not None and cutout < 0:
            raise ValueError(f"--cutout-length {cutout}: must be 0 (off) or more pixels")
        picked = torch.arange(len(split)) if indices is None else indices.cpu()
        self._order = Order(
            picked,
            batch_size=batch_size,
            seed=seed,
            name=name,
            drop_last=drop_last,
            fill_last=fill_last,
            rank=rank,
            ranks=ranks,
        )
        self._split, self._info, self._device = split.to(device), info, device
        self._augment, self._cutout = augment, cutout or 0
        self._normalize = Normalizer(info.mean, info.std, device)
        self._cached: tuple[int, _Plan] | None = None
        self.steps_per_epoch: int = self._order.steps
        self.notes: tuple[str, ...] = self._order.notes
        if self._cutout >= info.image_size:
            self.notes += (
                f"--cutout-length {cutout}: as large as the images ({info.image_size} pixels); many are wiped out",
            )

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Batch `step` (0 .. steps_per_epoch - 1) of `epoch`: x float32 [B, C, H, W] normalised, y int64 [B].

        Raises IndexError for a step outside the epoch.
        """
        here = self._order.positions(step)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._draw(epoch))
        order, top, left, flip, cut_y, cut_x = (None if t is None else t[here] for t in self._cached[1])
        assert order is not None and top is not None and left is not None
        images = self._split.images.index_select(0, order)
        if self._augment:
            images = crop_flip(images, self._info.pad, top, left, flip)
        x = self._normalize(images)
        if cut_y is not None and cut_x is not None:
            cutout_(x, self._cutout, cut_y, cut_x)
        return x, self._split.labels.index_select(0, order)

    def _draw(self, epoch: int) -> _Plan:
        def random(purpose: str, high: int) -> Tensor:
            source = self._order.generator(epoch, purpose)
            return torch.randint(high, (self._order.length,), generator=source).to(self._device)

        size, shifts = self._info.image_size, 2 * self._info.pad + 1
        return _Plan(
            order=self._order.epoch(epoch).to(self._device),
            top=random("top", shifts),
            left=random("left", shifts),
            flip=random("flip", 2).bool() if self._info.flip else None,
            cut_y=random("cutout y", size) if self._cutout else None,
            cut_x=random("cutout x", size) if self._cutout else None,
        )


def open_stream(split: Split | StreamedSplit, info: DatasetInfo, **arguments: Any) -> Stream | StreamedBatches:
    """The training stream of a split, in memory or not; the arguments are those of `Stream`."""
    return Stream(split, info, **arguments) if isinstance(split, Split) else split.stream(info, **arguments)


def evaluation_batches(
    split: Split | StreamedSplit,
    info: DatasetInfo,
    batch_size: int,
    device: torch.device | str,
    *,
    indices: Tensor | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, normalised and nothing else; the last batch may be smaller.

    Yields x float32 [B, C, H, W] and y int64 [B] on `device`. indices: int64, the part to go through (None: all). Of
    several ranks each takes every `ranks`-th batch: together they see every image once, in the batches of one process.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be at least 1")
    if ranks > 1 or (indices is None and not isinstance(split, Split)):
        every = torch.arange(len(split)) if indices is None else indices
        own = every.split(batch_size)[rank::ranks]
        indices = torch.cat(own) if own else every[:0]  # only its last batch can be incomplete
    if isinstance(split, Split):
        return _resident_batches(split, info, batch_size, device, indices)
    return split.batches(info, batch_size, device, indices.cpu())


def _resident_batches(
    split: Split, info: DatasetInfo, batch_size: int, device: torch.device | str, indices: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    normalize = Normalizer(info.mean, info.std, device)
    order = None if indices is None else indices.to(split.images.device)
    for start in range(0, len(split) if order is None else len(order), batch_size):
        here: slice | Tensor = slice(start, start + batch_size)
        if order is not None:
            here = order[here]
        yield normalize(split.images[here].to(device)), split.labels[here].to(device)
