# SPDX-License-Identifier: Apache-2.0
"""Pictures of cells: operations and bit-widths on the edges, painted by graphviz or, without `dot`, by matplotlib.

Both painters work without a display, from one layout (`cell_layout.py`), and write the same bytes for the same
architecture on the same machine. Colours follow Okabe and Ito (2008), moved a little so that all of them stay apart
for the colour-blind.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.engine.files import write_bytes
from common.nets.architecture import Architecture, BitPolicy, Bits, CellBits, needs_bits
from common.recipes.cell_layout import (
    ARROW,
    CHIPS_HEIGHT,
    LETTER_WIDTH,
    STATE_RADIUS,
    TAG_HEIGHT,
    Box,
    Cell,
    CellEdge,
    Chip,
    Drawing,
    Line,
    Node,
    chip_width,
    chips_width,
    lay_out,
    rounded,
)

FORMATS = ("svg", "png", "pdf")
"""The formats that can be written."""

BIT_COLOURS: dict[int, str] = {
    1: "#882255",
    2: "#0072B2",
    3: "#7FC8F8",
    4: "#00A878",
    8: "#F0B400",
    32: "#D55E00",
}
"""Colour by bit-width."""
MIXED_COLOUR = "#E2E6EC"
"""Ground of a label's bits where cells of one type differ; their line has the colours of both ends of the range."""

_PLAIN, _NO_WEIGHTS = "#64748B", "#9AA5B4"  # operations of a picture without bits; operations without weights
_CONCAT, _INK, _RIM = "#C3CAD4", "#1F2937", "#475569"
_FILL = {"input": "#DDEFE3", "state": "#E3EDF7", "output": "#FBF0D0"}
_SANS, _MONO = "DejaVu Sans,Verdana,Helvetica,sans-serif", "DejaVu Sans Mono,Menlo,Consolas,monospace"
_LEGEND_INTRO = "w weights, a activations, lines by weights:"
_DPI = 160
_CELL_LAYER = re.compile(r"cells\.(\d+)\.(.+)")
_KINDS = (("normal", "normal cell"), ("reduce", "reduction cell"))


def draw_cells(
    architecture: Architecture,
    stem: Path | str,
    *,
    formats: Iterable[str] = ("svg", "png"),
    title: str | None = None,
    painter: str | None = None,
) -> list[Path]:
    """Draw both cells side by side in one picture, and return the files written: `stem` + `.svg`, ...

    `title` defaults to the architecture's name. `painter` is graphviz or
    matplotlib; None takes graphviz where its package and its `dot` program are there. Raises ValueError for an
    unknown format or painter, or when neither painter is installed.
    """
    stem, wanted = Path(stem), list(dict.fromkeys(formats))
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ValueError(f"picture format {', '.join(unknown) or '(none)'}: choose from {', '.join(FORMATS)}")
    drawing = lay_out_architecture(architecture, title=title)
    paint = _paint_matplotlib if _painter(painter) == "matplotlib" else _paint_graphviz
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for form in wanted:
        target = stem.with_name(f"{stem.name}.{form}")
        write_bytes(target, paint(drawing, form))
        written.append(target)
    return written


def lay_out_architecture(architecture: Architecture, *, title: str | None = None) -> Drawing:
    """The drawing of an architecture's cells, before any painter sees it."""
    cells = architecture_cells(architecture)
    name = (architecture.name or "") if title is None else title
    chips = [chip for cell in cells for edge in cell.edges for chip in edge.chips]
    chips += [chip for cell in cells for entry in cell.inputs for chip in entry]
    shown = {bits for chip in chips for bits in chip.bits}
    legend = [(_legend_text(bits), colour) for bits, colour in BIT_COLOURS.items() if bits in shown]
    if any(len(chip.bits) > 1 for chip in chips):
        legend.append(("differs within or between cells", MIXED_COLOUR))
    if legend and any(not edge.chips for cell in cells for edge in cell.edges):
        legend.append(("no weights", _NO_WEIGHTS))
    return lay_out(cells, title=name, legend=legend)


def architecture_cells(architecture: Architecture) -> list[Cell]:
    """The two cells of an architecture as they are drawn: normal first, then reduction."""
    cells = []
    for kind, title in _KINDS:
        pairs = architecture.pairs(kind)
        edges = []
        for index, (operation, source) in enumerate(pairs):
            chips = _edge_chips(architecture.bits, kind, index, operation, source)
            edges.append(CellEdge(source, 2 + index // 2, operation, chips))
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
        return _chips([policy.uniform])
    if policy.layers:
        return _chips(_layers_of(policy.layers, kind, f"operations.{index}"))
    return _chips([bits for cell in _cells_of(policy, kind) if (bits := cell.operations[index]) is not None])


def _input_chips(policy: BitPolicy | None, kind: str) -> tuple[tuple[Chip, ...], tuple[Chip, ...]]:
    """The chips of the cell's two preprocessing convolutions."""
    if policy is None:
        return (), ()
    if policy.uniform is not None:
        return _chips([policy.uniform]), _chips([policy.uniform])
    if policy.layers:
        before_last, last = (_chips(_layers_of(policy.layers, kind, f"preprocess{i}")) for i in range(2))
        return before_last, last
    cells = _cells_of(policy, kind)
    return _chips([cell.preprocess0 for cell in cells]), _chips([cell.preprocess1 for cell in cells])


def _cells_of(policy: BitPolicy, kind: str) -> list[CellBits]:
    return [cell for cell in policy.cells if cell.reduction == (kind == "reduce")]


def _layers_of(layers: Mapping[str, Bits], kind: str, part: str) -> list[Bits]:
    """Bits of the convolutions in one part of all cells of a type; layers are named as the network's modules."""
    found = [(int(m[1]), f"{m[2]}.", bits) for name, bits in layers.items() if (m := _CELL_LAYER.match(name))]
    count = 1 + max((cell for cell, _, _ in found), default=0)
    reductions = (count // 3, 2 * count // 3)  # where the evaluation network has them
    return [b for cell, rest, b in found if (cell in reductions) == (kind == "reduce") and rest.startswith(f"{part}.")]


def _chips(pairs: Sequence[Bits]) -> tuple[Chip, ...]:
    """`w...` and `a...` of one place in all cells of a type; with all their bit-widths."""
    if not pairs:
        return ()
    columns = zip("wa", zip(*pairs, strict=True), strict=True)
    return tuple(Chip(letter + bits_text(bits), tuple(sorted(set(bits)))) for letter, bits in columns)


def _legend_text(bits: int) -> str:
    return "32 bits (float)" if bits == 32 else f"{bits} bit{'s' if bits > 1 else ''}"


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


def _on(colour: str) -> str:
    """Black or white, whichever reads better on this ground (WCAG relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#FFFFFF" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"


def _chip_colour(chip: Chip) -> str:
    return BIT_COLOURS[chip.bits[0]] if len(chip.bits) == 1 else MIXED_COLOUR


def _line_colours(line: Line, drawing: Drawing) -> list[str]:
    """One colour, or those of the fewest and the most bits where cells differ."""
    if line.edge is None:
        return [_CONCAT]
    if not line.edge.bits:
        return [_NO_WEIGHTS if drawing.legend else _PLAIN]
    return list(dict.fromkeys(BIT_COLOURS[bits] for bits in (line.edge.bits[0], line.edge.bits[-1])))


def _spline(line: Line) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Bezier points up to the arrow's base, and the arrow's tip."""
    before, tip = line.points[-2:]
    length = ((tip[0] - before[0]) ** 2 + (tip[1] - before[1]) ** 2) ** 0.5
    share = ARROW / length
    base = (tip[0] + (before[0] - tip[0]) * share, tip[1] + (before[1] - tip[1]) * share)
    return rounded([*line.points[:-1], base]), tip


# Graphviz: every position is ours (neato -n2); `dot` measures the text and paints.


def _paint_graphviz(drawing: Drawing, form: str) -> bytes:
    import graphviz

    graph = graphviz.Digraph("cells", engine="neato")
    graph.attr(bgcolor="white", outputorder="nodesfirst", pad="0.02", splines="true", fontname=_SANS, margin="0")
    graph.attr("node", fontname=_SANS, fontsize="12", fontcolor=_INK, color=_RIM, style="filled", fixedsize="true")
    graph.attr("edge", fontname=_MONO, fontsize="11", fontcolor=_INK)
    if form == "png":
        graph.attr(dpi=str(_DPI))
    _graphviz_ground(graph, drawing)
    for node in drawing.nodes:
        _graphviz_node(graph, node, drawing.height)
    for line in drawing.lines:
        _graphviz_line(graph, line, drawing)
    return graph.pipe(format=form, neato_no_op=2)


def _at(point: tuple[float, float], height: float) -> str:
    """A position in graphviz' coordinates: y up, rounded, pinned."""
    return f"{point[0]:.2f},{height - point[1]:.2f}"


def _size(box: Box) -> dict[str, str]:
    return {"width": f"{box.width / 72:.4f}", "height": f"{box.height / 72:.4f}"}


def _graphviz_ground(graph: Any, drawing: Drawing) -> None:
    """The white canvas (it fixes the size), frames, titles and the legend."""
    height = drawing.height
    canvas = Box(drawing.width / 2, height / 2, drawing.width, height)
    graph.node(
        "canvas",
        "",
        shape="box",
        pos=_at((canvas.x, canvas.y), height),
        color="white",
        fillcolor="white",
        **_size(canvas),
    )
    for index, frame in enumerate(drawing.frames):
        box = frame.box
        graph.node(
            f"frame_{index}",
            "",
            shape="box",
            style="rounded,filled",
            fillcolor="#FCFCFD",
            color="#D5DAE1",
            pos=_at((box.x, box.y), height),
            **_size(box),
        )
        spot = (box.x, box.y - box.height / 2 + 18)
        graph.node(
            f"heading_{index}", frame.title, shape="plaintext", style="", fontsize="13", width="0", height="0",
            fixedsize="false", pos=_at(spot, height),
        )  # fmt: skip
    if drawing.title:
        spot = (drawing.width / 2, 20.0)
        graph.node(
            "title", f"<<b>{html.escape(drawing.title)}</b>>", shape="plaintext", style="", fontsize="15",
            pos=_at(spot, height), width="0", height="0", fixedsize="false",
        )  # fmt: skip
    if drawing.legend:
        cells = "".join(
            f'<td width="16" height="10" fixedsize="true" bgcolor="{colour}"></td>'
            f'<td align="left">{html.escape(text)}&#160;&#160;&#160;</td>'
            for text, colour in drawing.legend
        )
        label = (
            '<<table border="0" cellborder="0" cellspacing="4" cellpadding="0"><tr>'
            f"<td>{_LEGEND_INTRO}&#160;&#160;&#160;</td>{cells}</tr></table>>"
        )
        graph.node(
            "legend", label, shape="plaintext", style="", fontsize="11", width="0", height="0", fixedsize="false",
            pos=_at((drawing.width / 2, drawing.legend_y), height),
        )  # fmt: skip


def _graphviz_chips(chips: Sequence[Chip]) -> str:
    """Chips as the cells of a graphviz table's row."""
    return "".join(
        f'<td bgcolor="{_chip_colour(chip)}" width="{chip_width(chip):.0f}">'
        f'<font color="{_on(_chip_colour(chip))}" face="{_MONO}" point-size="11">{chip.text}</font></td>'
        for chip in chips
    )


def _graphviz_node(graph: Any, node: Node, height: float) -> None:
    shape = "circle" if node.kind == "state" else "box"
    style = "filled" if node.kind == "state" else "rounded,filled"
    label = node.text
    if node.chips:
        label = (
            f'<<table border="0" cellborder="0" cellspacing="3" cellpadding="1"><tr><td colspan="{len(node.chips)}">'
            f"{html.escape(node.text)}</td></tr><tr>{_graphviz_chips(node.chips)}</tr></table>>"
        )
    graph.node(
        node.name, label, shape=shape, style=style, fillcolor=_FILL[node.kind],
        pos=_at((node.box.x, node.box.y), height), **_size(node.box),
    )  # fmt: skip


def _graphviz_line(graph: Any, line: Line, drawing: Drawing) -> None:
    curve, tip = _spline(line)
    height, colours = drawing.height, _line_colours(line, drawing)
    pos = f"e,{_at(tip, height)} " + " ".join(_at(point, height) for point in curve)
    if line.edge is None or line.tag is None:
        graph.edge(line.tail, line.head, pos=pos, color=colours[0], penwidth="1.1", arrowsize="0.7")
        return
    label = (
        f'<<table border="1" cellborder="0" cellspacing="3" cellpadding="1" bgcolor="white" style="rounded" '
        f'color="{colours[0]}" width="{line.tag.width:.0f}" height="{TAG_HEIGHT:.0f}">'
        f"<tr><td>{html.escape(line.edge.operation)}</td>{_graphviz_chips(line.edge.chips)}</tr></table>>"
    )
    graph.edge(
        line.tail, line.head, pos=pos, label=label, lp=_at((line.tag.x, line.tag.y), height), color=":".join(colours),
        penwidth="1.6", arrowsize="0.7", tooltip=line.edge.label, labeltooltip=line.edge.label,
    )  # fmt: skip


# Matplotlib: the same layout, one figure unit a point.


def _paint_matplotlib(drawing: Drawing, form: str) -> bytes:
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # text stays text in SVG, and nothing in the file depends on the clock or on chance
    settings = {"svg.fonttype": "none", "svg.hashsalt": "cells", "font.family": ["DejaVu Sans"], "pdf.fonttype": 42}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
        axes.set_axis_off()
        for frame in drawing.frames:
            _mpl_box(axes, frame.box, "#FCFCFD", "#D5DAE1", 10)
            _mpl_text(axes, frame.box.x, frame.box.y - frame.box.height / 2 + 18, frame.title, 13)
        if drawing.title:
            _mpl_text(axes, drawing.width / 2, 20, drawing.title, 15, weight="bold")
        for line in drawing.lines:
            _mpl_line(axes, line, _line_colours(line, drawing))
        for node in drawing.nodes:
            _mpl_node(axes, node)
            shift = CHIPS_HEIGHT / 2 if node.chips else 0.0
            _mpl_text(axes, node.box.x, node.box.y - shift, node.text, 12)
            _mpl_chips(axes, node.box.x - chips_width(node.chips) / 2, node.box.y + shift * 0.8, node.chips)
        _mpl_legend(axes, drawing)
        buffer = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
        figure.savefig(buffer, format=form, dpi=_DPI if form == "png" else 72, metadata=metadata)
    return buffer.getvalue()


def _mpl_box(axes: Any, box: Box, fill: str, rim: str, radius: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (box.x - box.width / 2, box.y - box.height / 2)
    style = f"round,pad=0,rounding_size={min(radius, box.height / 2)}"
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, facecolor=fill, edgecolor=rim))


def _mpl_node(axes: Any, node: Node) -> None:
    from matplotlib.patches import Circle

    if node.kind == "state":
        axes.add_patch(Circle((node.box.x, node.box.y), STATE_RADIUS, facecolor=_FILL["state"], edgecolor=_RIM))
    else:
        _mpl_box(axes, node.box, _FILL[node.kind], _RIM, 7)


def _mpl_text(axes: Any, x: float, y: float, text: str, size: float, **how: Any) -> None:
    settings = {"ha": "center", "va": "center_baseline", "color": _INK, "parse_math": False, **how}
    axes.text(x, y, text, fontsize=size, **settings)


def _mpl_chips(axes: Any, left: float, y: float, chips: Sequence[Chip]) -> None:
    """Chips in a row, the first one's left rim at `left`."""
    for chip in chips:
        width, colour = chip_width(chip), _chip_colour(chip)
        _mpl_box(axes, Box(left + width / 2, y, width, 15), colour, colour, 1)
        _mpl_text(axes, left + width / 2, y, chip.text, 11, color=_on(colour), family="DejaVu Sans Mono")
        left += width + 3


def _mpl_line(axes: Any, line: Line, colours: Sequence[str]) -> None:
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Curve

    curve, tip = _spline(line)
    codes = [Curve.MOVETO, *[Curve.CURVE4] * (len(curve) - 1)]
    width = 1.6 if line.edge else 1.1
    for index, colour in enumerate(colours):  # two colours: the second as dashes on the first
        style = "-" if index == 0 else (0, (4, 4))
        path = Curve(curve, codes)
        axes.add_patch(
            PathPatch(
                path, fill=False, edgecolor=colour, linewidth=width * (1.4 if colours[1:] else 1), linestyle=style
            )
        )
    dx, dy = (tip[0] - curve[-1][0]) / ARROW, (tip[1] - curve[-1][1]) / ARROW
    wings = [(curve[-1][0] - side * dy * 2.5, curve[-1][1] + side * dx * 2.5) for side in (-1, 1)]
    axes.add_patch(Polygon([tip, *wings], closed=True, facecolor=colours[0], edgecolor="none"))
    if line.edge is None or line.tag is None:
        return
    tag = line.tag
    _mpl_box(axes, tag, "white", colours[0], 6)
    left = tag.x - tag.width / 2 + 5
    _mpl_text(axes, left, tag.y, line.edge.operation, 11, ha="left", family="DejaVu Sans Mono")
    _mpl_chips(axes, left + 4 + LETTER_WIDTH * len(line.edge.operation), tag.y, line.edge.chips)


def _mpl_legend(axes: Any, drawing: Drawing) -> None:
    from matplotlib.textpath import TextPath

    if not drawing.legend:
        return
    widths = [TextPath((0, 0), text, size=11).get_extents().width for text, _ in drawing.legend]
    intro = TextPath((0, 0), _LEGEND_INTRO, size=11).get_extents().width
    x = (drawing.width - intro - sum(width + 38 for width in widths)) / 2
    _mpl_text(axes, x, drawing.legend_y, _LEGEND_INTRO, 11, ha="left")
    x += intro + 16
    for (text, colour), width in zip(drawing.legend, widths, strict=True):
        _mpl_box(axes, Box(x + 8, drawing.legend_y, 16, 10), colour, colour, 1)
        _mpl_text(axes, x + 22, drawing.legend_y, text, 11, ha="left")
        x += width + 38
