# SPDX-License-Identifier: Apache-2.0
"""Sets that memory cannot hold: splits that are read while they are used, and batches prepared ahead of their step."""

from __future__ import annotations

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import torch
from torch import Tensor

from common.data.augment import Normalizer, cutout_
from common.data.images import DatasetInfo
from common.data.order import Order

Batch = tuple[Tensor, Tensor]
"""uint8 images [B, C, H, W] and int64 labels [B]."""
Reader = Callable[[int, int], Iterator[Batch]]
"""(epoch, step) -> the batches from there on, without end."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Training crops (Szegedy et al., arXiv 1409.4842), and how much of the short side a test crop shows (224 of 256).
SCALE, RATIO, CENTRE = (0.08, 1.0), (3 / 4, 4 / 3), 224 / 256
PREPARED = 2  # batches that wait for their step


class StreamedSplit(ABC):
    """Images that stay where they are: `labels` (int64 [N], CPU) is all that is in memory.

    reproducible: whether equal addresses give equal pixels, in any process.
    """

    labels: Tensor
    reproducible: bool
    reuses_buffers = False
    """Whether a batch is overwritten after the next one was asked for."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> StreamedSplit:
        """Itself: its batches go to a device, one by one."""
        return self

    @abstractmethod
    def select(self, keep: Tensor) -> StreamedSplit:
        """The images at these indices (int64), in this order."""

    @abstractmethod
    def training(self, order: Order, info: DatasetInfo, augment: bool) -> Reader:
        """Batches in `order`; augmented ones are cropped at random and mirrored, others show the centre."""

    @abstractmethod
    def testing(self, indices: Tensor, info: DatasetInfo, batch_size: int) -> Iterator[Batch]:
        """The centre of each of these images once, in this order; the last batch may be smaller."""

    def stream(
        self,
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
    ) -> StreamedBatches:
        """The training stream; arguments as of `streams.Stream`."""
        picked = torch.arange(len(self)) if indices is None else indices.cpu()
        how = {"batch_size": batch_size, "drop_last": drop_last, "fill_last": fill_last, "rank": rank, "ranks": ranks}
        order = Order(picked, seed=seed, name=name, **how)
        reader = self.training(order, info, augment)
        batches = StreamedBatches(order, info, reader, torch.device(device), cutout or 0, self.reuses_buffers)
        if augment and not self.reproducible:
            batches.notes += (NOT_REPRODUCIBLE,)
        return batches

    def batches(
        self, info: DatasetInfo, batch_size: int, device: torch.device | str, indices: Tensor
    ) -> Iterator[Batch]:
        """As `streams.evaluation_batches`: float32 images, normalised."""
        normalize, device = Normalizer(info.mean, info.std, device), torch.device(device)
        with closing(_Ahead(self.testing(indices, info, batch_size), device, self.reuses_buffers)) as ahead:
            for images, labels in ahead:
                yield normalize(images), labels


NOT_REPRODUCIBLE = (
    "data: .ffcv files are read in an exact and resumable order, but their random crops and flips differ from run to "
    "run, also after a resume; --data DIR is bit-exact"
)


class StreamedBatches:
    """The training stream of a streamed split: `batch(epoch, step)` is quick when it is asked in increasing order.

    Any other address restarts the reading there. What it gives is a function of the address as far as the split is
    `reproducible`.
    """

    def __init__(
        self,
        order: Order,
        info: DatasetInfo,
        read: Reader,
        device: torch.device,
        cutout: int = 0,
        copy: bool = False,
    ) -> None:
        """read: uint8 batches of this rank in `order`; cutout: side of the square in pixels, 0: none; copy: batches
        that are on `device` already."""
        self._copy = copy
        self.order, self.steps_per_epoch, self.notes = order, order.steps, order.notes
        self._info, self._read, self._device, self._cutout = info, read, device, cutout
        self._normalize = Normalizer(info.mean, info.std, device)
        self._ahead: _Ahead | None = None
        self._next: tuple[int, int] | None = None
        self._drawn: tuple[int, list[Tensor]] | None = None

    def shorten(self, steps: int) -> StreamedBatches:
        """This stream with epochs of at most so many steps; what is read ahead goes on with the next epoch."""
        self.steps_per_epoch = self.order.steps = min(steps, self.steps_per_epoch)
        return self

    def batch(self, epoch: int, step: int) -> Batch:
        """Batch `step` of `epoch`: x float32 [B, C, H, W] normalised, y int64 [B], on the device.

        Raises IndexError for a step outside the epoch, and what reading raises (ValueError naming file and index).
        """
        here = self.order.positions(step)
        if self._ahead is None or self._next != (epoch, step):
            self.close()
            self._ahead = _Ahead(self._read(epoch, step), self._device, self._copy)
        images, labels = next(self._ahead)
        self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
        x = self._normalize(images)
        if self._cutout:
            cutout_(x, self._cutout, *(places[here].to(self._device) for places in self._squares(epoch)))
        return x, labels

    def _squares(self, epoch: int) -> list[Tensor]:
        """Rows and columns of an epoch's squares, kept for its next step."""
        if self._drawn is None or self._drawn[0] != epoch:
            sources = (self.order.generator(epoch, axis) for axis in ("cutout y", "cutout x"))
            drawn = [torch.randint(self._info.image_size, (self.order.length,), generator=one) for one in sources]
            self._drawn = (epoch, drawn)
        return self._drawn[1]

    def close(self) -> None:
        """Stop reading ahead and wait until its thread has ended."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._next = None


class _Ahead:
    """An iterator run by a thread of its own, `PREPARED` items ahead; what it raises is raised at its place.

    Batches come out on `device`. The thread ends with the iterator, by `close`, when nobody holds this object any more,
    or with the main thread.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, copy: bool) -> None:
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREPARED)
        self._stop = threading.Event()
        self._device, self._over = device, False
        arguments = (batches, device, copy, self._ready, self._stop)
        self._thread = threading.Thread(target=_run_ahead, args=arguments, name="batches-ahead")
        # The thread must not hold this object, or nothing would ever end it.
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Batch:
        if self._over:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException) or item is None:
            self.close()
            if item is None:
                raise StopIteration
            raise item
        if self._device.type == "cuda":
            for tensor in item:  # it was made on the thread's stream
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return item

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self._stop.set()
        self._thread.join()


def _run_ahead(
    batches: Iterator[Batch], device: torch.device, copy: bool, ready: queue.Queue, stop: threading.Event
) -> None:
    """The thread of `_Ahead`: batches to the device and into the queue, then None; an error in place of a batch."""

    def put(item: Batch | BaseException | None) -> bool:
        # A thread that waits for ever would keep the process alive.
        while not stop.is_set() and threading.main_thread().is_alive():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    side = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    try:
        with side, closing(batches):  # type: ignore[type-var]
            for images, labels in batches:
                # Blocking: only this thread waits, and a reader's buffer is free again afterwards.
                if not put((images.to(device, copy=copy), labels.to(device))):
                    return
        put(None)
    except BaseException as error:  # handed to the thread that asks for the batch
        put(error)


def endless(order: Order, epoch: int, step: int) -> Iterator[tuple[int, Tensor, slice]]:
    """(epoch, its whole order, this rank's positions) of every batch from an address on, without end."""
    while True:
        whole = order.epoch(epoch)
        for number in range(step, order.steps):
            yield epoch, whole, order.positions(number)
        epoch, step = epoch + 1, 0
