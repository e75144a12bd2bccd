# SPDX-License-Identifier: Apache-2.0
"""Stopping on request: a signal makes a loop save at its next step boundary and end, so that no work is lost.

A scheduler sends SIGUSR1, SIGUSR2 or SIGTERM before it takes a machine away, a person SIGINT (Ctrl-C). The handler only
notes the signal; the loop asks at each step boundary. Outside of a loop the signals do what they always do.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from common.engine import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
RANKS_EVERY = 10  # steps between two agreements of several ranks
REPEATED_SECONDS = 1.0  # a launcher and its scheduler may both hand on one and the same signal


class Stopped(Exception):
    """A signal ended the run at a step boundary, after its checkpoint. `code`: 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step:,}, which is saved")
        self.code = 128 + number


class _Listener:
    """The signal that came first, 0 before; and a way for the ranks to agree on it."""

    def __init__(self) -> None:
        self.number = 0
        self.came = 0.0
        self.former: dict[int, Any] = {}
        self.group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            # The flag lies on the CPU, where reading it waits for no GPU; nccl's group takes no tensor from there.
            self.group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.came = number, time.monotonic()
            text = f"{signal.Signals(number).name}: saving at the next step, then ending (once more: at once)\n"
            os.write(2, text.encode())  # not print, which the interrupted code may be in the middle of
        elif time.monotonic() - self.came > REPEATED_SECONDS:
            self.restore()
            signal.raise_signal(number)

    def install(self) -> None:
        for number in SIGNALS:
            self.former[number] = signal.signal(number, self.handle)

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.former = {}

    def wanted(self, step: int, agree: bool) -> int:
        """The signal on which to stop before step `step`, 0 to go on: the same answer on every rank."""
        if self.group is None:
            return self.number
        if step % RANKS_EVERY and not agree:
            return 0
        flag = torch.tensor([self.number])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag[0])


_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Around a loop whose steps call `give_way`: signals are noted within; the former handlers come back after it.

    Only the main thread hears signals: in another one nothing changes. With several ranks each must enter.
    """
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener()
    _listener.install()
    try:
        yield
    finally:
        _listener.restore()
        _listener = None


def give_way(step: int, save: Callable[[], object], *, agree: bool = False) -> None:
    """At the boundary before step `step` (counted over the run): after a signal, call `save` and raise Stopped.

    Several ranks agree every `RANKS_EVERY` steps, so that all of them stop at the same one, and where every rank says
    `agree`.
    """
    if _listener is not None and (number := _listener.wanted(step, agree)):
        save()
        raise Stopped(number, step)


def give_way_at_the_end(step: int) -> None:
    """After the last of `step` steps, whose checkpoint is written: what follows may take as long as an epoch's
    evaluation, so a signal that came in the last epoch ends the run here.
    """
    give_way(step, lambda: None, agree=True)
