# SPDX-License-Identifier: Apache-2.0
"""Statistics of a batch that several ranks hold in parts: what layers need of whoever joins them.

Every rank holds as many images. Who computes a reduction is not this wing's affair: it comes as an argument.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Reduction(Protocol):
    """One value of all ranks. Every rank calls the same methods in the same order with tensors of the same shapes."""

    ranks: int

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of each element; differentiable, as often as wanted."""
        ...

    def maximum(self, x: Tensor) -> Tensor:
        """The largest over the ranks of each element, without gradient."""
        ...


def share_ranges(module: nn.Module, reduction: Reduction) -> None:
    """Let the activation quantisers of `module` see all ranks' batches: running ranges, and scales by the batch."""
    for one in module.modules():
        if hasattr(one, "range_reduction"):
            one.range_reduction = reduction


def share_first_steps(module: nn.Module, reduction: Reduction) -> None:
    """Let learned steps (LSQ) start from all ranks' first batches: they are parameters, which must be equal."""
    for one in module.modules():
        if hasattr(one, "step_reduction"):
            one.step_reduction = reduction
