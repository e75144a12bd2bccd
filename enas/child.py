# SPDX-License-Identifier: Apache-2.0
"""The child of shared weights: for every place of every cell, the weights of every input and kernel size.

A forward names the architecture and computes its operations alone; tensors of other operations take part in nothing and
get no gradient. All normalisation is by the batch's own statistics, in evaluation too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.enas_layers import (
    SHARED_EPSILON,
    AuxiliaryHead,
    Calibration,
    FactorizedReduction,
    Pool,
    SeparableConv,
    batch_norm,
    initialize,
    resolve_layer_types,
)
from common.nets.enas_space import (
    KERNELS,
    Block,
    LayerPlan,
    MicroCells,
    auxiliary_layer,
    check_image_size,
    plan_layers,
    unused_nodes,
)

_POOLS = (Pool("avg", 1), Pool("max", 1))


class SharedCell(nn.Module):
    """One cell: separable convolutions for every (block, branch, input, kernel), and a final 1x1 row for every node."""

    def __init__(self, plan: LayerPlan, widths: tuple[int, int], halve: bool, blocks: int, compat: bool) -> None:
        super().__init__()
        kind, f = plan.kind, plan.channels
        self.calibration = Calibration(kind, batch_norm, widths, f, halve)
        norm = partial(batch_norm, eps=SHARED_EPSILON)
        self.separable = nn.ModuleDict()
        for block in range(blocks):
            for branch in "xy":
                for node in range(block + 2):
                    for k, kernel in enumerate(KERNELS):
                        own = SeparableConv(kind, norm, f, kernel, rescale=compat)
                        self.separable[_key(block, branch, node, k)] = own
        self.quantize = kind.activation()
        self.final = nn.ModuleList(kind.conv(f, f, quantize_input=False) for _ in range(blocks + 2))
        self.final_bn = batch_norm(f)

    def forward(self, before_last: Tensor, last: Tensor, blocks: Sequence[Block]) -> Tensor:
        """Both inputs and the cell's blocks -> [B, channels, H, W]."""
        nodes = self.calibration(before_last, last)
        for position, (x, x_op, y, y_op) in enumerate(blocks):
            left = self._operation(nodes[x], position, "x", x, x_op)
            nodes.append(left + self._operation(nodes[y], position, "y", y, y_op))
        unused = unused_nodes(blocks)
        value = self.quantize(torch.cat([nodes[node] for node in unused], 1))
        weight = torch.cat([self.final[node].scaled_weight() for node in unused], 1)
        return self.final_bn(F.conv2d(value, weight))

    def _operation(self, x: Tensor, block: int, branch: str, node: int, operation: int) -> Tensor:
        if operation < len(KERNELS):
            return self.separable[_key(block, branch, node, operation)](x)
        pool = operation - len(KERNELS)
        return _POOLS[pool](x) if pool < len(_POOLS) else x


def _key(block: int, branch: str, node: int, kernel: int) -> str:
    return f"{block}{branch}{node}_{KERNELS[kernel]}"


class SharedLayer(nn.Module):
    """A cell, after the reduction of its input where it is a reduction cell."""

    def __init__(self, plan: LayerPlan, widths: tuple[int, int], halve: bool, blocks: int, compat: bool) -> None:
        super().__init__()
        self.plan, f = plan, plan.channels
        self.reduction: FactorizedReduction | None = None
        if plan.reduction:
            self.reduction = FactorizedReduction(plan.kind, batch_norm, widths[1], f, quantize_input=False)
            widths, halve = (widths[1], f), True
        self.cell = SharedCell(plan, widths, halve, blocks, compat)

    def forward(self, before_last: Tensor, last: Tensor, cells: MicroCells) -> tuple[Tensor, Tensor]:
        """Outputs of the two layers before -> what the next layer takes for those of the two before it.

        After a reduction cell the earlier one is the reduced input, not the output of the layer before.
        """
        if self.reduction is not None:
            before_last, last = last, self.reduction(last)
        return last, self.cell(before_last, last, cells.cell(self.plan.reduction))


class SharedChild(nn.Module):
    """Stem, L + 2 layers of shared weights, classifier and auxiliary head.

    `memory_format` is how images are held in memory, from the input on.
    """

    memory_format = torch.channels_last
    checkpoint_cells = False  # never: see enas/flags.py

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        out_filters: int,
        layers: int,
        blocks: int,
        image_size: int = 32,
        layer_bits: list[str] | None = None,
        auxiliary: bool = True,
        dropout: float = 0.0,
        compat: bool = False,
    ) -> None:
        """As `build_micro_network`, with `blocks` a cell. Raises ValueError for sizes that do not fit."""
        super().__init__()
        check_image_size(image_size, layers)
        types = resolve_layer_types(layer_bits, layers + 2)
        width = 3 * out_filters
        self.blocks, self.dropout = blocks, dropout
        self.stem = nn.Sequential(types[0].conv(in_channels, width, 3, quantize_input=False), batch_norm(width))
        self.layers = nn.ModuleList()
        widths, levels = (width, width), (0, 0)
        plans = plan_layers(layers, out_filters, types)
        for plan in plans:
            self.layers.append(SharedLayer(plan, widths, levels[0] != levels[1], blocks, compat))
            level = plan.level + plan.reduction
            widths = (plan.channels if plan.reduction else widths[1], plan.channels)
            levels = (level if plan.reduction else levels[1], level)
        self.auxiliary_index = auxiliary_layer(layers)
        self.auxiliary_head: AuxiliaryHead | None = None
        if auxiliary:
            at = plans[self.auxiliary_index]
            size = image_size >> (at.level + at.reduction)
            self.auxiliary_head = AuxiliaryHead(types[-1], batch_norm, at.channels, size, num_classes)
        self.last = types[-1].activation()
        self.classifier = nn.Linear(widths[1], num_classes, bias=False)
        initialize(self)
        self.to(memory_format=self.memory_format)  # a third less time on a CPU

    def forward(self, x: Tensor, cells: MicroCells) -> tuple[Tensor, Tensor | None]:
        """Images [B, C, H, W] through one architecture -> (logits, the auxiliary head's, or None outside training)."""
        before_last = last = self.stem(x.contiguous(memory_format=self.memory_format))
        auxiliary = None
        for index, layer in enumerate(self.layers):
            before_last, last = layer(before_last, last, cells)
            if index == self.auxiliary_index and self.auxiliary_head is not None and self.training:
                auxiliary = self.auxiliary_head(last)
        pooled = F.dropout(self.last(last).mean((2, 3)), self.dropout, self.training)
        return self.classifier(pooled), auxiliary
