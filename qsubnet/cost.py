# SPDX-License-Identifier: Apache-2.0
"""Expected and exact cost of a network that searches bits, and EdMIPS's complexity, differentiable in the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.cost.counting import trace_layers
from common.cost.expected import bit_pairs, pair_shares
from common.cost.measures import Counted, Measure
from qsubnet.subnet import OPERANDS, Subnet


class SubnetCost(nn.Module):
    """Cost of one image of `image_size` x `image_size`: the sum over convolutions of a table over the pairs of bits.

    For BitOps an entry is size x weight bits x activation bits. The size is MACs ("exact" accounting, which also
    counts the ends, stem and classifier, at their own bits) or the reference's group-blind count ("paper", without the
    ends). `measure` counts something else in place of BitOps. Expected bits are those of the softmax of the logits.
    It is what a target steers (`common.cost.target.SteerableCost`).

    Raises ValueError for a measure that no choice of bits changes: nothing else is searched here.
    """

    def __init__(
        self, subnet: Subnet, image_size: int, *, accounting: str = "exact", measure: Measure | None = None
    ) -> None:
        super().__init__()
        self.measure: Measure = measure or Counted("bitops", accounting)
        network, names = subnet.network, list(subnet.convolutions)
        network.check_input(image_size)
        rows, self.ends = self.measure.convolutions(network, image_size, names, bit_pairs(subnet.bits))
        table = torch.tensor(rows, dtype=torch.float64)
        self.register_buffer("table", table)
        self.cheapest = self.ends + float(table.amin(-1).sum())
        self.dearest = self.ends + float(table.amax(-1).sum())
        if len(subnet.bits) > 1 and self.cheapest == self.dearest:
            raise ValueError(
                f"--cost {self.measure.name}: is the same at all of the bits {', '.join(map(str, subnet.bits))}, and "
                "nothing but bits is chosen here, so nothing is left to steer; give --cost bitops or --cost memory"
            )
        self.unit = self._unit(subnet, image_size, table)

    @property
    def steers_bits(self) -> bool:
        """Whether some choice of bits changes the cost."""
        return self.dearest > self.cheapest

    def _unit(self, subnet: Subnet, image_size: int, table: Tensor) -> float:
        """What the term counts in: the first convolution at one bit. Another measure than BitOps begins as they do."""
        counted = self.measure if isinstance(self.measure, Counted) else Counted()
        shape = (subnet.network.in_channels, image_size, image_size)
        sizes = {s.name: counted.size(s) for s in trace_layers(subnet.network, shape)}
        # shapes come in the order of the forward
        first = next(size for name, size in sizes.items() if name in subnet.convolutions)
        if self.measure.name == "bitops":
            return first
        bitops = sum(sizes[name] for name in subnet.convolutions) * (sum(subnet.bits) / len(subnet.bits)) ** 2
        return float(table.mean(-1).sum()) / (bitops / first)

    def _searched(self, subnet: Subnet, hard: bool) -> Tensor:
        """Cost of the convolutions under search: at their expected, or their most probable bits."""
        probabilities = (subnet.bit_logits(operand).double().softmax(-1) for operand in OPERANDS)
        return (self.table * pair_shares(*probabilities, hard)).sum()

    def forward(self, subnet: Subnet) -> Tensor:
        """Expected cost in the measure's unit (float64 scalar, differentiable in the logits)."""
        return self._searched(subnet, hard=False) + self.ends

    @torch.no_grad()
    def exact(self, subnet: Subnet) -> Tensor:
        """Cost of the present choice (float64 scalar)."""
        return self._searched(subnet, hard=True) + self.ends

    def term(self, subnet: Subnet, share: float = 1.0) -> Tensor:
        """EdMIPS's complexity, times which --complexity-decay is added to the loss: in units of the first convolution.

        `share` is for architecture parameters, of which there are none.
        """
        return (self._searched(subnet, hard=False) / self.unit).float()
