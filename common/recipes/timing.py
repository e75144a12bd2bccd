# SPDX-License-Identifier: Apache-2.0
"""How long calls take: samples in turns, so that what drifts on a machine meets all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""wall: what a user waits. cpu: processor time of this process, what one thread would wait had it a core to itself."""
OUTLIER_DEVIATIONS = 5.0


def interleaved(
    calls: Sequence[Call], *, rounds: int, least_seconds: float = 2e-3, clock: str = "wall"
) -> list[list[float]]:
    """Seconds of each call, `rounds` samples of each, taken in turns, each turn in another order.

    A sample is the mean of as many repeats as take `least_seconds`, so that the clock's own steps do not count.
    """
    now, repeats = CLOCKS[clock], []
    for call in calls:
        call()  # the first one allocates
        started = now()
        call()
        taken = max(now() - started, 1e-7)
        repeats.append(max(1, round(least_seconds / taken)))
    samples: list[list[float]] = [[] for _ in calls]
    order, source = list(range(len(calls))), random.Random(0)
    for _ in range(rounds):
        source.shuffle(order)  # what ran before leaves the caches warm for its like
        for index in order:
            call, started = calls[index], now()
            for _repeat in range(repeats[index]):
                call()
            samples[index].append((now() - started) / repeats[index])
    return samples


def steady(samples: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the samples that lie within OUTLIER_DEVIATIONS of the median.

    A deviation is the median absolute one, scaled to a standard deviation: what was sampled while another process had
    the core says nothing about the call.
    """
    middle = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(sample - middle) for sample in samples)
    kept = [sample for sample in samples if abs(sample - middle) <= OUTLIER_DEVIATIONS * deviation] or [middle]
    return statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else 0.0, len(kept)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
