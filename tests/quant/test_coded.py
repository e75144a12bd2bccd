# SPDX-License-Identifier: Apache-2.0
"""Convolutions that keep codes: values, gradients of both orders and memory, against formulas written out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import quant
from common.nets import Architecture, BitPolicy, build_network
from common.quant import kernels
from common.quant.coded import coded_convolution
from genotypes import Genotype

STEP = {1: 0.799, 2: 0.538, 3: 0.3217, 4: 0.185}
MAXIMUM = 2.0
SPECIAL = [0.0, -0.0, 1e-10, -1e-10, 1e30, -1e30, float("inf"), -float("inf"), MAXIMUM, 1.614, 2.775]
# in, out, kernel, stride, padding, dilation, groups
SHAPES = {
    "depthwise": (8, 8, 3, 1, 1, 1, 8),
    "depthwise halved": (8, 8, 5, 2, 2, 1, 8),
    "depthwise dilated": (7, 7, 5, 1, 4, 2, 7),
    "depthwise 7": (5, 5, 7, 1, 3, 1, 5),
    "depthwise 9": (4, 4, 9, 1, 4, 1, 4),
    "pointwise": (8, 6, 1, 1, 0, 1, 1),
    "pointwise halved": (8, 6, 1, 2, 0, 1, 1),
    "dense": (8, 6, 3, 2, 1, 1, 1),
    "grouped": (8, 8, 3, 1, 1, 1, 2),
    "one channel": (1, 4, 3, 1, 1, 1, 1),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(x: Tensor, bits: int) -> Tensor:
    """Quantised x."""
    if bits == 8:
        return (x / (MAXIMUM / 255)).round().clamp(0, 255) * (MAXIMUM / 255)
    return (x.clamp(0, STEP[bits] * (2**bits - 1)) / STEP[bits]).round() * STEP[bits]


def quantised(x: Tensor, bits: int, relu: bool) -> Tensor:
    """Quantised x that passes its gradient between the bounds; a ReLU shuts it at zero."""
    top = MAXIMUM if bits == 8 else STEP[bits] * (2**bits - 1)
    inside = ((x > 0) if relu else (x > -1e-9)) & (x <= top)
    through = torch.where(inside, x, 0.0)
    return through + (level(torch.where(x.abs() == float("inf"), x.sign() * 1e30, x), bits) - through).detach()


def expected(x: Tensor, weight: Tensor, p: Tensor | None, bits: Sequence[int], relu: bool, shape: Sequence[int]) -> Any:
    """The convolution, plainly."""
    levels = [quantised(x, b, relu) for b in bits]
    mixed = levels[0] if p is None else sum(weight_ * one for weight_, one in zip(p[0], levels, strict=True))
    return F.conv2d(mixed, weight, None, *shape[3:])


def coded(x: Tensor, weight: Tensor, p: Tensor | None, bits: tuple[int, ...], relu: bool, shape: Sequence[int]) -> Any:
    """The same by the function under test."""
    stride, padding, dilation, groups = shape[3:]
    maximum = torch.tensor(MAXIMUM, dtype=x.dtype) if 8 in bits else None
    more = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return coded_convolution(x, weight, bits=bits, probabilities=p, maximum=maximum, relu=relu, **more)


def inputs(shape: Sequence[int], bits: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """x with special values, weight, and probabilities where there are several bit-widths."""
    channels, out, kernel, groups = shape[0], shape[1], shape[2], shape[6]
    x = (1.5 * normal(3, channels, 9, 9)).to(dtype)
    x[0, 0].view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)
    tensors = [x.to(memory_format=torch.channels_last), normal(out, channels // groups, kernel, kernel, seed=1)]
    if len(bits) > 1:
        tensors.append(normal(1, len(bits), seed=2).softmax(1))
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def compute(function: Callable[..., Tensor], tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Output and gradients of all inputs."""
    x, weight, *p = tensors
    y = function(x, weight, p[0] if p else None, *rest)
    return [y.detach(), *torch.autograd.grad(y, tensors, normal(*y.shape, seed=3).to(y.dtype))]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [(1,), (2,), (4,), (8,), (2, 4), (4, 2), (1, 2, 3, 4), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name: str, bits: tuple[int, ...], native: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        for relu in (False, True):
            tensors = inputs(SHAPES[name], bits, dtype)
            want = compute(expected, tensors, bits, relu, SHAPES[name])
            if native:
                found = compute(coded, tensors, bits, relu, SHAPES[name])
            else:
                with kernels.disabled():
                    found = compute(coded, tensors, bits, relu, SHAPES[name])
            for one, other in zip(found, want, strict=True):
                torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bits", [(4,), (8,), (2, 4), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("name", ["depthwise", "pointwise halved", "dense"])
def test_gradients_of_gradients(name: str, bits: tuple[int, ...]) -> None:
    """Along random directions, the upstream gradient's own included; x also leads to the probabilities."""

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        x, weight, *p = inputs(SHAPES[name], bits, torch.float64)
        x = x.detach().clamp(-9, 9).requires_grad_()  # 0 times infinity is no gradient to compare
        source = [x, weight, *p]
        if p:
            x = x * (1 + p[0][0, 0])  # what the activation depends on must not be counted twice
        y = function(x, weight, p[0] if p else None, bits, True, SHAPES[name])
        upstream = normal(*y.shape, seed=3).requires_grad_()
        first = torch.autograd.grad(y, source, upstream, create_graph=True)
        total = sum((g * normal(*g.shape, seed=4)).sum() for g in first)
        return list(torch.autograd.grad(total, [*source, upstream], materialize_grads=True))

    for found, want in zip(second(coded), second(expected), strict=True):
        torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bits", [(2,), (8,), (2, 4)], ids=str)
def test_not_a_number_stays_visible_and_takes_no_gradient(bits: tuple[int, ...]) -> None:
    x = normal(2, 20, 4, 4)
    x[1, 3, 2, 1] = float("nan")
    p = torch.full((1, len(bits)), 1 / len(bits), dtype=torch.float64) if len(bits) > 1 else None
    weight, x = torch.ones(20, 1, 1, 1, dtype=torch.float64), x.requires_grad_()
    y = coded(x, weight, p, bits, False, (20, 20, 1, 1, 0, 1, 20))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.isnan(), x.isnan()) and gradient[1, 3, 2, 1] == 0 and gradient.isfinite().all()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, weight, p = inputs(SHAPES["depthwise"], (2, 4), torch.float64)
    want = compute(expected, [x, weight, p], (2, 4), False, SHAPES["depthwise"])[1:]
    for position, tensor in enumerate((x, weight, p)):
        frozen = [t.detach() for t in (x, weight, p)]
        frozen[position] = tensor
        y = coded(*frozen, (2, 4), False, SHAPES["depthwise"])
        (found,) = torch.autograd.grad(y, tensor, normal(*y.shape, seed=3))
        torch.testing.assert_close(found, want[position], atol=1e-11, rtol=1e-11)


# ------------------------------------------------------------------------------------------------------- whole networks

GENOTYPE = Genotype(
    normal=(("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("skip_connect", 0), ("sep_conv_5x5", 2)),
    normal_concat=(2, 3),
    reduce=(("max_pool_3x3", 0), ("sep_conv_3x3", 1), ("skip_connect", 1), ("conv_7x1_1x7", 2)),
    reduce_concat=(2, 3),
)


def network(bits: tuple[int, int] | None, **options: Any) -> nn.Module:
    """A small evaluation network in training mode."""
    torch.manual_seed(0)
    policy = BitPolicy(uniform=bits) if bits else None
    architecture = Architecture(GENOTYPE, bits=policy)
    return build_network(architecture, num_classes=10, init_channels=4, layers=4, **options).train()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages kept for the backward pass, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def test_a_quantised_training_step_keeps_half_of_a_full_precision_one() -> None:
    x = torch.randn(8, 3, 16, 16)
    full = saved_bytes(network(None), x)
    assert saved_bytes(network((2, 4)), x) < 0.6 * full
    assert saved_bytes(network((8, 8)), x) < 0.75 * full
    learned = network((4, 4), weight_quantizer="lsq", activation_quantizer="lsq")
    assert saved_bytes(learned, x) < 1.1 * full  # its step's gradient needs the activation itself


@pytest.mark.parametrize("bits, quantizers", [((2, 4), ""), ((8, 8), ""), ((4, 2), "lsq")])
def test_a_network_trains_the_same_with_and_without_kernels(bits: tuple[int, int], quantizers: str) -> None:
    options = {"weight_quantizer": "lsq", "activation_quantizer": "lsq"} if quantizers else {}
    x, labels = normal(4, 3, 16, 16), torch.arange(4)

    def step() -> list[Tensor]:
        model = network(bits, **options).double()
        logits = model(x)[0]
        F.cross_entropy(logits, labels).backward()
        evaluated = model.eval()(x)[0]
        buffers = [b.double() for b in model.buffers()]
        return [logits.detach(), evaluated.detach(), *(p.grad for p in model.parameters()), *buffers]

    found = step()
    with kernels.disabled():
        want = step()
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_layer_after_a_relu(bits: int) -> None:
    """`relu` says what a ReLU before the layer says; where nothing is gained by it the layer's inputs stay visible."""
    conv = quant.QuantConv2d(6, 4, 1, weight_bits=bits, activation_bits=bits, bias=True).double()
    other = quant.QuantConv2d(6, 4, 1, weight_bits=bits, activation_bits=bits, bias=True).double()
    other.load_state_dict(conv.state_dict())
    x = normal(2, 6, 5, 5)
    x[0, 0, 0, :3] = 0.0
    given, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = conv(given, relu=True), other(F.relu(plain))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    a.square().sum().backward(), b.square().sum().backward()
    torch.testing.assert_close(given.grad, plain.grad, atol=1e-11, rtol=0)
    assert conv.folds_relu == (bits != 32)
