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

from common.nets.stacks import SeparableStack, StackedEdges, joined_node
from common.quant import MixedActivation, RunningMaximum, frozen_ranges
from common.quant.kernels import usable
from common.quant.kernels.levels import Operand, encode
from common.quant.kernels.pooling import (
    JOINED_MOST,
    KINDS,
    MAXIMUM,
    MEAN,
    SELF,
    dense_pixels,
    join,
    join_backward,
    pool_moments,
    shared_backward,
    shared_forward,
    shared_sums,
)
from common.quant.kernels.separable import (
    Folded,
    Window,
    depthwise,
    fold,
    fold_backward,
    moments,
    pointwise,
    pointwise_sums,
    separable_backward,
)

_POOLINGS = {"max_pool_3x3": MAXIMUM, "avg_pool_3x3": MEAN}
_WIDEST = 32  # channels of an edge beyond which PyTorch's matrix products are faster


def fusible(edges: StackedEdges, x: Tensor) -> bool:
    """Whether the kernels compute these edges on this tensor [B, c, H, W]."""
    if not usable(x) or x.shape[1] > _WIDEST or any(name not in _POOLINGS for name in edges.poolings):
        return False
    if edges.stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        return False
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
    strength: Tensor


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
        entry = _operand(x_in, entry_levels, maximum, groups=1, relu=True)
        shared = _share(edges, x_in, strengths)
        out = None if shared is None else shared_forward(x_in, edges.stride, shared.kinds, shared.scale, shared.bias)
        halves: list[_Half] = []
        for k, primitive in enumerate(edges.separable):
            own = weights[len(halves) * 2 :]
            probabilities = None if rows is None else rows[k].contiguous()
            out, found = _primitive_forward(primitive, entry, probabilities, strengths[:, k].contiguous(), own, out)
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
        total = _Gradients(x, strengths, rows, weights, needs)
        first = 0
        for k, primitive in enumerate(ctx.edges.separable):
            count = len(primitive.norms)
            total.back(k, primitive, halves[first : first + count], first, g)
            first += count
        if shared is not None:
            total.back_shared(ctx.edges, shared, x.permute(0, 2, 3, 1).contiguous(), g)
        x_gradient = None if total.x is None else total.x.permute(0, 3, 1, 2)
        return (None, None, x_gradient, None, total.strengths, total.rows, *total.weights)


class _Gradients:
    """Sums up the gradients of one backward pass."""

    def __init__(
        self, x: Tensor, strengths: Tensor, rows: Tensor | None, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> None:
        self.inputs, self.needs = weights, needs[6:]
        self.needs_x, self.needs_rows = needs[2], rows is not None and needs[5]
        self.strengths = torch.zeros_like(strengths)
        self.rows = torch.zeros_like(rows) if self.needs_rows else None
        self.weights: list[Tensor | None] = [None] * len(weights)
        self.x: Tensor | None = None

    def back(self, k: int, primitive: SeparableStack, halves: list[_Half], first: int, gradient: Tensor) -> None:
        """Back through one primitive, whose first half is number `first` of all."""
        count = gradient.shape[0] * gradient.shape[1] * gradient.shape[2]
        for position in reversed(range(len(halves))):
            half, number = halves[position], first + position
            depthwise_weight, pointwise_weight = self.inputs[2 * number : 2 * number + 2]
            matrix = pointwise_weight.view(half.folded.matrix.shape)
            products, sums = pointwise_sums(half.middle, gradient)
            through = fold_backward(half.folded, matrix, half.strength, products, sums, count)
            if position == len(halves) - 1:
                self.strengths[:, k] = through.strength
            if self.needs[2 * number + 1]:
                self.weights[2 * number + 1] = through.weight.view(pointwise_weight.shape)
            wanted = self.needs[2 * number]
            if not (wanted or self.needs_x or self.needs_rows or (position and any(self.needs[2 * first :]))):
                return
            conv = primitive.stacks[2 * position]
            found = separable_backward(
                half.image,
                _window(conv),
                depthwise_weight,
                half.middle,
                half.folded,
                through,
                gradient,
                weights=wanted,
                probabilities=self.needs_rows,
            )
            if wanted:
                self.weights[2 * number] = found.weight.view(depthwise_weight.shape).to(depthwise_weight.dtype)
            if self.rows is not None:
                self.rows[k] += found.middle_probabilities + found.image_probabilities
            gradient = found.image
        self.x = gradient if self.x is None else self.x.add_(gradient)

    def back_shared(self, edges: StackedEdges, shared: _Shared, x: Tensor, gradient: Tensor) -> None:
        """Back through what the edges share."""
        products, sums = shared_sums(x, gradient, edges.stride, shared.kinds)
        first = len(edges.separable)
        count = gradient.numel() / gradient.shape[3]
        constant, linear = torch.zeros(2, KINDS, x.shape[3], dtype=torch.float64).unbind()
        for column, kind in enumerate(_kinds(edges), first):
            strength = shared.strengths[:, kind].double()
            if kind == SELF:
                self.strengths[:, column] = products[SELF].sum(1)
                continue
            # scale = strength x rate, bias = - strength x rate x mean, rate = (var + eps)^(-1/2)
            rate, mean = shared.rate[kind], shared.mean[kind]
            slope = products[kind] - mean * sums
            self.strengths[:, column] = (slope * rate).sum(1)
            if shared.given:
                continue
            d_var = -0.5 * rate**3 * (strength @ slope)
            constant[kind] = (-rate * (strength @ sums) - 2 * mean * d_var) / count
            linear[kind] = 2 * d_var / count
        if self.needs_x:
            exact = (constant.to(x.dtype), linear.to(x.dtype))
            found = shared_backward(x, gradient, edges.stride, shared.kinds, shared.scale, *exact)
            self.x = found if self.x is None else self.x.add_(found)


@dataclass
class _Shared:
    """The shared candidates' part in the output: `scale` [KINDS, edges, c] and `bias` [edges, c]; their strengths
    [edges, KINDS], and of each pooling the mean and the inverse deviation [2, c] (float64; `given`: running ones).
    """

    kinds: int
    scale: Tensor
    bias: Tensor
    strengths: Tensor
    mean: Tensor
    rate: Tensor
    given: bool


def _kinds(edges: StackedEdges) -> list[int]:
    """The shared candidates, in the order of the strengths' columns."""
    return [_POOLINGS[name] for name in edges.poolings] + ([SELF] if edges.skip else [])


def _share(edges: StackedEdges, x: Tensor, strengths: Tensor) -> _Shared | None:
    """What the shared candidates add to the edges; None where there are none."""
    kinds = _kinds(edges)
    if not kinds:
        return None
    channels = x.shape[3]
    mean, rate = torch.zeros(2, channels, dtype=torch.float64), torch.zeros(2, channels, dtype=torch.float64)
    training = any(norm.training for norm in edges.norms)
    if training:
        found_mean, found_second = pool_moments(x, edges.stride)
        count = x.numel() // channels // edges.stride**2
    by_kind = torch.zeros(strengths.shape[0], KINDS, dtype=strengths.dtype)
    for column, kind in enumerate(kinds, len(edges.separable)):
        by_kind[:, kind] = strengths[:, column]
        if kind == SELF:
            continue
        norm = edges.norms[column - len(edges.separable)]
        if training:
            mean[kind] = found_mean[kind]
            var = (found_second[kind] - mean[kind] ** 2).clamp_min(0)
            _move(norm, mean[kind], var, count)
        else:
            mean[kind], var = norm.running_mean, norm.running_var.double()
        rate[kind] = (var + norm.eps).rsqrt()
    factor = torch.cat([rate, torch.ones(1, channels, dtype=torch.float64)])
    scale = by_kind.double().t().unsqueeze(2) * factor.unsqueeze(1)
    bias = -(scale[:2] * mean.unsqueeze(1)).sum(0)
    bits = sum(1 << kind for kind in kinds)
    as_x = lambda t: t.to(x.dtype).contiguous()  # noqa: E731
    return _Shared(bits, as_x(scale), as_x(bias), by_kind, mean, rate, not training)


def _primitive_forward(
    primitive: SeparableStack,
    entry: Operand,
    probabilities: Tensor | None,
    strength: Tensor,
    weights: Sequence[Tensor],
    out: Tensor | None,
) -> tuple[Tensor, list[_Half]]:
    """Adds strength x the primitive's output to `out` [B, H', W', edges * c] (None: starts it)."""
    edges, width = primitive.edges, entry.width
    image = replace(entry, groups=edges, shared=True, probabilities=probabilities)
    if entry.scale8 is not None:
        image.scale8 = entry.scale8.expand(edges).contiguous()
    halves = []
    for half, norm in enumerate(primitive.norms):
        last = half == len(primitive.norms) - 1
        window = _window(primitive.stacks[2 * half])
        y = depthwise(image, window, weights[2 * half].contiguous())
        middle = _operand(y, primitive.middle[half] if primitive.middle else None, None, groups=edges, relu=False)
        middle.probabilities = probabilities
        own_strength = strength if last else torch.ones_like(strength)
        matrix = weights[2 * half + 1].reshape(edges, width, width)
        folded = _normalise(norm, middle, matrix, own_strength)
        halves.append(_Half(image, middle, folded, own_strength))
        if last:
            out = pointwise(middle, folded, out)
        else:
            z = pointwise(middle, folded)
            image = _operand(z, primitive.between[half] if primitive.between else None, None, groups=edges, relu=True)
            image.probabilities = probabilities
    assert out is not None
    return out, halves


def _normalise(norm: torch.nn.BatchNorm2d, middle: Operand, matrix: Tensor, strength: Tensor) -> Folded:
    """Fold a batch normalisation into the 1x1 before it; in training its running statistics move."""
    if not norm.training:
        given = (norm.running_mean.to(matrix.dtype), norm.running_var.to(matrix.dtype))
        return fold(matrix, strength, norm.eps, None, given)
    folded = fold(matrix, strength, norm.eps, moments(middle), None)
    batch, height, width, _ = middle.shape
    _move(norm, folded.mean, folded.var, batch * height * width)
    return folded


@torch.no_grad()
def _move(norm: torch.nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Running statistics after a batch of `count` values a channel with this mean and (biased) variance."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / max(count - 1, 1))).to(norm.running_var.dtype), norm.momentum)


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
    inputs = [x, strengths, *([] if rows is None else [rows]), *weights]
    wanted = [t for t in inputs if t.requires_grad]
    norms = [*edges.norms, *(norm for stack in edges.separable for norm in stack.norms)]
    with torch.enable_grad(), frozen_ranges(edges), _kept_statistics(norms):
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
    for norm in norms:
        norm.track_running_stats = not norm.training
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def fused_node(heads: Sequence[Tensor], rests: Sequence[Tensor], betas: Tensor | None) -> Tensor:
    """`joined_node` on the kernels where they take it."""
    if not rests or not usable(heads[0]) or heads[0].shape[1] + rests[0].shape[1] > JOINED_MOST:
        return joined_node(heads, rests, betas)
    if betas is None:
        betas = heads[0].new_ones(len(heads))
    return _FusedNode.apply(betas, len(heads), *heads, *rests)


class _FusedNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, betas: Tensor, edges: int, *tensors: Tensor) -> Tensor:
        tensors = tuple(t if dense_pixels(t) else t.contiguous(memory_format=torch.channels_last) for t in tensors)
        heads, rests = tensors[:edges], tensors[edges:]
        betas = betas.contiguous()
        ctx.save_for_backward(betas, *rests)
        ctx.width = heads[0].shape[1]
        return join(heads, rests, betas).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        betas, *rests = ctx.saved_tensors
        edges = len(rests)
        if torch.is_grad_enabled():
            return _node_gradient(gradient, betas, rests, ctx.width)
        wanted = ctx.needs_input_grad[2 + edges :]
        g = gradient.permute(0, 2, 3, 1).contiguous()
        head, found, sums = join_backward(g, rests, betas, ctx.width, wanted)
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
    if isinstance(node, _Half | _Shared | Operand | Folded):
        assert is_dataclass(node)
        return type(node)(**{f.name: walk(getattr(node, f.name)) for f in fields(node)})
    return node
