# SPDX-License-Identifier: Apache-2.0
"""The Pareto plot: its front against the definition, its names where they cover nothing, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from common.recipes.pareto import COSTS, Point, _paint, _points, _window, draw_pareto, fronts, pareto_front
from common.recipes.records import Record
from common.recipes.rows import Row

SIZE = (("init_channels", 8), ("image_size", 16), ("n_train", 1000), ("n_test", 500))


def row(method: str, cost: float, accuracy: float, bits: tuple[float, float] | None = (2, 2), **changes: object) -> Row:
    """A row of three runs around this accuracy, 1 point apart."""
    records = []
    for seed, share in enumerate((accuracy - 0.01, accuracy, accuracy + 0.01)):
        known = {
            "folder": Path(f"{method}-{cost}-{seed}"),
            "stage": "train",
            "dataset": "digits",
            "finished": True,
            "correct": round(500 * share),
            "n_test": 500,
            "size": SIZE,
            "numbers": dict.fromkeys(COSTS, cost),
        }
        records.append(Record(**{**known, "method": method, "seed": seed, "bits": bits, "accuracy": share, **changes}))
    return Row(tuple(records))


def table() -> list[Row]:
    """Four methods, some of them close together, full precision, and one at chance."""
    rows = [row("one", 12e9, 0.71, None), row("two", 48e6, 0.12), row("two", 190e6, 0.66, (4, 4))]
    rows += [row("three", 50e6 * k, 0.6 + 0.01 * k, (2, k)) for k in range(1, 7)]
    return rows + [row("four", 52e6 * k, 0.6 + 0.011 * k, (3, k)) for k in range(1, 7)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)

    def beaten(index: int) -> bool:
        cost, accuracy = points[index]
        return any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)

    assert sorted(front) == [index for index in range(len(points)) if not beaten(index)]
    assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_front_by_hand() -> None:
    assert pareto_front([(4, 9), (1, 5), (2, 5), (3, 8), (3, 7), (9, 9)]) == [1, 3, 0]


@pytest.mark.parametrize(
    ("form", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")], ids=["svg", "png", "pdf"]
)
def test_formats_are_written_and_repeat(form: str, start: bytes) -> None:
    image, left_out = draw_pareto(table(), "bitops", form)
    assert image.startswith(start) and not left_out
    assert draw_pareto(table(), "bitops", form)[0] == image


@pytest.mark.parametrize("cost", list(COSTS))
def test_costs_have_an_axis(cost: str) -> None:
    found = names(draw_pareto(table(), cost, "svg")[0])
    assert f"{COSTS[cost][0]} (log scale)" in found
    assert {f"100 M{COSTS[cost][1]}", f"1 G{COSTS[cost][1]}"} <= found.keys()


def names(image: bytes) -> dict[str, tuple[float, float]]:
    """Texts of an SVG picture and where they begin, in points from the upper left (nan: several lines)."""
    found = {}
    for element in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text"):
        found["".join(element.itertext())] = (float(element.get("x", "nan")), float(element.get("y", "nan")))
    return found


def test_every_row_is_named_and_no_name_covers_another() -> None:
    rows = table()
    found = names(draw_pareto(rows, "bitops_quantized", "svg")[0])
    wanted = [f"{r.first.method} {r.bits_label}" for r in rows]
    wanted[1] += ": 12.0%"  # at the lower edge, far below the others, with its figure
    assert set(wanted) <= found.keys()
    # letters of 8 points are about 4.6 wide and 9 high
    boxes = [(found[name], 4.4 * len(name)) for name in wanted]
    for ((x, y), width), ((u, v), length) in combinations(boxes, 2):
        assert abs(y - v) > 8 or x + width < u or u + length < x
    assert found["one fp32"][1] < found["three 2/6"][1] < found["two 2/2: 12.0%"][1]  # higher is better


def test_one_row_and_equal_rows_can_be_drawn() -> None:
    assert "one 2/2" in names(draw_pareto([row("one", 1e6, 0.5)], "bitops", "svg")[0])
    same = [row(name, 1e6, 0.98) for name in ("one", "two", "three")]
    found = names(draw_pareto(same, "bitops", "svg")[0])
    assert min(math.dist(found[f"{a} 2/2"], found[f"{b} 2/2"]) for a, b in combinations(("one", "two", "three"), 2)) > 8


def point(accuracy: float, low: float, high: float) -> Point:
    return Point(1e6, accuracy, low, high, "", 0, False)


def test_the_picture_holds_all_intervals() -> None:
    points = [point(10.0, 7.3, 13.5), point(10.3, 8.0, 13.0), point(9.8, 9.0, 11.0)]
    low, high = _window(points)
    assert low < 7.3 and 13.5 < high < 16
    assert _window([point(99.0, -20.0, 120.0)])[0] < 0 and _window([point(99.0, -20.0, 120.0)])[1] < 110
    # one far below goes to the edge, unless an interval of the others reaches down to it: then its own is held too
    near = [point(90.0, 89.0, 91.0), point(91.0, 90.0, 92.0), point(92.0, 91.0, 93.0)]
    assert 85 < _window([*near, point(60.0, 55.0, 65.0)])[0] < 89
    assert _window([*near[:2], point(92.0, 58.0, 96.0), point(60.0, 55.0, 65.0)])[0] < 55


def test_the_later_of_two_marks_on_one_spot_leaves_the_other_in_sight() -> None:
    def marks(*costs: float) -> list[tuple[float, bool]]:
        """Size and whether it has an edge in white, of each mark in the order of drawing."""
        figure = Figure()
        axes = figure.add_subplot(xscale="log", xlim=(1e5, 1e8), ylim=(0, 100))
        points = [replace(point(50.0, 45.0, 55.0), cost=cost, method=place) for place, cost in enumerate(costs)]
        _paint(axes, points)
        drawn = [line for line in axes.lines if line.get_marker() in "os^" and len(line.get_xdata()) == 1]
        return [(line.get_markersize(), bool(line.get_path_effects())) for line in drawn]

    assert marks(1e6, 1e7) == [(6.5, False)] * 2
    (first, bare), (second, edged), (third, again) = marks(1e6, 1e6, 1e6)
    assert first > second > third and (bare, edged, again) == (False, True, True)
    # the marks of two rows that read the same have names that tell them apart
    rows = [row("one", 1e6, 0.5, folder=Path(f"runs/{name}/train")) for name in "ab"]
    found = names(draw_pareto(rows, "bitops", "svg")[0])
    assert math.dist(found["one 2/2 a/train +2"], found["one 2/2 b/train +2"]) > 8


def test_words_that_tell_rows_apart_are_short() -> None:
    one = row("one", 1e6, 0.5, settings={"weight_quantizer": "lsq", "activation_quantizer": "lsq", "decay": 0.5})
    two = row("one", 1e6, 0.6, settings={"weight_quantizer": "gaussian", "activation_quantizer": "hwgq", "decay": 1.0})
    found = names(draw_pareto([one, two], "bitops", "svg")[0])
    assert {"one 2/2 lsq decay=0.5", "one 2/2 hwgq decay=1 gaussian"} <= found.keys()
    rows = [row("one", 1e6, 0.5, architecture=name, settings={"search.decay": 1}) for name in ("found", "PC_DARTS")]
    rows.append(row("one", 1e6, 0.6, (4, 4), architecture="found"))
    found = names(draw_pareto(rows, "bitops", "svg")[0])
    assert {"one 2/2 found", "one 2/2 PC_DARTS", "one 4/4"} <= found.keys()


def test_rows_of_other_sizes_are_named_and_those_trained_longer_have_a_front_of_their_own() -> None:
    def sized(method: str, cost: float, accuracy: float, **size: int) -> Row:
        return row(method, cost, accuracy, size=tuple((dict(SIZE) | {"epochs": 20} | size).items()))

    rows = [sized("a", 1e6, 0.5), sized("b", 2e6, 0.6), sized("wide", 3e6, 0.7, init_channels=16)]
    found = names(draw_pareto(rows, "bitops", "svg")[0])
    assert {"a 2/2", "b 2/2", "wide 2/2 init_channels=16"} <= found.keys()
    assert any("init_channels=8 unless said" in text for text in found) and not any("epochs" in text for text in found)
    # better and cheaper than all, but trained for longer: the others keep their filled marks and their line
    rows.append(sized("long", 5e5, 0.8, epochs=40))
    image = draw_pareto(rows, "bitops", "svg")[0]
    found = names(image)
    assert "long 2/2 epochs=40" in found and any("epochs=20, init_channels=8 unless said" in text for text in found)
    points, _ = _points(rows, "bitops")
    assert [[points[i].name[:4].strip() for i in members] for members in fronts(points)] == [
        ["a 2/", "b 2/", "wide"],
        ["long"],
    ]
    assert fronts(_points(rows[:3], "bitops")[0]) == [[0, 1, 2]]


def test_what_cannot_be_drawn_is_said() -> None:
    bare = row("bare", 1e6, 0.5, numbers={})
    unfinished = row("late", 1e6, 0.5, finished=False)
    image, left_out = draw_pareto([*table(), bare, unfinished], "bitops", "svg")
    assert [text.split(": ")[1] for text in left_out] == ["not finished", "no bitops"]
    assert not any("bare" in name or "late" in name for name in names(image))
    with pytest.raises(ValueError, match="no finished training"):
        draw_pareto([bare, unfinished], "bitops", "svg")
    for changes in ({"dataset": "mnist"}, {"size": (*SIZE[:-1], ("n_test", 400))}):
        with pytest.raises(ValueError, match="cannot share a picture"):
            draw_pareto([*table(), row("other", 1e6, 0.5, **changes)], "bitops", "svg")
