# SPDX-License-Identifier: Apache-2.0
"""The files of a run that only grow, metrics.csv and history.jsonl: their rows, and how long a checkpoint saw them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.engine.folders import HISTORY, METRICS

GROWING = (METRICS, HISTORY)


def too_long(folder: Path, meta: Mapping[str, Any]) -> tuple[list[str], list[tuple[Path, int]]]:
    """(messages, the growing files to cut and how long they were when the checkpoint was made).

    Raises ValueError where what was there then is not what is there now: rows cannot follow damaged ones.
    """
    lengths, digests = meta["extra"].get("files", {}), meta["extra"].get("sha256", {})
    messages: list[str] = []
    cuts: list[tuple[Path, int]] = []
    for name in GROWING:
        path, length = folder / name, lengths.get(name, 0)
        present = path.stat().st_size if path.exists() else 0
        damaged = name in digests and present >= length and path.exists() and digest_of(path, length) != digests[name]
        if damaged or 0 < present < length:  # the next row would be glued to what is left of one
            raise ValueError(
                f"{path}: was {'damaged or changed' if damaged else 'cut short'} since the checkpoint of step "
                f"{meta['step']}; put the right file back, or delete it to go on without its rows"
            )
        if present < length:
            messages.append(f"{name} is not there any more ({length} bytes at the checkpoint): rows are lost")
        elif present > length:
            cuts.append((path, length))
    return messages, cuts


def check_noted(meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint notes of its run what `Run._extra` writes, or what older versions did."""
    extra = meta["extra"]
    lengths, digests = extra.get("files", {}), extra.get("sha256", {})
    right = isinstance(lengths, dict) and isinstance(digests, dict) and type(extra.get("seconds", 0.0)) in (int, float)
    if not right or not all(type(length) is int and length >= 0 for length in lengths.values()):
        raise ValueError(f"the checkpoint of step {meta['step']}: what it notes of its run is not what a run writes")


def digest_of(path: Path, length: int) -> str:
    """sha256 of a file's first `length` bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


def csv_line(cells: Sequence[Any]) -> str:
    """A row of metrics.csv."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)  # floats by repr: read back exactly
    return buffer.getvalue()


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Every row of metrics.csv, by column."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def csv_end(path: Path) -> tuple[list[str] | None, int | None]:
    """(columns, last row's step) of metrics.csv, None for what is not there yet."""
    if not path.exists() or not path.stat().st_size:
        return None, None
    with reading_rows(path):
        with open(path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file))
        rows = csv_rows(path)
        return columns, int(rows[-1]["step"]) if rows else None


def jsonl_end(path: Path) -> int | None:
    """The last epoch of history.jsonl; None where there is none yet."""
    if not path.exists():
        return None
    with reading_rows(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["epoch"]) if lines else None


@contextmanager
def reading_rows(path: Path) -> Iterator[None]:
    """ValueError with the file's name for rows that are none (of a run whose checkpoints note no digest of them)."""
    try:
        yield
    except (ValueError, LookupError, TypeError, StopIteration, csv.Error) as error:
        raise ValueError(f"{path}: its rows cannot be read ({error}); delete it to go on without them") from error
