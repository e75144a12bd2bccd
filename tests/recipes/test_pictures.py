# SPDX-License-Identifier: Apache-2.0
"""Pictures of cells: what they say, that nothing is cut or covered, both painters, same bytes twice."""

from __future__ import annotations

import itertools
import re
import shutil
import string
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from common.nets.architecture import Architecture, BitPolicy, CellBits, needs_bits
from common.nets.enas_space import SPACE, parse_cells, random_cells
from common.recipes import cell_layout, cell_style, pictures
from common.recipes.cell_layout import LETTER_WIDTH, Box, Drawing, rounded
from genotypes import GENOTYPES, Genotype
from tests.helpers.drawings import apart, assert_nothing_is_cut_or_covered, inside, segments

DOT = pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz' dot")
PAINTERS = [pytest.param("graphviz", marks=DOT), "matplotlib"]
COLOURS = cell_style.BIT_COLOURS | {0: cell_style.MIXED_COLOUR}
TWO_NODES = Genotype(
    normal=(("sep_conv_3x3", 0), ("skip_connect", 1), ("avg_pool_3x3", 2), ("max_pool_3x3", 0)),
    normal_concat=(2, 3),
    reduce=(("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 2), ("dil_conv_5x5", 1)),
    reduce_concat=(3,),
)


def searched(genotype: Genotype) -> Architecture:
    """Eight cells: weights 2 but 4 in the last normal cell's first operation, activations 4 everywhere."""
    cells = []
    for k in range(8):
        reduction = k in (2, 5)
        pairs = genotype.reduce if reduction else genotype.normal
        bits: list[tuple[int, int] | None] = []
        for operation, state in pairs:
            bits.append((2, 4) if needs_bits(operation, 2 if reduction and state < 2 else 1) else None)
        if k == 7 and bits[0] is not None:
            bits[0] = (4, 4)
        cells.append(CellBits(reduction, (2, 4), (3, 8), tuple(bits)))
    return Architecture(genotype, BitPolicy(cells=tuple(cells)), name="searched")


def layouts() -> list[Drawing]:
    found = []
    for genotype in [*GENOTYPES.values(), TWO_NODES]:
        found.append(pictures.lay_out_architecture(Architecture(genotype)))
        found.append(pictures.lay_out_architecture(searched(genotype)))
    generator = torch.Generator().manual_seed(7)
    for blocks in (1, 2, 3, 5, 5, 5, 5, 8, 8):
        found.append(pictures.lay_out_architecture(Architecture(random_cells(blocks, generator), space=SPACE)))
    # everything reads the inputs crosswise; everything reads one state; both inputs go unread
    for text in ("1 0 0 1 1 2 0 3 1 4 0 0", "0 0 0 0 2 0 2 0 2 1 2 1 2 2 2 2 2 3 2 4 2 0 2 1"):
        found.append(pictures.lay_out_architecture(Architecture(parse_cells(f"{text} {text}"), space=SPACE)))
    return found


def test_nothing_is_cut_and_nothing_covers_a_label() -> None:
    for drawing in layouts():
        assert_nothing_is_cut_or_covered(drawing)


def test_operations_never_run_on_top_of_each_other() -> None:
    for drawing in layouts():
        lines = [line for line in drawing.lines if line.edge is not None]
        for one, other in itertools.combinations(lines, 2):
            for a, b in itertools.product(segments(one), segments(other)):
                if (a.width == 0) == (b.width == 0):  # parallel ones keep their distance, others may cross
                    assert apart(a, b, 2.0), (one, other)


def test_many_lines_of_one_state_all_leave_from_its_rim() -> None:
    text = " ".join(["0 0 1 0", *["2 0 2 1"] * 7])
    drawing = pictures.lay_out_architecture(Architecture(parse_cells(f"{text} {text}"), space=SPACE))
    boxes = {node.name: node.box for node in drawing.nodes}
    starts = [line.points[0] for line in drawing.lines if line.tail == "normal_0"]
    assert len(starts) == 14 and len(set(starts)) == 14
    for x, y in starts:
        circle = boxes["normal_0"]
        assert abs(((x - circle.x) ** 2 + (y - circle.y) ** 2) ** 0.5 - circle.width / 2) < 1e-6


def test_lines_join_the_states_that_the_genotype_names() -> None:
    drawing = pictures.lay_out_architecture(Architecture(GENOTYPES["AmoebaNet"]))
    boxes = {node.name: node.box for node in drawing.nodes}
    genotype = GENOTYPES["AmoebaNet"]
    names = ["c_{k-2}", "c_{k-1}", *map(str, range(5))]
    for kind, pairs, concat in (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduce", genotype.reduce, genotype.reduce_concat),
    ):
        lines = [line for line in drawing.lines if line.tail.startswith(kind)]
        drawn = Counter((ln.tail, ln.head, ln.edge.operation) for ln in lines if ln.edge)
        wanted = [(f"{kind}_{names[s]}", f"{kind}_{i // 2}", op) for i, (op, s) in enumerate(pairs)]
        assert drawn == Counter(wanted)
        output = {(line.tail, line.head) for line in lines if line.edge is None}
        assert output == {(f"{kind}_{names[s]}", f"{kind}_c_{{k}}") for s in concat}
        for line in lines:
            tail, head = boxes[line.tail], boxes[line.head]
            start, end = line.points[0], line.points[-1]
            assert inside(Box(*start, 0, 0), tail) and inside(Box(*end, 0, 0), head)


def test_rounded_corners_stay_on_the_way() -> None:
    curve = rounded([(0, 0), (0, 50), (40, 50)])
    assert len(curve) % 3 == 1 and curve[0] == (0, 0) and curve[-1] == (40, 50)
    assert (0, 43) in curve and (7, 50) in curve
    assert all(0 <= x <= 40 and 0 <= y <= 50 for x, y in curve)


def texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return ["".join(item.itertext()).strip() for item in root.iter() if item.tag.endswith("}text")]


@pytest.mark.parametrize("painter", PAINTERS)
def test_svg_says_every_operation_state_and_bit(tmp_path: Path, painter: str) -> None:
    genotype = GENOTYPES["PC_DARTS_cifar"]
    paths = pictures.draw_cells(searched(genotype), tmp_path / "cells", formats=["svg"], painter=painter)
    assert paths == [tmp_path / "cells.svg"]
    said = Counter(texts(paths[0]))
    for operation, count in Counter(op for op, _ in genotype.normal + genotype.reduce).items():
        assert said[operation] == count
    for state in ("c_{k-2}", "c_{k-1}", "0", "1", "2", "3", "c_{k}"):
        assert said[state] == 2
    # normal cell: sep, skip, sep, dil, sep, sep, avg_pool, dil; reduction: 7 of 8 with weights; and 4 inputs
    assert said["w2-4"] == 1 and said["w2"] == 5 + 7 + 2
    assert said["a4"] == 6 + 7 + 2 and said["a8"] == said["w3"] == 2
    for text in ("2 bits", "3 bits", "4 bits", "8 bits", "differs within or between cells", "no weights", "searched"):
        assert said[text] == 1
    assert "32 bits (float)" not in said


def drawn_widths(svg: Path, painter: str) -> Counter[float]:
    """Width of every curve in the picture but those of width 1: thin strokes are rims of boxes too."""
    if painter == "graphviz":
        root = ElementTree.parse(svg).getroot()
        paths = [item for item in root.iter() if item.tag.endswith("}path") and item.attrib["fill"] == "none"]
        return Counter(round(float(item.attrib.get("stroke-width", 1)), 2) for item in paths)
    found = re.findall(r'style="fill: none;[^"]*stroke-width: ([\d.]+)', svg.read_text())
    return Counter(round(float(width), 2) for width in found)


@pytest.mark.parametrize("painter", PAINTERS)
def test_lines_are_as_wide_as_the_choices_are_sure(tmp_path: Path, painter: str) -> None:
    """1 + 3.6 sqrt(margin) points, and a legend that says which margin has which width."""
    genotype = GENOTYPES["DARTS_V1"]
    margins = {"normal": [0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81], "reduce": [0.0004] * 8}
    architecture = Architecture(genotype)
    (path,) = pictures.draw_cells(architecture, tmp_path / "a", formats=["svg"], margins=margins, painter=painter)
    widths = drawn_widths(path, painter)
    for margin in margins["normal"]:
        assert widths[round(1 + 3.6 * margin**0.5, 2)] == 1, (margin, widths)
    assert widths[round(1 + 3.6 * 0.02, 2)] == 8
    said = texts(path)
    assert "line width, by how much the choice leads in the softmax:" in said
    assert {"0", "0.01", "0.1", "0.5", "1"} <= set(said)
    (plain,) = pictures.draw_cells(architecture, tmp_path / "b", formats=["svg"], painter=painter)
    assert drawn_widths(plain, painter)[1.6] == 16 and not any("softmax" in text for text in texts(plain))


def test_pixels_and_svg_of_cells_for_other_pictures() -> None:
    architecture = searched(TWO_NODES)
    small, large = (pictures.cells_rgb(architecture, dpi=dpi) for dpi in (50, 100))
    assert small.dtype == numpy.uint8 and small.shape[2] == 3
    assert abs(large.shape[1] - 2 * small.shape[1]) <= 2 and len(numpy.unique(large.reshape(-1, 3), axis=0)) > 50
    assert (large == [int(COLOURS[2][at : at + 2], 16) for at in (1, 3, 5)]).all(axis=2).sum() > 100
    assert ElementTree.fromstring(pictures.cells_svg(architecture, title="mine")).tag.endswith("svg")


@DOT
def test_graphviz_tooltip_is_the_whole_label(tmp_path: Path) -> None:
    architecture = Architecture(GENOTYPES["DARTS_V2"]).with_uniform_bits(2, 4)
    (path,) = pictures.draw_cells(architecture, tmp_path / "cells", formats=["svg"], painter="graphviz")
    assert "sep_conv_3x3  w2 a4" in path.read_text().replace("&#160;", " ").replace("&#45;", "-")


@pytest.mark.parametrize("painter", PAINTERS)
@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet"])
def test_five_blocks_fit_with_every_letter_on_the_canvas(tmp_path: Path, painter: str, name: str) -> None:
    (path,) = pictures.draw_cells(searched(GENOTYPES[name]), tmp_path / name, formats=["svg"], painter=painter)
    root = ElementTree.parse(path).getroot()
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    if painter == "matplotlib":  # its text carries the place in a transformation of its own: covered by the layout
        assert (left, top) == (0, 0)
        return
    assert root.attrib["width"] == f"{width:.0f}pt"
    shift = [float(x) for x in re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", path.read_text()).groups()]
    for item in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = (float(item.attrib[key]) for key in ("x", "y", "font-size"))
        long = 0.62 * size * len(item.text or "")
        x += {"start": 0, "middle": -long / 2, "end": -long}[item.attrib.get("text-anchor", "start")]
        assert left <= x + shift[0] and x + long + shift[0] <= left + width
        assert top <= y - size + shift[1] and y + shift[1] <= top + height


@pytest.mark.parametrize("painter", PAINTERS)
def test_long_titles_and_legends_widen_the_canvas(tmp_path: Path, painter: str) -> None:
    """Two micro cells of a block are narrow; the legend of many bits and a long title are not."""
    layers = {f"cells.{cell}.preprocess{n}.op.1": (1 + cell % 4, 8) for cell in range(6) for n in (0, 1)}
    layers |= {f"cells.{cell}.operations.{k}.op.1": (32, 2) for cell in range(6) for k in range(4)}
    architecture = Architecture(TWO_NODES, BitPolicy(layers=layers))
    margins = {"normal": [0.5] * 4, "reduce": [0.5] * 4}
    title = "MMMM_WWWW-" * 12
    drawing = pictures.lay_out_architecture(architecture, title=title, margins=margins)
    (path,) = pictures.draw_cells(
        architecture, tmp_path / "cells", formats=["svg"], title=title, margins=margins, painter=painter
    )
    assert title in texts(path)
    for text, size, weight in ((title, 15, "bold"), ("differs within or between cells", 11, "normal")):
        assert cell_layout.text_width(text, size, weight == "bold") >= drawn_width(text, size, weight)
    total = drawn_width(cell_layout.LEGEND_INTRO, 11, "normal") + 30 * len(drawing.legend)
    total += sum(drawn_width(text, 11, "normal") for text, _ in drawing.legend)
    assert drawing.width >= max(total, drawn_width(title, 15, "bold")) + 10
    left, *places = cell_layout.legend_places(drawing, cell_layout.LEGEND_INTRO, drawing.legend)
    assert left >= 5 and places == sorted(places)
    assert places[-1] + 22 + drawn_width(drawing.legend[-1][0], 11, "normal") <= drawing.width - 5


def drawn_width(text: str, size: float, weight: str) -> float:
    """What the painter's font takes for a text, in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans", weight=weight)).get_extents().x1


def test_letters_are_never_wider_than_the_layout_thinks() -> None:
    for letter in (*string.ascii_letters, *string.digits, *"#%&*+,-./:;<=>?@[]^_{|}~()!"):
        for weight in ("normal", "bold"):
            assert cell_layout.text_width(letter, 12, weight == "bold") >= drawn_width(letter, 12, weight), letter


def test_matplotlib_text_fits_its_label(tmp_path: Path) -> None:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans Mono")
    for text in ("conv_7x1_1x7", "w2-4", "a32"):
        extent = TextPath((0, 0), text, size=11, prop=font).get_extents()
        assert extent.x1 <= LETTER_WIDTH * len(text)


@pytest.mark.parametrize("painter", PAINTERS)
def test_all_formats_twice_the_same_and_not_blank(tmp_path: Path, painter: str) -> None:
    from PIL import Image

    architecture = searched(TWO_NODES)
    first = pictures.draw_cells(architecture, tmp_path / "a" / "cells", formats=pictures.FORMATS, painter=painter)
    again = pictures.draw_cells(architecture, tmp_path / "b.c" / "x.y", formats=("png", "svg"), painter=painter)
    assert [path.name for path in first] == ["cells.svg", "cells.png", "cells.pdf"]
    assert [path.name for path in again] == ["x.y.png", "x.y.svg"]
    assert first[0].read_bytes() == again[1].read_bytes() and first[1].read_bytes() == again[0].read_bytes()
    assert first[2].read_bytes().startswith(b"%PDF")
    image = numpy.asarray(Image.open(first[1]).convert("RGB"))
    assert image.shape[1] > 1000 and len(numpy.unique(image.reshape(-1, 3), axis=0)) > 50
    assert 0.5 < (image > 240).all(axis=2).mean() < 0.99


def test_without_dot_matplotlib_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (path,) = pictures.draw_cells(Architecture(TWO_NODES), tmp_path / "cells", formats=["svg"])
    assert "sep_conv_3x3" in texts(path) and "Matplotlib" in path.read_text()
    with pytest.raises(ValueError, match="pip install graphviz"):
        pictures.draw_cells(Architecture(TWO_NODES), tmp_path / "cells", painter="graphviz")


def test_bits_per_layer_are_shown_as_ranges() -> None:
    # what QSubNet writes: one pair per convolution, by the module's name; five cells, reductions 1 and 3
    genotype = GENOTYPES["DARTS_V1"]
    layers = {}
    for cell in range(5):
        for k in range(8):
            layers |= {f"cells.{cell}.operations.{k}.op.1": (2, 4), f"cells.{cell}.operations.{k}.op.2": (2, 4)}
        layers[f"cells.{cell}.preprocess0.op.1"] = layers[f"cells.{cell}.preprocess1.op.1"] = (3, 3)
    layers["cells.4.operations.0.op.2"] = (4, 2)
    layers["cells.3.operations.3.op.1"] = (8, 4)
    normal, reduction = pictures.architecture_cells(Architecture(genotype, BitPolicy(layers=layers)))
    assert normal.edges[0].label == "sep_conv_3x3  w2-4 a2-4"
    assert normal.edges[1].label == "sep_conv_3x3  w2 a4"
    assert normal.edges[2].label == "skip_connect" and reduction.edges[3].label == "max_pool_3x3"
    assert [chip.text for chip in reduction.inputs[1]] == ["w3", "a3"]


def test_the_legend_of_bits_that_differ_within_an_operation(tmp_path: Path) -> None:
    """One normal cell and two like reductions: nothing differs between cells."""
    convolutions = {
        f"cells.{cell}.operations.{k}.op.{n}": (2, 2 * n) for cell in range(3) for k in range(8) for n in (1, 2)
    }
    inputs = {f"cells.{cell}.preprocess{n}.op.1": (2, 2) for cell in range(3) for n in (0, 1)}
    architecture = Architecture(GENOTYPES["DARTS_V1"], BitPolicy(layers=convolutions | inputs))
    (path,) = pictures.draw_cells(architecture, tmp_path / "cells", formats=["svg"])
    assert "differs within or between cells" in texts(path)


def test_uniform_bits_and_strided_skips() -> None:
    architecture = Architecture(TWO_NODES).with_uniform_bits(2, 4)
    normal, reduction = pictures.architecture_cells(architecture)
    assert [edge.label for edge in normal.edges][:2] == ["sep_conv_3x3  w2 a4", "skip_connect"]
    # a skip connection from an input of a reduction cell holds convolutions, one from a state does not
    assert [edge.label for edge in reduction.edges][1:3] == ["skip_connect  w2 a4", "skip_connect"]


def test_unknown_format_and_painter_are_refused(tmp_path: Path) -> None:
    architecture = Architecture(TWO_NODES)
    with pytest.raises(ValueError, match="--format gif: is no picture's; choose from svg, png, pdf"):
        pictures.draw_cells(architecture, tmp_path / "cells", formats=["svg", "gif"])
    with pytest.raises(ValueError, match="painter qt"):
        pictures.draw_cells(architecture, tmp_path / "cells", painter="qt")
    assert not list(tmp_path.iterdir())


def test_colours_stay_apart_for_the_colour_blind() -> None:
    # full protanopia, deuteranopia, tritanopia on linear RGB (Machado, Oliveira and Fernandes, 2009)
    kinds = {
        "normal": numpy.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    values = {b: [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for b, c in COLOURS.items()}
    for kind, matrix in kinds.items():
        seen = {}
        for bits, colour in values.items():
            c = numpy.asarray(colour)
            linear = numpy.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
            rgb = numpy.clip(numpy.asarray(matrix) @ linear, 0, 1)
            to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
            xyz = numpy.asarray(to_xyz) @ rgb / numpy.array([0.9505, 1.0, 1.089])
            f = numpy.where(xyz > 0.008856, numpy.cbrt(xyz), 7.787 * xyz + 16 / 116)
            seen[bits] = numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
        closest = min(numpy.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2))
        assert closest > 15, (kind, closest)


def test_text_on_chips_has_contrast() -> None:
    for colour in COLOURS.values():
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        text = 1.0 if cell_style.on(colour) == "#FFFFFF" else 0.0
        high, low = max(text, luminance), min(text, luminance)
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour
