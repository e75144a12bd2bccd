# SPDX-License-Identifier: Apache-2.0
"""Geometry of drawings of cells: what lies inside what, and what keeps its distance."""

from __future__ import annotations

import itertools

from common.recipes.cell_layout import Box, Drawing, Line


def inside(inner: Box, outer: Box) -> bool:
    return (
        abs(inner.x - outer.x) + inner.width / 2 <= outer.width / 2 + 1e-9
        and abs(inner.y - outer.y) + inner.height / 2 <= outer.height / 2 + 1e-9
    )


def apart(one: Box, other: Box, gap: float = 0.0) -> bool:
    return (
        abs(one.x - other.x) >= (one.width + other.width) / 2 + gap
        or abs(one.y - other.y) >= (one.height + other.height) / 2 + gap
    )


def segments(line: Line) -> list[Box]:
    """A line's straight parts as boxes without width."""
    return [
        Box((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, abs(a[0] - b[0]), abs(a[1] - b[1]))
        for a, b in itertools.pairwise(line.points)
    ]


def assert_nothing_is_cut_or_covered(drawing: Drawing) -> None:
    """All is within its frame and the canvas; no node, label or line comes close to a node or label that is not its."""
    canvas = Box(drawing.width / 2, drawing.height / 2, drawing.width, drawing.height)
    assert all(inside(frame.box, canvas) for frame in drawing.frames)
    tags = [line.tag for line in drawing.lines if line.tag is not None]
    boxes = [node.box for node in drawing.nodes] + tags
    for box in boxes + [part for line in drawing.lines for part in segments(line)]:
        assert any(inside(box, frame.box) for frame in drawing.frames)
    for one, other in itertools.combinations(boxes, 2):
        assert apart(one, other, 3.0)
    for line in drawing.lines:
        others = [tag for tag in tags if tag is not line.tag]
        assert all(apart(part, tag, 3.0) for part in segments(line) for tag in others)
        around = [node.box for node in drawing.nodes if node.name not in (line.tail, line.head)]
        assert all(apart(part, box, 3.0) for part in segments(line) for box in around)
