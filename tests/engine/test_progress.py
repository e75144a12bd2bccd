# SPDX-License-Identifier: Apache-2.0
"""Bars vanish where nobody watches; times read well; the estimate is a plain one."""

from __future__ import annotations

import sys

import pytest

from common.engine.progress import Eta, duration, progress, say


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), total=3, label="x")) == [0, 1, 2]
    say("a line")
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == "a line\n"


def test_bar_on_stderr_with_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for item in progress(range(5, 7), total=7, label="epoch 1", start=5):
        say(f"line {item}")
    captured = capsys.readouterr()
    assert "epoch 1" in captured.err and captured.out == "line 5\nline 6\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (12, "12 s"), (98, "98 s"), (180, "3 min"), (7500, "2 h 05 min"), (97_200, "1 d 03 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_eta_takes_the_median_and_counts_what_was_done_before() -> None:
    now = 0.0
    eta = Eta(20, done=5, clock=lambda: now)
    assert eta.text() == "" and eta.seconds_left() is None
    for took in (100.0, 12.0, 12.0):  # a slow first epoch does not throw it off
        now += took
        eta.step()
    assert eta.seconds_left() == 12 * 12
    assert eta.text() == "12 s/epoch, 2 min left"
