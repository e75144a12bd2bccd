# SPDX-License-Identifier: Apache-2.0
"""What a search may be steered by: BitOps, MACs or memory, counted; or latency, read from a measured table.

Each measure gives the cost of a place of the network at every pair of (weight bits, activation bits). What a search
expects to pay is then the mean of these over its probabilities; nothing but the table differs between measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from common.cost.counting import LayerShape, trace_layers
from common.cost.places import CLASSIFIER, STEM, Place, build_place
from common.nets.architecture import Bits
from common.nets.network import Network
from common.quant import FLOAT_BITS

COUNTED = ("bitops", "macs", "memory")
LATENCY = "latency"
MEASURES = (*COUNTED, LATENCY)
UNITS = {"bitops": "BitOps", "macs": "MACs", "memory": "bytes", "latency": "ms"}
ACCOUNTINGS = ("exact", "paper")


class Measure(Protocol):
    """A cost that adds up over the places of a network."""

    name: str
    accounting: str
    notes: tuple[str, ...]

    def values(self, place: Place, pairs: Sequence[Bits]) -> list[float]:
        """The cost of a place at each pair of bits. Raises ValueError where it is not known."""
        ...

    def convolutions(
        self, network: Network, image_size: int, names: Sequence[str], pairs: Sequence[Bits]
    ) -> tuple[list[list[float]], float]:
        """Of a network: the cost of each named convolution at each pair of bits, and of everything else together."""
        ...


class Counted:
    """BitOps, MACs, or bytes of weights, counted exactly as `network_cost` does.

    `accounting` "paper" is the reference's group-blind count of BitOps, without the ends. Raises ValueError naming the
    flag.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, name: str = "bitops", accounting: str = "exact") -> None:
        if name not in COUNTED:
            raise ValueError(f"--cost: {name!r} is unknown; choose among {', '.join(MEASURES)}")
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"--cost-accounting: {accounting!r} is unknown; choose exact or paper")
        if accounting == "paper" and name != "bitops":
            raise ValueError(f"--cost-accounting paper: counts BitOps, and --cost is {name}; drop one of the two")
        self.name, self.accounting = name, accounting
        self._traced: dict[Place, tuple[list[LayerShape], int]] = {}

    def size(self, shape: LayerShape) -> float:
        """BitOps of a layer at 1 x 1 bits: its MACs, or the reference's count of them."""
        return float(shape.macs) if self.accounting == "exact" else shape.paper_size

    def layer(self, shape: LayerShape, bits: Bits) -> float:
        """A layer's cost at its bits."""
        if self.name == "memory":
            return shape.weights * bits[0] / 8
        return self.size(shape) * (bits[0] * bits[1] if self.name == "bitops" else 1)

    def values(self, place: Place, pairs: Sequence[Bits]) -> list[float]:
        """See Measure. Places without a weight cost nothing; so do, by the paper, the ends."""
        if self.accounting == "paper" and place.operation in (STEM, CLASSIFIER):
            return [0.0] * len(pairs)
        shapes, others = self._trace(place)
        rest = others * FLOAT_BITS / 8 if self.name == "memory" else 0.0
        return [sum(self.layer(shape, pair) for shape in shapes) + rest for pair in pairs]

    def convolutions(
        self, network: Network, image_size: int, names: Sequence[str], pairs: Sequence[Bits]
    ) -> tuple[list[list[float]], float]:
        """See Measure."""
        shapes = {s.name: s for s in trace_layers(network, (network.in_channels, image_size, image_size))}
        rows = [[self.layer(shapes[name], pair) for pair in pairs] for name in names]
        if self.accounting == "paper":
            return rows, 0.0
        searched = set(names)
        fixed = [s for name, s in shapes.items() if name not in searched]
        rest = float(sum(self.layer(s, (s.weight_bits, s.activation_bits)) for s in fixed))
        if self.name == "memory":
            head = {id(p) for p in (network.auxiliary_head.parameters() if network.auxiliary_head else ())}
            logits = {id(p) for n, p in network.named_parameters() if n.rpartition(".")[2].startswith("gamma_")}
            counted = sum(p.numel() for p in network.parameters() if id(p) not in head | logits)
            rest += (counted - sum(s.weights for s in shapes.values())) * FLOAT_BITS / 8
        return rows, rest

    def _trace(self, place: Place) -> tuple[list[LayerShape], int]:
        """The layers of a place, and how many parameters it has besides their weights; traced once."""
        if place not in self._traced:
            with torch.device("meta"):
                module: nn.Module = build_place(place)
            shapes = trace_layers(module, (place.in_channels, place.size, place.size))
            others = sum(p.numel() for p in module.parameters()) - sum(shape.weights for shape in shapes)
            self._traced[place] = (shapes, others)
        return self._traced[place]
