# SPDX-License-Identifier: Apache-2.0
"""The supernet: every candidate operation on every edge, mixed by alphas, betas and gammas; one class for all methods.

DARTS (Liu et al., 2019): full channels, alphas. PC-DARTS (Xu et al., 2020): 1/k of the channels pass the operations,
the rest bypasses them, and betas weigh the edges. nablaQDARTS (TMLR 2025): besides, every convolution mixes its
bit-widths by gammas, one pair of rows (weights, activations) per physical cell, edge and quantised primitive.

Layout. A state's channels enter the operations once per bit-width, whatever the number of its outgoing edges; the
candidates of one primitive on all edges that leave a state are computed together, as one grouped convolution over
edges x channels; pooling is computed once per state; all weights of one shape in the network are quantised together.
The candidate convolutions are ordinary modules that hold the weights; the cell computes them in these stacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.architecture import Architecture, BitPolicy, CellBits, needs_bits
from common.nets.darts_space import (
    CellPlan,
    count_edges,
    edge_softmax,
    outgoing,
    output_channels,
    plan_cells,
    read_genotype,
)
from common.nets.fused import fused_edges, fused_node, fusible
from common.nets.network import STEMS, cifar_stem, imagenet_stems
from common.nets.operations import OPERATIONS, FactorizedReduce, plain_convolution, preprocess
from common.nets.recompute import recomputed
from common.nets.stacks import Bank, ConvStack, SeparableStack, StackedEdges
from common.quant import (
    SCHEMES,
    SUPPORTED_BITS,
    MixedActivation,
    MixedQuantConv2d,
    frozen_ranges,
    mix_weights,
)
from genotypes import PRIMITIVES, Genotype

METHODS = ("darts", "pc-darts")
ALPHA_SPREAD = 1e-3  # standard deviation of every architecture logit at the start


def _no_norm(channels: int) -> nn.Module:
    """A candidate's normalisation is its stack's."""
    return nn.Identity()


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


class StateEdges(nn.Module):
    """All candidate operations on the edges that leave one state, computed together.

    forward: [B, c, H, W] and strengths [edges, primitives] (alpha, times beta) -> [B, edges, c, H', W'], the sum over
    operations per edge.
    """

    def __init__(self, cell: _CellBuilder, state: int, stride: int) -> None:
        super().__init__()
        self.edges = [edge for _, edge in outgoing(state, cell.nodes)]
        self.register_buffer("edge_index", torch.tensor(self.edges), persistent=False)
        self.channels, self.primitives = cell.width, cell.primitives
        self.levels, self.shifted_levels = cell.levels(1), None
        self.operations = [cell.operations[edge] for edge in self.edges]  # a plain list: the cell owns them
        self.halving: nn.ModuleList | None = None
        separable: dict[str, SeparableStack] = {}
        pools: dict[str, nn.Module] = {}
        for primitive in cell.primitives:
            if "pool" in primitive and primitive in OPERATIONS:
                pools[primitive] = OPERATIONS[primitive](plain_convolution, _norm, cell.width, stride)
            elif primitive in STACKED and needs_bits(primitive, stride):
                candidates = [cell.operations[edge][primitive] for edge in self.edges]
                stacks = cell.stack(candidates, self.edges, primitive)
                if primitive == "skip_connect":
                    self.halving, self.shifted_levels = nn.ModuleList(stacks), cell.levels(1)
                    self.halving_norm = _norm(len(self.edges) * cell.width)
                else:
                    separable[primitive] = self._separable(cell, stacks)
        skip = stride == 1 and "skip_connect" in cell.primitives
        together = [*separable, *pools, *(["skip_connect"] if skip else [])]
        norms = [_norm(cell.width) for _ in pools]
        self.stacked = StackedEdges(
            list(separable.values()), pools, norms, skip=skip, edges=len(self.edges), stride=stride
        )
        column = {primitive: k for k, primitive in enumerate(self.primitives)}
        self.register_buffer("columns", torch.tensor([column[p] for p in together]), persistent=False)
        self.single = [(k, p) for p, k in column.items() if p != "none" and p not in together]

    def _separable(self, cell: _CellBuilder, stacks: list[ConvStack]) -> SeparableStack:
        count = len(self.edges)
        norms = [_norm(count * cell.width) for _ in stacks[1::2]]
        levels = [] if cell.bits is None else [cell.levels(count) for _ in stacks[1:]]
        return SeparableStack(stacks, norms, levels)

    def forward(self, x: Tensor, strengths: Tensor, bank: Bank) -> Tensor:
        """See the class."""
        maximum = None if self.levels is None or self.levels.range is None else self.levels.range(x)
        total: Tensor | None = None
        if self.columns.numel():
            total = self._together(x, maximum, strengths.index_select(1, self.columns), bank)
        for column, primitive in self.single:
            if self.halving is not None and primitive == "skip_connect":
                part = self._halve(x, maximum, bank).unflatten(1, (len(self.edges), self.channels))
            else:
                part = torch.stack([operations[primitive](x) for operations in self.operations], 1)
            part = part * strengths[:, column].view(1, -1, 1, 1, 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _together(self, x: Tensor, maximum: Tensor | None, strengths: Tensor, bank: Bank) -> Tensor:
        rows, weights = self.stacked.operands(bank)
        if fusible(self.stacked, x, strengths, rows, weights):
            return fused_edges(self.stacked, x, self.levels, maximum, strengths, rows, weights)
        active = F.relu(x)
        entry = active if self.levels is None else self.levels.levels(active, maximum)
        return self.stacked(x, entry, strengths, rows, weights)

    def _halve(self, x: Tensor, maximum: Tensor | None, bank: Bank) -> Tensor:
        assert self.halving is not None
        active = F.relu(x)
        shifted = active[:, :, 1:, 1:]
        if self.levels is None or self.shifted_levels is None:
            one, two = self.halving[0](active, bank), self.halving[1](shifted, bank)
        else:
            one = self.halving[0](self.levels.levels(active, maximum), bank)
            two = self.halving[1](self.shifted_levels.levels(shifted), bank)
        split = [t.unflatten(1, (len(self.edges), -1)) for t in (one, two)]
        # dense channels, as everywhere: concatenating has left them
        joined = torch.cat(split, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return self.halving_norm(joined)


STACKED = {"skip_connect", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7", "dil_conv_3x3", "dil_conv_5x5"}


class _Registry:
    """Collects the stacks of the whole network, and numbers the gamma rows."""

    def __init__(self) -> None:
        self.stacks: list[ConvStack] = []

    def add(self, members: Sequence[nn.Conv2d], rows: Sequence[int] | None) -> ConvStack:
        """A stack of these members, numbered."""
        stack = ConvStack(members, rows, len(self.stacks))
        self.stacks.append(stack)
        return stack


class _CellBuilder:
    """What the parts of one cell share while it is built."""

    def __init__(
        self, supernet: Supernet, plan: CellPlan, registry: _Registry, make_conv: partial[nn.Conv2d] | None
    ) -> None:
        self.plan, self.registry, self.supernet = plan, registry, supernet
        self.nodes, self.primitives, self.bits = supernet.nodes, supernet.primitives, supernet.bits
        self.width = plan.channels // supernet.partial
        self.conv = plain_convolution if make_conv is None else make_conv
        self.operations = nn.ModuleList()

    def levels(self, groups: int) -> MixedActivation | None:
        """The quantiser of an activation over the bits under search, or None in full precision."""
        if self.bits is None:
            return None
        s = self.supernet
        return MixedActivation(self.bits, groups=groups, scheme=s.scheme, signed_activations=s.signed_activations)

    def stack(self, candidates: Sequence[nn.Module], edges: Sequence[int], primitive: str) -> list[ConvStack]:
        """One ConvStack per convolution of a primitive, over its candidates on `edges`."""
        rows = None
        if self.bits is not None:
            rows = [self.supernet.operation_row(self.plan.index, edge, primitive) for edge in edges]
        columns = zip(*(c.convolutions() for c in candidates), strict=True)
        return [self.registry.add(members, rows) for members in columns]


class SupernetCell(nn.Module):
    """One relaxed cell."""

    def __init__(self, builder: _CellBuilder) -> None:
        super().__init__()
        plan = builder.plan
        self.reduction, self.nodes, self.channels, self.width = (
            plan.reduction,
            builder.nodes,
            plan.channels,
            builder.width,
        )
        self.partial, self.multiplier = builder.supernet.partial, builder.supernet.multiplier
        self.preprocess0 = preprocess(builder.conv, _norm, plan.before_last, plan.channels, plan.reduction_before)
        self.preprocess1 = preprocess(builder.conv, _norm, plan.last, plan.channels, False)
        rows = [None, None]
        if builder.bits is not None:
            rows = [[builder.supernet.preprocess_row(plan.index, which)] for which in (0, 1)]
        self.input_stacks = nn.ModuleList(
            nn.ModuleList(builder.registry.add([conv], row) for conv in module.convolutions())
            for module, row in zip((self.preprocess0, self.preprocess1), rows, strict=True)
        )
        self.input_levels = nn.ModuleList()
        if builder.bits is not None:
            for module in (self.preprocess0, self.preprocess1):
                self.input_levels.append(nn.ModuleList(builder.levels(1) for _ in module.convolutions()))
        self.operations = builder.operations
        for node in range(self.nodes):
            for state in range(node + 2):
                stride = 2 if plan.reduction and state < 2 else 1
                candidates = nn.ModuleDict()
                for primitive in builder.primitives:
                    if (primitive in STACKED and needs_bits(primitive, stride)) or _is_own(primitive):
                        norm = _norm if _is_own(primitive) else _no_norm
                        candidates[primitive] = OPERATIONS[primitive](builder.conv, norm, self.width, stride)
                self.operations.append(candidates)
        self.states = nn.ModuleList(
            StateEdges(builder, state, 2 if plan.reduction and state < 2 else 1) for state in range(self.nodes + 1)
        )

    def _input(self, which: int, x: Tensor, bank: Bank) -> Tensor:
        module = (self.preprocess0, self.preprocess1)[which]
        stacks = self.input_stacks[which]
        # the second half of a factorised reduction reads the image shifted by one pixel
        inputs = [x, x[:, :, 1:, 1:]] if isinstance(module, FactorizedReduce) else [x]
        if self.input_levels:
            pairs = zip(stacks, self.input_levels[which], inputs, strict=True)
            outputs = [stack.convolve_coded(entry, levels, bank) for stack, levels, entry in pairs]
        else:
            outputs = [stack(F.relu(entry), bank) for stack, entry in zip(stacks, inputs, strict=True)]
        return module.bn(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1))

    def forward(self, before_last: Tensor, last: Tensor, alphas: Tensor, betas: Tensor | None, bank: Bank) -> Tensor:
        """Outputs of the two cells before, alphas [edges, primitives], betas [edges] -> [B, multiplier * C, H, W]."""
        states = [self._input(0, before_last, bank), self._input(1, last, bank)]
        heads: list[list[Tensor]] = [[] for _ in range(self.nodes)]
        rests: list[list[Tensor]] = [[] for _ in range(self.nodes)]
        by_node = [None] * self.nodes if betas is None else self._incoming(betas)
        for state, leaving in enumerate(self.states):
            x, rest = states[state], None
            if self.partial > 1:
                x, rest = x.split([self.width, self.channels - self.width], 1)
                rest = F.max_pool2d(rest, 2, 2) if self.reduction and state < 2 else rest
            strengths = alphas.index_select(0, leaving.edge_index)
            if betas is not None:
                strengths = strengths * betas.index_select(0, leaving.edge_index).unsqueeze(1)
            parts = leaving(x, strengths, bank).unbind(1)
            for part, (node, _) in zip(parts, outgoing(state, self.nodes), strict=True):
                heads[node].append(part)
                if rest is not None:
                    rests[node].append(rest)
            if state >= 1:  # node `state - 1` has now received all of its edges
                states.append(fused_node(heads[state - 1], rests[state - 1], by_node[state - 1]))
        return torch.cat(states[2 + self.nodes - self.multiplier :], 1)

    def _incoming(self, betas: Tensor) -> list[Tensor]:
        """Betas of the edges that enter each node, in the order of the states."""
        return list(betas.split([node + 2 for node in range(self.nodes)]))


def _is_own(primitive: str) -> bool:
    """A registered operation that the stacks do not know: computed edge by edge."""
    return primitive not in STACKED and "pool" not in primitive and primitive != "none"


class Supernet(nn.Module):
    """The relaxed network. Architecture logits are parameters in named groups, apart from the weights.

    `alphas_normal`, `alphas_reduce` [edges, primitives]; `betas_normal`, `betas_reduce` [edges] (PC-DARTS, else None);
    `gammas`: `{normal,reduce}_{activation,weight}` [cells, edges, rows, bits] and
    `{normal,reduce}_{activation,weight}_preprocess{0,1}` [cells, bits], with one row per quantised primitive of the
    cell type, in primitive order (`rows`).
    """

    memory_format = torch.channels_last
    checkpoint_cells = False

    def __init__(
        self,
        *,
        method: str,
        bits: tuple[int, ...] | None,
        stem: str,
        in_channels: int,
        num_classes: int,
        init_channels: int,
        layers: int,
        partial_channels: int,
        scheme: str,
        nodes: int,
        multiplier: int,
        signed_activations: bool,
        primitives: Sequence[str],
        bit_mapping: str,
    ) -> None:
        super().__init__()
        self.method, self.bits, self.scheme, self.stem_kind = method, bits, scheme, stem
        self.nodes, self.multiplier, self.primitives = nodes, multiplier, tuple(primitives)
        self.partial = partial_channels if method == "pc-darts" else 1
        self.signed_activations, self.bit_mapping, self.in_channels = signed_activations, bit_mapping, in_channels
        # the supernet's stem hands on 3 C channels on ImageNet too (PC-DARTS), where the evaluation network's gives C
        self.plans = plan_cells(layers, init_channels, stem, multiplier, multiplier, stem_channels=3 * init_channels)
        self._init_logits()
        if stem == "cifar":
            self.stem: nn.Module = cifar_stem(3 * init_channels, in_channels, plain_convolution)
        else:
            self.stem0, self.stem1 = imagenet_stems(
                3 * init_channels, in_channels, plain_convolution, plain_convolution
            )
        registry = _Registry()
        make_conv = None
        if bits is not None:
            make_conv = partial(MixedQuantConv2d, bits=bits, scheme=scheme, executed=False)
        self.cells = nn.ModuleList(SupernetCell(_CellBuilder(self, p, registry, make_conv)) for p in self.plans)
        self.classifier = nn.Linear(output_channels(self.plans, multiplier, multiplier), num_classes)
        self._index_stacks(registry.stacks)

    def _init_logits(self) -> None:
        edges, columns = count_edges(self.nodes), len(self.primitives)
        spread = lambda *shape: nn.Parameter(ALPHA_SPREAD * torch.randn(*shape))  # noqa: E731
        self.alphas_normal, self.alphas_reduce = spread(edges, columns), spread(edges, columns)
        if self.method == "pc-darts":
            self.betas_normal, self.betas_reduce = spread(edges), spread(edges)
        else:
            self.betas_normal = self.betas_reduce = None
        self.rows = {
            kind: tuple(p for p in self.primitives if p in STACKED and needs_bits(p, stride))
            for kind, stride in (("normal", 1), ("reduce", 2))
        }
        self.cells_of = {
            kind: tuple(p.index for p in self.plans if p.reduction == (kind == "reduce"))
            for kind in ("normal", "reduce")
        }
        self.gammas = nn.ParameterDict()
        self._offset: dict[str, int] = {}
        if self.bits is None:
            return
        for kind in ("normal", "reduce"):
            cells, choices = len(self.cells_of[kind]), len(self.bits)
            for operand in ("activation", "weight"):
                name = f"{kind}_{operand}"
                self.gammas[f"{name}_preprocess0"] = spread(cells, choices)
                self.gammas[f"{name}_preprocess1"] = spread(cells, choices)
                self.gammas[name] = spread(cells, edges, len(self.rows[kind]), choices)
        row = 0
        for name in self._table_order("weight"):
            self._offset[name.replace("_weight", "")] = row
            row += self.gammas[name].numel() // len(self.bits)

    @staticmethod
    def _table_order(operand: str) -> list[str]:
        return [
            f"{kind}_{operand}{part}" for kind in ("normal", "reduce") for part in ("_preprocess0", "_preprocess1", "")
        ]

    def _kind(self, cell: int) -> tuple[str, int]:
        kind = "reduce" if self.plans[cell].reduction else "normal"
        return kind, self.cells_of[kind].index(cell)

    def preprocess_row(self, cell: int, which: int) -> int:
        """Row of `bit_probabilities` for a cell's input operation 0 or 1."""
        kind, position = self._kind(cell)
        return self._offset[f"{kind}_preprocess{which}"] + position

    def operation_row(self, cell: int, edge: int, primitive: str) -> int:
        """Row of `bit_probabilities` for a quantised primitive on an edge of a cell."""
        kind, position = self._kind(cell)
        rows = self.rows[kind]
        return self._offset[kind] + (position * count_edges(self.nodes) + edge) * len(rows) + rows.index(primitive)

    def bit_probabilities(self, operand: str) -> Tensor:
        """Softmax over bits of every gamma row, [rows, bits], for operand "weight" or "activation"."""
        assert self.bits is not None
        table = [self.gammas[name].reshape(-1, len(self.bits)) for name in self._table_order(operand)]
        return torch.cat(table).softmax(-1)

    def _index_stacks(self, stacks: list[ConvStack]) -> None:
        """Group the stacks by weight shape, so that each group is quantised as one tensor."""
        groups: dict[tuple[int, ...], list[ConvStack]] = {}
        for stack in stacks:
            groups.setdefault(tuple(stack.members[0].weight.shape), []).append(stack)
        self._groups = list(groups.values())
        self._stack_count = len(stacks)
        for number, group in enumerate(self._groups):
            rows = torch.cat([stack.row_index for stack in group])
            self.register_buffer(f"_rows{number}", rows, persistent=False)

    def _bank(self) -> Bank:
        weights: list[Tensor] = [torch.empty(0)] * self._stack_count
        table = None if self.bits is None else self.bit_probabilities("weight")
        for number, group in enumerate(self._groups):
            members = torch.stack([conv.weight for stack in group for conv in stack.members])
            if table is not None:
                assert self.bits is not None
                rows = table.index_select(0, getattr(self, f"_rows{number}"))
                members = mix_weights(members, rows, self.bits, self.scheme)
            for stack, part in zip(group, members.split([stack.edges for stack in group]), strict=True):
                weights[stack.position] = part.flatten(0, 1)
        return Bank(weights, None if self.bits is None else self.bit_probabilities("activation"))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] -> logits [B, classes]."""
        # depthwise convolutions and the mixing of levels both run along dense channels
        x = x.contiguous(memory_format=self.memory_format)
        bank = self._bank()
        alphas = {False: self.alphas_normal.softmax(-1), True: self.alphas_reduce.softmax(-1)}
        betas: dict[bool, Tensor | None] = {False: None, True: None}
        if self.betas_normal is not None and self.betas_reduce is not None:
            betas = {
                False: edge_softmax(self.betas_normal, self.nodes),
                True: edge_softmax(self.betas_reduce, self.nodes),
            }
        if self.stem_kind == "cifar":
            before_last = last = self.stem(x)
        else:
            before_last = self.stem0(x)
            last = self.stem1(before_last)
        for cell in self.cells:
            kind = cell.reduction
            inputs = (before_last, last, alphas[kind], betas[kind], bank)
            before_last, last = last, recomputed(cell, *inputs) if self.checkpoint_cells else cell(*inputs)
        return self.classifier(last.mean((2, 3)))

    def arch_parameters(self) -> list[nn.Parameter]:
        """alphas_normal, alphas_reduce, and with PC-DARTS betas_normal, betas_reduce."""
        named = [self.alphas_normal, self.alphas_reduce, self.betas_normal, self.betas_reduce]
        return [p for p in named if p is not None]

    def gamma_parameters(self) -> list[nn.Parameter]:
        """The bit-width logits (none in full precision)."""
        return list(self.gammas.values())

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything else: the weights of the network."""
        logits = {id(p) for p in (*self.arch_parameters(), *self.gamma_parameters())}
        return [p for p in self.parameters() if id(p) not in logits]

    @contextmanager
    def side_pass(self) -> Iterator[None]:
        """Within it, forwards leave every running quantiser range untouched."""
        with frozen_ranges(self):
            yield

    def genotype(self) -> Genotype:
        """The present choice of edges and operations (reads the device)."""
        return read_genotype(
            self.alphas_normal,
            self.alphas_reduce,
            self.betas_normal,
            self.betas_reduce,
            nodes=self.nodes,
            multiplier=self.multiplier,
            primitives=self.primitives,
        )

    def architecture(self, search: dict[str, object] | None = None) -> Architecture:
        """The present genotype with the most probable bits of its operations, cell by cell."""
        genotype = self.genotype()
        policy = None if self.bits is None else BitPolicy(cells=self._cell_bits(genotype), mapping=self.bit_mapping)
        return Architecture(genotype, policy, search=search or {})

    def _cell_bits(self, genotype: Genotype) -> tuple[CellBits, ...]:
        assert self.bits is not None
        chosen = [self.bit_probabilities(o).detach().argmax(-1).tolist() for o in ("weight", "activation")]
        pair = lambda row: (self.bits[chosen[0][row]], self.bits[chosen[1][row]])  # noqa: E731
        cells = []
        for plan in self.plans:
            operations = []
            for position, (primitive, state) in enumerate(genotype.reduce if plan.reduction else genotype.normal):
                stride = 2 if plan.reduction and state < 2 else 1
                edge = count_edges(position // 2) + state
                quantised = primitive in STACKED and needs_bits(primitive, stride)
                operations.append(pair(self.operation_row(plan.index, edge, primitive)) if quantised else None)
            ends = [pair(self.preprocess_row(plan.index, which)) for which in (0, 1)]
            cells.append(CellBits(plan.reduction, ends[0], ends[1], tuple(operations)))
        return tuple(cells)


def build_supernet(
    *,
    method: str = "darts",
    bits: Sequence[int] | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    num_classes: int,
    init_channels: int,
    layers: int,
    partial: int = 4,
    scheme: str = "default",
    nodes: int = 4,
    multiplier: int = 4,
    signed_activations: bool = False,
    primitives: Sequence[str] = PRIMITIVES,
    bit_mapping: str = "relative",
) -> Supernet:
    """Build the supernet of DARTS ("darts") or PC-DARTS ("pc-darts", 1/`partial` of the channels), in full precision
    (`bits` None) or with its convolutions mixed over `bits`, a subset of {1, 2, 3, 4, 8, 32}.

    `nodes` per cell, of which the last `multiplier` are concatenated. `scheme` "reference" is the reference's: 8 bits
    per channel and no extra ReLU. Raises ValueError naming the flag on values that do not fit together.
    """
    if method not in METHODS:
        raise ValueError(f"--method: {method!r} is unknown; choose darts or pc-darts")
    if stem not in STEMS or scheme not in SCHEMES:
        raise ValueError(f"stem {stem!r}, scheme {scheme!r}: stems are {STEMS}, schemes {SCHEMES}")
    if not 1 <= multiplier <= nodes:
        raise ValueError(f"--multiplier: {multiplier} of {nodes} nodes cannot be concatenated; choose 1 to {nodes}")
    for what, value in (("classes", num_classes), ("image channels", in_channels), ("--init-channels", init_channels)):
        if value < 1:
            raise ValueError(f"{what}: {value} must be at least 1")
    if layers < 3:
        raise ValueError(f"--layers: {layers} leave no room for a normal cell and two reductions; use at least 3")
    width = init_channels // (partial if method == "pc-darts" else 1)
    if method == "pc-darts" and (partial < 2 or init_channels % partial or width < 2):
        raise ValueError(
            f"--partial: 1/{partial} of --init-channels {init_channels} is no whole number of at least 2 channels; "
            f"use a multiple of {partial} from {2 * partial} on"
        )
    if unknown := [p for p in primitives if p != "none" and p not in OPERATIONS]:
        raise ValueError(f"--search-space: unknown primitive {unknown[0]!r}; register it in common.nets.OPERATIONS")
    if bits is not None:
        bits = tuple(bits)
        if not bits or len(set(bits)) != len(bits) or any(b not in SUPPORTED_BITS for b in bits):
            raise ValueError(f"--bits: {bits} must be different bit-widths among {', '.join(map(str, SUPPORTED_BITS))}")
    return Supernet(
        method=method,
        bits=bits,
        stem=stem,
        in_channels=in_channels,
        num_classes=num_classes,
        init_channels=init_channels,
        layers=layers,
        partial_channels=partial,
        scheme=scheme,
        nodes=nodes,
        multiplier=multiplier,
        signed_activations=signed_activations,
        primitives=primitives,
        bit_mapping=bit_mapping,
    )
