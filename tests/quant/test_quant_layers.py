# SPDX-License-Identifier: Apache-2.0
"""Layers of fixed and of searched bits against plain convolutions of the operands quantised one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common import quant


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weight_bits, activation_bits", [(2, 4), (1, 3), (8, 2), (4, 8), (32, 32), (32, 4), (2, 32)])
@pytest.mark.parametrize("scheme", ["default", "reference"])
def test_fixed_bits(weight_bits: int, activation_bits: int, scheme: str) -> None:
    conv = quant.QuantConv2d(
        6, 4, 3, weight_bits=weight_bits, activation_bits=activation_bits, scheme=scheme, stride=2, padding=1, groups=2
    ).double()
    assert isinstance(conv, torch.nn.Conv2d)
    assert (conv.weight_bits, conv.activation_bits) == (weight_bits, activation_bits)
    x = normal(2, 6, 8, 8)
    names = ("hwgq", "gaussian") if scheme == "default" else ("reference", "reference")
    a = quant.quantize_activation(x, activation_bits, names[0])
    w = quant.quantize_weight(conv.weight, weight_bits, names[1])
    torch.testing.assert_close(conv(x), F.conv2d(a, w, stride=2, padding=1, groups=2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("quantizers", [{}, {"weight_quantizer": "lsq", "activation_quantizer": "lsq"}])
def test_narrow_strided_convolutions_on_dense_channels(quantizers: dict[str, str]) -> None:
    """torch's own kernel for this weight gradient overwrites memory; where it is used, this test ends the process."""
    bits = {"weight_bits": 8, "activation_bits": 8} if quantizers else {}
    conv = quant.QuantConv2d(8, 4, 1, stride=2, **bits, **quantizers).to(memory_format=torch.channels_last)
    x = normal(8, 8, 64, 64).float().contiguous(memory_format=torch.channels_last)
    for _ in range(5):
        out = conv(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        gradient = normal(*out.shape, seed=1).float()
        (found,) = torch.autograd.grad(out, conv.weight, gradient)
    value = (conv.quantize_activation(x) if quantizers else x)[:, :, ::2, ::2].double()
    wanted = torch.einsum("bohw,bihw->oi", gradient.double(), value)
    if not quantizers:
        torch.testing.assert_close(found[:, :, 0, 0].double(), wanted, rtol=1e-4, atol=1e-3)
    assert torch.isfinite(found).all()


def test_every_low_bit_activation_has_its_relu() -> None:
    """By default only the precision changes with the bits: negatives are zero at every width of 8 bits or fewer."""
    x = -normal(2, 6, 8, 8).abs() - 0.1
    for bits in (1, 2, 3, 4, 8):
        conv = quant.QuantConv2d(6, 4, 1, weight_bits=4, activation_bits=bits).double()
        assert conv(x).abs().max() == 0
    signed = quant.QuantConv2d(6, 4, 1, weight_bits=4, activation_bits=8, signed=True).double()
    assert signed(x).abs().max() > 0.1


def test_linear_with_signed_input() -> None:
    linear = quant.QuantLinear(6, 3, weight_bits=8, activation_bits=8, signed=True).double()
    x = normal(5, 6)
    scale = x.abs().max() / 127
    w_scale = linear.weight.abs().amax(1, keepdim=True) / 127
    expected = F.linear(torch.round(x / scale) * scale, torch.round(linear.weight / w_scale) * w_scale, linear.bias)
    torch.testing.assert_close(linear(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bits", [(2, 4), (2, 4, 8), (1, 2, 3, 4), (4, 32), (1, 2, 3, 4, 8, 32)])
@pytest.mark.parametrize("scheme", ["default", "reference"])
def test_mixture_is_the_sum_of_its_choices(bits: Sequence[int], scheme: str) -> None:
    conv = quant.MixedQuantConv2d(4, 6, 3, bits=tuple(bits), scheme=scheme, padding=1, groups=2).double()
    x = normal(2, 4, 6, 6)
    p_a, p_w = normal(len(bits), seed=1).softmax(0), normal(len(bits), seed=2).softmax(0)
    names = ("hwgq", "gaussian") if scheme == "default" else ("reference", "reference")
    a = sum(p * quant.quantize_activation(x, b, names[0]) for p, b in zip(p_a, bits, strict=True))
    w = sum(p * quant.quantize_weight(conv.weight, b, names[1]) for p, b in zip(p_w, bits, strict=True))
    torch.testing.assert_close(conv(x, p_a, p_w), F.conv2d(a, w, padding=1, groups=2), atol=1e-12, rtol=0)


def test_mixture_gradients() -> None:
    """Probabilities receive inner products with the quantised tensors, x what passes the masks."""
    bits = (2, 4)
    conv = quant.MixedQuantConv2d(4, 6, 1, bits=bits).double()
    x = normal(2, 4, 6, 6).requires_grad_()
    p_a = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    p_w = torch.tensor([0.6, 0.4], dtype=torch.float64, requires_grad=True)
    out = conv(x, p_a, p_w)
    upstream = normal(*out.shape, seed=3)
    (out * upstream).sum().backward()
    a = [quant.quantize_activation(x.detach(), b) for b in bits]
    w = [quant.quantize_weight(conv.weight.detach(), b) for b in bits]
    mixed_w = 0.6 * w[0] + 0.4 * w[1]
    to_activation = F.conv_transpose2d(upstream, mixed_w)
    torch.testing.assert_close(p_a.grad, torch.stack([(to_activation * one).sum() for one in a]), atol=1e-10, rtol=0)
    mixed_a = 0.3 * a[0] + 0.7 * a[1]
    to_weight = torch.einsum("bohw,bihw->oi", upstream, mixed_a)[..., None, None]
    torch.testing.assert_close(p_w.grad, torch.stack([(to_weight * one).sum() for one in w]), atol=1e-10, rtol=0)
    torch.testing.assert_close(conv.weight.grad, to_weight, atol=1e-10, rtol=0)
    inside = [((x.detach() >= 0) & (x.detach() <= top)).double() for top in (0.538 * 3, 0.185 * 15)]
    mask = 0.3 * inside[0] + 0.7 * inside[1]
    torch.testing.assert_close(x.grad, to_activation * mask, atol=1e-10, rtol=0)


@pytest.mark.parametrize("channels", [4, 8])
def test_mixture_under_autocast(channels: int) -> None:
    """The backward runs outside the autocast context, with a bfloat16 input and float32 probabilities."""
    mixture = quant.MixedActivation((2, 4), groups=2)
    # 4 channels are shared by both groups, 8 lie side by side
    x = normal(2, channels, 6, 6).bfloat16().requires_grad_()
    p = torch.tensor([[0.3, 0.7], [0.6, 0.4]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = quant.mix_levels(mixture.levels(x), p, 4, (2, 4))
    upstream = normal(*out.shape, seed=3)
    gradients = torch.autograd.grad((out.float() * upstream).sum(), (x, p))
    exact_x, exact_p = x.detach().float().requires_grad_(), p.detach().clone().requires_grad_()
    exact = (quant.mix_levels(mixture.levels(exact_x), exact_p, 4, (2, 4)) * upstream).sum()
    for found, wanted in zip(gradients, torch.autograd.grad(exact, (exact_x, exact_p)), strict=True):
        # single entries differ: bfloat16 rounds over the edge of a level or a bound
        assert F.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("scheme", ["default", "reference"])
def test_stacked_forms_equal_one_by_one(scheme: str) -> None:
    """The supernet's stacks: groups of channels with their own mixture, ranges and weights."""
    bits, groups, channels = (1, 2, 3, 4, 8, 32), 3, 4
    probabilities = normal(groups, len(bits), seed=5).softmax(-1)
    stacked = quant.MixedActivation(bits, groups=groups, scheme=scheme).double()
    x = normal(2, groups * channels, 6, 6) * torch.arange(1, 1 + groups * channels, dtype=torch.float64).view(
        1, -1, 1, 1
    )
    for step in range(2):
        x = x * (1 + step)
        whole = stacked(x, probabilities)
        if step == 0:
            alone = [quant.MixedActivation(bits, scheme=scheme).double() for _ in range(groups)]
        for g in range(groups):
            part = slice(g * channels, (g + 1) * channels)
            expected = alone[g](x[:, part], probabilities[g : g + 1])
            torch.testing.assert_close(whole[:, part], expected, atol=1e-12, rtol=0)
    w = normal(groups, 5, 2, 3, 3)
    for g in range(groups):
        expected = quant.mix_weights(w[g : g + 1], probabilities[g : g + 1], bits, scheme)
        torch.testing.assert_close(
            quant.mix_weights(w, probabilities, bits, scheme)[g : g + 1], expected, atol=1e-12, rtol=0
        )


def test_lsq_layers_hand_out_their_steps() -> None:
    conv = quant.QuantConv2d(
        4, 4, 1, weight_bits=4, activation_bits=4, weight_quantizer="lsq", activation_quantizer="lsq"
    ).double()
    conv(normal(2, 4, 5, 5)).sum().backward()
    steps = quant.step_parameters(conv)
    assert len(steps) == 2 and all(s.grad is not None and torch.isfinite(s.grad) for s in steps)


@pytest.mark.parametrize("bits", [5, 16, 0])
def test_bad_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=str(bits)):
        quant.QuantConv2d(4, 4, 1, weight_bits=bits, activation_bits=4)
    with pytest.raises(ValueError, match=str(bits)):
        quant.QuantConv2d(4, 4, 1, weight_bits=4, activation_bits=bits)


def test_bad_quantizer_name_is_refused() -> None:
    with pytest.raises(ValueError, match="lsqq"):
        quant.QuantConv2d(4, 4, 1, weight_bits=4, activation_bits=4, weight_quantizer="lsqq")
