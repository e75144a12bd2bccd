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

from dataclasses import dataclass, replace
from functools import singledispatch

import torch
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

_ON_GRID = 1e-4  # in codes: as far as a value may lie off its grid's levels, rounding errors of float32 included


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
