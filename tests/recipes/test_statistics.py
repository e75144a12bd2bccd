# SPDX-License-Identifier: Apache-2.0
"""Intervals, components of variance and ranks, against scipy and against their definitions."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.recipes.statistics import (
    grouped_mean_interval,
    mean_and_deviation,
    mean_interval,
    rank_labels,
    student_cdf,
    student_quantile,
    variance_components,
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


def test_components_by_hand() -> None:
    # means 2 and 5; MSB = 2 * 2 * 1.5^2 / 1 = 9, MSW = (2 + 2) / 2 = 2, n0 = 2: between = (9 - 2) / 2
    assert variance_components([[1.0, 3.0], [4.0, 6.0]]) == pytest.approx((3.5, 2.0))
    assert variance_components([[1.0, 3.0], [2.0, 2.0]]) == pytest.approx((-0.5, 1.0))  # unbiased, hence below zero


groups_of_values = st.lists(
    st.lists(st.integers(10, 99).map(lambda x: x / 100), min_size=1, max_size=5), min_size=2, max_size=5
)


@given(groups_of_values.filter(lambda groups: sum(map(len, groups)) > len(groups)))
def test_components_explain_the_mean_squares_of_scipy(groups: list[list[float]]) -> None:
    between, within = variance_components(groups)
    sizes = [len(group) for group in groups]
    typical = (sum(sizes) - sum(n * n for n in sizes) / sum(sizes)) / (len(sizes) - 1)
    if within is not None and within > 1e-9:
        # F = MSB / MSW, and the expected MSB is within + n0 * between
        assert (within + typical * between) / within == pytest.approx(stats.f_oneway(*groups).statistic, rel=1e-6)
    pooled = sum(variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
    assert within == pytest.approx(pooled / (sum(sizes) - len(sizes)), abs=1e-12)


def test_components_are_unbiased() -> None:
    draw = random.Random(0)
    found = []
    for _ in range(4000):  # standard deviations 2 between and 1 within, groups of unequal size
        groups = []
        for size in (1, 2, 4):
            centre = draw.gauss(0, 2)
            groups.append([draw.gauss(centre, 1) for _ in range(size)])
        found.append(variance_components(groups))
    assert fmean(pair[0] for pair in found) == pytest.approx(4.0, abs=0.25)
    assert fmean(pair[1] for pair in found) == pytest.approx(1.0, abs=0.05)


def test_a_level_with_one_member_has_no_component() -> None:
    assert variance_components([[0.9], [0.8], [0.7]]) == (None, None)
    assert variance_components([[0.9]]) == (None, None)
    between, within = variance_components([[0.9, 0.8]])
    assert between is None and within == pytest.approx(0.005)


def test_interval_of_groups() -> None:
    values = [0.951, 0.962, 0.943, 0.958]
    wanted = stats.t.interval(0.95, 3, loc=fmean(values), scale=stats.sem(values))
    assert grouped_mean_interval([values]) == pytest.approx(wanted)  # one group: its values are the draws
    assert grouped_mean_interval([[value] for value in values]) == pytest.approx(wanted)
    # groups of one size: the interval of their means, which are what was drawn independently
    means = [fmean(values[:2]), fmean(values[2:])]
    wanted = stats.t.interval(0.95, 1, loc=fmean(means), scale=stats.sem(means))
    assert grouped_mean_interval([values[:2], values[2:]]) == pytest.approx(wanted)
    assert grouped_mean_interval([[0.5]]) is None


def test_ranks_by_hand() -> None:
    assert rank_labels([(0, 1), (4, 5), (2, 3)]) == ["3", "1", "2"]
    assert rank_labels([(0, 1), (2, 4), (3, 5), None, (6, 7)]) == ["4", "=2", "=2", "-", "1"]
    assert rank_labels([(0, 2), (1, 4), (3, 5)]) == ["=1", "=1", "=1"]  # a chain: the ends are clear, the middle is not
    assert rank_labels([(0, 1), (1, 2)]) == ["=1", "=1"]  # touching is no order
    assert rank_labels([(0, 9), (1, 2), (3, 4), (10, 11)]) == ["=2", "=2", "=2", "1"]
    assert rank_labels([]) == [] and rank_labels([None]) == ["-"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda x: (x[0], x[0] + x[1])), max_size=9))
def test_ranks_order_exactly_what_no_chain_connects(intervals: list[tuple[int, int]]) -> None:
    labels = rank_labels(intervals)
    chain = {index: {index} for index in range(len(intervals))}
    for one, other in combinations(range(len(intervals)), 2):
        if intervals[one][0] <= intervals[other][1] and intervals[other][0] <= intervals[one][1]:
            joined = chain[one] | chain[other]
            chain |= dict.fromkeys(joined, joined)
    for index, (_, high) in enumerate(intervals):
        above = sum(other_low > high and other not in chain[index] for other, (other_low, _) in enumerate(intervals))
        assert labels[index] == ("=" if len(chain[index]) > 1 else "") + str(above + 1)


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
