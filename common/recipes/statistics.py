# SPDX-License-Identifier: Apache-2.0
"""The statistics of the tables: intervals, components of variance, and ranks. Pure functions, no packages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, 1927): plausible true accuracies after `correct` of `n` test images.

    Within [0, 1] and sensible at 0 and n correct, where the usual +- interval shrinks to nothing. It holds the noise
    of the test set only, not that of training. Raises ValueError unless 0 <= correct <= n, n > 0, 0 < level < 1.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}: cannot be a proportion")
    z = NormalDist().inv_cdf(_two_sided(level))
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    # exact ends, which rounding would miss by 1e-17
    return (0.0 if correct == 0 else max(0.0, low), 1.0 if correct == n else min(1.0, high))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for the deviation of a single value.

    Raises ValueError when there are none.
    """
    if not values:
        raise ValueError("no values to average")
    return fmean(values), stdev(values) if len(values) > 1 else None


def variance_components(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Variance between groups and within them: unbiased, by one-way analysis of variance with random groups.

    With k groups of n_i values, N in all: within = MSW, between = (MSB - MSW) / n0, where
    n0 = (N - sum n_i^2 / N) / (k - 1) (Searle, Casella and McCulloch, 1992, 3.6). An unbiased estimate may come out
    below zero. None where it cannot be told: within, when every group has one value; between, then or with fewer than
    two groups.
    """
    between_squares, within_squares, count = _squares(groups)
    freedom = len(groups) - 1
    if count == len(groups):
        return None, None
    within = within_squares / (count - len(groups))
    if freedom < 1:
        return None, within
    typical = (count - sum(len(group) ** 2 for group in groups) / count) / freedom
    return (between_squares / freedom - within) / typical, within


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of several independent runs; None for fewer than two.

    Raises ValueError when there are none, or for a level outside (0, 1).
    """
    return grouped_mean_interval([[value] for value in values], level)


def grouped_mean_interval(groups: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of all values, where values of one group share something; None if it has no n.

    Several groups: they are the independent draws, so that k of them with N values in all give the standard error
    sqrt(MSB / N) with k - 1 degrees of freedom (exact for groups of one size; with one value each, the usual interval).
    A single group: its values are the draws. Raises ValueError as `mean_interval`.
    """
    if len(groups) == 1:
        groups = [[value] for value in groups[0]]
    between, _, count = _squares(groups)
    probability, freedom = _two_sided(level), len(groups) - 1
    if freedom < 1:
        return None
    mean = fmean(value for group in groups for value in group)
    reach = student_quantile(probability, freedom) * math.sqrt(between / freedom / count)
    return mean - reach, mean + reach


def _squares(groups: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """Sums of squares between and within groups, and the number of values."""
    values = [value for group in groups for value in group]
    mean = mean_and_deviation(values)[0]
    between = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups)
    within = sum((value - fmean(group)) ** 2 for group in groups for value in group)
    return between, within, len(values)


def rank_labels(intervals: Sequence[tuple[float, float] | None]) -> list[str]:
    """Ranks of intervals, the highest first: `2` where it is clear of all others, `=2` where it is not, `-` for None.

    Intervals that overlap (or touch) share a group, and so do those that a chain of overlaps connects: within a group
    nothing is ordered. A group's number is one more than that of the intervals above it; a group of one has no `=`.
    """
    lowest, groups = math.inf, list[list[int]]()
    ends = [(high, low, index) for index, interval in enumerate(intervals) if interval for low, high in [interval]]
    for high, low, index in sorted(ends, reverse=True):
        if high < lowest:  # clear of everything so far
            groups.append([])
        groups[-1].append(index)
        lowest = min(lowest, low)
    labels, above = ["-"] * len(intervals), 0
    for members in groups:
        for index in members:
            labels[index] = f"{'=' if len(members) > 1 else ''}{above + 1}"
        above += len(members)
    return labels


def student_quantile(probability: float, freedom: int) -> float:
    """The t below which Student's distribution of `freedom` degrees has this probability, by bisection of its cdf."""
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"probability {probability}, {freedom} degrees of freedom: out of range")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = total = cosine if freedom % 2 else 1.0
    for k in range(3 if freedom % 2 else 2, freedom, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if freedom == 1:
        total = 0.0
    inside = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return 0.5 + math.copysign(inside, t) / 2


def _two_sided(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level {level}: must lie between 0 and 1, such as 0.95")
    return (1 + level) / 2
