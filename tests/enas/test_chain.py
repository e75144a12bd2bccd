# SPDX-License-Identifier: Apache-2.0
"""From a search to the report, as a user types it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from common.engine import read_json
from tests.helpers.programs import python

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "smoke", "--blocks", "2", "--epochs", "1", "--no-tensorboard"]


def test_from_search_to_report(tmp_path: Path) -> None:
    python(ROOT, ROOT / "enas/search.py", *TINY, "--save", "the found one", cwd=tmp_path)
    architecture = json.loads((tmp_path / "the found one" / "architecture.json").read_text())
    assert architecture["space"] == "enas-micro" and architecture["search"]["method"] == "enas"
    command = read_json(tmp_path / "the found one" / "result.json")["train_command"]
    command = shlex.split(command)
    assert command[0] == "python" and (tmp_path / command[1]).resolve() == ROOT / "enas/train.py"
    small = ["--preset", "smoke", "--no-tensorboard", "--save", "trained"]
    python(ROOT, *command[1:], *small, cwd=tmp_path)
    result = read_json(tmp_path / "trained" / "result.json")
    evaluated = json.loads(python(ROOT, ROOT / "evaluate.py", "trained", "--json", cwd=tmp_path))
    assert evaluated["top1"] == result["metrics"]["test_top1"] and evaluated["cost"] == result["cost"]
    sizes = ["--out-filters", "2", "--layers", "1", "--image-size", "8", "--in-channels", "1", "--json"]
    for target in ("the found one", "trained"):
        cost = json.loads(python(ROOT, "-m", "common.cost", tmp_path / target, *sizes, cwd=ROOT))
        assert cost["bitops"] == result["cost"]["bitops"]
    python(ROOT, ROOT / "visualize.py", "trained", "--format", "svg", cwd=tmp_path)
    assert (tmp_path / "trained" / "cells.svg").is_file()
    text = python(ROOT, ROOT / "report.py", "the found one", "trained", cwd=tmp_path)
    assert "enas" in text
