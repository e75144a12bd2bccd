# SPDX-License-Identifier: Apache-2.0
"""Architectures and the networks built from them: the relaxed supernet and the evaluation network."""

from common.nets.architecture import (
    Architecture,
    BitPolicy,
    CellBits,
    genotype_from_json,
    genotype_to_json,
    load_architecture,
)
from common.nets.network import Network, build_network
from common.nets.operations import OPERATIONS


__all__ = [
    "OPERATIONS",
    "Architecture",
    "BitPolicy",
    "CellBits",
    "Network",

    "build_network",

    "genotype_from_json",
    "genotype_to_json",
    "load_architecture",
]
