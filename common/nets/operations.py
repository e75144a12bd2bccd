# SPDX-License-Identifier: Apache-2.0
"""Candidate operations of a cell, built from a convolution factory: plain, fixed-bit or mixed-bit.

An operation maps [B, C, H, W] to [B, C, H / stride, W / stride]. OPERATIONS is the registry: put a builder of your own
into it and its name may stand in a genotype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.folding import Fold


class ConvFactory(Protocol):
    """Makes the convolutions of an operation (no bias); what they are quantised to is the factory's affair."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> nn.Conv2d:
        """Build one convolution."""
        ...


NormFactory = Callable[[int], nn.Module]
OperationBuilder = Callable[[ConvFactory, NormFactory, int, int], nn.Module]


def plain_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """The full-precision convolution factory."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)


def fold_relu(x: Tensor, *convolutions: nn.Module) -> tuple[Tensor, dict[str, bool]]:
    """What to give convolutions of relu(x): x itself where all of them take a ReLU into their own function, which then
    keeps less for the backward pass; relu(x) elsewhere.
    """
    if all(getattr(conv, "folds_relu", False) for conv in convolutions):
        return x, {"relu": True}
    return F.relu(x), {}


def relu_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """The convolution of relu(x)."""
    x, more = fold_relu(x, conv)
    return conv(x, **more)


class ReLUConvBN(nn.Module):
    """ReLU, convolution, batch normalisation."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(c_in, c_out, 1), norm(c_out)

    def convolutions(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [self.conv]

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.conv], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H, W]."""
        return self.bn(relu_conv(self.conv, x))


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the stride is the first one's."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.depthwise1 = conv(channels, channels, kernel, stride=stride, padding=pad, groups=channels)
        self.pointwise1, self.bn1 = conv(channels, channels, 1), norm(channels)
        self.depthwise2 = conv(channels, channels, kernel, padding=pad, groups=channels)
        self.pointwise2, self.bn2 = conv(channels, channels, 1), norm(channels)

    def convolutions(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [self.depthwise1, self.pointwise1, self.depthwise2, self.pointwise2]

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.pointwise1], self.bn1), ([self.pointwise2], self.bn2)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        x = self.bn1(self.pointwise1(relu_conv(self.depthwise1, x)))
        return self.bn2(self.pointwise2(relu_conv(self.depthwise2, x)))


class DilConv(nn.Module):
    """Depthwise-separable convolution of dilation 2."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv(
            channels, channels, kernel, stride=stride, padding=kernel - 1, dilation=2, groups=channels
        )
        self.pointwise, self.bn = conv(channels, channels, 1), norm(channels)

    def convolutions(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [self.depthwise, self.pointwise]

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.pointwise], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        return self.bn(self.pointwise(relu_conv(self.depthwise, x)))


class FactorizedReduce(nn.Module):
    """Halve the resolution by two 1x1 convolutions of stride 2, the second shifted by one pixel, side by side."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out // 2, 1, stride=2)
        self.conv2 = conv(c_in, c_out - c_out // 2, 1, stride=2)
        self.bn = norm(c_out)

    def convolutions(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [self.conv1, self.conv2]

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.conv1, self.conv2], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2], H and W even."""
        x, more = fold_relu(x, self.conv1, self.conv2)
        return self.bn(torch.cat([self.conv1(x, **more), self.conv2(x[:, :, 1:, 1:], **more)], 1))


class FactorizedConv7(nn.Module):
    """1x7 then 7x1 convolution (NASNet); each carries the stride of its own axis."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3))
        self.conv2 = conv(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0))
        self.bn = norm(channels)

    def convolutions(self) -> list[nn.Conv2d]:
        """Its convolutions, in order."""
        return [self.conv1, self.conv2]

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.conv2], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        return self.bn(self.conv2(relu_conv(self.conv1, x)))


def _skip(conv: ConvFactory, norm: NormFactory, channels: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(conv, norm, channels, channels)


def _max_pool(conv: ConvFactory, norm: NormFactory, channels: int, stride: int) -> nn.Module:
    return nn.MaxPool2d(3, stride, 1)


def _avg_pool(conv: ConvFactory, norm: NormFactory, channels: int, stride: int) -> nn.Module:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def _separable(kernel: int) -> OperationBuilder:
    return lambda conv, norm, channels, stride: SepConv(conv, norm, channels, kernel, stride)


def _dilated(kernel: int) -> OperationBuilder:
    return lambda conv, norm, channels, stride: DilConv(conv, norm, channels, kernel, stride)


OPERATIONS: dict[str, OperationBuilder] = {
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _avg_pool,
    "skip_connect": _skip,
    "sep_conv_3x3": _separable(3),
    "sep_conv_5x5": _separable(5),
    "sep_conv_7x7": _separable(7),
    "dil_conv_3x3": _dilated(3),
    "dil_conv_5x5": _dilated(5),
    "conv_7x1_1x7": lambda conv, norm, channels, stride: FactorizedConv7(conv, norm, channels, stride),
}
"""Builders (conv, norm, channels, stride) -> module, by primitive."""


def preprocess(conv: ConvFactory, norm: NormFactory, c_in: int, c_out: int, halve: bool) -> nn.Module:
    """A cell's input operation: to c_out channels, at half the resolution when `halve`."""
    return (FactorizedReduce if halve else ReLUConvBN)(conv, norm, c_in, c_out)


Shard = tuple[int, int]
"""(rank, ranks): which part of a batch that several processes share."""


def drop_path(x: Tensor, probability: float | Tensor, shard: Shard = (0, 1)) -> Tensor:
    """Zero whole samples of x [B, ...] with `probability`, scale the rest to keep the mean (Larsson et al., 2017).

    Of several ranks each draws for all of them and takes its own part: together they drop what one process drops, and
    their generators stay alike.
    """
    keep, (rank, ranks), count = 1.0 - probability, shard, x.shape[0]
    mask = torch.empty(count * ranks, *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * (mask[rank * count : (rank + 1) * count] / keep)
