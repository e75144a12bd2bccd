# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment: processes are killed again and again, and their end equals that of a run in one go.

Half of the kills come at a random time, from before the run folder is there to after the last step. The others are the
process's own, at a random call within its saves: in the middle of a file, between a file and its rename, between the
rename and the removal of an older checkpoint. Every run goes on with `--resume auto` and nothing else.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ends import assert_same_end, newest
from tests.helpers.forked import end_of, kill_after, start
from tests.helpers.smoke_runs import RUNS, TRAINED, argv_of

OFTEN = ("--checkpoint-minutes", "1e-9")  # after every step
KILLS = 5  # of each program, at least
PLACES = (
    "before the run's folder is open",
    "before the first checkpoint",
    "within a save",
    "rows written, checkpoint not",
    "between two checkpoints",
    "after the last step",
)


class Kill:
    """One kill: `seconds` after the start from outside, or by what `first` does in the process that is to die."""

    def __init__(self, draw: random.Random, seconds: float) -> None:
        self.moment = draw.choice(("time", "time", "fsync", "rename"))
        self.count = draw.randint(1, 24)
        self.seconds = draw.uniform(0, seconds) if self.moment == "time" else 600.0

    def first(self) -> None:
        """In the process that is to be killed: die at the n-th call."""
        if self.moment == "time":
            return
        name = self.moment
        left, plain = self.count, getattr(os, name)

        def counting(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left:
                return plain(*arguments, **more)
            if name == "fsync":
                half_written(arguments[0])
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, counting)


def half_written(handle: int) -> None:
    """Cut a file that is not synced yet to what a disk may have of it."""
    path = os.readlink(f"/proc/self/fd/{handle}")
    if ".tmp-" in path and os.path.isfile(path):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)


def place_of(run: Path, steps: int) -> str:
    """Where a kill fell, as the folder tells."""
    checkpoints = run / "checkpoints"
    if not (run / "config.json").exists():
        return PLACES[0]
    if list(run.glob(".tmp-*")) or list(checkpoints.glob(".tmp-*")) or list(checkpoints.glob("*.replaced")):
        return PLACES[2]
    if not list(checkpoints.glob("step-*")):
        return PLACES[1]
    meta = json.loads((newest(run) / "meta.json").read_text())
    if meta["step"] == steps:
        return PLACES[5]
    longer = [(run / name).stat().st_size > length for name, length in meta["extra"].get("files", {}).items()]
    return PLACES[3] if any(longer) else PLACES[4]


def run_through(program: str, argv: list[str], said: Path, kills: Callable[[], Kill], steps: int) -> list[str]:
    """Start a program, and again after every kill, until it ends by itself; where the kills fell."""
    run, places = Path(argv[argv.index("--save") + 1]), []
    for attempt in range(100):
        # later attempts come less early, or a slow machine would never get to the end
        kill = kills()
        child = start(program, argv, said, kill.first)
        code = kill_after(child, kill.seconds * (1 + attempt / 4))
        if code == 0:
            return places
        assert code == -signal.SIGKILL, f"exit code {code}\n{said.read_text()}"
        places.append(place_of(run, steps))
    raise AssertionError(f"{program} did not get to its end\n{said.read_text()[-5000:]}")


def kill_again_and_again(
    name: str, trained: Path | None, folder: Path, draw: random.Random, kills: int
) -> Counter[str]:
    """Runs of one program that are killed, at least so many times in all; each ends as one that was not."""
    program, argv = argv_of(name, *(() if name == "ptq quantize" else OFTEN), trained=trained)
    started = time.monotonic()
    assert end_of(start(program, [*argv, "--save", str(folder / "whole")], folder / "whole.txt")) == 0
    whole = time.monotonic() - started
    steps = int(newest(folder / "whole").name[5:])
    found: Counter[str] = Counter()
    for number in range(20):
        torn = folder / f"torn-{number}"
        words = [*argv, "--save", str(torn), "--resume", "auto"]
        places = run_through(program, words, folder / f"{number}.txt", lambda: Kill(draw, whole), steps)
        assert_same_end(folder / "whole", torn)
        assert not list(torn.rglob(".tmp-*")), "debris of a killed save"
        assert "Traceback" not in (folder / f"{number}.txt").read_text()
        found.update(places)
        if found.total() >= kills:
            return found
    raise AssertionError(f"{name}: only {found.total()} kills in 20 runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision training: teacher, start, and what is quantised."""
    folder = tmp_path_factory.mktemp("trained")
    assert end_of(start(TRAINED[0], [*TRAINED[1:], "--save", str(folder / "run")], folder / "said.txt")) == 0
    return folder / "run"


def test_a_training_killed_a_few_times(tmp_path: Path) -> None:
    found = kill_again_and_again("qdarts train", None, tmp_path, random.Random(3), 4)
    assert found.total() >= 4


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_sixty_kills(trained: Path, tmp_path: Path) -> None:
    """Search and training of all six methods, and the quantisation. Two ranks: test_torchrun_restart.py."""
    table: dict[str, Counter[str]] = {}
    for number, name in enumerate(RUNS):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        table[name] = kill_again_and_again(name, trained, folder, random.Random(number), KILLS)
    total = sum(table.values(), Counter())
    for name, found in (table | {"all": total}).items():
        print(f"{name:<16}{found.total():>4} kills: " + ", ".join(f"{n} {p}" for p, n in found.most_common()))
    assert total.total() >= 60
    assert total["within a save"] >= 5, "kills within saves are the processes' own, so they cannot be missing"
