# SPDX-License-Identifier: Apache-2.0
"""Steering a search to a cost: one multiplier on both cost terms that follows the exact cost of the present choice.

The exact cost is a staircase (argmax of bits, of operations, of edges), so it has no gradient; the expected cost has
one, and its sign tells the way. The multiplier is the controller between them.

What it controls is an integrator: logits sum up what the multiplier pushes, and the cost answers only where an argmax
flips. An integral controller on top of an integrator swings for ever, so the multiplier itself is proportional,
``mu = gain * clamp(error / width, -1, 1)`` with ``error = log(exact / target)``, both without the ends, which no
choice changes (at low bits a full-precision stem can be most of the cost), and what is integrated is the gain: it
grows while the error stays outside the width (the push is too weak: logits far from their flipping point, or the
loss pushes back), is halved when the cost swings through the target from far off (the push was too strong), and
decays inside. That finds the scale of the push within some dozens of steps, whatever the learning rates are, keeps a
standing error against a standing push of the loss within the width, and winds nothing up: at the target the
multiplier is zero. It is negative below the target, where spending is rewarded: the loss alone hardly moves gammas.

A change of one operation can move the cost by a fifth, in the last step too. So in the last part of the search, from
the first step on at which the cost is right (again without the ends), the architecture is held and only the bits go on.
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
    ends: float

    def exact(self, supernet: nn.Module) -> Tensor:
        """Cost of the present choice, a scalar on the device."""
        ...


class TargetController(nn.Module):
    """The multiplier of ``--target-bitops`` and ``--target``; its buffers are its state, for checkpoints.

    Args:
        cost: gives the exact cost, and the least and greatest that can be reached.
        target: cost to hit within :data:`BAND`.
        total_steps: steps of the whole search; it sets how fast the gain may grow.
        width: relative error at which the push saturates, well inside the band.
        scale: the push that moves bits across their spread at the start in a tenth of the search (the gain is in
            units of it); :func:`push_scale` measures it.
        gain_limits: least and greatest gain; the greatest bounds what a burst does to the alphas, whose optimiser
            remembers it for a thousand steps.
        lead: steps that the error is looked ahead by its slope: about as far as momentum carries the logits on.
        smoothing: weight of the newest error in the smoothed one.
        hold_from: share of the search after which ``hold`` (1.0: take no architecture step) may be raised.
        flag, unit: for messages.

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
        scale: float = 1.0,
        gain_limits: tuple[float, float] = (0.2, 100.0),
        smoothing: float = 0.3,
        lead: float = 8.0,
        hold_from: float = 0.85,
        flag: str = "--target-bitops",
        unit: str = "BitOps",
    ) -> None:
        super().__init__()
        if not cost.cheapest <= target <= cost.dearest:
            raise ValueError(
                f"{flag} {target:.4g}: this search reaches {cost.cheapest:.4g} to {cost.dearest:.4g} {unit} "
                f"(--eval-init-channels, --eval-layers and --bits set these ends); give a target between them"
            )
        # In a list: the cost is a module of its own, whose buffers belong to no checkpoint.
        self._cost = [cost]
        self.target, self.width, self.smoothing = float(target), width, smoothing
        self.scale, self.gain_limits, self.lead = scale, gain_limits, lead
        # A factor of 100 within a tenth of the search, but never faster than momentum (.9: ten steps) answers.
        self.log_growth = min(math.log(100) / max(1.0, 0.1 * total_steps), math.log(1.04))
        self.hold_step = hold_from * total_steps
        for name in ("multiplier", "error", "peak", "exact", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("gain", torch.ones((), dtype=torch.float64))
        self.register_buffer("hold", torch.zeros((), dtype=torch.float32))

    @torch.no_grad()
    def update(self, model: nn.Module, moving: bool = True) -> None:
        """Read the exact cost and set the multiplier, without a sync.

        ``moving``: whether the architecture moves yet. Before that the gain stays within ten: an accidental first
        genotype must not drive the bits to an end from which they would have to come back.
        """
        exact = self._cost[0].exact(model).to(self.exact.dtype)
        ends = self._cost[0].ends
        raw = ((exact - ends) / (self.target - ends)).log()
        # Smoothed a little: two operations at a tie make the cost jump back and forth.
        error = torch.where(self.steps > 0, self.error + self.smoothing * (raw - self.error), raw)
        slope = torch.where(self.steps > 0, error - self.error, 0.0)
        crossed = error * self.error < 0
        exponent = (error.abs() / self.width - 1).clamp(-0.5, 1.0) * self.log_growth
        swung = crossed & (self.peak > 2 * self.width)
        low, high = self.gain_limits
        self.gain.mul_(torch.where(swung, 0.5, exponent.exp())).clamp_(low, high if moving else min(high, 10.0))
        self.peak.copy_(torch.where(crossed, error.abs(), torch.maximum(self.peak, error.abs())))
        self.exact.copy_(exact)
        self.error.copy_(error)
        self.steps += 1
        on_target = (raw.abs() < self.width) & (self.steps >= self.hold_step)
        self.hold.copy_(torch.maximum(self.hold, on_target.to(self.hold.dtype)))
        self.multiplier.copy_(self.scale * self.gain * ((error + self.lead * slope) / self.width).clamp(-1, 1))

    @torch.no_grad()
    def reached(self, model: nn.Module) -> bool:
        """Whether the exact cost of the present choice is within the band. Reads the device."""
        return within(float(self._cost[0].exact(model)), self.target)


def within(exact: float, target: float) -> bool:
    """Whether a cost counts as the target."""
    return abs(exact / target - 1) <= BAND + 1e-9


def movable_error(exact: float, target: float, ends: float) -> float:
    """How far (as a share) the part of the cost that choices move is from what the target leaves for it."""
    return (exact - ends) / (target - ends) - 1


def push_scale(term: Tensor, gammas: list[nn.Parameter], *, weight: float, rate: float, total_steps: int) -> float:
    """The multiplier at which the term carries a bit choice across its spread at the start in a tenth of the search.

    Args:
        term: the cost term (scalar with a graph), which the loss adds ``weight`` times.
        gammas: bit logits, drawn with a standard deviation of .001 each.
        rate: learning rate of the gammas over (1 - momentum).
        total_steps: of the whole search.
    """
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(term, gammas)]).abs().double()
    # Each gradient weighted by itself: the rows that make the cost, not the many that hardly count.
    typical = float((gradient**2).sum() / gradient.sum().clamp_min(1e-300))
    # Logits of a choice move apart, hence the 2 below; .003 is twice the spread of their difference.
    moved = 2 * weight * rate * typical * max(1.0, 0.1 * total_steps)
    return 0.003 / moved if moved > 0 else 1.0
