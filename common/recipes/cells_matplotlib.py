# SPDX-License-Identifier: Apache-2.0
"""Cells painted by matplotlib, without a display: one figure unit a point, y down."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from common.recipes.cell_layout import (
    ARROW,
    CHIPS_HEIGHT,
    HEADING_SIZE,
    LEGEND_INTRO,
    LEGEND_SIZE,
    LETTER_WIDTH,
    STATE_RADIUS,
    SWATCH,
    TITLE_SIZE,
    WIDTHS_INTRO,
    Box,
    CellEdge,
    Chip,
    Drawing,
    Line,
    Node,
    chip_width,
    chips_width,
    legend_places,
)
from common.recipes.cell_style import (
    DPI,
    FILL,
    FRAME,
    FRAME_RIM,
    INK,
    PLAIN,
    RIM,
    chip_colour,
    line_colours,
    line_width,
    on,
    spline,
)

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes

MONO_FONT = "DejaVu Sans Mono"


@contextmanager
def page(width: float, height: float) -> Iterator[Axes]:
    """Axes of so many points, the origin at the upper left; to be painted on and saved within the context."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # text stays text in SVG, and nothing in the file depends on the clock or on chance
    settings = {"svg.fonttype": "none", "svg.hashsalt": "cells", "font.family": ["DejaVu Sans"], "pdf.fonttype": 42}
    settings |= {"text.hinting": "no_hinting"}  # hinted letters are wider at few dots an inch, and labels would not fit
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        yield axes


def saved(axes: Axes, form: str) -> bytes:
    """The page as svg, png or pdf."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
    axes.figure.savefig(buffer, format=form, dpi=DPI if form == "png" else 72, metadata=metadata)
    return buffer.getvalue()


def pixels(axes: Axes, dpi: float) -> numpy.ndarray:
    """The page as RGB, uint8 [H, W, 3]."""
    import numpy

    axes.figure.set_dpi(dpi)
    axes.figure.canvas.draw()
    return numpy.asarray(axes.figure.canvas.buffer_rgba())[..., :3].copy()


def paint(drawing: Drawing, form: str) -> bytes:
    """The drawing as svg, png or pdf."""
    with page(drawing.width, drawing.height) as axes:
        put_drawing(axes, drawing)
        return saved(axes, form)


def put_drawing(axes: Axes, drawing: Drawing) -> None:
    """Everything of a drawing, where its layout says."""
    for frame in drawing.frames:
        put_box(axes, frame.box, FRAME, FRAME_RIM, 10)
        put_text(axes, frame.box.x, frame.box.y - frame.box.height / 2 + 18, frame.title, HEADING_SIZE)
    if drawing.title:
        put_text(axes, drawing.width / 2, 20, drawing.title, TITLE_SIZE, weight="bold")
    for line in drawing.lines:
        _put_line(axes, line, line_colours(line, drawing))
    for node in drawing.nodes:
        _put_node(axes, node)
        shift = CHIPS_HEIGHT / 2 if node.chips else 0.0
        put_text(axes, node.box.x, node.box.y - shift, node.text, 12)
        put_chips(axes, node.box.x - chips_width(node.chips) / 2, node.box.y + shift * 0.8, node.chips)
    put_legends(axes, drawing)


def put_box(axes: Axes, box: Box, fill: str, rim: str, radius: float) -> None:
    """A box with rounded corners of that radius."""
    from matplotlib.patches import FancyBboxPatch

    corner = (box.x - box.width / 2, box.y - box.height / 2)
    style = f"round,pad=0,rounding_size={min(radius, box.height / 2)}"
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, facecolor=fill, edgecolor=rim))


def _put_node(axes: Axes, node: Node) -> None:
    from matplotlib.patches import Circle

    if node.kind == "state":
        axes.add_patch(Circle((node.box.x, node.box.y), STATE_RADIUS, facecolor=FILL["state"], edgecolor=RIM))
    else:
        put_box(axes, node.box, FILL[node.kind], RIM, 7)


def put_text(axes: Axes, x: float, y: float, text: str, size: float, **how: Any) -> None:
    """A text around (x, y), as it stands: no mathematics in it. `how`: matplotlib's own properties."""
    settings = {"ha": "center", "va": "center_baseline", "color": INK, "parse_math": False, **how}
    axes.text(x, y, text, fontsize=size, **settings)


def put_chips(axes: Axes, left: float, y: float, chips: Sequence[Chip]) -> None:
    """Chips in a row, the first one's left rim at `left`."""
    for chip in chips:
        width, colour = chip_width(chip), chip_colour(chip)
        put_box(axes, Box(left + width / 2, y, width, 15), colour, colour, 1)
        put_text(axes, left + width / 2, y, chip.text, 11, color=on(colour), family=MONO_FONT)
        left += width + 3


def _put_line(axes: Axes, line: Line, colours: Sequence[str]) -> None:
    from matplotlib.patches import Polygon

    curve, tip = spline(line)
    width = line_width(line)
    put_curve(axes, curve, colours[0], width)
    for colour in colours[1:]:  # two colours: the second as dashes on the first
        put_curve(axes, curve, colour, width, style=(0, (4, 4)))
    dx, dy = (tip[0] - curve[-1][0]) / ARROW, (tip[1] - curve[-1][1]) / ARROW
    half = max(2.5, 0.5 * width + 1.7)
    wings = [(curve[-1][0] - side * dy * half, curve[-1][1] + side * dx * half) for side in (-1, 1)]
    axes.add_patch(Polygon([tip, *wings], closed=True, facecolor=colours[0], edgecolor="none"))
    if line.edge is not None and line.tag is not None:
        put_label(axes, line.tag, line.edge, colours[0])


def put_curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str, width: float, style: Any = "-") -> None:
    """Cubic Bezier curves: 3n + 1 control points."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    path = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * (len(points) - 1)])
    how = {"edgecolor": colour, "linewidth": width, "linestyle": style, "capstyle": "butt"}
    axes.add_patch(PathPatch(path, fill=False, **how))


def put_label(axes: Axes, tag: Box, edge: CellEdge, colour: str) -> None:
    """An operation's name and chips in its rounded box."""
    put_box(axes, tag, "white", colour, 6)
    left = tag.x - tag.width / 2 + 5
    put_text(axes, left, tag.y, edge.operation, 11, ha="left", family=MONO_FONT)
    put_chips(axes, left + 4 + LETTER_WIDTH * len(edge.operation), tag.y, edge.chips)


def put_legends(axes: Axes, drawing: Drawing) -> None:
    """The rows of samples: a colour as a patch, a width as a stroke."""
    rows = ((LEGEND_INTRO, drawing.legend, drawing.legend_y), (WIDTHS_INTRO, drawing.widths, drawing.widths_y))
    for intro, entries, y in rows:
        if not entries:
            continue
        first, *places = legend_places(drawing, intro, entries)
        put_text(axes, first, y, intro, LEGEND_SIZE, ha="left")
        for (text, sample), x in zip(entries, places, strict=True):
            height, colour = (10.0, sample) if isinstance(sample, str) else (sample, PLAIN)
            put_box(axes, Box(x + SWATCH / 2, y, SWATCH, height), colour, "none", 0.5)
            put_text(axes, x + SWATCH + 6, y, text, LEGEND_SIZE, ha="left")
