# SPDX-License-Identifier: Apache-2.0
"""Expected and exact BitOps of a network that searches bits, and EdMIPS's complexity, differentiable in the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.cost.counting import layer_cost, trace_layers
from common.cost.expected import ACCOUNTINGS
from qsubnet.subnet import OPERANDS, Subnet


class SubnetCost(nn.Module):
    """BitOps of one image of `image_size` x `image_size`: sum over convolutions of size x weight x activation bits.

    The size is MACs ("exact" accounting, which also counts the ends, stem and classifier, at their own bits) or the
    reference's group-blind count ("paper", without the ends). Expected bits are those of the softmax of the logits.
    It is what `--target-bitops` steers (`common.cost.target.SteerableCost`).
    """

    def __init__(self, subnet: Subnet, image_size: int, *, accounting: str = "exact") -> None:
        super().__init__()
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"--cost-accounting: {accounting!r} is unknown; choose {' or '.join(ACCOUNTINGS)}")
        subnet.network.check_input(image_size)
        shapes = {s.name: s for s in trace_layers(subnet.network, (subnet.network.in_channels, image_size, image_size))}
        exact = accounting == "exact"
        size_of = {name: float(s.macs) if exact else s.paper_size for name, s in shapes.items()}
        ends = [layer_cost(s).bitops for name, s in shapes.items() if name not in subnet.convolutions]
        self.ends = float(sum(ends)) if exact else 0.0
        # shapes come in the order of the forward
        self.first_size = next(size for name, size in size_of.items() if name in subnet.convolutions)
        sizes = [size_of[name] for name in subnet.convolutions]
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float64))
        self.register_buffer("bit_values", torch.tensor(subnet.bits, dtype=torch.float64))
        whole = sum(sizes)
        self.cheapest = self.ends + whole * min(subnet.bits) ** 2
        self.dearest = self.ends + whole * max(subnet.bits) ** 2

    def _searched(self, subnet: Subnet, hard: bool) -> Tensor:
        """BitOps of the convolutions under search: at their expected, or their most probable bits."""
        total = self.sizes
        for operand in OPERANDS:
            logits = subnet.bit_logits(operand).double()
            total = total * (self.bit_values[logits.argmax(-1)] if hard else logits.softmax(-1) @ self.bit_values)
        return total.sum()

    def forward(self, subnet: Subnet) -> Tensor:
        """Expected BitOps (float64 scalar, differentiable in the logits)."""
        return self._searched(subnet, hard=False) + self.ends

    @torch.no_grad()
    def exact(self, subnet: Subnet) -> Tensor:
        """BitOps of the present choice (float64 scalar)."""
        return self._searched(subnet, hard=True) + self.ends

    def term(self, subnet: Subnet, share: float = 1.0) -> Tensor:
        """EdMIPS's complexity, times which --complexity-decay is added to the loss: in units of the first convolution.

        `share` is for architecture parameters, of which there are none.
        """
        return (self._searched(subnet, hard=False) / self.first_size).float()
