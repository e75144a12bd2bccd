# SPDX-License-Identifier: Apache-2.0
"""Convolutions of many edges computed together, as groups of one, and the separable candidates made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant import MixedActivation, mix_levels
from common.quant.coded import coded_convolution


@dataclass
class Bank:
    """What one forward computes once for all cells: mixed weights per stack, and activation probabilities per row."""

    weights: list[Tensor]
    activation: Tensor | None


class ConvStack(nn.Module):
    """`edges` convolutions of one shape, side by side as groups: [B, edges * in, H, W] -> [B, edges * out, H', W'].

    `rows` are the gamma rows of its members (None: full precision). Quantised, its input is a list of Q_b(x), each
    [B, edges * in, H, W] or [B, in, H, W] shared by all edges.
    """

    def __init__(self, members: Sequence[nn.Conv2d], rows: Sequence[int] | None, position: int) -> None:
        super().__init__()
        first = members[0]
        self.members = list(members)  # a plain list: the modules belong to their candidates
        self.rows = None if rows is None else list(rows)
        self.position, self.edges = position, len(members)
        self.bits = getattr(members[0], "bits", ())
        self.in_channels, self.groups = first.in_channels, first.groups * len(members)
        self.stride, self.padding, self.dilation = first.stride, first.padding, first.dilation
        index = torch.tensor([0] if rows is None else list(rows))
        self.register_buffer("row_index", index, persistent=False)

    def forward(self, x: Tensor | list[Tensor], bank: Bank) -> Tensor:
        """Mix the input's levels by the members' activation gammas, then convolve all members at once."""
        rows = None if bank.activation is None else bank.activation.index_select(0, self.row_index)
        return self.convolve(x, bank.weights[self.position], rows)

    def convolve(self, x: Tensor | list[Tensor], weight: Tensor, rows: Tensor | None) -> Tensor:
        """The same with the members' weights [edges * out, in / groups, k, k] and probabilities [edges, bits]."""
        if isinstance(x, list):
            assert rows is not None
            x = mix_levels(x, rows, self.in_channels, self.bits)
        elif x.shape[1] != self.edges * self.in_channels:
            x = x.repeat(1, self.edges, 1, 1)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def convolve_coded(self, x: Tensor, levels: MixedActivation, bank: Bank) -> Tensor:
        """ReLU, mixture and convolution of its only member as one function, where the quantisers have codes."""
        if not levels.coded:
            return self(levels.levels(F.relu(x)), bank)
        assert bank.activation is not None and self.edges == 1
        return coded_convolution(
            x,
            bank.weights[self.position],
            bits=levels.bits,
            probabilities=bank.activation.index_select(0, self.row_index),
            maximum=None if levels.range is None else levels.range(x),
            relu=True,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


class SeparableStack(nn.Module):
    """One separable primitive (SepConv: two halves, DilConv: one) on all edges that leave a state.

    A half is depthwise convolution, 1x1, batch normalisation; ReLU before each. `middle` quantise what enters a 1x1,
    `between` what enters the second depthwise convolution (empty lists in full precision).
    """

    def __init__(
        self, stacks: Sequence[ConvStack], norms: Sequence[nn.BatchNorm2d], levels: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.stacks, self.norms = nn.ModuleList(stacks), nn.ModuleList(norms)
        self.middle, self.between = nn.ModuleList(levels[0::2]), nn.ModuleList(levels[1::2])
        self.edges = stacks[0].edges

    def forward(self, entry: Tensor | list[Tensor], weights: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """Levels of the state -> [B, edges, c, H', W']; weights in the order of the stacks, rows [edges, bits]."""
        x = entry
        for half, norm in enumerate(self.norms):
            depthwise, pointwise = self.stacks[2 * half], self.stacks[2 * half + 1]
            if half:
                active = F.relu(x)
                x = self.between[half - 1].levels(active) if self.between else active
            x = depthwise.convolve(x, weights[2 * half], rows)
            if self.middle:
                x = self.middle[half].levels(x)
            x = norm(pointwise.convolve(x, weights[2 * half + 1], rows))
        return x.unflatten(1, (self.edges, -1))


class StackedEdges(nn.Module):
    """The candidates that all edges leaving a state compute together: separable convolutions side by side, poolings
    (with batch normalisation) and the plain skip connection once for all edges.

    forward: strengths [edges, primitives] (alpha, times beta; separable ones first, then `poolings`, then the skip)
    -> [B, edges, c, H', W'], the sum over the candidates.
    """

    def __init__(
        self,
        separable: Sequence[SeparableStack],
        poolings: dict[str, nn.Module],
        norms: Sequence[nn.BatchNorm2d],
        *,
        skip: bool,
        edges: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.separable, self.poolings = nn.ModuleList(separable), nn.ModuleDict(poolings)
        self.norms = nn.ModuleList(norms)  # the poolings'
        self.skip, self.edges, self.stride = skip, edges, stride
        self.positions = [conv.position for stack in separable for conv in stack.stacks]
        rows = [stack.stacks[0].row_index for stack in separable]
        self.register_buffer("row_index", torch.cat(rows) if rows else torch.zeros(0).long(), persistent=False)

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """Of the poolings and of the separable candidates."""
        return [*self.norms, *(norm for stack in self.separable for norm in stack.norms)]

    def operands(self, bank: Bank) -> tuple[Tensor | None, list[Tensor]]:
        """Probabilities [separable, edges, bits] (None: full precision), and the weights of every stack."""
        rows = None
        if bank.activation is not None and len(self.separable):
            rows = bank.activation.index_select(0, self.row_index).view(len(self.separable), self.edges, -1)
        return rows, [bank.weights[p] for p in self.positions]

    def forward(
        self,
        x: Tensor,
        entry: Tensor | list[Tensor],
        strengths: Tensor,
        rows: Tensor | None,
        weights: Sequence[Tensor],
    ) -> Tensor:
        """By PyTorch's operations (the twin of `fused_edges`). x [B, c, H, W]; `entry`: relu(x), or its levels."""
        parts, first = [], 0
        for k, primitive in enumerate(self.separable):
            own = weights[first : first + len(primitive.stacks)]
            parts.append(primitive(entry, own, None if rows is None else rows[k]))
            first += len(own)
        parts += [norm(pool(x)).unsqueeze(1) for pool, norm in zip(self.poolings.values(), self.norms, strict=True)]
        parts += [x.unsqueeze(1)] if self.skip else []
        weighted = [part * strengths[:, k].view(1, -1, 1, 1, 1) for k, part in enumerate(parts)]
        return sum(weighted[1:], start=weighted[0])


def joined_node(heads: Sequence[Tensor], rests: Sequence[Tensor], betas: Tensor | None) -> Tensor:
    """What a node makes of its edges: their sum, and with partial channels the weighted rest beside it, shuffled.

    Heads [B, c, H, W], rests [B, (k - 1) c, H, W] (none with full channels), betas [edges] -> [B, k * c, H, W].
    """
    total = sum(heads[1:], start=heads[0])
    if not rests:
        return total
    weighted = rests if betas is None else [rest * beta for rest, beta in zip(rests, betas.unbind(), strict=True)]
    joined = torch.cat([total, sum(weighted[1:], start=weighted[0])], 1)
    # channel shuffle: the next state's operations must see channels of every part
    return joined.unflatten(1, (-1, total.shape[1])).transpose(1, 2).flatten(1, 2)
