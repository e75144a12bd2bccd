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
from common.quant.shared import Reduction

_INT64 = ctypes.c_int64


class _Strength(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("pitch", ctypes.c_int64)]


class RunningEntry(ctypes.Structure):
    """`Running` as the native entries read it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mean", "var", "batches")),
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        ("training", ctypes.c_int),
    ]


def strengths(tensor: Tensor | None, column: int) -> _Strength:
    """A column of a matrix [groups, primitives] as the native entries read and write it; None: ones."""
    if tensor is None:
        return _Strength(None, 0)
    return _Strength(tensor.data_ptr() + column * tensor.stride(1) * tensor.element_size(), tensor.stride(0))


@dataclass
class Running:
    """Running statistics of a batch normalisation [channels], in the operands' type, and how they move in training."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float
    eps: float
    training: bool

    def entry(self) -> RunningEntry:
        """For the native entries."""
        addresses = (t.data_ptr() for t in (self.mean, self.var, self.batches))
        return RunningEntry(*addresses, self.momentum, self.eps, self.training)


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


@dataclass
class Folded:
    """Normalisation and strength folded into a 1x1, in two flat tensors that the native entries share.

    `values`: matrix [groups, out, in], the same as [groups, in, out], bias [groups, out]. `statistics` (float64): mean
    and variance of the 1x1's output, and its input's first and second moments. `training`: of this batch, not running.
    """

    values: Tensor
    statistics: Tensor
    groups: int
    width: int
    eps: float
    training: bool

    def at(self, position: int) -> ctypes.c_void_p:
        """Address of the matrix (0), its transpose (1) or the bias (2)."""
        square = self.groups * self.width**2
        return ctypes.c_void_p(self.values.data_ptr() + position * square * self.values.element_size())


def normalise(
    operand: Operand,
    weight: Tensor,
    norm: Running,
    strength: Tensor | None,
    column: int = 0,
    reduction: Reduction | None = None,
) -> Folded:
    """A 1x1 of weight [groups, out, in] on `operand`, batch normalisation (no scale and shift) and a strength per group
    (column of strength [groups, primitives]; None: one) as one affine map. In training the running statistics move;
    `reduction`: the statistics are those of all ranks' batches.
    """
    batch, height, width, _ = operand.shape
    channels, square = operand.groups * operand.width, operand.groups * operand.width**2
    values = torch.empty(2 * square + channels, dtype=weight.dtype)
    statistics = torch.empty(3 * channels + square, dtype=torch.float64)
    source, running = operand.source(), norm.entry()
    known = norm.training and reduction is not None
    if known:
        moments = statistics[2 * channels :]
        size = (_INT64(batch), _INT64(height * width))
        function("moments", weight.dtype)(ctypes.byref(source), *size, pointer(moments), torch.get_num_threads())
        moments.copy_(reduction.mean(moments))
    function("normalise", weight.dtype)(
        ctypes.byref(source),
        _INT64(batch),
        _INT64(height * width),
        pointer(weight),
        ctypes.byref(running),
        strengths(strength, column),
        int(known),
        1 if reduction is None else reduction.ranks,
        pointer(values),
        pointer(statistics),
        torch.get_num_threads(),
    )
    return Folded(values, statistics, operand.groups, operand.width, norm.eps, norm.training)


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
        folded.at(1),
        folded.at(2),
        int(add),
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def pointwise_backward(
    operand: Operand,
    folded: Folded,
    weight: Tensor,
    strength: Tensor | None,
    column: int,
    gradient: Tensor,
    strength_gradient: Tensor | None,
    reduction: Reduction | None = None,
) -> tuple[Tensor, Tensor]:
    """Back through the folded 1x1: the gradient of its weight, and `through`, which says how the operand's own gradient
    depends on the operand (by way of the statistics, which all ranks' losses share where there is a `reduction`).
    Writes the strength's gradient into its column.
    """
    batch, height, width, _ = operand.shape
    d_weight = torch.empty_like(weight)
    through = torch.empty(operand.groups * operand.width * (1 + operand.width), dtype=weight.dtype)
    source = operand.source()
    function("pointwise_backward", operand.dtype)(
        ctypes.byref(source),
        pointer(gradient),
        _INT64(batch),
        _INT64(height * width),
        pointer(weight),
        ctypes.c_double(folded.eps),
        int(folded.training),
        strengths(strength, column),
        pointer(folded.statistics),
        pointer(d_weight),
        strengths(strength_gradient, column),
        pointer(through),
        torch.get_num_threads(),
    )
    if folded.training and reduction is not None:
        through = reduction.mean(through)
    return d_weight, through


def separable_backward(
    image: Operand,
    window: Window,
    weight: Tensor,
    middle: Operand,
    folded: Folded,
    through: Tensor,
    gradient: Tensor,
    *,
    weights: bool,
    probabilities: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Back through 1x1, middle quantiser, depthwise convolution and first quantiser at once, image by image.

    `gradient` is that of the 1x1's (folded) output. Returns the gradient of the tensor that was encoded [B, H, W,
    channels as stored] and of the depthwise weight (None unless `weights`); adds that of both operands' probabilities
    to `probabilities` [groups, bits], where given.
    """
    batch = image.shape[0]
    out = torch.empty(image.shape, dtype=image.dtype)
    d_weight = torch.empty_like(weight) if weights else None
    middle_source, image_source = middle.source(), image.source()
    function("separable_backward", image.dtype)(
        ctypes.byref(middle_source),
        pointer(gradient),
        folded.at(0),
        pointer(through),
        int(folded.training),
        ctypes.byref(image_source),
        _INT64(batch),
        window.entry(image),
        *map(pointer, (weight, out, d_weight, probabilities)),
        torch.get_num_threads(),
    )
    return out, d_weight
