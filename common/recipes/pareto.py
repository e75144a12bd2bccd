# SPDX-License-Identifier: Apache-2.0
"""Rows as a picture: accuracy against cost with 95% intervals, and the line of rows that no other row beats.

Colours follow Okabe and Ito (2008) without their yellow, and each method has a mark of its own, so that the picture
can be read without colour. Every point carries its name; the names are placed so that they cover nothing.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.recipes.rows import Row, data_of, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {
    "bitops_quantized": ("BitOps of the quantised layers", ""),
    "bitops": ("BitOps of all layers", ""),
    "weight_bytes": ("memory of the weights", "B"),
}
"""What the cost axis can show: name in result.json -> title and unit; the first is the default."""
FORMATS = ("svg", "png", "pdf")

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("o", "s", "^", "v", "P", "X")
_INK, _FAINT, _REFERENCE = "#1F2937", "#9AA5B4", "#4B5563"
_PIXELS = 100  # per inch, while names are placed


@dataclass(frozen=True)
class Point:
    """A row as it is drawn: cost, accuracy and its interval in percent, name, and its method's place in the palette."""

    cost: float
    accuracy: float
    low: float
    high: float
    name: str
    method: int
    reference: bool
    """Full precision."""


def picture(text: str) -> Path:
    """A flag's value: the path of a picture, whose ending names a format that can be written."""
    path = Path(text)
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise ValueError(f"{text!r} does not end in {', '.join('.' + name for name in FORMATS)}; name such a file")
    return path


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that none beats, by rising cost.

    One point beats another when it is no worse in both and better in one; of equal points all stay.
    """
    best, front = -math.inf, list[int]()
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        cost, accuracy = points[index]
        if accuracy > best or (front and points[front[-1]] == (cost, accuracy)):
            front.append(index)
            best = accuracy
    return front


def draw_pareto(rows: Sequence[Row], cost: str, form: str) -> tuple[bytes, list[str]]:
    """The picture of the trained rows, and a word on each row that it cannot show.

    `cost` is one of COSTS, `form` one of FORMATS. Raises ValueError when no row is left, or when their accuracies
    cannot be compared because the data differ.
    """
    points, left_out = _points(rows, cost)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "pareto", "font.family": ["DejaVu Sans"], "pdf.fonttype": 42}
    with matplotlib.rc_context(settings | {"font.size": 9}):
        figure = Figure(figsize=(8.0, 5.2), dpi=_PIXELS, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _frame(axes, points, cost, rows[0])
        _paint(axes, points)
        figure.draw_without_rendering()  # sizes of texts are known only then
        _place_names(axes, points)
        buffer = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
        figure.savefig(buffer, format=form, dpi=2 * _PIXELS if form == "png" else _PIXELS, metadata=metadata)
    return buffer.getvalue(), left_out


def _points(rows: Sequence[Row], cost: str) -> tuple[list[Point], list[str]]:
    """The rows that can be drawn, and a word on each of the trained ones that cannot."""
    trained = [row for row in rows if row.trained]
    left_out = [f"{row.first.folder}: not finished" for row in rows if not row.first.finished]
    for row in trained:
        if data_of(row) != data_of(trained[0]):
            raise ValueError(
                f"--pareto: {trained[0].first.folder} and {row.first.folder} cannot share a picture: their data or "
                f"sizes differ ({_data(trained[0])}; {_data(row)}); name runs on the same data"
            )
    methods = sorted({row.common(lambda r: r.method) for row in trained})
    points = []
    for row, differs in zip(trained, differences(trained), strict=True):
        (mean, _), x, interval = row.accuracy, row.mean(cost), row.interval
        method = row.common(lambda r: r.method)
        if mean is None or not x:
            left_out.append(f"{row.first.folder}: no {cost if mean is not None else 'accuracy'}")
            continue
        low, high = interval or (mean, mean)
        name = " ".join([method, row.bits_label, *_words(differs)])
        points.append(Point(x, 100 * mean, 100 * low, 100 * high, name, methods.index(method), row.bits is None))
    if not points:
        raise ValueError(f"--pareto: no finished training with accuracy and {cost} to draw; name training runs")
    return points, left_out


def _data(row: Row) -> str:
    dataset, image_size, n_test, n_train = data_of(row)
    return f"{dataset}, image size {image_size}, {n_train} training and {n_test} test images"


def _words(differs: str) -> list[str]:
    """What tells rows apart, short: a word alone where its flag's value is one (`lsq`), numbers with their flag."""
    words = []
    for part in differs.split(" "):
        value = part.partition("=")[2]
        words.append(value if value.replace("_", "").isalpha() else part)
    return [word for word in dict.fromkeys(words) if word]


def _frame(axes: Axes, points: Sequence[Point], cost: str, row: Row) -> None:
    """Axes, ticks and title. Intervals may leave the picture, where they would squeeze the means together."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    title, unit = COSTS[cost]
    costs, means = [point.cost for point in points], [point.accuracy for point in points]
    span = max(max(means) - min(means), 1.0)
    low = max(min(point.low for point in points), min(means) - 0.6 * span)
    high = min(max(point.high for point in points), max(means) + 0.6 * span, 100.0)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.6, max(costs) * 1.6)
    axes.set_ylim(low - 0.08 * span, high + 0.08 * span)
    decades = math.log10(max(costs) / min(costs)) + 0.4
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _scaled(value) + unit))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(True, which="major", color="#E5E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", color=_FAINT, labelcolor=_INK)
    axes.set_xlabel(f"{title} (log scale)", color=_INK)
    axes.set_ylabel("test accuracy, %", color=_INK)
    dataset, image_size, n_test, _ = data_of(row)
    size = f", {image_size}x{image_size}" if image_size else ""
    axes.set_title(f"{dataset}{size}, {n_test} test images; bars: 95% intervals", loc="left", fontsize=9, color=_INK)


def _scaled(value: float) -> str:
    """200 M for 2e8."""
    for scale, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g} "


def _paint(axes: Axes, points: Sequence[Point]) -> None:
    """The front, the line of full precision, the intervals and the marks."""
    front = pareto_front([(point.cost, point.accuracy) for point in points])
    axes.plot(
        [points[i].cost for i in front],
        [points[i].accuracy for i in front],
        color=_FAINT,
        linewidth=1.4,
        zorder=1,
    )
    references = [point.accuracy for point in points if point.reference]
    if references:
        axes.axhline(max(references), color=_REFERENCE, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
    for index, point in enumerate(points):
        colour = _REFERENCE if point.reference else _COLOURS[point.method % len(_COLOURS)]
        axes.errorbar(
            point.cost,
            point.accuracy,
            yerr=[[point.accuracy - point.low], [point.high - point.accuracy]],
            fmt="D" if point.reference else _MARKS[point.method % len(_MARKS)],
            color=colour,
            markersize=6.5,
            markerfacecolor=colour if index in front else "white",
            markeredgewidth=1.4,
            elinewidth=1.0,
            capsize=2.5,
            zorder=3,
        )


def _place_names(axes: Axes, points: Sequence[Point]) -> None:
    """Every name beside its point, as near as it goes without covering a point, an interval or another name."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    places = [axes.transData.transform((point.cost, point.accuracy)) for point in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    for point, (x, _) in zip(points, places, strict=True):
        low, high = (axes.transData.transform((point.cost, end))[1] for end in (point.low, point.high))
        taken.append(Bbox.from_extents(x - 2, max(low, frame.y0), x + 2, min(high, frame.y1)))
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda entry: -entry[0].accuracy):
        text = axes.text(0, 0, point.name, fontsize=8, color=_INK, zorder=4)
        extent = text.get_window_extent(renderer)
        box = _free_place(x, y, extent.width, extent.height, frame, taken)
        taken.append(box)
        text.set_position(axes.transData.inverted().transform((box.x0, box.y0 + extent.y0 * 0)))
        text.set_verticalalignment("bottom")
        end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        if math.dist((x, y), end) > 14:  # too far to be clear without a line
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(line[:, 0], line[:, 1], color=_FAINT, linewidth=0.7, zorder=2)


def _free_place(x: float, y: float, width: float, height: float, frame: Any, taken: Sequence[Any]) -> Any:
    """The nearest place for a box (pixels) beside the point (x, y) that lies in the frame and covers nothing."""
    from matplotlib.transforms import Bbox

    best = None
    for distance in (9, 14, 20, 28, 38, 50, 64, 80, 100, 125):
        for turn in range(16):
            angle = math.tau * turn / 16
            # from right to left the box's near side moves along, so that it always touches the circle
            left = x + distance * math.cos(angle) - width * (1 - math.cos(angle)) / 2
            bottom = y + distance * math.sin(angle) - height * (1 - math.sin(angle)) / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 60 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            covered = sum(box.overlaps(other) for other in taken) + (0 if inside else 100)
            if not covered:
                return box
            if best is None or covered < best[0]:
                best = covered, box
    return best[1]
