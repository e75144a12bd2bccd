# SPDX-License-Identifier: Apache-2.0
"""Quantisers with fixed levels in [-1, 1]: binary, ternary and k bits, as quantised neural networks use them.

Weights and activations share their levels, no scale is learned or measured, and negative values are kept. Sources: the
binary forms are those of Courbariaux, Hubara et al. (BinaryNet, NIPS 2016; QNN, JMLR 2018), stochastic rounding
included; ternary rounds at 0.5; k bits are the two's complement numbers -m ... m - 1 over m = 2^(k-1).

Ties, which the oracle settles: a binary zero is -1, and ternary 0.5 is 0 while -0.5 is -1. Straight-through bounds are
inclusive, written out as everywhere (quantizers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common.quant.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    ZERO,
    check_bits,
    straight_through,
)

KBITS = tuple(range(1, 9))
TERNARY_BITS = 2
"""What a ternary value takes in memory."""


def _mark_non_finite(value: Tensor, x: Tensor) -> None:
    """Make the value NaN where x is not finite: a comparison would give a level, and hide what went wrong."""
    value.add_(x, alpha=0)


def binary(x: Tensor) -> Tensor:
    """+1 where x > 0, else -1; gradient 1 on [-1, 1]."""
    with torch.no_grad():
        value, mask = torch.where(x > ZERO, 1.0, -1.0).to(x.dtype), x.abs() <= 1
        _mark_non_finite(value, x)
    return straight_through(x, value, mask)


def stochastic_binary(x: Tensor, uniform: Tensor | None = None) -> Tensor:
    """+1 with probability clip((x + 1) / 2, 0, 1), else -1; gradient 1 everywhere, as in the authors' Torch code.

    `uniform`: numbers in [0, 1) of x's shape that decide (default: drawn from torch's generator).
    """
    with torch.no_grad():
        uniform = torch.rand_like(x) if uniform is None else uniform
        value = torch.where(uniform < (x + 1) / 2, 1.0, -1.0).to(x.dtype)
        _mark_non_finite(value, x)
    return straight_through(x, value)


def ternary(x: Tensor, *, bounded: bool) -> Tensor:
    """+1 above 0.5, -1 from -0.5 down, 0 between; gradient 1 everywhere, or on [-1, 1] alone where `bounded`.

    Activations are bounded, weights are not.
    """
    with torch.no_grad():
        value = (x > 0.5).to(x.dtype) - (x <= -0.5).to(x.dtype)
        mask = x.abs() <= 1 if bounded else None
        _mark_non_finite(value, x)
    return straight_through(x, value, mask)


def kbit(x: Tensor, bits: int) -> Tensor:
    """clip(round(x m), -m, m - 1) / m with m = 2^(bits - 1); gradient 1 where rounding stays within the levels.

    Raises ValueError for a number of bits other than 1 to 8.
    """
    m = 2 ** (check_bits(bits, KBITS) - 1)
    with torch.no_grad():
        level = (x * m).round_()
        mask = (level >= -m) & (level <= m - 1)
        value = level.clamp_(-m, m - 1).div_(m)
    return straight_through(x, value, mask)


def kbit_relu(x: Tensor, bits: int) -> Tensor:
    """The half of k bits that is not negative: clip(2 round(h 2^bits) / 2^bits - 1, 0, 1 - 2^(1-bits)), where
    h = clip((x + 1) / 2, 0, 1); gradient 1 where neither clip cuts, bounds inclusive. Raises ValueError as `kbit`.
    """
    levels = 2 ** check_bits(bits, KBITS)
    with torch.no_grad():
        level = ((x / 2 + 0.5).clamp(0, 1) * levels).round_().mul_(2 / levels).sub_(1)
        top = 1 - 2 / levels
        mask = (x.abs() <= 1) & (level >= 0) & (level <= top)
        value = level.clamp_(0, top)
    return straight_through(x, value, mask)


class DiscreteQuantizer(nn.Module):
    """One of the functions above at a fixed number of bits, as a module on tensors."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], bits: int) -> None:
        super().__init__()
        self.name, self.function, self.bits = name, function, bits

    def forward(self, x: Tensor) -> Tensor:
        """Quantise x, of any shape."""
        return self.function(x)

    def extra_repr(self) -> str:
        return f"{self.name}, bits={self.bits}"


class StochasticBinary(nn.Module):
    """Stochastic rounding in training, the sign in evaluation."""

    bits = 1

    def forward(self, x: Tensor) -> Tensor:
        """Quantise x, of any shape."""
        return stochastic_binary(x) if self.training else binary(x)


def _only(name: str, bits: int, wanted: int) -> int:
    if bits != wanted:
        raise ValueError(f"quantizer: {name} has {wanted} bit{'s' * (wanted > 1)}, not {bits}")
    return bits


def _make_binary(bits: int, *, scheme: str = "default", signed: bool = True) -> nn.Module:
    return DiscreteQuantizer("binary", binary, _only("binary", bits, 1))


def _make_stochastic(bits: int, *, scheme: str = "default", signed: bool = True) -> nn.Module:
    _only("stochastic", bits, 1)
    return StochasticBinary()


def _make_ternary(bounded: bool) -> Callable[..., nn.Module]:
    def make(bits: int, *, scheme: str = "default", signed: bool = True) -> nn.Module:
        _only("ternary", bits, TERNARY_BITS)
        return DiscreteQuantizer("ternary", partial(ternary, bounded=bounded), bits)

    return make


def _make_kbit(bits: int, *, scheme: str = "default", signed: bool = True) -> nn.Module:
    check_bits(bits, KBITS)
    return DiscreteQuantizer("kbit", partial(kbit, bits=bits), bits)


def _make_kbit_relu(bits: int, *, scheme: str = "default", signed: bool = False) -> nn.Module:
    check_bits(bits, KBITS)
    return DiscreteQuantizer("kbit-relu", partial(kbit_relu, bits=bits), bits)


for _registry in (WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS):
    _registry |= {"binary": _make_binary, "stochastic": _make_stochastic, "kbit": _make_kbit}
WEIGHT_QUANTIZERS["ternary"] = _make_ternary(bounded=False)
ACTIVATION_QUANTIZERS["ternary"] = _make_ternary(bounded=True)
ACTIVATION_QUANTIZERS["kbit-relu"] = _make_kbit_relu
