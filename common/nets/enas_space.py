# SPDX-License-Identifier: Apache-2.0
"""The micro space of ENAS: its architecture strings, and the network of one fixed architecture.

A cell of B blocks is 4 B integers (x input, x operation, y input, y operation) a block. Nodes 0 and 1 are the outputs
of the layer before the last and of the last one, node 2 + c is block c, whose output is op_x(node x) + op_y(node y).
What no block reads is concatenated. A network is a stem and L + 2 cells, three of them (of L >= 2) reductions.
Source: Pham et al., Efficient Neural Architecture Search (ICML 2018), as quantised by the public ENAS-QNN project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.enas_layers import (
    TERNARY,
    AuxiliaryHead,
    Calibration,
    ConvNorm,
    FactorizedReduction,
    LayerType,
    NormFactory,
    Pool,
    SeparableConv,
    initialize,
    moving_norm,
    resolve_layer_types,
)
from common.nets.operations import Shard, drop_path
from common.nets.recompute import recomputed
from common.quant import QuantLinear

SPACE = "enas-micro"
OPERATION_NAMES = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")
IDENTITY = OPERATION_NAMES.index("identity")
KERNELS = (3, 5)
_MAX_LETTERS = 100_000  # of an architecture, comments included
MAX_BLOCKS = 64

Block = tuple[int, int, int, int]
"""(x input, x operation, y input, y operation)."""

# ------------------------------------------------------------------------------------------------------ the grammar


@dataclass(frozen=True)
class MicroCells:
    """The two cells of an architecture, each as its 4 B integers."""

    normal: tuple[int, ...]
    reduce: tuple[int, ...]

    def __str__(self) -> str:
        """Two bracketed lines, as the log of a search prints them."""
        return "\n".join(f"[{_aligned(cell)}]" for cell in (self.normal, self.reduce))

    @property
    def blocks(self) -> int:
        """Blocks of a cell."""
        return len(self.normal) // 4

    @property
    def numbers(self) -> str:
        """Both cells in one line, as --fixed_arc takes them."""
        return " ".join(map(str, (*self.normal, *self.reduce)))

    def cell(self, reduction: bool) -> list[Block]:
        """The blocks of one cell."""
        row = self.reduce if reduction else self.normal
        return [(row[i], row[i + 1], row[i + 2], row[i + 3]) for i in range(0, len(row), 4)]

    def pairs(self, reduction: bool) -> tuple[tuple[str, int], ...]:
        """(operation, node that it reads), two for each block of one cell."""
        return tuple(
            (OPERATION_NAMES[operation], node)
            for x, x_op, y, y_op in self.cell(reduction)
            for node, operation in ((x, x_op), (y, y_op))
        )

    def unused(self, reduction: bool) -> list[int]:
        """The nodes that no block reads, ascending: the cell's output."""
        return unused_nodes(self.cell(reduction))


def unused_nodes(blocks: Sequence[Block]) -> list[int]:
    """The nodes of a cell that none of its blocks reads, ascending."""
    read = {node for x, _, y, _ in blocks for node in (x, y)}
    return [node for node in range(len(blocks) + 2) if node not in read]


def _aligned(cell: Sequence[int]) -> str:
    width = max((len(str(value)) for value in cell), default=0)
    return " ".join(f"{value:>{width}}" for value in cell)


def parse_cells(text: str, blocks: int | None = None) -> MicroCells:
    """Read both cells from blank-separated integers; brackets, commas, line breaks and `# comments` are ignored.

    `blocks`: how many each cell must have. Raises ValueError for what is no integer, for another length, for an input
    that does not exist and for an unknown operation, each in its own words.
    """
    if len(text) > _MAX_LETTERS:
        raise ValueError(f"{len(text):,} letters do not make two cells; at most {_MAX_LETTERS:,} are read")
    words = re.sub(r"[\[\],]", " ", re.sub(r"#[^\n]*", " ", text)).split()
    for word in words:
        if not re.fullmatch(r"[+-]?\d{1,9}", word):
            raise ValueError(f"{word[:40]!r} is no integer; an architecture is blank-separated integers")
    numbers = [int(word) for word in words]
    wanted = "" if blocks is None else f"; this network has {blocks} blocks a cell: {8 * blocks} numbers"
    if not numbers or len(numbers) % 8 or len(numbers) > 8 * MAX_BLOCKS:
        raise ValueError(
            f"{len(numbers)} numbers do not make a normal and a reduction cell of 4 numbers a block; "
            f"5 blocks take 40{wanted}"
        )
    if blocks is not None and len(numbers) != 8 * blocks:
        raise ValueError(f"{len(numbers)} numbers make cells of {len(numbers) // 8} blocks{wanted}")
    half = len(numbers) // 2
    cells = MicroCells(tuple(numbers[:half]), tuple(numbers[half:]))
    validate_cells(cells)
    return cells


def validate_cells(cells: MicroCells, where: str = "") -> None:
    """Raise ValueError that names cell, block and branch where an input does not exist or an operation is unknown."""
    prefix = f"{where}: " if where else ""
    if len(cells.normal) != len(cells.reduce) or not cells.normal or len(cells.normal) % 4:
        raise ValueError(
            f"{prefix}cells of {len(cells.normal)} and {len(cells.reduce)} numbers; both take 4 for each block"
        )
    for name, reduction in (("normal", False), ("reduction", True)):
        for position, block in enumerate(cells.cell(reduction)):
            for branch, node, operation in (("x", block[0], block[1]), ("y", block[2], block[3])):
                place = f"{prefix}{name} cell, block {position}, {branch}"
                if not 0 <= node <= position + 1:
                    raise ValueError(f"{place}: input {node} does not exist there; it may be 0 to {position + 1}")
                if not 0 <= operation < len(OPERATION_NAMES):
                    known = ", ".join(f"{k} {name}" for k, name in enumerate(OPERATION_NAMES))
                    raise ValueError(f"{place}: operation {operation} is unknown; known: {known}")


def random_cells(blocks: int, generator: torch.Generator) -> MicroCells:
    """Both cells drawn uniformly from the space."""
    rows = []
    for _ in range(2):
        row: list[int] = []
        for position in range(blocks):
            for _ in range(2):
                row.append(int(torch.randint(position + 2, (), generator=generator)))
                row.append(int(torch.randint(len(OPERATION_NAMES), (), generator=generator)))
        rows.append(tuple(row))
    return MicroCells(*rows)


def cells_to_json(cells: MicroCells) -> dict[str, Any]:
    """The `genotype` of an architecture.json."""
    return {"normal": list(cells.normal), "reduce": list(cells.reduce)}


def cells_from_json(data: Any, where: str = "genotype") -> MicroCells:
    """Read what `cells_to_json` wrote; raises ValueError naming the field."""
    if not isinstance(data, Mapping) or set(data) != {"normal", "reduce"}:
        raise ValueError(f"{where}: expected an object with the lists normal and reduce")
    for key in ("normal", "reduce"):
        row = data[key]
        if not isinstance(row, list) or any(type(value) is not int for value in row) or len(row) > 4 * MAX_BLOCKS:
            raise ValueError(f"{where}.{key}: expected a list of integers")
    cells = MicroCells(tuple(data["normal"]), tuple(data["reduce"]))
    validate_cells(cells, where)
    return cells


# ------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class LayerPlan:
    """Place and width of one cell: `channels` per node, `level` how often the image was halved before it."""

    index: int
    reduction: bool
    channels: int
    level: int
    kind: LayerType


def reduction_layers(layers: int) -> tuple[int, ...]:
    """Where the reductions of a network of L + 2 cells stand: d, 2 d + 1 and L, with d = L // 4."""
    d = layers // 4
    return tuple(sorted({d, 2 * d + 1, layers}))


def auxiliary_layer(layers: int) -> int:
    """The cell after which the auxiliary head reads: the one after the second reduction."""
    return 2 * (layers // 4) + 2


def plan_layers(layers: int, out_filters: int, types: Sequence[LayerType]) -> list[LayerPlan]:
    """The L + 2 cells of a network; `types` are those of the stem and of each cell."""
    plans, channels, level = [], out_filters, 0
    reductions = reduction_layers(layers)
    for index in range(layers + 2):
        reduction = index in reductions
        channels = 2 * channels if reduction else channels
        plans.append(LayerPlan(index, reduction, channels, level, types[index + 1]))
        level += reduction
    return plans


def check_image_size(size: int, layers: int) -> None:
    """Raise ValueError unless every reduction halves the image exactly."""
    factor = 2 ** len(reduction_layers(layers))
    if size < factor or size % factor:
        raise ValueError(
            f"--image-size: {size} does not fit; the network halves images {len(reduction_layers(layers))} times, "
            f"so use a multiple of {factor}"
        )


# ------------------------------------------------------------------------------------------------------ the network


def build_operation(
    operation: int, kind: LayerType, norm: NormFactory, channels: int, stride: int, *, rescale: bool = False
) -> nn.Module:
    """One of OPERATION_NAMES; the identity of stride 2 is a factorised reduction without activation quantiser."""
    if operation < len(KERNELS):
        return SeparableConv(kind, norm, channels, KERNELS[operation], stride, rescale=rescale)
    if operation == IDENTITY:
        if stride == 1:
            return nn.Identity()
        return FactorizedReduction(kind, norm, channels, channels, quantize_input=False)
    return Pool("avg" if operation == 2 else "max", stride)


class MicroCell(nn.Module):
    """One cell of a fixed architecture, with weights of its own for every use of an operation."""

    shard: Shard = (0, 1)

    def __init__(
        self,
        blocks: Sequence[Block],
        plan: LayerPlan,
        widths: tuple[int, int],
        halve: bool,
        norm: NormFactory,
        compat: bool,
    ) -> None:
        super().__init__()
        kind, f = plan.kind, plan.channels
        self.calibration = Calibration(kind, norm, widths, f, halve)
        self.base = ConvNorm(kind, norm, f, f)
        # The source gives the first cell's y branches its default type, whatever the cell's own.
        kinds = (kind, TERNARY if compat and plan.index == 0 else kind)
        self.operations = nn.ModuleList()
        self.inputs: list[int] = []
        self.dropped: list[bool] = []
        for block in blocks:
            for node, operation, own in ((block[0], block[1], kinds[0]), (block[2], block[3], kinds[1])):
                stride = 2 if plan.reduction and node < 2 else 1
                self.operations.append(build_operation(operation, own, norm, f, stride, rescale=compat))
                self.inputs.append(node)
                self.dropped.append(operation != IDENTITY)
        self.unused = unused_nodes(blocks)
        halved = [node for node in self.unused if plan.reduction and node < 2]
        self.reductions = nn.ModuleDict(
            {str(node): FactorizedReduction(kind, norm, f, f, quantize_input=False) for node in halved}
        )
        self.out_channels = len(self.unused) * f

    def forward(self, before_last: Tensor, last: Tensor, dropping: float | Tensor | None) -> Tensor:
        """Outputs of the two layers before, probability of dropping a path -> [B, unused nodes x channels, H, W]."""
        nodes = self.calibration(before_last, last)
        nodes[1] = self.base(nodes[1])
        branches: list[Tensor] = []
        for node, operation, dropped in zip(self.inputs, self.operations, self.dropped, strict=True):
            out = operation(nodes[node])
            branches.append(drop_path(out, dropping, self.shard) if dropped and dropping is not None else out)
            if len(branches) == 2:
                nodes.append(branches[0] + branches[1])
                branches = []
        parts = [nodes[node] for node in self.unused]
        for position, node in enumerate(self.unused):
            if str(node) in self.reductions:
                parts[position] = self.reductions[str(node)](parts[position])
        return torch.cat(parts, 1)


class MicroNetwork(nn.Module):
    """The network of a fixed architecture: stem, L + 2 cells, classifier; an auxiliary head in training.

    `drop_path_probability` may be set between steps: that of the last cell, earlier ones drop in proportion to depth.
    """

    memory_format = torch.channels_last
    checkpoint_cells = False

    def __init__(
        self,
        cells: MicroCells,
        *,
        in_channels: int,
        num_classes: int,
        out_filters: int,
        layers: int,
        image_size: int,
        types: Sequence[LayerType],
        auxiliary: bool,
        dropout: float,
        compat: bool,
    ) -> None:
        super().__init__()
        self.architecture = cells
        self.in_channels, self.layer_count, self.image_size = in_channels, layers, image_size
        self.num_classes, self.dropout, self.drop_path_probability = num_classes, dropout, 0.0
        self.head_type = types[-1]
        stem = types[0].conv(in_channels, 3 * out_filters, 3, quantize_input=False)
        self.stem = nn.Sequential(stem, moving_norm(3 * out_filters))
        plans = plan_layers(layers, out_filters, types)
        self.cells = nn.ModuleList()
        widths, levels = (3 * out_filters, 3 * out_filters), (0, 0)
        for plan in plans:
            halve = levels[0] != levels[1]
            cell = MicroCell(cells.cell(plan.reduction), plan, widths, halve, moving_norm, compat)
            self.cells.append(cell)
            widths, levels = (widths[1], cell.out_channels), (levels[1], plan.level + plan.reduction)
        index = auxiliary_layer(layers)
        self.auxiliary_index = index
        self._head = (self.cells[index].out_channels, image_size >> (plans[index].level + plans[index].reduction))
        self.auxiliary_head = self._make_head() if auxiliary else None
        self.last = self.head_type.activation()
        self.classifier = QuantLinear(widths[1], num_classes, bias=False)

    def _make_head(self) -> AuxiliaryHead:
        channels, size = self._head
        return AuxiliaryHead(self.head_type, moving_norm, channels, size, self.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, in_channels, H, W] -> (logits [B, classes], the auxiliary head's, or None outside training)."""
        x = x.contiguous(memory_format=self.memory_format)
        before_last = last = self.stem(x)
        auxiliary = None
        for index, cell in enumerate(self.cells):
            inputs = (before_last, last, self.dropping(index))
            before_last = last
            # paths may be dropped, and the signs of `stochastic` layers are drawn
            last = recomputed(cell, *inputs, random=True) if self.checkpoint_cells else cell(*inputs)
            if index == self.auxiliary_index and self.auxiliary_head is not None and self.training:
                auxiliary = self.auxiliary_head(last)
        pooled = F.dropout(self.last(last).mean((2, 3)), self.dropout, self.training)
        return self.classifier(pooled), auxiliary

    def dropping(self, index: int) -> float | None:
        """The probability with which cell `index` drops a path now; None where it drops none."""
        if not self.training or not self.drop_path_probability:
            return None
        return self.drop_path_probability * (index + 1) / len(self.cells)

    def weight_parameters(self) -> list[nn.Parameter]:
        """Every parameter."""
        return list(self.parameters())

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """No parameter is spared a weight decay."""
        return []

    def auxiliary_parameters(self) -> int:
        """Parameters of the auxiliary head that fits this network, whether or not it was built with one."""
        with torch.device("meta"):
            head = self._make_head()
        return sum(p.numel() for p in head.parameters())

    def check_input(self, image_size: int) -> None:
        """Raise ValueError where images of this size do not fit the network."""
        check_image_size(image_size, self.layer_count)
        if self.auxiliary_head is not None and image_size != self.image_size:
            raise ValueError(
                f"--image-size: the auxiliary head was built for {self.image_size} pixels, not for {image_size}"
            )


def build_micro_network(
    cells: MicroCells,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    out_filters: int,
    layers: int,
    image_size: int = 32,
    layer_bits: list[str] | None = None,
    auxiliary: bool = False,
    dropout: float = 0.0,
    compat: bool = False,
) -> MicroNetwork:
    """Build the network of an architecture: L = `layers` gives L + 2 cells, F = `out_filters` channels in the first.

    `layer_bits`: types of stem and cells (`resolve_layer_types`); the last cell's is also the auxiliary head's and that
    of the activation before the classifier. `compat` keeps what the source does and did not mean: ternary y branches in
    the first cell, rescaled gradients of k-bit separable convolutions. Raises ValueError for sizes that do not fit.
    """
    for flag, value in (("--layers", layers), ("--out-filters", out_filters), ("classes", num_classes)):
        if value < 1:
            raise ValueError(f"{flag}: {value} must be at least 1")
    check_image_size(image_size, layers)
    network = MicroNetwork(
        cells,
        in_channels=in_channels,
        num_classes=num_classes,
        out_filters=out_filters,
        layers=layers,
        image_size=image_size,
        types=resolve_layer_types(layer_bits, layers + 2),
        auxiliary=auxiliary,
        dropout=dropout,
        compat=compat,
    )
    initialize(network)
    return network.to(memory_format=network.memory_format)
