# SPDX-License-Identifier: Apache-2.0
"""Learning rates by epoch, one rule for both loops: the schedule ends after the last epoch, so none trains at 0."""

from __future__ import annotations

import math


def rate_at(
    epoch: int,
    *,
    epochs: int,
    rate: float,
    least: float = 0.0,
    warmup: int = 0,
    schedule: str = "cosine",
    step_epochs: int = 30,
    step_factor: float = 0.1,
) -> float:
    """The learning rate of epoch 0 .. epochs - 1.

    The first `warmup` epochs rise linearly towards `rate`, as rate (e + 1) / (warmup + 1). The rest falls from `rate`
    towards `least`, which no epoch reaches: by a cosine, linearly, or by `step_factor` every `step_epochs` epochs
    (counted from epoch 0).
    """
    if epoch < warmup:
        return rate * (epoch + 1) / (warmup + 1)
    done = (epoch - warmup) / (epochs - warmup)
    if schedule == "cosine":
        return least + (rate - least) * (1 + math.cos(math.pi * done)) / 2
    if schedule == "linear":
        return least + (rate - least) * (1 - done)
    assert schedule == "step", schedule
    return rate * step_factor ** (epoch // step_epochs)
