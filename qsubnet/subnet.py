# SPDX-License-Identifier: Apache-2.0
"""A fixed network whose cells' convolutions choose their bits (EdMIPS, Cai and Vasconcelos, CVPR 2020, section 4).

Every convolution mixes its bit-widths by the softmax of two rows of logits of its own, one for its weight and one for
its input, while all else of the network, tensors and names, stays as `build_network` made it: what a training of the
network has saved fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from common.nets import Architecture, Network
from common.nets.architecture import BitPolicy
from common.quant import SUPPORTED_BITS, MixedQuantConv2d, QuantConv2d
from genotypes import Genotype

LOGIT = 0.01
"""Every bit logit at the start, as in EdMIPS: all bit-widths are equally likely."""
OPERANDS = ("weight", "activation")


class SearchedConv2d(MixedQuantConv2d):
    """A convolution with `source`'s shape and weight mixing `bits` by `gamma_weight`, `gamma_activation` [bits]."""

    def __init__(self, source: QuantConv2d, bits: tuple[int, ...], *, scheme: str, signed_activations: bool) -> None:
        super().__init__(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            bits=bits,
            scheme=scheme,
            signed_activations=signed_activations,
            stride=source.stride,
            padding=source.padding,
            dilation=source.dilation,
            groups=source.groups,
        )
        self.weight = source.weight
        self.gamma_weight = nn.Parameter(torch.full((len(bits),), LOGIT))
        self.gamma_activation = nn.Parameter(torch.full((len(bits),), LOGIT))

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """x [B, in, H, W] -> [B, out, H', W']; `relu`: of max(x, 0)."""
        return super().forward(x, self.gamma_activation.softmax(-1), self.gamma_weight.softmax(-1), relu)


class Subnet(nn.Module):
    """A full-precision evaluation network with its cells' convolutions under bit search; see `common.engine.protocols`.

    `network` is changed in place. Raises ValueError for bit-widths that are unknown or given twice.
    """

    def __init__(
        self, network: Network, bits: tuple[int, ...], *, scheme: str = "default", signed_activations: bool = False
    ) -> None:
        super().__init__()
        if not bits or len(set(bits)) != len(bits) or not set(bits) <= set(SUPPORTED_BITS):
            raise ValueError(f"--bits: {bits} must be different bit-widths among {', '.join(map(str, SUPPORTED_BITS))}")
        self.network, self.bits = network, bits
        self.convolutions: dict[str, SearchedConv2d] = {}
        for name, module in list(network.named_modules()):
            if name.startswith("cells.") and isinstance(module, QuantConv2d):
                searched = SearchedConv2d(module, bits, scheme=scheme, signed_activations=signed_activations)
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, searched)
                self.convolutions[name] = searched
        network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes]."""
        return self.network(x)[0]

    def gamma_parameters(self) -> list[nn.Parameter]:
        """The bit logits, [bits] each."""
        return [getattr(conv, f"gamma_{operand}") for conv in self.convolutions.values() for operand in OPERANDS]

    def arch_parameters(self) -> list[nn.Parameter]:
        """None: the cells are fixed."""
        return []

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything else."""
        logits = {id(p) for p in self.gamma_parameters()}
        return [p for p in self.parameters() if id(p) not in logits]

    def bit_logits(self, operand: str) -> Tensor:
        """The logits of "weight" or "activation", [convolutions, bits], in the network's order."""
        return torch.stack([getattr(conv, f"gamma_{operand}") for conv in self.convolutions.values()])

    @property
    def gammas(self) -> dict[str, Tensor]:
        """The logits by kind of cell and operand: `{normal,reduce}_{activation,weight}` [convolutions, bits]."""
        reduction = torch.tensor([self.network.cells[_cell(name)].reduction for name in self.convolutions])
        return {
            f"{kind}_{operand}": self.bit_logits(operand)[reduction == (kind == "reduce")]
            for kind in ("normal", "reduce")
            for operand in ("activation", "weight")
        }

    def genotype(self) -> Genotype:
        """The fixed cells."""
        return self.network.architecture.genotype

    @torch.no_grad()
    def architecture(self, search: Mapping[str, Any] | None = None) -> Architecture:
        """The cells with the most probable bits of every convolution (reads the device)."""
        weight, activation = (self.bit_logits(operand).argmax(-1).tolist() for operand in OPERANDS)
        pairs = [(self.bits[w], self.bits[a]) for w, a in zip(weight, activation, strict=True)]
        policy = BitPolicy(layers=dict(zip(self.convolutions, pairs, strict=True)))
        return replace(self.network.architecture, bits=policy, search=search or {})


def _cell(name: str) -> int:
    return int(name.split(".")[1])
