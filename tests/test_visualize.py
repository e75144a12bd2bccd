# SPDX-License-Identifier: Apache-2.0
"""visualize.py as a user meets it: names, files, runs, formats, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import visualize
from tests.helpers.fake_history import KINDS, epoch, finish, sampled_epoch, write_search
from tests.helpers.fake_runs import architecture_json, train_result, write_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv: str) -> int:
    """The exit code of `visualize.py ARGV`, however it ends."""
    try:
        return visualize.main(argv)
    except SystemExit as end:
        return int(end.code or 0)


def test_name_becomes_a_picture_beside_the_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("PC_DARTS") == 0
    assert sorted(path.name for path in here.iterdir()) == ["PC_DARTS.png", "PC_DARTS.svg"]
    assert "sep_conv_5x5" in Path("PC_DARTS.svg").read_text()
    assert ElementTree.parse("PC_DARTS.svg").getroot().tag.endswith("svg")
    assert Path("PC_DARTS.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "wrote PC_DARTS.svg\nwrote PC_DARTS.png\n"


@pytest.mark.parametrize("argv", [(), ("PC_DARTS", "DARTS_V2"), ("a", "b", "c")])
def test_wrong_count_prints_usage_and_ends_with_1(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 1
    said = capsys.readouterr().err
    assert "usage: python visualize.py TARGET" in said
    assert ("TARGET: is missing" if not argv else f"TARGET: {len(argv)} are given") in said


def test_unknown_name_as_in_the_paddle_script(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("PC_DART") == 1
    said = capsys.readouterr().err
    assert said.startswith("PC_DART is not specified in genotypes.py") and "PC_DARTS" in said
    assert not list(here.iterdir())


def test_unknown_flag_and_format_name_themselves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("PC_DARTS", "--fromat", "svg") == 1
    assert "did you mean --format?" in capsys.readouterr().err
    assert run("PC_DARTS", "--format", "gif") == 1
    assert "gif" in capsys.readouterr().err
    assert run("PC_DARTS", "--format", "svg", "--out", "x.png") == 1
    assert "contradicts" in capsys.readouterr().err
    assert run("PC_DARTS", "--wbits", "2") == 1
    assert "--abits" in capsys.readouterr().err
    assert run("PC_DARTS", "--wbits", "7", "--abits", "2") == 1
    assert "7 bits" in capsys.readouterr().err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (("DARTS_V1", "--format", "svg"), ["DARTS_V1.svg"]),
        (("--format", "svg,pdf", "DARTS_V1"), ["DARTS_V1.pdf", "DARTS_V1.svg"]),
        (("--run", "DARTS_V1", "--out", "deep/er.svg"), ["deep/er.svg"]),
        (("DARTS_V1", "--out", "v1.2", "--format=png"), ["v1.2.png"]),
    ],
)
def test_formats_and_out(here: Path, argv: tuple[str, ...], files: list[str]) -> None:
    assert run(*argv) == 0
    assert sorted(path.relative_to(here).as_posix() for path in here.rglob("*.*")) == files


def test_file_and_run_folder(here: Path) -> None:
    bits = {"kind": "uniform", "uniform": [2, 4]}
    folder = write_run(here / "run", train_result(), architecture=architecture_json(None, bits=bits))
    assert run("run", "--format", "svg") == 0
    assert "w2" in (folder / "cells.svg").read_text()
    Path("mine.json").write_text(json.dumps(architecture_json("own", bits=None)))
    assert run("mine.json", "--format", "svg") == 0
    assert "own" in Path("mine.svg").read_text()
    assert run("mine.json", "--wbits", "8", "--abits", "3", "--format", "svg") == 0
    assert "w8" in Path("mine.svg").read_text()


@pytest.mark.parametrize("blocks", [1, 5, 32])
def test_an_architecture_written_out_gets_a_short_name(here: Path, blocks: int) -> None:
    numbers = " ".join(["0 2 1 4"] * blocks)
    assert run(f"[{numbers}]  # normal\n[{numbers}]  # reduction", "--format", "svg") == 0
    assert run(f"{numbers}  {numbers}", "--format", "svg") == 0
    (picture,) = here.glob("*.svg")  # the same cells, the same file
    assert re.fullmatch(r"enas-[0-9a-f]{8}\.svg", picture.name) and "avg_pool_3x3" in picture.read_text()


def test_broken_targets_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    Path("half.json").write_text('{"schema": 1, "genot')
    wrong = architecture_json()
    wrong["genotype"]["normal"][3] = ["sepp_conv", 1]
    Path("wrong.json").write_text(json.dumps(wrong))
    for target, words in (("empty", "architecture.json"), ("half.json", "JSON"), ("wrong.json", "normal[3]")):
        assert run(target) == 1
        said = capsys.readouterr().err
        assert target in said and words in said and "Traceback" not in said
    assert run("no/such.json") == 1


def test_help_and_as_a_program(here: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "--format" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, str(root / "visualize.py"), "nas_net"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "nas_net is not specified in genotypes.py" in done.stderr


def svg_texts(path: str | Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(item.itertext()).strip() for item in root.iter() if item.tag.endswith("}text")]


def test_a_run_that_is_still_going_is_drawn_as_far_as_it_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_search(here / "run", [epoch(0), epoch(1)], tail=json.dumps(epoch(2))[:-9])
    assert run("run", "--format", "svg") == 0
    said = capsys.readouterr()
    assert said.out == "wrote run/cells.svg\n"
    assert "history.jsonl: its last line is half written and left out" in said.err
    assert "run: has no architecture.json yet; drawn as after its epoch 2" in said.err
    texts = svg_texts(folder / "cells.svg")
    assert f"{here.name}/run, after epoch 2" in texts and any("in the softmax:" in text for text in texts)
    for kind in KINDS:
        for operation, _ in epoch(1)["genotype"][kind]:
            assert operation in texts
    assert not [path for path in here.rglob("*") if path.name.startswith(".")]


def test_a_run_can_be_read_at_any_moment(here: Path) -> None:
    """Its history cut at places all over the file: what is whole counts, the rest is said, nothing else happens."""
    from common.recipes.animation import read_film
    from common.recipes.target import open_target

    folder = write_search(here / "run", [epoch(0), epoch(1)])
    whole = (folder / "history.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(0, len(whole), len(whole) // 40), *ends, *(end - 1 for end in ends), len(whole)}):
        (folder / "history.jsonl").write_bytes(whole[:cut])
        count = whole[:cut].count(b"\n")
        if not count:
            for read in (open_target, read_film):
                with pytest.raises(ValueError, match="whole epoch"):
                    read(folder if read is read_film else str(folder))
            continue
        film = read_film(folder)
        assert len(film.choices) == count and open_target(str(folder)).title.endswith(f"after epoch {count}")
        assert bool(film.notes) == (cut not in ends)


def test_before_the_first_epoch_there_is_nothing_to_draw(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, tail in (([], ""), ([], json.dumps(epoch(0))[:300])):
        folder = write_search(here / f"run{len(tail)}", rows, tail=tail)
        assert run(str(folder)) == 1 and run(str(folder), "--grown") == 1
        said = capsys.readouterr().err
        assert said.count(f"{folder}: has neither an architecture.json nor a whole epoch of a search; wait") == 2
        assert run(str(folder), "--animate") == 1
        assert "has no whole epoch yet" in capsys.readouterr().err
    (here / "damaged").mkdir()
    (here / "damaged" / "history.jsonl").write_text("x" * 40 + "\n")
    assert run("damaged") == 1
    assert "line 1 is not JSON" in capsys.readouterr().err


def test_confidence_is_the_softmax_margin_of_the_last_epoch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The widths in the file against margins worked out of the row by hand."""
    row = epoch(3)
    finish(write_search(here / "run", [epoch(0), row]), row)
    assert run("run", "--confidence", "--format", "svg") == 0
    widths = [float(w) for w in re.findall(r'stroke-width(?:="|: )([\d.]+)', Path("run/cells.svg").read_text())]
    for kind in KINDS:
        first = 0
        for node in range(4):
            for operation, state in row["genotype"][kind][2 * node : 2 * node + 2]:
                shares = row["alphas"][kind][first + state]
                chosen = shares[row["primitives"].index(operation)]
                margin = chosen - max(s for s in shares[1:] if s != chosen)
                wanted = 1 + 3.6 * max(margin, 0) ** 0.5
                assert min(abs(w - wanted) for w in widths) < 0.006, (kind, operation, margin)
            first += node + 2
    assert run("run", "--no-confidence", "--no-bits", "--format", "svg", "--out", "plain.svg") == 0
    plain = svg_texts("plain.svg")
    assert not any("in the softmax:" in text or re.fullmatch(r"[wa]\d", text) for text in plain)
    assert run("PC_DARTS", "--confidence") == 1
    assert "--confidence: PC_DARTS_cifar has no softmax" in capsys.readouterr().err


def test_margins_are_not_those_of_other_cells_or_columns(here: Path) -> None:
    """Alphas of another genotype, or of columns that nobody names, say nothing about the cells drawn."""
    other = epoch(1)
    finish(write_search(here / "other", [epoch(0)]), other)
    short = epoch(0)
    short["alphas"] = {kind: [row[:-1] for row in table] for kind, table in short["alphas"].items()}
    write_search(here / "short", [short])
    gone = epoch(0)
    gone["alphas"] = None
    write_search(here / "gone", [gone])
    unnamed = epoch(0)
    unnamed["primitives"][3] = ["skip_connect"]
    write_search(here / "unnamed", [unnamed])
    for name in ("other", "short", "gone", "unnamed"):
        assert run(name, "--format", "svg") == 0
        assert not any("in the softmax:" in text for text in svg_texts(here / name / "cells.svg")), name
        assert run(name, "--confidence", "--format", "svg") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("PC_DARTS", "--bits"), "--bits: PC_DARTS_cifar has none"),
        (("PC_DARTS", "--bits", "--no-bits"), "--bits and --no-bits: contradict"),
        (("PC_DARTS", "--no-bits", "--wbits", "2", "--abits", "2"), "--no-bits: contradicts --wbits"),
        (("PC_DARTS", "--fps", "3"), "--fps: belongs to --animate"),
        (("PC_DARTS", "--layers", "3"), "--layers: belongs to --grown"),
        (("PC_DARTS", "--bit-mapping", "paper"), "--bit-mapping: belongs to --grown"),
        (("PC_DARTS", "--grown", "--bit-mapping", "paper"), "--bit-mapping: the bits are not those of searched"),
        (("PC_DARTS", "--grown", "--animate"), "--grown: is one picture"),
        (("PC_DARTS", "--grown", "--confidence"), "--confidence: a whole network"),
        (("PC_DARTS", "--animate"), "PC_DARTS: holds no history.jsonl"),
        (("PC_DARTS", "--animate", "--wbits", "2", "--abits", "2"), "--wbits: a film"),
        (("PC_DARTS", "--animate", "--fps", "0"), "--fps"),
        (("PC_DARTS", "--animate", "--fps", "fast"), "--fps"),
        (("run", "--out", "x.jpg"), "--out x.jpg: no .jpg is written; end it in one of svg, png, pdf, gif, mp4"),
        (
            ("run", "--animate", "--out", "x.svg"),
            "--format svg: is no film's; choose from gif, mp4, or leave --animate out",
        ),
        (("run", "--animate", "--format", "gif", "--out", "x.mp4"), "contradicts"),
        (
            ("run", "--format", "gif"),
            "--format gif: is no picture's; choose from svg, png, pdf; a film is drawn by --animate",
        ),
        (("run", "--grown", "--format", "mp4"), "--format mp4: is no picture's; choose from svg, png, pdf"),
        (("run", "--animate", "--bits"), "--bits: "),
    ],
)
def test_flags_that_do_not_go_together(
    here: Path, argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(here / "run", [sampled_epoch(0)])
    before = sorted(here.rglob("*"))
    assert run(*argv) == 1
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert sorted(here.rglob("*")) == before


def test_grown_of_a_run_and_of_a_name(here: Path) -> None:
    write_search(here / "run", [epoch(0)], eval_layers=4)
    assert run("--grown", "run", "--format", "svg") == 0
    texts = svg_texts("run/grown.svg")
    assert f"{here.name}/run, after epoch 1" in texts and texts.count("searched") == 1
    assert [f"{k}  {kind}" in texts for k, kind in enumerate(("normal", "reduction", "reduction", "normal"))] == [
        True
    ] * 4
    assert run("PC_DARTS", "--grown", "--wbits", "3", "--abits", "8", "--layers", "2", "--format", "svg") == 0
    texts = svg_texts("PC_DARTS-grown.svg")
    assert texts.count("w3") == texts.count("a8") > 4 and "searched" not in texts


def test_animate_writes_into_the_run_or_where_it_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    write_search(here / "run", [sampled_epoch(n) for n in range(3)], tail='{"epoch": 3')
    monkeypatch.setenv("PATH", str(here))  # no ffmpeg
    assert run("run", "--animate", "--fps", "4") == 0
    said = capsys.readouterr()
    assert said.out == "wrote run/search.gif\n"
    assert "half written" in said.err and "no MP4: the program ffmpeg is not installed" in said.err
    with Image.open("run/search.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 250
    assert run("run", "--animate", "--out", "deep/er/film.gif") == 0
    said = capsys.readouterr()
    assert said.out == "wrote deep/er/film.gif\n" and "MP4" not in said.err
    assert run("run", "--animate", "--format", "mp4") == 1
    assert "ffmpeg is not installed" in capsys.readouterr().err


def test_pictures_of_micro_cells_and_own_operations(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ENAS's five blocks, and a space of two nodes with an operation of a long name: every label is there, whole."""
    blocks = "0 0 1 1 2 2 0 3 1 4 3 0 2 1 0 2 5 4 1 1"
    assert run(f"{blocks} {blocks}", "--format", "svg", "--out", "micro") == 0
    texts = svg_texts("micro.svg")
    names = {"sep_conv_3x3": 2, "sep_conv_5x5": 3, "avg_pool_3x3": 2, "max_pool_3x3": 1, "identity": 2}
    assert {name: texts.count(name) for name in names} == {name: 2 * count for name, count in names.items()}
    long = "a_convolution_with_a_name_that_says_everything_about_it"
    Path("own.py").write_text(
        "from common.nets import OPERATIONS\n"
        f"OPERATIONS['{long}'] = lambda conv, norm, c, s: conv(c, c, 3, stride=s, padding=1)\n"
    )
    pairs = [[long, 0], [long, 1], ["skip_connect", 2], [long, 0]]
    data = architecture_json("two") | {
        "genotype": {"normal": pairs, "normal_concat": [2, 3], "reduce": pairs, "reduce_concat": [3]}
    }
    Path("two.json").write_text(json.dumps(data))
    assert run("two.json", "--format", "svg") == 1
    assert long in capsys.readouterr().err
    assert run("two.json", "--format", "svg", "--search-space", "own.py") == 0
    assert svg_texts("two.svg").count(long) == 6
