# SPDX-License-Identifier: Apache-2.0
"""The picture of a whole network: every cell, its bits and where they come from; which network a target means."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy
import pytest
from PIL import Image

from common.cost import architecture_cost
from common.nets import load_architecture
from common.recipes.cell_style import OTHER_COLOUR
from common.recipes.grown import draw_grown
from common.recipes.grown_network import grow
from common.recipes.target import Target, open_target
from tests.helpers.fake_history import epoch, finish, write_search
from tests.helpers.fake_runs import architecture_json, train_result, write_run

# Depths of eight searched and of twenty trained cells, as the design says: the same relative place within a stage.
RELATIVE = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7, 7]
# The reference's: the first seven normal cells and both reductions in order of their type, then the first of the type.
PAPER = {0: 0, 1: 1, 2: 3, 3: 4, 4: 6, 5: 7, 6: 2, 7: 0, 12: 0, 13: 2, 19: 0}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A finished search of eight cells, for a network of twenty."""
    folder = tmp_path_factory.mktemp("grown") / "search"
    row = epoch(0, cells=8)
    write_search(folder, [row], eval_layers=20, eval_init_channels=4)
    finish(folder, row)
    return open_target(str(folder))


def texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return ["".join(item.itertext()).strip() for item in root.iter() if item.tag.endswith("}text")]


def test_cells_take_the_bits_of_the_same_depth(searched: Target) -> None:
    grown = grow(searched)
    assert [cell.source for cell in grown.cells] == RELATIVE
    assert [cell.index for cell in grown.cells if cell.reduction] == [6, 13]
    assert [cell.channels for cell in grown.cells] == [4] * 6 + [8] * 7 + [16] * 7
    assert [cell.pixels for cell in grown.cells] == [16] * 6 + [8] * 7 + [4] * 7  # digits: 16 pixels
    policy = epoch(0, cells=8)["bits"]["cells"]
    for cell in grown.cells:
        given = policy[RELATIVE[cell.index]]
        assert [set(bits) for _, bits in cell.inputs] == [{tuple(given[f"preprocess{i}"])} for i in range(2)]
        for (_, _, bits), pair in zip(cell.operations, given["operations"], strict=True):
            assert set(bits) == (set() if pair is None else {tuple(pair)})


def test_the_papers_mapping(searched: Target) -> None:
    grown = grow(searched, mapping="paper")
    assert {index: grown.cells[index].source for index in PAPER} == PAPER


def test_the_cost_is_that_of_the_network(searched: Target) -> None:
    build = {"in_channels": 1, "num_classes": 10, "init_channels": 4, "stem": "cifar"}
    for layers in (5, 20):
        grown = grow(searched, layers=layers)
        cost = architecture_cost(searched.architecture, 16, layers=layers, **build)
        assert grown.bitops == cost.bitops and len(grown.cells) == layers
        by_cell = Counter()
        for layer in cost.layers:
            by_cell[layer.name.split(".")[1] if layer.name.startswith("cells.") else "ends"] += layer.bitops
        assert {str(cell.index): cell.bitops for cell in grown.cells} | {"ends": by_cell["ends"]} == by_cell


def test_the_svg_says_every_cell_and_bit(searched: Target, tmp_path: Path) -> None:
    grown = grow(searched)
    (svg,) = draw_grown(grown, tmp_path / "new" / "grown", formats=["svg"], title="mine")
    (png,) = draw_grown(grow(searched, layers=3), tmp_path / "grown", formats=["png"], title="mine")
    assert (svg.name, png.name) == ("grown.svg", "grown.png")
    said = Counter(texts(svg))
    for cell in grown.cells:
        assert said[f"{cell.index}  {'reduction' if cell.reduction else 'normal'}"] == 1
    for index in range(8):
        assert said[f"cell {index}"] == 1
    operations = Counter(operation for cell in grown.cells for operation, _, _ in cell.operations)
    assert all(said[operation] == count for operation, count in operations.items())
    places = [bits[0] for cell in grown.cells for _, bits in cell.inputs]
    places += [bits[0] for cell in grown.cells for _, _, bits in cell.operations if bits]
    for letter, place in (("w", 0), ("a", 1)):
        for bits in (2, 4):
            assert said[f"{letter}{bits}"] == sum(pair[place] == bits for pair in places)
    assert said["stem"] == said["pool, classifier"] == said["2 bits"] == said["mine"] == 1
    assert said["32 bits (float)"] == 0
    image = numpy.asarray(Image.open(png).convert("RGB"))
    assert len(numpy.unique(image.reshape(-1, 3), axis=0)) > 50
    assert 0.5 < (image > 240).all(axis=2).mean() < 0.99


def test_every_text_is_on_the_canvas_and_none_covers_another(
    searched: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by the painter itself, of a wide and of a narrow picture, with a long title."""
    from common.recipes import grown as module

    measured = []
    saved = module.painter.saved

    def measuring(axes: object, form: str) -> bytes:
        figure = axes.figure  # type: ignore[attr-defined]
        figure.canvas.draw()
        boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts]  # type: ignore[attr-defined]
        measured.append((figure.bbox, boxes))
        return saved(axes, form)

    monkeypatch.setattr(module.painter, "saved", measuring)
    (tmp_path / "two.json").write_text(json.dumps(two_nodes()))
    title = "a run of a name that is longer than its picture is wide " * 3
    draw_grown(grow(searched, layers=5), tmp_path / "a", formats=["svg"], title=title)
    draw_grown(grow(open_target(str(tmp_path / "two.json")), layers=2), tmp_path / "b", formats=["svg"], title=title)
    for canvas, boxes in measured:
        for text, box in boxes:
            assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and canvas.y0 <= box.y0 and box.y1 <= canvas.y1, text
        for number, (text, box) in enumerate(boxes):
            for other, place in boxes[number + 1 :]:
                across = min(box.x1, place.x1) - max(box.x0, place.x0)
                down = min(box.y1, place.y1) - max(box.y0, place.y0)
                assert across <= 0.5 or down <= 2.5, (text, other)  # lines of a box: descenders and ascenders may meet


def two_nodes() -> dict[str, object]:
    pairs = [["skip_connect", 0], ["skip_connect", 1], ["skip_connect", 2], ["skip_connect", 0]]
    genotype = {"normal": pairs, "normal_concat": [2, 3], "reduce": pairs, "reduce_concat": [2, 3]}
    return architecture_json("two") | {"genotype": genotype, "bits": {"kind": "uniform", "uniform": [2, 2]}}


def test_full_precision_and_left_out_bits_show_none(searched: Target, tmp_path: Path) -> None:
    plain = grow(open_target("PC_DARTS"), layers=2)
    (svg,) = draw_grown(plain, tmp_path / "plain", formats=["svg"], title="plain")
    (left,) = draw_grown(grow(searched, layers=3).shown(bits=False), tmp_path / "left", formats=["svg"], title="left")
    for path in (svg, left):
        said = texts(path)
        assert "no weights" not in said and not {"w2", "w4", "w32", "a32", "searched", "inputs"} & set(said)
    with pytest.raises(ValueError, match="--bits: the network has no bits"):
        plain.shown(bits=True)


def test_a_finished_training_is_drawn_as_it_was_trained(tmp_path: Path) -> None:
    bits = {"kind": "uniform", "uniform": [2, 4]}
    network = {"init_channels": 8, "layers": 5, "stem": "cifar", "in_channels": 1, "num_classes": 10, "image_size": 16}
    result = train_result(network=network | {"folded": True, "stem_bits": 8})
    folder = write_run(tmp_path / "run", result, architecture=architecture_json(None, bits=bits))
    grown = grow(open_target(str(folder)))
    assert grown.text == "5 cells, 8 channels, 16x16 pixels (as trained)"
    assert grown.stem == ((8, 8),) and grown.classifier == ((32, 32),)
    assert all(set(pairs) <= {(2, 4)} for cell in grown.cells for _, _, pairs in cell.operations)


def test_images_of_an_unknown_size_have_no_pixels_and_no_cost(tmp_path: Path) -> None:
    row = epoch(0)
    folder = write_search(tmp_path / "run", [row], dataset="folder", eval_layers=4)
    grown = grow(open_target(str(folder)))
    assert not grown.pixels_known and grown.bitops is None and grown.text == "4 cells, 8 channels (by the run's flags)"
    (svg,) = draw_grown(grown, tmp_path / "grown", formats=["svg"], title="unknown")
    assert "8 channels" in texts(svg) and not any("BitOps" in text for text in texts(svg))


def test_how_many_classes_imagenets_folder_holds_is_not_guessed(tmp_path: Path) -> None:
    """Its classifier's cost depends on them; that of the cells does not."""
    flags = {"dataset": "imagenet", "image_size": 32, "eval_layers": 3}
    unknown, known = (
        grow(open_target(str(write_search(tmp_path / name, [epoch(0)], **flags, **more))))
        for name, more in (("unknown", {}), ("known", {"classes": 7}))
    )
    assert unknown.cells == known.cells and unknown.bitops is None
    build = {"in_channels": 3, "num_classes": 7, "init_channels": 8, "layers": 3, "stem": "cifar"}
    assert known.bitops == architecture_cost(known.architecture, 32, **build).bitops
    total = sum(cell.bitops for cell in known.cells)
    for grown, end in ((unknown, ""), (known, f", {known.bitops / 1e6:.3g} M in all")):
        (svg,) = draw_grown(grown, tmp_path / "grown", formats=["svg"], title="classes")
        assert f"{grown.text}; {total / 1e6:.3g} M BitOps in its cells{end}" in texts(svg)


def test_micro_cells_show_their_types(tmp_path: Path) -> None:
    cells = "0 0 1 2 1 0 2 4  0 0 0 1 2 3 2 1"
    grown = grow(open_target(cells), layers=2)
    assert [cell.kind for cell in grown.cells] == ["kbit4", "ternary", "ternary", "ternary"]
    assert [cell.reduction for cell in grown.cells] == [True, True, True, False]
    (svg,) = draw_grown(grown, tmp_path / "grown", formats=["svg"], title="micro")
    said = texts(svg)
    assert said.count("sep_conv_5x5") == 2 * 3 and said.count("identity") == 1
    assert sum("kbit4" in text for text in said) == 1
    assert "other bits" not in said and OTHER_COLOUR not in svg.read_text()  # sums of more bits stand on "differs"


def test_the_tenth_operation_is_not_the_first() -> None:
    """Six blocks: their second operation has no weights, the eleventh and twelfth have."""
    cells = "0 2 1 2 " + "0 2 0 2 " * 4 + "0 0 1 1"
    grown = grow(open_target(f"{cells} {cells}"), layers=2)
    for cell in grown.cells:
        assert [bool(bits) for _, _, bits in cell.operations] == [False] * 10 + [True] * 2


def test_what_cannot_be_grown_says_why(searched: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--bit-mapping: the bits are not those of searched cells"):
        grow(open_target("PC_DARTS"), mapping="paper")
    folder = write_search(tmp_path / "run", [epoch(0, cells=5)])
    with pytest.raises(ValueError, match="search of 8 cells"):
        grow(open_target(str(folder)), mapping="paper")
    with pytest.raises(ValueError, match="--format gif: is no picture's"):
        draw_grown(grow(searched), tmp_path / "x", formats=["gif"], title="x")
    damaged = write_search(tmp_path / "damaged", [epoch(0)], eval_layers="8")
    with pytest.raises(ValueError, match="config.json: layers is '8', no size of a network"):
        grow(open_target(str(damaged)))
    layers = {"cells.0.preprocess0.op.1": [2, 2]}
    data = architecture_json("layers", bits={"kind": "layers", "layers": layers})
    (tmp_path / "layers.json").write_text(json.dumps(data))
    assert load_architecture(tmp_path / "layers.json").bits is not None
    with pytest.raises(ValueError, match="bits.layers"):
        grow(open_target(str(tmp_path / "layers.json")))
