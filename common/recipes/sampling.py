# SPDX-License-Identifier: Apache-2.0
"""Networks drawn at random at the cost of a given one: what a search has to beat.

Bits are drawn uniformly, then single ones are flipped, at random among those that bring the cost nearer, until the
BitOps of the quantised layers agree: so a comparison is one of choices, not of sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.cost import Cost, LayerCost, network_cost
from common.engine import derive, read_json
from common.nets import Architecture, BitPolicy, build_network, load_architecture
from common.nets.architecture import Bits
from common.nets.darts_space import is_reduction
from common.nets.sampling import SEARCHED_CELLS, random_bits, random_genotype
from common.recipes.findings import evaluation_cost
from common.recipes.own_space import load_search_space
from common.recipes.recorded import own_code
from common.recipes.searched import read_search, search_config
from common.recipes.setup import load_data
from common.recipes.trained import load_trained
from genotypes import PRIMITIVES

BAND = 0.05
"""Costs count as equal within this share."""
_AIM = 0.01  # flips go on until here where they can: else every draw from above would stay at the band's upper end
_DRAWS = 30
_LAYER = re.compile(r"cells\.(\d+)\.(?:preprocess(\d)|operations\.(\d+))\.")  # a convolution's name in a network
NAMES = {"cells": "random bits", "none": "random cells and bits"}
"""What may be kept of the reference, and how the result is called in tables."""

Slot = tuple[int, int]
"""(searched cell, position): 0 and 1 are its input operations, 2 + k the k-th pair of its genotype."""


@dataclass(frozen=True)
class Reference:
    """What draws are compared with: an architecture, the cost of any other at the same size, and what to draw from."""

    architecture: Architecture
    cost: Callable[[Architecture], Cost]
    bits: tuple[int, ...]
    primitives: tuple[str, ...] = PRIMITIVES


def load_reference(
    run: Path,
    bits: Sequence[int] | None = None,
    data: Path | None = None,
    data_module: str | None = None,
    search_space: Path | None = None,
) -> Reference:
    """The network of a search (at the size that it searches for) or of a training.

    `bits` are by default those of the search, or all that occur in the trained architecture. `data`: where the images
    lie, if no longer where they did. `data_module`, `search_space`: the Python files that the run was made with, which
    its record alone does not get executed. Raises ValueError that names --like or --bits.
    """
    record = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    flags = record.get("config", {}) if isinstance(record, dict) else {}
    space = own_code("search_space", flags, search_space, f"--like {run}")
    primitives = load_search_space(space).primitives if space is not None else PRIMITIVES
    architecture = load_architecture(run)
    if flags and record.get("stage") == "train":
        network, _, info = load_trained(run, flag="--like")
        architecture, build, size = network.architecture, info["build"], info["data"]["image_size"]
        cost: Callable[[Architecture], Cost] = lambda other: network_cost(build_network(other, **build), size)  # noqa: E731
        known = _occurring(architecture.bits)
    else:
        changes: dict[str, Any] = {} if data is None else {"data": data}
        changes |= {"data_module": data_module, "search_space": search_space}
        config = search_config(read_search(run, "--like"), f"--like {run}", **changes)
        cost = partial(evaluation_cost, config, load_data(config))
        known = tuple(config.bits or ())
    chosen = tuple(sorted(set(bits or known)))
    if len(chosen) < 2:
        raise ValueError(f"--like {run}: its bits are {chosen or 'none'}, nothing to draw from; give --bits 2 4")
    return Reference(architecture, cost, chosen, primitives)


def _occurring(policy: BitPolicy | None) -> tuple[int, ...]:
    if policy is None:
        return ()
    pairs = [policy.uniform or (), *policy.layers.values(), *(pair for _, pair in slot_bits(policy))]
    return tuple({width for pair in pairs for width in pair})


def draw(reference: Reference, *, keep: str, seed: int) -> Architecture:
    """An architecture within BAND of the reference's BitOps in quantised layers; `seed` names it.

    `keep` "cells": the reference's cells with random bits; "none": random cells too, of as many nodes. Raises
    ValueError when no draw can be brought there.
    """
    own, known, bits = reference.architecture.genotype, reference.architecture.bits, reference.bits
    layers = len(known.cells) if known is not None and known.cells else SEARCHED_CELLS
    target, reach = reference.cost(reference.architecture).bitops_quantized, []
    generator = torch.Generator().manual_seed(derive(seed, "random architecture"))
    for _ in range(_DRAWS):
        cells = own
        if keep == "none":
            cells = random_genotype(generator, reference.primitives, len(own.normal) // 2, len(own.normal_concat))
        policy = random_bits(Architecture(cells), bits, generator, layers)
        policy = replace(policy, mapping=known.mapping if known is not None else "relative")
        cost = reference.cost(Architecture(cells, policy))
        searched = [row for row in cost.layers if _LAYER.match(row.name)]
        macs = sum(row.macs for row in searched)
        ends = cost.bitops_quantized - sum(row.bitops for row in searched)
        reach += [ends + macs * min(bits) ** 2, ends + macs * max(bits) ** 2]
        if not (1 - BAND) * reach[-2] <= target <= (1 + BAND) * reach[-1]:
            if keep == "cells":
                break  # no other draw of bits reaches further
            continue
        policy = meet(policy, cost.layers, target, bits, generator)
        found = reference.cost(Architecture(cells, policy)).bitops_quantized
        if abs(found / target - 1) <= BAND:
            origin = {"method": "random", "seed": seed, "kept": keep, "bits": list(bits)}
            return Architecture(cells, policy, search=origin, name=NAMES[keep])
    raise ValueError(
        f"--like: its quantised layers cost {target:,} BitOps, and no draw came within {BAND:.0%} of it "
        f"with {bits} bits, which reach {min(reach):,} to {max(reach):,}; give other --bits"
    )


def meet(
    policy: BitPolicy, layers: Iterable[LayerCost], target: int, bits: Sequence[int], generator: torch.Generator
) -> BitPolicy:
    """The policy with single bits flipped, each time one at random among those that bring the cost nearer.

    `layers`: the rows of the network that has this policy; `target`: BitOps of its quantised layers. Ends within _AIM
    of the target, or where no flip helps any more.
    """
    pairs, rows = dict(slot_bits(policy)), [row for row in layers if row.quantizable]
    macs = slot_macs(policy, rows)
    gap = target - sum(row.bitops for row in rows)
    while abs(gap) > _AIM * target:
        helpful = []
        for slot, (weight, activation) in pairs.items():
            for pair in [(width, activation) for width in bits] + [(weight, width) for width in bits]:
                change = macs.get(slot, 0) * (pair[0] * pair[1] - weight * activation)
                if abs(gap - change) < abs(gap):
                    helpful.append((slot, pair, change))
        if not helpful:
            break
        slot, pairs[slot], change = helpful[int(torch.randint(len(helpful), (), generator=generator))]
        gap -= change
    return _with_bits(policy, pairs)


def slot_bits(policy: BitPolicy) -> Iterator[tuple[Slot, Bits]]:
    """Every searched place that has bits, and its bits."""
    for index, cell in enumerate(policy.cells):
        for position, pair in enumerate((cell.preprocess0, cell.preprocess1, *cell.operations)):
            if pair is not None:
                yield (index, position), pair


def slot_macs(policy: BitPolicy, layers: Iterable[LayerCost]) -> dict[Slot, int]:
    """MACs of all convolutions of the network that take their bits from each place."""
    places = [(row.macs, match) for row in layers if (match := _LAYER.match(row.name))]
    depth = 1 + max(int(match[1]) for _, match in places)
    sources = policy.source_cells([is_reduction(index, depth) for index in range(depth)])
    macs: dict[Slot, int] = {}
    for count, match in places:
        slot = sources[int(match[1])], int(match[2]) if match[2] else 2 + int(match[3])
        macs[slot] = macs.get(slot, 0) + count
    return macs


def _with_bits(policy: BitPolicy, pairs: Mapping[Slot, Bits]) -> BitPolicy:
    cells = []
    for index, cell in enumerate(policy.cells):
        operations = tuple(pairs.get((index, 2 + k)) for k in range(len(cell.operations)))
        cells.append(replace(cell, preprocess0=pairs[index, 0], preprocess1=pairs[index, 1], operations=operations))
    return replace(policy, cells=tuple(cells))
