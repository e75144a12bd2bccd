# SPDX-License-Identifier: Apache-2.0
"""Convolutions and linear layers whose operands are fake-quantised: at fixed bits, or at bits under search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant import kernels
from common.quant.coded import codable, coded_convolution, requantized_convolution
from common.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    FLOAT_BITS,
    LOW_BITS,
    WEIGHT_QUANTIZERS,
    ZERO,
    ActivationQuantizer,
    LsqQuantizer,
    RunningMaximum,
    hwgq_bound,
    hwgq_level,
    hwgq_mask,
    make_quantizer,
    quantize_activation,
    quantize_weight,
    reference8,
)
from common.quant.shared import Reduction


def attach_quantizers(
    layer: nn.Module,
    weight_bits: int,
    activation_bits: int,
    weight_quantizer: str,
    activation_quantizer: str,
    scheme: str,
    signed: bool,
) -> None:
    """Give a layer its bits and the two quantisers of its operands.

    A `signed` input (an image, the classifier's) keeps its negatives: on a symmetric grid, or on LSQ's signed one.
    """
    layer.weight_bits, layer.activation_bits = weight_bits, activation_bits  # each quantiser knows which it has
    layer.signed_input = signed
    layer.quantize_weight = make_quantizer(WEIGHT_QUANTIZERS, weight_quantizer, weight_bits, scheme=scheme)
    layer.quantize_activation = make_quantizer(
        ACTIVATION_QUANTIZERS, activation_quantizer, activation_bits, scheme=scheme, signed=signed
    )


class QuantConv2d(nn.Conv2d):
    """A convolution of fixed weight and activation bits; 32 means full precision. The weight is kept in float."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        weight_bits: int = FLOAT_BITS,
        activation_bits: int = FLOAT_BITS,
        weight_quantizer: str = "gaussian",
        activation_quantizer: str = "hwgq",
        scheme: str = "default",
        signed: bool = False,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        attach_quantizers(self, weight_bits, activation_bits, weight_quantizer, activation_quantizer, scheme, signed)

    @property
    def folds_relu(self) -> bool:
        """Whether a ReLU before it is better left to `forward`: where quantiser and convolution are one function."""
        quantizer = self.quantize_activation
        if type(quantizer) is not ActivationQuantizer or quantizer.signed:
            return False
        return quantizer.bits in LOW_BITS or (quantizer.bits == 8 and quantizer.scheme == "default")

    def padder(self) -> Callable[[Tensor], Tensor] | None:
        """What puts zeros around the quantised input where `padding` does not say it all; None elsewhere."""
        return None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W']; `relu`: of max(x, 0)."""
        weight, quantizer = self.quantize_weight(self.weight), self.quantize_activation
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if self.folds_relu:
            maximum = quantizer.range(x) if quantizer.range is not None else None
            out = coded_convolution(x, weight, bits=(quantizer.bits,), maximum=maximum, relu=relu, **geometry)
        else:
            x = F.relu(x) if relu else x
            dense = _overwrites_memory(self, x)
            if dense:
                x, weight = x.contiguous(), weight.flatten().view(weight.shape)
            value = quantizer(x)
            if type(quantizer) is LsqQuantizer:
                out = requantized_convolution(x, value, weight, quantizer.quantize, **geometry)
            else:
                out = F.conv2d(value, weight, None, **geometry)
            out = out.contiguous(memory_format=torch.channels_last) if dense else out
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


def _overwrites_memory(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether x and the weight must leave their dense channels for this convolution.

    oneDNN's weight gradient of a strided 1x1 convolution of fewer than 16 dense input channels writes outside of its
    memory and so ends the process (torch 2.15, AVX-512, maps of 48 pixels and more).
    """
    narrow = conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < 16
    return narrow and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


class QuantLinear(nn.Linear):
    """A linear layer of fixed weight and activation bits; 32 means full precision."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int = FLOAT_BITS,
        activation_bits: int = FLOAT_BITS,
        weight_quantizer: str = "gaussian",
        activation_quantizer: str = "hwgq",
        scheme: str = "default",
        signed: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        attach_quantizers(self, weight_bits, activation_bits, weight_quantizer, activation_quantizer, scheme, signed)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in] -> [B, out]."""
        return F.linear(self.quantize_activation(x), self.quantize_weight(self.weight), self.bias)


class _MixedHwgq(torch.autograd.Function):
    """sum_b p_b Q_b(x) for HWGQ bit-widths. Saves x and p alone; the backward quantises again.

    x [N, c] shared by all groups, or [N, groups * c]; p [groups, bits] -> [N, groups * c]. Rows are pixels, so that
    every product runs along dense channels; the shared form is one matrix product with a matrix that spreads each
    level over the groups. Under create_graph the backward is the plain expression, to be differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: Tensor, channels: int, bits: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, p)
        ctx.channels, ctx.bits = channels, bits
        p = p.to(x.dtype)  # under autocast x is bfloat16 and the logits are not
        if _is_shared(x, p, channels):
            return torch.cat(_values(x, bits), 1) @ _spread(p, channels)
        mixed: Tensor | None = None
        for value, weight in zip(_values(x, bits), p.t().repeat_interleave(channels, 1), strict=True):
            mixed = value.mul_(weight) if mixed is None else mixed.addcmul_(value, weight)
        assert mixed is not None
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, p = ctx.saved_tensors
        channels, bits = ctx.channels, ctx.bits
        gradient, p = gradient.to(x.dtype), p.to(x.dtype)
        twice = torch.is_grad_enabled()
        values = [quantize_activation(x, b) for b in bits] if twice else _values(x, bits)
        if _is_shared(x, p, channels):
            per_level = (gradient @ _spread(p, channels).t()).split(channels, 1)
            parts = [torch.where(hwgq_mask(x, b), g, 0.0) for b, g in zip(bits, per_level, strict=True)]
            outer = (torch.cat(values, 1).t() @ gradient).view(len(bits), channels, p.shape[0], channels)
            return sum(parts[1:], start=parts[0]), outer.diagonal(dim1=1, dim2=3).sum(-1).t(), None, None
        p_gradient = torch.stack([(gradient * value).sum(0).view(-1, channels).sum(1) for value in values], 1)
        factor: Tensor | float = 0.0
        passed = p.flip(1).cumsum(1).flip(1) if list(bits) == sorted(bits) else None
        for position in reversed(range(len(bits))):
            if passed is None:  # bit-widths out of order: their ranges do not nest by position
                weight = p[:, position].repeat_interleave(channels)
                factor = factor + torch.where(hwgq_mask(x, bits[position]), weight, 0.0)
            else:  # fewer bits reach less far: below a range's end, it and all wider ones pass
                factor = torch.where(
                    x <= hwgq_bound(bits[position]), passed[:, position].repeat_interleave(channels), factor
                )
        if passed is not None:
            factor = torch.where(x > -ZERO, factor, 0.0)
        return gradient * factor, p_gradient, None, None


def _gpu_kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels where they can take x; None elsewhere: the twin is what torch.compile fuses by itself."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    return kernels.triton_kernels()


def _is_shared(x: Tensor, p: Tensor, channels: int) -> bool:
    return x.shape[1] == channels and p.shape[0] > 1


def _values(x: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
    """HWGQ of x at every bit-width, without gradient."""
    levels = (hwgq_level(x, b) for b in bits)
    return [codes.mul_(step) for codes, step in levels]


def _spread(p: Tensor, channels: int) -> Tensor:
    """[bits * c, groups * c]: level b of channel k goes to channel k of group g with weight p[g, b]."""
    eye = torch.eye(channels, dtype=p.dtype, device=p.device)
    return (p.t()[:, None, :, None] * eye[None, :, None, :]).reshape(p.shape[1] * channels, -1)


class MixedActivation(nn.Module):
    """The mixture sum_b p_b Q_b(x) of an activation tensor over the bit-widths under search.

    `groups` tensors may stand side by side on the channels, each with its own probabilities and its own 8-bit range.
    `signed_activations` keeps the negatives at 8 bits, so that a range of |x| is tracked.
    """

    def __init__(
        self, bits: tuple[int, ...], *, groups: int = 1, scheme: str = "default", signed_activations: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.groups, self.scheme, self.signed = bits, groups, scheme, signed_activations
        self.range = RunningMaximum(groups, signed_activations) if 8 in bits and scheme == "default" else None
        self.range_reduction: Reduction | None = None  # of a scale by the batch alone

        self.fused = all(b in LOW_BITS for b in bits)
        # codes know the low bit-widths, and 8 bits without sign after them
        low = bits[:-1] if bits[-1] == 8 else bits
        self.coded = scheme == "default" and not signed_activations and all(b in LOW_BITS for b in low)

    def levels(self, x: Tensor, maximum: Tensor | None = None) -> list[Tensor]:
        """What `mix_levels` takes: Q_b(x) for every bit-width b, each of x's shape [B, groups * c, H, W]; or x itself
        where quantising and mixing are one function. `maximum`: the range of 8 bits, where it is known already.
        """
        if self.fused:
            return [x]
        if maximum is None and self.range is not None:
            maximum = self.range(x)
        return [self._level(x, b, maximum) for b in self.bits]

    def _level(self, x: Tensor, bits: int, maximum: Tensor | None) -> Tensor:
        if bits == 8 and self.scheme == "reference":
            return reference8(x, (0, 2, 3), self.groups, self.range_reduction if self.training else None)
        return quantize_activation(x, bits, maximum=maximum if bits == 8 else None, signed=self.signed and bits == 8)

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """x [B, groups * c, H, W], probabilities [groups, bits] -> the mixture, of x's shape."""
        return mix_levels(self.levels(x), probabilities, x.shape[1] // self.groups, self.bits)


def mix_levels(levels: list[Tensor], probabilities: Tensor, channels: int, bits: tuple[int, ...]) -> Tensor:
    """The mixture of what MixedActivation.levels returned, with probabilities [groups, bits]; see `mix`."""
    if len(levels) == 1 and all(b in LOW_BITS for b in bits):
        x = levels[0]
        batch, _, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        gpu = _gpu_kernels(pixels)
        mixed = (gpu.mixed if gpu else _MixedHwgq.apply)(pixels, probabilities, channels, bits)
        return mixed.view(batch, height, width, -1).permute(0, 3, 1, 2)
    return mix(levels, probabilities, channels)


def mix(levels: list[Tensor], probabilities: Tensor, channels: int) -> Tensor:
    """Mix quantised tensors [B, n * c, H, W] (n = groups, or 1: shared by all) with probabilities [groups, bits].

    Returns [B, groups * c, H, W], c = `channels`: group g is sum_b probabilities[g, b] levels[b].
    """
    weights = probabilities.unsqueeze(1).expand(-1, channels, -1).reshape(-1, probabilities.shape[1])
    shared = levels[0].shape[1] == channels and probabilities.shape[0] > 1
    mixed: Tensor | None = None
    for position, level in enumerate(levels):
        p = weights[:, position].view(1, -1, 1, 1)
        if shared:
            batch, _, height, width = level.shape
            level = level.unsqueeze(1).expand(-1, probabilities.shape[0], -1, -1, -1).reshape(batch, -1, height, width)
        mixed = level * p if mixed is None else torch.addcmul(mixed, level, p)
    assert mixed is not None
    return mixed


def mix_weights(weights: Tensor, probabilities: Tensor, bits: tuple[int, ...], scheme: str = "default") -> Tensor:
    """sum_b p_b Q_b(w) for a stack of weights [n, out, in / groups, k, k] and probabilities [n, bits]."""
    name = "reference" if scheme == "reference" else "gaussian"
    shape = (-1, *(1,) * (weights.dim() - 1))
    mixed: Tensor | None = None
    for position, b in enumerate(bits):
        level, p = quantize_weight(weights, b, name, stacked=True), probabilities[:, position].reshape(shape)
        mixed = level * p if mixed is None else torch.addcmul(mixed, level, p)
    assert mixed is not None
    return mixed


class MixedQuantConv2d(nn.Conv2d):
    """A convolution whose weight bits and activation bits are under search (nablaQDARTS, EdMIPS): one convolution of
    the mixed weight with the mixed activation, the latent weight shared by all bit-widths.

    Called by itself it quantises both operands; a supernet's cell reads its weight and computes many at once.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bits: tuple[int, ...],
        scheme: str = "default",
        signed_activations: bool = False,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        executed: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bits, self.scheme = bits, scheme
        self.mix_activation = (
            MixedActivation(bits, scheme=scheme, signed_activations=signed_activations) if executed else None
        )

    @property
    def folds_relu(self) -> bool:
        """Whether a ReLU before it is better left to `forward`: where quantisers and convolution are one function."""
        return self.mix_activation is not None and self.mix_activation.coded

    def forward(
        self, x: Tensor, activation_probabilities: Tensor, weight_probabilities: Tensor, relu: bool = False
    ) -> Tensor:
        """x [B, in, H, W], probabilities [bits] each -> [B, out, H', W']; `relu`: of max(x, 0)."""
        levels, p = self.mix_activation, activation_probabilities.unsqueeze(0)
        assert levels is not None, "this convolution is computed by its cell"
        weight = mix_weights(self.weight.unsqueeze(0), weight_probabilities.unsqueeze(0), self.bits, self.scheme)
        weight = weight.squeeze(0)
        if not (levels.coded and codable(x, weight, self.bits)):
            return self._conv_forward(levels(F.relu(x) if relu else x, p), weight, None)
        return coded_convolution(
            x,
            weight,
            bits=self.bits,
            probabilities=p,
            maximum=levels.range(x) if levels.range is not None else None,
            relu=relu,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


@contextmanager
def frozen_ranges(module: nn.Module) -> Iterator[None]:
    """Within it, forwards leave every running range of `module` untouched (architecture step, second-order passes)."""
    ranges = [(m, m.frozen) for m in module.modules() if isinstance(m, RunningMaximum)]
    for one, _ in ranges:
        one.frozen = True
    try:
        yield
    finally:
        for one, before in ranges:
            one.frozen = before


def step_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The learned steps (LSQ) of a module: weight parameters that take no weight decay."""
    return [m.step for m in module.modules() if isinstance(m, LsqQuantizer)]
