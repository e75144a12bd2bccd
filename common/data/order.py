# SPDX-License-Identifier: Apache-2.0
"""Who sees which image when: the order of an epoch, cut into batches and shared by ranks; no image is touched here."""

from __future__ import annotations

import torch
from torch import Tensor

from common.data._seeds import generator


class Order:
    """The endless shuffled order behind a training stream: a pure function of (seed, name, epoch).

    A step takes `ranks` batches of the one order, the first for rank 0, so that together the ranks see what one process
    sees at `ranks` x batch_size. `notes` holds what the user should be told.
    """

    def __init__(
        self,
        indices: Tensor,
        *,
        batch_size: int,
        seed: int,
        name: str,
        drop_last: bool = True,
        fill_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """indices: int64 [N], the images to draw from. drop_last: leave out the last incomplete batch of an epoch
        (another one each epoch, since the order changes); fewer images than one batch then fill it by starting over.
        fill_last: fill that batch too, with images of a second order, in place of leaving it out.

        Raises ValueError for an empty stream and for a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"--batch-size {batch_size}: must be at least 1")
        if len(indices) == 0:
            raise ValueError(f"the {name} stream has no images: give another split (--train-portion)")
        assert 0 <= rank < ranks and (drop_last or ranks == 1), "ranks share whole batches"
        assert drop_last or not fill_last, "a last batch is kept as it is, or filled"
        self.indices, self.batch_size, self.seed, self.name = indices, batch_size, seed, name
        self._rank, self._ranks = rank, ranks
        count, together = len(indices), batch_size * ranks
        short = drop_last and count < together
        whole, filled = max(count // together, 1) * together, -(-count // together) * together
        self.length = filled if fill_last else whole if drop_last else count
        self.steps: int = -(-self.length // together)
        self.notes: tuple[str, ...] = ()
        if short:
            self.notes = (f"the {name} stream has {count} images, fewer than one batch of {together}: it wraps around",)

    def epoch(self, epoch: int) -> Tensor:
        """int64 [length]: the image at each position of an epoch, over all ranks."""
        source, count = self.generator(epoch, "order"), len(self.indices)
        rounds = [torch.randperm(count, generator=source) for _ in range(-(-self.length // count))]
        return self.indices[torch.cat(rounds)[: self.length]]

    def positions(self, step: int) -> slice:
        """Which positions of an epoch this rank's batch `step` takes. Raises IndexError outside the epoch."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of the {self.name} stream, which has {self.steps} per epoch")
        start = (step * self._ranks + self._rank) * self.batch_size
        return slice(start, min(start + self.batch_size, self.length))

    def generator(self, epoch: int, *words: str | int) -> torch.Generator:
        """The source of one purpose's draws; turning one off leaves the order and the others as they were."""
        return generator(self.seed, "stream", self.name, epoch, *words)
