# SPDX-License-Identifier: Apache-2.0
"""How pictures of cells look: colours, fonts and line widths, the same for every painter.

Colours follow Okabe and Ito (2008), moved a little so that all of them stay apart for the colour-blind.
"""

from __future__ import annotations

from common.recipes.cell_layout import ARROW, Chip, Drawing, Line, rounded

BIT_COLOURS: dict[int, str] = {
    1: "#882255",
    2: "#0072B2",
    3: "#7FC8F8",
    4: "#00A878",
    8: "#F0B400",
    32: "#D55E00",
}
"""Colour by bit-width."""
OTHER_COLOUR = "#64748B"
"""Of every other bit-width."""
MIXED_COLOUR = "#E2E6EC"
"""Ground of a label's bits where cells of one type differ; their line has the colours of both ends of the range."""
PLAIN, NO_WEIGHTS = "#64748B", "#9AA5B4"
"""Operations of a picture without bits; operations without weights."""
CONCAT, INK, RIM, FRAME, FRAME_RIM = "#C3CAD4", "#1F2937", "#475569", "#FCFCFD", "#D5DAE1"
FILL = {"input": "#DDEFE3", "state": "#E3EDF7", "output": "#FBF0D0"}
"""Ground of a node by its kind."""
SANS, MONO = "DejaVu Sans,Verdana,Helvetica,sans-serif", "DejaVu Sans Mono,Menlo,Consolas,monospace"
DPI = 160
"""Of a PNG."""
_WIDTH, _CONCAT_WIDTH = 1.6, 1.1
_THIN, _THICK = 1.0, 4.6  # lines of one node are 5.5 apart


def bit_colour(bits: int) -> str:
    """The colour of a bit-width."""
    return BIT_COLOURS.get(bits, OTHER_COLOUR)


def legend_text(bits: int) -> str:
    """What the legend calls a bit-width."""
    return "32 bits (float)" if bits == 32 else f"{bits} bit{'s' if bits > 1 else ''}"


def on(colour: str) -> str:
    """Black or white, whichever reads better on this ground (WCAG relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#FFFFFF" if 1.05 / (luminance + 0.05) >= (luminance + 0.05) / 0.05 else "#000000"


def chip_colour(chip: Chip) -> str:
    """The ground of a chip."""
    return bit_colour(chip.bits[0]) if len(chip.bits) == 1 else MIXED_COLOUR


def line_colours(line: Line, drawing: Drawing) -> list[str]:
    """One colour, or those of the fewest and the most bits where cells differ."""
    if line.edge is None:
        return [CONCAT]
    if not line.edge.bits:
        return [NO_WEIGHTS if drawing.legend else PLAIN]
    return list(dict.fromkeys(bit_colour(bits) for bits in (line.edge.bits[0], line.edge.bits[-1])))


def line_width(line: Line) -> float:
    """Points: by the choice's confidence where that is known, else one width for all operations."""
    if line.edge is None:
        return _CONCAT_WIDTH
    return _WIDTH if line.edge.margin is None else margin_width(line.edge.margin)


def margin_width(margin: float) -> float:
    """Points of a line whose choice leads by `margin` (0 to 1): a root, since most of a search happens below 0.1."""
    return _THIN + (_THICK - _THIN) * min(max(margin, 0.0), 1.0) ** 0.5


def spline(line: Line) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Bezier points up to the arrow's base, and the arrow's tip."""
    before, tip = line.points[-2:]
    length = ((tip[0] - before[0]) ** 2 + (tip[1] - before[1]) ** 2) ** 0.5
    share = ARROW / length
    base = (tip[0] + (before[0] - tip[0]) * share, tip[1] + (before[1] - tip[1]) * share)
    return rounded([*line.points[:-1], base]), tip
