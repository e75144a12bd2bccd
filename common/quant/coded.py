# SPDX-License-Identifier: Apache-2.0
"""A convolution of a quantised activation that keeps one byte per element for its backward pass.

Plainly, a quantised convolution saves the quantised activation and the mask of its gradient, and a ReLU before it one
more tensor. Here ReLU, quantiser (or mixture of quantisers) and convolution are one function: it saves codes
(`kernels/levels.py`), from which the backward pass makes values and masks again. Where a quantiser needs its input for
its own gradient (a learned step), the convolution keeps that input and quantises it again: one tensor in place of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.quant import kernels
from common.quant.anchor import anchor
from common.quant.kernels.levels import CODE, INSIDE8, Operand, decode, decode_backward, encode
from common.quant.kernels.separable import Window, depthwise, depthwise_backward
from common.quant.quantizers import LOW_BITS, quantize_activation, straight_through

_KERNELS = (1, 3, 5, 7)  # sizes of the native depthwise convolution
Pair = tuple[int, int]


@dataclass(frozen=True)
class _Layer:
    """What a coded convolution is besides its tensors; `window`: of a depthwise one that the native kernel takes."""

    bits: tuple[int, ...]
    relu: bool
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    window: Window | None = None

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain convolution."""
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def coded_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    bits: tuple[int, ...],
    probabilities: Tensor | None = None,
    maximum: Tensor | None = None,
    relu: bool = False,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv(sum_b p_b Q_b(x), weight) with gradients of any order; x [B, in, H, W] -> [B, out, H', W'].

    Args:
        x: the activation, before the ReLU if `relu` is true.
        weight: [out, in / groups, k, k], quantised or mixed already.
        bits: the bit-widths of x, of HWGQ (1 to 4); 8, unsigned and last, has its range in `maximum` (a scalar).
        probabilities: [1, bits] (or [bits]); where there is one bit-width, None.
        relu: whether x is to pass a ReLU first (its gradient is zero at zero, that of HWGQ is not).
    """
    layer = _Layer(bits, relu, _pair(stride), _pair(padding), _pair(dilation), groups)
    if not codable(x, weight, bits):
        return _plain(x, weight, layer, probabilities, maximum)
    if weight.shape[2:] == (1, 1) and layer.padding == (0, 0) and layer.stride != (1, 1):
        x = x[:, :, :: layer.stride[0], :: layer.stride[1]]  # the other pixels are read by nobody
        layer = replace(layer, stride=(1, 1))
    layer = replace(layer, window=_window(x, weight, layer))
    if probabilities is None:
        probabilities = x.new_ones(1, 1)
    probabilities = probabilities.view(1, -1)
    if not torch.is_grad_enabled():
        return _Coded.forward(None, x, x, weight, probabilities, maximum, layer)
    return _Coded.apply(anchor(x), x.detach(), weight, probabilities, maximum, layer)


def requantized_convolution(
    x: Tensor,
    value: Tensor,
    weight: Tensor,
    again: Callable[[Tensor], Tensor],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv(value, weight) that keeps x, not value, with gradients of any order.

    `again(x)` is value, without gradient: x went through a quantiser that keeps x as well.
    """
    layer = _Layer((), False, _pair(stride), _pair(padding), _pair(dilation), groups)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return layer.convolve(value, weight)
    return _Requantized.apply(anchor(value), value.detach(), x.detach(), weight, again, layer)


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def codable(x: Tensor, weight: Tensor, bits: tuple[int, ...]) -> bool:
    """Whether the native kernels can compute it; elsewhere `coded_convolution` is plain operations."""
    low = bits[:-1] if bits[-1] == 8 else bits
    return all(b in LOW_BITS for b in low) and kernels.usable(x, weight)


def _window(x: Tensor, weight: Tensor, layer: _Layer) -> Window | None:
    """The geometry for the native depthwise convolution, None where it is not one that it takes."""
    kernel, reach = weight.shape[2], layer.dilation[0] * (weight.shape[2] - 1)
    square = all(a == b for a, b in (weight.shape[2:], layer.stride, layer.padding, layer.dilation))
    is_depthwise = layer.groups == x.shape[1] == weight.shape[0] and layer.groups > 1
    if not (square and is_depthwise and kernel in _KERNELS and layer.padding[0] <= reach):
        return None
    return Window(kernel, layer.stride[0], layer.padding[0], layer.dilation[0])


def _plain(x: Tensor, weight: Tensor, layer: _Layer, probabilities: Tensor | None, maximum: Tensor | None) -> Tensor:
    """The twin: ReLU, quantisers, mixture and convolution one after the other."""
    x = F.relu(x) if layer.relu else x
    levels = [quantize_activation(x, b, maximum=maximum if b == 8 else None) for b in layer.bits]
    if probabilities is None:
        return layer.convolve(levels[0], weight)
    weighted = [p * level for p, level in zip(probabilities.reshape(-1), levels, strict=True)]
    return layer.convolve(sum(weighted[1:], start=weighted[0]), weight)


class _Coded(torch.autograd.Function):
    """The convolution; saves codes, weight and probabilities. `anchor` receives x's gradient, of any order."""

    @staticmethod
    def forward(
        ctx, anchor: Tensor, x: Tensor, weight: Tensor, probabilities: Tensor, maximum: Tensor | None, layer: _Layer
    ) -> Tensor:
        operand = encode(_rows(x), layer.bits, maximum, groups=1, relu=layer.relu)
        operand.probabilities = probabilities.detach().contiguous()
        if ctx is not None:
            ctx.save_for_backward(anchor, weight, probabilities, operand.codes, operand.codes8, operand.scale8)
            ctx.layer, ctx.book = layer, operand.book
        if layer.window is not None:
            return _image(depthwise(operand, layer.window, weight.detach().contiguous()))
        return layer.convolve(_image(decode(operand)), weight.detach())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        anchor, weight, probabilities, codes, codes8, scale8 = ctx.saved_tensors
        operand = Operand(1, codes.shape[3], None, codes, codes8, ctx.book, probabilities.detach().contiguous(), scale8)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        if torch.is_grad_enabled():
            found = _differentiable(anchor, weight, probabilities, operand, gradient, ctx.layer, wanted)
        else:
            found = _gradients(operand, weight, gradient, ctx.layer, wanted)
        return found[0], None, found[1], found[2], None, None


class _Requantized(torch.autograd.Function):
    """The convolution of `value`; `place` (its anchor) receives the gradient."""

    @staticmethod
    def forward(
        ctx, place: Tensor, value: Tensor, x: Tensor, weight: Tensor, again: Callable[[Tensor], Tensor], layer: _Layer
    ) -> Tensor:
        ctx.save_for_backward(place, x, weight)
        ctx.again, ctx.layer = again, layer
        return layer.convolve(value, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        place, x, weight = ctx.saved_tensors
        with torch.no_grad():
            value = ctx.again(x)
        if torch.is_grad_enabled():
            value = straight_through(place, value)
        image, weights = _back(gradient, value, weight, ctx.layer, (ctx.needs_input_grad[0], ctx.needs_input_grad[3]))
        return image, None, None, weights, None, None


_Found = tuple[Tensor | None, Tensor | None, Tensor | None]
_Wanted = tuple[bool, bool, bool]


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _image(rows: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], the same memory."""
    return rows.permute(0, 3, 1, 2)


def _gradients(operand: Operand, weight: Tensor, gradient: Tensor, layer: _Layer, wanted: _Wanted) -> _Found:
    """Gradients of x, weight and probabilities, each where it is wanted."""
    if layer.window is not None:
        rows, weights, p = depthwise_backward(
            operand,
            layer.window,
            weight.contiguous(),
            _rows(gradient),
            images=wanted[0],
            weights=wanted[1],
            probabilities=wanted[2],
        )
        weights = None if weights is None else weights.to(weight.dtype).view(weight.shape)
        p = None if p is None else p.to(weight.dtype)
        return None if rows is None else _image(rows), weights, p
    d_image, weights = _back(gradient, _image(decode(operand)), weight, layer, (wanted[0] or wanted[2], wanted[1]))
    if d_image is None:
        return None, weights, None
    d_rows, p = decode_backward(operand, _rows(d_image), wanted[2])
    return _image(d_rows) if wanted[0] else None, weights, p


def _back(
    gradient: Tensor, x: Tensor, weight: Tensor, layer: _Layer, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a plain convolution's input and weight, each where it is wanted."""
    image, weights, _ = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        (0, 0),
        layer.groups,
        (*wanted, False),
    )
    return image, weights


def _differentiable(
    anchor: Tensor,
    weight: Tensor,
    probabilities: Tensor,
    operand: Operand,
    gradient: Tensor,
    layer: _Layer,
    wanted: _Wanted,
) -> _Found:
    """`_gradients` in plain operations, for create_graph."""
    # views of their own: what the anchor itself depends on must not be counted again
    tensors = [tensor.view_as(tensor) for tensor in (anchor, weight, probabilities)]
    place, weight, probabilities = tensors
    assert operand.codes is not None and operand.book is not None
    raw, p = _image(operand.codes).int(), probabilities.reshape(-1)
    code = raw & CODE
    pairs = [(level[code], mask[code]) for level, mask in zip(operand.book.levels, operand.book.masks, strict=True)]
    if operand.codes8 is not None:
        value = _image(operand.codes8).to(place.dtype) * operand.scale8
        pairs.append((value, (raw & INSIDE8) > 0))
    mixed = sum(p[k] * straight_through(place, value, mask) for k, (value, mask) in enumerate(pairs))
    asked = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(layer.convolve(mixed, weight), asked, gradient, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)
