# SPDX-License-Identifier: Apache-2.0
"""Cells painted by graphviz. Every position is ours (neato -n2); `dot` measures the text and paints."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from common.recipes.cell_layout import (
    HEADING_SIZE,
    LEGEND_INTRO,
    LEGEND_SIZE,
    SWATCH,
    TAG_HEIGHT,
    TITLE_SIZE,
    WIDTHS_INTRO,
    Box,
    Chip,
    Drawing,
    Line,
    Node,
    chip_width,
    legend_places,
    text_width,
)
from common.recipes.cell_style import (
    DPI,
    FILL,
    FRAME,
    FRAME_RIM,
    INK,
    MONO,
    PLAIN,
    RIM,
    SANS,
    chip_colour,
    line_colours,
    line_width,
    on,
    spline,
)

_THICK = 1.6  # points: from here on an arrow's head is painted apart from its line


def paint(drawing: Drawing, form: str) -> bytes:
    """The drawing as svg, png or pdf. Needs the package graphviz and its `dot` program."""
    import graphviz

    graph = graphviz.Digraph("cells", engine="neato")
    graph.attr(bgcolor="white", outputorder="nodesfirst", pad="0.02", splines="true", fontname=SANS, margin="0")
    graph.attr("node", fontname=SANS, fontsize="12", fontcolor=INK, color=RIM, style="filled", fixedsize="true")
    graph.attr("edge", fontname=MONO, fontsize="11", fontcolor=INK)
    if form == "png":
        graph.attr(dpi=str(DPI))
    _ground(graph, drawing)
    for node in drawing.nodes:
        _node(graph, node, drawing.height)
    for line in drawing.lines:
        _line(graph, line, drawing)
    return graph.pipe(format=form, neato_no_op=2)


def _at(point: tuple[float, float], height: float) -> str:
    """A position in graphviz' coordinates: y up, rounded, pinned."""
    return f"{point[0]:.2f},{height - point[1]:.2f}"


def _size(box: Box) -> dict[str, str]:
    return {"width": f"{box.width / 72:.4f}", "height": f"{box.height / 72:.4f}"}


def _ground(graph: Any, drawing: Drawing) -> None:
    """The white canvas (it fixes the size), frames, titles and the legends."""
    height = drawing.height
    canvas = Box(drawing.width / 2, height / 2, drawing.width, height)
    white = {"color": "white", "fillcolor": "white"}
    graph.node("canvas", "", shape="box", pos=_at((canvas.x, canvas.y), height), **white, **_size(canvas))
    for index, frame in enumerate(drawing.frames):
        box, colours = frame.box, {"fillcolor": FRAME, "color": FRAME_RIM}
        where = _at((box.x, box.y), height)
        graph.node(f"frame_{index}", "", shape="box", style="rounded,filled", pos=where, **colours, **_size(box))
        spot = (box.x, box.y - box.height / 2 + 18)
        _text(graph, f"heading_{index}", spot, html.escape(frame.title), HEADING_SIZE, height)
    if drawing.title:
        _text(graph, "title", (drawing.width / 2, 20.0), f"<b>{html.escape(drawing.title)}</b>", TITLE_SIZE, height)
    _legend(graph, drawing, "legend", LEGEND_INTRO, drawing.legend, drawing.legend_y)
    _legend(graph, drawing, "widths", WIDTHS_INTRO, drawing.widths, drawing.widths_y)


def _text(graph: Any, name: str, spot: tuple[float, float], markup: str, size: float, height: float) -> None:
    """A text around `spot`."""
    free = {"shape": "plaintext", "style": "", "width": "0", "height": "0", "fixedsize": "false"}
    graph.node(name, f"<{markup}>", fontsize=f"{size:g}", pos=_at(spot, height), **free)


def _legend(
    graph: Any, drawing: Drawing, name: str, intro: str, entries: Sequence[tuple[str, str | float]], y: float
) -> None:
    """A row of samples: a colour as a patch, a width as a stroke."""
    if not entries:
        return
    first, *places = legend_places(drawing, intro, entries)
    texts = [(first, intro)]
    for number, ((text, sample), x) in enumerate(zip(entries, places, strict=True)):
        box = Box(x + SWATCH / 2, y, SWATCH, 10.0 if isinstance(sample, str) else sample)
        colour = sample if isinstance(sample, str) else PLAIN
        where = _at((box.x, box.y), drawing.height)
        style = {"shape": "box", "fillcolor": colour, "color": colour, "penwidth": "0"}
        graph.node(f"{name}_sample_{number}", "", pos=where, **style, **_size(box))
        texts.append((x + SWATCH + 6, text))
    for number, (x, text) in enumerate(texts):
        box = Box(x + text_width(text, LEGEND_SIZE) / 2, y, text_width(text, LEGEND_SIZE), 16.0)
        plain = {"shape": "box", "style": "", "penwidth": "0", "margin": "0", "fontsize": f"{LEGEND_SIZE:g}"}
        where = _at((box.x, box.y), drawing.height)
        graph.node(f"{name}_text_{number}", text.replace("\\", "\\\\") + "\\l", pos=where, **plain, **_size(box))


def _chips(chips: Sequence[Chip]) -> str:
    """Chips as the cells of a graphviz table's row."""
    return "".join(
        f'<td bgcolor="{chip_colour(chip)}" width="{chip_width(chip):.0f}">'
        f'<font color="{on(chip_colour(chip))}" face="{MONO}" point-size="11">{chip.text}</font></td>'
        for chip in chips
    )


def _node(graph: Any, node: Node, height: float) -> None:
    shape = "circle" if node.kind == "state" else "box"
    style = "filled" if node.kind == "state" else "rounded,filled"
    label = node.text
    if node.chips:
        label = (
            f'<<table border="0" cellborder="0" cellspacing="3" cellpadding="1"><tr><td colspan="{len(node.chips)}">'
            f"{html.escape(node.text)}</td></tr><tr>{_chips(node.chips)}</tr></table>>"
        )
    graph.node(
        node.name, label, shape=shape, style=style, fillcolor=FILL[node.kind],
        pos=_at((node.box.x, node.box.y), height), **_size(node.box),
    )  # fmt: skip


def _line(graph: Any, line: Line, drawing: Drawing) -> None:
    curve, tip = spline(line)
    height, colours = drawing.height, line_colours(line, drawing)
    pos = f"e,{_at(tip, height)} " + " ".join(_at(point, height) for point in curve)
    how = {"pos": pos, "color": colours[0], "penwidth": f"{line_width(line):.2f}", "arrowsize": "0.7"}
    if (
        line_width(line) > _THICK
    ):  # dot paints the head's rim as thick as its line: such a head would reach into the node
        how |= {"arrowhead": "none"}
        _head(graph, line, curve[-1], tip, colours[0], height)
    if line.edge is None or line.tag is None:
        graph.edge(line.tail, line.head, **how)
        return
    label = (
        f'<<table border="1" cellborder="0" cellspacing="3" cellpadding="1" bgcolor="white" style="rounded" '
        f'color="{colours[0]}" width="{line.tag.width:.0f}" height="{TAG_HEIGHT:.0f}">'
        f"<tr><td>{html.escape(line.edge.operation)}</td>{_chips(line.edge.chips)}</tr></table>>"
    )
    tooltip = {"tooltip": line.edge.label, "labeltooltip": line.edge.label}
    for colour in colours[1:]:  # two colours: the second as dashes on the first, and the label on both
        graph.edge(line.tail, line.head, **how)
        how |= {"color": colour, "style": "dashed", "arrowhead": "none"}
    graph.edge(line.tail, line.head, label=label, lp=_at((line.tag.x, line.tag.y), height), **tooltip, **how)


def _head(
    graph: Any, line: Line, base: tuple[float, float], tip: tuple[float, float], colour: str, height: float
) -> None:
    """An arrow's head alone, at the end of a short thin line."""
    start = tuple(2.2 * b - 1.2 * t for b, t in zip(base, tip, strict=True))
    ends = [tuple(s + (b - s) * share for s, b in zip(start, base, strict=True)) for share in (0, 0.33, 0.67, 1)]
    pos = f"e,{_at(tip, height)} " + " ".join(_at(point, height) for point in ends)
    graph.edge(line.tail, line.head, pos=pos, color=colour, penwidth="1", arrowsize="0.8")
