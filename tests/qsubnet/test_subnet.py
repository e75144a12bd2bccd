# SPDX-License-Identifier: Apache-2.0
"""The network under bit search: EdMIPS's gradients by finite differences, its complexity by hand, one-hot logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.cost import network_cost
from common.nets import Architecture, build_network, load_architecture
from common.quant import QuantConv2d
from genotypes import Genotype, lookup
from qsubnet.cost import SubnetCost
from qsubnet.subnet import OPERANDS, SearchedConv2d, Subnet

# Two separable convolutions a normal cell, pooling elsewhere: few convolutions, every kind of cell.
TINY = Genotype(
    normal=(("sep_conv_3x3", 0), ("skip_connect", 1)),
    normal_concat=(2,),
    reduce=(("max_pool_3x3", 0), ("skip_connect", 1)),
    reduce_concat=(2,),
)
BUILD = {"in_channels": 1, "num_classes": 10, "init_channels": 4, "layers": 3}


def subnet_of(bits: tuple[int, ...] = (2, 4), genotype: Genotype = TINY, **more: object) -> Subnet:
    torch.manual_seed(0)
    return Subnet(build_network(genotype, **BUILD), bits, **more)


def randomize(subnet: Subnet, spread: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for logits in subnet.gamma_parameters():
            logits.copy_(spread * torch.randn(logits.shape, generator=generator))


def prefer(conv: SearchedConv2d, weight: int, activation: int) -> None:
    """Logits so far apart that the softmax is exactly one-hot."""
    with torch.no_grad():
        for operand, bits in (("weight", weight), ("activation", activation)):
            chosen = torch.tensor([b == bits for b in conv.bits])
            getattr(conv, f"gamma_{operand}").copy_(torch.where(chosen, 0.0, -1e4))


@pytest.mark.parametrize("bits", [(2, 4), (4, 2), (2, 4, 8), (1, 2, 3, 4), (2, 32)])
def test_gradients_of_the_logits_are_finite_differences(bits: tuple[int, ...]) -> None:
    """The mixture is linear in the probabilities, so a smooth loss is smooth in both operands' logits."""
    torch.manual_seed(0)
    conv = SearchedConv2d(QuantConv2d(4, 6, 3, padding=1, groups=2), bits, scheme="default", signed_activations=False)
    conv.double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    conv(x)  # sets the range of 8 bits, which evaluation leaves alone
    conv.eval()
    logits = [conv.gamma_weight, conv.gamma_activation]
    with torch.no_grad():
        for one in logits:
            one.copy_(torch.randn(len(bits)))

    def loss() -> Tensor:
        return conv(x).tanh().pow(2).sum()

    found = torch.autograd.grad(loss(), logits)
    for one, gradient in zip(logits, found, strict=True):
        for k in range(len(bits)):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    one[k] += sign * 1e-6
                    sides.append(loss().item())
                    one[k] -= sign * 1e-6
            assert gradient[k].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bits", [(2, 4), (2, 4, 8), (3, 8), (4, 32)])
@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
        {"kernel_size": 5, "padding": 4, "dilation": 2},
        {"kernel_size": (1, 7), "padding": (0, 3), "stride": (1, 2)},
    ],
)
def test_one_hot_logits_give_the_fixed_bit_convolution(bits: tuple[int, ...], shape: dict[str, object]) -> None:
    x = torch.randn(2, 4, 9, 9)
    for pair in ((bits[0], bits[-1]), (bits[-1], bits[0])):
        torch.manual_seed(0)
        fixed = QuantConv2d(4, 8, **shape, weight_bits=pair[0], activation_bits=pair[1])
        conv = SearchedConv2d(fixed, bits, scheme="default", signed_activations=False)
        assert conv.weight is fixed.weight
        prefer(conv, *pair)
        for training in (True, False):
            results = []
            for layer in (fixed.train(training), conv.train(training)):
                inputs = x.clone().requires_grad_()
                out = layer(inputs)
                gradients = torch.autograd.grad(out.pow(2).sum(), (inputs, layer.weight))
                results.append((out, *gradients))
            for theirs, ours in zip(*results, strict=True):
                assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_every_tensor_of_the_network_stays() -> None:
    """By name and by identity, so that a training's checkpoint fits and the optimiser trains what was loaded."""
    torch.manual_seed(0)
    network = build_network(lookup("DARTS_V2")[1], **BUILD)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in network.named_parameters()}
    buffers = set(dict(network.named_buffers()))
    subnet = Subnet(network, (2, 4, 8))
    after = dict(network.named_parameters())
    added = {f"{name}.gamma_{operand}" for name in subnet.convolutions for operand in OPERANDS}
    assert after.keys() == before.keys() | added
    for name, (address, values) in before.items():
        assert torch.equal(after[name], values), name
        assert after[name].data_ptr() == address or values.dim() == 4, name  # channels last moves what is not yet
    assert buffers <= set(dict(network.named_buffers()))
    assert not any(isinstance(m, QuantConv2d) for m in network.cells.modules())
    assert isinstance(network.stem[0], QuantConv2d)


def test_parameters_fall_into_weights_and_logits() -> None:
    subnet = subnet_of((2, 4, 8))
    gammas, weights = subnet.gamma_parameters(), subnet.weight_parameters()
    assert len(gammas) == 2 * len(subnet.convolutions) and subnet.arch_parameters() == []
    assert all(torch.equal(g, torch.full((3,), 0.01)) for g in gammas)
    ids = [id(p) for p in (*gammas, *weights)]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in subnet.parameters()}
    rows = {name: len(table) for name, table in subnet.gammas.items()}
    assert rows["normal_weight"] == rows["normal_activation"] and rows["reduce_weight"] > 0
    assert rows["normal_weight"] + rows["reduce_weight"] == len(subnet.convolutions)


def test_complexity_and_its_gradient_by_hand() -> None:
    """Sum of MACs x E[weight bits] x E[activation bits] over the first convolution's MACs, from a forward's shapes."""
    subnet, bits = subnet_of((2, 4, 8)), torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    randomize(subnet)
    cost = SubnetCost(subnet, 16)
    macs: dict[str, int] = {}
    names = {conv: name for name, conv in subnet.convolutions.items()}

    def count(layer: nn.Conv2d, _: object, out: Tensor) -> None:
        macs[names[layer]] = out[0].numel() * layer.weight[0].numel()

    for conv in names:
        conv.register_forward_hook(count)
    subnet.eval()
    subnet(torch.zeros(1, 1, 16, 16))
    first = "cells.0.preprocess0.conv"
    assert next(iter(macs)) == first and macs[first] == 16 * 16 * 12 * 4  # 1x1, from 3 C to C channels, C = 4
    assert macs.keys() == subnet.convolutions.keys()

    value, expected = 0.0, {}
    for name, conv in subnet.convolutions.items():
        p = {o: getattr(conv, f"gamma_{o}").detach().double().softmax(0) for o in OPERANDS}
        mean = {o: float((p[o] * bits).sum()) for o in OPERANDS}
        value += macs[name] * mean["weight"] * mean["activation"] / macs[first]
        for operand, other in (OPERANDS, OPERANDS[::-1]):
            # d E[b] / d logit_k = p_k (b_k - E[b])
            expected[name, operand] = macs[name] / macs[first] * mean[other] * p[operand] * (bits - mean[operand])
    term = cost.term(subnet)
    assert term.dtype == torch.float32 and term.item() == pytest.approx(value, rel=1e-6)
    term.backward()
    for (name, operand), gradient in expected.items():
        found = getattr(subnet.convolutions[name], f"gamma_{operand}").grad
        assert torch.allclose(found.double(), gradient, rtol=1e-5, atol=1e-8), (name, operand)
    assert all(p.grad is None for p in subnet.weight_parameters())


@pytest.mark.parametrize("bits", [(2, 4), (2, 4, 8)])
def test_the_cost_of_one_hot_logits_is_the_built_networks(bits: tuple[int, ...]) -> None:
    subnet = subnet_of(bits, lookup("PC_DARTS")[1])
    randomize(subnet)
    for index, conv in enumerate(subnet.convolutions.values()):
        prefer(conv, bits[index % len(bits)], bits[index // 2 % len(bits)])
    found = network_cost(build_network(subnet.architecture(), **BUILD), 16)
    exact, paper = SubnetCost(subnet, 16), SubnetCost(subnet, 16, accounting="paper")
    assert exact(subnet).item() == exact.exact(subnet).item() == found.bitops
    assert float(exact.exact(subnet)) - exact.ends == found.bitops_quantized
    assert paper(subnet).item() == pytest.approx(found.bitops_paper, rel=1e-12) and paper.ends == 0
    assert exact.cheapest <= found.bitops <= exact.dearest


def test_the_ends_of_the_reachable_cost() -> None:
    subnet = subnet_of((2, 4, 8))
    cost = SubnetCost(subnet, 16)
    for width, end in ((2, cost.cheapest), (8, cost.dearest)):
        uniform = Architecture(TINY).with_uniform_bits(width, width)
        assert end == network_cost(build_network(uniform, **BUILD), 16).bitops
    assert cost(subnet).item() == pytest.approx(cost.ends + (cost.cheapest - cost.ends) / 4 * (14 / 3) ** 2)
    with pytest.raises(ValueError, match="--cost-accounting"):
        SubnetCost(subnet, 16, accounting="guess")


def test_the_architecture_names_every_convolution(tmp_path: Path) -> None:
    subnet = subnet_of((2, 4, 8))
    randomize(subnet)
    architecture = subnet.architecture({"method": "any"})
    assert architecture.bits is not None and architecture.bits.kind == "layers"
    for name, pair in architecture.bits.layers.items():
        conv = subnet.convolutions[name]
        wanted = tuple(conv.bits[int(getattr(conv, f"gamma_{o}").argmax())] for o in OPERANDS)
        assert pair == wanted
    again = load_architecture(architecture.save(tmp_path / "architecture.json"))
    network = build_network(again, **BUILD)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantConv2d) and n.startswith("cells.")}
    assert {n: (m.weight_bits, m.activation_bits) for n, m in layers.items()} == architecture.bits.layers
    assert subnet.genotype() == again.genotype == TINY


@pytest.mark.parametrize("bits", [(2,), (2, 8), (1, 2, 3, 4), (2, 4, 8), (4, 32)])
def test_any_subset_of_bits_learns(bits: tuple[int, ...]) -> None:
    subnet = subnet_of(bits, scheme="default", signed_activations=8 in bits)
    x, y = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(subnet(x), y)
    gradients = torch.autograd.grad(loss, subnet.gamma_parameters())
    assert math.isfinite(loss.item()) and all(torch.isfinite(g).all() for g in gradients)
    assert len(bits) == 1 or any(g.abs().max() > 0 for g in gradients)


def test_unknown_bits_are_refused() -> None:
    for bits in ((), (2, 2), (5,)):
        with pytest.raises(ValueError, match="--bits"):
            subnet_of(bits)
