# SPDX-License-Identifier: Apache-2.0
"""Architectures drawn at random, and a supernet set to a single one: what a search is compared with.

Everything random comes from the generator that is given, so that a seed names an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.nets.architecture import Architecture, BitPolicy, Bits, CellBits, needs_bits
from common.nets.darts_space import edge_index, is_reduction
from common.nets.network import cell_bits
from common.nets.supernet import Supernet
from genotypes import PRIMITIVES, Genotype

SEARCHED_CELLS = 8
"""Cells of a search by default."""
_NEVER = -1e4  # a logit whose softmax is exactly zero, in every precision


def random_genotype(
    generator: torch.Generator,
    primitives: Sequence[str] = PRIMITIVES,
    nodes: int = 4,
    multiplier: int = 4,
) -> Genotype:
    """Both cells, uniform over what a search can give: each node reads two different earlier states, each by any
    primitive but `none` (Li and Talwalkar, 2019, draw their baseline so); the last `multiplier` nodes are handed on.
    """
    names = [primitive for primitive in primitives if primitive != "none"]

    def cell() -> tuple[tuple[str, int], ...]:
        pairs = []
        for node in range(nodes):
            states = torch.randperm(node + 2, generator=generator)[:2].sort().values.tolist()
            chosen = torch.randint(len(names), (2,), generator=generator).tolist()
            pairs += [(names[index], state) for index, state in zip(chosen, states, strict=True)]
        return tuple(pairs)

    concat = tuple(range(2 + nodes - multiplier, 2 + nodes))
    return Genotype(cell(), concat, cell(), concat)


def random_bits(
    architecture: Architecture, bits: Sequence[int], generator: torch.Generator, layers: int | None = None
) -> BitPolicy:
    """Weight and activation bits, each uniform over `bits`, for every operation that a search would give some.

    `layers`: cells of the search (default: as many as the architecture has bits for, else SEARCHED_CELLS); the
    architecture's own bits are not looked at.
    """
    policy, genotype = architecture.bits, architecture.genotype
    if layers is None:
        layers = len(policy.cells) if policy is not None and policy.cells else SEARCHED_CELLS

    def draw() -> Bits:
        weight, activation = torch.randint(len(bits), (2,), generator=generator).tolist()
        return bits[weight], bits[activation]

    cells = []
    for index in range(layers):
        reduction = is_reduction(index, layers)
        operations = [
            draw() if needs_bits(primitive, 2 if reduction and state < 2 else 1) else None
            for primitive, state in (genotype.reduce if reduction else genotype.normal)
        ]
        cells.append(CellBits(reduction, draw(), draw(), tuple(operations)))
    return BitPolicy(cells=tuple(cells), mapping=policy.mapping if policy is not None else "relative")


@torch.no_grad()
def choose(supernet: Supernet, architecture: Architecture) -> None:
    """Set every logit so that the supernet computes this one architecture with the weights that it has.

    A chosen operation gets the whole softmax of its edge, edges that were not chosen get `none`, and with betas a
    node's two edges share its weight equally. Running statistics are left as they are: they were gathered over all
    operations mixed, so gather them anew before the accuracy is read.

    Raises ValueError, naming what does not fit, for an architecture that lies outside the supernet's space.
    """
    _choose_operations(supernet, architecture.genotype)
    if supernet.bits is not None:
        _choose_bits(supernet, architecture, supernet.bits)
    elif architecture.bits is not None:
        raise ValueError("bits: the supernet is one in full precision and knows none; give an architecture without")


def _choose_operations(supernet: Supernet, genotype: Genotype) -> None:
    primitives, nodes = supernet.primitives, supernet.nodes
    concat = tuple(range(2 + nodes - supernet.multiplier, 2 + nodes))
    if "none" not in primitives:
        raise ValueError("the supernet has no `none`, so that no edge of it can be left out")
    for kind in ("normal", "reduce"):
        pairs, where = getattr(genotype, kind), f"genotype.{kind}"
        if len(pairs) != 2 * nodes or tuple(getattr(genotype, f"{kind}_concat")) != concat:
            raise ValueError(
                f"{where}: the supernet has {nodes} nodes and hands on states {list(concat)}; this differs"
            )
        alphas, betas = getattr(supernet, f"alphas_{kind}"), getattr(supernet, f"betas_{kind}")
        alphas.fill_(_NEVER)
        alphas[:, primitives.index("none")] = 0.0
        if betas is not None:
            betas.fill_(_NEVER)
        for node in range(nodes):
            if pairs[2 * node][1] == pairs[2 * node + 1][1]:
                raise ValueError(f"{where}: node {node} reads one state twice, which no search of edges gives")
            for primitive, state in pairs[2 * node : 2 * node + 2]:
                if primitive not in primitives:
                    raise ValueError(f"{where}: {primitive} is not among the supernet's {', '.join(primitives)}")
                edge = edge_index(node, state)
                alphas[edge] = _NEVER
                alphas[edge, primitives.index(primitive)] = 0.0
                if betas is not None:
                    betas[edge] = 0.0


def _choose_bits(supernet: Supernet, architecture: Architecture, bits: tuple[int, ...]) -> None:
    if architecture.bits is not None and architecture.bits.layers:
        raise ValueError("bits: given by convolution, where the supernet has one choice per operation")
    for gamma in supernet.gammas.values():
        gamma.fill_(_NEVER)

    def set_row(name: str, place: tuple[int, ...], pair: Bits) -> None:
        for operand, width in zip(("weight", "activation"), pair, strict=True):
            if width not in bits:
                raise ValueError(f"bits: {width} is not among the supernet's {', '.join(map(str, bits))}")
            supernet.gammas[name.format(operand)][(*place, bits.index(width))] = 0.0

    for plan, cell in zip(supernet.plans, cell_bits(architecture, supernet.plans), strict=True):
        kind = "reduce" if plan.reduction else "normal"
        position, rows = supernet.cells_of[kind].index(plan.index), supernet.rows[kind]
        set_row(kind + "_{}_preprocess0", (position,), cell.preprocess0)
        set_row(kind + "_{}_preprocess1", (position,), cell.preprocess1)
        for k, (primitive, state) in enumerate(getattr(architecture.genotype, kind)):
            pair = cell.operations[k]
            if pair is not None and needs_bits(primitive, 2 if plan.reduction and state < 2 else 1):
                set_row(kind + "_{}", (position, edge_index(k // 2, state), rows.index(primitive)), pair)
