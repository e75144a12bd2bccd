# SPDX-License-Identifier: Apache-2.0
"""Binary, ternary and k-bit quantisers against the oracle's tables, their definitions, and inside the layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common import quant
from common.quant.quantizers import make_quantizer
from tests.quant.test_quantizers import value_and_gradient

CASES = {
    "binary_tanh(weights and activations)": [("weight", "binary", 1), ("activation", "binary", 1)],
    "ternary_weight": [("weight", "ternary", 2)],
    "ternary_activation": [("activation", "ternary", 2)],
    **{f"kbit_quantize_and_tanh_nb{b}": [("weight", "kbit", b), ("activation", "kbit", b)] for b in (1, 2, 3, 4, 8)},
    **{f"kbit_relu_nb{b}": [("activation", "kbit-relu", b)] for b in (2, 4, 8)},
}


def registered(kind: str, name: str, bits: int) -> Any:
    """The quantiser of that name from the registry of weights or of activations."""
    registry = quant.WEIGHT_QUANTIZERS if kind == "weight" else quant.ACTIVATION_QUANTIZERS
    return make_quantizer(registry, name, bits)


@pytest.mark.parametrize("table", CASES)
def test_tables(oracle: Any, table: str) -> None:
    tables = oracle("enas_qnn_quantizers")
    x = torch.tensor(tables["x"], dtype=torch.float64)
    for kind, name, bits in CASES[table]:
        y, gradient = value_and_gradient(registered(kind, name, bits), x)
        assert y.tolist() == tables[table]["y"], (kind, name)
        torch.testing.assert_close(gradient.tolist(), tables[table]["grad"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_kbit_is_the_nearest_level(bits: int) -> None:
    m = 2 ** (bits - 1)
    levels = torch.arange(-m, m, dtype=torch.float64) / m
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    y, gradient = value_and_gradient(partial(quant.kbit, bits=bits), x)
    torch.testing.assert_close((y - x).abs(), (x[:, None] - levels).abs().amin(1), atol=1e-12, rtol=0)
    assert set(y.tolist()) == set(levels.tolist())
    # a weight at its lowest or highest level goes on learning
    _, at_levels = value_and_gradient(partial(quant.kbit, bits=bits), levels)
    torch.testing.assert_close(at_levels, torch.ones_like(levels), atol=1e-12, rtol=0)
    assert not gradient[(x < -1 - 0.51 / m) | (x > 1 - 0.49 / m)].any()


def test_stochastic_binary_follows_its_probability() -> None:
    torch.manual_seed(0)
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 3.0])
    n = 40_000
    drawn = quant.stochastic_binary(x.expand(n, -1))
    p = ((x + 1) / 2).clamp(0, 1)
    share = (drawn > 0).float().mean(0)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    # four standard deviations of a binomial share; certain outcomes have none
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all(), share
    _, gradient = value_and_gradient(quant.stochastic_binary, x.double())
    torch.testing.assert_close(gradient, torch.ones_like(gradient), atol=1e-12, rtol=0)


def test_stochastic_binary_is_the_sign_in_evaluation() -> None:
    layer = registered("activation", "stochastic", 1)
    x = torch.linspace(-1, 1, 101)
    layer.eval()
    assert torch.equal(layer(x), quant.binary(x))
    layer.train()
    torch.manual_seed(3)
    assert not torch.equal(layer(x), quant.binary(x))


@pytest.mark.parametrize(("name", "bits"), [("binary", 1), ("stochastic", 1), ("ternary", 2), ("kbit", 4)])
def test_not_a_number_is_not_hidden(name: str, bits: int) -> None:
    x = torch.tensor([0.7, float("nan"), -0.2])
    y = registered("activation", name, bits)(x)
    assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("name", "bits"), [("binary", 2), ("stochastic", 2), ("ternary", 1), ("kbit", 9), ("kbit", 0)])
def test_bits_that_a_quantiser_does_not_have(name: str, bits: int) -> None:
    with pytest.raises(ValueError, match=str(bits)):
        registered("weight", name, bits)


@pytest.mark.parametrize(("name", "bits"), [("binary", 1), ("ternary", 2), ("kbit", 5)])
def test_convolution_of_quantised_operands(name: str, bits: int) -> None:
    torch.manual_seed(1)
    conv = quant.QuantConv2d(
        3, 4, 3, padding=1, weight_bits=bits, activation_bits=bits, weight_quantizer=name, activation_quantizer=name
    )
    with torch.no_grad():
        conv.weight.uniform_(-1.5, 1.5)
    x = torch.randn(2, 3, 6, 6)
    found = conv(x)
    expected = F.conv2d(
        registered("activation", name, bits)(x), registered("weight", name, bits)(conv.weight), padding=1
    )
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    outside = conv.weight.detach().abs() > 1 + 2.0**-bits
    assert bool(conv.weight.grad[outside].any()) == (name == "ternary")  # a ternary weight is never cut off
