# SPDX-License-Identifier: Apache-2.0
"""What a run has come to, all of it, and whether two runs have come to the same, bit for bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

from common.engine import load_state

# What depends on clock, machine or place, and on nothing else.
CLOCK = ("seconds", "images_per_second", "peak_memory_mb")
PLACE = ("git", "versions", "device", "artefacts", "train_command", "source", "started_from", "folder")
TIMES = ("seconds", "before_seconds", "before_search_seconds", "search_seconds", "source_seconds")


def newest(run: Path) -> Path:
    """The checkpoint of the highest number."""
    return max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:].split(".")[0]))


def rows_of(run: Path) -> list[dict[str, str]]:
    """metrics.csv but for rates, times and memory."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: text for key, text in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


def end_of(run: Path) -> dict[str, Any]:
    """The newest checkpoint's state and number, every row, the architecture, and result.json's figures."""
    state, meta = load_state(newest(run))
    result = json.loads((run / "result.json").read_text())
    architecture = run / "architecture.json"
    return {
        "state": clockless(state),
        "step": meta["step"],
        "history": (run / "history.jsonl").read_text() if (run / "history.jsonl").exists() else "",
        "metrics": rows_of(run),
        "architecture": architecture.read_text() if architecture.exists() else "",
        "result": {key: value for key, value in result.items() if key not in {*PLACE, *TIMES}},
    }


def clockless(state: dict[str, Any]) -> dict[str, Any]:
    """A search keeps its last figures in the checkpoint, rates and times among them."""
    summary = state.get("summary")
    if summary is None:
        return state
    return state | {"summary": {key: value for key, value in summary.items() if key not in CLOCK}}


def assert_same(one: Any, other: Any, where: str = "end") -> None:
    """Every tensor bit for bit, every number and string equal, of the same types."""
    assert type(one) is type(other), f"{where}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{where}: {one.keys() ^ other.keys()}"
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{where}: {len(one)} and {len(other)}"
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), f"{where}: tensors differ"
    else:
        assert one == other, f"{where}: {one!r} and {other!r}"


def assert_same_end(one: Path, other: Path) -> None:
    """Two finished runs have come to the same."""
    assert_same(end_of(one), end_of(other))
