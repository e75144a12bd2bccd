# SPDX-License-Identifier: Apache-2.0
"""Convolutions and linear layers whose operands are fake-quantised: at fixed bits, or at bits under search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    FLOAT_BITS,
    WEIGHT_QUANTIZERS,
    LsqQuantizer,
    RunningMaximum,
    check_bits,
    make_quantizer,
    quantize_activation,
    quantize_weight,
)


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

    A `signed` input (an image, the classifier's) is quantised on a symmetric grid, whatever the activation quantiser.
    """
    layer.weight_bits, layer.activation_bits = check_bits(weight_bits), check_bits(activation_bits)
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

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W']."""
        return self._conv_forward(self.quantize_activation(x), self.quantize_weight(self.weight), self.bias)


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

    def levels(self, x: Tensor) -> list[Tensor]:
        """Q_b(x) for every bit-width b, each of x's shape [B, groups * c, H, W]."""
        maximum = self.range(x) if self.range is not None else None
        scheme = "reference" if self.scheme == "reference" else "hwgq"
        return [
            quantize_activation(x, b, scheme, maximum if b == 8 else None, self.signed and b == 8 and maximum is not None)
            for b in self.bits
        ]

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """x [B, groups * c, H, W], probabilities [groups, bits] -> the mixture, of x's shape."""
        return mix(self.levels(x), probabilities, x.shape[1] // self.groups)


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

    def forward(self, x: Tensor, activation_probabilities: Tensor, weight_probabilities: Tensor) -> Tensor:
        """x [B, in, H, W], probabilities [bits] each -> [B, out, H', W']."""
        assert self.mix_activation is not None, "this convolution is computed by its cell"
        mixed = self.mix_activation(x, activation_probabilities.unsqueeze(0))
        weight = mix_weights(self.weight.unsqueeze(0), weight_probabilities.unsqueeze(0), self.bits, self.scheme)
        return self._conv_forward(mixed, weight.squeeze(0), None)


@contextmanager
def frozen_ranges(module: nn.Module) -> Iterator[None]:
    """Within it, forwards leave every running range of `module` untouched (architecture step, second-order passes)."""
    ranges = [m for m in module.modules() if isinstance(m, RunningMaximum)]
    for one in ranges:
        one.frozen = True
    try:
        yield
    finally:
        for one in ranges:
            one.frozen = False


def step_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The learned steps (LSQ) of a module: weight parameters that take no weight decay."""
    return [m.step for m in module.modules() if isinstance(m, LsqQuantizer)]
