# SPDX-License-Identifier: Apache-2.0
"""Quantisers whose grid is fixed once, from samples: post-training quantisation.

A method is two functions. `Range` looks at samples and says between which bounds the grid lies; `Grid` puts values on
the 2^bits levels between them. The bounds are all that a quantiser keeps.

    method      range                                              grid
    mse         of least squared error                             weights: equal steps, symmetric per output channel;
    percentile  leaves out a share of the largest values           activations: affine, zero on the grid, per tensor
    minmax      smallest and largest value                         equal steps
    linear      the power of two above (almost) all magnitudes     steps of a power of two, two's complement
    log         minmax of ln |x|                                   equal steps of ln |x| at one bit less, and the sign
    tanh        -1 and 1                                           equal steps of tanh x

The last four are those of nablaQDARTS's post-training baseline (TMLR 2025), which took them from earlier public code:
one range per tensor. Nothing here has a gradient: what is calibrated is not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.quant.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

Bounds = tuple[Tensor, Tensor]
Range = Callable[[Tensor, int, float], Bounds]
"""(samples [rows, n], bits, overflow rate) -> lower and upper bound of every row, [rows] each."""
Grid = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(x, lower bound, upper bound, bits) -> x on the grid; the bounds broadcast with x."""

CANDIDATES = 100
"""How many clipping ranges the least squared error is sought among: 1/100, 2/100, ... of the observed one."""

_TINY = 1e-12  # no step is smaller: a constant tensor must not divide 0 by 0
_LOG_ZERO = 1e-20  # ln |x| of x = 0


# ------------------------------------------------------------------------------------------------------ the grids


def equal_steps(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits levels, the outer two on the bounds; with low = -high: +-s/2, +-3s/2, ..."""
    steps = 2**bits - 1
    span = (high - low).clamp_min(steps * _TINY)
    # divided by the whole span, whose middle is then exactly half the steps: a tie, which goes up, in any precision
    return ((x - low) / span * steps + 0.5).floor_().clamp_(0, steps) * (span / steps) + low


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """2^bits equal steps apart as between the bounds, moved so that zero is a level: padding stays exact."""
    steps = 2**bits - 1
    step = ((high - low) / steps).clamp_min(_TINY)
    zero = (-low / step).round()
    return ((x / step).round_().add_(zero).clamp_(0, steps) - zero) * step


def twos_complement(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Levels -2^(bits-1) .. 2^(bits-1) - 1 times high / 2^(bits-1)."""
    bound = 2 ** (bits - 1)
    step = high / bound
    return (x / step + 0.5).floor_().clamp_(-bound, bound - 1) * step


def logarithmic(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`equal_steps` of ln |x| at one bit less; the sign takes the other bit, and zero stays zero."""
    return equal_steps(_ln(x), low, high, bits - 1).exp_() * x.sign()


def hyperbolic(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`equal_steps` of tanh x, taken back by artanh. The levels +-1, whose artanh is infinite, become the middles
    1 - 1 / (2 steps) of what is rounded to them.
    """
    outermost = 1 - 0.5 / (2**bits - 1)
    return equal_steps(x.tanh(), low, high, bits).clamp_(-outermost, outermost).atanh_()


def _ln(x: Tensor) -> Tensor:
    return (x.abs() + _LOG_ZERO).log_()


# ------------------------------------------------------------------------------------------------------ the ranges


def extremes(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """Smallest and largest value of every row."""
    return rows.amin(1), rows.amax(1)


def ranked_magnitude(rows: Tensor, overflow_rate: float) -> Tensor:
    """|value| of rank int(overflow_rate x n) of every row [rows, n], counted from 0 at the largest: [rows]."""
    n = rows.shape[1]
    return rows.abs().kthvalue(n - min(int(overflow_rate * n), n - 1), 1).values


def power_of_two(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """-2^I and 2^I, I = ceil(log2 `ranked_magnitude`), taken from the floating-point exponent and so exact."""
    mantissa, exponent = torch.frexp(ranked_magnitude(rows, overflow_rate).clamp_min(_TINY))
    high = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return -high, high


def log_extremes(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """Extremes of ln |x|."""
    return extremes(_ln(rows), bits, overflow_rate)


def unit(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """-1 and 1, whatever the samples are."""
    one = rows.new_ones(rows.shape[0])
    return -one, one


def symmetric_tails(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """Plus and minus `ranked_magnitude`."""
    high = ranked_magnitude(rows, overflow_rate)
    return -high, high


def tails(rows: Tensor, bits: int, overflow_rate: float) -> Bounds:
    """Bounds around zero that leave out the share of the largest values; with negatives, half of it at either end."""
    n, share = rows.shape[1], torch.where(rows.amin(1) < 0, overflow_rate / 2, overflow_rate)
    rank = (share * n).long().clamp_max(n - 1).unsqueeze(1)
    ascending = rows.sort(1).values
    return ascending.gather(1, rank).squeeze(1).clamp_max(0), ascending.gather(1, n - 1 - rank).squeeze(1).clamp_min(0)


def least_squares(rows: Tensor, bits: int, overflow_rate: float, *, grid: Grid, symmetric: bool) -> Bounds:
    """The observed range times that of 1/CANDIDATES ... 1 which makes the squared error of `grid` least, per row."""
    low, high = _around_zero(rows)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    least, best = torch.full_like(high, float("inf")), torch.ones_like(high)
    for candidate in range(1, CANDIDATES + 1):
        share = candidate / CANDIDATES
        error = (grid(rows, share * low[:, None], share * high[:, None], bits) - rows).square_().sum(1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best * low, best * high


def _around_zero(rows: Tensor) -> Bounds:
    return rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)


# -------------------------------------------------------------------------------------------------- the quantisers


class CalibratedQuantizer(nn.Module):
    """A grid between two bounds that `calibrate` sets; before that they are NaN, and so is all that it gives.

    `per_channel`: one pair of bounds for each slice of the first dimension (a weight's output channels). The bounds
    are buffers, so that a state dict holds all there is to know.
    """

    def __init__(
        self,
        bits: int,
        *,
        range_of: Range,
        grid: Grid,
        ranked: bool = False,
        per_channel: bool = False,
        scheme: str = "default",
        signed: bool = False,
    ) -> None:
        """`ranked`: the bounds are values of a rank that the overflow rate names. `scheme` and `signed` belong to every
        factory's signature; here the samples decide.
        """
        super().__init__()
        if bits < 2:
            raise ValueError(f"bits: {bits} leaves a calibrated grid no levels to choose; give at least 2")
        self.bits, self.range_of, self.grid, self.per_channel = bits, range_of, grid, per_channel
        self.ranked = ranked
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    @torch.no_grad()
    def calibrate(self, samples: Tensor, overflow_rate: float = 0.0) -> CalibratedQuantizer:
        """Set the bounds from samples of any shape (per channel: [channels, ...]); returns itself."""
        rows = samples.detach().flatten(1) if self.per_channel else samples.detach().reshape(1, -1)
        low, high = self.range_of(rows, self.bits, overflow_rate)
        shape = (-1, *(1,) * (samples.dim() - 1)) if self.per_channel else ()
        self.low, self.high = low.reshape(shape), high.reshape(shape)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Quantise x; values beyond the bounds take the outermost level."""
        # in the bounds' precision: under autocast x is bfloat16, too coarse to count 255 steps
        return self.grid(x.detach().to(self.low.dtype), self.low, self.high, self.bits).to(x.dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # a factory does not know its layer's channels: take the shape of what was saved
        for name in ("low", "high"):
            if (saved := state.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved, device=self.low.device))
        super()._load_from_state_dict(state, prefix, *rest)


def _factory(range_of: Range, grid: Grid, **more: Any) -> Callable[..., CalibratedQuantizer]:
    return partial(CalibratedQuantizer, range_of=range_of, grid=grid, **more)


_PER_TENSOR = {
    "linear": _factory(power_of_two, twos_complement, ranked=True),
    "minmax": _factory(extremes, equal_steps),
    "log": _factory(log_extremes, logarithmic),
    "tanh": _factory(unit, hyperbolic),
}
ACTIVATION_QUANTIZERS |= {
    "mse": _factory(partial(least_squares, grid=affine, symmetric=False), affine),
    "percentile": _factory(tails, affine, ranked=True),
    **_PER_TENSOR,
}
WEIGHT_QUANTIZERS |= {
    "mse": _factory(partial(least_squares, grid=equal_steps, symmetric=True), equal_steps, per_channel=True),
    "percentile": _factory(symmetric_tails, equal_steps, ranked=True, per_channel=True),
    **_PER_TENSOR,
}
CALIBRATED_METHODS = ("mse", "percentile", *_PER_TENSOR)
"""The names under which both registries hold a calibrated quantiser."""


# --------------------------------------------------------------------------------------- the methods on one tensor


def linear_quantize(x: Tensor, bits: int, overflow_rate: float = 0.0) -> Tensor:
    """x by method linear, calibrated on itself: step 2^(I - bits + 1), clipped to [-2^(bits-1), 2^(bits-1) - 1]."""
    return _by_itself("linear", x, bits, overflow_rate)


def minmax_quantize(x: Tensor, bits: int) -> Tensor:
    """x by method minmax, calibrated on itself: 2^bits - 1 equal steps between its minimum and maximum."""
    return _by_itself("minmax", x, bits)


def log_quantize(x: Tensor, bits: int) -> Tensor:
    """x by method log, calibrated on itself: minmax at bits - 1 on ln(|x| + 1e-20), the sign kept."""
    return _by_itself("log", x, bits)


def tanh_quantize(x: Tensor, bits: int) -> Tensor:
    """x by method tanh: 2^bits - 1 equal steps of tanh(x) in [-1, 1], then artanh."""
    return _by_itself("tanh", x, bits)


def _by_itself(method: str, x: Tensor, bits: int, overflow_rate: float = 0.0) -> Tensor:
    return _PER_TENSOR[method](bits).calibrate(x, overflow_rate)(x)
