# SPDX-License-Identifier: Apache-2.0
"""Where everything in the picture of two cells goes: our own layout, so that no label is ever cut or covered.

States stand in one column, top to bottom. A state's two operations enter it from the left and from the right, each
behind its label; on its way down from its source an operation runs in a lane of its own outside all labels, so that
lines meet labels nowhere but at their own. Which operation enters on which side is chosen so that few lanes are
needed. All lengths are points, y points down. Nothing here knows how the picture is painted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

STATE_RADIUS = 15.0
INPUT_WIDTH, INPUT_HEIGHT = 66.0, 27.0
CHIPS_HEIGHT = 18.0  # what a row of chips adds to an input
TAG_HEIGHT = 23.0
LETTER_WIDTH = 6.65  # of an 11 point monospaced letter, rounded up
ARROW = 7.0  # length of an arrow's head
_LANE, _LEVEL, _DROP = 10.0, 6.5, 5.5  # distances between parallel lines
_BEFORE_NODE, _BEHIND_LANES, _FRAME = 17.0, 13.0, 14.0
_CLEAR = 13.0  # between a node's rim and the nearest line that passes it
_TITLE, _LEGEND, _WIDTHS, _MARGIN = 26.0, 34.0, 24.0, 10.0
TITLE_SIZE, HEADING_SIZE, LEGEND_SIZE = 15.0, 13.0, 11.0  # points of letters
SWATCH = 16.0  # width of a legend's sample
# Ems of the letters of DejaVu Sans that are clearly narrower or wider than .7
_WIDTHS_OF_LETTERS = {
    **dict.fromkeys("ijlI'|", 0.31),
    **dict.fromkeys(" .,:;/()[]!-", 0.4),
    **dict.fromkeys("ftr", 0.43),
    **dict.fromkeys("acekosvxyzLTF_?", 0.62),
    **dict.fromkeys("bdghnpqu0123456789", 0.64),
    **dict.fromkeys("w#+<=>^~", 0.85),
    **dict.fromkeys("mMWOQGD%@&", 1.0),
}
LEGEND_INTRO = "w weights, a activations, lines by weights:"
WIDTHS_INTRO = "line width, by how much the choice leads in the softmax:"

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
    margin: float | None = None
    """By how much the choice leads in its edge's softmax, 0 to 1; None: not known."""

    @property
    def label(self) -> str:
        """The whole label as one string, such as `sep_conv_3x3  w2 a4`."""
        parts = (self.operation, " ".join(chip.text for chip in self.chips))
        lead = "" if self.margin is None else f"leads by {self.margin:.3f}"
        return "  ".join(part for part in (*parts, lead) if part)

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
    widths: list[tuple[str, float]] = field(default_factory=list)
    """The legend of line widths: text and points; empty: all operations have one width."""
    widths_y: float = 0.0

    def shifted(self, dx: float, dy: float) -> Drawing:
        """The same drawing with all but its title and legends elsewhere."""
        frames = [Frame(frame.title, frame.box.shifted(dx, dy)) for frame in self.frames]
        nodes = [Node(node.name, node.text, node.kind, node.box.shifted(dx, dy), node.chips) for node in self.nodes]
        lines = []
        for line in self.lines:
            tag = line.tag.shifted(dx, dy) if line.tag else None
            points = [(px + dx, py + dy) for px, py in line.points]
            lines.append(Line(line.tail, line.head, points, line.edge, tag))
        return replace(self, frames=frames, nodes=nodes, lines=lines)

    def widened(self, width: float) -> Drawing:
        """The same drawing in the middle of a canvas of that width."""
        return replace(self.shifted((width - self.width) / 2, 0.0), width=width)


@dataclass(frozen=True)
class Room:
    """What a cell takes: width of labels and inputs, depth of the levels below each row, reach to left and right.

    Cells drawn with the same room have their nodes and labels in the same places, whatever was chosen.
    """

    label: float
    wide: float
    high: float
    needed: tuple[float, ...]
    left: float
    right: float

    def joined(self, other: Room) -> Room:
        """Room enough for both; their labels have one width."""
        needed = tuple(map(max, self.needed, other.needed))
        lengths = [(one.wide, one.high, one.left, one.right) for one in (self, other)]
        wide, high, left, right = map(max, *lengths)
        return Room(self.label, wide, high, needed, left, right)


def tag_width(edge: CellEdge) -> float:
    """Width of an operation's label, chips included."""
    return 12 + LETTER_WIDTH * len(edge.operation) + sum(chip_width(chip) + 3 for chip in edge.chips)


def chip_width(chip: Chip) -> float:
    """Width of a chip's coloured ground."""
    return 6 + LETTER_WIDTH * len(chip.text)


def chips_width(chips: Sequence[Chip]) -> float:
    """Width of several chips in a row."""
    return sum(chip_width(chip) + 3 for chip in chips) - (3 if chips else 0)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """At most what a text takes in the pictures' proportional font, of so many points."""
    ems = sum(_WIDTHS_OF_LETTERS.get(letter, 0.7 if letter.isascii() else 1.0) for letter in text)
    return (1.17 if bold else 1.03) * size * ems


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


Sides = tuple[list[CellEdge], list[CellEdge]]
"""A cell's operations that enter from the left, and from the right."""


def choose_sides(cell: Cell, before: Sides | None = None) -> Sides:
    """Left and right edges: one of each state's two on either side, such that few lanes and few crossings result.

    `before`: those of the picture that this one follows; what is in both stays on its side.
    """
    kept = {(e.source, e.target): side for side, edges in enumerate(before or ()) for e in edges}
    pairs = [[e for e in cell.edges if e.target == 2 + i] for i in range(cell.states)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"cell {cell.title!r}: a state without exactly two operations cannot be drawn")
    best: tuple[tuple[float, ...], Sides] | None = None
    # 2^states ways; beyond eight states the first eight choose and the others keep their order
    for flips in itertools.product((0, 1), repeat=min(cell.states, 8)):
        turned = list(flips) + [0] * (cell.states - len(flips))
        left = [pair[flip] for pair, flip in zip(pairs, turned, strict=True)]
        right = [pair[1 - flip] for pair, flip in zip(pairs, turned, strict=True)]
        widths = [max(_lanes(side).values()) + 1 for side in (left, right)]
        wrong = sum(e.source == 1 for e in left) + sum(e.source == 0 for e in right)
        moved = sum(kept.get((e.source, e.target), 0) != 0 for e in left)
        moved += sum(kept.get((e.source, e.target), 1) != 1 for e in right)
        score = (moved, sum(widths), wrong, abs(widths[0] - widths[1]), *flips)
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


def _exits(cell: Cell, sides: Sides, label: float) -> tuple[list[_Exit], float, float]:
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


def _turns(exits: Sequence[_Exit], rows: int, wide: float) -> tuple[float, ...]:
    """Give each exit its level and drop; return how deep the levels below each row reach. `wide`: of an input.

    The farthest lane turns first (highest) and drops outermost, so that lines of one node never cross each other.
    """
    needed = []
    for row in range(rows):
        here = [x for x in exits if _row(x.source) == row]
        left, right = (sorted((x for x in here if x.side == side), key=lambda x: -x.reach) for side in (-1, 1))
        # what leaves the left input to the right meets what leaves the right one to the left: no level for both
        crossing = [(i, j) for i, x in enumerate(left) for j, y in enumerate(right) if x.source > y.source]
        lower = next(k for k in itertools.count() if all(i != j + k for i, j in crossing))
        for first, ordered in ((0, left), (lower, right)):
            for level, leaving in enumerate(ordered, first):
                leaving.level = _LEVEL * level
        depth = max(len(left), lower + len(right) if right else 0)
        for source in {x.source for x in here}:
            own = [x for x in here if x.source == source]
            own.sort(key=lambda x: x.side * x.reach)
            half = (wide / 2 if source < 2 else STATE_RADIUS) - 3.0
            step = min(_DROP, 2 * half / max(1, len(own) - 1))  # many lines move together: all leave from the rim
            for place, leaving in enumerate(own):
                leaving.drop = (place - (len(own) - 1) / 2) * step
        needed.append(_LEVEL * max(0, depth - 1))
    return tuple(needed)


def room_of(cell: Cell, sides: Sides, label: float = 0.0) -> Room:
    """The least room that a cell takes with its operations on these sides and labels of at least that width."""
    label = max(label, *(tag_width(edge) for edge in cell.edges))
    high = INPUT_HEIGHT + (CHIPS_HEIGHT if any(cell.inputs) else 0.0)
    wide = max(INPUT_WIDTH, *(chips_width(chips) + 14 for chips in cell.inputs))
    exits, left, right = _exits(cell, sides, label)
    return Room(label, wide, high, _turns(exits, cell.states + 1, wide), left, right)


def lay_out_cell(cell: Cell, sides: Sides, room: Room) -> Drawing:
    """Lay one cell out around x = 0, in its room or a larger one.

    All operations' labels have one width, so that they stand in columns.
    """
    drawing = Drawing()
    label, wide, high, needed = room.label, room.wide, room.high, room.needed
    exits, _, _ = _exits(cell, sides, label)
    _turns(exits, cell.states + 1, wide)
    names = {state: f"{cell.name}_{state_text(state)}" for state in range(cell.states + 2)}
    centres: dict[int, Point] = {}
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
    return drawing


@dataclass(frozen=True)
class Plan:
    """How several cells share a picture: the side of each operation, and the room of each cell."""

    sides: tuple[Sides, ...]
    rooms: tuple[Room, ...]


def label_width(cells: Iterable[Cell]) -> float:
    """Width of the widest operation's label."""
    return max(tag_width(edge) for cell in cells for edge in cell.edges)


def plan_picture(cells: Sequence[Cell]) -> Plan:
    """The plan of one picture."""
    (plan,) = plan_pictures([cells])
    return plan


def plan_pictures(pictures: Sequence[Sequence[Cell]]) -> list[Plan]:
    """The plans of pictures that follow each other: nodes and labels stay where they are, and so does every operation
    that two pictures have in common.
    """
    label = label_width(cell for cells in pictures for cell in cells)
    sides: list[tuple[Sides, ...]] = []
    for cells in pictures:
        before = sides[-1] if sides else [None] * len(cells)
        sides.append(tuple(choose_sides(cell, old) for cell, old in zip(cells, before, strict=True)))
    rooms: list[Room] = []
    for k, column in enumerate(zip(*pictures, strict=True)):
        several = [room_of(cell, side[k], label) for cell, side in zip(column, sides, strict=True)]
        rooms.append(functools.reduce(Room.joined, several))
    return [Plan(side, tuple(rooms)) for side in sides]


def lay_out(
    cells: Sequence[Cell],
    *,
    title: str,
    legend: Sequence[tuple[str, str]],
    widths: Sequence[tuple[str, float]] = (),
    plan: Plan | None = None,
) -> Drawing:
    """Lay the cells out side by side in one picture, each in its frame, with the legends below.

    `legend` lists (text, colour), in order, `widths` (text, points); empty: no such legend. `plan`: as `plan_picture`
    gives it, perhaps with larger rooms.
    """
    plan = plan or plan_picture(cells)
    parts = [lay_out_cell(cell, *how) for cell, *how in zip(cells, plan.sides, plan.rooms, strict=True)]
    top = _MARGIN + (_TITLE if title else 0.0)
    height = max(part.height for part in parts)
    whole = Drawing(title=title, legend=list(legend), widths=list(widths))
    frames = sum(room.left + room.right + 2 * _FRAME + _MARGIN for room in plan.rooms) + _MARGIN
    whole.width = max(frames, legends_width(whole))
    x = _MARGIN + (whole.width - frames) / 2
    for cell, part, room in zip(cells, parts, plan.rooms, strict=True):
        left, width = room.left, room.left + room.right + 2 * _FRAME
        frame = Box(x + width / 2, top + (height + _TITLE + 2 * _FRAME) / 2, width, height + _TITLE + 2 * _FRAME)
        whole.frames.append(Frame(cell.title, frame))
        placed = part.shifted(x + _FRAME + left, top + _FRAME + _TITLE)
        whole.nodes += placed.nodes
        whole.lines += placed.lines
        x += width + _MARGIN
    whole.height = top + height + _TITLE + 2 * _FRAME + _MARGIN
    add_legends(whole)
    return whole


def add_legends(drawing: Drawing) -> None:
    """Make room for the drawing's legends at its lower end."""
    if drawing.legend:
        drawing.legend_y = drawing.height + _LEGEND / 2 - _MARGIN / 2
        drawing.height += _LEGEND
    if drawing.widths:
        drawing.widths_y = drawing.height + (_WIDTHS - _MARGIN) / 2 - (_MARGIN / 2 if drawing.legend else 0)
        drawing.height += _WIDTHS


def _legend_item(text: str) -> float:
    """Width of a legend's entry: its sample, the text, and the distance to the next one."""
    return SWATCH + 8 + text_width(text, LEGEND_SIZE) + 10


def _legend_width(intro: str, entries: Sequence[tuple[str, object]]) -> float:
    return text_width(intro, LEGEND_SIZE) + 10 + sum(_legend_item(text) for text, _ in entries)


def legend_places(drawing: Drawing, intro: str, entries: Sequence[tuple[str, object]]) -> list[float]:
    """Left ends of the legend's introduction and of every entry's sample; the text stands SWATCH + 6 behind it."""
    x = (drawing.width - _legend_width(intro, entries)) / 2
    places = [x]
    x += text_width(intro, LEGEND_SIZE) + 10
    for text, _ in entries:
        places.append(x)
        x += _legend_item(text)
    return places


def legends_width(drawing: Drawing) -> float:
    """The least width of a canvas that shows the drawing's title and legends whole."""
    needed = [text_width(drawing.title, TITLE_SIZE, bold=True)]
    for intro, entries in ((LEGEND_INTRO, drawing.legend), (WIDTHS_INTRO, drawing.widths)):
        if entries:
            needed.append(_legend_width(intro, entries))
    return max(needed) + 2 * _MARGIN


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
