# SPDX-License-Identifier: Apache-2.0
"""metrics.csv, history.jsonl and TensorBoard's events have every row once, whatever died between which two of them.

The events are read by TensorBoard's own EventAccumulator, and once more event by event, which would show what the
accumulator may put right.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ends import assert_same_end
from tests.helpers.forked import end_of, start
from tests.helpers.smoke_runs import argv_of

# the process's start in which it dies: (where, what is called there, at which call, before or after it)
Death = tuple[str, str, int, str]
DEATHS: list[Death] = [
    ("common.engine.run:Run", "metrics", 2, "after"),
    ("common.engine.run:Run", "history", 1, "before"),
    ("common.engine.run:Run", "history", 1, "after"),
    ("common.engine.checkpoint:CheckpointStore", "save", 1, "before"),
    ("common.engine.checkpoint:CheckpointStore", "save", 2, "after"),
    ("common.engine.run:Run", "metrics", 1, "before"),
    ("common.engine.run:Run", "finish", 1, "before"),
]


def dying(death: Death) -> Callable[[], None]:
    """What a new process does first: arrange to be killed there."""

    def first() -> None:
        owner, name, at, when = death
        module, _, kind = owner.partition(":")
        holder = getattr(importlib.import_module(module), kind)
        plain, calls = getattr(holder, name), 0

        def calling(*arguments: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            found = plain(*arguments, **more)
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(holder, name, calling)

    return first


def events_of(run: Path) -> list[tuple[str, int, float | None]]:
    """(figure, step, value) of every event in the folder, in the order that they lie there; None for a picture or the
    table of flags.
    """
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    util = pytest.importorskip("tensorboard.util.tensor_util")
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                scalar = value.metadata.plugin_data.plugin_name == "scalars"
                number = float(util.make_ndarray(value.tensor)) if scalar else None
                found.append((value.tag, event.step, number))
    return found


def check_rows(run: Path, steps: list[int], epochs: int) -> None:
    """Every row once, in order, and the same in the three places."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == steps
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(epochs))
    wanted = {
        (key, int(row["step"])): float(text)
        for row in rows
        for key, text in row.items()
        if key != "step" and text != ""
    }
    found = events_of(run)
    assert len(found) == len({(tag, step) for tag, step, _ in found}), "an event twice"
    numbers = {(tag, step): value for tag, step, value in found if value is not None and not tag.startswith("final/")}
    assert numbers.keys() == wanted.keys(), "an event missing, or of no row"
    for key, value in numbers.items():
        assert value == pytest.approx(wanted[key], rel=1e-6), key
    finals = {tag: step for tag, step, value in found if value is not None and tag.startswith("final/")}
    assert set(finals.values()) == {steps[-1]}
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert set(shown.Tags()["scalars"]) == {tag for tag, _ in wanted} | finals.keys()
    for tag in {tag for tag, _ in wanted}:
        assert [event.step for event in shown.Scalars(tag)] == sorted(step for key, step in wanted if key == tag)


def killed(name: str, deaths: list[Death], flags: tuple[str, ...], folder: Path) -> Path:
    """A run that dies so often, and then ends."""
    importlib.import_module("torch.utils.tensorboard")  # once, here, in place of in each process
    program, argv = argv_of(name, *flags, "--save", str(folder), "--resume", "auto")
    argv.remove("--no-tensorboard")
    said = folder.with_suffix(".txt")
    for death in deaths:
        code = end_of(start(program, argv, said, dying(death)))
        assert code == -signal.SIGKILL, f"{death}: {code}\n{said.read_text()}"
        for events in (folder / "tensorboard").glob("*"):
            os.truncate(events, events.stat().st_size * 2 // 3)  # the rest waited in the killed process
    assert end_of(start(program, argv, said)) == 0, said.read_text()
    return folder


def test_a_training_that_died_seven_times(tmp_path: Path) -> None:
    flags = ("--epochs", "3", "--log-every", "2", "--init-channels", "2")
    run = killed("qdarts train", DEATHS, flags, tmp_path / "run")
    check_rows(run, [2, 3, 5, 6, 8, 9], 3)
    whole = killed("qdarts train", [], flags, tmp_path / "whole")
    check_rows(whole, [2, 3, 5, 6, 8, 9], 3)
    assert_same_end(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("darts search", [2, 4]), ("enas search", [2, 4]), ("enas train", [2, 4])])
@pytest.mark.parametrize("often", [(), ("--checkpoint-minutes", "1e-9")])
def test_searches_and_enas_that_died(name: str, steps: list[int], often: tuple[str, ...], tmp_path: Path) -> None:
    deaths: list[Death] = [
        ("common.engine.run:Run", "history", 1, "after"),
        ("common.engine.run:Run", "metrics", 1, "after"),
        ("common.engine.checkpoint:CheckpointStore", "save", 1, "after"),
        ("common.engine.run:Run", "finish", 1, "before"),
    ]
    check_rows(killed(name, deaths, often, tmp_path / "run"), steps, 2)
