# SPDX-License-Identifier: Apache-2.0
"""A loss or gradient that is not finite: nothing is updated by it, at a log point or between two, in every loop.

The program ends with 1 and one line; its newest checkpoint is, bit for bit, the state before that step; a healthy
machine goes on from there as if nothing had been. (Every optimiser and position: tests/engine/test_guard.py,
test_search_loop.py, test_train_loop.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common.data import Stream
from common.engine import load_state
from common.engine.search_loop import SearchLoop
from common.engine.train_loop import _Training
from enas.loop import ChildLoop
from enas.search_loop import SearchLoop as EnasSearchLoop
from tests.helpers.ends import assert_same, assert_same_end, clockless, newest, rows_of
from tests.helpers.smoke_runs import argv_of, call

LOOPS = {"search": (SearchLoop, "weights"), "train": (_Training, "parameters"), "enas": (ChildLoop, "trained")}


def bad_images(stream: str, value: float) -> Callable[[pytest.MonkeyPatch, int], None]:
    """Batches of a stream are not finite at one step (counted over the run)."""

    def install(patch: pytest.MonkeyPatch, step: int) -> None:
        plain = Stream.batch

        def batch(self: Stream, epoch: int, number: int) -> tuple[Tensor, Tensor]:
            x, y = plain(self, epoch, number)
            return (x * value if self._order.name == stream and at(epoch, number) == step else x), y

        patch.setattr(Stream, "batch", batch)

    return install


def at(epoch: int, number: int) -> int:
    """Smoke runs of this file have two steps an epoch, of one batch each."""
    return 2 * epoch + number


def bad_gradient(loop: str, value: float) -> Callable[[pytest.MonkeyPatch, int], None]:
    """The loss is finite, one parameter's gradient is not."""
    kind, attribute = LOOPS[loop]

    def install(patch: pytest.MonkeyPatch, step: int) -> None:
        plain = kind.one_step

        def one_step(self: Any) -> None:
            parameter = getattr(self, attribute)[0]
            if self.global_step != step:
                return plain(self)
            hook = parameter.register_hook(lambda gradient: gradient * value)
            try:
                plain(self)
            finally:
                hook.remove()

        patch.setattr(kind, "one_step", one_step)

    return install


def bad_reward(patch: pytest.MonkeyPatch, step: int) -> None:
    """The controller's loss is not finite."""
    plain = EnasSearchLoop.one_batch_accuracies
    calls = 0

    def accuracies(self: EnasSearchLoop, *arguments: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [float("nan") if calls == 2 else share for share in plain(self, *arguments)]

    patch.setattr(EnasSearchLoop, "one_batch_accuracies", accuracies)


NAN, INF = float("nan"), float("inf")
TWO = ("--steps-per-epoch", "2")
# (run, its flags, what goes wrong, at which step, the checkpoint that stays)
CASES: dict[str, tuple[str, tuple[str, ...], Callable[[pytest.MonkeyPatch, int], None], int, int]] = {
    "search, gradient, between log points": ("darts search", (), bad_gradient("search", NAN), 3, 3),
    "train, loss, between log points": ("darts train", TWO, bad_images("train", INF), 3, 3),
}
SLOW = {
    "search, weights' loss": ("qdarts search", (), bad_images("search-train", NAN), 3, 3),
    "search, architecture's loss": ("darts search", ("--unrolled",), bad_images("search-valid", NAN), 1, 1),
    "search, first step": ("fbqat search", (), bad_images("search-train", INF), 0, 0),
    "bit search, gradient": ("qsubnet search", ("--arch", "PC_DARTS"), bad_gradient("search", INF), 3, 3),
    "train, gradient, bf16": ("qdarts train", (*TWO, "--precision", "bf16"), bad_gradient("train", NAN), 3, 3),
    "train, first step": ("ptq train", TWO, bad_images("train", NAN), 0, 0),
    "enas search, child": ("enas search", (), bad_gradient("enas", NAN), 1, 1),
    "enas search, controller": ("enas search", (), bad_reward, 0, 3),
    "enas train": ("enas train", (), bad_images("train", NAN), 3, 3),
}


def check(case: tuple[Any, ...], log_every: str, tmp_path: Path) -> None:
    name, flags, break_it, step, kept = case
    flags = (*flags, "--log-every", log_every)
    program, whole = command(name, (*flags, "--checkpoint-minutes", "1e-9"), tmp_path / "whole")
    states: dict[int, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        remember(patch, states)
        code, said = call(program, whole)
    assert code == 0, said
    _, torn = command(name, flags, tmp_path / "torn")
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch, step)
        code, said = call(program, torn)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    assert "is not finite; the state before it is saved. Lower --learning-rate" in line
    assert "Traceback" not in said
    found = newest(tmp_path / "torn")
    assert int(found.name[5:]) == kept
    if kept in states:
        assert_same(clockless(states[kept]), clockless(load_state(found)[0]))
    assert all(int(row["step"]) <= kept for row in rows_of(tmp_path / "torn"))
    assert not (tmp_path / "torn" / "result.json").exists()
    assert call(program, [*torn, "--resume", "auto"])[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "torn")


def command(name: str, flags: tuple[str, ...], save: Path) -> tuple[str, list[str]]:
    """A bit search from drawn weights needs no training."""
    program, argv = argv_of(name, *flags, "--save", str(save))
    if "--init-from" in argv:
        place = argv.index("--init-from")
        del argv[place : place + 2]
    return program, argv


def remember(patch: pytest.MonkeyPatch, states: dict[int, dict[str, Any]]) -> None:
    """Keep the state of every checkpoint of a run, by its step."""
    from common.engine.checkpoint import CheckpointStore

    plain = CheckpointStore.save

    def save(self: CheckpointStore, state: dict[str, Any], *, step: int, **more: Any) -> Path:
        path = plain(self, state, step=step, **more)
        states[step] = load_state(path)[0]
        return path

    patch.setattr(CheckpointStore, "save", save)


@pytest.mark.parametrize("case", CASES)
def test_between_log_points(case: str, tmp_path: Path) -> None:
    check(CASES[case], "100", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "log_every"), [*((case, "100") for case in SLOW), *((case, "1") for case in list(SLOW)[::3])]
)
def test_in_every_loop(case: str, log_every: str, tmp_path: Path) -> None:
    check(SLOW[case], log_every, tmp_path)
