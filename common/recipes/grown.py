# SPDX-License-Identifier: Apache-2.0
"""The whole evaluation network as one picture: a row for each cell, with the bits of every operation, top to bottom.

On the left stand the searched cells; lines lead from each to those that took its bits. Painted by matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.files import write_bytes
from common.nets.architecture import Bits
from common.quant import FLOAT_BITS
from common.recipes import cells_matplotlib as painter
from common.recipes.cell_layout import (
    TAG_HEIGHT,
    TITLE_SIZE,
    Box,
    CellEdge,
    Chip,
    Drawing,
    add_legends,
    chips_width,
    legends_width,
    state_text,
    tag_width,
    text_width,
)
from common.recipes.cell_style import CONCAT, FILL, FRAME_RIM, NO_WEIGHTS, PLAIN, RIM, bit_colour
from common.recipes.grown_network import Grown, GrownCell, searched_kinds
from common.recipes.pictures import FORMATS, bits_legend, place_chips, unknown_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN, _GAP, _ROW, _END = 12.0, 16.0, 62.0, 34.0  # points: rim, between columns, height of a row, of both ends
_SEARCHED, _FAN, _BOX = 92.0, 84.0, 176.0  # widths: of a searched cell, of the lines behind it, of a cell
_SOURCE = 46.0  # what the name of the state takes before an operation's label
_HEAD = 84.0  # title, size and column heads
_MAX_CELLS = 400
_REDUCTION = "#E9DDF3"


def draw_grown(grown: Grown, stem: Path, *, formats: Iterable[str], title: str) -> list[Path]:
    """Write `stem` + `.svg`, ...; returns the files. Raises ValueError for an unknown format or too many cells."""
    wanted = list(dict.fromkeys(formats))
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise ValueError(unknown_format(unknown))
    if len(grown.cells) > _MAX_CELLS:
        raise ValueError(f"--layers: {len(grown.cells)} cells make no picture; at most {_MAX_CELLS} are drawn")
    picture = _Picture(grown, title)
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [write_bytes(stem.with_name(f"{stem.name}.{form}"), picture.painted(form)) for form in wanted]


class _Picture:
    """Where everything goes (points, y down), and the painting of it."""

    def __init__(self, grown: Grown, title: str) -> None:
        self.grown, self.title = grown, title
        self.edges = [[_edge(cell, k) for k in range(len(cell.operations))] for cell in grown.cells]
        self.label = max(tag_width(edge) for row in self.edges for edge in row)
        inputs = [place_chips(bits) for cell in grown.cells for _, bits in cell.inputs]
        self.input_width = max([_SOURCE, *(_SOURCE + chips_width(chips) + 6 for chips in inputs)])
        self.searched = searched_kinds(grown.architecture) if grown.cells[0].source is not None else []
        self.nodes = max(len(row) for row in self.edges) // 2
        left = _MARGIN + (_SEARCHED + _FAN if self.searched else 0.0)
        self.cell_x = left + _BOX / 2
        self.input_x = left + _BOX + _GAP
        self.node_x = [
            self.input_x + self.input_width + _GAP + k * (_SOURCE + self.label + _GAP) for k in range(self.nodes)
        ]
        self.drawing = self._canvas()

    def _canvas(self) -> Drawing:
        """The canvas with the legend; wide enough for every text."""
        chips = [chip for row in self.edges for edge in row for chip in edge.chips]
        chips += [chip for cell in self.grown.cells for _, bits in cell.inputs for chip in place_chips(bits)]
        chips += [chip for bits in (self.grown.stem, self.grown.classifier) for chip in _end_chips(bits)]
        drawing = Drawing(title=self.title, legend=bits_legend(chips))
        if drawing.legend and any(not edge.chips for row in self.edges for edge in row):
            drawing.legend.append(("no weights", NO_WEIGHTS))
        right = self.node_x[-1] + _SOURCE + self.label + _MARGIN
        texts = [text_width(self.title, TITLE_SIZE, bold=True), text_width(self._size_text(), 11)]
        drawing.width = max(right, legends_width(drawing), *(width + 2 * _MARGIN for width in texts))
        drawing.height = self._row_y(len(self.grown.cells)) + _END + _MARGIN
        add_legends(drawing)
        return drawing

    def _size_text(self) -> str:
        if not self.grown.pixels_known:
            return self.grown.text
        cells = f"{_amount(sum(cell.bitops for cell in self.grown.cells))} BitOps in its cells"
        whole = "" if self.grown.bitops is None else f", {_amount(self.grown.bitops)} in all"
        return f"{self.grown.text}; {cells}{whole}"

    def _row_y(self, index: int) -> float:
        """The middle of a cell's row; behind the last one the classifier's."""
        first = _HEAD + _END + _ROW / 2
        return first + index * _ROW - (_ROW - _END) / 2 * (index == len(self.grown.cells))

    def _searched_y(self, index: int) -> float:
        """The searched cells, spread evenly beside the others."""
        first, last = self._row_y(0), self._row_y(len(self.grown.cells) - 1)
        return first + (last - first) * (index + 0.5) / len(self.searched)

    def painted(self, form: str) -> bytes:
        """The picture as svg, png or pdf."""
        with painter.page(self.drawing.width, self.drawing.height) as axes:
            painter.put_text(axes, self.drawing.width / 2, 20, self.title, TITLE_SIZE, weight="bold")
            painter.put_text(axes, self.drawing.width / 2, 41, self._size_text(), 11)
            self._put_heads(axes)
            self._put_searched(axes)
            self._put_ends(axes)
            for cell, edges in zip(self.grown.cells, self.edges, strict=True):
                self._put_cell(axes, cell, edges)
            painter.put_legends(axes, self.drawing)
            return painter.saved(axes, form)

    def _put_heads(self, axes: Axes) -> None:
        """What stands in each column."""
        heads = [(self.cell_x, "evaluation network")]
        if self.searched:
            heads.append((_MARGIN + _SEARCHED / 2, "searched"))
        if any(bits for cell in self.grown.cells for _, bits in cell.inputs):
            heads.append((self.input_x + self.input_width / 2, "inputs"))
        heads += [(x + (_SOURCE + self.label) / 2, f"node {k}") for k, x in enumerate(self.node_x)]
        for x, text in heads:
            painter.put_text(axes, x, _HEAD - 16, text, 11, color=RIM)

    def _put_searched(self, axes: Axes) -> None:
        """The searched cells, and the lines to those that took their bits."""
        for index, reduction in enumerate(self.searched):
            y = self._searched_y(index)
            taken = [cell.index for cell in self.grown.cells if cell.source == index]
            colour = RIM if taken else FRAME_RIM
            for to in taken:
                start, end = (_MARGIN + _SEARCHED, y), (self.cell_x - _BOX / 2, self._row_y(to))
                half = (start[0] + end[0]) / 2
                curve = [start, (half, start[1]), (half, end[1]), end]
                painter.put_curve(axes, curve, "#8E5BB5" if reduction else PLAIN, 1.4)
            box = Box(_MARGIN + _SEARCHED / 2, y, _SEARCHED, 30.0)
            painter.put_box(axes, box, _ground(reduction), colour, 6)
            painter.put_text(axes, box.x, y - 6, f"cell {index}", 11)
            painter.put_text(axes, box.x, y + 7, "reduction" if reduction else "normal", 9)

    def _put_ends(self, axes: Axes) -> None:
        """Stem and classifier, and the way through all cells."""
        rows = len(self.grown.cells)
        top, bottom = _HEAD + _END / 2 - 4, self._row_y(rows)
        axes.plot([self.cell_x] * 2, [top, bottom], color=CONCAT, linewidth=2.2, zorder=0.5)
        for y, name, bits in ((top, "stem", self.grown.stem), (bottom, "pool, classifier", self.grown.classifier)):
            painter.put_box(axes, Box(self.cell_x, y, _BOX, 26.0), FILL["output"], RIM, 7)
            painter.put_text(axes, self.cell_x, y, name, 11)
            painter.put_chips(axes, self.input_x + 2, y, _end_chips(bits))

    def _put_cell(self, axes: Axes, cell: GrownCell, edges: Sequence[CellEdge]) -> None:
        y = self._row_y(cell.index)
        painter.put_box(axes, Box(self.cell_x, y, _BOX, _ROW - 12), _ground(cell.reduction), RIM, 7)
        kind = "reduction" if cell.reduction else "normal"
        painter.put_text(axes, self.cell_x, y - 14, f"{cell.index}  {kind}", 11, weight="bold")
        lines = [f"{cell.channels} channels"]
        if self.grown.pixels_known:
            lines[0] += f", {cell.pixels}x{cell.pixels}"
            lines.append(f"{_amount(cell.bitops)} BitOps")
        if cell.kind:
            lines[-1] += f", {cell.kind}"
        for number, text in enumerate(lines):
            painter.put_text(axes, self.cell_x, y + 1 + 14 * number, text, 10)
        for number, (name, bits) in enumerate(cell.inputs):
            place = y - 13 + 26 * number
            if bits:
                painter.put_text(axes, self.input_x, place, name, 9, ha="left", color=RIM)
                painter.put_chips(axes, self.input_x + _SOURCE, place, place_chips(bits))
        for number, edge in enumerate(edges):
            x, place = self.node_x[number // 2], y - 13 + 26 * (number % 2)
            painter.put_text(axes, x + _SOURCE - 6, place, state_text(edge.source), 9, ha="right", color=RIM)
            tag = Box(x + _SOURCE + self.label / 2, place, self.label, TAG_HEIGHT)
            painter.put_label(axes, tag, edge, bit_colour(edge.bits[0]) if edge.bits else NO_WEIGHTS)


def _edge(cell: GrownCell, number: int) -> CellEdge:
    operation, state, bits = cell.operations[number]
    return CellEdge(state, 2 + number // 2, operation, place_chips(bits))


def _end_chips(bits: Sequence[Bits]) -> tuple[Chip, ...]:
    """Those of the stem or the classifier, where it is quantised at all."""
    return place_chips(bits) if any(pair != (FLOAT_BITS, FLOAT_BITS) for pair in bits) else ()


def _ground(reduction: bool) -> str:
    return _REDUCTION if reduction else FILL["state"]


def _amount(bitops: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bitops >= size:
            return f"{bitops / size:.3g} {unit}" if bitops < 1000 * size else f"{bitops / size:.0f} {unit}"
    return f"{bitops:.0f}"
