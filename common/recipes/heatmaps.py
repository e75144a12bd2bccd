# SPDX-License-Identifier: Apache-2.0
"""Heat maps of a search: alphas (edge x operation), gammas (cell x edge x bits) and the bits of every depth, by epoch.

They are made of the rows of history.jsonl and of nothing else, so that a search that is still going can be drawn. A
map is a mosaic of blocks: each block has its rows' names at its left, and epochs, or bit-widths, from left to right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.recipes.cell_layout import state_text
from common.recipes.history import read_history
from common.recipes.paint import FAINT, INK, canvas, pixels, saved
from genotypes import PRIMITIVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy import ndarray

HistoryRow = Mapping[str, Any]

MAP = "viridis"
"""Rises evenly in brightness, for the colour-blind as for a printer."""
_LETTER = 0.068  # inches of width that a letter of a row's name takes
_NAME, _TITLE, _GAP = 0.115, 0.24, 0.10  # inches: height of a row's name, of a block's title, between blocks
# The colours never span less: what has not been decided yet shall look like it.
_LEAST_SPAN = {"probability": 0.05, "bits": 0.5}
_MARKS = 0.12  # inches at a block's right edge for its marks
_ACROSS = 8  # blocks side by side
_NAMED_ROWS = 60  # beyond that, not every row of a block has its name
_KIND_NAMES = {"normal": "normal", "reduce": "reduction"}
_OPERANDS = (("weight", "weights"), ("activation", "activations"))


@dataclass(frozen=True)
class Block:
    """One tile: values [rows, columns] (NaN: empty), top row first."""

    values: ndarray
    title: str
    names: tuple[str, ...] = ()
    """Of the rows; written at the left where there are any."""
    marked: tuple[int, ...] = ()
    """Rows that get a dot at their right end."""
    ends: tuple[str, ...] = ()
    """A word behind each row."""
    columns: tuple[str, str] = ("", "")
    """What stands under the first and the last column."""


@dataclass(frozen=True)
class Section:
    """Tiles that share a scale of colours, in lines of tiles (None: an empty place), under one title."""

    title: str
    scale: str
    lines: tuple[tuple[Block | None, ...], ...]


def heat_maps(folder: Path, form: str = "svg") -> dict[str, bytes]:
    """The maps that a run's history has, by name (`alphas`, `gammas`, `bits`), as files of `form` svg, png or pdf.

    Empty for a history without choices (a training). Raises ValueError as `read_history`, and for choices that are
    none.
    """
    found, rows = {}, read_history(folder).rows
    try:
        maps = _maps(rows)
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        file = folder / "history.jsonl"
        raise ValueError(f"{file}: its choices cannot be read ({error}); the file is damaged") from None
    for name, sections in maps.items():
        with _painted(sections) as figure:
            found[name] = saved(figure, form)
    return found


def choice_images(row: HistoryRow) -> dict[str, ndarray]:
    """One epoch's alphas (edge x operation) and gammas (cell x edge x bits) as RGB, uint8 [height, width, 3]."""
    images = {}
    for name, sections in (("alphas", _alphas_now(row)), ("gammas", _gammas_now(row))):
        if sections:
            with _painted(sections) as figure:
                images[name] = pixels(figure)
    return images


def _maps(rows: Sequence[HistoryRow]) -> dict[str, list[Section]]:
    makers: dict[str, Callable[[Sequence[HistoryRow]], list[Section]]] = {
        "alphas": _alphas,
        "gammas": lambda rows: _gammas(rows) + _gammas_now(rows[-1]),
        "bits": _bits,
    }
    made = {name: make(rows) for name, make in makers.items()}
    return {name: sections for name, sections in made.items() if sections}


# ------------------------------------------------------------------------------------------------------ alphas


def _nodes(edges: int) -> int:
    """Nodes of a cell with so many edges: 2 + 3 + ... of them."""
    nodes = 1
    while nodes * (nodes + 3) // 2 < edges:
        nodes += 1
    return nodes


def _edges(count: int) -> list[tuple[int, int]]:
    """(source, target) states of a cell's edges, in the order of the tables."""
    return [(source, node + 2) for node in range(_nodes(count)) for source in range(node + 2)]


def _arrow(source: int, target: int) -> str:
    return f"{state_text(source)} → {state_text(target)}"


def _operations(row: HistoryRow, width: int) -> tuple[str, ...]:
    """Names of the columns of the alphas; a history that does not say them has the usual ones."""
    names = row.get("primitives")
    if isinstance(names, list) and len(names) == width:
        return tuple(map(str, names))
    return tuple(PRIMITIVES) if width == len(PRIMITIVES) else tuple(f"operation {k}" for k in range(width))


def _chosen(row: HistoryRow, kind: str) -> dict[tuple[int, int], str]:
    """(source, target) -> operation that the epoch's cell would keep."""
    genotype = row.get("genotype") or {}
    return {(source, 2 + index // 2): name for index, (name, source) in enumerate(genotype.get(kind, ()))}


def _tables(rows: Sequence[HistoryRow], key: str, kind: str) -> ndarray | None:
    """A kind's tables of all epochs, [epochs, ...]; None where the last epoch has none. A gap is NaN."""
    import numpy as np

    newest = (rows[-1].get(key) or {}).get(kind)
    if newest is None:
        return None
    like = np.asarray(newest, dtype=float)
    tables = [np.asarray((row.get(key) or {}).get(kind, np.nan), dtype=float) for row in rows]
    return np.stack([table if table.shape == like.shape else np.full_like(like, np.nan) for table in tables])


def _alphas(rows: Sequence[HistoryRow]) -> list[Section]:
    """A block an edge, placed by its target (down) and its source (across)."""
    sections = []
    for kind, title in _KIND_NAMES.items():
        found = _tables(rows, "alphas", kind)
        if found is None or found.ndim != 3:
            continue
        names, chosen = _operations(rows[-1], found.shape[2]), _chosen(rows[-1], kind)
        edges = _edges(found.shape[1])
        grid: list[list[Block | None]] = [[None] * (_nodes(len(edges)) + 1) for _ in range(_nodes(len(edges)))]
        for index, edge in enumerate(edges):
            marked = tuple(k for k, name in enumerate(names) if chosen.get(edge) == name)
            labels, ends = (names if edge[0] == 0 else ()), _epochs(rows)
            grid[edge[1] - 2][edge[0]] = Block(found[:, index].T, _arrow(*edge), labels, marked, columns=ends)
        head = f"alphas of the {title} cell by epoch, an edge a block; dots: what its cell keeps"
        sections.append(Section(head, "probability", tuple(map(tuple, grid))))
    return sections


def _alphas_now(row: HistoryRow) -> list[Section]:
    """Both cells' tables, edge x operation."""
    blocks = []
    for kind, title in _KIND_NAMES.items():
        found = _tables([row], "alphas", kind)
        if found is not None and found.ndim == 3:
            names, edges = _operations(row, found.shape[2]), _edges(found.shape[1])
            labels = names if not blocks else ()
            blocks.append(Block(found[0].T, f"{title} cell: edges {_arrow(*edges[0])} to {_arrow(*edges[-1])}", labels))
    title = f"alphas, operation by edge, epoch {row['epoch'] + 1}"
    return [Section(title, "probability", (tuple(blocks),))] if blocks else []


def _epochs(rows: Sequence[HistoryRow]) -> tuple[str, str]:
    first, last = rows[0]["epoch"] + 1, rows[-1]["epoch"] + 1
    return f"epoch {first}", "" if first == last else str(last)


# ------------------------------------------------------------------------------------------------------ gammas


def _choices(row: HistoryRow, width: int) -> tuple[int, ...]:
    """The bit-widths of a gamma's columns; a history that does not say them shows what it can: their chosen values."""
    bits = row.get("bit_choices")
    if isinstance(bits, list) and len(bits) == width:
        return tuple(bits)
    chosen = sorted({pair[k] for pair in _pairs(row) for k in range(2)})
    return tuple(chosen) if len(chosen) == width else ()


def _cell_types(row: HistoryRow) -> list[str]:
    """normal or reduce, cell by cell."""
    cells = (row.get("bits") or {}).get("cells") or []
    return ["reduce" if cell.get("type") == "reduction" else "normal" for cell in cells]


def _places(rows: Sequence[HistoryRow], operand: str) -> list[tuple[str, tuple[str, ...], ndarray]]:
    """(title, names of its rows, probabilities [epochs, rows, bits]) of each cell, or of each kind of cell."""
    import numpy as np

    key = "gammas_by_place" if rows[-1].get("gammas_by_place") else "gammas"
    tables = {name: _tables(rows, key, name) for name in rows[-1].get(key) or {}}
    found = []
    if key == "gammas":  # an older history: the mean over all cells
        for kind in ("normal", "reduce"):
            own = {n: t for n, t in tables.items() if n.startswith(f"{kind}_{operand}") and t is not None}
            if own:
                names = tuple("edges" if n.endswith(operand) else n.rpartition("_")[2] for n in own)
                found.append((f"{_KIND_NAMES[kind]} cells, their mean", names, np.stack(list(own.values()), 1)))
        return found
    seen = {"normal": 0, "reduce": 0}
    for depth, kind in enumerate(_cell_types(rows[-1])):
        edges = tables.get(f"{kind}_{operand}")
        ends = [tables.get(f"{kind}_{operand}_preprocess{which}") for which in (0, 1)]
        if edges is None or edges.ndim != 4:
            continue
        rank, names = seen[kind], tuple(_arrow(*edge) for edge in _edges(edges.shape[2]))
        seen[kind] += 1
        inputs = [end[:, rank, None] for end in ends if end is not None]
        labels = (state_text(0), state_text(1))[: len(inputs)] + names
        found.append((f"cell {depth}, {_KIND_NAMES[kind]}", labels, np.concatenate([*inputs, edges[:, rank]], 1)))
    return found or _flat_places(rows[-1], tables, operand)


def _flat_places(
    row: HistoryRow, tables: Mapping[str, ndarray | None], operand: str
) -> list[tuple[str, tuple[str, ...], ndarray]]:
    """Of a search that has a row a convolution: [epochs, convolutions, bits] by kind of cell."""
    from common.nets.darts_space import is_reduction  # brings torch, for which no --help waits

    layers = list((row.get("bits") or {}).get("layers") or {})
    found = []
    for kind in ("normal", "reduce"):
        table = tables.get(f"{kind}_{operand}")
        if table is None or table.ndim != 3:
            continue
        count = 1 + max((_cell_of(name) for name in layers), default=0)
        own = [name for name in layers if is_reduction(_cell_of(name), count) == (kind == "reduce")]
        names = tuple(own) if len(own) == table.shape[1] else tuple(f"layer {k}" for k in range(table.shape[1]))
        found.append((f"{_KIND_NAMES[kind]} cells", tuple(name.removeprefix("cells.") for name in names), table))
    return found


def _cell_of(layer: str) -> int:
    """The cell of a layer's name, `cells.3.operations.0.pointwise` -> 3; -1 outside the cells."""
    match = re.match(r"cells\.(\d+)\.", layer)
    return int(match[1]) if match else -1


def _gammas(rows: Sequence[HistoryRow]) -> list[Section]:
    """The probability of each bit-width in each place by epoch; of two bit-widths that of the larger says it all."""
    sections = []
    for operand, title in _OPERANDS:
        places = _places(rows, operand)
        widths = {table.shape[-1] for _, _, table in places}
        choices = _choices(rows[-1], widths.pop()) if len(widths) == 1 else ()
        for column, bits in list(enumerate(choices))[1 if len(choices) == 2 else 0 :]:
            blocks = [Block(t[..., column].T, name, labels, columns=_epochs(rows)) for name, labels, t in places]
            head = f"gammas of {title} by epoch: {bits} bits (mean of an edge's operations)"
            sections.append(Section(head, "probability", _wrapped(blocks)))
    return sections


def _gammas_now(row: HistoryRow) -> list[Section]:
    """The probability of each bit-width in each place."""
    sections = []
    for operand, title in _OPERANDS:
        blocks = []
        for name, labels, table in _places([row], operand):
            choices = _choices(row, table.shape[-1])
            columns = (str(choices[0]), f"{choices[-1]} bits") if choices else ("", "")
            blocks.append(Block(table[0], name, labels, columns=columns))
        if blocks:
            head = f"gammas of {title}, epoch {row['epoch'] + 1}: each bit-width"
            sections.append(Section(head, "probability", _wrapped(blocks)))
    return sections


def _wrapped(blocks: Sequence[Block]) -> tuple[tuple[Block | None, ...], ...]:
    """Blocks in lines; within a line only the first shows its names where all have the same."""
    from dataclasses import replace

    lines = []
    for start in range(0, len(blocks), _ACROSS):
        line = list(blocks[start : start + _ACROSS])
        same = all(block.names == line[0].names for block in line)
        lines.append(tuple(replace(b, names=()) if same and b is not line[0] else b for b in line))
    return tuple(lines)


# ------------------------------------------------------------------------------------------------------ chosen bits


def _pairs(row: HistoryRow) -> Iterable[tuple[int, int]]:
    """(weight, activation) bits of every quantised place that the epoch's choice has."""
    return [pair for pairs in _pairs_by_cell(row).values() for pair in pairs]


def _pairs_by_cell(row: HistoryRow) -> dict[int, list[tuple[int, int]]]:
    """The chosen bits of each cell of the network that searches; empty for a uniform choice and for none."""
    bits = row.get("bits") or {}
    found: dict[int, list[tuple[int, int]]] = {}
    for depth, cell in enumerate(bits.get("cells") or ()):
        pairs = [cell.get("preprocess0"), cell.get("preprocess1"), *cell.get("operations", ())]
        found[depth] = [(pair[0], pair[1]) for pair in pairs if pair]
    for name, pair in (bits.get("layers") or {}).items():
        found.setdefault(_cell_of(name), []).append((pair[0], pair[1]))
    return {depth: found[depth] for depth in sorted(found) if found[depth]}


def _bits(rows: Sequence[HistoryRow]) -> list[Section]:
    """The mean of the chosen bits in each cell by epoch, from the images down to the classifier."""
    import numpy as np

    cells = [_pairs_by_cell(row) for row in rows]
    depths = list(cells[-1])
    if not depths:
        return []
    blocks = []
    for place, (_, title) in enumerate(_OPERANDS):
        values = np.full((len(depths), len(rows)), np.nan)
        for column, found in enumerate(cells):
            for line, depth in enumerate(depths):
                if depth in found:
                    values[line, column] = np.mean([pair[place] for pair in found[depth]])
        names = tuple(f"cell {depth}" if depth >= 0 else "outside cells" for depth in depths)
        ends = tuple(f"{value:.2f}" for value in values[:, -1])
        blocks.append(Block(values, title, names if not blocks else (), ends=ends, columns=_epochs(rows)))
    return [Section("bits chosen at each depth, mean of its convolutions", "bits", (tuple(blocks),))]


# ------------------------------------------------------------------------------------------------------ painting


def _painted(sections: Sequence[Section]) -> Any:
    """A figure with the sections one below the other, as a context (see `canvas`)."""
    from contextlib import contextmanager

    sizes = [_section_size(section) for section in sections]
    width, height = max(size[0] for size in sizes), sum(size[1] for size in sizes)

    @contextmanager
    def painted() -> Any:
        with canvas(width, height) as figure:
            figure.set_layout_engine("none")
            # one pair of axes for all blocks, in inches: a pair for each would take most of the time
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            top = height
            for section, size in zip(sections, sizes, strict=True):
                _paint_section(axes, section, (width, height), top)
                top -= size[1]
            axes.set(xlim=(0, width), ylim=(0, height), aspect="auto")
            yield figure

    return painted()


def _block_size(block: Block) -> tuple[float, float]:
    """Inches of the coloured field: as high as its names, as wide as its columns want and a title allows."""
    rows, columns = block.values.shape
    wide = max(0.62, min(1.5, 0.05 * columns), 0.062 * len(block.title))
    return wide, _NAME * min(rows, _NAMED_ROWS)


def _left(block: Block) -> float:
    """Inches for a block's names."""
    return _LETTER * max(map(len, block.names)) + 0.06 if block.names else 0.0


def _right(block: Block) -> float:
    ends = _LETTER * max(map(len, block.ends)) + 0.06 if block.ends else 0.0
    return _GAP + max(ends, _MARKS if block.marked else 0.0)


def _columns_of(section: Section) -> list[tuple[float, float, float]]:
    """(left margin, width, right margin) of every column of tiles, in inches."""
    count = max(map(len, section.lines))
    columns = []
    for place in range(count):
        blocks = [line[place] for line in section.lines if place < len(line) and line[place] is not None]
        sizes = [(_left(block), _block_size(block)[0], _right(block)) for block in blocks if block is not None]
        columns.append(tuple(max(parts) for parts in zip(*sizes, strict=True)) if sizes else (0.0, 0.62, _GAP))
    return columns  # type: ignore[return-value]


def _line_height(line: Sequence[Block | None]) -> float:
    """Inches of a line of tiles, with titles above and column names below."""
    high = max(_block_size(block)[1] for block in line if block is not None)
    return _TITLE + high + 0.2


_HEAD, _BAR, _EDGE = 0.34, 0.75, 0.12  # inches: a section's title, its scale at the right, the figure's margin


def _section_size(section: Section) -> tuple[float, float]:
    width = 2 * _EDGE + sum(map(sum, _columns_of(section))) + _BAR
    return max(width, 0.075 * len(section.title) + 2 * _EDGE), _HEAD + sum(map(_line_height, section.lines)) + _EDGE


def _paint_section(axes: Axes, section: Section, size: tuple[float, float], top: float) -> None:
    """One section whose upper edge lies `top` inches above the figure's lower one; `size`: of the figure."""
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    blocks = [block for line in section.lines for block in line if block is not None]
    seen = np.concatenate([block.values[np.isfinite(block.values)] for block in blocks])
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    widen = max(0.0, _LEAST_SPAN[section.scale] - (high - low)) / 2
    norm = Normalize(low - widen, high + widen)
    axes.text(_EDGE, top - 0.2, section.title, fontsize=9.5, color=INK)
    y = top - _HEAD
    columns = _columns_of(section)
    for line in section.lines:
        x = _EDGE
        for block, (left, wide, right) in zip(line, columns, strict=False):
            if block is not None:
                high = _block_size(block)[1]
                _paint_block(axes, block, norm, (x + left, y - _TITLE - high, wide, high))
            x += left + wide + right
        y -= _line_height(line)
    width, height = size
    tall = min(2.0, top - _HEAD - y - _TITLE)
    spot = _EDGE + sum(map(sum, columns)) + 0.1
    place = (spot / width, (top - _HEAD - _TITLE - tall + 0.1) / height, 0.1 / width, tall / height)
    bar = axes.figure.colorbar(ScalarMappable(norm, MAP), cax=axes.figure.add_axes(place))
    bar.ax.tick_params(labelsize=7, color=FAINT, labelcolor=INK)
    bar.ax.set_title(section.scale, fontsize=7.5, color=INK, loc="left", pad=5)
    bar.outline.set_visible(False)


def _paint_block(axes: Axes, block: Block, norm: Any, box: tuple[float, float, float, float]) -> None:
    """One tile in its box: left, bottom, width and height in inches."""
    left, bottom, wide, high = box
    rows = len(block.values)
    extent = (left, left + wide, bottom, bottom + high)
    axes.imshow(block.values, extent=extent, aspect="auto", interpolation="none", cmap=MAP, norm=norm)
    axes.text(left, bottom + high + 0.05, block.title, fontsize=7.5, color=INK)
    for place, text, side in ((left, block.columns[0], "left"), (left + wide, block.columns[1], "right")):
        if text:
            axes.text(place, bottom - 0.03, text, fontsize=6.5, color=INK, ha=side, va="top")

    def beside(row: int, text: str, x: float, side: str) -> None:
        axes.text(
            x, bottom + high * (1 - (row + 0.5) / rows), text, fontsize=7, color=INK, ha=side, va="center_baseline"
        )

    for row in range(0, len(block.names), -(-rows // _NAMED_ROWS)):
        beside(row, block.names[row], left - 0.04, "right")
    for row in block.marked:
        beside(row, "●", left + wide + 0.03, "left")
    for row, text in enumerate(block.ends):
        beside(row, text, left + wide + 0.05, "left")
