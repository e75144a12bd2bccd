# SPDX-License-Identifier: Apache-2.0
"""The parts of networks from the micro space: layer types, convolutions, reductions, the auxiliary head.

The order is always activation quantiser, convolution of the quantised weight, normalisation. Padding follows the
source's framework ("SAME": the output has ceil(size / stride) pixels, an odd row or column of padding lies at the
bottom and right, averages leave padding out), since the order in which values meet decides the results there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant import FLOAT_BITS, KBITS, TERNARY_BITS, QuantConv2d
from common.quant.folding import Fold
from common.quant.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

EPSILON = 1e-6
"""Of every normalisation but those of shared separable convolutions."""
SHARED_EPSILON = 1e-5

NormFactory = Callable[[int], nn.Module]


def moving_norm(channels: int) -> nn.BatchNorm2d:
    """Normalisation that keeps moving averages for evaluation (decay 0.9)."""
    return nn.BatchNorm2d(channels, eps=EPSILON, momentum=0.1)


def batch_norm(channels: int, eps: float = EPSILON) -> nn.BatchNorm2d:
    """Normalisation by the batch's own statistics, in evaluation too: those of shared weights fit no architecture."""
    return nn.BatchNorm2d(channels, eps=eps, track_running_stats=False)


# ------------------------------------------------------------------------------------------------------ layer types

_TYPES = {"binary": 1, "stochastic": 1, "ternary": TERNARY_BITS, "float": FLOAT_BITS}
LAYER_TYPES = (*_TYPES, *(f"kbit{bits}" for bits in KBITS))


@dataclass(frozen=True)
class LayerType:
    """What a layer's convolutions compute with: the quantiser of weights and activations, and its bits."""

    quantizer: str
    bits: int

    @staticmethod
    def parse(text: str) -> LayerType:
        """`binary`, `stochastic`, `ternary`, `float`, `kbit4`; also `4`, `4bit`, and `32` for float.

        Raises ValueError that lists the types.
        """
        word = text.strip().lower()
        if word in _TYPES:
            return LayerType(word, _TYPES[word])
        found = re.fullmatch(r"(?:kbit)?-?(\d+)(?:-?bits?)?", word)
        if found and int(found[1]) == FLOAT_BITS:
            return LayerType("float", FLOAT_BITS)
        if found and int(found[1]) in KBITS:
            return LayerType("kbit", int(found[1]))
        raise ValueError(f"layer type {text!r} is unknown; choose among {', '.join(LAYER_TYPES)}")

    def __str__(self) -> str:
        return f"kbit{self.bits}" if self.quantizer == "kbit" else self.quantizer

    def accumulator_bits(self, terms: int) -> int:
        """Bits of a sum of `terms` products of two values of this type, which are integers over a power of two."""
        if self.bits == FLOAT_BITS:
            return FLOAT_BITS
        largest = 4 ** (self.bits - 1) if self.quantizer == "kbit" else 1
        return math.ceil(math.log2(2 * terms * largest + 1))

    def activation(self) -> nn.Module:
        """The quantiser of an activation: the only non-linearity of these networks, so that of `float` is a ReLU."""
        if self.bits == FLOAT_BITS:
            return nn.ReLU()
        return make_quantizer(ACTIVATION_QUANTIZERS, self.quantizer, self.bits)

    def conv(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        quantize_input: bool = True,
        input_bits: int = FLOAT_BITS,
    ) -> SameConv2d:
        """A convolution of this type. Without `quantize_input` it takes its input as it is, of `input_bits` bits."""
        conv = SameConv2d(c_in, c_out, kernel, stride=stride, groups=groups)
        conv.weight_bits, conv.activation_bits = self.bits, self.bits if quantize_input else input_bits
        if self.bits != FLOAT_BITS:
            conv.quantize_weight = make_quantizer(WEIGHT_QUANTIZERS, self.quantizer, self.bits)
        if quantize_input:
            conv.quantize_activation = self.activation()
        return conv


FLOAT = LayerType("float", FLOAT_BITS)
TERNARY = LayerType("ternary", TERNARY_BITS)
FOUR_BITS = LayerType("kbit", 4)


def default_layer_types(layers: int) -> list[LayerType]:
    """The source's assignment for stem and `layers` cells: 4 bits in the stem and the first cell, ternary after it."""
    return [FOUR_BITS, FOUR_BITS, *[TERNARY] * (layers - 1)]


def types_fit(names: Sequence[str], layers: int) -> bool:
    """Whether the types suit a network of `layers` cells: one for all, or the stem's and one for each cell."""
    return len(names) in (1, layers + 1)


def resolve_layer_types(names: list[str] | None, layers: int) -> list[LayerType]:
    """The types of the stem and of `layers` cells: None is the default, one name is for all, else one for each.

    Raises ValueError (--layer-bits) for an unknown name or another number of them.
    """
    if not names:
        return default_layer_types(layers)
    try:
        types = [LayerType.parse(name) for name in names]
    except ValueError as error:
        raise ValueError(f"--layer-bits: {error}") from None
    if not types_fit(names, layers):
        raise ValueError(
            f"--layer-bits: {len(types)} types were given; give one for all, or {layers + 1}: the stem's and one for "
            f"each of {layers} cells"
        )
    return types * (layers + 1) if len(types) == 1 else types


# ------------------------------------------------------------------------------------------------------ convolutions


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Rows of padding (before, after) for ceil(size / stride) outputs; the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    top, bottom = same_padding(x.shape[2], kernel, stride)
    left, right = same_padding(x.shape[3], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value) if top + bottom + left + right else x


class SameConv2d(QuantConv2d):
    """A quantised convolution with "SAME" padding, by zeros, of the quantised input.

    `gradient_scale` multiplies the gradient of its weight (the source's learning-rate multiplier).
    """

    gradient_scale = 1.0

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if kernel % 2 and stride == 1 else 0
        super().__init__(c_in, c_out, kernel, stride=stride, padding=padding, groups=groups)
        self.pads = kernel > 1 and not padding

    def padder(self) -> Callable[[Tensor], Tensor] | None:
        """ "SAME" padding where it is not the same on both sides."""
        return partial(_pad_same, kernel=self.kernel_size[0], stride=self.stride[0]) if self.pads else None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """x [B, c_in, H, W] -> [B, c_out, ceil(H / stride), ceil(W / stride)]."""
        value = self.quantize_activation(F.relu(x) if relu else x)
        if self.pads:
            value = _pad_same(value, self.kernel_size[0], self.stride[0])
        return self._conv_forward(value, self.scaled_weight(), None)

    def scaled_weight(self) -> Tensor:
        """The quantised weight, whose gradient is `gradient_scale` times its own."""
        weight = self.quantize_weight(self.weight)
        if self.gradient_scale != 1.0 and weight.requires_grad:
            weight = weight.view_as(weight)  # a node of its own, also where nothing is quantised
            weight.register_hook(partial(torch.mul, other=self.gradient_scale))
        return weight


def average_pool(x: Tensor, kernel: int = 3, stride: int = 1) -> Tensor:
    """Average of each window, padding left out."""
    sides = {same_padding(size, kernel, stride) for size in x.shape[2:]}
    if all(before == after for before, after in sides) and len(sides) == 1:
        return F.avg_pool2d(x, kernel, stride, next(iter(sides))[0], count_include_pad=False)
    total = F.avg_pool2d(_pad_same(x, kernel, stride), kernel, stride, divisor_override=1)
    one = torch.ones_like(x[:1, :1])
    return total / F.avg_pool2d(_pad_same(one, kernel, stride), kernel, stride, divisor_override=1)


def max_pool(x: Tensor, stride: int = 1) -> Tensor:
    """Maximum of each 3x3 window."""
    if stride == 1:
        return F.max_pool2d(x, 3, 1, 1)
    return F.max_pool2d(_pad_same(x, 3, stride, -math.inf), 3, stride)


class Pool(nn.Module):
    """3x3 pooling, "avg" or "max"."""

    def __init__(self, kind: str, stride: int) -> None:
        super().__init__()
        self.kind, self.stride = kind, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        return average_pool(x, 3, self.stride) if self.kind == "avg" else max_pool(x, self.stride)

    def extra_repr(self) -> str:
        return f"{self.kind}, stride={self.stride}"


class ConvNorm(nn.Module):
    """Activation quantiser, 1x1 convolution, normalisation."""

    def __init__(self, kind: LayerType, norm: NormFactory, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = kind.conv(c_in, c_out), norm(c_out)

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.conv], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H, W]."""
        return self.bn(self.conv(x))


class FactorizedReduction(nn.Module):
    """Half the resolution: 1x1 convolutions of the even and of the odd pixels, each to half of the channels.

    `quantize_input` says whether it begins with the activation quantiser. Maps must have even sides.
    """

    def __init__(self, kind: LayerType, norm: NormFactory, c_in: int, c_out: int, *, quantize_input: bool) -> None:
        super().__init__()
        self.even = kind.conv(c_in, c_out // 2, quantize_input=quantize_input)
        self.odd = kind.conv(c_in, c_out // 2, quantize_input=quantize_input)
        self.bn = norm(c_out)

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.even, self.odd], self.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2]."""
        return self.bn(torch.cat([self.even(x[:, :, ::2, ::2]), self.odd(x[:, :, 1::2, 1::2])], 1))


class SeparableConv(nn.Module):
    """Twice: activation quantiser, depthwise convolution, pointwise convolution, normalisation.

    Nothing stands between the two convolutions, so that the pointwise one reads the sums of the depthwise one. With
    `rescale` the gradients of k-bit weights carry the source's learning-rate multiplier 1 / sqrt(1.5 / (2 C k k)).
    """

    def __init__(
        self, kind: LayerType, norm: NormFactory, channels: int, kernel: int, stride: int = 1, *, rescale: bool = False
    ) -> None:
        super().__init__()
        sums = kind.accumulator_bits(kernel * kernel)
        read_sums = {"quantize_input": False, "input_bits": sums}
        self.depthwise1 = kind.conv(channels, channels, kernel, stride=stride, groups=channels)
        self.pointwise1, self.bn1 = kind.conv(channels, channels, **read_sums), norm(channels)
        self.depthwise2 = kind.conv(channels, channels, kernel, groups=channels)
        self.pointwise2, self.bn2 = kind.conv(channels, channels, **read_sums), norm(channels)
        if rescale and kind.quantizer == "kbit":
            for conv in (self.depthwise1, self.pointwise1, self.depthwise2, self.pointwise2):
                conv.gradient_scale = math.sqrt(2 * channels * kernel * kernel / 1.5)

    def folds(self) -> list[Fold]:
        """Which convolutions each normalisation follows."""
        return [([self.pointwise1], self.bn1), ([self.pointwise2], self.bn2)]

    def sums(self) -> list[tuple[nn.Conv2d, nn.Conv2d]]:
        """Each convolution that reads the sums of another, after that one."""
        return [(self.depthwise1, self.pointwise1), (self.depthwise2, self.pointwise2)]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride]."""
        x = self.bn1(self.pointwise1(self.depthwise1(x)))
        return self.bn2(self.pointwise2(self.depthwise2(x)))


class Calibration(nn.Module):
    """Brings both inputs of a cell to `channels` channels and to the size of the later one.

    `halve`: the earlier input is twice as large. An input that fits already is left as it is.
    """

    def __init__(self, kind: LayerType, norm: NormFactory, widths: tuple[int, int], channels: int, halve: bool) -> None:
        super().__init__()
        before_last, last = widths
        if halve:
            self.before_last = FactorizedReduction(kind, norm, before_last, channels, quantize_input=True)
        else:
            self.before_last = _fit(kind, norm, before_last, channels)
        self.last = _fit(kind, norm, last, channels)

    def forward(self, before_last: Tensor, last: Tensor) -> list[Tensor]:
        """Outputs of the two layers before -> nodes 0 and 1."""
        return [self.before_last(before_last), self.last(last)]


def _fit(kind: LayerType, norm: NormFactory, c_in: int, c_out: int) -> nn.Module:
    return nn.Identity() if c_in == c_out else ConvNorm(kind, norm, c_in, c_out)


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier on maps of `size` x `size` pixels.

    Pooling 5x5 of stride 3, 1x1 convolution to 128, one of the whole map's size to 768, average, linear layer. As in
    the source the pooling is without padding on maps of 8, 13, ... pixels.
    """

    def __init__(self, kind: LayerType, norm: NormFactory, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.exact = size >= 5 and (size - 3) % 5 == 0
        side = (size - 5) // 3 + 1 if self.exact else -(-size // 3)
        self.quantize = kind.activation()
        self.projection = kind.conv(channels, 128, quantize_input=False)
        self.bn1 = norm(128)
        self.conv, self.bn2 = kind.conv(128, 768, side), norm(768)
        self.last = kind.activation()
        self.classifier = nn.Linear(768, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, size, size] -> [B, classes]."""
        x = self.quantize(x)
        x = F.avg_pool2d(x, 5, 3) if self.exact else average_pool(x, 5, 3)
        x = self.bn1(self.projection(x))
        return self.classifier(self.last(self.bn2(self.conv(x))).mean((2, 3)))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Weights of convolutions and linear layers uniform in [-1, 1), as latent weights of quantised layers start."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.uniform_(-1, 1)


def latent_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights of quantised convolutions, which --clip-weights keeps in [-1, 1]."""
    convolutions = (m for m in module.modules() if isinstance(m, QuantConv2d))
    return [m.weight for m in convolutions if m.weight_bits != FLOAT_BITS]
