# SPDX-License-Identifier: Apache-2.0
"""Losses and learning rates of the child."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("hinge", "squared-hinge", "cross-entropy", "reference-hinge")


def hinge(logits: Tensor, labels: Tensor, *, wrong: float = -1.0, power: int = 1) -> Tensor:
    """Mean over images and classes of max(0, 1 - t logit)^power; targets t are +1, and `wrong` for other classes."""
    targets = torch.full_like(logits, wrong).scatter_(1, labels[:, None], 1.0)
    return (1 - targets * logits).clamp_min(0).pow(power).mean()


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The criterion of that name; `reference-hinge` is the source's, whose targets became +1 and -3 by accident."""
    if name == "cross-entropy":
        return F.cross_entropy
    if name == "squared-hinge":
        return lambda logits, labels: hinge(logits, labels, power=2)
    wrong = {"hinge": -1.0, "reference-hinge": -3.0}[name]
    return lambda logits, labels: hinge(logits, labels, wrong=wrong)


def cosine_restarts(epoch: int, *, rate: float, least: float, first: int, factor: int) -> float:
    """From `rate` towards `least` by a cosine of `first` epochs, then of `factor` times as many, and so on.

    Each period begins at `rate` (Loshchilov and Hutter, ICLR 2017).
    """
    start, period = 0, first
    while epoch - start >= period:
        start, period = start + period, period * factor
    return least + 0.5 * (rate - least) * (1 + math.cos(math.pi * (epoch - start) / period))


def staircase(epoch: int, *, rate: float, factor: float, every: int) -> float:
    """`rate` times `factor` after every `every` epochs."""
    return rate * factor ** (epoch // every)
