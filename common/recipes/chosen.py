# SPDX-License-Identifier: Apache-2.0
"""What an epoch of a search's history chose: its cells and bits, and how sure each choice was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.nets import enas_space
from common.nets.architecture import DARTS, SCHEMA, Architecture
from common.nets.darts_space import edge_index
from common.recipes.pictures import Margins
from genotypes import PRIMITIVES


@dataclass(frozen=True)
class Choice:
    """An epoch (counted from 0) of a search."""

    epoch: int
    architecture: Architecture
    margins: Margins | None
    """None: the search has no logits of operations."""
    sampled: int = 0
    """Where the search samples architectures: how many that epoch; the best of them is the one here."""
    final: bool = False
    """Not an epoch's choice, but what the whole search found."""


def choice_of(row: Mapping[str, Any], where: Path) -> Choice:
    """The choice of a row of history.jsonl.

    Raises ValueError naming the file, the epoch and the reason: a training's row, or one that is damaged.
    """
    place = f"{where / 'history.jsonl'}: epoch {row['epoch']}"
    if "genotype" in row:
        data = {"schema": SCHEMA, "space": DARTS, "genotype": row["genotype"], "bits": row.get("bits")}
        architecture = Architecture.from_json(data, place)
        return Choice(row["epoch"], architecture, margins_of(row, architecture))
    if row.get("architectures"):
        try:
            best = max(row["architectures"], key=lambda one: one["top1"])
            cells = enas_space.parse_cells(best["cells"])
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            raise ValueError(f"{place}: its architectures cannot be read ({error}); the file is damaged") from None
        return Choice(row["epoch"], Architecture(cells, space=enas_space.SPACE), None, len(row["architectures"]))
    raise ValueError(f"{place}: names no cells; give the run of a search")


def margins_of(row: Mapping[str, Any], architecture: Architecture) -> Margins | None:
    """By how much each chosen operation leads its edge's next best one in the softmax over the edge's operations.

    `none` is left aside, since it is never chosen. None where the row has no alphas, or does not say what its columns
    are. Raises nothing: a table that does not fit the genotype counts as none.
    """
    tables = row.get("alphas")
    primitives = row.get("primitives") or PRIMITIVES
    named = isinstance(primitives, list | tuple) and all(isinstance(name, str) for name in primitives)
    if not isinstance(tables, Mapping) or not named:
        return None
    found = {}
    for kind in ("normal", "reduce"):
        leads = []
        for number, (operation, state) in enumerate(architecture.pairs(kind)):
            lead = _lead(tables.get(kind), primitives, operation, edge_index(number // 2, state))
            if lead is None:
                return None
            leads.append(lead)
        found[kind] = leads
    return found


def _lead(table: Any, primitives: Sequence[str], operation: str, edge: int) -> float | None:
    if not isinstance(table, list) or edge >= len(table) or operation not in primitives:
        return None
    shares = table[edge]
    if not isinstance(shares, list) or len(shares) != len(primitives):
        return None
    if not all(isinstance(share, int | float) and math.isfinite(share) for share in shares):
        return None
    by_name = dict(zip(primitives, shares, strict=True))
    others = [share for name, share in by_name.items() if name not in (operation, "none")]
    return min(1.0, max(0.0, by_name[operation] - max(others, default=0.0)))
