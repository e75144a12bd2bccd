# SPDX-License-Identifier: Apache-2.0
"""Programs as processes of their own, forked from the test: a start of Python and torch would take longer than they do.

What a killed process leaves is on the disk and nowhere else, as after a kill of any other.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

PATIENCE = 240  # seconds; a process that hangs must not keep the tests


def start(program: str, argv: Sequence[str], said: Path, first: Callable[[], None] | None = None) -> int:
    """Start `program` ("qdarts/search.py") with these flags; its process id. `said` gets stdout and stderr.

    `first` is called in the new process before anything else.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(
            signal.SIGALRM, signal.SIG_DFL
        )  # the test's own handler waits for Python, which may wait for ever
        signal.alarm(PATIENCE)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the process's own, to its end)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if first is not None:
            first()
        code = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main(list(argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for a process: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """Kill the process after so long, unless it has ended by itself; its exit code, or minus the signal."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, give_up - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    return end_of(child)
