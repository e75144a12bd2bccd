# SPDX-License-Identifier: Apache-2.0
"""The candidates on the edges that leave one state, and the sum of a node's edges, each as one function on the native
CPU kernels.

What makes it fast and small, against one module an operation and edge:

* the state is encoded once, to one byte an element that serves every edge, operation and bit-width;
* the edges of a state are the groups of one convolution;
* between a depthwise convolution and its 1x1, and between the halves of a separable convolution, only codes are kept:
  the backward pass decodes them again;
* batch normalisation is linear once its statistics are known, and those follow from the mean and the second moment of
  what enters the 1x1: normalisation, alpha and beta are folded into the 1x1's matrix, and the sum over the candidates
  is the only tensor of floats that is written;
* poolings are computed once for all edges, and again in the backward pass.

Differentiated twice (`--second-order exact`), the backward pass is that of the twin: plain convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.nets.shared_norm import reduction_of
from common.nets.stacks import SeparableStack, StackedEdges, joined_node
from common.quant import MixedActivation, Reduction, RunningMaximum, frozen_ranges
from common.quant.kernels import usable
from common.quant.kernels.levels import Operand, encode
from common.quant.kernels.pooling import (
    JOINED_MOST,
    MAXIMUM,
    MEAN,
    SELF,
    Shared,
    dense_pixels,
    join,
    join_backward,
    share,
    share_backward,
)
from common.quant.kernels.separable import (
    Folded,
    Running,
    Window,
    depthwise,
    normalise,
    pointwise,
    pointwise_backward,
    separable_backward,
)

_POOLINGS = {"max_pool_3x3": MAXIMUM, "avg_pool_3x3": MEAN}


def fusible(edges: StackedEdges, x: Tensor, strengths: Tensor, rows: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels compute these edges on this tensor [B, c, H, W]."""
    if not usable(x, strengths, rows, *weights, *(norm.running_mean for norm in edges.batch_norms())):
        return False
    if any(name not in _POOLINGS for name in edges.poolings):
        return False
    if edges.stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        return False
    if x.shape[0] * x.shape[2] * x.shape[3] <= edges.stride**2:
        return False  # a single value has no variance: PyTorch says so
    return all(levels.coded for stack in edges.separable for levels in stack.middle)


def fused_edges(
    edges: StackedEdges,
    x: Tensor,
    entry_levels: MixedActivation | None,
    maximum: Tensor | None,
    strengths: Tensor,
    rows: Tensor | None,
    weights: Sequence[Tensor],
) -> Tensor:
    """State [B, c, H, W] -> [B, edges, c, H', W']; `maximum` is the 8-bit range of relu(x)."""
    out = _FusedEdges.apply(edges, entry_levels, x, maximum, strengths, rows, *weights)
    return out.unflatten(1, (edges.edges, -1))


@dataclass
class _Half:
    """One half of one primitive, as the backward pass needs it."""

    image: Operand
    middle: Operand
    folded: Folded


class _FusedEdges(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        edges: StackedEdges,
        entry_levels: MixedActivation | None,
        x: Tensor,
        maximum: Tensor | None,
        strengths: Tensor,
        rows: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        x_in = x.permute(0, 2, 3, 1).contiguous()
        if len(edges.separable):
            entry = _operand(x_in, entry_levels, maximum, groups=1, relu=True)
        own_strengths, *own_weights = (t.contiguous() for t in (strengths, *weights))
        out, shared = _share(edges, x_in, own_strengths)
        halves: list[_Half] = []
        for k, primitive in enumerate(edges.separable):
            own = own_weights[len(halves) * 2 :]
            probabilities = None if rows is None else rows[k].contiguous()
            out, found = _primitive_forward(primitive, entry, probabilities, (own_strengths, k), own, out)
            halves += found
        assert out is not None
        ctx.edges, ctx.entry_levels = edges, entry_levels
        ctx.halves, tensors = _pack([halves, shared])
        ctx.inputs = 4 + len(weights)
        ctx.save_for_backward(x, maximum, strengths, rows, *weights, *tensors)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, maximum, strengths, rows, *weights = saved[: ctx.inputs]
        if torch.is_grad_enabled():
            return (None, None, *_twice(ctx, gradient, x, maximum, strengths, rows, weights))
        halves, shared = _unpack(ctx.halves, saved[ctx.inputs :])
        needs = ctx.needs_input_grad
        g = gradient.permute(0, 2, 3, 1).contiguous()
        total = _Gradients(ctx.edges, x, strengths, rows, weights, needs)
        first = 0
        for k, primitive in enumerate(ctx.edges.separable):
            count = len(primitive.norms)
            total.back(k, primitive, halves[first : first + count], first, g)
            first += count
        if shared is not None:
            total.back_shared(shared, x.permute(0, 2, 3, 1).contiguous(), g)
        x_gradient = None if total.x is None else total.x.permute(0, 3, 1, 2)
        return (None, None, x_gradient, None, total.strengths, total.rows, *total.weights)


class _Gradients:
    """Sums up the gradients of one backward pass."""

    def __init__(
        self,
        edges: StackedEdges,
        x: Tensor,
        strengths: Tensor,
        rows: Tensor | None,
        weights: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        self.reduction = _of_poolings(edges)
        self.inputs, self.needs = [weight.contiguous() for weight in weights], needs[6:]
        self.needs_x, self.needs_rows = needs[2], rows is not None and needs[5]
        self.strength = strengths.contiguous()
        self.strengths = torch.empty_like(self.strength)
        self.rows = torch.zeros_like(rows, memory_format=torch.contiguous_format) if self.needs_rows else None
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.x: Tensor | None = None

    def back(self, k: int, primitive: SeparableStack, halves: list[_Half], first: int, gradient: Tensor) -> None:
        """Back through one primitive, whose first half is number `first` of all."""
        for position in reversed(range(len(halves))):
            half, number = halves[position], first + position
            depthwise_weight, pointwise_weight = self.inputs[2 * number : 2 * number + 2]
            last = position == len(halves) - 1
            d_weight, through = pointwise_backward(
                half.middle,
                half.folded,
                pointwise_weight,
                self.strength if last else None,
                k,
                gradient,
                self.strengths if last else None,
                reduction=reduction_of(primitive.norms[position]),
            )
            if self.needs[2 * number + 1]:
                self.weights[2 * number + 1] = d_weight
            wanted = self.needs[2 * number]
            before = self.needs_x or self.needs_rows or any(self.needs[2 * first : 2 * number])
            if not (wanted or before):
                return
            gradient, self.weights[2 * number] = separable_backward(
                half.image,
                _window(primitive.stacks[2 * position]),
                depthwise_weight,
                half.middle,
                half.folded,
                through,
                gradient,
                weights=wanted,
                probabilities=None if self.rows is None else self.rows[k],
            )
        self.x = gradient if self.x is None else self.x.add_(gradient)

    def back_shared(self, shared: Shared, x: Tensor, gradient: Tensor) -> None:
        """Back through what the edges share."""
        found = share_backward(x, shared, self.strength, gradient, self.strengths, self.needs_x, self.reduction)
        if found is not None:
            self.x = found if self.x is None else self.x.add_(found)


def _share(edges: StackedEdges, x: Tensor, strengths: Tensor) -> tuple[Tensor | None, Shared | None]:
    """The shared candidates' sum [B, H', W', edges * c]; nothing where there are none."""
    if not edges.poolings and not edges.skip:
        return None, None
    columns, norms = [-1, -1, -1], [None, None]
    for column, (name, norm) in enumerate(zip(edges.poolings, edges.norms, strict=True), len(edges.separable)):
        columns[_POOLINGS[name]], norms[_POOLINGS[name]] = column, _running(norm)
    if edges.skip:
        columns[SELF] = len(edges.separable) + len(edges.poolings)
    return share(x, edges.stride, norms, strengths, tuple(columns), _of_poolings(edges))


def _of_poolings(edges: StackedEdges) -> Reduction | None:
    return reduction_of(edges.norms[0]) if len(edges.norms) else None


def _primitive_forward(
    primitive: SeparableStack,
    entry: Operand,
    probabilities: Tensor | None,
    strength: tuple[Tensor, int],
    weights: Sequence[Tensor],
    out: Tensor | None,
) -> tuple[Tensor, list[_Half]]:
    """Adds strength (a column) x the primitive's output to `out` [B, H', W', edges * c] (None: starts it)."""
    edges = primitive.edges
    image = replace(entry, groups=edges, shared=True, probabilities=probabilities)
    if entry.scale8 is not None:
        image.scale8 = entry.scale8.expand(edges).contiguous()
    halves = []
    for half, norm in enumerate(primitive.norms):
        last = half == len(primitive.norms) - 1
        window = _window(primitive.stacks[2 * half])
        y = depthwise(image, window, weights[2 * half])
        middle = _operand(y, primitive.middle[half] if primitive.middle else None, None, groups=edges, relu=False)
        middle.probabilities = probabilities
        by, column = strength if last else (None, 0)
        folded = normalise(middle, weights[2 * half + 1], _running(norm), by, column, reduction_of(norm))
        halves.append(_Half(image, middle, folded))
        if last:
            out = pointwise(middle, folded, out)
        else:
            z = pointwise(middle, folded)
            image = _operand(z, primitive.between[half] if primitive.between else None, None, groups=edges, relu=True)
            image.probabilities = probabilities
    assert out is not None
    return out, halves


def _running(norm: torch.nn.BatchNorm2d) -> Running:
    statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    momentum = norm.momentum
    if momentum is None:  # the mean of all batches
        momentum = 1 / (int(norm.num_batches_tracked) + 1)
    return Running(*statistics, momentum, norm.eps, norm.training)


def _operand(x: Tensor, levels: MixedActivation | None, maximum: Tensor | None, *, groups: int, relu: bool) -> Operand:
    """x [B, H, W, groups * width] as it enters a convolution: encoded, or in full precision as floats."""
    if levels is None:
        return Operand(groups, x.shape[3] // groups, floats=F.relu(x) if relu else x, relu=relu)
    if levels.range is not None and maximum is None:
        maximum = _observe(levels.range, x)
    return encode(x, levels.bits, maximum, groups=groups, relu=relu)


def _observe(kept: RunningMaximum, x: Tensor) -> Tensor:
    """The range of 8 bits for x [B, H, W, groups * width]: a scalar, or [groups]."""
    per_channel = x.detach().amax((0, 1, 2)).clamp_min(0)
    return kept.observe(per_channel.view(kept.groups, -1).amax(1) if kept.groups > 1 else per_channel.amax())


def _window(conv: Any) -> Window:
    kernel = conv.members[0].kernel_size[0]
    return Window(kernel, conv.stride[0], conv.padding[0], conv.dilation[0])


def _twice(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    maximum: Tensor | None,
    strengths: Tensor,
    rows: Tensor | None,
    weights: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients as a graph: those of the twin, computed anew. Running statistics and ranges stay."""
    edges: StackedEdges = ctx.edges
    # views of their own: what x itself depends on must not be counted again
    view = lambda t: None if t is None else t.view_as(t)  # noqa: E731
    with torch.enable_grad():
        x, strengths, rows, weights = view(x), view(strengths), view(rows), [*map(view, weights)]
    inputs = [x, strengths, *([] if rows is None else [rows]), *weights]
    wanted = [t for t in inputs if t.requires_grad]
    with torch.enable_grad(), frozen_ranges(edges), _kept_statistics(edges.batch_norms()):
        active = F.relu(x)
        entry = active if ctx.entry_levels is None else ctx.entry_levels.levels(active, maximum)
        out = edges(x, entry, strengths, rows, weights).flatten(1, 2)
        found = torch.autograd.grad(out, wanted, gradient, create_graph=True, allow_unused=True)
    by_id = dict(zip(map(id, wanted), found, strict=True))
    give = lambda t: None if t is None else by_id.get(id(t))  # noqa: E731
    return [give(x), None, give(strengths), give(rows), *map(give, weights)]


@contextmanager
def _kept_statistics(norms: Sequence[torch.nn.BatchNorm2d]) -> Iterator[None]:
    """Within it, training forwards leave running statistics untouched."""
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = not norm.training
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked


def fused_node(heads: Sequence[Tensor], rests: Sequence[Tensor], betas: Tensor | None) -> Tensor:
    """`joined_node` on the kernels where they take it."""
    if not rests or not usable(*heads, *rests, betas) or heads[0].shape[1] + rests[0].shape[1] > JOINED_MOST:
        return joined_node(heads, rests, betas)
    if betas is None:
        betas = heads[0].new_ones(len(heads))
    return _FusedNode.apply(betas, len(heads), *heads, *rests)


class _FusedNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, betas: Tensor, edges: int, *tensors: Tensor) -> Tensor:
        heads, rests = tensors[:edges], tensors[edges:]
        ctx.save_for_backward(betas, *rests)
        ctx.width = heads[0].shape[1]
        return join([*map(dense_pixels, heads)], [*map(dense_pixels, rests)], betas.contiguous()).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        betas, *rests = ctx.saved_tensors
        edges = len(rests)
        if torch.is_grad_enabled():
            return _node_gradient(gradient, betas, rests, ctx.width)
        wanted = ctx.needs_input_grad[2 + edges :]
        g = gradient.permute(0, 2, 3, 1).contiguous()
        head, found, sums = join_backward(g, [*map(dense_pixels, rests)], betas.contiguous(), ctx.width, wanted)
        as_image = lambda t: None if t is None else t.permute(0, 3, 1, 2)  # noqa: E731
        return (sums.to(betas.dtype), None, *[as_image(head)] * edges, *map(as_image, found))


def _node_gradient(gradient: Tensor, betas: Tensor, rests: Sequence[Tensor], width: int) -> tuple[Tensor | None, ...]:
    """The same as plain operations, to be differentiated again."""
    plain = gradient.unflatten(1, (width, -1)).transpose(1, 2).flatten(1, 2)
    head, rest = plain[:, :width], plain[:, width:]
    sums = torch.stack([(rest * other).sum() for other in rests])
    return (sums, None, *[head] * len(rests), *(rest * beta for beta in betas.unbind()))


def _pack(value: Any) -> tuple[Any, list[Tensor]]:
    """A structure with its tensors replaced by their numbers, each tensor once, and the tensors."""
    tensors: list[Tensor] = []
    numbers: dict[int, int] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in numbers:
                numbers[id(node)] = len(tensors)
                tensors.append(node)
            return _Number(numbers[id(node)])
        return _mapped(node, walk)

    return walk(value), tensors


def _unpack(value: Any, tensors: Sequence[Tensor]) -> Any:
    def walk(node: Any) -> Any:
        return tensors[node.index] if isinstance(node, _Number) else _mapped(node, walk)

    return walk(value)


@dataclass(frozen=True)
class _Number:
    index: int


def _mapped(node: Any, walk: Any) -> Any:
    if isinstance(node, list):
        return [walk(item) for item in node]
    if isinstance(node, _Half | Shared | Operand | Folded):
        assert is_dataclass(node)
        return type(node)(**{f.name: walk(getattr(node, f.name)) for f in fields(node)})
    return node
