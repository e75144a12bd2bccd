# SPDX-License-Identifier: Apache-2.0
"""Quantised tensors as integers: which grid a quantiser puts values on, and layers that compute with the codes alone.

Every grid here is

    value = scale x code + offset,    code = multiplier x index + base,    index = 0 ... levels - 1,

and the index is what is stored, in `bits` bits. A grid with an odd number of steps around zero (a mid-rise one) has no
level zero, and no integer is half a step; counted in half steps its levels are the odd numbers: multiplier 2, base
-(2^b - 1), scale = half a step, no offset. Where the offset is None the value zero is the code zero, a level or not, so
that padding a map of codes with 0 is padding it with the value zero.

    quantiser                 multiplier   base         levels     scale                    offset
    Gaussian weights          2            -(2^b - 1)   2^b        half a step              -
    8 bits, weights           1            -127         255        per output channel       -
    HWGQ; 8 bits              1            0            2^b        step; maximum / 255      -
    signed activations        1            -top         2 top + 1  maximum / top            -
    LSQ                       1            bottom       2^b        the learned step         -
    equal steps, low = -high  2            -(2^b - 1)   2^b        half a step              -
    equal steps               1            0            2^b        step                     low
    affine                    1            -zero        2^b        step                     -
    two's complement          1            -2^(b-1)     2^b        step                     -
    binary, stochastic        2            -1           2          1                        -
    ternary                   1            -1           3          1                        -
    k bits                    1            -m           2 m        1 / m, m = 2^(b-1)       -
    k bits, half              1            0            m          1 / m                    -

A convolution of x = a c + p with w = s d + q (c, d codes; p, q offsets, 0 where there is none) is, summed over the
window's n positions that lie within the image (on padding x is 0, and so are c and p),

    sum x w = a s sum c d + a q sum c + p s sum d + p q n.

The first sum is the accumulator; each of the others is an integer too, and only grids with offsets need them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.calibrated import CalibratedQuantizer, affine, equal_steps, twos_complement
from common.quant.discrete import DiscreteQuantizer, StochasticBinary
from common.quant.quantizers import (
    GAUSSIAN_STEP,
    HWGQ_STEP,
    LOW_BITS,
    TINY,
    ZERO,
    ActivationQuantizer,
    LsqQuantizer,
    WeightQuantizer,
)

ROUNDINGS = ("even", "up", "sign", "ternary")
"""How values meet codes: to the nearest, ties to the even or the upper one; +-1 by the sign; -1, 0, 1 by halves."""

_ON_GRID = 0.01  # in codes: as far as a value may lie off its grid's levels; an offset adds float32's rounding errors


@dataclass(frozen=True)
class Grid:
    """Levels of equal distance; see the module's head. `scale` is a scalar, or [channels, 1, ...] for a weight."""

    bits: int
    levels: int
    multiplier: int
    base: int
    scale: Tensor
    offset: Tensor | None = None
    rounding: str = "even"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return self.base

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.multiplier * (self.levels - 1) + self.base

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(abs(self.lowest), abs(self.highest))

    def to(self, dtype: torch.dtype) -> Grid:
        """The same grid with its constants in `dtype`."""
        return replace(self, scale=self.scale.to(dtype), offset=None if self.offset is None else self.offset.to(dtype))


def encode(x: Tensor, grid: Grid) -> Tensor:
    """The code of each value's level, in x's type; values beyond the grid take the outermost level."""
    if grid.rounding == "sign":
        return torch.where(x > ZERO, 1.0, -1.0).to(x.dtype)
    if grid.rounding == "ternary":
        return (x > 0.5).to(x.dtype) - (x <= -0.5).to(x.dtype)
    x = (x if grid.offset is None else x - grid.offset) / grid.scale
    first = -(grid.base % grid.multiplier)  # of the codes next to zero: ties are even ones counted from here
    if grid.multiplier != 1:
        x = (x - first) / grid.multiplier
    x = x.round_() if grid.rounding == "even" else x.add_(0.5).floor_()
    if grid.multiplier != 1:
        x = x * grid.multiplier + first
    return x.clamp_(grid.lowest, grid.highest)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The values of codes (of any type), in the scale's type."""
    value = codes.to(grid.scale.dtype) * grid.scale
    return value if grid.offset is None else value + grid.offset


def indices_of(codes: Tensor, grid: Grid) -> Tensor:
    """Codes -> what is stored, 0 ... levels - 1, as uint8."""
    return torch.div(codes - grid.base, grid.multiplier).round().to(torch.uint8)


def codes_of(indices: Tensor, grid: Grid) -> Tensor:
    """What was stored -> codes, as int16."""
    return indices.to(torch.int16) * grid.multiplier + grid.base


# ------------------------------------------------------------------------------------------------ grids of quantisers


def weight_grid(layer: nn.Module, name: str = "") -> Grid | None:
    """The grid of a layer's weight; None where it is full precision.

    A quantiser of one's own says it by a method `integer_grid(weight)`. Raises ValueError that names the layer (`name`)
    where its values are no integers times a scale.
    """
    return _grid(layer, layer.quantize_weight, layer.weight.detach(), f"{name or 'layer'} (weights)")


def activation_grid(layer: nn.Module, name: str = "") -> Grid | None:
    """The grid of a layer's input; None where that is full precision. Raises ValueError as `weight_grid`; a
    quantiser of one's own is asked for `integer_grid(None)`.
    """
    return _grid(layer, layer.quantize_activation, None, f"{name or 'layer'} (activations)")


def weight_codes(layer: nn.Module, name: str = "") -> tuple[Tensor, Grid] | None:
    """(codes of a layer's quantised weight as int16, its grid), or None where the weight is full precision.

    The codes come from the values that the layer itself computes with. Raises ValueError where those are off the grid.
    """
    grid = weight_grid(layer, name)
    if grid is None:
        return None
    with torch.no_grad():
        value = layer.quantize_weight(layer.weight)
        if not value.isfinite().all():
            raise ValueError(f"{name or 'layer'}: holds weights that are not finite; export a training that went well")
        exact = (value if grid.offset is None else value - grid.offset) / grid.scale
        codes = exact.round()
        off = (exact - codes).abs().max() > _ON_GRID or codes.min() < grid.lowest or codes.max() > grid.highest
        if off or (grid.multiplier > 1 and ((codes - grid.base) % grid.multiplier).any()):
            raise ValueError(
                f"{name or 'layer'}: its weight quantiser ({_name_of(layer.quantize_weight)}) gives values that are "
                "not on the grid it names; correct its integer_grid"
            )
    return codes.to(torch.int16), grid


def _grid(layer: nn.Module, quantizer: nn.Module, weight: Tensor | None, where: str) -> Grid | None:
    if isinstance(quantizer, (nn.Identity, nn.ReLU)):
        return None
    try:
        return quantizer_grid(quantizer, weight).to(layer.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _name_of(quantizer: nn.Module) -> str:
    return getattr(quantizer, "name", None) or type(quantizer).__name__


@singledispatch
def quantizer_grid(quantizer: nn.Module, weight: Tensor | None) -> Grid:
    """The grid that a quantiser puts `weight` on (None: an activation). Raises ValueError with reason and cure."""
    own = getattr(quantizer, "integer_grid", None)
    if own is None:
        raise ValueError(
            f"the quantiser {_name_of(quantizer)} offers no grid of integers, which export needs; give it a method "
            "integer_grid (docs/own-quantiser.md), or train with another quantiser"
        )
    grid = own(weight)
    if not isinstance(grid, Grid) or grid.rounding not in ROUNDINGS or not 1 <= grid.levels <= 2**grid.bits <= 256:
        raise ValueError(
            f"integer_grid of the quantiser {_name_of(quantizer)} gives no Grid of 1 to 8 bits; "
            "see docs/own-quantiser.md"
        )
    return grid


def _signed_range(bits: int, maximum: Tensor) -> Grid:
    top = 2 ** (bits - 1) - 1
    return Grid(bits, 2 * top + 1, 1, -top, maximum.clamp_min(TINY) / top)


@quantizer_grid.register
def _(quantizer: ActivationQuantizer, weight: Tensor | None) -> Grid:
    bits = quantizer.bits
    if quantizer.range is None:
        if bits not in LOW_BITS:
            raise ValueError(
                'the 8 bits of scheme "reference" take a scale per input channel from each batch, which no integer '
                "accumulator has; train with --scheme default (as without --preset paper)"
            )
        return Grid(bits, 2**bits, 1, 0, torch.tensor(HWGQ_STEP[bits], dtype=torch.float64))
    if not quantizer.range.ready:
        raise ValueError("its running range has not seen a batch; train the network first")
    maximum = quantizer.range.maximum.detach()
    if quantizer.signed:
        return _signed_range(bits, maximum)
    return Grid(bits, 2**bits, 1, 0, maximum.clamp_min(TINY) / (2**bits - 1))


@quantizer_grid.register
def _(quantizer: WeightQuantizer, weight: Tensor) -> Grid:
    bits = quantizer.bits
    if bits in LOW_BITS:
        # over all dimensions by name, as the quantiser has it: another order of summation is another last digit
        deviation = weight.abs() if weight.numel() == 1 else weight.std(tuple(range(weight.dim())), keepdim=True)
        step = (GAUSSIAN_STEP[bits] * deviation).clamp_min(TINY)
        return Grid(bits, 2**bits, 2, 1 - 2**bits, step.reshape(()) / 2)
    if quantizer.scheme == "reference":
        raise ValueError(
            'the 8 bits of scheme "reference" take a scale per input channel, which no integer accumulator has; train '
            "with --scheme default (as without --preset paper)"
        )
    return _signed_range(bits, weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True))


@quantizer_grid.register
def _(quantizer: LsqQuantizer, weight: Tensor | None) -> Grid:
    step = quantizer.step.detach()
    step = torch.where(step > 0, step.clamp_min(1e-8), step.clamp_max(-1e-8))
    return Grid(quantizer.bits, quantizer.top - quantizer.bottom + 1, 1, quantizer.bottom, step)


@quantizer_grid.register
def _(quantizer: CalibratedQuantizer, weight: Tensor | None) -> Grid:
    low, high, bits = quantizer.low.detach(), quantizer.high.detach(), quantizer.bits
    levels = 2**bits
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError("its range is not calibrated; quantise the network with its calibration images first")
    if quantizer.grid is twos_complement:
        return Grid(bits, levels, 1, -levels // 2, high / (levels // 2), rounding="up")
    step = ((high - low) / (levels - 1)).clamp_min(TINY)
    if quantizer.grid is affine:
        zero = (-low / step).round()
        return Grid(bits, levels, 1, -int(zero), step)
    if quantizer.grid is equal_steps:
        if torch.equal(low, -high) and bool((high - low > TINY * levels).all()):
            return Grid(bits, levels, 2, 1 - levels, step / 2, rounding="up")
        return Grid(bits, levels, 1, 0, step, low, rounding="up")
    raise ValueError(
        f"the levels of the post-training method {quantizer.grid.__name__} are not equally far apart, so that no "
        "integers stand for them; quantise with --quant_method mse, percentile, minmax or linear"
    )


@quantizer_grid.register
def _(quantizer: DiscreteQuantizer, weight: Tensor | None) -> Grid:
    bits, one = quantizer.bits, torch.ones(())
    if quantizer.name == "binary":
        return Grid(bits, 2, 2, -1, one, rounding="sign")
    if quantizer.name == "ternary":
        return Grid(bits, 3, 1, -1, one, rounding="ternary")
    m = 2 ** (bits - 1)
    if quantizer.name == "kbit":
        return Grid(bits, 2 * m, 1, -m, one / m)
    return Grid(bits, m, 1, 0, one / m)  # kbit-relu


@quantizer_grid.register
def _(quantizer: StochasticBinary, weight: Tensor | None) -> Grid:
    return Grid(1, 2, 2, -1, torch.ones(()), rounding="sign")


# ------------------------------------------------------------------------------------------------- the reference engine

_FLOAT32_EXACT, _FLOAT64_EXACT = 2**24, 2**53
"""Up to here every integer is a number of that type, and so is every partial sum of a sum that stays below it."""


class IntegerLayer(nn.Module):
    """A layer in integers: input codes x weight codes, summed up exactly, and one rescaling per output channel.

    `out = (sum + corrections) x rescale + shift`: the rescaling holds both scales and the normalisation that follows,
    the corrections are those of grids with offsets (the module's head). Where one operand is full precision (`input`
    None, or a float `weight`) the sum is one of floats, the rest stays.

    The sums are computed in floats wherever a bound shows that these are exact (`carrier`), since torch's integer
    convolutions are slow; `sums` gives them as integers, computed as integers on request.
    """

    folds_relu = True  # a ReLU before it comes to `forward`: most grids of activations hold it already

    def __init__(
        self,
        weight: Tensor,
        *,
        rescale: Tensor | None,
        shift: Tensor | None = None,
        weight_grid: Grid | None = None,
        weight_offset: Tensor | None = None,
        input_grid: Grid | None = None,
        reads_sums: int = 0,
    ) -> None:
        """`weight`: codes (int16, with `weight_grid`) or values. `rescale`, `shift`: a scalar or [out]; a layer without
        rescaling gives its sums. `weight_offset`: in codes, a scalar or [out]. `reads_sums`: the input is the sums of
        another layer, of at most this magnitude.
        """
        super().__init__()
        self.weight_grid, self.input_grid, self.reads_sums = weight_grid, input_grid, reads_sums
        coded = weight_grid is not None
        magnitudes = weight.double().abs().flatten(1).sum(1).amax() if coded and weight.numel() else 0.0
        self.largest_sum = int(float(magnitudes) * (reads_sums or (input_grid.largest if input_grid else 0)))
        """No sum of codes is larger, and no partial one."""
        if self.largest_sum > _FLOAT64_EXACT:
            raise ValueError(f"sums of up to {self.largest_sum:,} are beyond what this engine adds up exactly")
        constants = {"weight": weight, "rescale": rescale, "shift": shift, "weight_offset": weight_offset}
        constants |= {f"input_{name}": getattr(input_grid, name, None) for name in ("scale", "offset")}
        constants["_carried"] = weight.to(self.carrier) if self.exact else None
        for name, value in constants.items():
            # a weight in full precision is the only state that looks the same in every network of these modules
            self.register_buffer(name, value, persistent=name == "weight" and not coded)

    @property
    def exact(self) -> bool:
        """Whether both operands are codes, so that the sums are integers."""
        return self.weight_grid is not None and (self.input_grid is not None or self.reads_sums > 0)

    @property
    def accumulator(self) -> torch.dtype:
        """The integer type that holds every sum."""
        return torch.int32 if self.largest_sum < 2**31 else torch.int64

    @property
    def carrier(self) -> torch.dtype:
        """The type of floats in which the sums are exact."""
        return torch.float32 if self.largest_sum <= _FLOAT32_EXACT else torch.float64

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _ones(self, like: Tensor) -> Tensor:
        """A weight of ones, one row for each group of channels."""
        raise NotImplementedError

    def _channels(self, constant: Tensor, like: Tensor) -> Tensor:
        """A constant per output channel in a shape that broadcasts with an output, in the constants' type."""
        constant = constant.to(like.dtype)
        return constant.view(1, -1, *(1,) * (like.dim() - 2)) if constant.dim() else constant

    def grid(self) -> Grid | None:
        """The grid of the input, with the constants that this layer holds."""
        if self.input_grid is None:
            return None
        return replace(self.input_grid, scale=self.input_scale, offset=self.input_offset)

    def encode(self, x: Tensor, relu: bool = False) -> Tensor:
        """x -> what is multiplied: its codes as floats; x itself where it is full precision or another layer's sums."""
        grid = self.grid()
        if relu and (grid is None or grid.lowest < 0 or grid.offset is not None):
            x = x.relu()
        return x if grid is None else encode(x, grid)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Sums of codes [B, in, ...] -> [B, out, ...], integers in the carrier's type (floats where not `exact`)."""
        if not self.exact:
            return self._multiply(codes, self.weight.to(codes.dtype))
        if codes.is_cuda:  # whose float32 may multiply in fewer digits
            return self._multiply(codes.double(), self._carried.double())
        return self._multiply(codes.to(self.carrier), self._carried.to(self.carrier))

    def sums(self, codes: Tensor) -> Tensor:
        """The same of integer operands by integer arithmetic, in the accumulator's type (CPU alone, and slow)."""
        return self._multiply(codes.to(self.accumulator), self.weight.to(self.accumulator))

    def corrections(self, codes: Tensor) -> Tensor | None:
        """What offsets add to the sums of these codes, in codes; None where neither operand has one."""
        q, p = self.weight_offset, None if self.input_offset is None else self.input_offset / self.input_scale
        if q is None and p is None:
            return None
        # integers, but for a full-precision operand: sums over a window are exact in double
        codes, added = codes.double(), None
        ones = self._ones(codes)
        if q is not None:
            added = self._spread(self._multiply(codes, ones))
            added = added * self._channels(q, added)
        if p is not None:
            inside = torch.ones_like(codes[:1])
            border = self._multiply(inside, self.weight.double())
            if q is not None:
                border = border + self._spread(self._multiply(inside, ones)) * self._channels(q, border)
            border = border * p.double()
            added = border if added is None else added + border
        return added

    def _spread(self, sums: Tensor) -> Tensor:
        """Sums of each group's window [B, groups, ...] -> [B, out, ...]."""
        return sums.repeat_interleave(self.weight.shape[0] // sums.shape[1], 1)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Values (or another layer's sums) [B, in, ...] -> values [B, out, ...], or sums where nothing rescales."""
        return self.output(self.encode(x, relu))

    def output(self, codes: Tensor) -> Tensor:
        """What `encode` gave [B, in, ...] -> what `forward` gives."""
        total = self.accumulate(codes)
        if self.rescale is None:
            return total
        added = self.corrections(codes)
        if added is not None:
            total = total.double() + added
        total = total.to(self.rescale.dtype)
        total = total * self._channels(self.rescale, total)
        return total if self.shift is None else total + self._channels(self.shift, total)

    def extra_repr(self) -> str:
        weight = f"weight={self.weight_grid.bits} bits" if self.weight_grid else "weight=float"
        read = f"{self.input_grid.bits} bits" if self.input_grid else "sums" if self.reads_sums else "float"
        return f"{weight}, input={read}, sums to {self.largest_sum}"


class IntegerConv2d(IntegerLayer):
    """A convolution in integers; `pad` puts zeros around codes where its geometry has no symmetric padding."""

    def __init__(
        self,
        weight: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        pad: Callable[[Tensor], Tensor] | None = None,
        **constants: Any,
    ) -> None:
        super().__init__(weight, **constants)
        self.stride, self.padding, self.dilation, self.groups, self.pad = stride, padding, dilation, groups, pad

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        x, dilation = x if self.pad is None else self.pad(x), self.dilation
        if not x.is_floating_point() and dilation != (1, 1):  # torch dilates no integers: zeros between the weights do
            (height, width), (down, across) = weight.shape[2:], dilation
            spread = weight.new_zeros(*weight.shape[:2], (height - 1) * down + 1, (width - 1) * across + 1)
            spread[:, :, ::down, ::across] = weight
            weight, dilation = spread, (1, 1)
        return F.conv2d(x, weight, None, self.stride, self.padding, dilation, self.groups)

    def _ones(self, like: Tensor) -> Tensor:
        return torch.ones(self.groups, *self.weight.shape[1:], dtype=like.dtype, device=like.device)


class IntegerLinear(IntegerLayer):
    """A linear layer in integers."""

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _ones(self, like: Tensor) -> Tensor:
        return torch.ones(1, like.shape[1], dtype=like.dtype, device=like.device)
