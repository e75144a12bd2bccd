# SPDX-License-Identifier: Apache-2.0
"""Genotypes: the words in which a cell is written down, and the named cells of the literature.

A genotype lists, for each of the two cell types, the chosen (primitive, input state) pairs, two per node, and the
states whose concatenation is the cell's output. States 0 and 1 are the outputs of the two previous cells, state 2 + i
is node i (Liu et al., DARTS, 2019).
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

PRIMITIVES: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""Candidate operations of the DARTS search space, in the order of the alphas' columns."""


class Genotype(NamedTuple):
    """The two chosen cells: (primitive, input state) pairs, two per node, and the states that are concatenated."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


GENOTYPES: dict[str, Genotype] = {
    "PADDLE_DARTS_V1": Genotype(
        normal=(
            ("sep_conv_5x5", 0),
            ("dil_conv_3x3", 1),
            ("sep_conv_3x3", 2),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 0),
            ("dil_conv_3x3", 3),
            ("sep_conv_3x3", 0),
            ("max_pool_3x3", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("dil_conv_3x3", 2),
            ("sep_conv_5x5", 0),
            ("max_pool_3x3", 0),
            ("dil_conv_3x3", 3),
            ("avg_pool_3x3", 3),
            ("avg_pool_3x3", 4),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "PADDLE_DARTS_V2": Genotype(
        normal=(
            ("dil_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("skip_connect", 1),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("dil_conv_5x5", 3),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "PADDLE_PC_DARTS": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_5x5", 0),
            ("dil_conv_5x5", 2),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 2),
            ("sep_conv_3x3", 0),
            ("dil_conv_3x3", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
            ("dil_conv_5x5", 3),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "DARTS_V1": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 2),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "DARTS_V2": Genotype(
        normal=(
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("skip_connect", 0),
            ("dil_conv_3x3", 2),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "PC_DARTS_cifar": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 0),
            ("dil_conv_3x3", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("avg_pool_3x3", 0),
            ("dil_conv_3x3", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_5x5", 1),
            ("max_pool_3x3", 0),
            ("sep_conv_5x5", 1),
            ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 2),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "PC_DARTS_image": Genotype(
        normal=(
            ("skip_connect", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 0),
            ("skip_connect", 1),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1),
            ("dil_conv_5x5", 4),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_3x3", 0),
            ("skip_connect", 1),
            ("dil_conv_5x5", 2),
            ("max_pool_3x3", 1),
            ("sep_conv_3x3", 2),
            ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 3),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "NASNet": Genotype(
        normal=(
            ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 0),
            ("avg_pool_3x3", 1),
            ("skip_connect", 0),
            ("avg_pool_3x3", 0),
            ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 1),
        ),
        normal_concat=(2, 3, 4, 5, 6),
        reduce=(
            ("sep_conv_5x5", 1),
            ("sep_conv_7x7", 0),
            ("max_pool_3x3", 1),
            ("sep_conv_7x7", 0),
            ("avg_pool_3x3", 1),
            ("sep_conv_5x5", 0),
            ("skip_connect", 3),
            ("avg_pool_3x3", 2),
            ("sep_conv_3x3", 2),
            ("max_pool_3x3", 1),
        ),
        reduce_concat=(4, 5, 6),
    ),
    "AmoebaNet": Genotype(
        normal=(
            ("avg_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0),
            ("avg_pool_3x3", 3),
            ("sep_conv_3x3", 1),
            ("skip_connect", 1),
            ("skip_connect", 0),
            ("avg_pool_3x3", 1),
        ),
        normal_concat=(4, 5, 6),
        reduce=(
            ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1),
            ("max_pool_3x3", 0),
            ("sep_conv_7x7", 2),
            ("sep_conv_7x7", 0),
            ("avg_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("conv_7x1_1x7", 0),
            ("sep_conv_3x3", 5),
        ),
        reduce_concat=(3, 4, 6),
    ),
    "QDARTS_CIFAR_0": Genotype(
        normal=(
            ("dil_conv_5x5", 0),
            ("dil_conv_3x3", 1),
            ("dil_conv_5x5", 1),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("dil_conv_3x3", 2),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 3),
            ("avg_pool_3x3", 0),
            ("skip_connect", 3),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_CIFAR_1e15": Genotype(
        normal=(
            ("dil_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("dil_conv_5x5", 2),
            ("max_pool_3x3", 0),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 0),
            ("dil_conv_5x5", 3),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_5x5", 2),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 2),
            ("sep_conv_5x5", 1),
            ("dil_conv_5x5", 3),
            ("sep_conv_5x5", 2),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_CIFAR_1e15_CO": Genotype(
        normal=(
            ("dil_conv_5x5", 1),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 0),
            ("avg_pool_3x3", 2),
            ("max_pool_3x3", 3),
            ("sep_conv_5x5", 1),
            ("sep_conv_5x5", 4),
            ("dil_conv_5x5", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_5x5", 1),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 2),
            ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 2),
            ("max_pool_3x3", 3),
            ("sep_conv_3x3", 2),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_CIFAR_1e7": Genotype(
        normal=(
            ("dil_conv_3x3", 1),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 1),
            ("dil_conv_5x5", 2),
            ("sep_conv_3x3", 2),
            ("dil_conv_3x3", 0),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_3x3", 0),
            ("max_pool_3x3", 1),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 3),
            ("avg_pool_3x3", 0),
            ("sep_conv_5x5", 3),
            ("dil_conv_5x5", 0),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_CIFAR_1e9": Genotype(
        normal=(
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 1),
            ("sep_conv_3x3", 0),
            ("dil_conv_5x5", 2),
            ("max_pool_3x3", 0),
            ("dil_conv_5x5", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 3),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 1),
            ("sep_conv_5x5", 0),
            ("dil_conv_5x5", 1),
            ("sep_conv_5x5", 2),
            ("dil_conv_5x5", 3),
            ("sep_conv_5x5", 2),
            ("sep_conv_5x5", 4),
            ("sep_conv_5x5", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_IMGNT": Genotype(
        normal=(
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("dil_conv_5x5", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 1),
            ("dil_conv_3x3", 3),
            ("sep_conv_5x5", 1),
            ("max_pool_3x3", 3),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_3x3", 1),
            ("max_pool_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("max_pool_3x3", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 4),
            ("skip_connect", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_IMGNT_0": Genotype(
        normal=(
            ("sep_conv_5x5", 0),
            ("skip_connect", 1),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 2),
            ("max_pool_3x3", 3),
            ("dil_conv_5x5", 0),
            ("sep_conv_5x5", 0),
            ("max_pool_3x3", 4),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 2),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_IMGNT_1e9": Genotype(
        normal=(
            ("skip_connect", 0),
            ("skip_connect", 1),
            ("sep_conv_5x5", 0),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("skip_connect", 1),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 3),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("sep_conv_5x5", 0),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 1),
            ("sep_conv_5x5", 0),
            ("skip_connect", 3),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_IMGNT_1e9_100": Genotype(
        normal=(
            ("skip_connect", 0),
            ("dil_conv_5x5", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 1),
            ("sep_conv_5x5", 0),
            ("sep_conv_5x5", 2),
            ("dil_conv_5x5", 2),
            ("sep_conv_3x3", 0),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("skip_connect", 0),
            ("avg_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("dil_conv_5x5", 2),
            ("max_pool_3x3", 0),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
    "QDARTS_IMGNT_5e5": Genotype(
        normal=(
            ("sep_conv_5x5", 0),
            ("max_pool_3x3", 1),
            ("dil_conv_5x5", 0),
            ("dil_conv_5x5", 2),
            ("dil_conv_5x5", 3),
            ("sep_conv_5x5", 0),
            ("dil_conv_5x5", 3),
            ("skip_connect", 0),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("sep_conv_5x5", 0),
            ("max_pool_3x3", 2),
            ("skip_connect", 3),
            ("skip_connect", 3),
            ("skip_connect", 2),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
}
"""Published cells. PADDLE_* are those of the PaddleSlim example, QDARTS_* those of NablaQDARTS (CIFAR and ImageNet)."""

ALIASES: dict[str, str] = {
    "DARTS": "DARTS_V2",
    "PC_DARTS": "PC_DARTS_cifar",
    "PCDARTS": "PC_DARTS_cifar",
}
"""Other spellings; the same on every data set, so that a name never means two cells."""

_BY_LOWER_NAME = {name.lower(): name for name in GENOTYPES} | {a.lower(): name for a, name in ALIASES.items()}


def lookup(name: str) -> tuple[str, Genotype]:
    """Find a named genotype, whatever the case; return its canonical name and the genotype.

    Raises ValueError with the nearest names when there is none of that name.
    """
    canonical = _BY_LOWER_NAME.get(name.lower().replace("-", "_"))
    if canonical is None:
        spelled = {lower: lower for lower in _BY_LOWER_NAME} | {a.lower(): a for a in ALIASES}
        spelled |= {known.lower(): known for known in GENOTYPES}
        near = [spelled[n] for n in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.4)]
        hint = f"did you mean {', '.join(near)}?" if near else f"known names: {', '.join(GENOTYPES)}"
        raise ValueError(f"{name} is not specified in genotypes.py; {hint}")
    return canonical, GENOTYPES[canonical]
