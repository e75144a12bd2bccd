# SPDX-License-Identifier: Apache-2.0
"""Random architectures: within the space, uniform, named by their seed. A supernet set to one computes just that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from common.nets import Architecture, BitPolicy, Network, Supernet, build_network, build_supernet
from common.nets.architecture import needs_bits
from common.nets.darts_space import edge_index
from common.nets.sampling import choose, random_bits, random_genotype
from genotypes import PRIMITIVES, Genotype, lookup

SIZE = {"num_classes": 3, "init_channels": 8, "layers": 3, "in_channels": 2}
# the evaluation network's pools have no normalisation of their own, so equality holds without them
WITHOUT_POOLS = ("none", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("nodes, multiplier", [(1, 1), (2, 1), (4, 4), (5, 2)])
def test_random_cells_lie_in_the_space(nodes: int, multiplier: int) -> None:
    for seed in range(20):
        found = random_genotype(generator(seed), nodes=nodes, multiplier=multiplier)
        Architecture(found)  # validates names and states
        for pairs, concat in ((found.normal, found.normal_concat), (found.reduce, found.reduce_concat)):
            assert len(pairs) == 2 * nodes and concat == tuple(range(2 + nodes - multiplier, 2 + nodes))
            assert all(pairs[2 * n][1] < pairs[2 * n + 1][1] < n + 2 for n in range(nodes))


def test_a_seed_names_a_cell() -> None:
    assert random_genotype(generator(3)) == random_genotype(generator(3)) != random_genotype(generator(4))


def test_random_cells_are_uniform() -> None:
    source, draws = generator(), 2000
    operations, states = Counter(), Counter()
    for _ in range(draws):
        normal = random_genotype(source).normal
        operations.update(primitive for primitive, _ in normal)
        states[normal[6][1], normal[7][1]] += 1  # the last node chooses two of five
    assert set(operations) == set(PRIMITIVES) - {"none"} and set(states) == set(combinations(range(5), 2))
    for counts in (operations, states):
        assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_random_bits_stand_where_a_search_puts_them() -> None:
    net = build_supernet(method="pc-darts", bits=(2, 4, 8), **SIZE)
    searched = net.architecture()
    assert searched.bits is not None
    drawn = random_bits(searched, (2, 4, 8), generator())
    assert drawn.kind == "cells" and drawn.mapping == searched.bits.mapping
    for ours, theirs in zip(drawn.cells, searched.bits.cells, strict=True):
        assert ours.reduction == theirs.reduction
        assert [p is None for p in ours.operations] == [p is None for p in theirs.operations]
    assert drawn == random_bits(searched, (2, 4, 8), generator()) != random_bits(searched, (2, 4, 8), generator(1))


def test_random_bits_are_uniform_and_need_no_search() -> None:
    architecture = Architecture(lookup("DARTS_V2")[1])
    assert [c.reduction for c in random_bits(architecture, (2, 4), generator()).cells].index(True) == 2
    source, counts = generator(), Counter()
    for _ in range(20):
        for cell in random_bits(architecture, (2, 4, 8), source).cells:
            counts.update([cell.preprocess0, cell.preprocess1, *(p for p in cell.operations if p is not None)])
    assert len(counts) == 9 and stats.chisquare(list(counts.values())).pvalue > 0.001


# ------------------------------------------------------------------------------------- a supernet set to one choice


def drawn(seed: int, primitives: tuple[str, ...] = PRIMITIVES) -> Architecture:
    """A random architecture with random bits for the three cells of SIZE's supernet: one normal, two reductions."""
    source = generator(seed)
    architecture = Architecture(random_genotype(source, primitives))
    eight = random_bits(architecture, (2, 4), source).cells
    return replace(architecture, bits=BitPolicy(cells=(eight[0], eight[2], eight[5])))


def meaning(architecture: Architecture) -> list[object]:
    """What an architecture computes, whatever the order of a node's two operations."""
    genotype, cells = architecture.genotype, []
    for cell in architecture.bits.cells:
        pairs = zip(genotype.reduce if cell.reduction else genotype.normal, cell.operations, strict=True)
        operations = {(k // 2, *pair, bits) for k, (pair, bits) in enumerate(pairs)}
        cells.append((cell.reduction, cell.preprocess0, cell.preprocess1, operations))
    return cells


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_what_is_chosen_is_read_off_again(method: str) -> None:
    net = build_supernet(method=method, bits=(2, 4), **SIZE)
    for seed in range(3):
        wanted = drawn(seed)
        choose(net, wanted)
        assert meaning(net.architecture()) == meaning(wanted)


@pytest.mark.parametrize("bits", [None, (2, 4)])
def test_a_chosen_supernet_computes_the_evaluation_network(bits: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    net = build_supernet(method="darts", bits=bits, **SIZE).double()
    architecture = drawn(5, WITHOUT_POOLS)
    if bits is None:
        architecture = replace(architecture, bits=None)
    network = build_network(architecture, **SIZE).double()
    copy_weights(net, network)
    choose(net, architecture)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    # batch statistics in both, so that none has to be copied
    expected = network.train()(x)[0]
    torch.testing.assert_close(net.train()(x), expected, rtol=0, atol=1e-9)


def copy_weights(net: Supernet, network: Network) -> None:
    """The supernet's stem, classifier and the convolutions on the chosen edges, into the evaluation network."""
    network.stem.load_state_dict(net.stem.state_dict())
    network.classifier.load_state_dict(net.classifier.state_dict(), strict=False)
    for ours, theirs in zip(network.cells, net.cells, strict=True):
        pairs = getattr(network.architecture.genotype, "reduce" if ours.reduction else "normal")
        modules: list[tuple[nn.Module, nn.Module]] = [
            (ours.preprocess0, theirs.preprocess0),
            (ours.preprocess1, theirs.preprocess1),
        ]
        for k, (primitive, state) in enumerate(pairs):
            if needs_bits(primitive, 2 if ours.reduction and state < 2 else 1):
                modules.append((ours.operations[k], theirs.operations[edge_index(k // 2, state)][primitive]))
        for mine, other in modules:
            for to, of in zip(mine.convolutions(), other.convolutions(), strict=True):
                with torch.no_grad():
                    to.weight.copy_(of.weight)


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_what_was_not_chosen_does_not_matter(method: str) -> None:
    net = build_supernet(method=method, bits=(2, 4), **SIZE).double()
    architecture = Architecture(random_genotype(generator(1))).with_uniform_bits(2, 4)
    choose(net, architecture)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    before = net.train()(x).detach()
    moved = change_others(net, architecture.genotype)
    assert moved > 0
    assert torch.equal(net(x), before)
    choose(net, architecture.with_uniform_bits(4, 4))
    assert not torch.equal(net(x), before)


def change_others(net: Supernet, genotype: Genotype) -> int:
    """Draw anew every candidate weight off the chosen edges and operations; how many tensors that were."""
    moved = 0
    for cell in net.cells:
        pairs = genotype.reduce if cell.reduction else genotype.normal
        chosen = {(edge_index(k // 2, state), primitive) for k, (primitive, state) in enumerate(pairs)}
        for edge, candidates in enumerate(cell.operations):
            for primitive, module in candidates.items():
                if (edge, primitive) not in chosen:
                    for weight in module.parameters():
                        nn.init.normal_(weight)
                        moved += 1
    return moved


def _refused() -> list[tuple[Architecture, str]]:
    cell = (("sep_conv_3x3", 0), ("sep_conv_3x3", 1)) * 4
    fits = Genotype(cell, (2, 3, 4, 5), cell, (2, 3, 4, 5))
    twice = fits._replace(reduce=(("sep_conv_3x3", 0), ("skip_connect", 0), *cell[2:]))
    layers = BitPolicy(layers={"cells.0.preprocess0.conv": (2, 2)})
    return [
        (Architecture(lookup("NASNet")[1]).with_uniform_bits(2, 2), r"genotype.normal.*4 nodes"),
        (Architecture(fits._replace(normal_concat=(3, 4, 5))), r"genotype.normal.*\[2, 3, 4, 5\]"),
        (Architecture(twice), r"genotype.reduce: node 0"),
        (Architecture(fits._replace(normal=(("sep_conv_7x7", 0), *cell[1:]))), "sep_conv_7x7"),
        (Architecture(fits).with_uniform_bits(8, 2), "8 is not among"),
        (Architecture(fits), "32 is not among"),
        (Architecture(fits, layers), "by convolution"),
    ]


@pytest.mark.parametrize("architecture, message", _refused())
def test_what_does_not_fit_is_refused(architecture: Architecture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(build_supernet(bits=(2, 4), **SIZE), architecture)


def test_bits_for_a_supernet_without_are_refused() -> None:
    with pytest.raises(ValueError, match="full precision"):
        choose(build_supernet(**SIZE), Architecture(lookup("DARTS_V2")[1]).with_uniform_bits(2, 2))


def test_a_logit_of_never_is_exactly_zero() -> None:
    net = build_supernet(**SIZE)
    choose(net, Architecture(lookup("DARTS_V2")[1]))
    alphas: Tensor = net.alphas_normal.softmax(-1)
    assert set(alphas.unique().tolist()) == {0.0, 1.0} and alphas[:, 0].sum() == 14 - 8
