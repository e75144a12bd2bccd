# SPDX-License-Identifier: Apache-2.0
"""ENAS on one process and on two with the same batch: the same weights, controller and architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.engine import load_state
from common.engine.cli import Config
from enas.flags import make_parser, resolve
from enas.recipe import run_search, run_training
from tests.helpers.ranks import on_ranks

SMALL = ["--preset", "smoke", "--no-tensorboard", "--device", "cpu", "--layer-bits", "float", "--sync-bn"]


def config(stage: str, *flags: str | Path) -> Config:
    return resolve(make_parser("program", "", stage), [*SMALL, *map(str, flags)], stage)


def last(run: Path) -> dict[str, Any]:
    return load_state(max((run / "checkpoints").glob("step-*")))[0]


def assert_near(one: dict[str, Any], two: dict[str, Any], bound: float) -> None:
    """float32, and Adam divides small gradients by small numbers."""
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= bound * tensor.abs().max().clamp_min(1), name


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["1", "2"])
def test_a_search(tmp_path: Path, parts: str) -> None:
    for ranks in (1, 2):
        flags = ["--grad-accumulation", parts, "--learning-rate", "0.001", "--save", tmp_path / str(ranks)]
        on_ranks(ranks, lambda flags=flags: run_search(config("search", *flags)) and None)
    one, two = (last(tmp_path / name) for name in "12")
    assert_near(one["model"], two["model"], 1e-4)
    assert_near(one["controller"], two["controller"], 1e-5)
    assert one["row"]["architectures"] == two["row"]["architectures"]
    assert one["row"]["valid_top1"] == two["row"]["valid_top1"] and one["updates"] == two["updates"]


@pytest.mark.slow
def test_a_training(tmp_path: Path) -> None:
    for ranks in (1, 2):
        flags = ["--keep-prob", "1.0", "--loss", "cross-entropy", "--learning-rate", "0.001", "--epochs", "1"]
        flags += ["--save", tmp_path / str(ranks)]
        on_ranks(ranks, lambda flags=flags: run_training(config("train", *flags)) and None)
    one, two = (last(tmp_path / name) for name in "12")
    assert_near(one["model"], two["model"], 1e-5)
    assert one["row"]["train_top1"] == two["row"]["train_top1"]


def test_a_search_on_two_ranks_ends_alike(tmp_path: Path) -> None:
    """Ternary weights, normalisation by each rank's own images: no process knows the other's, and both end the same."""
    flags = [
        "--preset",
        "smoke",
        "--no-tensorboard",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--save",
        str(tmp_path / "run"),
    ]

    def work() -> dict[str, Any]:
        found = run_search(resolve(make_parser("program", "", "search"), flags, "search"))
        return {"finalists": str(found["finalists"]), "rows": found["metrics"]}

    one, two = on_ranks(2, work)
    assert one["finalists"] == two["finalists"] and one["rows"] == two["rows"]
