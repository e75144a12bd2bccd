# SPDX-License-Identifier: Apache-2.0
"""Where everything in the picture of two cells goes: our own layout, so that no label is ever cut or covered.

States stand in one column, top to bottom. A state's two operations enter it from the left and from the right, each
behind its label; on its way down from its source an operation runs in a lane of its own outside all labels, so that
lines meet labels nowhere but at their own. Which operation enters on which side is chosen so that few lanes are
needed. All lengths are points, y points down. Nothing here knows how the picture is painted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

STATE_RADIUS = 15.0
INPUT_WIDTH, INPUT_HEIGHT = 66.0, 27.0
CHIPS_HEIGHT = 18.0  # what a row of chips adds to an input
TAG_HEIGHT = 23.0
LETTER_WIDTH = 6.65  # of an 11 point monospaced letter, rounded up
ARROW = 7.0  # length of an arrow's head
_LANE, _LEVEL, _DROP = 10.0, 6.5, 5.5  # distances between parallel lines
_BEFORE_NODE, _BEHIND_LANES, _FRAME = 17.0, 13.0, 14.0
_CLEAR = 13.0  # between a node's rim and the nearest line that passes it
_TITLE, _LEGEND, _MARGIN = 26.0, 34.0, 10.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Chip:
    """A short text on a coloured ground, such as `w2`; `bits` are the bit-widths it stands for, smallest first."""

    text: str
    bits: tuple[int, ...]


@dataclass(frozen=True)
class CellEdge:
    """One chosen operation: from state `source` (0 and 1 are the inputs) to state `target`."""

    source: int
    target: int
    operation: str
    chips: tuple[Chip, ...] = ()

    @property
    def label(self) -> str:
        """The whole label as one string, such as `sep_conv_3x3  w2 a4`."""
        return "  ".join(part for part in (self.operation, " ".join(chip.text for chip in self.chips)) if part)

    @property
    def bits(self) -> tuple[int, ...]:
        """What colours the line: the weights' bit-widths over all cells, smallest first; empty: nothing has bits."""
        return self.chips[0].bits if self.chips else ()


@dataclass(frozen=True)
class Cell:
    """One cell to draw: its operations, in order of their targets, and the states that make its output."""

    name: str
    title: str
    states: int
    edges: tuple[CellEdge, ...]
    concat: tuple[int, ...]
    inputs: tuple[tuple[Chip, ...], tuple[Chip, ...]] = ((), ())
    """Chips of the preprocessing of c_{k-2} and c_{k-1}."""


@dataclass
class Box:
    """A rectangle by its centre and size."""

    x: float
    y: float
    width: float
    height: float

    def shifted(self, dx: float, dy: float) -> Box:
        """The same box elsewhere."""
        return Box(self.x + dx, self.y + dy, self.width, self.height)


@dataclass
class Node:
    """A state of a cell; kind is input, state or output."""

    name: str
    text: str
    kind: str
    box: Box
    chips: tuple[Chip, ...] = ()


@dataclass
class Line:
    """An edge: corner points from the tail's rim to the head's rim, and the label's box (None: concatenation)."""

    tail: str
    head: str
    points: list[Point]
    edge: CellEdge | None = None
    tag: Box | None = None


@dataclass
class Frame:
    """The rounded frame of a cell, with its title inside at the top."""

    title: str
    box: Box


@dataclass
class Drawing:
    """Everything to paint, in points; the origin is the upper left corner."""

    width: float = 0.0
    height: float = 0.0
    title: str = ""
    frames: list[Frame] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    legend_y: float = 0.0


def tag_width(edge: CellEdge) -> float:
    """Width of an operation's label, chips included."""
    return 12 + LETTER_WIDTH * len(edge.operation) + sum(chip_width(chip) + 3 for chip in edge.chips)


def chip_width(chip: Chip) -> float:
    """Width of a chip's coloured ground."""
    return 6 + LETTER_WIDTH * len(chip.text)


def chips_width(chips: Sequence[Chip]) -> float:
    """Width of several chips in a row."""
    return sum(chip_width(chip) + 3 for chip in chips) - (3 if chips else 0)


def state_text(state: int) -> str:
    """How a state is called in the pictures: c_{k-2}, c_{k-1}, then 0, 1, ..."""
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else str(state - 2)


def _row(state: int) -> int:
    """Both inputs share row 0, every other state has a row of its own."""
    return max(0, state - 1)


def _lanes(edges: Sequence[CellEdge]) -> dict[int, int]:
    """Lane of each edge on one side (key: its target): shorter ones inside, overlapping ones never in one lane."""
    lanes: dict[int, int] = {}
    order = sorted(edges, key=lambda e: (_row(e.target) - _row(e.source), e.target))
    for edge in order:
        over = [
            lanes[other.target]
            for other in edges
            if other.target in lanes
            and _row(other.source) < _row(edge.target)
            and _row(edge.source) < _row(other.target)
        ]
        lanes[edge.target] = max(over, default=-1) + 1
    return lanes


def _sides(cell: Cell) -> tuple[list[CellEdge], list[CellEdge]]:
    """Left and right edges: one of each state's two on either side, such that few lanes and few crossings result."""
    pairs = [[e for e in cell.edges if e.target == 2 + i] for i in range(cell.states)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"cell {cell.title!r}: a state without exactly two operations cannot be drawn")
    best: tuple[tuple[float, ...], tuple[list[CellEdge], list[CellEdge]]] | None = None
    # 2^states ways; beyond ten states the first ten choose and the others keep their order
    for flips in itertools.product((0, 1), repeat=min(cell.states, 10)):
        turned = list(flips) + [0] * (cell.states - len(flips))
        left = [pair[flip] for pair, flip in zip(pairs, turned, strict=True)]
        right = [pair[1 - flip] for pair, flip in zip(pairs, turned, strict=True)]
        widths = [max(_lanes(side).values()) + 1 for side in (left, right)]
        wrong = sum(e.source == 1 for e in left) + sum(e.source == 0 for e in right)
        score = (sum(widths), wrong, abs(widths[0] - widths[1]), *flips)
        if best is None or score < best[0]:
            best = (score, (left, right))
    assert best is not None
    return best[1]


@dataclass
class _Exit:
    """A line on its way out of a node: to which side, how far, and the height at which it turns."""

    source: int
    side: int  # -1 left, +1 right
    reach: float  # the lane's x, positive
    edge: CellEdge | None  # None: the concatenation's trunk
    level: float = 0.0
    drop: float = 0.0


def _exits(cell: Cell, sides: tuple[list[CellEdge], list[CellEdge]], label: float) -> tuple[list[_Exit], float, float]:
    """All lines that turn into a lane, and how far the cell reaches to the left and to the right."""
    exits: list[_Exit] = []
    reach = []
    for side, edges in zip((-1, 1), sides, strict=True):
        lanes = _lanes(edges)
        first = STATE_RADIUS + _BEFORE_NODE + label + _BEHIND_LANES
        exits += [_Exit(e.source, side, first + _LANE * lanes[e.target], e) for e in edges]
        reach.append(first + _LANE * max(lanes.values()))
    last = 1 + cell.states
    if any(state != last for state in cell.concat):
        reach[1] += _LANE
        exits += [_Exit(state, 1, reach[1], None) for state in cell.concat if state != last]
    return exits, reach[0], reach[1]


def _turns(exits: Sequence[_Exit], rows: int) -> list[float]:
    """Give each exit its level and drop; return how many levels the space below each row needs.

    The farthest lane turns first (highest) and drops outermost, so that lines of one node never cross each other.
    """
    needed = []
    for row in range(rows):
        here = [x for x in exits if _row(x.source) == row]
        depth = 0
        for side in (-1, 1):
            ordered = sorted((x for x in here if x.side == side), key=lambda x: -x.reach)
            for level, leaving in enumerate(ordered):
                leaving.level = _LEVEL * level
            depth = max(depth, len(ordered))
        for source in {x.source for x in here}:
            own = [x for x in here if x.source == source]
            own.sort(key=lambda x: x.side * x.reach)
            for place, leaving in enumerate(own):
                leaving.drop = (place - (len(own) - 1) / 2) * _DROP
        needed.append(_LEVEL * max(0, depth - 1))
    return needed


def lay_out_cell(cell: Cell, label: float) -> tuple[Drawing, float, float]:
    """Lay one cell out around x = 0; returns the drawing and its reach to the left and right.

    `label` is the width of every operation's label: one width for all, so that they stand in columns.
    """
    drawing = Drawing()
    sides = _sides(cell)
    exits, left, right = _exits(cell, sides, label)
    rows = cell.states + 1
    needed = _turns(exits, rows)
    names = {state: f"{cell.name}_{state_text(state)}" for state in range(cell.states + 2)}
    centres: dict[int, Point] = {}
    high = INPUT_HEIGHT + (CHIPS_HEIGHT if any(cell.inputs) else 0.0)
    wide = max(INPUT_WIDTH, *(chips_width(chips) + 14 for chips in cell.inputs))
    y = high / 2
    for state in range(2):
        centres[state] = ((state - 0.5) * (wide + 18), y)
        drawing.nodes.append(
            Node(names[state], state_text(state), "input", Box(*centres[state], wide, high), cell.inputs[state])
        )
    y += high / 2 + 2 * _CLEAR + needed[0] + STATE_RADIUS
    for state in range(2, cell.states + 2):
        centres[state] = (0.0, y)
        box = Box(0.0, y, 2 * STATE_RADIUS, 2 * STATE_RADIUS)
        drawing.nodes.append(Node(names[state], state_text(state), "state", box))
        y += 2 * STATE_RADIUS + 2 * _CLEAR + needed[_row(state)]
    output = f"{cell.name}_c_{{k}}"
    y -= STATE_RADIUS - INPUT_HEIGHT / 2
    drawing.nodes.append(Node(output, "c_{k}", "output", Box(0.0, y, INPUT_WIDTH, INPUT_HEIGHT)))
    for leaving in exits:
        x0, y0 = centres[leaving.source]
        rim = high / 2 if leaving.source < 2 else STATE_RADIUS
        turn = y0 + rim + _CLEAR + leaving.level
        if leaving.source >= 2:  # a circle's rim is higher beside its middle
            rim = (STATE_RADIUS**2 - min(abs(leaving.drop), STATE_RADIUS) ** 2) ** 0.5
        lane = leaving.side * leaving.reach
        end = (INPUT_WIDTH / 2, y) if leaving.edge is None else (STATE_RADIUS, centres[leaving.edge.target][1])
        points = [(x0 + leaving.drop, y0 + rim), (x0 + leaving.drop, turn), (lane, turn), (lane, end[1])]
        points.append((leaving.side * end[0], end[1]))
        line = Line(names[leaving.source], output, points)
        if leaving.edge is not None:
            place = leaving.side * (STATE_RADIUS + _BEFORE_NODE + label / 2)
            line.head, line.edge = names[leaving.edge.target], leaving.edge
            line.tag = Box(place, end[1], label, TAG_HEIGHT)
        drawing.lines.append(line)
    last = 1 + cell.states
    if last in cell.concat:
        drawing.lines.append(
            Line(names[last], output, [(0.0, centres[last][1] + STATE_RADIUS), (0.0, y - INPUT_HEIGHT / 2)])
        )
    drawing.height = y + INPUT_HEIGHT / 2
    return drawing, left, right


def lay_out(cells: Sequence[Cell], *, title: str, legend: Sequence[tuple[str, str]]) -> Drawing:
    """Lay the cells out side by side in one picture, each in its frame, with the legend below.

    `legend` lists (text, colour), in order; empty: no legend.
    """
    label = max(tag_width(edge) for cell in cells for edge in cell.edges)
    parts = [lay_out_cell(cell, label) for cell in cells]
    top = _MARGIN + (_TITLE if title else 0.0)
    height = max(part.height for part, _, _ in parts)
    whole = Drawing(title=title, legend=list(legend))
    x = _MARGIN
    for cell, (part, left, right) in zip(cells, parts, strict=True):
        width = left + right + 2 * _FRAME
        frame = Box(x + width / 2, top + (height + _TITLE + 2 * _FRAME) / 2, width, height + _TITLE + 2 * _FRAME)
        whole.frames.append(Frame(cell.title, frame))
        dx, dy = x + _FRAME + left, top + _FRAME + _TITLE
        for node in part.nodes:
            whole.nodes.append(Node(node.name, node.text, node.kind, node.box.shifted(dx, dy), node.chips))
        for line in part.lines:
            tag = line.tag.shifted(dx, dy) if line.tag else None
            points = [(px + dx, py + dy) for px, py in line.points]
            whole.lines.append(Line(line.tail, line.head, points, line.edge, tag))
        x += width + _MARGIN
    whole.width = x
    whole.height = top + height + _TITLE + 2 * _FRAME + _MARGIN
    if legend:
        whole.legend_y = whole.height + _LEGEND / 2 - _MARGIN / 2
        whole.height += _LEGEND
    return whole


def rounded(points: Sequence[Point], radius: float = 7.0) -> list[Point]:
    """Cubic Bezier control points (3n + 1 of them) of a polyline with rounded corners."""
    curve: list[Point] = [points[0]]

    def straight(to: Point) -> None:
        at = curve[-1]
        third = ((to[0] - at[0]) / 3, (to[1] - at[1]) / 3)
        curve.extend([(at[0] + third[0], at[1] + third[1]), (to[0] - third[0], to[1] - third[1]), to])

    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        enter, leave = _towards(corner, before, radius), _towards(corner, after, radius)
        straight(enter)
        curve.extend([_between(enter, corner, 0.55), _between(leave, corner, 0.55), leave])
    straight(points[-1])
    return curve


def _between(a: Point, b: Point, share: float) -> Point:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def _towards(a: Point, b: Point, distance: float) -> Point:
    """The point `distance` from a on the way to b, at most half of the way."""
    length = ((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2) ** 0.5
    return _between(a, b, min(0.5, distance / length) if length else 0.0)
