# SPDX-License-Identifier: Apache-2.0
"""The DARTS cell space: edges, where reductions stand, the plan of a network's cells, and how a genotype is read off.

States 0 and 1 of a cell are the outputs of the two cells before it; node i is state 2 + i and has an edge from every
earlier state. Edges are numbered node by node: edge(i, j) = sum_{n < i} (2 + n) + j (Liu et al., DARTS, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genotypes import PRIMITIVES, Genotype


@dataclass(frozen=True)
class CellPlan:
    """Place and widths of one cell: `channels` per node; inputs of `before_last` and `last` channels."""

    index: int
    reduction: bool
    reduction_before: bool
    before_last: int
    last: int
    channels: int


def count_edges(nodes: int) -> int:
    """Edges of a cell: 2 + 3 + ... (14 at 4 nodes)."""
    return nodes * (nodes + 3) // 2


def edge_index(node: int, state: int) -> int:
    """Number of the edge from `state` to `node`."""
    return count_edges(node) + state


def outgoing(state: int, nodes: int) -> list[tuple[int, int]]:
    """The (node, edge) pairs that leave `state`."""
    return [(node, edge_index(node, state)) for node in range(max(0, state - 1), nodes)]


def is_reduction(index: int, layers: int) -> bool:
    """Reductions stand at a third and two thirds of the depth."""
    return index in (layers // 3, 2 * layers // 3)


def plan_cells(
    layers: int,
    init_channels: int,
    stem: str,
    normal_multiplier: int = 4,
    reduce_multiplier: int = 4,
    stem_channels: int | None = None,
) -> list[CellPlan]:
    """The cells of a network of `layers` cells; multipliers are the number of concatenated states per cell type.

    The stem hands on `stem_channels`, by default three times `init_channels` (CIFAR) or as many (ImageNet).
    """
    first = stem_channels or (3 * init_channels if stem == "cifar" else init_channels)
    before_last, last, channels = first, first, init_channels
    reduction_before = stem == "imagenet"  # the two ImageNet stems differ in size, as two cells around a reduction do
    plans = []
    for index in range(layers):
        reduction = is_reduction(index, layers)
        channels = 2 * channels if reduction else channels
        plans.append(CellPlan(index, reduction, reduction_before, before_last, last, channels))
        before_last, last = last, channels * (reduce_multiplier if reduction else normal_multiplier)
        reduction_before = reduction
    return plans


def output_channels(plans: Sequence[CellPlan], normal_multiplier: int = 4, reduce_multiplier: int = 4) -> int:
    """Channels that the last cell hands to the classifier."""
    return plans[-1].channels * (reduce_multiplier if plans[-1].reduction else normal_multiplier)


def check_image_size(size: int, stem: str) -> None:
    """Raise ValueError unless every stride-2 step of the network halves the image exactly."""
    factor = 4 if stem == "cifar" else 32
    if (size < 2 * factor and stem == "cifar") or size < factor or size % factor:
        least, halvings = (8, 2) if stem == "cifar" else (32, 5)
        raise ValueError(
            f"--image-size: {size} does not fit the {stem} stem, whose network halves it {halvings} times; "
            f"use a multiple of {factor}, at least {least}"
        )


def _pairs(
    alphas: list[list[float]], betas: list[float] | None, nodes: int, primitives: Sequence[str]
) -> tuple[tuple[str, int], ...]:
    none = primitives.index("none") if "none" in primitives else -1
    chosen: list[tuple[str, int]] = []
    for node in range(nodes):
        candidates = []
        for state in range(node + 2):
            edge = edge_index(node, state)
            weight = 1.0 if betas is None else betas[edge]
            scores = [weight * a for a in alphas[edge]]
            best = max((k for k in range(len(primitives)) if k != none), key=lambda k: scores[k])
            candidates.append((scores[best], state, primitives[best]))
        candidates.sort(key=lambda c: -c[0])  # stable: on ties the earlier state stays first
        chosen += [(name, state) for _, state, name in candidates[:2]]
    return tuple(chosen)


def read_genotype(
    alphas_normal: Tensor,
    alphas_reduce: Tensor,
    betas_normal: Tensor | None = None,
    betas_reduce: Tensor | None = None,
    *,
    nodes: int = 4,
    multiplier: int = 4,
    primitives: Sequence[str] = PRIMITIVES,
) -> Genotype:
    """Discretise: per node the two edges whose best operation other than `none` weighs most, each with it.

    alphas [edges, operations] and betas [edges] are logits; softmax over operations, and over each node's incoming
    edges (Xu et al., PC-DARTS, 2020: the product ranks edges). Ties go to the lower index. Reads the device once.
    """
    cells = []
    for alphas, betas in ((alphas_normal, betas_normal), (alphas_reduce, betas_reduce)):
        strengths = alphas.detach().double().softmax(-1).cpu().tolist()
        shares = None if betas is None else edge_softmax(betas.detach().double(), nodes).cpu().tolist()
        cells.append(_pairs(strengths, shares, nodes, primitives))
    concat = tuple(range(2 + nodes - multiplier, nodes + 2))
    return Genotype(cells[0], concat, cells[1], concat)


def edge_softmax(betas: Tensor, nodes: int) -> Tensor:
    """Softmax of the edge logits [edges] within each node's incoming edges."""
    return torch.cat([group.softmax(0) for group in betas.split([node + 2 for node in range(nodes)])])


def validate_genotype(genotype: Genotype, known: Sequence[str], where: str = "genotype") -> None:
    """Raise ValueError naming the field when a primitive is unknown or an index points nowhere."""
    for cell in ("normal", "reduce"):
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        if not pairs or len(pairs) % 2:
            raise ValueError(
                f"{where}.{cell}: expected two (primitive, state) pairs per node, found {len(pairs)} pairs"
            )
        for position, (primitive, state) in enumerate(pairs):
            if primitive not in known or primitive == "none":
                raise ValueError(
                    f"{where}.{cell}[{position}]: unknown primitive {primitive!r}; known: {', '.join(known)} "
                    "(--search-space FILE.py brings in your own)"
                )
            if not 0 <= state < 2 + position // 2:
                raise ValueError(
                    f"{where}.{cell}[{position}]: state {state} does not exist there; node {position // 2} "
                    f"may read states 0 to {1 + position // 2}"
                )
        states = 2 + len(pairs) // 2
        if not concat or len(set(concat)) != len(concat) or any(not 0 <= s < states for s in concat):
            raise ValueError(
                f"{where}.{cell}_concat: {list(concat)} must list different states between 0 and {states - 1}"
            )
