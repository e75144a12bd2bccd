# SPDX-License-Identifier: Apache-2.0
"""Steps made of several batches, whose gradients are averaged before anything moves (`--grad-accumulation`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.engine.protocols import BatchStream

Batch = tuple[Tensor, Tensor]


class Accumulated:
    """A stream each of whose steps is `parts` batches of another one, in its order; a rest that fills none is left.

    An epoch of fewer batches than `parts` has one step, which starts it over.
    """

    def __init__(self, stream: BatchStream, parts: int) -> None:
        self.stream, self.parts = stream, parts
        self.steps_per_epoch = max(1, stream.steps_per_epoch // parts)
        self.notes: tuple[str, ...] = tuple(getattr(stream, "notes", ()))
        if stream.steps_per_epoch < parts:
            self.notes += (f"an epoch has {stream.steps_per_epoch} of the {parts} batches of a step: it wraps around",)

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """The batches of one step."""
        numbers = (step * self.parts + part for part in range(self.parts))
        return [self.stream.batch(epoch, number % self.stream.steps_per_epoch) for number in numbers]

    def batch(self, epoch: int, step: int) -> Batch:
        """The first of them."""
        return self.stream.batch(epoch, step * self.parts % self.stream.steps_per_epoch)


def accumulated(stream: BatchStream, parts: int) -> BatchStream:
    """The stream itself for steps of one batch."""
    return stream if parts == 1 else Accumulated(stream, parts)


def batches_of(stream: BatchStream, epoch: int, step: int) -> list[Batch]:
    """The batches of a step of any stream."""
    several = getattr(stream, "batches", None)
    return [stream.batch(epoch, step)] if several is None else several(epoch, step)


def as_list(batches: Batch | Sequence[Batch]) -> list[Batch]:
    """One batch, or several, as a list of them."""
    return [batches] if isinstance(batches, tuple) else list(batches)


def add(total: list[Tensor | None] | None, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients added to those so far (None: none yet); a parameter's None counts as zero."""
    if total is None:
        return list(found)
    pairs = zip(total, found, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]


def divide(total: list[Tensor | None], parts: int) -> list[Tensor | None]:
    """Sums over `parts` batches as means."""
    return total if parts == 1 else [None if one is None else one / parts for one in total]
