# SPDX-License-Identifier: Apache-2.0
"""Signals to whole programs, wherever they are: the documented exit code, a checkpoint where one is due, and in the end
what an uninterrupted run has.

The mechanism itself is tested in tests/engine/test_preemption.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ends import assert_same_end, newest
from tests.helpers.forked import end_of, start
from tests.helpers.smoke_runs import TRAINED, argv_of

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2


def signalled(owner: str, name: str, number: int, at: int = 1, twice: bool = False) -> Callable[[], None]:
    """What a new process does first: arrange to be signalled, once or twice, within the `at`-th call of a function."""

    def first() -> None:
        import importlib

        signal.signal(INT, signal.default_int_handler)  # a parent in the background may ignore it, which is inherited
        module, _, kind = owner.partition(":")
        holder: Any = importlib.import_module(module)
        holder = getattr(holder, kind) if kind else holder
        plain, calls = getattr(holder, name), 0

        def calling(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                if twice:
                    importlib.import_module("common.engine.preemption").REPEATED_SECONDS = -1.0
                    os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
            return plain(*arguments, **more)

        setattr(holder, name, calling)

    return first


LOADING = ("common.recipes.setup", "load")
SEARCH_STEP = ("common.engine.search_loop:SearchLoop", "one_step")
SEARCH_EVALUATION = ("common.recipes.search", "_evaluate")
CONCLUSION = ("common.recipes.search", "_conclude")
TRAIN_STEP = ("common.engine.train_loop:_Training", "one_step")
TEST = ("common.recipes.train", "final_figures")
SAVING = ("common.engine.checkpoint", "write_synced")
CONTROLLER = ("enas.search_loop:SearchLoop", "later_step")
ENAS_EVALUATION = ("enas.loop:ChildLoop", "_evaluate")
CALIBRATION = ("ptq.post_training", "observe")

# what it is: (run, what is called, signal, at which call, exit code, newest checkpoint; None: none is there)
Case = tuple[str, tuple[str, str], int, int, int, int | None]
CASES: dict[str, Case] = {
    "evaluation of the last epoch": ("darts search", SEARCH_EVALUATION, USR2, 2, 140, 4),
}
SLOW: dict[str, Case] = {
    "a step of a training": ("darts train", TRAIN_STEP, USR1, 2, 138, 2),
    "loading of the data": ("darts search", LOADING, TERM, 1, -TERM, None),
    "loading of the data, Ctrl-C": ("darts search", LOADING, INT, 1, 130, None),
    "first step": ("darts search", SEARCH_STEP, INT, 1, 130, 1),
    "last step": ("darts search", SEARCH_STEP, TERM, 4, 143, 4),
    "evaluation": ("darts search", SEARCH_EVALUATION, TERM, 1, 143, 2),
    "saving": ("darts search", SAVING, USR1, 1, 138, 2),
    "after the last step": ("darts search", CONCLUSION, TERM, 1, -TERM, 4),
    "the test after a training": ("darts train", TEST, INT, 1, 130, 6),
    "an update of the controller": ("enas search", CONTROLLER, TERM, 1, 143, 3),
    "evaluation of a child": ("enas search", ENAS_EVALUATION, USR1, 1, 138, 4),
    "evaluation of a child, last epoch": ("enas search", ENAS_EVALUATION, INT, 2, 130, 8),
    "calibration": ("ptq quantize", CALIBRATION, TERM, 1, -TERM, None),
    "calibration, Ctrl-C": ("ptq quantize", CALIBRATION, INT, 1, 130, None),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a name, made once; "trained" is what is quantised."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder / name.replace(" ", "-")
            trained = make("trained") if name == "ptq quantize" else None
            program, *argv = TRAINED if name == "trained" else (argv_of(name)[0], *argv_of(name, trained=trained)[1])
            assert end_of(start(program, [*argv, "--save", str(made[name])], folder / "said.txt")) == 0
        return made[name]

    return make


def check(case: Case, whole: Callable[[str], Path], tmp_path: Path) -> None:
    name, what, number, at, code, step = case
    trained = whole("trained") if name == "ptq quantize" else None
    program, argv = argv_of(name, "--save", str(tmp_path / "run"), "--resume", "auto", trained=trained)
    found = end_of(start(program, argv, tmp_path / "said.txt", signalled(*what, number, at)))
    said = (tmp_path / "said.txt").read_text()
    assert found == code, said
    assert "Traceback" not in said
    if code > 128:
        assert said.rstrip().splitlines()[-1].endswith("; --resume auto goes on")
    checkpoints = tmp_path / "run" / "checkpoints"
    if step is None:
        assert not list(checkpoints.glob("*"))
    else:
        assert int(newest(tmp_path / "run").name[5:]) == step
    assert not (tmp_path / "run" / "result.json").exists()
    assert end_of(start(program, argv, tmp_path / "again.txt")) == 0, (tmp_path / "again.txt").read_text()
    assert_same_end(whole(name), tmp_path / "run")


@pytest.mark.parametrize("moment", CASES)
def test_a_signal(moment: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    check(CASES[moment], whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", SLOW)
def test_a_signal_wherever_the_program_is(moment: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    check(SLOW[moment], whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(TERM, -TERM), (INT, 130)])
def test_a_second_signal_ends_at_once(number: int, code: int, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Without a checkpoint of that step; the ones before are whole."""
    program, argv = argv_of("darts search", "--save", str(tmp_path / "run"), "--resume", "auto")
    first = signalled(*SEARCH_STEP, number, 4, twice=True)
    assert end_of(start(program, argv, tmp_path / "said.txt", first)) == code, (tmp_path / "said.txt").read_text()
    assert int(newest(tmp_path / "run").name[5:]) == 2
    assert "Traceback" not in (tmp_path / "said.txt").read_text()
    assert end_of(start(program, argv, tmp_path / "again.txt")) == 0
    assert_same_end(whole("darts search"), tmp_path / "run")
