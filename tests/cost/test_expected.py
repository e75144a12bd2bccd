# SPDX-License-Identifier: Apache-2.0
"""Expected cost: equal to the exact cost of the built network where every choice is certain; the reference's terms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.cost import ExpectedCost, edge_probability, network_cost
from common.nets import Architecture, Supernet, build_network, build_supernet
from genotypes import PRIMITIVES, Genotype
from tests.helpers.fill import fill, fill_logits, oracle_batch
from tests.helpers.plain_supernet import PlainSupernet, fill_reference_gammas, reference_gamma_name


def supernet(seed: int = 0, **options: Any) -> Supernet:
    """A small supernet with strong random logits."""
    settings = {"method": "pc-darts", "bits": (2, 4), "num_classes": 10, "init_channels": 8, "layers": 8} | options
    torch.manual_seed(seed)
    net = build_supernet(**settings).double()
    with torch.no_grad():
        for p in net.arch_parameters() + net.gamma_parameters():
            p.normal_()
    return net


def built_cost(
    net: Supernet, size: int, channels: int, layers: int, mapping: str, accounting: str, **ends: int
) -> float:
    """Cost of the network that the supernet's present choice builds."""
    network = build_network(
        net.architecture().with_mapping(mapping),
        stem=net.stem_kind,
        in_channels=net.in_channels,
        num_classes=net.classifier.out_features,
        init_channels=channels,
        layers=layers,
        **ends,
    )
    cost = network_cost(network, size)
    return cost.bitops if accounting == "exact" else cost.bitops_paper


@torch.no_grad()
def make_certain(net: Supernet) -> None:
    """Push all logits to the present discrete choice, without moving it."""
    genotype = net.genotype()
    for kind, pairs in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        alphas, betas = getattr(net, f"alphas_{kind}"), getattr(net, f"betas_{kind}")
        alphas.copy_(alphas.argmax(-1, keepdim=True) == torch.arange(alphas.shape[1]))
        for position, (primitive, state) in enumerate(pairs):
            node = position // 2
            edge = sum(2 + n for n in range(node)) + state
            alphas[edge] = torch.tensor([float(p == primitive) for p in net.primitives])
        alphas.mul_(1e3)
        if betas is not None:
            betas.fill_(-1e3)
            for position, (_, state) in enumerate(pairs):
                betas[sum(2 + n for n in range(position // 2)) + state] = 0.0
    for gamma in net.gamma_parameters():
        hard = gamma.argmax(-1, keepdim=True) == torch.arange(gamma.shape[-1])
        gamma.copy_(1e3 * hard.to(gamma.dtype))


def pairs_per_node(genotype: Genotype) -> list[set[tuple[str, int]]]:
    """The chosen pairs of each node, whatever their order."""
    return [set(pairs[k : k + 2]) for pairs in (genotype.normal, genotype.reduce) for k in range(0, len(pairs), 2)]


SIZES = {
    "C8 L8": ({}, 32, 8, 8, "relative"),
    "C36 L20": ({}, 32, 36, 20, "relative"),
    "C36 L20 paper": ({}, 32, 36, 20, "paper"),
    "L14, 2/4/8": ({"bits": (2, 4, 8)}, 28, 12, 14, "relative"),
    "L14 paper, 1-32": ({"bits": (1, 2, 3, 4, 8, 32)}, 16, 12, 14, "paper"),
    "from 3 cells": ({"layers": 3, "in_channels": 1}, 16, 16, 9, "relative"),
    "full precision": ({"bits": None}, 32, 16, 6, "relative"),
    "imagenet": ({"stem": "imagenet", "partial": 2, "bits": (4, 8)}, 64, 16, 14, "relative"),
    "3 nodes, 2 out": ({"nodes": 3, "multiplier": 2}, 32, 12, 10, "relative"),
    "5 nodes": ({"nodes": 5, "multiplier": 3}, 16, 4, 5, "relative"),
}


QUICK = {
    ("C8 L8", "paper"),
    ("C36 L20", "exact"),
    ("L14 paper, 1-32", "exact"),
    ("from 3 cells", "exact"),
    ("full precision", "exact"),
    ("imagenet", "exact"),
    ("3 nodes, 2 out", "paper"),
}
CASES = [
    pytest.param(case, accounting, marks=[] if (case, accounting) in QUICK else [pytest.mark.slow])
    for case in SIZES
    for accounting in ("exact", "paper")
]


@pytest.mark.parametrize("case, accounting", CASES)
def test_certain_choices_cost_what_their_network_costs(case: str, accounting: str) -> None:
    options, size, channels, layers, mapping = SIZES[case]
    for seed in (0,) if (case, accounting) in QUICK else (0, 1, 2):
        net = supernet(seed, **options)
        cost = ExpectedCost(
            net,
            input_size=size,
            eval_init_channels=channels,
            eval_layers=layers,
            mapping=mapping,
            accounting=accounting,
        )
        truth = built_cost(net, size, channels, layers, mapping, accounting)
        assert cost.exact(net).item() == pytest.approx(truth, rel=1e-9)
        chosen = pairs_per_node(net.genotype())
        make_certain(net)
        assert pairs_per_node(net.genotype()) == chosen
        assert cost(net).item() == pytest.approx(truth, rel=1e-9)
        assert cost.cheapest <= truth * (1 + 1e-9) and truth <= cost.dearest * (1 + 1e-9)


def test_darts_exact_cost_and_ends() -> None:
    net = supernet(method="darts", bits=(2, 4))
    ends = {"stem_bits": 8, "classifier_bits": 4}
    cost = ExpectedCost(net, input_size=16, eval_init_channels=12, eval_layers=8, **ends)
    truth = built_cost(net, 16, 12, 8, "relative", "exact", **ends)
    assert cost.exact(net).item() == pytest.approx(truth, rel=1e-9)


def test_extremes_are_reached() -> None:
    """The cheapest and the dearest network exist: pooling at the least bits, the dearest primitive at the most."""
    net = supernet(bits=(2, 4))
    cost = ExpectedCost(net, input_size=32, eval_init_channels=8, eval_layers=8)
    for value, primitive, bits in ((cost.cheapest, "max_pool_3x3", 0), (cost.dearest, "sep_conv_5x5", 1)):
        with torch.no_grad():
            for kind in ("normal", "reduce"):
                getattr(net, f"alphas_{kind}").zero_()[:, PRIMITIVES.index(primitive)] = 5.0
            for gamma in net.gamma_parameters():
                gamma.zero_()[..., bits] = 1.0
        assert cost.exact(net).item() == pytest.approx(value, rel=1e-9)
        assert built_cost(net, 32, 8, 8, "relative", "exact") == pytest.approx(value, rel=1e-9)


def drawn_probability(share: list[float]) -> list[float]:
    """Probability of each edge to be among two drawn one after the other without replacement, by enumeration."""
    total = [0.0] * len(share)
    for first, second in itertools.permutations(range(len(share)), 2):
        probability = share[first] * share[second] / (1 - share[first])
        total[first] += probability
        total[second] += probability
    return total


@pytest.mark.parametrize("nodes", [1, 2, 4, 6])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_edge_probability_is_that_of_drawing_two(nodes: int, spread: float) -> None:
    torch.manual_seed(nodes)
    betas = spread * torch.randn(sum(2 + n for n in range(nodes)), dtype=torch.float64)
    found = edge_probability(betas, nodes)
    start = 0
    for node in range(nodes):
        part = slice(start, start + node + 2)
        start += node + 2
        expected = drawn_probability(betas[part].softmax(0).tolist())
        torch.testing.assert_close(found[part], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
        assert found[part].sum().item() == pytest.approx(2, abs=1e-9)
        assert found[part].max() <= 1
        uniform = edge_probability(None, nodes)[part]
        assert torch.allclose(uniform, torch.full_like(uniform, 2 / (node + 2)))
    assert found[:2].tolist() == [1.0, 1.0]


def test_edge_probability_is_guarded() -> None:
    """One certain edge: the denominator 1 - beta vanishes, values and gradients stay finite."""
    for height in (40.0, 800.0):
        betas = torch.tensor([0.0, 0.0, height, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
        found = edge_probability(betas, 2)
        found.square().sum().backward()
        assert torch.isfinite(found).all() and torch.isfinite(betas.grad).all()
        assert found[2].item() == pytest.approx(1) and found.max() <= 1


def single_node_costs(net: Supernet, size: int, channels: int, layers: int) -> tuple[float, Tensor, Tensor]:
    """Base and [edge, primitive] costs at 2/2 bits of one-node cells, measured on built networks only."""
    names = [p for p in PRIMITIVES if p != "none"]

    def cost(normal: list[str], reduce: list[str]) -> float:
        cells = [tuple((p, s) for s, p in enumerate(pair)) for pair in (normal, reduce)]
        architecture = Architecture(Genotype(cells[0], (2,), cells[1], (2,))).with_uniform_bits(2, 2)
        network = build_network(architecture, num_classes=10, init_channels=channels, layers=layers)
        return float(network_cost(network, size).bitops)

    empty = ["max_pool_3x3", "max_pool_3x3"]
    base = cost(empty, empty)
    tables = [torch.zeros(2, len(names), dtype=torch.float64) for _ in range(2)]
    for edge, (column, name) in itertools.product(range(2), enumerate(names)):
        pair = list(empty)
        pair[edge] = name
        tables[0][edge, column] = cost(pair, empty) - base
        tables[1][edge, column] = cost(empty, pair) - base
    return base, tables[0], tables[1]


def test_expectation_over_one_node_cells() -> None:
    """Soft logits against a sum over measured networks: alphas renormalised without none, E[weight] E[activation]."""
    net = supernet(nodes=1, multiplier=1, layers=3)
    cost = ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=3)
    logits = torch.tensor([0.3, -0.4], dtype=torch.float64)
    with torch.no_grad():
        for gamma in net.gamma_parameters():
            gamma.copy_(logits)
    base, normal, reduce = single_node_costs(net, 16, 8, 3)
    p = logits.softmax(0)
    bits = (2 * p[0] + 4 * p[1]).item()
    ends = 3 * 24 * 9 * 16 * 16 * 1024 + net.classifier.in_features * 10 * 1024
    quantised = base - ends
    for kind, table in (("normal", normal), ("reduce", reduce)):
        alphas = getattr(net, f"alphas_{kind}").detach()
        share = alphas[:, 1:].softmax(-1)
        full = alphas.softmax(-1)[:, 1:]
        torch.testing.assert_close(share, full / full.sum(-1, keepdim=True))
        quantised += (share * table).sum().item()
    assert cost(net).item() == pytest.approx(ends + quantised * (bits / 2) ** 2, rel=1e-9)


def test_initial_cost_and_term() -> None:
    for options in ({}, {"bits": None}, {"method": "darts"}):
        net = supernet(**options)
        cost = ExpectedCost(net, input_size=32, eval_init_channels=36, eval_layers=20)
        with torch.no_grad():
            for p in net.arch_parameters() + net.gamma_parameters():
                p.zero_()
        assert cost(net).item() == pytest.approx(cost.initial, rel=1e-9)
        assert cost.term(net).item() == pytest.approx(2489.3, rel=1e-9)


def test_gradients_reach_alphas_betas_and_gammas() -> None:
    net = supernet(bits=(2, 4, 8), layers=3)
    cost = ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=6)
    parameters = net.arch_parameters() + net.gamma_parameters()
    gradients = torch.autograd.grad(cost(net), parameters)
    torch.manual_seed(1)
    for p, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(p)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-5)
                values.append(cost(net).item())
                p.sub_(direction, alpha=sign * 1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("allow8bit, bits", [(False, (2, 4)), (True, (2, 4, 8))])
def test_complexity_of_the_papers_supernet(oracle: Any, allow8bit: bool, bits: tuple[int, ...]) -> None:
    """2489.3279 and 6023.5073: sums of float32 there, hence the tolerance."""
    truth = oracle("qdarts")[f"C16_L8_cifar10_allow8bit_{allow8bit}"]["complexity_loss_uniform_gamma_32x32"]
    net = build_supernet(method="pc-darts", bits=bits, num_classes=10, init_channels=16, layers=8)
    cost = ExpectedCost(
        net, input_size=32, eval_init_channels=36, eval_layers=20, accounting="paper", weighting="uniform"
    )
    with torch.no_grad():
        for gamma in net.gamma_parameters():
            gamma.zero_()
    assert cost.term(net).item() == pytest.approx(truth, rel=1e-5)


def test_complexity_and_gamma_gradients_of_the_small_supernet(oracle: Any) -> None:
    """C=8, 3 cells: value and the gamma gradients of CE + 1e-4 complexity, row by row where the oracle has them."""
    truth = oracle("qdarts")["forward"]["results"]["allow8bit_False"]
    options = {"bits": (2, 4), "scheme": "reference", "num_classes": 10, "init_channels": 8, "layers": 3}
    net = build_supernet(method="pc-darts", **options)
    net = fill_reference_gammas(fill_logits(fill(net)))
    cost = ExpectedCost(
        net, input_size=16, eval_init_channels=8, eval_layers=3, accounting="paper", weighting="uniform"
    )
    complexity = cost.term(net)
    assert complexity.item() == pytest.approx(truth["complexity_loss"], abs=1e-6)
    loss = F.cross_entropy(net(oracle_batch()), torch.tensor([3, 7, 1, 9])) + 1e-4 * complexity
    assert loss.item() == pytest.approx(truth["total_cd1e-4"], abs=1e-8)
    loss.backward()
    for key, gamma in net.gammas.items():
        total = gamma.grad.abs().sum().item()
        assert total == pytest.approx(truth["gamma_grads_sumabs"][reference_gamma_name(key)], abs=1e-8)
        if "preprocess" in key:
            expected = torch.tensor(truth["gamma_grads_preprocess"][reference_gamma_name(key)], dtype=torch.float64)
            torch.testing.assert_close(gamma.grad, expected, atol=1e-8, rtol=0)
    for parameter, gradient in zip(net.arch_parameters(), truth["arch_grads"], strict=True):
        expected = torch.tensor(gradient, dtype=torch.float64)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("options", [{}, {"bits": (1, 2, 8)}, {"partial": 2}, {"method": "darts"}, {"layers": 5}])
def test_complexity_equals_the_plain_supernets(options: dict[str, Any]) -> None:
    settings = {"method": "pc-darts", "bits": (2, 4), "num_classes": 10, "init_channels": 8, "layers": 3} | options
    net = build_supernet(**settings).double()
    plain = PlainSupernet(**settings).double()
    with torch.no_grad():
        for key, gamma in net.gammas.items():
            gamma.normal_()
            plain.gammas[key].copy_(gamma)
        plain.eval()(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
        cost = ExpectedCost(
            net, input_size=16, eval_init_channels=8, eval_layers=6, accounting="paper", weighting="uniform"
        )
        assert cost.term(net).item() == pytest.approx(plain.complexity().item(), rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accounting": "guess"}, "cost-accounting.*guess"),
        ({"weighting": "guess"}, "cost-weighting.*guess"),
        ({"mapping": "guess"}, "guess"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedCost(supernet(layers=3), input_size=16, eval_init_channels=8, eval_layers=6, **options)


def test_uniform_weighting_needs_bits() -> None:
    net = supernet(bits=None, layers=3)
    with pytest.raises(ValueError, match="uniform"):
        ExpectedCost(net, input_size=16, eval_init_channels=8, eval_layers=6, weighting="uniform")


def test_alphas_and_betas_can_feel_a_share_of_the_term() -> None:
    """`share` scales the gradient of alphas and betas alone; value and gammas' gradient stay (--gamma-level upper)."""
    torch.manual_seed(3)
    supernet = build_supernet(method="pc-darts", bits=(2, 4), num_classes=10, init_channels=8, layers=3)
    for parameter in (*supernet.arch_parameters(), *supernet.gamma_parameters()):
        torch.nn.init.normal_(parameter)
    cost = ExpectedCost(supernet, input_size=16, eval_init_channels=8, eval_layers=3)
    groups = [*supernet.arch_parameters(), *supernet.gamma_parameters()]
    found = {}
    for share in (1.0, 0.1):
        term = cost.term(supernet, share)
        found[share] = (term.item(), torch.autograd.grad(term, groups))
    assert found[0.1][0] == pytest.approx(found[1.0][0], rel=1e-6)
    count = len(supernet.arch_parameters())
    for k, (whole, part) in enumerate(zip(found[1.0][1], found[0.1][1], strict=True)):
        torch.testing.assert_close(part, whole * (0.1 if k < count else 1.0), rtol=1e-4, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in found[1.0][1][:count])
