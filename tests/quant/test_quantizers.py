# SPDX-License-Identifier: Apache-2.0
"""Every quantiser against the oracle's tables and, value by value and gradient by gradient, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import quant
from tests.helpers.fill import waves

HWGQ = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
GAUSS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.336}


def oracle_tensor(values: Any) -> Tensor:
    """An oracle's list in float64."""
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and the gradient of a weighted sum of it, divided by the weights (so a wrong broadcast shows)."""
    x = x.detach().clone().requires_grad_()
    weights = torch.linspace(1.0, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)
    y = function(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad / weights


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hwgq_table(oracle: Any, bits: int) -> None:
    tables = oracle("qdarts")["quantizers"]
    truth = tables[f"hwgq_{bits}bit"]
    y, gradient = value_and_gradient(lambda x: quant.quantize_activation(x, bits), oracle_tensor(tables["x"]))
    torch.testing.assert_close(y, oracle_tensor(truth["y"]), atol=1e-8, rtol=0)
    torch.testing.assert_close(gradient, oracle_tensor(truth["grad_of_sum"]), atol=1e-8, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_table(oracle: Any, bits: int) -> None:
    truth = oracle("qdarts")["quantizers"][f"gauss_{bits}bit"]
    y, gradient = value_and_gradient(lambda w: quant.quantize_weight(w, bits), 0.1 * waves((8, 4, 3, 3)))
    torch.testing.assert_close(y.flatten()[:32], oracle_tensor(truth["y_first32"]), atol=1e-8, rtol=0)
    assert y.sum().item() == pytest.approx(truth["sum"], abs=1e-8)
    assert y.abs().sum().item() == pytest.approx(truth["sum_abs"], abs=1e-8)
    levels = sorted({round(v, 12) for v in y.flatten().tolist()})
    assert levels == pytest.approx(truth["unique_levels"], abs=1e-11)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_reference_eight_bits_table(oracle: Any) -> None:
    tables = oracle("qdarts")["quantizers"]
    image, weight = waves((2, 4, 5, 5), "cos"), 0.1 * waves((8, 4, 3, 3))
    for name, x, y in (
        ("act8_posonly_input_relu", image.relu(), quant.quantize_activation(image.relu(), 8, "reference")),
        ("act8_signed_input", image, quant.quantize_activation(image, 8, "reference")),
        ("weight8", weight, quant.quantize_weight(weight, 8, "reference")),
    ):
        truth = tables[name]
        torch.testing.assert_close(y.flatten()[:32], oracle_tensor(truth["y_first32"]), atol=1e-8, rtol=0)
        assert y.sum().item() == pytest.approx(truth["sum"], abs=1e-8)
        assert (y - x).abs().max().item() == pytest.approx(truth["max_abs_err"], abs=1e-8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_hwgq_definition(bits: int) -> None:
    step, top = HWGQ[bits], HWGQ[bits] * (2**bits - 1)
    x = torch.cat([torch.linspace(-4, 4, 4001, dtype=torch.float64), oracle_tensor([0.0, top, -5e-10, 5e-10, -2e-9])])
    y, gradient = value_and_gradient(lambda v: quant.quantize_activation(v, bits), x)
    levels = step * torch.arange(2**bits, dtype=torch.float64)
    nearest = (x.unsqueeze(1) - levels).abs().min(dim=1).values
    torch.testing.assert_close((y - x).abs(), nearest, atol=1e-12, rtol=0)
    expected = ((x >= 0) & (x <= top) | (x.abs() < 1e-9)).double()
    assert torch.equal(gradient, expected)
    assert expected[-5:].tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_definition(bits: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    step = GAUSS[bits] * w.std()
    levels = step * (torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2)
    y, gradient = value_and_gradient(lambda v: quant.quantize_weight(v, bits), w)
    nearest = (w.unsqueeze(-1) - levels).abs().min(dim=-1).values
    torch.testing.assert_close((y - w).abs(), nearest, atol=1e-12, rtol=0)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_default_eight_bit_weight_is_symmetric_per_output_channel() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64) * torch.logspace(-3, 1, 6, dtype=torch.float64).view(6, 1, 1, 1)
    y, gradient = value_and_gradient(lambda v: quant.quantize_weight(v, 8), w)
    for out in range(6):
        scale = w[out].abs().max() / 127
        torch.testing.assert_close(y[out], torch.round(w[out] / scale) * scale, atol=1e-14, rtol=0)
        assert y[out].abs().max() == pytest.approx(w[out].abs().max().item())
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_default_eight_bit_activation() -> None:
    x = torch.linspace(-1, 3, 401, dtype=torch.float64).reshape(1, 1, 401, 1)
    y, gradient = value_and_gradient(lambda v: quant.quantize_activation(v, 8, maximum=2.0), x)
    scale = 2.0 / 255
    torch.testing.assert_close(y, torch.round(x.clamp(0, 2) / scale) * scale, atol=1e-12, rtol=0)
    assert torch.equal(gradient, ((x >= 0) & (x <= 2) | (x.abs() < 1e-9)).double())
    own, _ = value_and_gradient(lambda v: quant.quantize_activation(v, 8), x)
    given, _ = value_and_gradient(lambda v: quant.quantize_activation(v, 8, maximum=3.0), x)
    assert torch.equal(own, given)


def test_signed_activation_is_symmetric() -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    y, gradient = value_and_gradient(lambda v: quant.quantize_activation(v, 8, maximum=2.0, signed=True), x)
    scale = 2.0 / 127
    torch.testing.assert_close(y, torch.round(x.clamp(-2, 2) / scale) * scale, atol=1e-12, rtol=0)
    assert torch.equal(gradient, (x.abs() <= 2).double())
    assert torch.equal(quant.quantize_activation(-x, 8, maximum=2.0, signed=True), -y)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_tensors_stay_finite(bits: int, reference: bool, dtype: torch.dtype) -> None:
    """All-zero and constant tensors, one-element weights: no NaN in values or gradients."""
    w_scheme, a_scheme = ("reference", "reference") if reference else ("gaussian", "hwgq")
    for x in (
        torch.zeros(2, 3, 4, 4),
        torch.full((2, 3, 4, 4), 0.7),
        torch.full((1, 1, 1, 1), -0.3),
        torch.zeros(1, 1, 1, 1),
    ):
        for function in (
            lambda v: quant.quantize_activation(v, bits, a_scheme),
            lambda v: quant.quantize_weight(v, bits, w_scheme),
        ):
            y, gradient = value_and_gradient(function, x.to(dtype))
            assert y.dtype == dtype and y.shape == x.shape
            assert torch.isfinite(y).all() and torch.isfinite(gradient).all()


def test_full_precision_is_the_identity() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(quant.quantize_activation(x, 32), x)
    assert torch.equal(quant.quantize_weight(x, 32), x)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16, -2])
def test_other_bits_are_refused(bits: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=str(bits)):
        quant.quantize_activation(x, bits)
    with pytest.raises(ValueError, match=str(bits)):
        quant.quantize_weight(x, bits)


def test_unknown_schemes_are_refused() -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="nonsense"):
        quant.quantize_activation(x, 4, "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        quant.quantize_weight(x, 4, "nonsense")


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Default scheme, evaluation: 8-bit ranges are running ones, so a batch of one gives the same output."""
    torch.manual_seed(0)
    conv = quant.QuantConv2d(3, 4, 3, weight_bits=8, activation_bits=8).double()
    conv(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    conv.eval()
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x)[2:3], conv(x[2:3]), atol=1e-12, rtol=0)


def lsq_truth(x: Tensor, step: float, bits: int, signed: bool, numel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value, dvalue/dx and scaled dvalue/dstep, element by element, from equations 1 to 5 of the LSQ paper."""
    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    value, to_x, to_step = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    for i, v in enumerate((x / step).flatten().tolist()):
        inside = -q_n < v < q_p
        rounded = round(min(max(v, -q_n), q_p))
        value.view(-1)[i] = rounded * step
        to_x.view(-1)[i] = float(inside)
        to_step.view(-1)[i] = rounded - v if inside else (-q_n if v <= -q_n else q_p)
    return value, to_x, to_step / (numel * q_p) ** 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weight", [False, True])
def test_lsq_equals_the_paper(bits: int, weight: bool) -> None:
    torch.manual_seed(bits)
    registry = quant.WEIGHT_QUANTIZERS if weight else quant.ACTIVATION_QUANTIZERS
    quantizer = registry["lsq"](bits, signed=weight).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    x = x if weight else x + 0.5
    quantizer(x)  # the first tensor sets the step
    q_p = 2 ** (bits - 1) - 1 if weight else 2**bits - 1
    assert quantizer.step.item() == pytest.approx((2 * x.abs().mean() / q_p**0.5).item())
    x = (torch.randn(3, 4, 5, 5, dtype=torch.float64) * 2).requires_grad_()
    upstream = torch.randn_like(x)
    y = quantizer(x)
    (y * upstream).sum().backward()
    numel = x.numel() if weight else x[0].numel()
    value, to_x, to_step = lsq_truth(x.detach(), quantizer.step.item(), bits, weight, numel)
    torch.testing.assert_close(y.detach(), value, atol=1e-10, rtol=0)
    torch.testing.assert_close(x.grad, upstream * to_x, atol=1e-12, rtol=0)
    assert quantizer.step.grad.item() == pytest.approx((upstream * to_step).sum().item(), rel=1e-10)


@pytest.mark.parametrize("bits", [1, 32, 5])
def test_lsq_refuses(bits: int) -> None:
    with pytest.raises(ValueError, match=str(bits)):
        quant.ACTIVATION_QUANTIZERS["lsq"](bits)


def test_running_range() -> None:
    """Set by the first batch, factor .1 afterwards, still in evaluation and inside `frozen_ranges`."""
    ranges = quant.RunningMaximum().double()
    batch = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    batch[..., 0, 0] = 4.0
    assert ranges(batch).item() == 4.0
    assert ranges(batch * 2).item() == pytest.approx(0.9 * 4 + 0.1 * 8)
    with quant.frozen_ranges(ranges):
        assert ranges(batch * 100).item() == pytest.approx(4.4)
    ranges.eval()
    assert ranges(batch * 100).item() == pytest.approx(4.4)
    ranges.train()
    assert ranges(batch).item() == pytest.approx(0.9 * 4.4 + 0.1 * 4)


def test_the_largest_value_lies_inside_its_own_range() -> None:
    """Bounds are inclusive: rounding of the scale must not shut the maximum out (values where it would, often)."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for _ in range(50):
            x = torch.rand(2, 3, 4, 4, generator=generator, dtype=dtype)
            x[0, :, 0, 0] = 0.0
            for scheme in ("hwgq", "reference"):
                _, gradient = value_and_gradient(lambda v, s=scheme: quant.quantize_activation(v, 8, s), x)
                assert torch.allclose(gradient, torch.ones_like(gradient))
