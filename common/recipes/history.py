# SPDX-License-Identifier: Apache-2.0
"""history.jsonl, read while its run may still be writing it: whole lines count, a half-written last one is said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class History:
    """The epochs of a run: one object each, by rising epoch."""

    rows: tuple[dict[str, Any], ...]
    torn: bool
    """Whether the file ends in the middle of a line: the run is writing, or was killed while it wrote."""


def read_history(folder: Path) -> History:
    """A run's epochs, as far as they are written whole; of an epoch that stands twice the newer line counts.

    Raises ValueError, naming the file, the line and the cure: no history.jsonl, unreadable, no whole epoch yet, or a
    line that ends but is no object with an epoch.
    """
    file = folder / "history.jsonl"
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no history.jsonl; name the folder of a run, after its first epoch") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error}); name another run") from None
    end = data.rfind(b"\n") + 1
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(data[:end].splitlines(), 1):
        if line.strip():
            row = _row(file, number, line)
            rows[row["epoch"]] = row
    if not rows and (folder / "result.json").is_file():
        raise ValueError(f"{file}: has no whole epoch, though its run has ended; it was cut off, name another run")
    if not rows:
        raise ValueError(f"{file}: has no whole epoch yet; wait for the first one")
    return History(tuple(rows[epoch] for epoch in sorted(rows)), torn=bool(data[end:].strip()))


def epochs_over(folder: Path) -> int:
    """How many epochs of a run are over: the lines of its history.jsonl, 0 where there is none."""
    try:
        return (folder / "history.jsonl").read_bytes().count(b"\n")
    except OSError:  # none is over yet
        return 0


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: line {number} is not JSON; the file is damaged, name another run") from None
    if not isinstance(row, dict) or isinstance(row.get("epoch"), bool) or not isinstance(row.get("epoch"), int):
        raise ValueError(f"{file}: line {number} is no epoch of a run (an object with a whole number epoch)")
    return row
