# SPDX-License-Identifier: Apache-2.0
"""Calibrated quantisers against numbers worked out by hand, published steps, and a search written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.quant import (
    ACTIVATION_QUANTIZERS,
    CALIBRATED_METHODS,
    GAUSSIAN_STEP,
    WEIGHT_QUANTIZERS,
    CalibratedQuantizer,
    QuantConv2d,
)
from common.quant.calibrated import linear_quantize, log_quantize, minmax_quantize, tanh_quantize
from common.quant.quantizers import make_quantizer


def assert_values(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6, rtol=1e-6)


def calibrated(registry: dict, method: str, bits: int, samples: Tensor, rate: float = 0.0) -> CalibratedQuantizer:
    return make_quantizer(registry, method, bits).calibrate(samples, rate)


# ---- the four of the reference, by hand


def test_linear_by_hand() -> None:
    x = torch.tensor([0.3, -1.5, 3.0, 0.9])
    # largest 3 -> I = 2, step 2^(2-3+1) = 1: floor(x + .5), clipped to -4 .. 3; -1.5 goes up
    assert_values(linear_quantize(x, 3), [0, -1, 3, 1])
    # one of four may overflow: 1.5 -> I = 1, step .5, and 3 is clipped to 3 steps
    assert_values(linear_quantize(x, 3, overflow_rate=0.25), [0.5, -1.5, 1.5, 1])
    # int(.49 x 4) = 1: the same rank
    assert_values(linear_quantize(x, 3, overflow_rate=0.49), [0.5, -1.5, 1.5, 1])


def test_linear_at_powers_of_two() -> None:
    # ceil(log2 2) = 1 exactly: step 2^(1-2+1) = 1, levels -2 .. 1
    assert_values(linear_quantize(torch.tensor([2.0, -2.0, 0.4, -0.6]), 2), [1, -2, 0, -1])
    for exponent in range(-20, 20):
        for mantissa, more in ((1.0, 0), (1.0000001, 1), (1.5, 1), (1.9999999, 1)):
            value = mantissa * 2.0**exponent
            found = calibrated(WEIGHT_QUANTIZERS, "linear", 4, torch.tensor([value, -value / 3]))
            assert found.high == 2.0 ** (exponent + more) and found.low == -found.high


def test_minmax_by_hand() -> None:
    # 3 steps of 1 between -1 and 2; a tie goes up
    assert_values(minmax_quantize(torch.tensor([-1, 0, 0.4, 0.5, 2]), 2), [-1, 0, 0, 1, 2])
    # 7 steps of 1 / 7
    assert_values(minmax_quantize(torch.tensor([0, 0.2, 0.6, 1]), 3), [0, 1 / 7, 4 / 7, 1])


def test_log_by_hand() -> None:
    # 3 bits: the sign, and minmax at 2 bits of the logarithms 0, 1, 3, 1.2: steps of 1
    x = torch.tensor([1.0, -math.e, math.e**3, -math.exp(1.2)])
    assert_values(log_quantize(x, 3), [1, -math.e, math.e**3, -math.e])
    # a zero counts as ln 1e-20 = -46.05 and stays zero: one step of 46.05 for what is left at 2 bits
    assert_values(log_quantize(torch.tensor([0.0, 1.0, -0.5, 1e-15]), 2), [0, 1, -1, 1e-20])


def test_tanh_by_hand() -> None:
    # 2 bits: tanh on -1, -1/3, 1/3, 1; artanh(1/3) = ln(2) / 2; the ends stand for 5/6: artanh = ln(11) / 2
    x = torch.tensor([math.atanh(0.5), 0.0, -10.0, 10.0, math.atanh(-0.4)])
    inner, outer = math.log(2) / 2, math.log(11) / 2
    assert_values(tanh_quantize(x, 2), [inner, inner, -outer, outer, -inner])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_middle_of_two_levels_goes_up_in_any_precision(bits: int, dtype: torch.dtype) -> None:
    """Zeros above all, which a ReLU leaves many of: the middle of an odd number of steps around it."""
    steps = 2**bits - 1
    upper = 1 / steps  # of the two levels around zero, which tanh takes back by artanh
    assert_values(tanh_quantize(torch.zeros(3, dtype=dtype), bits), [math.atanh(upper)] * 3)
    for bound in (1.0, 0.37, 3e5):
        x = torch.tensor([-bound, 0.0, -0.0, bound], dtype=dtype)
        found = minmax_quantize(x, bits).double().numpy() / x[-1].item()
        np.testing.assert_allclose(found, [-1, upper, upper, 1], atol=1e-6)  # 8 bits: upper is 4e-3
    # every middle that is a number of the type: steps of 2 between 0 and twice their number
    middles = torch.arange(1, 2 * steps, 2, dtype=dtype)
    found = minmax_quantize(torch.cat([torch.tensor([0, 2 * steps], dtype=dtype), middles]), bits)[2:]
    assert_values(found, [float(middle + 1) for middle in range(1, 2 * steps, 2)])


# ---- mse and percentile


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_finds_the_published_steps_of_a_gaussian(bits: int) -> None:
    w = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    found = calibrated(WEIGHT_QUANTIZERS, "mse", bits, w)
    assert (2 * found.high / (2**bits - 1)).item() == pytest.approx(GAUSSIAN_STEP[bits], rel=0.03)


def test_mse_is_the_least_error_over_all_ranges() -> None:
    """Written another way: numpy, levels listed, the nearest one by distance."""
    rng = np.random.default_rng(1)
    for samples in (rng.standard_t(3, size=300), rng.gamma(2.0, size=300)):
        signed = samples.min() < 0
        errors = []
        for share in np.arange(1, 101) / 100:
            low, high = share * min(samples.min(), 0), share * samples.max()
            step = (high - low) / 7
            levels = (np.arange(8) - np.round(-low / step)) * step
            errors.append((np.abs(samples[:, None] - levels).min(1) ** 2).sum())
        x = torch.from_numpy(samples)
        found = calibrated(ACTIVATION_QUANTIZERS, "mse", 3, x)
        assert ((found(x) - x) ** 2).sum().item() == pytest.approx(min(errors), rel=1e-9)
        assert found.low.item() < 0 if signed else found.low.item() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student", "relu"])
def test_mse_is_no_worse_than_minmax(kind: str, bits: int) -> None:
    rng = np.random.default_rng(2)
    heavy = {"laplace": rng.laplace(size=(8, 900)), "student": rng.standard_t(3, size=(8, 900))}  # 3: finite variance
    draw = heavy.get(kind, rng.standard_normal((8, 900)))
    x = torch.from_numpy(np.maximum(draw, 0) if kind == "relu" else draw)
    for registry in (ACTIVATION_QUANTIZERS, *([WEIGHT_QUANTIZERS] if kind != "relu" else [])):
        mse, minmax = (((calibrated(registry, name, bits, x)(x) - x) ** 2).mean() for name in ("mse", "minmax"))
        assert mse <= minmax


def test_percentile_leaves_out_its_share() -> None:
    weights = torch.arange(100.0).view(1, 100)
    found = calibrated(WEIGHT_QUANTIZERS, "percentile", 4, weights, 0.05)
    assert (found.low.item(), found.high.item()) == (-94, 94)  # rank 5 of 99, 98, 97, ...
    found = calibrated(ACTIVATION_QUANTIZERS, "percentile", 4, weights, 0.05)
    assert (found.low.item(), found.high.item()) == (0, 94)
    found = calibrated(ACTIVATION_QUANTIZERS, "percentile", 4, weights - 50, 0.05)
    assert (found.low.item(), found.high.item()) == (-48, 47)  # int(.025 x 100) = 2 at either end


def test_affine_levels_by_hand() -> None:
    found = calibrated(ACTIVATION_QUANTIZERS, "percentile", 2, torch.tensor([-0.9, 2.1]))
    # step 1, zero point round(.9) = 1: levels -1, 0, 1, 2
    assert_values(found(torch.tensor([-5, -0.6, -0.4, 0, 0.4, 1.4, 1.6, 9])), [-1, -1, 0, 0, 0, 1, 2, 2])


def test_each_output_channel_of_a_weight_has_its_own_grid() -> None:
    w = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([1, 10, 0]).view(3, 1, 1, 1)
    for method in ("mse", "percentile"):
        found = calibrated(WEIGHT_QUANTIZERS, method, 3, w)
        assert found.high.shape == (3, 1, 1, 1)
        alone = calibrated(WEIGHT_QUANTIZERS, method, 3, w[1:2])
        torch.testing.assert_close(found(w)[1:2], alone(w[1:2]))
        ten = calibrated(WEIGHT_QUANTIZERS, method, 3, w[:1] * 10)
        torch.testing.assert_close(ten.high, 10 * found.high[:1])
        assert all(len(channel.unique()) <= 8 for channel in found(w))
        assert found(w)[2].abs().max() < 1e-9  # a dead channel stays dead, and finite


# ---- what all of them have in common


@pytest.mark.parametrize("method", CALIBRATED_METHODS)
@pytest.mark.parametrize("registry", [WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS], ids=["weights", "inputs"])
def test_every_method_is_finite_has_few_levels_and_can_be_saved(registry: dict, method: str) -> None:
    for samples in (torch.randn(4, 50), torch.zeros(4, 50), torch.full((4, 50), 0.7), torch.randn(4, 50).relu()):
        for bits in (2, 3, 8):
            found = calibrated(registry, method, bits, samples, 0.01)
            x = torch.cat([samples, 3 * samples - 1])[:4] if not found.per_channel else samples
            value = found(x)
            assert value.isfinite().all() and value.dtype == x.dtype
            assert len(value[0].unique()) <= 2**bits + (method == "log")  # zero beside the signed levels
            again = make_quantizer(registry, method, bits)
            again.load_state_dict(found.state_dict())
            assert torch.equal(again(x), value)


def test_a_layer_takes_up_the_shapes_of_what_was_saved() -> None:
    layer, other = (
        QuantConv2d(3, 5, 3, weight_bits=4, activation_bits=4, weight_quantizer="mse", activation_quantizer="mse")
        for _ in range(2)
    )
    x = torch.randn(2, 3, 8, 8)
    layer.quantize_weight.calibrate(layer.weight)
    layer.quantize_activation.calibrate(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_uncalibrated_is_visible_and_one_bit_is_refused() -> None:
    assert make_quantizer(ACTIVATION_QUANTIZERS, "mse", 4)(torch.ones(2)).isnan().all()
    assert isinstance(make_quantizer(ACTIVATION_QUANTIZERS, "mse", 32), torch.nn.Identity)
    with pytest.raises(ValueError, match="at least 2"):
        make_quantizer(WEIGHT_QUANTIZERS, "mse", 1)


def test_bfloat16_counts_in_full_precision() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = calibrated(ACTIVATION_QUANTIZERS, "mse", 8, x.float())
    assert torch.equal(found(x), found(x.float()).bfloat16())
