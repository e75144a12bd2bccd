# SPDX-License-Identifier: Apache-2.0
"""What the two loops need of their surroundings: where batches come from, and a run folder."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class BatchStream(Protocol):
    """Where batches come from: `batch(epoch, step)` is a pure function, step in 0 .. steps_per_epoch - 1."""

    steps_per_epoch: int

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B] on the network's device."""
        ...


class RunLike(Protocol):
    """What the loop needs of a run folder (`common.engine.run.Run`)."""

    checkpoints: Any

    def log(self, text: str) -> None:
        """A line for the user and for log.txt."""

    def metrics(self, row: dict[str, Any], *, step: int) -> None:
        """A row of metrics.csv."""

    def history(self, row: dict[str, Any], *, epoch: int) -> None:
        """A line of history.jsonl."""

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint, None for a fresh run."""
