# SPDX-License-Identifier: Apache-2.0
"""Steering a search to a cost: one multiplier on both cost terms that follows the exact cost of the present choice.

The exact cost is a staircase (argmax of bits, of operations, of edges), so it has no gradient; the expected cost has
one, and its sign tells the way. The multiplier is the controller between them.

What it controls is an integrator: logits sum up what the multiplier pushes, and the cost answers only where an argmax
flips. An integral controller on top of an integrator swings for ever, so the multiplier itself is proportional,
``mu = gain * clamp(error / width, -1, 1)`` with ``error = log(exact / target)``, and what is integrated is the gain:
it grows while the error stays outside the width with one sign (the push is too weak: logits far from their
flipping point, or the loss pushes back), is cut at every change of sign (the push was too strong), and decays
inside. That finds the scale of the push within a few dozens of steps, whatever the learning rates are, keeps
a standing error against a standing push of the loss within the width, and winds nothing up: at the target the
multiplier is zero. It is negative below the target, where spending is rewarded: the loss alone hardly moves gammas.

The error is smoothed a little, since two operations at a tie make the cost jump back and forth.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

BAND = 0.10
"""The target is reached within this share of it (design.md 6.3)."""


class SteerableCost(Protocol):
    """What is needed of ``common.cost.ExpectedCost``."""

    cheapest: float
    dearest: float

    def exact(self, supernet: nn.Module) -> Tensor:
        """BitOps of the present choice, a scalar on the device."""
        ...


class TargetController(nn.Module):
    """The multiplier of ``--target-bitops``; its buffers are its state, for checkpoints.

    Args:
        cost: gives the exact cost, and the least and greatest that can be reached.
        target: BitOps to hit within :data:`BAND`.
        total_steps: steps of the whole search; it sets how fast the gain may grow.
        width: relative error at which the push saturates, well inside the band.
        gain_limits: least and greatest push; the greatest bounds what a burst does to the alphas, whose optimiser
            remembers it for a thousand steps.

    Raises:
        ValueError: a target that cannot be reached, with the two ends of what can.
    """

    def __init__(
        self,
        cost: SteerableCost,
        target: float,
        *,
        total_steps: int,
        width: float = 0.04,
        gain_limits: tuple[float, float] = (0.05, 100.0),
        smoothing: float = 0.3,
    ) -> None:
        super().__init__()
        if not cost.cheapest <= target <= cost.dearest:
            raise ValueError(
                f"--target-bitops {target:.4g}: this search reaches {cost.cheapest:.4g} to {cost.dearest:.4g} BitOps "
                f"(--eval-init-channels, --eval-layers and --bits set these ends); give a target between them"
            )
        self.cost, self.target, self.width, self.smoothing = cost, float(target), width, smoothing
        self.gain_limits = gain_limits
        # A factor of 100 within a tenth of the search, but never faster than momentum (.9: ten steps) answers.
        self.growth = min(math.exp(math.log(100) / max(1.0, 0.1 * total_steps)), 1.04)
        for name in ("multiplier", "gain", "error", "exact"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("started", torch.zeros((), dtype=torch.float64))
        self.gain.fill_(1.0)

    @torch.no_grad()
    def update(self, model: nn.Module, moving: bool = True) -> None:
        """Read the exact cost and set the multiplier, without a sync.

        ``moving``: whether the architecture moves yet. Before that the gain rests: an accidental first genotype
        must not drive the bits to an end from which they would have to come back.
        """
        exact = self.cost.exact(model).to(self.exact.dtype)
        error = (exact / self.target).log()
        former = self.error
        smooth = torch.where(self.started > 0, former + self.smoothing * (error - former), error)
        outside = smooth.abs() > self.width
        crossed = (smooth * former < 0) & (self.started > 0)
        if moving:
            factor = torch.where(outside, self.growth, 1 / self.growth)
            factor = torch.where(crossed, 0.5, factor)
            self.gain.mul_(factor).clamp_(*self.gain_limits)
        self.exact.copy_(exact)
        self.error.copy_(smooth)
        self.started.fill_(1.0)
        self.multiplier.copy_(self.gain * (smooth / self.width).clamp(-1, 1))

    @torch.no_grad()
    def reached(self, model: nn.Module) -> bool:
        """Whether the exact cost of the present choice is within the band. Reads the device."""
        return within(float(self.cost.exact(model)), self.target)


def within(exact: float, target: float) -> bool:
    """Whether a cost counts as the target."""
    return abs(exact / target - 1) <= BAND
