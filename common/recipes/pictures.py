# SPDX-License-Identifier: Apache-2.0
"""Pictures of cells: operations and bit-widths on the edges, painted by graphviz or, without `dot`, by matplotlib.

Both painters work without a display, from one layout (`cell_layout.py`) and one style (`cell_style.py`), and write the
same bytes for the same architecture on the same machine.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.files import write_bytes
from common.nets.architecture import Architecture, BitPolicy, Bits, CellBits, needs_bits
from common.nets.darts_space import is_reduction
from common.recipes import cells_graphviz, cells_matplotlib
from common.recipes.cell_layout import Cell, CellEdge, Chip, Drawing, Plan, lay_out
from common.recipes.cell_style import BIT_COLOURS, MIXED_COLOUR, NO_WEIGHTS, OTHER_COLOUR, legend_text, margin_width

if TYPE_CHECKING:
    import numpy

FORMATS = ("svg", "png", "pdf")
"""The formats that can be written."""

_LEADS = (0.0, 0.01, 0.1, 0.5, 1.0)  # of the legend of line widths
_CELL_LAYER = re.compile(r"cells\.(\d+)\.(.+)")
_KINDS = (("normal", "normal cell"), ("reduce", "reduction cell"))


Margins = Mapping[str, Sequence[float]]
"""How far each choice leads in its edge's softmax, 0 to 1: kind of cell -> one number beside each of its pairs."""


def draw_cells(
    architecture: Architecture,
    stem: Path | str,
    *,
    formats: Iterable[str] = ("svg", "png"),
    title: str | None = None,
    margins: Margins | None = None,
    painter: str | None = None,
) -> list[Path]:
    """Draw both cells side by side in one picture, and return the files written: `stem` + `.svg`, ...

    `title` defaults to the architecture's name; with `margins` the lines' widths say how sure the choices are.
    `painter` is graphviz or matplotlib; None takes graphviz where its package and its `dot` program are there. Raises
    ValueError for an unknown format or painter, or when neither painter is installed.
    """
    stem, wanted = Path(stem), list(dict.fromkeys(formats))
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ValueError(unknown_format(unknown))
    drawing = lay_out_architecture(architecture, title=title, margins=margins)
    paint = cells_matplotlib.paint if _painter(painter) == "matplotlib" else cells_graphviz.paint
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for form in wanted:
        target = stem.with_name(f"{stem.name}.{form}")
        written.append(write_bytes(target, paint(drawing, form)))
    return written


def cells_svg(architecture: Architecture, *, title: str | None = None, margins: Margins | None = None) -> str:
    """Both cells as the text of an SVG, for a page. Raises ValueError when no painter is installed."""
    paint = cells_matplotlib.paint if _painter(None) == "matplotlib" else cells_graphviz.paint
    return paint(lay_out_architecture(architecture, title=title, margins=margins), "svg").decode()


def cells_rgb(
    architecture: Architecture, *, title: str | None = None, margins: Margins | None = None, dpi: float = 100
) -> numpy.ndarray:
    """Both cells as pixels, uint8 [H, W, 3], by matplotlib."""
    drawing = lay_out_architecture(architecture, title=title, margins=margins)
    with cells_matplotlib.page(drawing.width, drawing.height) as axes:
        cells_matplotlib.put_drawing(axes, drawing)
        return cells_matplotlib.pixels(axes, dpi)


def lay_out_architecture(
    architecture: Architecture, *, title: str | None = None, margins: Margins | None = None
) -> Drawing:
    """The drawing of an architecture's cells, before any painter sees it."""
    name = (architecture.name or "") if title is None else title
    return lay_out_cells(architecture_cells(architecture, margins), title=name)


def lay_out_cells(
    cells: Sequence[Cell], *, title: str, among: Sequence[Cell] | None = None, plan: Plan | None = None
) -> Drawing:
    """The drawing of cells, with the legends that they need; `among`: those of all pictures that share the legends."""
    every = cells if among is None else among
    chips = [chip for cell in every for edge in cell.edges for chip in edge.chips]
    chips += [chip for cell in every for entry in cell.inputs for chip in entry]
    legend = bits_legend(chips)
    if legend and any(not edge.chips for cell in every for edge in cell.edges):
        legend.append(("no weights", NO_WEIGHTS))
    known = any(edge.margin is not None for cell in every for edge in cell.edges)
    widths = [(f"{lead:g}", margin_width(lead)) for lead in _LEADS] if known else ()
    return lay_out(cells, title=title, legend=legend, widths=widths, plan=plan)


def unknown_format(unknown: Sequence[str]) -> str:
    """What is wrong with formats that no still picture has, and the cure."""
    film = "; a film is drawn by --animate" if {"gif", "mp4"} & set(unknown) else ""
    return f"--format {' '.join(unknown) or '(none)'}: is no picture's; choose from {', '.join(FORMATS)}{film}"


def bits_legend(chips: Iterable[Chip]) -> list[tuple[str, str]]:
    """(text, colour) of every bit-width among the chips."""
    chips = list(chips)
    shown = {bits for chip in chips for bits in chip.bits}
    legend = [(legend_text(bits), colour) for bits, colour in BIT_COLOURS.items() if bits in shown]
    # several bit-widths on one chip have the colour of "differs"; a line shows the ends of the weights'
    ends = {end for chip in chips if len(chip.bits) == 1 or chip.text.startswith("w") for end in _ends(chip)}
    if ends - BIT_COLOURS.keys():
        legend.append(("other bits", OTHER_COLOUR))
    if any(len(chip.bits) > 1 for chip in chips):
        legend.append(("differs within or between cells", MIXED_COLOUR))
    return legend


def _ends(chip: Chip) -> tuple[int, int]:
    return min(chip.bits), max(chip.bits)


def architecture_cells(architecture: Architecture, margins: Margins | None = None) -> list[Cell]:
    """The two cells of an architecture as they are drawn: normal first, then reduction."""
    cells = []
    for kind, title in _KINDS:
        pairs = architecture.pairs(kind)
        edges = []
        for index, (operation, source) in enumerate(pairs):
            chips = _edge_chips(architecture.bits, kind, index, operation, source)
            lead = margins[kind][index] if margins else None
            edges.append(CellEdge(source, 2 + index // 2, operation, chips, lead))
        concat = architecture.concat(kind)
        inputs = _input_chips(architecture.bits, kind)
        cells.append(Cell(kind, title, len(pairs) // 2, tuple(edges), concat, inputs))
    return cells


def bits_text(bits: Sequence[int]) -> str:
    """Bit-widths of one place, its convolutions in all cells of a type: `2`, or the range `2-4` where they differ."""
    low, high = min(bits), max(bits)
    return str(low) if low == high else f"{low}-{high}"


def _edge_chips(policy: BitPolicy | None, kind: str, index: int, operation: str, source: int) -> tuple[Chip, ...]:
    """The chips of one operation, empty where nothing of it is quantised."""
    if policy is None or not needs_bits(operation, 2 if kind == "reduce" and source < 2 else 1):
        return ()
    if policy.uniform is not None:
        return place_chips([policy.uniform])
    if policy.layers:
        return place_chips(_layers_of(policy.layers, kind, f"operations.{index}"))
    return place_chips([bits for cell in _cells_of(policy, kind) if (bits := cell.operations[index]) is not None])


def _input_chips(policy: BitPolicy | None, kind: str) -> tuple[tuple[Chip, ...], tuple[Chip, ...]]:
    """The chips of the cell's two preprocessing convolutions."""
    if policy is None:
        return (), ()
    if policy.uniform is not None:
        return place_chips([policy.uniform]), place_chips([policy.uniform])
    if policy.layers:
        before_last, last = (place_chips(_layers_of(policy.layers, kind, f"preprocess{i}")) for i in range(2))
        return before_last, last
    cells = _cells_of(policy, kind)
    return place_chips([cell.preprocess0 for cell in cells]), place_chips([cell.preprocess1 for cell in cells])


def _cells_of(policy: BitPolicy, kind: str) -> list[CellBits]:
    return [cell for cell in policy.cells if cell.reduction == (kind == "reduce")]


def _layers_of(layers: Mapping[str, Bits], kind: str, part: str) -> list[Bits]:
    """Bits of the convolutions in one part of all cells of a type; layers are named as the network's modules."""
    found = [(int(m[1]), f"{m[2]}.", bits) for name, bits in layers.items() if (m := _CELL_LAYER.match(name))]
    count = 1 + max((cell for cell, _, _ in found), default=0)
    wanted = [(rest, b) for cell, rest, b in found if is_reduction(cell, count) == (kind == "reduce")]
    return [b for rest, b in wanted if rest.startswith(f"{part}.")]


def place_chips(pairs: Sequence[Bits]) -> tuple[Chip, ...]:
    """`w...` and `a...` of the convolutions of one place, with all their bit-widths; empty without any."""
    if not pairs:
        return ()
    columns = zip("wa", zip(*pairs, strict=True), strict=True)
    return tuple(Chip(letter + bits_text(bits), tuple(sorted(set(bits)))) for letter, bits in columns)


def _painter(wanted: str | None) -> str:
    """Which painter draws; ValueError with the cure when it is not installed."""
    if wanted not in (None, "graphviz", "matplotlib"):
        raise ValueError(f"painter {wanted}: choose graphviz or matplotlib")
    found = {"graphviz": shutil.which("dot") is not None and _importable("graphviz"), "matplotlib": True}
    found["matplotlib"] = _importable("matplotlib")
    for name in ("graphviz", "matplotlib") if wanted is None else (wanted,):
        if found[name]:
            return name
    raise ValueError(
        f"cannot draw: {wanted or 'neither graphviz nor matplotlib'} is not installed; `pip install graphviz` with "
        "the system's graphviz package (its `dot` program), or `pip install matplotlib`"
    )


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
