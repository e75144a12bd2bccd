# SPDX-License-Identifier: Apache-2.0
"""Expected cost of a supernet: that of the evaluation network that it is about to become, differentiable.

Per node the sum over its incoming edges of pi(e) x the sum over operations of alpha (without `none`, renormalised) x
the operation's cost, plus the cells' input operations and the ends; pi(e) is the probability that e is among the two
edges that a node keeps. An operation's cost is the mean of a table over (weight bits, activation bits), both drawn by
their probabilities; for BitOps that is MACs x expected weight bits x expected activation bits. The tables are those
of the network to be trained, its cells grouped by the searched cell whose bits they take.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.cost.counting import trace_layers
from common.cost.measures import Counted, Measure
from common.cost.places import (
    CLASSIFIER,
    FLOAT,
    Place,
    build_place,
    cell_sizes,
    fixed_places,
    input_place,
    operation_place,
    stem_place,
)
from common.nets.architecture import map_cells
from common.nets.darts_space import CellPlan, count_edges, edge_softmax, plan_cells
from common.nets.supernet import Supernet
from common.quant import FLOAT_BITS

WEIGHTINGS = ("expected", "uniform")
REFERENCE_COMPLEXITY = 2489.3
"""The reference's complexity of its own supernet (C=16, 8 cells) at the start: the share that the weight assumes."""


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
    trained; `mapping` tells which searched cell gives each of its cells the bits. `measure` says what is counted
    (default: BitOps, in the `accounting` "exact", or "paper": group-blind and without the ends). `weighting` "uniform"
    makes `term` the reference's complexity of the supernet itself, in BitOps, which steers bits only. Buffers follow
    the module's device; nothing here reads it.
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
        measure: Measure | None = None,
    ) -> None:
        super().__init__()
        self.measure: Measure = measure or Counted("bitops", accounting)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"--cost-weighting: {weighting!r} is unknown; choose expected or uniform")
        if weighting == "uniform" and supernet.bits is None:
            raise ValueError("--cost-weighting uniform: weighs bits only, and this search has none; use expected")
        if weighting == "uniform" and self.measure.name != "bitops":
            raise ValueError(f"--cost-weighting uniform: counts BitOps, not {self.measure.name}; use expected")
        self.weighting, self.nodes = weighting, supernet.nodes
        self.none = supernet.primitives.index("none") if "none" in supernet.primitives else None
        self.pairs = bit_pairs(supernet.bits)
        multiplier = supernet.multiplier
        plans = plan_cells(eval_layers, eval_init_channels, supernet.stem_kind, multiplier, multiplier)
        searched = [plan.reduction for plan in supernet.plans]
        sources = map_cells(searched, [plan.reduction for plan in plans], mapping)
        sizes = cell_sizes(plans, input_size, supernet.stem_kind)
        self._tables("grown", supernet, list(zip(sources, plans, sizes, strict=True)), width=1)
        self._rows(supernet)
        if weighting == "uniform":
            own_sizes = cell_sizes(supernet.plans, input_size, supernet.stem_kind)
            own = list(zip(range(len(searched)), supernet.plans, own_sizes, strict=True))
            self._tables("own", supernet, own, width=supernet.partial)
            self.first_size = self._first_size(*own[0][1:])
        self.register_buffer("uniform", edge_probability(None, supernet.nodes))
        stem = stem_place(supernet.stem_kind, supernet.in_channels, eval_init_channels, input_size)
        self.ends = self.measure.values(stem, [(stem_bits, stem_bits)])[0]
        classes = supernet.classifier.out_features
        for place in fixed_places(plans, sizes, (supernet.nodes,) * 2, (multiplier,) * 2, classes):
            bits = (classifier_bits,) * 2 if place.operation == CLASSIFIER else FLOAT
            self.ends += self.measure.values(place, [bits])[0]
        self.initial = self._initial()
        self.cheapest, self.dearest = self._extremes(smallest=True), self._extremes(smallest=False)

    @property
    def steers_bits(self) -> bool:
        """Whether some choice of bits changes the cost."""
        tables = (self.grown_normal, self.grown_reduce, self.grown_inputs)
        return any(bool((table.amax(-1) > table.amin(-1)).any()) for table in tables)

    def _first_size(self, plan: CellPlan, size: int) -> float:
        """The first convolution of the supernet, at one bit."""
        place = input_place(plan, 0, size)
        with torch.device("meta"):
            module = build_place(place)
        assert isinstance(self.measure, Counted)
        return self.measure.size(trace_layers(module, (place.in_channels, place.size, place.size))[0])

    def _tables(self, name: str, supernet: Supernet, cells: list[tuple[int, CellPlan, int]], width: int) -> None:
        """Buffers `{name}_{kind}` [edges, primitives, searched cells, pairs] and `{name}_inputs` [searched cells, 2,
        pairs]: the cost at each pair of bits; `{name}_{kind}_fixed` [edges, primitives]: of what has no bits.

        `cells` are (searched cell, plan, image size in); operations see 1/`width` of a cell's channels.
        """
        edges, primitives, count = count_edges(supernet.nodes), supernet.primitives, len(self.pairs)
        inputs = torch.zeros(len(supernet.plans), 2, count, dtype=torch.float64)
        for kind, members in supernet.cells_of.items():
            table = torch.zeros(edges, len(primitives), len(members), count, dtype=torch.float64)
            fixed = torch.zeros(edges, len(primitives), dtype=torch.float64)
            for source, plan, size in (cell for cell in cells if cell[0] in members):
                for which in (0, 1):
                    inputs[source, which] += self._values(input_place(plan, which, size))
                for edge in range(edges):
                    state = _state_of(edge, supernet.nodes)
                    for column, primitive in enumerate(primitives):
                        place = operation_place(primitive, plan, size, state, width)
                        if primitive == "none" or place.passes_on:
                            continue
                        if _searches(supernet, kind, primitive):
                            table[edge, column, members.index(source)] += self._values(place)
                        else:
                            fixed[edge, column] += self.measure.values(place, [FLOAT])[0]
            self.register_buffer(f"{name}_{kind}", table)
            self.register_buffer(f"{name}_{kind}_fixed", fixed)
        self.register_buffer(f"{name}_inputs", inputs)

    def _values(self, place: Place) -> Tensor:
        return torch.tensor(self.measure.values(place, self.pairs), dtype=torch.float64)

    def _rows(self, supernet: Supernet) -> None:
        """Buffers `rows_{kind}` [edges, primitives, searched cells], `rows_inputs` [searched cells, 2]: gamma rows."""
        if supernet.bits is None:
            return
        for kind, members in supernet.cells_of.items():
            rows = torch.zeros(count_edges(supernet.nodes), len(supernet.primitives), len(members), dtype=torch.long)
            for column, primitive in enumerate(supernet.primitives):
                for position, cell in enumerate(members if _searches(supernet, kind, primitive) else ()):
                    for edge in range(len(rows)):
                        rows[edge, column, position] = supernet.operation_row(cell, edge, primitive)
            self.register_buffer(f"rows_{kind}", rows)
        rows = [[supernet.preprocess_row(plan.index, which) for which in (0, 1)] for plan in supernet.plans]
        self.register_buffer("rows_inputs", torch.tensor(rows))

    def _shares(self, supernet: Supernet, hard: bool) -> Tensor | None:
        """Probability of every pair of bits in every gamma row, [rows, pairs]; `hard`: all on the most probable."""
        return None if supernet.bits is None else pair_shares(*map(supernet.bit_probabilities, OPERANDS), hard)

    def _edge_costs(self, name: str, kind: str, shares: Tensor | None) -> Tensor:
        """[edges, primitives]: cost of each operation on each edge, over all cells of one type."""
        table, fixed = getattr(self, f"{name}_{kind}"), getattr(self, f"{name}_{kind}_fixed")
        if shares is None:  # one pair
            return table.sum((-2, -1)) + fixed
        return (table * shares[getattr(self, f"rows_{kind}")]).sum((-2, -1)) + fixed

    def _inputs(self, name: str, shares: Tensor | None) -> Tensor:
        table = getattr(self, f"{name}_inputs")
        return (table if shares is None else table * shares[self.rows_inputs]).sum()

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
        shares = self._shares(supernet, hard)
        total = self._inputs("grown", shares) + self.ends
        for kind in ("normal", "reduce"):
            alphas, betas = (_faded(getattr(supernet, f"{name}_{kind}"), share) for name in ("alphas", "betas"))
            if hard:
                chosen = self._kept(alphas, betas)
            else:
                chosen = self.uniform if betas is None else edge_probability(betas, self.nodes)
            per_edge = (self._operation_weights(alphas, hard) * self._edge_costs("grown", kind, shares)).sum(-1)
            total = total + (chosen * per_edge).sum()
        return total

    def forward(self, supernet: Supernet) -> Tensor:
        """The expected cost in the measure's unit (float64 scalar, differentiable in alphas, betas and gammas)."""
        return self._total(supernet, hard=False)

    @torch.no_grad()
    def exact(self, supernet: Supernet) -> Tensor:
        """The cost of the network that the present genotype and bits give (float64 scalar)."""
        return self._total(supernet, hard=True)

    def complexity(self, supernet: Supernet) -> Tensor:
        """The reference's complexity: all candidate convolutions of the supernet, over the first convolution's size."""
        shares = self._shares(supernet, hard=False)
        total = self._inputs("own", shares)
        for kind in ("normal", "reduce"):
            total = total + self._edge_costs("own", kind, shares).sum()
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

    def _initial(self) -> float:
        """C0: the expected cost with all logits equal."""
        total = float(self.grown_inputs.mean(-1).sum()) + self.ends
        for kind in ("normal", "reduce"):
            costs = getattr(self, f"grown_{kind}").mean(-1).sum(-1) + getattr(self, f"grown_{kind}_fixed")
            total += float((edge_probability(None, self.nodes) * self._without_none(costs).mean(-1)).sum())
        return total

    def _extremes(self, smallest: bool) -> float:
        """Cost of the cheapest or dearest genotype at its cheapest or dearest bits."""
        end = torch.amin if smallest else torch.amax
        total = float(end(self.grown_inputs, -1).sum()) + self.ends
        for kind in ("normal", "reduce"):
            costs = end(getattr(self, f"grown_{kind}"), -1).sum(-1) + getattr(self, f"grown_{kind}_fixed")
            best = end(self._without_none(costs), -1)
            for group in best.split([node + 2 for node in range(self.nodes)]):
                total += float(group.sort(descending=not smallest).values[:2].sum())
        return total

    def _without_none(self, costs: Tensor) -> Tensor:
        return costs[:, [column for column in range(costs.shape[1]) if column != self.none]]


OPERANDS = ("weight", "activation")


def bit_pairs(bits: tuple[int, ...] | None) -> list[tuple[int, int]]:
    """Every (weight bits, activation bits) that a search chooses among, weights first; without bits full precision."""
    return [FLOAT] if bits is None else [(w, a) for w in bits for a in bits]


def pair_shares(weight: Tensor, activation: Tensor, hard: bool) -> Tensor:
    """Probabilities [rows, bits] of both operands -> of the pairs in the order of `bit_pairs`, [rows, pairs], float64.

    `hard`: 1 for the most probable bits.
    """
    each = []
    for probabilities in (weight.double(), activation.double()):
        if hard:
            chosen = probabilities.argmax(-1, keepdim=True)
            probabilities = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        each.append(probabilities)
    return (each[0].unsqueeze(-1) * each[1].unsqueeze(-2)).flatten(-2)


def _searches(supernet: Supernet, kind: str, primitive: str) -> bool:
    """Whether a supernet looks up this primitive's cost at the pairs of bits (without bits: at the one pair)."""
    return supernet.bits is not None and primitive in supernet.rows[kind]


def _faded(logits: Tensor | None, share: float) -> Tensor | None:
    """The same values with `share` of the gradient."""
    if logits is None or share == 1.0:
        return logits
    return logits.detach() + share * (logits - logits.detach())


def _state_of(edge: int, nodes: int) -> int:
    """The state that an edge leaves."""
    return next(edge - count_edges(node) for node in range(nodes) if edge < count_edges(node + 1))
