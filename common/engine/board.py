# SPDX-License-Identifier: Apache-2.0
"""TensorBoard events of a run: what metrics.csv, history.jsonl and result.json hold, as scalars, pictures and a table.

Nothing is known here of what a picture shows: a painter makes it from an epoch's object of history.jsonl.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Painter = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From an object of history.jsonl to pictures by name, RGB uint8 [height, width, 3]; empty: none of this epoch."""


class Board:
    """The event files of one folder, open for writing. Raises ImportError where TensorBoard is not installed."""

    def __init__(self, folder: Path, *, forget: bool, painter: Painter | None = None) -> None:
        """Older events there are gone. `forget`: a TensorBoard that watches them drops what they said, too."""
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        threading.excepthook = _told_by_the_writer(threading.excepthook)
        self._writer = SummaryWriter(str(folder), purge_step=0 if forget else None)
        self._painter = painter

    def scalars(self, row: Mapping[str, Any], step: int) -> None:
        """The numbers of a row of metrics.csv, as such or as their texts."""
        for key, value in row.items():
            number = _number(value)
            if key != "step" and number is not None:
                self._writer.add_scalar(key, number, step)

    def pictures(self, row: Mapping[str, Any]) -> None:
        """What the painter makes of an epoch's object, at the number of epochs done."""
        for name, image in (self._painter(row) if self._painter is not None else {}).items():
            self._writer.add_image(name, image, row["epoch"] + 1, dataformats="HWC")

    def table(self, flags: Mapping[str, Any], result: Mapping[str, Any], step: int) -> None:
        """Flags and final figures as a line of TensorBoard's own table of runs (its tab HPARAMS)."""
        from torch.utils.tensorboard.summary import hparams

        known = {key: value if isinstance(value, (bool, int, float)) else _text(value) for key, value in flags.items()}
        # what a network was built for stands among the flags
        own = {key: value for key, value in result.items() if key != "network"}
        finals = {f"final/{key}": value for key, value in _flat(own).items()}
        # SummaryWriter.add_hparams would open a folder beside this one, a run of its own for every table
        for summary in hparams({key: value for key, value in known.items() if value is not None}, finals):
            self._writer.file_writer.add_summary(summary)  # type: ignore[union-attr]
        for key, value in finals.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what is not on the disk yet, and close the files. Raises OSError where the disk refuses."""
        self._writer.flush()  # raises what its thread met
        self._writer.close()


def _told_by_the_writer(former: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for errors of threads that keeps quiet of a disk which refuses events: the next row raises that error."""

    def hook(told: Any) -> None:
        events = type(told.thread).__module__.startswith("tensorboard.")
        if not (events and isinstance(told.exc_value, OSError)):
            former(told)

    return hook


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str | None:
    """A flag's value as TensorBoard takes it; None where there is none."""
    return " ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)


def _flat(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a result, those one level down under their own names, `bits_mean.weight` as bits_mean_weight."""
    found: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, Mapping):
            head = "" if key in ("metrics", "cost") else f"{key}_"
            found |= {f"{head}{name}": float(leaf) for name, leaf in value.items() if _counts(leaf)}
        elif _counts(value):
            found[key] = float(value)
    return found


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
