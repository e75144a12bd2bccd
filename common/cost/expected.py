# SPDX-License-Identifier: Apache-2.0
"""Expected cost of a supernet: the BitOps of the evaluation network that it is about to become, differentiable.

Per node the sum over its incoming edges of pi(e) x the sum over operations of alpha (without `none`, renormalised) x
MACs x expected weight bits x expected activation bits, plus the cells' input operations and the ends; pi(e) is the
probability that e is among the two edges that a node keeps. MACs are those of the network to be trained, its cells
grouped by the searched cell whose bits they take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common.cost.counting import LayerShape, trace_layers
from common.nets.architecture import map_cells
from common.nets.darts_space import CellPlan, count_edges, edge_softmax, output_channels, plan_cells
from common.nets.network import cifar_stem, imagenet_stems
from common.nets.operations import OPERATIONS, plain_convolution, preprocess
from common.nets.supernet import Supernet
from common.quant import FLOAT_BITS

ACCOUNTINGS = ("exact", "paper")
WEIGHTINGS = ("expected", "uniform")
REFERENCE_COMPLEXITY = 2489.3
"""The reference's complexity of its own supernet (C=16, 8 cells) at the start: the share that the weight assumes."""

_FLOAT_PRODUCT = float(FLOAT_BITS * FLOAT_BITS)


def edge_probability(betas: Tensor | None, nodes: int) -> Tensor:
    """pi [edges]: probability that each edge is among two drawn without replacement from its node's edge softmax.

    `betas` [edges] are logits; None draws uniformly. Sums to 2 per node, never above 1, exactly 1 at two inputs.
    """
    if betas is None:
        return torch.cat([torch.full((node + 2,), 2.0 / (node + 2), dtype=torch.float64) for node in range(nodes)])
    parts = []
    for share in edge_softmax(betas.double(), nodes).split([node + 2 for node in range(nodes)]):
        if len(share) == 2:  # both are kept, whatever the logits
            parts.append(torch.ones_like(share))
            continue
        odds = share / (1 - share).clamp_min(1e-12)
        parts.append((share * (1 + odds.sum() - odds)).clamp_max(1.0))
    return torch.cat(parts)


class ExpectedCost(nn.Module):
    """Expected and exact cost of a supernet, and the term that its losses add.

    `input_size` is the image's height (= width); `eval_init_channels` and `eval_layers` size the network to be
    trained; `mapping` tells which searched cell gives each of its cells the bits. `accounting` "paper" is group-blind
    and leaves the ends out. `weighting` "uniform" makes `term` the reference's complexity of the supernet itself,
    which steers bits only. Buffers follow the module's device; nothing here reads it.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        input_size: int,
        eval_init_channels: int,
        eval_layers: int,
        accounting: str = "exact",
        weighting: str = "expected",
        mapping: str = "relative",
        stem_bits: int = FLOAT_BITS,
        classifier_bits: int = FLOAT_BITS,
    ) -> None:
        super().__init__()
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"--cost-accounting: {accounting!r} is unknown; choose exact or paper")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"--cost-weighting: {weighting!r} is unknown; choose expected or uniform")
        if weighting == "uniform" and supernet.bits is None:
            raise ValueError("--cost-weighting uniform: weighs bits only, and this search has none; use expected")
        self.accounting, self.weighting, self.nodes = accounting, weighting, supernet.nodes
        self.none = supernet.primitives.index("none") if "none" in supernet.primitives else None
        self._traced: dict[tuple[object, ...], float] = {}
        multiplier = supernet.multiplier
        plans = plan_cells(eval_layers, eval_init_channels, supernet.stem_kind, multiplier, multiplier)
        searched = [plan.reduction for plan in supernet.plans]
        sources = map_cells(searched, [plan.reduction for plan in plans], mapping)
        sizes = cell_sizes(plans, input_size, supernet.stem_kind)
        grouped = list(zip(sources, plans, sizes, strict=True))
        self._tables("grown", supernet, grouped, width=1)
        own_sizes = cell_sizes(supernet.plans, input_size, supernet.stem_kind)
        own = list(zip(range(len(searched)), supernet.plans, own_sizes, strict=True))
        if weighting == "uniform":
            self._tables("own", supernet, own, width=supernet.partial)
            first = own[0][1]
            self.first_size = self._first_size(first, own[0][2])
        self.register_buffer("uniform", edge_probability(None, supernet.nodes))
        self.register_buffer("bit_values", torch.tensor(supernet.bits or (FLOAT_BITS,), dtype=torch.float64))
        self.ends = self._ends(supernet, plans, eval_init_channels, input_size, stem_bits, classifier_bits)
        self.initial = self._initial(supernet)
        self.cheapest, self.dearest = self._extremes(supernet, smallest=True), self._extremes(supernet, smallest=False)

    def _size(self, shape: LayerShape) -> float:
        return float(shape.macs) if self.accounting == "exact" else shape.paper_size

    def _traced_size(self, build: Callable[[], nn.Module], channels: int, size: int, *key: object) -> float:
        """Cost at one bit of an operation on [channels, size, size], traced once per key."""
        key = (*key, channels, size)
        if key not in self._traced:
            with torch.device("meta"):
                module = build()
            self._traced[key] = sum(self._size(shape) for shape in trace_layers(module, (channels, size, size)))
        return self._traced[key]

    def _operation_size(self, primitive: str, channels: int, size: int, stride: int) -> float:
        builder = OPERATIONS[primitive]
        build = partial(builder, plain_convolution, nn.BatchNorm2d, channels, stride)
        return self._traced_size(build, channels, size, primitive, stride)

    def _input_size(self, plan: CellPlan, which: int, size: int) -> float:
        c_in = plan.last if which else plan.before_last
        halve = plan.reduction_before and which == 0
        build = partial(preprocess, plain_convolution, nn.BatchNorm2d, c_in, plan.channels, halve)
        return self._traced_size(build, c_in, size * 2 if halve else size, "input", plan.channels, halve)

    def _first_size(self, plan: CellPlan, size: int) -> float:
        halve = plan.reduction_before
        with torch.device("meta"):
            module = preprocess(plain_convolution, nn.BatchNorm2d, plan.before_last, plan.channels, halve)
        return self._size(trace_layers(module, (plan.before_last, *(size * (2 if halve else 1),) * 2))[0])

    def _tables(self, name: str, supernet: Supernet, cells: list[tuple[int, CellPlan, int]], width: int) -> None:
        """Buffers `{name}_{kind}` [edges, primitives, searched cells] and `{name}_inputs` [searched cells, 2]: cost at
        one bit; and, once, the gamma rows of their entries.

        `cells` are (searched cell, plan, image size in); operations see 1/`width` of a cell's channels.
        """
        edges, primitives = count_edges(supernet.nodes), supernet.primitives
        inputs = torch.zeros(len(supernet.plans), 2, dtype=torch.float64)
        for kind, members in supernet.cells_of.items():
            table = torch.zeros(edges, len(primitives), len(members), dtype=torch.float64)
            for source, plan, size in cells:
                if source not in members:
                    continue
                for which in (0, 1):
                    inputs[source, which] += self._input_size(plan, which, size)
                for edge in range(edges):
                    stride = 2 if plan.reduction and _state_of(edge, supernet.nodes) < 2 else 1
                    seen = size if stride == 2 or not plan.reduction else size // 2
                    for column, primitive in enumerate(primitives):
                        if primitive != "none":
                            cost = self._operation_size(primitive, plan.channels // width, seen, stride)
                            table[edge, column, members.index(source)] += cost
            self.register_buffer(f"{name}_{kind}", table)
            rows = torch.zeros(edges, len(primitives), len(members), dtype=torch.long)
            searched_bits = torch.zeros(edges, len(primitives), len(members), dtype=torch.bool)
            for column, primitive in enumerate(primitives):
                if supernet.bits is not None and primitive in supernet.rows[kind]:
                    searched_bits[:, column] = True
                    for position, cell in enumerate(members):
                        for edge in range(edges):
                            rows[edge, column, position] = supernet.operation_row(cell, edge, primitive)
            self.register_buffer(f"rows_{kind}", rows)
            self.register_buffer(f"searched_{kind}", searched_bits)
        self.register_buffer(f"{name}_inputs", inputs)
        if supernet.bits is not None:
            rows = [[supernet.preprocess_row(plan.index, which) for which in (0, 1)] for plan in supernet.plans]
            self.register_buffer("rows_inputs", torch.tensor(rows))

    def _ends(
        self,
        supernet: Supernet,
        plans: list[CellPlan],
        channels: int,
        size: int,
        stem_bits: int,
        classifier_bits: int,
    ) -> float:
        if self.accounting == "paper":
            return 0.0
        with torch.device("meta"):
            if supernet.stem_kind == "cifar":
                stem: nn.Module = cifar_stem(3 * channels, supernet.in_channels, plain_convolution)
            else:
                pair = imagenet_stems(channels, supernet.in_channels, plain_convolution, plain_convolution)
                stem = nn.Sequential(*pair)
        macs = sum(shape.macs for shape in trace_layers(stem, (supernet.in_channels, size, size)))
        features = output_channels(plans, supernet.multiplier, supernet.multiplier)
        return float(macs * stem_bits**2 + features * supernet.classifier.out_features * classifier_bits**2)

    def _products(self, supernet: Supernet, hard: bool) -> Tensor | None:
        """Weight bits x activation bits of every gamma row, [rows]: expected, or of the most probable bits."""
        if supernet.bits is None:
            return None
        factors = []
        for operand in ("weight", "activation"):
            probabilities = supernet.bit_probabilities(operand).double()
            factors.append(self.bit_values[probabilities.argmax(-1)] if hard else probabilities @ self.bit_values)
        return factors[0] * factors[1]

    def _edge_costs(self, name: str, kind: str, products: Tensor | None) -> Tensor:
        """[edges, primitives]: BitOps of each operation on each edge, over all cells of one type."""
        table = getattr(self, f"{name}_{kind}")
        if products is None:
            return table.sum(-1) * _FLOAT_PRODUCT
        bits = torch.where(getattr(self, f"searched_{kind}"), products[getattr(self, f"rows_{kind}")], _FLOAT_PRODUCT)
        return (table * bits).sum(-1)

    def _inputs(self, name: str, products: Tensor | None) -> Tensor:
        table = getattr(self, f"{name}_inputs")
        return (table * (_FLOAT_PRODUCT if products is None else products[self.rows_inputs])).sum()

    def _operation_weights(self, alphas: Tensor, hard: bool) -> Tensor:
        logits = alphas.double()
        if self.none is not None:
            keep = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            keep[self.none] = False
            logits = logits.masked_fill(~keep, float("-inf"))
        if not hard:
            return logits.softmax(-1)
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)

    def _kept(self, alphas: Tensor, betas: Tensor | None) -> Tensor:
        """1 for the two edges that each node keeps by the discretisation rule, [edges]."""
        strengths = alphas.double().softmax(-1)
        if self.none is not None:
            strengths[:, self.none] = -1.0  # in place: an index tensor would be a copy to the device in every step
        score = strengths.amax(-1)
        if betas is not None:
            score = score * edge_softmax(betas.double(), self.nodes)
        kept = []
        for group in score.split([node + 2 for node in range(self.nodes)]):
            order = group.argsort(descending=True, stable=True)[:2]
            kept.append(torch.zeros_like(group).scatter(0, order, 1.0))
        return torch.cat(kept)

    def _total(self, supernet: Supernet, hard: bool, share: float = 1.0) -> Tensor:
        products = self._products(supernet, hard)
        total = self._inputs("grown", products) + self.ends
        for kind in ("normal", "reduce"):
            alphas, betas = (_faded(getattr(supernet, f"{name}_{kind}"), share) for name in ("alphas", "betas"))
            if hard:
                chosen = self._kept(alphas, betas)
            else:
                chosen = self.uniform if betas is None else edge_probability(betas, self.nodes)
            per_edge = (self._operation_weights(alphas, hard) * self._edge_costs("grown", kind, products)).sum(-1)
            total = total + (chosen * per_edge).sum()
        return total

    def forward(self, supernet: Supernet) -> Tensor:
        """The expected cost in BitOps (float64 scalar, differentiable in alphas, betas and gammas)."""
        return self._total(supernet, hard=False)

    @torch.no_grad()
    def exact(self, supernet: Supernet) -> Tensor:
        """The cost in BitOps of the network that the present genotype and bits give (float64 scalar)."""
        return self._total(supernet, hard=True)

    def complexity(self, supernet: Supernet) -> Tensor:
        """The reference's complexity: all candidate convolutions of the supernet, over the first convolution's size."""
        products = self._products(supernet, hard=False)
        total = self._inputs("own", products)
        for kind in ("normal", "reduce"):
            total = total + self._edge_costs("own", kind, products).sum()
        return total / self.first_size

    def term(self, supernet: Supernet, share: float = 1.0) -> Tensor:
        """What a loss adds, times --complexity-decay: 2489.3 x C / C0, or with uniform weighting the complexity.

        Alphas and betas receive `share` of its gradient, gammas all of it.
        """
        if self.weighting == "uniform":
            value = self.complexity(supernet)
        else:
            value = REFERENCE_COMPLEXITY * self._total(supernet, hard=False, share=share) / self.initial
        return value.to(supernet.alphas_normal.dtype)

    def _constant_products(self, supernet: Supernet, value: float) -> Tensor | None:
        """The same bits product in every gamma row."""
        if supernet.bits is None:
            return None
        rows = sum(g.numel() for n, g in supernet.gammas.items() if "_weight" in n) // len(supernet.bits)
        return torch.full((rows,), value, dtype=torch.float64)

    def _initial(self, supernet: Supernet) -> float:
        """C0: the expected cost with all logits equal."""
        products = self._constant_products(supernet, float(self.bit_values.mean()) ** 2)
        total = float(self._inputs("grown", products)) + self.ends
        for kind in ("normal", "reduce"):
            costs = self._edge_costs("grown", kind, products)
            keep = [c for c in range(costs.shape[1]) if c != self.none]
            total += float((edge_probability(None, self.nodes) * costs[:, keep].mean(-1)).sum())
        return total

    def _extremes(self, supernet: Supernet, smallest: bool) -> float:
        """Cost of the cheapest or dearest genotype at the smallest or largest bits."""
        bits = float(self.bit_values.min() if smallest else self.bit_values.max())
        products = self._constant_products(supernet, bits**2)
        total = float(self._inputs("grown", products)) + self.ends
        for kind in ("normal", "reduce"):
            costs = self._edge_costs("grown", kind, products)
            keep = costs[:, [c for c in range(costs.shape[1]) if c != self.none]]
            best = keep.amin(-1) if smallest else keep.amax(-1)
            for group in best.split([node + 2 for node in range(self.nodes)]):
                total += float(group.sort(descending=not smallest).values[:2].sum())
        return total


def _faded(logits: Tensor | None, share: float) -> Tensor | None:
    """The same values with `share` of the gradient."""
    if logits is None or share == 1.0:
        return logits
    return logits.detach() + share * (logits - logits.detach())


def _state_of(edge: int, nodes: int) -> int:
    """The state that an edge leaves."""
    return next(edge - count_edges(node) for node in range(nodes) if edge < count_edges(node + 1))


def cell_sizes(plans: list[CellPlan], image_size: int, stem: str) -> list[int]:
    """Height of the map that each cell's operations of stride 2, or of a normal cell, read."""
    size = image_size if stem == "cifar" else image_size // 8
    sizes = []
    for plan in plans:
        sizes.append(size)
        size = size // 2 if plan.reduction else size
    return sizes
