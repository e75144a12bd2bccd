# SPDX-License-Identifier: Apache-2.0
"""The main job as a user runs it: search -> train -> evaluate -> cost -> picture -> report, each its own process.

Also every command and code block of README.md and docs/: the files exist, the flags parse, the Python runs.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.nets import load_architecture

ENTRY_POINTS = ("qdarts/search.py", "qdarts/train.py", "evaluate.py", "visualize.py", "report.py", "doctor.py")


def python(root: Path, *arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """Run the project's Python with these arguments; its stdout, once the exit code is as expected."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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


def _blocks(language: str) -> list[tuple[str, str]]:
    root = Path(__file__).resolve().parents[1]
    files = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("*/README.md"))]
    found = []
    for file in files:
        if "oracles" not in file.parts:
            text = file.read_text(encoding="utf-8")
            found += [(file.name, block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


def test_the_files_that_the_documents_name_exist(root: Path) -> None:
    for name, block in _blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [w for w in words if re.fullmatch(r"[\w/]+\.(py|sh)", w)]
            modules = [words[i + 1] for i, w in enumerate(words[:-1]) if w == "-m"]
            for script in scripts:
                assert (root / script).is_file(), f"{name}: {line}"
            for module in modules:
                assert (root / module.replace(".", "/")).exists() or (
                    root / f"{module.replace('.', '/')}.py"
                ).is_file(), line


def _documented() -> list[str]:
    """Every documented call of a search or training, cut to its flags."""
    lines = []
    for _, block in _blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"python (-m )?qdarts[./](search|train)", line.strip()):
                lines.append(line.strip())
    return sorted(set(lines))


@pytest.mark.parametrize("line", _documented())
def test_documented_flags_parse(root: Path, tmp_path: Path, chain: dict[str, Path], line: str) -> None:
    """--print-config runs the whole of flag handling: presets, files, cross checks."""
    words = [
        str(chain["found"]) if w.startswith("runs/") or w == "RUN" else w for w in shlex.split(line, comments=True)[1:]
    ]
    words = [str(tmp_path) if w == "DIR" else w for w in words]
    if words[0] != "-m":
        words[0] = str(root / words[0])
    assert "learning_rate" in python(root, *words, "--print-config", cwd=root)


@pytest.mark.parametrize("name, block", _blocks("python"))
def test_documented_python_runs(root: Path, tmp_path: Path, name: str, block: str) -> None:
    if "def " in block and "import" not in block:
        pytest.skip("a fragment")
    python(root, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{block}", cwd=tmp_path)


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
