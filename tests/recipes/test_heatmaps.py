# SPDX-License-Identifier: Apache-2.0
"""Heat maps against histories written by hand: every edge, operation, cell and bit-width has its place and colour."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageFont

from common.recipes.heatmaps import choice_images, heat_maps
from genotypes import PRIMITIVES

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
# Two nodes: edges 0->2, 1->2, 0->3, 1->3, 2->3.
EDGES = ["c_{k-2} → 0", "c_{k-1} → 0", "c_{k-2} → 1", "c_{k-1} → 1", "0 → 1"]
CELLS = ["normal", "reduction", "normal"]


def softmax_row(width: int, peak: int, height: float = 0.6) -> list[float]:
    rest = (1 - height) / (width - 1)
    return [height if place == peak else rest for place in range(width)]


def history_row(epoch: int, **changes: Any) -> dict[str, Any]:
    """An epoch of a search of 2 nodes and 3 cells among 2 and 4 bits, every choice another one."""
    pairs = [["sep_conv_3x3", 0], ["skip_connect", 1], ["dil_conv_5x5", 0], ["sep_conv_5x5", 2]]
    gammas: dict[str, Any] = {}
    for operand in ("activation", "weight"):
        for kind, cells in (("normal", 2), ("reduce", 1)):
            gammas[f"{kind}_{operand}_preprocess0"] = [[0.9, 0.1]] * cells
            gammas[f"{kind}_{operand}_preprocess1"] = [[0.1, 0.9]] * cells
            gammas[f"{kind}_{operand}"] = [[[0.5, 0.5]] * 5] * cells
    cell = {"preprocess0": [2, 4], "preprocess1": [4, 4], "operations": [[2, 2], None, [4, 2], [2, 4]]}
    row = {
        "epoch": epoch,
        "genotype": {"normal": pairs, "normal_concat": [2, 3], "reduce": pairs, "reduce_concat": [2, 3]},
        "bits": {"kind": "cells", "mapping": "relative", "cells": [{"type": kind, **cell} for kind in CELLS]},
        "alphas": {kind: [softmax_row(8, edge + 1) for edge in range(5)] for kind in ("normal", "reduce")},
        "gammas": {name: [0.5, 0.5] for name in gammas},
        "gammas_by_place": gammas,
        "primitives": list(PRIMITIVES),
        "bit_choices": [2, 4],
    }
    return row | changes


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def texts(picture: bytes) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def images(picture: bytes) -> list[np.ndarray]:
    """The coloured fields in the order in which they were drawn, [rows, columns, 3], without the scales."""
    found = []
    for node in ElementTree.fromstring(picture).iter(f"{SVG}image"):
        data = base64.b64decode(node.attrib[LINK].partition(",")[2])
        found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int))
    return found


def inside(picture: bytes) -> None:
    """No text begins or ends outside the canvas, measured in the font that the picture asks for."""
    from matplotlib.font_manager import findfont

    root = ElementTree.fromstring(picture)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for node in root.iter(f"{SVG}text"):
        x, y = float(node.attrib.get("x", 0)), float(node.attrib.get("y", 0))
        found = re.search(r"font(?:-size)?:[^;]*?([\d.]+)px", node.attrib["style"])
        assert found is not None, node.attrib
        font = ImageFont.truetype(findfont("DejaVu Sans"), float(found[1]))
        long = font.getlength("".join(node.itertext()).strip())
        anchor = "end" if "text-anchor: end" in node.attrib["style"] else "start"
        anchor = "middle" if "text-anchor: middle" in node.attrib["style"] else anchor
        left = x - {"end": long, "middle": long / 2, "start": 0}[anchor]
        assert left >= -3 and left + long <= width + 3 and 0 <= y <= height, ElementTree.tostring(node)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    rows = [history_row(epoch) for epoch in range(4)]
    for row in rows[:2]:  # undecided at first
        row["alphas"] = {kind: [[0.125] * 8] * 5 for kind in ("normal", "reduce")}
    return heat_maps(written(tmp_path_factory.mktemp("run"), rows))


HEADS = (
    "gammas of weights by epoch: 4 bits (mean of an edge's operations)",
    "gammas of activations, epoch 4: each bit-width",
)


def test_every_map_has_its_labels_within_its_canvas(maps: dict[str, bytes]) -> None:
    assert list(maps) == ["alphas", "gammas", "bits"]
    shown = texts(maps["alphas"])
    assert all(shown.count(edge) == 2 for edge in EDGES)  # in both kinds of cell
    assert all(shown.count(name) == 4 for name in PRIMITIVES)  # once a line of blocks
    assert shown.count("●") == 8  # two operations a node
    gammas = texts(maps["gammas"])
    assert all(gammas.count(f"cell {k}, {kind}") == 4 for k, kind in enumerate(CELLS))
    assert {"c_{k-2}", "c_{k-1}", *EDGES, "4 bits", *HEADS} <= set(gammas)
    assert {"weights", "activations", "cell 0", "cell 2", "epoch 1", "4"} <= set(texts(maps["bits"]))
    for picture in maps.values():
        inside(picture)


def test_the_brightest_row_of_an_edge_is_its_likeliest_operation(maps: dict[str, bytes]) -> None:
    fields = [field for field in images(maps["alphas"]) if field.shape[0] == 8]
    assert len(fields) == 10
    for number, field in enumerate(fields):
        edge = number % 5
        assert field.shape[:2] == (8, 4), "a row an operation, a column an epoch"
        brightness = field.sum(-1)
        assert (brightness[:, 0] == brightness[0, 0]).all()  # nothing was decided in the first epoch
        assert brightness[:, -1].argmax() == edge + 1
        assert brightness[edge + 1, -1] > 1.5 * brightness[edge + 1, 0]


def test_three_bit_widths_have_a_map_each(tmp_path: Path) -> None:
    shares = [0.5, 0.0, 0.5]  # neither expected bits nor a mean can tell it from four bits of three
    table = by_kind([[shares] * 5] * 2, [[shares] * 5])
    row = history_row(0, gammas_by_place=table, bit_choices=[2, 3, 4])
    picture = heat_maps(written(tmp_path, [row]))["gammas"]
    shown = texts(picture)
    assert all(f"gammas of weights by epoch: {bits} bits (mean of an edge's operations)" in shown for bits in (2, 3, 4))
    fields = [field for field in images(picture) if field.shape[:2] == (5, 1)]
    assert len(fields) == 2 * 3 * len(CELLS)


def test_the_larger_and_each_width_have_their_colours(maps: dict[str, bytes]) -> None:
    fields = [field for field in images(maps["gammas"]) if field.shape[0] == 7]  # two inputs, five edges
    larger, now = fields[:6], fields[6:]
    assert len(now) == 6 and all(field.shape[1] == 4 for field in larger)
    for field in larger:  # 0.1, 0.9 and 0.5
        low, high, middle = (field[row, 0].sum() for row in (0, 1, 2))
        assert low < middle < high
    for field in now:
        assert field.shape[1] == 2 and field[0, 0].sum() > field[0, 1].sum() and field[1, 0].sum() < field[1, 1].sum()
        assert (field[2:, 0] == field[2:, 1]).all()


def test_chosen_bits_by_depth_end_with_their_mean(tmp_path: Path) -> None:
    rows = [history_row(epoch, alphas=None, gammas={}, gammas_by_place={}) for epoch in range(2)]
    rows[1]["bits"]["cells"][1] = {"type": "reduction", "preprocess0": [2, 2], "preprocess1": [2, 4], "operations": []}
    shown = texts(heat_maps(written(tmp_path, rows))["bits"])
    # weights 2 4 2 4 2 and activations 4 4 2 2 4 of a whole cell, and those of the changed one
    assert [text for text in shown if text.count(".") == 1 and len(text) == 4][:6] == [
        *("2.80", "2.00", "2.80"),
        *("3.20", "3.00", "3.20"),
    ]


def by_kind(normal: Any, reduce: Any) -> dict[str, Any]:
    """Gammas of both operands."""
    tables = {"normal": normal, "reduce": reduce}
    return {f"{kind}_{operand}": tables[kind] for kind in tables for operand in ("activation", "weight")}


def test_bits_by_layer_and_gammas_by_convolution(tmp_path: Path) -> None:
    names = ("cells.0.preprocess0.conv", "cells.1.operations.0.pointwise", "cells.2.preprocess1")
    layers = dict(zip(names, ([2, 4], [4, 2], [2, 2]), strict=True))
    gammas = by_kind([[0.5, 0.5]], [[0.5, 0.5]] * 2)
    row = history_row(0, alphas=None, bits={"kind": "layers", "layers": layers}, gammas_by_place=gammas)
    maps = heat_maps(written(tmp_path, [row]))
    assert list(maps) == ["gammas", "bits"]
    assert {"cell 0", "cell 1", "cell 2"} <= set(texts(maps["bits"]))
    # of 3 cells, the second and the third are reductions
    assert {"0.preprocess0.conv", "1.operations.0.pointwise", "2.preprocess1"} <= set(texts(maps["gammas"]))


def test_an_older_history_shows_the_means_that_it_has(tmp_path: Path) -> None:
    row = history_row(0)
    for key in ("gammas_by_place", "primitives", "bit_choices"):
        del row[key]
    maps = heat_maps(written(tmp_path, [row]))
    shown = texts(maps["gammas"])
    assert "normal cells, their mean" in shown and "preprocess0" in shown and "4 bits" in shown
    assert set(PRIMITIVES) <= set(texts(maps["alphas"]))


def test_own_operations_have_their_names_and_a_uniform_choice_no_map_of_bits(tmp_path: Path) -> None:
    names = ["none", "skip_connect", "my_operation"]
    alphas = {kind: [softmax_row(3, 2)] * 5 for kind in ("normal", "reduce")}
    bits = {"kind": "uniform", "uniform": [2, 2]}
    row = history_row(0, alphas=alphas, primitives=names, bits=bits, gammas={}, gammas_by_place={}, bit_choices=None)
    maps = heat_maps(written(tmp_path, [row]))
    assert list(maps) == ["alphas"] and "my_operation" in texts(maps["alphas"])


def test_a_training_has_no_choices(tmp_path: Path) -> None:
    assert heat_maps(written(tmp_path, [{"epoch": 0, "train_loss": 1.0}])) == {}


@pytest.mark.parametrize(
    "damage",
    [
        {"alphas": {"normal": [["x"]]}},
        {"alphas": {"normal": [[0.1], [0.1, 0.2]]}},
        {"genotype": {"normal": [3]}},
        {"gammas_by_place": {"normal_weight": "no"}},
        {"bits": {"kind": "cells", "cells": [3]}},
        {"bits": {"kind": "layers", "layers": {"cells.0.x": None}}},
    ],
)
def test_damaged_choices_name_the_file(tmp_path: Path, damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"history.jsonl: its choices cannot be read .* the file is damaged"):
        heat_maps(written(tmp_path, [history_row(0, **damage)]))


def test_an_epoch_as_pixels(tmp_path: Path) -> None:
    found = choice_images(history_row(6))
    assert list(found) == ["alphas", "gammas"]
    for image in found.values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) > 100
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20  # not blank
    assert choice_images({"epoch": 0, "train_loss": 1.0}) == {}


def test_more_nodes_and_more_cells_than_fit_a_line(tmp_path: Path) -> None:
    alphas = {kind: [softmax_row(8, 3)] * 20 for kind in ("normal", "reduce")}  # five nodes
    types = ["reduction" if depth in (3, 6) else "normal" for depth in range(9)]
    bits = {"kind": "cells", "cells": [{"type": kind, "operations": [[2, 4]]} for kind in types]}
    gammas = by_kind([[[0.2, 0.8]] * 20] * 7, [[[0.2, 0.8]] * 20] * 2)
    maps = heat_maps(written(tmp_path, [history_row(0, alphas=alphas, bits=bits, gammas_by_place=gammas)]))
    assert {"cell 6, reduction", "cell 8, normal"} <= set(texts(maps["gammas"])) and "3 → 4" in texts(maps["alphas"])
    for picture in maps.values():
        inside(picture)
