# SPDX-License-Identifier: Apache-2.0
"""No image is lost or seen twice across a stop, at any position, of any stream, for any number of ranks.

Images carry their own number as label, so what was seen is known without comparing pixels. (What a batch of pixels is
does not depend on workers or restarts: tests/data/test_streams.py, test_imagenet.py.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from common.data import open_stream
from common.data.images import DatasetInfo, Split
from common.data.order import Order
from common.data.streamed import Batch, Reader, StreamedSplit
from common.engine.accumulation import accumulated, batches_of
from common.engine.protocols import BatchStream
from common.recipes.setup import shorten

IMAGES = 53
INFO = DatasetInfo("numbers", IMAGES, 1, 4, tuple(map(str, range(IMAGES))), (0.5,), (0.5,), False, 0)


class Numbers(StreamedSplit):
    """A split that is read while it is used: image i is all i."""

    reproducible = True

    def __init__(self) -> None:
        self.labels = torch.arange(IMAGES)

    def select(self, keep: Tensor) -> StreamedSplit:
        raise NotImplementedError

    def training(self, order: Order, info: DatasetInfo, augment: bool) -> Reader:
        def read(epoch: int, step: int) -> Iterator[Batch]:
            while True:
                here = order.epoch(epoch)[order.positions(step)]
                yield here.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), here
                epoch, step = (epoch, step + 1) if step + 1 < order.steps else (epoch + 1, 0)

        return read

    def testing(self, indices: Tensor, info: DatasetInfo, batch_size: int) -> Iterator[Batch]:
        raise NotImplementedError


def resident() -> Split:
    return Split(torch.arange(IMAGES, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.arange(IMAGES))


def opened(kind: str, ranks: int, parts: int = 1, limit: int | None = None, together: int = 12) -> list[BatchStream]:
    """One stream a rank, as a process that has just been started opens it."""
    split = resident() if kind == "resident" else Numbers()
    how = {"batch_size": together // (ranks * parts), "seed": 5, "name": "train", "augment": False, "ranks": ranks}
    streams = [accumulated(open_stream(split, INFO, rank=rank, **how), parts) for rank in range(ranks)]
    return [shorten(stream, limit) for stream in streams]


def seen_at(streams: list[BatchStream], epoch: int, step: int) -> list[int]:
    """The images of one step on all ranks, sorted; each rank has others."""
    found = [int(label) for stream in streams for _, y in batches_of(stream, epoch, step) for label in y]
    assert len(set(found)) == len(found), "an image twice in one step"
    return sorted(found)


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("ranks", "parts", "limit"), [(1, 1, None), (1, 2, None), (2, 1, None), (3, 2, None), (2, 1, 3)]
)
def test_stopped_anywhere_any_number_of_times(kind: str, ranks: int, parts: int, limit: int | None) -> None:
    """Against one process that is never stopped; and on other numbers of ranks after each stop."""
    if kind == "streamed" and parts > 1 and limit:
        pytest.skip("a streamed epoch is shortened before it is cut into parts")
    alone, epochs = opened(kind, 1, limit=limit), 4
    steps = alone[0].steps_per_epoch
    assert steps == (limit or IMAGES // 12)
    wanted = {divmod(number, steps): seen_at(alone, *divmod(number, steps)) for number in range(epochs * steps)}
    draw, streams = random.Random(7), opened(kind, ranks, parts, limit)
    for position in wanted:
        if draw.random() < 0.5:  # stopped here, and started anew
            streams = opened(kind, draw.choice((1, ranks)), draw.choice((1, parts)), limit)
        assert seen_at(streams, *position) == wanted[position], position
    for epoch in range(epochs):
        whole = [image for (at, _), images in wanted.items() if at == epoch for image in images]
        assert len(set(whole)) == len(whole) == 12 * steps, "an image lost or seen twice in an epoch"
    orders = [tuple(wanted[epoch, 0]) for epoch in range(epochs)]
    assert len(set(orders)) == epochs, "another order every epoch"


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_ranks_have_distinct_images(kind: str) -> None:
    for epoch in range(2):
        shares = [set(), set(), set()]
        streams = opened(kind, 3)
        for step in range(streams[0].steps_per_epoch):
            for share, stream in zip(shares, streams, strict=True):
                share |= set(stream.batch(epoch, step)[1].tolist())
        assert not shares[0] & shares[1] and not shares[1] & shares[2] and not shares[0] & shares[2]
        assert sum(map(len, shares)) == 12 * streams[0].steps_per_epoch


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_labels_belong_to_their_images(kind: str) -> None:
    (stream,) = opened(kind, 1)
    for step in range(stream.steps_per_epoch):
        x, y = stream.batch(1, step)
        assert torch.equal(((x * 0.5 + 0.5) * 255).round().to(torch.int64)[:, 0, 0, 0], y)
