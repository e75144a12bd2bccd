# SPDX-License-Identifier: Apache-2.0
"""Rows as a picture: accuracy against cost with 95% intervals, and the line of rows that no other row beats.

Each method has a mark of its own beside its colour, so that the picture can be read without. Every point carries its
name; the names are placed so that they cover nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.recipes.paint import COLOURS, FAINT, FORMATS, INK, REFERENCE, canvas, saved
from common.recipes.rows import SIZES, Row, data_of, differences, folders_apart, length_of, size_differences, usual_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy import ndarray

COSTS = {
    "bitops_quantized": ("BitOps of the quantised layers", ""),
    "bitops": ("BitOps of all layers", ""),
    "weight_bytes": ("memory of the weights", "B"),
}
"""What the cost axis can show: name in result.json -> title and unit; the first is the default."""

_MARKS = ("o", "s", "^", "v", "P", "X")


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
    length: Any = None
    """How long it was trained: only rows of one length are held against each other."""


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


def fronts(points: Sequence[Point]) -> list[list[int]]:
    """The front among the points trained for as long, as indices, for each such length."""
    found = []
    for length in dict.fromkeys(point.length for point in points):
        members = [index for index, point in enumerate(points) if point.length == length]
        best = pareto_front([(points[index].cost, points[index].accuracy) for index in members])
        found.append([members[index] for index in best])
    return found


def draw_pareto(rows: Sequence[Row], cost: str, form: str) -> tuple[bytes, list[str]]:
    """The picture of the trained rows, and a word on each row that it cannot show.

    `cost` is one of COSTS, `form` one of FORMATS. Raises ValueError when no row is left, or when their accuracies
    cannot be compared because the data differ.
    """
    points, left_out = _points(rows, cost)
    with canvas(8.0, 5.2) as figure:
        axes = figure.add_subplot()
        _frame(axes, points, cost, [row for row in rows if row.trained])
        figure.draw_without_rendering()  # the axes have their place only then
        lines = _paint(axes, points)
        figure.draw_without_rendering()  # sizes of texts are known only then
        _place_names(axes, points, lines)
        return saved(figure, form), left_out


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
    for row, name in zip(trained, _names(trained), strict=True):
        (mean, _), x, interval = row.accuracy, row.mean(cost), row.interval
        method = row.common(lambda r: r.method)
        if mean is None or not x:
            left_out.append(f"{row.first.folder}: no {cost if mean is not None else 'accuracy'}")
            continue
        low, high = interval or (mean, mean)
        place, length = methods.index(method), length_of(row)
        points.append(Point(x, 100 * mean, 100 * low, 100 * high, name, place, row.bits is None, length))
    if not points:
        raise ValueError(f"--pareto: no finished training with accuracy and {cost} to draw; name training runs")
    return points, left_out


def _data(row: Row) -> str:
    dataset, image_size, n_test, n_train = data_of(row)
    return f"{dataset}, image size {image_size}, {n_train} training and {n_test} test images"


def _names(rows: Sequence[Row]) -> list[str]:
    """Method and bits of each row, and what tells it from others of the same: architecture, flags."""
    heads = [f"{row.common(lambda r: r.method)} {row.bits_label}" for row in rows]
    names = []
    for row, head, differs in zip(rows, heads, differences(rows), strict=True):
        twins = [other for other, same in zip(rows, heads, strict=True) if same == head]
        several = len({twin.first.architecture for twin in twins}) > 1
        names.append(" ".join([head, *([row.first.architecture] if several else []), *_words(differs)]))
    return [f"{name} {folder}".strip() for name, folder in zip(names, folders_apart(rows, names), strict=True)]


def _words(differs: str) -> list[str]:
    """What tells rows apart, short: a word alone where its flag's value is one (`lsq`), numbers with their flag."""
    words = []
    for part in differs.replace("search.", "").split(" "):
        value = part.partition("=")[2]
        words.append(value if value.replace("_", "").isalpha() else part)
    return [word for word in dict.fromkeys(words) if word]


def _window(points: Sequence[Point]) -> tuple[float, float]:
    """The accuracies that the picture shows, so that the differences at the top can be seen.

    All of them with their intervals, but for a few rows (at most a third) that lie below the others by more than twice
    what these are apart: they go to the lower edge, unless the others' intervals reach down to them.
    """
    means = sorted(point.accuracy for point in points)
    for below in range(1, len(means) // 3 + 1):
        if means[below] - means[below - 1] > 2 * max(means[-1] - means[below], 2.0):
            means = means[below:]
            break
    floor, shown = means[0], list[Point]()
    while len(inside := [point for point in points if point.accuracy >= floor]) > len(shown):
        shown = inside
        low, high = max(min(point.low for point in shown), 0.0), min(max(point.high for point in shown), 100.0)
        margin = 0.07 * max(high - low, 1.0)
        floor = low - margin
    return floor, high + margin


def _frame(axes: Axes, points: Sequence[Point], cost: str, rows: Sequence[Row]) -> None:
    """Axes, ticks and title."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    title, unit = COSTS[cost]
    costs = [point.cost for point in points]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    axes.set_ylim(*_window(points))
    decades = math.log10(max(costs) / min(costs))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 4 else (1.0, 3.0) if decades > 2 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{_scaled(value)}{unit}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.grid(True, which="major", color="#EDEFF2", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK)
    axes.set_xlabel(f"{title} (log scale)", color=INK)
    axes.set_ylabel("test accuracy, %", color=INK)
    axes.set_title(_title(points, rows), loc="left", fontsize=8, color=INK)


def _title(points: Sequence[Point], rows: Sequence[Row]) -> str:
    """The data, how to read the marks, and the usual size where some names give another."""
    dataset, image_size, n_test, _ = data_of(rows[0])
    text = f"{dataset}, {image_size}x{image_size}" if image_size else dataset
    text += f", {n_test} test images. Bars: 95% intervals; line, filled marks: no row is better at less cost"
    if any(point.reference for point in points):
        text += "; dotted: full precision"
    told = {part.partition("=")[0] for texts in size_differences(rows) for part in texts.split()}
    usual = [(key, most[0]) for key in SIZES if key in told and (most := usual_size(rows, key)) is not None]
    more = [", ".join(f"{key}={'all' if value is None else value}" for key, value in usual) + " unless said"] * bool(
        usual
    )
    if len({point.length for point in points}) > 1:
        more.append("a line, and filled marks, for each number of epochs")
    return "\n".join([text, *(["; ".join(more)] if more else [])])


def _scaled(value: float) -> str:
    """`200 M` for 2e8."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g} {letter}"
    return f"{value:g} "


def _paint(axes: Axes, points: Sequence[Point]) -> list[Line2D]:
    """The front and the line of full precision of each length of training, intervals, marks; returns the lines."""
    from matplotlib.patheffects import withStroke

    front, lines = set[int](), list["Line2D"]()
    for members in fronts(points):
        costs, heights = [points[i].cost for i in members], [points[i].accuracy for i in members]
        lines += axes.plot(costs, heights, color="#C3CAD4", linewidth=2, zorder=1)
        front.update(members)
    highest: dict[Any, float] = {}
    for point in points:
        if point.reference:
            highest[point.length] = max(point.accuracy, highest.get(point.length, 0.0))
    style = {"color": REFERENCE, "linewidth": 0.9, "linestyle": (0, (1, 3)), "zorder": 1}
    lines += [axes.axhline(height, **style) for height in highest.values()]
    floor = axes.get_ylim()[0]
    stacked = _stacked(axes.transData.transform([(point.cost, max(point.accuracy, floor)) for point in points]))
    for index, point in enumerate(points):
        colour = REFERENCE if point.reference else COLOURS[point.method % len(COLOURS)]
        fill = colour if index in front else "white"
        if point.accuracy >= floor:
            ends = [[point.accuracy - max(point.low, 0.0)], [min(point.high, 100.0) - point.accuracy]]
            axes.errorbar(point.cost, point.accuracy, ends, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
        axes.plot(
            point.cost,
            max(point.accuracy, floor),
            marker="D" if point.reference else _MARKS[point.method % len(_MARKS)],
            color=colour,
            markersize=6.5 * stacked[index][0],
            markerfacecolor=fill,
            markeredgewidth=1.4,
            path_effects=[withStroke(linewidth=3.4, foreground="white")] if stacked[index][1] else None,
            clip_on=False,
            zorder=3,
        )
    return lines


def _stacked(places: ndarray) -> list[tuple[float, bool]]:
    """For marks at these pixels (n, 2), drawn in this order: how much larger each is than usual, and if it covers one.

    A mark that others will cover is larger, so that it can be seen around them.
    """
    found = []
    for index, place in enumerate(places):
        near = [other for other in range(len(places)) if other != index and math.dist(place, places[other]) < 5]
        found.append((min(1.7 ** sum(other > index for other in near), 2.2), any(other < index for other in near)))
    return found


# ------------------------------------------------------------------------------------------------------ names
# Boxes are arrays (n, 4) of left, bottom, right, top in pixels.


def _place_names(axes: Axes, points: Sequence[Point], lines: Sequence[Line2D]) -> None:
    """Every name beside its point, as near as it goes without covering a mark, an interval, a line or another name."""
    import numpy as np

    renderer, floor = axes.figure.canvas.get_renderer(), axes.get_ylim()[0]
    frame = axes.get_window_extent(renderer)
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    places = to_pixels([(point.cost, max(point.accuracy, floor)) for point in points])
    halves = np.array([[6 * larger] for larger, _ in _stacked(places)])
    hard = np.concatenate([places - halves, places + halves], axis=1)
    low, high = (to_pixels([(p.cost, max(getattr(p, end), floor)) for p in points]) for end in ("low", "high"))
    soft = np.concatenate([low - 3, high + 3], axis=1)
    for line in lines:  # each by its own transform: the dotted one's ends are shares of the width, not costs
        soft = np.concatenate([soft, _along(line.get_transform().transform(line.get_xydata()))])
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    for index in sorted(range(len(points)), key=lambda i: -points[i].accuracy):
        point, place = points[index], places[index]
        name = point.name if point.accuracy >= floor else f"{point.name}: {point.accuracy:.1f}%"
        text = axes.text(0, 0, name, fontsize=8, color=INK, zorder=4, va="bottom", bbox=ground)
        extent = text.get_window_extent(renderer)
        others = places[np.linalg.norm(places - place, axis=1) > 8]  # a mark on the same spot cannot be told apart
        box = _free_place(place, others, np.array([extent.width, extent.height]), np.array(frame.extents), hard, soft)
        hard = np.concatenate([hard, box[None]])
        text.set_position(to_data(box[:2]))
        end = np.clip(place, box[:2], box[2:])
        if math.dist(place, end) > 16:  # too far to be clear without a line
            axes.plot(*to_data([place, end]).T, color=FAINT, linewidth=0.7, zorder=1.5)


def _along(corners: ndarray) -> ndarray:
    """Small boxes along a line through these pixels (n, 2)."""
    import numpy as np

    spots = [np.linspace(start, end, 2 + int(math.dist(start, end) / 6)) for start, end in pairwise(corners)]
    middles = np.concatenate([corners[:1], *spots])
    return np.concatenate([middles - 2, middles + 2], axis=1)


def _free_place(
    place: ndarray, others: ndarray, size: ndarray, frame: ndarray, hard: ndarray, soft: ndarray
) -> ndarray:
    """The best box (4,) of this size (2,) for a name at a place (2,) among others (n, 2).

    It lies in the frame, covers nothing hard and little that is soft, and is near its place and nearer than to another.
    """
    import numpy as np

    turns = np.linspace(0, math.tau, 24, endpoint=False)
    angles, distances = (grid.ravel() for grid in np.meshgrid(turns, [9, 13, 18, 24, 32, 42, 54, 68, 84, 102]))
    ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # the side that faces the place moves along, so that the box keeps its distance
    corners = place + distances[:, None] * ways - size * (1 - ways) / 2
    boxes = np.concatenate([corners, corners + size], axis=1)

    def covered(others: ndarray) -> ndarray:
        apart = (boxes[:, None, :2] >= others[:, 2:]) | (boxes[:, None, 2:] <= others[:, :2])
        return (~apart.any(-1)).sum(1)

    beside = np.maximum(corners[:, None] - others, others - corners[:, None] - size).clip(min=0)
    mistaken = (np.linalg.norm(beside, axis=-1) < distances[:, None] + 4).any(-1)
    outside = np.maximum(frame[:2] - boxes[:, :2], boxes[:, 2:] - frame[2:]).max(1).clip(min=0)
    badness = 1e4 * covered(hard) + 100 * outside + distances + 15 * covered(soft) + 40 * mistaken
    return boxes[np.argmin(badness)]
