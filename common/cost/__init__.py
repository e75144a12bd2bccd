# SPDX-License-Identifier: Apache-2.0
"""What a network costs: counted exactly, and expected of a supernet."""

from common.cost.counting import Cost, LayerCost, LayerShape, architecture_cost, network_cost, trace_layers
from common.cost.expected import ExpectedCost, edge_probability

__all__ = [
    "Cost",
    "ExpectedCost",
    "LayerCost",
    "LayerShape",
    "architecture_cost",
    "edge_probability",
    "network_cost",
    "trace_layers",
]
