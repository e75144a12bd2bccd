# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it: search -> train -> evaluate -> cost -> picture -> report, each its own process."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.nets import load_architecture
from common.recipes.grown_network import grow
from common.recipes.target import open_target
from tests.helpers.programs import python

METHODS = ("qdarts", "darts", "ptq", "fbqat", "qsubnet")
ENTRY_POINTS = (
    *(f"{method}/{stage}.py" for method in METHODS for stage in ("search", "train")),
    *("ptq/quantize.py", "evaluate.py", "visualize.py", "report.py", "sweep.py", "doctor.py"),
)


@pytest.fixture(scope="module")
def chain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A smoke search and the training that its last line tells, from a folder that is not the project's."""
    place = tmp_path_factory.mktemp("chain")
    target = "33M"
    said = python(
        root, root / "qdarts/search.py", "--preset", "smoke", "--target-bitops", target, "--save", "found", cwd=place
    )
    command = json.loads((place / "found" / "result.json").read_text())["train_command"]
    assert command in said
    words = shlex.split(command)
    assert words[0] == "python"
    python(root, *words[1:], "--save", "trained", cwd=place)
    return {"place": place, "found": place / "found", "trained": place / "trained"}


def test_the_search_leaves_what_it_promises(chain: dict[str, Path]) -> None:
    found = chain["found"]
    result = json.loads((found / "result.json").read_text())
    history = [json.loads(line) for line in (found / "history.jsonl").read_text().splitlines()]
    architecture = load_architecture(found)
    assert result["finished"] and result["stage"] == "search"
    assert [row["epoch"] for row in history] == list(range(result["epochs"]))
    assert architecture.bits is not None and architecture.to_json()["genotype"] == history[-1]["genotype"]
    assert architecture.to_json()["bits"] == history[-1]["bits"]
    for path in result["artefacts"].values():
        assert (found / path).exists(), path
    ElementTree.parse(found / "cells.svg")
    # what the target says is decided by the figures themselves
    assert result["target_reached"] == (abs(result["exact_bitops"] / result["target_bitops"] - 1) <= 0.1)


def test_evaluate_cost_and_report_agree_with_the_result(root: Path, chain: dict[str, Path]) -> None:
    place, trained = chain["place"], chain["trained"]
    result = json.loads((trained / "result.json").read_text())
    evaluated = json.loads(python(root, root / "evaluate.py", trained, "--json", cwd=place))
    flat = json.dumps(evaluated)
    assert result["metrics"]["test_top1"] == pytest.approx(_find(evaluated, "top1"), abs=0)
    assert result["metrics"]["test_loss"] == pytest.approx(_find(evaluated, "loss"), rel=1e-6), flat
    searched = json.loads((chain["found"] / "result.json").read_text())
    assert result["cost"]["bitops"] == searched["exact_bitops"]
    cost = json.loads(python(root, "-m", "common.cost", trained, "--json", cwd=root))
    assert cost["bitops"] == result["cost"]["bitops"] and cost["weight_bytes"] == result["cost"]["weight_bytes"]
    rows = json.loads(python(root, root / "report.py", trained, "--format", "json", cwd=place))
    assert json.dumps(result["cost"]["bitops"]) in json.dumps(rows)


def _find(data: object, key: str) -> float:
    """The first value of that key anywhere in a JSON object, `test_` before it or not."""
    if isinstance(data, dict):
        for name in (key, f"test_{key}"):
            if isinstance(data.get(name), (int, float)):
                return float(data[name])
        for value in data.values():
            found = _find(value, key)
            if found == found:
                return found
    return float("nan")


def test_pictures_of_a_run_and_of_a_name(root: Path, chain: dict[str, Path]) -> None:
    place = chain["place"]
    python(root, root / "visualize.py", "PC_DARTS", cwd=place)
    text = "".join(ElementTree.parse(place / "PC_DARTS.svg").getroot().itertext())
    for primitive, _ in load_architecture("PC_DARTS").genotype.normal:
        assert primitive in text
    python(root, root / "visualize.py", chain["found"], "--format", "png", "--out", "mine.png", cwd=place)
    assert (place / "mine.png").read_bytes().startswith(b"\x89PNG")
    grown = grow(open_target(str(chain["trained"])))
    assert grown.bitops == json.loads((chain["trained"] / "result.json").read_text())["cost"]["bitops"]
    assert open_target(str(chain["found"])).margins is not None


@pytest.mark.slow
def test_the_readmes_pictures_of_a_real_search(root: Path, chain: dict[str, Path]) -> None:
    """The script that draws them, on the smoke search: a frame an epoch, and the network that the training cost."""
    from PIL import Image

    out = chain["place"] / "images"
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = [
        "bash",
        str(root / "scripts" / "readme_pictures.sh"),
        str(chain["found"]),
        str(chain["trained"]),
        str(out),
    ]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = ("alphas.svg", "cells.png", "curves.svg", "network.png", "search.gif")
    assert sorted(file.name for file in out.iterdir()) == [f"quickstart-{name}" for name in names]
    with Image.open(out / "quickstart-search.gif") as film:
        assert film.n_frames == json.loads((chain["found"] / "result.json").read_text())["epochs"]
    for name in ("cells", "network"):
        with Image.open(out / f"quickstart-{name}.png") as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    refused = subprocess.run([*command[:2], str(out)], capture_output=True, text=True)
    assert refused.returncode == 2 and f"{out} holds no finished run" in refused.stderr


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_help_needs_no_torch_and_works_anywhere(root: Path, tmp_path: Path, entry: str) -> None:
    script = root / entry
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.path[0], sys.argv = {str(script.parent)!r}, [{str(script)!r}, "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    said = python(root, "-c", code, cwd=tmp_path)
    assert "usage" in said.lower()


def test_the_table_in_the_readme_is_the_measured_one(root: Path) -> None:
    """Accuracies and BitOps of README.md's table are those of results/quickstart.csv."""
    lines = [line for line in (root / "README.md").read_text(encoding="utf-8").splitlines() if " ± " in line]
    with open(root / "results" / "quickstart.csv", newline="", encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == len(measured) == 4
    for line, row in zip(rows, measured, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["architecture"]
        assert cells[2] == f"{100 * float(row['accuracy']):.2f} ± {100 * float(row['accuracy_std']):.2f}"
        assert float(cells[5].split("/")[0]) == pytest.approx(float(row["bitops"]) / 1e6, rel=1e-2)
        assert cells[8] == row["n"]
