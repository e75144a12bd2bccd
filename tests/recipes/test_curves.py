# SPDX-License-Identifier: Apache-2.0
"""Curves: what metrics.csv holds is drawn with its labels, whatever state the file is in."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.recipes.curves import draw_curves, read_metrics

HEAD = "step,epoch,train_loss,train_top1,valid_top1,entropy,learning_rate,seconds\n"


def run_with(folder: Path, text: str) -> Path:
    (folder / "metrics.csv").write_text(text)
    return folder


def texts(picture: bytes) -> list[str]:
    root = ElementTree.fromstring(picture)
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_columns_become_panels(tmp_path: Path) -> None:
    run = run_with(tmp_path, HEAD + "10,0,2.3,.1,.15,57.2,.05,9\n20,1,1.9,.3,.35,56.1,.02,9\n")
    shown = texts(draw_curves(run))
    assert {"loss", "accuracy, %", "entropy, nats", "learning rate", "controller", "validation"} <= set(shown)
    assert not {"reward", "cost, M BitOps", "alphas", "test"} & set(shown)  # nothing was measured


def test_the_newest_row_of_an_epoch_counts_and_gaps_stay_gaps(tmp_path: Path) -> None:
    found = read_metrics(run_with(tmp_path, HEAD + "5,0,9,.1,,1,.1,1\n10,0,2,.2,,1,.1,2\n20,1,1,.5,.4,1,.1,3\n"))
    assert found["train_loss"] == [2.0, 1.0] and found["epoch"] == [0.0, 1.0]
    assert math.isnan(found["valid_top1"][0]) and found["valid_top1"][1] == 0.4


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_half_written_line_is_passed_over(tmp_path: Path, cut: int) -> None:
    whole = HEAD + "10,0,2.3,.1,.15,57.2,.05,9\n"
    found = read_metrics(run_with(tmp_path, whole + "20,1,1.9,.3,.35"[:cut]))
    assert found["step"] == [10.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no metrics.csv"),
        ("", "no row of an epoch"),
        (HEAD, "no row"),
        ("epoch,seconds\n0,1\n", "none of the curves"),
    ],
)
def test_nothing_to_draw_is_said(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        run_with(tmp_path, text)
    with pytest.raises(ValueError, match=said):
        draw_curves(tmp_path)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = run_with(tmp_path, HEAD + "10,0,2.3,.1,.15,57.2,.05,9\n")
    assert draw_curves(run) == draw_curves(run)
    assert draw_curves(run, "png")[:8] == b"\x89PNG\r\n\x1a\n" and draw_curves(run, "pdf")[:4] == b"%PDF"
