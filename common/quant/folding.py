# SPDX-License-Identifier: Apache-2.0
"""Folding: a batch normalisation in evaluation mode is an affine map, which the convolution before it can take over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import nn

Fold = tuple[Sequence[nn.Conv2d], nn.BatchNorm2d]
"""The convolutions whose outputs, side by side on the channels, one normalisation takes."""


@torch.no_grad()
def fold_normalization(network: nn.Module) -> None:
    """Move every normalisation that follows convolutions directly into them, in place.

    Its scale goes into their weights, its shift becomes their bias, an identity takes its place; outputs in evaluation
    mode stay equal. What follows what is said by the modules' own `folds()`, and by the order in a Sequential; a
    normalisation that nobody names stays.
    """
    for module in list(network.modules()):
        for convolutions, normalization in folds_of(module):
            _absorb(convolutions, normalization)
            name = next(name for name, child in module.named_children() if child is normalization)
            setattr(module, name, nn.Identity())


def folds_of(module: nn.Module) -> Iterable[Fold]:
    """What a module says of its own children: which convolutions each normalisation follows directly."""
    if isinstance(module, nn.Sequential):
        return [
            ((first,), second)
            for first, second in pairwise(module)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d)
        ]
    return module.folds() if hasattr(module, "folds") else []


def scale_and_shift(normalization: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """What a normalisation computes in evaluation mode: x scale + shift, both [channels], in its own precision."""
    mean, variance = normalization.running_mean, normalization.running_var
    assert mean is not None and variance is not None, "without running statistics there is nothing constant to fold"
    scale = (variance + normalization.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if normalization.affine:
        scale, shift = normalization.weight * scale, normalization.bias
    return scale, shift - mean * scale


def _absorb(convolutions: Sequence[nn.Conv2d], normalization: nn.BatchNorm2d) -> None:
    """gamma (conv(x) + b - mean) / sqrt(var + eps) + beta, written as a convolution with a bias."""
    scale, shift = scale_and_shift(normalization)
    at = 0
    for convolution in convolutions:
        here = slice(at, at := at + convolution.out_channels)
        bias = 0 if convolution.bias is None else convolution.bias
        convolution.weight.mul_(scale[here].view(-1, 1, 1, 1))
        convolution.bias = nn.Parameter(shift[here] + bias * scale[here])
