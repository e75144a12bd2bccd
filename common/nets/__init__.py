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
from common.nets.supernet import Supernet, build_supernet

__all__ = [
    "OPERATIONS",
    "Architecture",
    "BitPolicy",
    "CellBits",
    "Network",
    "Supernet",
    "build_network",
    "build_supernet",
    "genotype_from_json",
    "genotype_to_json",
    "load_architecture",
]
