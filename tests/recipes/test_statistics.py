# SPDX-License-Identifier: Apache-2.0
"""Intervals against scipy and against their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.recipes.statistics import (
    mean_and_deviation,
    mean_interval,
    student_cdf,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 5), (5, 5), (1, 1), (343, 360), (9741, 10_000), (25_000, 50_000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(correct: int, n: int, level: float) -> None:
    wanted = stats.binomtest(correct, n).proportion_ci(level, method="wilson")
    assert wilson_interval(correct, n, level) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(pair: tuple[int, int]) -> None:
    correct, n = pair
    z = 1.959963984540054
    for end in wilson_interval(correct, n):
        assert 0 <= end <= 1
        # the ends are the proportions p whose score test just rejects: (share - p)^2 = z^2 p (1 - p) / n
        assert (correct / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 30, 101])
def test_student_equals_scipy(freedom: int) -> None:
    for t in (-30.0, -3.0, -0.2, 0.0, 0.5, 2.0, 12.7):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for probability in (0.001, 0.25, 0.5, 0.6, 0.975, 0.9995):
        wanted = stats.t.ppf(probability, freedom)
        assert student_quantile(probability, freedom) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_mean_deviation_and_interval() -> None:
    values = [0.951, 0.962, 0.943]
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(0.952)
    assert deviation == pytest.approx(math.sqrt((0.001**2 + 0.010**2 + 0.009**2) / 2))
    low, high = mean_interval(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, loc=mean, scale=stats.sem(values)))
    assert mean_and_deviation([0.5]) == (0.5, None)
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


def test_impossible_input_is_refused() -> None:
    for correct, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="proportion"):
            wilson_interval(correct, n)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, 1.0)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="out of range"):
        student_quantile(0.5, 0)
