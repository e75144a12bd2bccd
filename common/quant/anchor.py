# SPDX-License-Identifier: Apache-2.0
"""A tensor's place in the autograd graph without its memory, for functions that keep codes and differentiate twice."""

from __future__ import annotations

import torch
from torch import Tensor


def anchor(x: Tensor) -> Tensor:
    """A tensor of x's shape and place in the graph that holds one element, of no meaning, and not x's memory.

    Saved for a backward pass under create_graph, it takes gradients to x (`straight_through`) where x was not kept.
    """
    return _Anchor.apply(x)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
