# SPDX-License-Identifier: Apache-2.0
"""Progress: bars on stderr that vanish where nobody watches, lines on stdout, and the remaining time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def _watched() -> bool:
    from common.engine.distributed import is_main  # torch comes with it, which lines and times do not need

    return sys.stderr is not None and sys.stderr.isatty() and is_main()


def progress(iterable: Iterable[T], *, total: int, label: str, start: int = 0) -> Iterator[T]:
    """The iterable behind a tqdm bar on stderr; the iterable alone when stderr is no terminal or on ranks above 0.

    `start`: how many of `total` were done before (a resumed epoch). The bar is wiped when it ends.
    """
    if not _watched():
        return iter(iterable)
    from tqdm import tqdm

    bar = tqdm(iterable, desc=label, total=total, initial=start, file=sys.stderr, leave=False, dynamic_ncols=True)
    return iter(bar)


def say(text: str) -> None:
    """Print a line on stdout at once, above a running bar rather than through it."""
    if _watched():
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    else:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: `0.3 s`, `12 s`, `3 min`, `2 h 05 min`, `1 d 03 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


class Eta:
    """Estimates a run's remaining time from the last few units of work.

    `total` units, `done` of them before this session. A median of the last eight: one slow epoch (a first one that
    warms up, a checkpoint on a slow disk) does not throw it off.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str = "epoch", clock: Callable[[], float] = time.monotonic):
        self.total, self.done, self.unit = total, done, unit
        self._clock = clock
        self._last = clock()
        self._durations: deque[float] = deque(maxlen=8)

    def step(self, units: int = 1) -> None:
        """Note that `units` more are done now."""
        now = self._clock()
        self._durations.append((now - self._last) / units)
        self._last, self.done = now, self.done + units

    def seconds_per_unit(self) -> float | None:
        """Seconds that one unit takes, None before the first is done."""
        if not self._durations:
            return None
        ordered = sorted(self._durations)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def seconds_left(self) -> float | None:
        """Seconds until all are done, None before the first is."""
        each = self.seconds_per_unit()
        return None if each is None else each * max(0, self.total - self.done)

    def text(self) -> str:
        """For a log line: `12 s/epoch, 3 min left`; empty before the first unit is done."""
        each, left = self.seconds_per_unit(), self.seconds_left()
        if each is None or left is None:
            return ""
        return f"{duration(each)}/{self.unit}, {duration(left)} left"
