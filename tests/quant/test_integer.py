# SPDX-License-Identifier: Apache-2.0
"""Every quantiser's grid gives back its own values, and integer layers are the convolutions of these values.

The truth beside them: the quantised tensors themselves, torch's float64 convolution of them, and torch's convolution of
int32 and int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from common.export.integer_network import integer_form
from common.quant import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, CalibratedQuantizer, QuantConv2d, QuantLinear
from common.quant.integer import (
    Grid,
    IntegerLayer,
    activation_grid,
    codes_of,
    decode,
    encode,
    indices_of,
    weight_codes,
    weight_grid,
)
from common.quant.quantizers import make_quantizer
from tests.helpers.mangled import many

PAIRS = {  # (weights, activations) -> bits
    ("gaussian", "hwgq"): (1, 2, 3, 4, 8),
    ("gaussian", "hwgq-signed8"): (8,),
    ("lsq", "lsq"): (2, 3, 4, 8),
    **{(name, name): (2, 3, 4, 5, 6, 7, 8) for name in ("mse", "percentile", "minmax", "linear")},
    ("binary", "binary"): (1,),
    ("stochastic", "stochastic"): (1,),
    ("ternary", "ternary"): (2,),
    ("kbit", "kbit"): tuple(range(1, 9)),
    ("kbit", "kbit-relu"): tuple(range(1, 9)),
}
CASES = [(*names, bits) for names, widths in PAIRS.items() for bits in widths]
LEVELS = {"ternary": 3}


def quantised(
    layer: nn.Module, weights: str, activations: str, bits: int, x: Tensor, signed: bool = False
) -> nn.Module:
    """The layer with these quantisers, which have seen its weight and x; in evaluation mode and x's type."""
    layer = layer.to(x.dtype)
    nn.init.normal_(layer.weight)
    layer.weight_bits = layer.activation_bits = bits
    layer.quantize_weight = make_quantizer(WEIGHT_QUANTIZERS, weights, bits)
    layer.quantize_activation = make_quantizer(ACTIVATION_QUANTIZERS, activations, bits, signed=signed)
    layer.to(x.dtype)
    for quantizer, samples in ((layer.quantize_weight, layer.weight), (layer.quantize_activation, x)):
        if isinstance(quantizer, CalibratedQuantizer):
            quantizer.calibrate(samples, 0.001)
        elif activations != "stochastic":
            quantizer(samples)  # ranges and learned steps are set by the first tensor
    return layer.eval()


def images(seed: int = 0, channels: int = 6, size: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("weights", "activations", "bits"), CASES)
@torch.no_grad()
def test_grids_give_back_the_values(weights: str, activations: str, bits: int) -> None:
    torch.manual_seed(bits)
    x = images()
    layer = quantised(QuantConv2d(6, 40, 3), weights, activations, bits, x)
    codes, grid = weight_codes(layer)
    torch.testing.assert_close(decode(codes, grid), layer.quantize_weight(layer.weight), rtol=1e-13, atol=1e-13)
    indices = indices_of(codes, grid)
    assert torch.equal(codes_of(indices, grid), codes)
    found = indices.unique().numel()
    assert found <= grid.levels <= 2**bits and int(indices.max()) < grid.levels
    assert found == LEVELS.get(weights, 2**bits) or weights in ("lsq", "linear", "percentile", "minmax") or bits >= 5
    taken = activation_grid(layer)
    read = encode(x, taken)
    torch.testing.assert_close(decode(read, taken), layer.quantize_activation(x), rtol=1e-13, atol=1e-13)
    assert taken.levels <= 2**bits and taken.lowest <= read.min() and read.max() <= taken.highest
    assert torch.equal(read, read.round())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_signed_inputs(bits: int) -> None:
    x = images()
    layer = quantised(QuantConv2d(6, 4, 3), "gaussian", "hwgq", bits, x, signed=True)
    grid = activation_grid(layer)
    assert (grid.lowest, grid.highest) == (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    torch.testing.assert_close(decode(encode(x, grid), grid), layer.quantize_activation(x), rtol=1e-13, atol=0)


@torch.no_grad()
def test_mid_rise_codes_are_odd_and_ties_fall_as_in_the_quantiser() -> None:
    layer = quantised(QuantConv2d(6, 8, 3), "gaussian", "hwgq", 2, images())
    codes, grid = weight_codes(layer)
    assert set(codes.unique().tolist()) == {-3, -1, 1, 3} and grid.offset is None
    step = 0.996 * float(layer.weight.std())  # the published step of two bits, in standard deviations
    assert math.isclose(float(grid.scale), step / 2, rel_tol=1e-12)
    ties = torch.arange(-4, 5, dtype=torch.float64) * 0.538 / 2
    taken = activation_grid(layer)
    assert torch.equal(decode(encode(ties, taken), taken), layer.quantize_activation(ties))


@torch.no_grad()
def check_layer(layer: nn.Module, x: Tensor) -> IntegerLayer:
    """A layer's integer form against float64 convolution of the quantised tensors, and against integer arithmetic."""
    codes, grid = weight_codes(layer)
    taken = activation_grid(layer)
    scale = grid.scale * taken.scale
    offset = None if grid.offset is None else (grid.offset / grid.scale).reshape(-1)
    integer = integer_form(
        layer,
        codes,
        {
            "weight_grid": grid,
            "weight_offset": offset if offset is None or len(offset) > 1 else offset[0],
            "input_grid": taken,
            "rescale": scale.reshape(-1) if scale.numel() > 1 else scale.reshape(()),
            "shift": layer.bias,
        },
    )
    value, weight = layer.quantize_activation(x), layer.quantize_weight(layer.weight)
    if isinstance(layer, nn.Linear):
        expected = F.linear(value, weight, layer.bias)
    else:
        expected = F.conv2d(value, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(integer(x), expected, rtol=1e-11, atol=1e-11)
    read = integer.encode(x)
    sums = integer.sums(read)
    assert sums.dtype == integer.accumulator and torch.equal(sums.double(), integer.accumulate(read).double())
    assert int(sums.abs().max()) <= integer.largest_sum
    return integer


@many(60)
@given(
    case=st.sampled_from([case for case in CASES if case[0] != "stochastic"]),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 7), (7, 1)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    depthwise=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 5),
)
def test_convolutions_of_every_shape(
    case: tuple[str, str, int],
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    depthwise: bool,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = images(seed, size=9)
    geometry = {"stride": stride, "dilation": dilation, "groups": 6 if depthwise else 1, "bias": bias}
    padding = tuple(dilation * (side // 2) for side in kernel)
    layer = QuantConv2d(6, 12, kernel, padding=padding, **geometry)
    check_layer(quantised(layer, *case, x), x)


@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)], ids=["a channel", "all"])
@pytest.mark.parametrize(("weights", "activations"), [pair for pair in PAIRS if 8 in PAIRS[pair]])
@torch.no_grad()
def test_weights_of_zeros(weights: str, activations: str, rows: slice) -> None:
    """A scale of nothing: a channel that is all zero, and a layer that is."""
    x = images()
    layer = quantised(QuantConv2d(6, 8, 3, padding=1), weights, activations, 8, x)
    layer.weight[rows] = 0
    if isinstance(layer.quantize_weight, CalibratedQuantizer):
        layer.quantize_weight.calibrate(layer.weight)
    check_layer(layer, x)


def test_a_range_far_from_zero_is_still_a_grid() -> None:
    """In float32 an offset of many ranges leaves rounding errors of its own."""
    x = images().float()
    layer = quantised(QuantConv2d(6, 8, 3), "minmax", "minmax", 8, x)
    with torch.no_grad():
        layer.weight.uniform_(10, 10.5)
        layer.quantize_weight.calibrate(layer.weight)
    codes, grid = weight_codes(layer)
    assert torch.equal(decode(codes, grid), layer.quantize_weight(layer.weight))


@pytest.mark.parametrize(("weights", "activations", "bits"), [c for c in CASES if c[2] in (2, 8) and c[0] != "linear"])
def test_linear_layers(weights: str, activations: str, bits: int) -> None:
    torch.manual_seed(0)
    x = images()[:, :, 0, 0]
    check_layer(quantised(QuantLinear(6, 5), weights, activations, bits, x), x)


@torch.no_grad()
def test_sums_beyond_float32_are_carried_in_float64() -> None:
    """Beyond 2^24 float32 has no odd numbers; the next type takes over exactly where the bound says so."""
    for size, carrier in ((2**15, torch.float32), (2**15 + 1, torch.float64)):
        weight = torch.full((1, size), 2, dtype=torch.int16)
        grid = Grid(8, 256, 1, 0, torch.ones(()))
        layer = integer_form(
            nn.Linear(size, 1, bias=False),
            weight,
            {"weight_grid": grid, "input_grid": grid, "rescale": torch.ones(())},
        )
        layer.largest_sum = layer.largest_sum * 256 // 255  # as of codes up to 256
        assert layer.carrier == carrier, layer.largest_sum
    weight = torch.full((1, 3), 255, dtype=torch.int16)
    layer = integer_form(
        nn.Linear(3, 1, bias=False), weight, {"weight_grid": grid, "reads_sums": 2**40, "rescale": None}
    )
    codes = torch.tensor([[2.0**40, 1.0, 2.0**39]], dtype=torch.float64)
    assert layer.accumulator == torch.int64 and layer(codes).item() == 255 * (2**40 + 1 + 2**39)
    assert layer.sums(codes).item() == 255 * (2**40 + 1 + 2**39)
    with pytest.raises(ValueError, match="beyond what this engine adds up exactly"):
        integer_form(nn.Linear(3, 1, bias=False), weight, {"weight_grid": grid, "reads_sums": 2**50, "rescale": None})


# ---------------------------------------------------------------------------------------------------- what has no codes


def refusals() -> Iterator[tuple[str, nn.Module, str]]:
    x = images()
    for method in ("log", "tanh"):
        layer = quantised(QuantConv2d(6, 4, 3), method, method, 4, x)
        yield method, layer, "not equally far apart.*mse, percentile, minmax or linear"
    yield "reference", QuantConv2d(6, 4, 3, weight_bits=8, activation_bits=8, scheme="reference"), "--scheme default"
    yield "no batch", QuantConv2d(6, 4, 3, weight_bits=32, activation_bits=8), "has not seen a batch"
    bare = QuantConv2d(6, 4, 3, weight_bits=4, weight_quantizer="mse")
    yield "not calibrated", bare, "not calibrated"
    own = QuantConv2d(6, 4, 3)
    own.quantize_weight = nn.Tanh()
    yield "own", own, "Tanh offers no grid.*integer_grid"


@pytest.mark.parametrize(
    ("name", "layer", "message"), list(refusals()), ids=lambda value: value if type(value) is str else ""
)
def test_refused_with_reason_and_cure(name: str, layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cells.7.conv \((weights|activations)\): .*{message}"):
        weight_grid(layer, "cells.7.conv")
        activation_grid(layer, "cells.7.conv")


class Thirds(nn.Module):
    """A quantiser of one's own: multiples of a third, of which it tells `grid`."""

    def __init__(self, scale: float, levels: int = 7) -> None:
        super().__init__()
        self.scale, self.levels = scale, levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * 3).round().clamp(-3, 3) / 3

    def integer_grid(self, weight: Tensor | None) -> Grid:
        return Grid(3, self.levels, 1, -3, torch.tensor(self.scale, dtype=torch.float64))


def test_a_quantiser_of_ones_own_tells_its_grid() -> None:
    layer = QuantConv2d(6, 4, 3).double()
    nn.init.normal_(layer.weight)
    layer.quantize_weight, layer.quantize_activation = Thirds(1 / 3), Thirds(1 / 3)
    check_layer(layer, images())
    for wrong in (Thirds(0.3), Thirds(1 / 3, levels=2)):
        layer.quantize_weight = wrong
        with pytest.raises(
            ValueError, match="layer: its weight quantiser .Thirds. gives values that are not on the grid"
        ):
            weight_codes(layer)
    layer.quantize_weight = Thirds(1 / 3, levels=9)
    with pytest.raises(ValueError, match="gives no Grid of 1 to 8 bits"):
        weight_codes(layer)


def test_weights_that_are_not_finite_are_refused() -> None:
    layer = QuantConv2d(6, 4, 3, weight_bits=8)
    layer.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="stem.0: holds weights that are not finite"):
        weight_codes(layer, "stem.0")
