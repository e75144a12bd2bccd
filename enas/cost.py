# SPDX-License-Identifier: Apache-2.0
"""BitOps of the network that an architecture will be trained in, from its integers alone: fast enough for a reward.

The same figure as `common.cost.network_cost(...).bitops` of that network, which a test holds it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.nets.enas_layers import FLOAT_BITS, LayerType, resolve_layer_types
from common.nets.enas_space import IDENTITY, KERNELS, LayerPlan, MicroCells, plan_layers, unused_nodes


@dataclass(frozen=True)
class NetworkSize:
    """What the network to be trained is built with."""

    in_channels: int
    num_classes: int
    out_filters: int
    layers: int
    image_size: int
    layer_bits: list[str] | None = None


def cells_bitops(cells: MicroCells, size: NetworkSize) -> int:
    """BitOps of one image through the fixed network of these cells."""
    types = resolve_layer_types(size.layer_bits, size.layers + 2)
    width, side = 3 * size.out_filters, size.image_size
    total = side * side * 9 * size.in_channels * width * types[0].bits * FLOAT_BITS
    widths, sides = (width, width), (side, side)
    for plan in plan_layers(size.layers, size.out_filters, types):
        cost, channels = _cell_bitops(cells.cell(plan.reduction), plan, widths, sides)
        total += cost
        widths = (widths[1], channels)
        sides = (sides[1], sides[1] // 2 if plan.reduction else sides[1])
    return total + widths[1] * size.num_classes * FLOAT_BITS * FLOAT_BITS


def _cell_bitops(
    blocks: Sequence[tuple[int, int, int, int]], plan: LayerPlan, widths: tuple[int, int], sides: tuple[int, int]
) -> tuple[int, int]:
    """(BitOps, output channels) of one cell; its inputs have `widths` channels and `sides` pixels a side."""
    kind, f = plan.kind, plan.channels
    inner, outer = sides[1] ** 2, (sides[1] // 2 if plan.reduction else sides[1]) ** 2
    both = kind.bits * kind.bits
    reduction = outer * f * f * kind.bits * FLOAT_BITS  # factorised, of an input that is not quantised
    total = inner * f * f * both  # the base convolution of node 1
    if sides[0] != sides[1] or widths[0] != f:
        total += inner * widths[0] * f * both
    if widths[1] != f:
        total += inner * widths[1] * f * both
    for x, x_op, y, y_op in blocks:
        for node, operation in ((x, x_op), (y, y_op)):
            if operation < len(KERNELS):
                total += _separable(kind, f, KERNELS[operation], outer)
            elif operation == IDENTITY and plan.reduction and node < 2:
                total += reduction
    unused = unused_nodes(blocks)
    total += reduction * sum(plan.reduction and node < 2 for node in unused)
    return total, len(unused) * f


def _separable(kind: LayerType, f: int, kernel: int, pixels: int) -> int:
    depthwise = kernel * kernel * f * kind.bits * kind.bits
    pointwise = f * f * kind.bits * kind.accumulator_bits(kernel * kernel)
    return 2 * pixels * (depthwise + pointwise)
