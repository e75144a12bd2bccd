# SPDX-License-Identifier: Apache-2.0
"""Architectures and the networks built from them: the relaxed supernet and the evaluation network."""

from common.nets.architecture import (
    DARTS,
    SPACES,
    Architecture,
    BitPolicy,
    CellBits,
    genotype_from_json,
    genotype_to_json,
    load_architecture,
)
from common.nets.enas_space import MicroCells, MicroNetwork, build_micro_network, parse_cells
from common.nets.network import Network, build_network
from common.nets.networks import EvaluationNetwork, network_of
from common.nets.operations import OPERATIONS
from common.nets.shared_norm import SharedBatchNorm2d, share_statistics
from common.nets.supernet import Supernet, build_supernet

__all__ = [
    "DARTS",
    "OPERATIONS",
    "SPACES",
    "Architecture",
    "BitPolicy",
    "CellBits",
    "EvaluationNetwork",
    "MicroCells",
    "MicroNetwork",
    "Network",
    "SharedBatchNorm2d",
    "Supernet",
    "build_micro_network",
    "build_network",
    "build_supernet",
    "genotype_from_json",
    "genotype_to_json",
    "load_architecture",
    "network_of",
    "parse_cells",
    "share_statistics",
]
