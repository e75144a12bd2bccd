# SPDX-License-Identifier: Apache-2.0
"""Every loop there is, stopped before each of its steps and after its last, ends as if it had never been stopped.

A case is one program: once in one go, and once stopped by a signal at every boundary (the first step, within an epoch,
an epoch's end, the last step and after it), each time going on from the checkpoint that the signal made. Compared are
every tensor and number of the last checkpoint, history.jsonl, metrics.csv, architecture.json and result.json.
"""

from __future__ import annotations

import importlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import preemption
from common.engine.checkpoint import CheckpointStore
from common.engine.search_loop import SearchLoop
from tests.helpers.ends import assert_same, assert_same_end, end_of, newest
from tests.helpers.smoke_runs import RUNS, argv_of, call

SCHEDULES = ("--lr-schedule", "step", "--lr-step-epochs", "1", "--lr-warmup-epochs", "1", "--epochs", "3")
# name: (run of RUNS, what it changes, steps of the whole run)
CASES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "search, second order": ("qdarts search", ("--unrolled",), 4),
    "train, lsq with a teacher": ("fbqat train", ("--steps-per-epoch", "2"), 4),
}
QUICK_STOPS = (1, 2)
"""Of the four steps of a quick case: within an epoch and at an epoch's end."""
SLOW: dict[str, tuple[str, tuple[str, ...], int]] = CASES | {
    "enas search": ("enas search", ("--layer-bits", "stochastic"), 8),
    "enas search, controller now and then": (
        "enas search",
        ("--controller-train-every", "2", "--epochs", "3", "--layer-bits", "stochastic"),
        8,
    ),
    "qdarts search, bf16, all bits": ("qdarts search", ("--precision", "bf16", "--bits", "2", "4", "8"), 4),
    "qdarts search, accumulation, gammas above": (
        "qdarts search",
        ("--grad-accumulation", "2", "--gamma-level", "upper"),
        4,
    ),
    "qdarts search, warm-up, every second step": (
        "qdarts search",
        ("--epochs", "3", "--warmup-epochs", "1", "--arch-every", "2"),
        6,
    ),
    "qdarts train, best of the held-out part": (
        "qdarts train",
        ("--val-fraction", "0.2", "--select", "val", "--drop-path-prob", "0.4", "--label-smoothing", "0.1"),
        6,
    ),
    "qdarts train, bf16, schedules": ("qdarts train", ("--precision", "bf16", "--steps-per-epoch", "2", *SCHEDULES), 6),
    "darts search, first order": ("darts search", ("--method", "darts", "--track-eigenvalue"), 4),
    "darts search, second order, exact": (
        "darts search",
        ("--method", "darts", "--unrolled", "--second-order", "exact"),
        4,
    ),
    "darts search, second order, finite difference, bf16": (
        "darts search",
        ("--method", "darts", "--unrolled", "--second-order", "finite-difference", "--precision", "bf16"),
        4,
    ),
    "pc-darts search": ("darts search", ("--method", "pc-darts"), 4),
    "darts train, accumulation, auxiliary head": (
        "darts train",
        ("--grad-accumulation", "2", "--auxiliary", "--image-size", "32", "--cutout", "--cutout-length", "4"),
        6,
    ),
    "fbqat search, fixed bits": ("fbqat search", (), 4),
    "qsubnet search, schedules": ("qsubnet search", SCHEDULES, 6),
    "qsubnet train": ("qsubnet train", (), 6),
    "ptq search": ("ptq search", (), 4),
    "ptq train, deterministic": ("ptq train", ("--deterministic", "--checkpoint-cells"), 6),
    "enas search, latent weights, cost in the reward": (
        "enas search",
        ("--reward", "accuracy-bitops", "--target-bitops", "1M", "--layer-bits", "ternary", "--precision", "bf16"),
        8,
    ),
    "enas train, drop path, accumulation": (
        "enas train",
        ("--drop-path-keep-prob", "0.7", "--grad-accumulation", "2", "--augment", "--layer-bits", "stochastic"),
        4,
    ),
}


@contextmanager
def stop_before(step: int) -> Iterator[None]:
    """SIGTERM arrives just before the boundary before this step is looked at."""
    plain = preemption.give_way

    def signalled(now: int, save: Callable[[], object], **more: Any) -> None:
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        plain(now, save, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "give_way", signalled)
        yield


def stopped_at(stops: Iterable[int], program: str, argv: list[str]) -> None:
    """Run a program by these stops, each from the one before, and to its end."""
    folder = Path(argv[argv.index("--save") + 1])
    for step in stops:
        torch.manual_seed(1000 + step)  # nothing may hang on what this process drew before
        random.seed(step)
        handlers = {number: signal.getsignal(number) for number in preemption.SIGNALS}
        with stop_before(step):
            code, said = call(program, [*argv, "--resume", "auto"])
        assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == handlers
        assert code == 128 + signal.SIGTERM, said
        assert int(newest(folder).name[5:]) == step
        assert f"stopped by SIGTERM after step {step}, which is saved; --resume auto goes on" in said
    code, said = call(program, [*argv, "--resume", "auto"])
    assert code == 0 and f"going on in {folder} after step {step}\n" in said


def check(case: tuple[str, tuple[str, ...], int], stops: Iterable[int], trained: Path, tmp_path: Path) -> None:
    name, more, steps = case
    program, whole = argv_of(name, *more, "--save", str(tmp_path / "whole"), trained=trained)
    code, said = call(program, whole)
    assert code == 0, said
    assert int(newest(tmp_path / "whole").name[5:]) == steps
    _, torn = argv_of(name, *more, "--save", str(tmp_path / "torn"), trained=trained)
    stopped_at(stops, program, torn)
    assert_same_end(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize("case", CASES)
def test_from_any_step(case: str, trained: Path, tmp_path: Path) -> None:
    check(CASES[case], QUICK_STOPS, trained, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_from_any_step_of_every_loop(case: str, trained: Path, tmp_path: Path) -> None:
    check(SLOW[case], range(SLOW[case][2] + 1), trained, tmp_path)


def test_every_loop_is_among_the_cases() -> None:
    """ptq/quantize.py has no steps: it starts over (below)."""
    assert {case[0] for case in SLOW.values()} == RUNS.keys() - {"ptq quantize"}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupts."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    program, argv = argv_of("darts search", "--save", str(folder))
    assert call(program, argv)[0] == 0
    return folder


@pytest.mark.parametrize("end", ["signal", pytest.param("crash", marks=pytest.mark.slow)])
def test_between_the_architectures_step_and_the_weights(
    end: str, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal there takes effect at the step's end, a crash there goes back to its beginning; both lose nothing.

    Half a step is never saved: the alphas of the checkpoint and its weights are of one step.
    """
    program, torn = argv_of("darts search", "--save", str(tmp_path / "torn"), "--checkpoint-minutes", "1e-9")
    plain, taken = SearchLoop.weight_step, []

    def interrupted(loop: SearchLoop, batch: Any) -> None:
        taken.append(loop.global_step)
        if len(taken) == 3:
            if end == "crash":
                raise LookupError("the machine is gone")
            signal.raise_signal(signal.SIGUSR1)
        plain(loop, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SearchLoop, "weight_step", interrupted)
        if end == "crash":
            with pytest.raises(LookupError, match="the machine is gone"):
                call(program, torn)
        else:
            code, said = call(program, torn)
            assert code == 128 + signal.SIGUSR1, said
    assert taken == [0, 1, 2]
    assert int(newest(tmp_path / "torn").name[5:]) == (2 if end == "crash" else 3)
    assert call(program, [*torn, "--resume", "auto"])[0] == 0
    assert_same_end(searched, tmp_path / "torn")


def test_the_comparison_sees_the_smallest_difference(searched: Path) -> None:
    def change(end: dict[str, Any], key: str) -> None:
        if key == "state":
            weight = end["state"]["model"]["classifier.weight"]
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        elif key == "metrics":
            del end["metrics"][-1]
        elif key == "result":
            end["result"]["metrics"]["train_loss"] += 1e-15
        else:
            end[key] += " "

    assert_same(end_of(searched), end_of(searched))
    for key in ("state", "metrics", "result", "history", "architecture"):
        changed = end_of(searched)
        change(changed, key)
        with pytest.raises(AssertionError, match=rf"end\.{key}"):
            assert_same(end_of(searched), changed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the checkpoint", "after it"])
def test_a_quantisation_starts_over(
    moment: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, whole = argv_of("ptq quantize", "--save", str(tmp_path / "whole"), trained=trained)
    assert call(program, whole)[0] == 0
    plain = CheckpointStore.save

    def crash(store: CheckpointStore, state: dict[str, Any], **more: Any) -> Path:
        if moment == "after it":
            plain(store, state, **more)
        raise LookupError("the machine is gone")

    _, torn = argv_of("ptq quantize", "--save", str(tmp_path / "torn"), trained=trained)
    with monkeypatch.context() as patch, pytest.raises(LookupError, match="the machine is gone"):
        patch.setattr(CheckpointStore, "save", crash)
        call(program, torn)
    assert call(program, [*torn, "--resume", "auto"])[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["enas search", "fbqat train"])
def test_an_earlier_checkpoint_by_name(name: str, trained: Path, tmp_path: Path) -> None:
    """What came after it is set aside, and the end is the same."""
    program, argv = argv_of(name, "--save", str(tmp_path / "run"), "--checkpoint-minutes", "1e-9", trained=trained)
    last = 8 if name == "enas search" else 6
    with stop_before(last):
        assert call(program, argv)[0] == 128 + signal.SIGTERM
    named = tmp_path / "run" / "checkpoints" / f"step-{last - 1:08d}"
    code, said = call(program, [*argv, "--resume", str(named)])
    assert code == 0 and "set aside, being newer" in said
    _, whole = argv_of(name, "--save", str(tmp_path / "whole"), "--checkpoint-minutes", "1e-9", trained=trained)
    assert call(program, whole)[0] == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_programs_are_the_projects(root: Path) -> None:
    for program, *_ in RUNS.values():
        assert (root / program).is_file() and importlib.import_module(program[:-3].replace("/", ".")).main
