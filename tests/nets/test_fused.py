# SPDX-License-Identifier: Apache-2.0
"""The supernet on native kernels against the same supernet on plain convolutions, in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.nets import build_supernet
from common.nets.fused import fused_node
from common.nets.stacks import Bank, joined_node
from common.nets.supernet import Supernet
from common.quant.kernels import disabled, native
from tests.helpers.plain_supernet import PlainSupernet
from tests.helpers.saved import saved_bytes

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: the twins compute")

SETTINGS = {
    "pc-darts k=4 {2,4}": {"bits": (2, 4), "init_channels": 16},
    "pc-darts k=2 {2,4,8}": {"bits": (2, 4, 8), "partial": 2},
    "pc-darts k=4 {1,2,3,4}": {"bits": (1, 2, 3, 4)},
    "pc-darts k=4 {8,2}, 3 nodes": {"bits": (8, 2), "nodes": 3, "multiplier": 2},
    "pc-darts k=2 full precision": {"bits": None, "partial": 2},
    "darts {2,4}": {"bits": (2, 4), "method": "darts"},
    "darts full precision": {"bits": None, "method": "darts"},
    "pc-darts k=4 {2,4}, ImageNet's stem": {"bits": (2, 4), "stem": "imagenet", "image_size": 64},
}


def build(image_size: int = 16, **setting: Any) -> tuple[Supernet, Tensor, Tensor]:
    """A small supernet with a batch, the same every time."""
    torch.manual_seed(0)
    defaults = {"method": "pc-darts", "num_classes": 5, "init_channels": 8, "layers": 3}
    net = build_supernet(**(defaults | setting)).double()
    return net, torch.randn(3, 3, image_size, image_size, dtype=torch.float64), torch.tensor([0, 3, 4])


def results(net: Supernet, x: Tensor, y: Tensor, exact: bool = False) -> dict[str, Tensor]:
    """Logits, loss, gradients of all parameters (or second-order ones), buffers afterwards."""
    logits = net(x)
    loss = F.cross_entropy(logits, y)
    named = dict(net.named_parameters())
    if exact:
        first = torch.autograd.grad(loss, net.weight_parameters(), create_graph=True, allow_unused=True)
        loss = sum((g * g).sum() for g in first if g is not None)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {"logits": logits.detach(), "loss": loss.detach()}
    found |= {f"gradient of {n}": g for n, g in zip(named, gradients, strict=True) if g is not None}
    return found | {f"buffer {n}": b.clone() for n, b in net.named_buffers() if "running" in n or "maximum" in n}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], bound: float) -> None:
    """Within `bound` of each tensor's largest value."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not value.numel():
            continue
        size = other[name].abs().max().clamp_min(1e-6)
        assert (value - other[name]).abs().max() <= bound * size, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_state_of_a_cell(name: str, training: bool) -> None:
    """Output, every gradient, running statistics and ranges of the edges that leave a state, normal and reducing.

    State by state: discrete weights times discrete activations make equal pixels, which rounding tells apart in one
    order of summation and not in another, so that through a whole network in evaluation a maximum's gradient goes one
    way or the other, both rightly.
    """
    net, x, _ = build(**SETTINGS[name])
    net(x)  # running statistics and ranges that are no initial values
    bank = net._bank()
    weights = [w.detach().requires_grad_() for w in bank.weights]
    activation = None if bank.activation is None else bank.activation.detach().requires_grad_()
    bank = Bank(weights, activation)
    for place, number in ((0, 0), (1, 0), (1, net.nodes)):  # of a normal cell, entering and within a reducing one
        state = net.cells[place].states[number]
        x = torch.randn(3, net.cells[place].width, 8, 8, dtype=torch.float64, requires_grad=True)
        strengths = torch.rand(len(state.edges), len(net.primitives), dtype=torch.float64, requires_grad=True)
        leaves = [x, strengths, *weights, *([] if activation is None else [activation])]
        found = []
        for twin in (False, True):
            edges = copy.deepcopy(state).train(training)
            with disabled() if twin else nullcontext():
                out = edges(x, strengths, bank)
                gradients = torch.autograd.grad(out, leaves, out.detach().sin(), allow_unused=True)
            named = {f"gradient {k}": g for k, g in enumerate(gradients) if g is not None}
            buffers = {n: b.double() for n, b in edges.named_buffers() if b.numel()}
            found.append({"out": out.detach(), **named, **buffers})
        assert_same(*found, bound=1e-8)


@pytest.mark.parametrize("name", ["pc-darts k=2 full precision", "darts full precision", "pc-darts k=4 {2,4}"])
def test_a_whole_network(name: str) -> None:
    """Logits, loss, every gradient and running statistics in training."""
    found = []
    for twin in (False, True):
        net, *batch = build(**SETTINGS[name])
        with disabled() if twin else nullcontext():
            found.append(results(net, *batch))
    assert_same(*found, bound=1e-8)


@pytest.mark.parametrize("name", ["pc-darts k=4 {2,4}", "pc-darts k=2 {2,4,8}", "pc-darts k=2 full precision"])
def test_differentiated_twice(name: str) -> None:
    """The gradient of a gradient is the twin's, and nothing is counted twice by running statistics and ranges."""
    found = []
    for twins in (False, True):
        net, *batch = build(**SETTINGS[name])
        with net.side_pass(), disabled() if twins else nullcontext():
            found.append(results(net, *batch, exact=True))
    assert_same(*found, bound=1e-7)


@pytest.mark.parametrize("size", [(2, 5, 6), (3, 1, 1), (1, 1, 1), (1, 4, 1), (2, 1, 3)])
def test_a_node_in_all_its_forms(size: tuple[int, int, int]) -> None:
    """Sum, bypass and shuffle: contiguous and strided heads, with and without betas, both orders of gradients."""
    torch.manual_seed(0)
    batch, height, width = size
    wider = torch.randn(*size, 3, 4, dtype=torch.float64)  # pixels of three edges, of which a head is one
    state = torch.randn(*size, 12, dtype=torch.float64).permute(0, 3, 1, 2)
    heads = [wider[:, :, :, 1].permute(0, 3, 1, 2).detach().requires_grad_()]
    heads.append(torch.randn(batch, 4, height, width, dtype=torch.float64).requires_grad_())
    other = torch.randn(batch, 12, height, width, dtype=torch.float64)
    rests = [state.detach().requires_grad_(), other.requires_grad_()]
    betas = torch.rand(2, dtype=torch.float64, requires_grad=True)
    for given in (betas, None):
        leaves = [*heads, *rests, *([] if given is None else [given])]
        found, wanted = fused_node(heads, rests, given), joined_node(heads, rests, given)
        assert torch.allclose(found, wanted, atol=1e-13)
        gradient = torch.randn_like(wanted).requires_grad_()
        once = [torch.autograd.grad(out, leaves, gradient, create_graph=True) for out in (found, wanted)]
        plain = torch.autograd.grad(found, leaves, gradient, retain_graph=True)
        for a, b, c in zip(*once, plain, strict=True):
            assert torch.allclose(a, b, atol=1e-12) and torch.allclose(a, c, atol=1e-12)
        second = [
            torch.autograd.grad(sum(g.pow(2).sum() for g in some), [*leaves, gradient], allow_unused=True)
            for some in once
        ]
        for a, b in zip(*second, strict=True):
            zero = torch.zeros((), dtype=torch.float64)  # None: no such path
            assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-11)


@pytest.mark.parametrize("primitives", [("none", "max_pool_3x3"), ("none", "skip_connect"), ("sep_conv_3x3",)])
@pytest.mark.parametrize("scheme", ["default", "reference"])
def test_part_of_the_primitives(primitives: tuple[str, ...], scheme: str) -> None:
    """Spaces without separable convolutions or poolings, with 8 bits in either form."""
    found = []
    for twin in (False, True):
        net, x, y = build(bits=(2, 8), primitives=primitives, scheme=scheme)
        with disabled() if twin else nullcontext():
            found.append(results(net, x, y))
    assert_same(*found, bound=1e-8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", [None, (2, 4, 8)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_at_the_edge(value: float, bits: tuple[int, ...] | None, training: bool) -> None:
    """One huge or non-finite value in one pixel, one image all zero: the same values, no number at the same places."""
    net, x, _ = build(bits=bits)
    net(x)
    bank = net._bank()
    for place, number in ((0, 0), (1, 0)):
        state = net.cells[place].states[number]
        x = torch.randn(3, net.cells[place].width, 8, 8, dtype=torch.float64)
        x[0, 1, 3, 2], x[1] = value, 0.0
        x.requires_grad_()
        strengths = torch.rand(len(state.edges), len(net.primitives), dtype=torch.float64)
        found = []
        for twin in (False, True):
            edges = copy.deepcopy(state).train(training)
            with disabled() if twin else nullcontext():
                out = edges(x, strengths, bank)
                (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
            found.append((out.detach(), gradient))
        (out, gradient), (twins, twins_gradient) = found
        assert torch.equal(out.isfinite(), twins.isfinite())
        fine = twins.isfinite()
        size = twins[fine].abs().max().clamp_min(1e-6) if fine.any() else 1.0
        assert ((out - twins)[fine].abs() <= 1e-8 * size).all()
        # which elements it spreads to depends on the order of products with zero; that it is there must not be lost
        assert twins_gradient.isfinite().all() or not gradient.isfinite().all()


def test_the_mean_over_all_batches() -> None:
    """Running statistics of momentum None, by which a discrete architecture in the supernet is judged."""
    found = []
    for twin in (False, True):
        net, x, y = build(bits=(2, 4))
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        with disabled() if twin else nullcontext():
            net(x.flip(0))
            found.append(results(net, x, y))
    assert_same(*found, bound=1e-8)


@pytest.mark.parametrize("bits", [None, (2, 4)])
def test_no_image_at_all(bits: tuple[int, ...] | None) -> None:
    """An empty batch is left to PyTorch."""
    net, x, _ = build(bits=bits)
    with nullcontext() if bits is None else pytest.raises(RuntimeError):  # its plain quantisers do not reshape nothing
        assert net(x[:0]).shape == (0, 5)


def test_an_eighth_of_the_plain_memory() -> None:
    """Saved for the backward pass: codes in place of floats."""
    setting = {"method": "pc-darts", "bits": (2, 4), "num_classes": 5, "init_channels": 16, "layers": 3}
    fused, plain = build_supernet(**setting), PlainSupernet(**setting)
    x = torch.randn(8, 3, 16, 16)
    assert saved_bytes(fused, lambda: fused(x)) <= saved_bytes(plain, lambda: plain(x)) / 8
