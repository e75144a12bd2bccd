# SPDX-License-Identifier: Apache-2.0
"""Stacks of depthwise-separable convolutions on the CPU: the native entries that nets' fused cells are made of.

All tensors are [B, H, W, channels], contiguous; channels are groups (edges) x width. Their PyTorch twins are plain
convolutions and batch normalisations.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from common.quant.kernels.levels import Operand
from common.quant.kernels.native import function, pointer

_INT64 = ctypes.c_int64


@dataclass(frozen=True)
class Window:
    """Geometry of a depthwise convolution."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def out(self, size: int) -> int:
        """Height or width of its output."""
        return (size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def entry(self, operand: Operand) -> ctypes.Array[ctypes.c_int]:
        """For the native entries."""
        _, height, width, _ = operand.shape
        channels = operand.groups * operand.width
        values = (height, width, channels, self.kernel, self.stride, self.padding, self.dilation)
        return (ctypes.c_int * 7)(*values)


def depthwise(image: Operand, window: Window, weight: Tensor) -> Tensor:
    """Depthwise convolution of the decoded operand with weight [channels, 1, k, k]."""
    batch, height, width, _ = image.shape
    out = torch.empty(batch, window.out(height), window.out(width), image.groups * image.width, dtype=image.dtype)
    source = image.source()
    function("depthwise", image.dtype)(
        ctypes.byref(source), _INT64(batch), window.entry(image), pointer(weight), pointer(out), torch.get_num_threads()
    )
    return out


def depthwise_backward(
    image: Operand,
    window: Window,
    weight: Tensor,
    gradient: Tensor,
    *,
    images: bool,
    weights: bool,
    probabilities: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradient of `depthwise`: those of what was encoded, of the weight [channels, taps] (float64) and of the
    probabilities [groups, bits] (float64); None for each that is not asked for.
    """
    out = torch.empty(image.shape, dtype=image.dtype) if images else None
    empty = lambda wanted, *shape: torch.empty(shape, dtype=torch.float64) if wanted else None  # noqa: E731
    d_weight = empty(weights, image.groups * image.width, window.kernel**2)
    p_image = empty(probabilities and image.columns, image.groups, image.columns)
    source = image.source()
    function("depthwise_backward", image.dtype)(
        ctypes.byref(source),
        _INT64(image.shape[0]),
        window.entry(image),
        *map(pointer, (weight, gradient, out, d_weight, p_image)),
        torch.get_num_threads(),
    )
    return out, d_weight, p_image


def moments(operand: Operand) -> tuple[Tensor, Tensor]:
    """Means over all pixels of m [groups, width] and of m m^T [groups, width, width], float64."""
    batch, height, width, _ = operand.shape
    mean = torch.empty(operand.groups, operand.width, dtype=torch.float64)
    second = torch.empty(operand.groups, operand.width, operand.width, dtype=torch.float64)
    source = operand.source()
    function("moments", operand.dtype)(
        ctypes.byref(source),
        _INT64(batch),
        _INT64(height * width),
        pointer(mean),
        pointer(second),
        torch.get_num_threads(),
    )
    return mean, second


@dataclass
class Folded:
    """Normalisation and strength folded into a 1x1: `matrix` [groups, out, in], `by_in` [groups, in, out], `bias`
    [groups, out]; `mean`, `var` [groups * out] (float64) are the 1x1's statistics, `first`, `second` the moments of its
    input.
    """

    matrix: Tensor
    by_in: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    first: Tensor | None
    second: Tensor | None
    eps: float


def fold(
    weight: Tensor,
    strength: Tensor,
    eps: float,
    found: tuple[Tensor, Tensor] | None,
    given: tuple[Tensor, Tensor] | None,
) -> Folded:
    """Batch normalisation (no scale and shift) after a 1x1 of weight [groups, out, in], times strength [groups].

    Its statistics follow from `found`, the moments of the 1x1's input, or are `given`: running mean and variance
    [groups * out].
    """
    groups, width = weight.shape[:2]
    matrix, by_in = torch.empty_like(weight), torch.empty_like(weight)
    bias = torch.empty(groups, width, dtype=weight.dtype)
    mean, var = torch.empty(2, groups * width, dtype=torch.float64).unbind()
    first, second = found or (None, None)
    given_mean, given_var = given or (None, None)
    function("fold", weight.dtype)(
        *map(pointer, (weight, first, second, given_mean, given_var, strength)),
        ctypes.c_double(eps),
        groups,
        width,
        *map(pointer, (matrix, by_in, bias, mean, var)),
    )
    return Folded(matrix, by_in, bias, mean, var, first, second, eps)


@dataclass
class FoldedGradient:
    """Gradients of what `fold` read, and how its input's own gradient depends on the input: mean + second m."""

    weight: Tensor
    strength: Tensor
    mean: Tensor | None
    second: Tensor | None


def fold_backward(
    folded: Folded, weight: Tensor, strength: Tensor, products: Tensor, sums: Tensor, count: int
) -> FoldedGradient:
    """From the gradients of matrix (`products` [groups, out, in]) and bias (`sums`), float64; `count` pixels."""
    groups, width = weight.shape[:2]
    d_weight = torch.empty_like(weight)
    d_strength = torch.empty(groups, dtype=torch.float64)
    mean = second = None
    if folded.first is not None:
        mean, second = torch.empty_like(folded.bias), torch.empty_like(weight)
    function("fold_backward", weight.dtype)(
        *map(pointer, (weight, folded.first, folded.second, folded.mean, folded.var, strength)),
        ctypes.c_double(folded.eps),
        _INT64(count),
        groups,
        width,
        *map(pointer, (products, sums, d_weight, d_strength, mean, second)),
    )
    return FoldedGradient(d_weight, d_strength, mean, second)


def pointwise(operand: Operand, folded: Folded, out: Tensor | None = None) -> Tensor:
    """bias + matrix m, written to a new tensor or added to `out`."""
    batch, height, width, _ = operand.shape
    add = out is not None
    if out is None:
        out = torch.empty(batch, height, width, operand.groups * operand.width, dtype=operand.dtype)
    source = operand.source()
    function("pointwise", operand.dtype)(
        ctypes.byref(source),
        _INT64(batch),
        _INT64(height * width),
        pointer(folded.by_in),
        pointer(folded.bias),
        int(add),
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def pointwise_sums(operand: Operand, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of g m^T [groups, out, in] and of g [groups * out], float64."""
    batch, height, width, _ = operand.shape
    products = torch.empty(operand.groups, operand.width, operand.width, dtype=torch.float64)
    sums = torch.empty(operand.groups * operand.width, dtype=torch.float64)
    source = operand.source()
    function("pointwise_sums", operand.dtype)(
        ctypes.byref(source),
        pointer(gradient),
        _INT64(batch),
        _INT64(height * width),
        pointer(products),
        pointer(sums),
        torch.get_num_threads(),
    )
    return products, sums


@dataclass
class SeparableGradient:
    """Gradients of a depthwise-separable pair: of the tensor that was encoded [B, H, W, channels as stored], of the
    depthwise weight [channels, taps] and of both operands' probabilities [groups, bits] (None where not asked for).
    """

    image: Tensor
    weight: Tensor | None
    middle_probabilities: Tensor | None
    image_probabilities: Tensor | None


def separable_backward(
    image: Operand,
    window: Window,
    weight: Tensor,
    middle: Operand,
    folded: Folded,
    through: FoldedGradient,
    gradient: Tensor,
    *,
    weights: bool,
    probabilities: bool,
) -> SeparableGradient:
    """Back through 1x1, middle quantiser, depthwise convolution and first quantiser at once, image by image.

    `gradient` is that of the 1x1's (folded) output; `weights`, `probabilities` say which of those gradients are wanted.
    """
    batch = image.shape[0]
    out = torch.empty(image.shape, dtype=image.dtype)
    channels, taps = image.groups * image.width, window.kernel**2
    empty = lambda wanted, *shape: torch.empty(shape, dtype=torch.float64) if wanted else None  # noqa: E731
    d_weight = empty(weights, channels, taps)
    p_middle = empty(probabilities and middle.columns, middle.groups, middle.columns)
    p_image = empty(probabilities and image.columns, image.groups, image.columns)
    middle_source, image_source = middle.source(), image.source()
    function("separable_backward", image.dtype)(
        ctypes.byref(middle_source),
        *map(pointer, (gradient, folded.matrix, through.mean, through.second)),
        ctypes.byref(image_source),
        _INT64(batch),
        window.entry(image),
        *map(pointer, (weight, out, d_weight, p_middle, p_image)),
        torch.get_num_threads(),
    )
    return SeparableGradient(out, d_weight, p_middle, p_image)
