# SPDX-License-Identifier: Apache-2.0
"""Samples in turns, by a clock that only the calls move: what is kept, what is left out, percentiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.recipes import timing
from common.recipes.timing import interleaved, percentile, steady


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_samples_are_what_each_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setitem(timing.CLOCKS, "told", clock)

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    calls = [lambda: call("short", 0.25), lambda: call("long", 4.0)]
    samples = interleaved(calls, rounds=6, least_seconds=1.0, clock="told")
    assert samples == [[0.25] * 6, [4.0] * 6]
    assert order.count("long") == 2 + 6, "a warm-up, a look at how long it takes, then once a turn"
    assert order.count("short") == 2 + 6 * 4, "as often as fills a second"
    turns = "".join(name[0] for name in order[4:])
    assert "l" in turns[:5] and turns.count("ll") <= 3, "in turns, and not always in the same order"


def test_what_another_process_took_is_left_out() -> None:
    calm = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01]
    mean, std, n = steady([*calm, 9.0, 30.0])
    assert (mean, std, n) == (pytest.approx(np.mean(calm)), pytest.approx(np.std(calm, ddof=1)), 7)
    assert steady([2.0, 2.0, 2.0]) == (2.0, 0.0, 3)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.sampled_from([0.5, 0.95, 1.0]))
def test_percentiles_are_numpys(samples: list[float], share: float) -> None:
    expected = np.percentile(samples, 100 * share, method="inverted_cdf")
    assert percentile(samples, share) == pytest.approx(float(expected), abs=0)
