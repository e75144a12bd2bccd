# SPDX-License-Identifier: Apache-2.0
"""A search as a film: frames, size, time, what stands still and what moves, and histories that are not whole."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from PIL import Image

from common.recipes import animation
from common.recipes.cell_layout import Drawing
from common.recipes.cell_style import BIT_COLOURS
from tests.helpers.drawings import assert_nothing_is_cut_or_covered
from tests.helpers.fake_history import epoch, sampled_epoch, write_search

EPOCHS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search(tmp_path_factory.mktemp("film") / "search", [epoch(n) for n in range(EPOCHS)])


@pytest.fixture(scope="module")
def gif(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gif") / "new" / "search"
    (path,) = animation.draw_film(animation.read_film(run), place, formats=["gif"], fps=2)
    assert path == place.with_name("search.gif")
    return path


def frames(path: Path) -> list[numpy.ndarray]:
    """Every frame, [H, W, 3]."""
    image = Image.open(path)
    found = []
    for number in range(image.n_frames):
        image.seek(number)
        found.append(numpy.asarray(image.convert("RGB")).astype(int))
    return found


def test_a_frame_an_epoch_and_the_last_one_is_held(gif: Path) -> None:
    image = Image.open(gif)
    assert image.n_frames == EPOCHS and image.info["loop"] == 0
    durations = []
    for number in range(EPOCHS):
        image.seek(number)
        durations.append(image.info["duration"])
    assert durations == [500] * (EPOCHS - 1) + [3000]
    assert image.size[0] == 1200 and image.size[0] % 2 == image.size[1] % 2 == 0


def test_frames_are_not_blank_and_have_the_bits_colours(gif: Path) -> None:
    for frame in frames(gif):
        assert 0.5 < (frame > 240).all(axis=2).mean() < 0.99
        for bits in (2, 4):
            colour = [int(BIT_COLOURS[bits][at : at + 2], 16) for at in (1, 3, 5)]
            assert (abs(frame - colour).max(axis=2) < 8).sum() > 200


def test_only_the_choices_move(tmp_path: Path) -> None:
    """All frames have the same nodes and labels' places; an operation of two epochs in a row keeps its side."""
    search = write_search(tmp_path / "search", [epoch(n) for n in range(12)])
    drawings = animation.lay_out_film(animation.read_film(search))
    first = drawings[0]
    moved = 0
    for drawing in drawings[1:]:
        assert (drawing.width, drawing.height, drawing.frames) == (first.width, first.height, first.frames)
        assert drawing.legend == first.legend and drawing.widths == first.widths
        assert [(n.name, n.box) for n in drawing.nodes] == [(n.name, n.box) for n in first.nodes]
        assert sorted(_places(drawing)) == sorted(_places(first))
        moved += _operations(drawing) != _operations(first)
    assert moved
    for drawing in drawings:  # there is room for the lines of every epoch
        assert_nothing_is_cut_or_covered(drawing)
    for before, after in itertools.pairwise(drawings):
        kept = _operations(before).keys() & _operations(after).keys()
        assert all(_operations(before)[key] == _operations(after)[key] for key in kept)


def _places(drawing: Drawing) -> Sequence[tuple[float, float, float]]:
    return [(line.tag.x, line.tag.y, line.tag.width) for line in drawing.lines if line.tag]


def _operations(drawing: Drawing) -> dict[tuple[str, str], float]:
    """(tail, head) -> where its label stands."""
    return {(line.tail, line.head): line.tag.x for line in drawing.lines if line.tag}


def test_the_legend_names_the_bits_of_all_epochs(tmp_path: Path) -> None:
    """It would come and go otherwise, and the picture with it."""
    rows = [epoch(0), epoch(0)]
    for number, row in enumerate(rows):
        row["epoch"], row["alphas"] = number, row["alphas"] if number else None
        for cell in row["bits"]["cells"]:
            for place in ("preprocess0", "preprocess1"):
                cell[place] = [2 + 2 * number] * 2
            cell["operations"] = [pair and [2 + 2 * number] * 2 for pair in cell["operations"]]
    drawings = animation.lay_out_film(animation.read_film(write_search(tmp_path / "run", rows)))
    for drawing in drawings:
        assert {"2 bits", "4 bits"} <= {text for text, _ in drawing.legend}
        assert drawing.widths and drawing.height == drawings[0].height


def test_every_frame_says_its_epoch_and_figures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[set[str]] = []
    put = animation.painter.put_text
    monkeypatch.setattr(animation.painter, "put_text", lambda *a, **k: (said[-1].add(a[3]), put(*a, **k))[1])
    page = animation.painter.page
    monkeypatch.setattr(animation.painter, "page", lambda *a: (said.append(set()), page(*a))[1])
    film = animation.read_film(run)
    animation.draw_film(film, run / "said", formats=["gif"], fps=1)
    name = "/".join(run.parts[-2:])
    for number, texts in enumerate(said):
        assert f"{name}: epoch {number + 1} of 9" in texts
        row = epoch(number)
        wanted = {
            f"validation {100 * row['valid_top1']:.1f} %",
            f"training {100 * row['train_top1']:.1f} %",
            f"validation {row['valid_loss']:.3f}",
            f"expected {45 - number}",
            f"exact {44 - number}",
        }
        assert wanted <= texts, texts


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")
def test_mp4(run: Path, tmp_path: Path) -> None:
    film = animation.read_film(run)
    (path,) = animation.draw_film(film, tmp_path / "film", formats=["mp4"], fps=2)
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        str(path),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-vf",
        "scale=300:-2",
        "-",
    ]
    pixels = subprocess.run(command, capture_output=True, check=True).stdout
    assert path.read_bytes()[4:8] == b"ftyp"
    high = round(300 * animation.lay_out_film(film)[0].height / 1200)  # at least: the figures come on top
    count = EPOCHS + 5  # the last one three seconds in all
    assert len(pixels) % (count * 300 * 3) == 0 and len(pixels) / (count * 300 * 3) >= high
    shown = numpy.frombuffer(pixels, numpy.uint8).reshape(count, -1)
    assert (shown[-1] == shown[-4]).mean() > 0.99 and shown[0].std() > 5
    assert abs(shown[0].astype(int) - shown[EPOCHS - 1]).mean() > 1


def test_without_ffmpeg_an_mp4_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ffmpeg is not installed; install it, or take --format gif"):
        animation.draw_film(animation.read_film(run), tmp_path / "film", formats=["mp4"], fps=2)
    with pytest.raises(ValueError, match="--format png: is no film's"):
        animation.draw_film(animation.read_film(run), tmp_path / "film", formats=["png"], fps=2)
    assert not list(tmp_path.iterdir())


def test_a_half_written_line_is_left_out_and_said(tmp_path: Path) -> None:
    rows = [epoch(n) for n in range(3)]
    folder = write_search(tmp_path / "run", rows[:2], tail=json.dumps(rows[2])[:700])
    film = animation.read_film(folder)
    assert [choice.epoch for choice in film.choices] == [0, 1]
    assert len(film.notes) == 1 and "half written" in film.notes[0] and str(folder) in film.notes[0]


def test_histories_that_make_no_film(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no history.jsonl"):
        animation.read_film(tmp_path)
    training = write_search(tmp_path / "training", [{"epoch": 0, "train_loss": 1.0}])
    with pytest.raises(ValueError, match=r"epoch 0: names no cells; give the run of a search"):
        animation.read_film(training)
    wrong = epoch(0)
    wrong["genotype"]["normal"][3] = ["sepp_conv", 1]
    with pytest.raises(ValueError, match=r"epoch 0.*normal\[3\]"):
        animation.read_film(write_search(tmp_path / "wrong", [wrong]))
    damaged = sampled_epoch(0) | {"architectures": [{"top1": 0.5}]}
    with pytest.raises(ValueError, match="epoch 0: its architectures cannot be read"):
        animation.read_film(write_search(tmp_path / "damaged", [damaged]))
    smaller = sampled_epoch(1)
    with pytest.raises(ValueError, match="different sizes"):
        animation.read_film(write_search(tmp_path / "mixed", [epoch(0), smaller]))
    middle = write_search(tmp_path / "middle", [epoch(0)], tail='{"epoch": 1, "geno\n' + json.dumps(epoch(2)) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        animation.read_film(middle)


def test_a_search_that_samples_shows_the_best_of_each_epoch(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "run", [sampled_epoch(n) for n in range(2)], dataset="mnist")
    film = animation.read_film(folder)
    assert [choice.architecture.genotype.numbers for choice in film.choices] == [
        sampled_epoch(n)["architectures"][1]["cells"] for n in range(2)
    ]
    assert "epoch 2 of 9, the best of 3 samples" in animation.lay_out_film(film)[1].title
    assert [panel.title for panel in animation._panels(film.rows)] == ["accuracy", "loss", "reward"]
    with pytest.raises(ValueError, match="--bits"):
        film.shown(bits=True, confidence=None)
    with pytest.raises(ValueError, match="--confidence"):
        film.shown(bits=None, confidence=True)


def test_long_searches_are_thinned_to_a_film_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "MAX_FRAMES", 5)
    for count, shown in ((13, [0, 3, 6, 9, 12]), (14, [0, 4, 8, 12, 13]), (5, [0, 1, 2, 3, 4])):
        folder = write_search(tmp_path / f"run{count}", [sampled_epoch(n) for n in range(count)])
        film = animation.read_film(folder)
        assert [choice.epoch for choice in film.choices] == shown
        assert film.notes == ((f"{count} epochs: 5 of them are shown",) if count > 5 else ())


def test_parts_can_be_left_out(run: Path) -> None:
    film = animation.read_film(run).shown(bits=False, confidence=False)
    drawing = animation.lay_out_film(film)[0]
    assert not drawing.legend and not drawing.widths
    assert not any(line.edge.chips or line.edge.margin for line in drawing.lines if line.edge)


def test_the_palette_holds_every_colour_that_says_something() -> None:
    palette = animation._palette()
    colours = numpy.asarray(palette.getpalette()).reshape(-1, 3).tolist()
    assert len(colours) <= 256
    for colour in BIT_COLOURS.values():
        assert [int(colour[at : at + 2], 16) for at in (1, 3, 5)] in colours
