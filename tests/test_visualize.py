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
