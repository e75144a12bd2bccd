# SPDX-License-Identifier: Apache-2.0
"""REINFORCE with a moving baseline (Williams, 1992), and the two rewards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Baseline:
    """A moving average of the rewards, moved by each before it is used, starting at 0."""

    def __init__(self, decay: float, value: float = 0.0) -> None:
        self.decay, self.value = decay, value

    def update(self, reward: float) -> float:
        """Move towards one reward; the new value."""
        self.value -= (1 - self.decay) * (self.value - reward)
        return self.value

    def follow(self, rewards: Sequence[float]) -> list[float]:
        """Move towards rewards in their order; the value after each, which is the one to use with it."""
        return [self.update(reward) for reward in rewards]


def policy_loss(neg_log_prob: Tensor, rewards: Tensor, baselines: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of -log p x (reward - baseline) over the samples [n]; `weights` [n] in place of the mean's 1 / n.

    Its gradient estimates that of minus the expected reward.
    """
    terms = neg_log_prob * (rewards - baselines)
    return terms.mean() if weights is None else (weights * terms).sum()


def cost_penalty(bitops: float, target: float, weight: float) -> float:
    """What --reward accuracy-bitops takes off the accuracy: `weight` x the share by which the cost exceeds the target.

    Nothing is taken off below the target, so that accuracy alone decides among what can be afforded.
    """
    return weight * max(0.0, bitops / target - 1.0)
