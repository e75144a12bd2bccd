# SPDX-License-Identifier: Apache-2.0
"""Several ranks on gloo, forked from the test: a start of Python and torch for each would take longer than the test."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds; a rank that waits for ever must not keep the tests


def on_ranks(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives on each of `count` ranks: tensors, numbers, strings, and lists and dicts of them.

    With one rank it is called here, without torch.distributed. AssertionError shows the tracebacks of what failed.
    """
    if count == 1:
        return [work()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [_fork(rank, count, work, folder) for rank in range(count)]
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        assert not any(ends), f"exit codes {ends}\n" + "\n".join(errors)
        return [torch.load(folder / f"found-{rank}", weights_only=True) for rank in range(count)]


def _fork(rank: int, count: int, work: Callable[[], Any], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(PATIENCE)
        store = dist.FileStore(str(folder / "meet"), count)
        wait = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=wait)
        torch.save(work(), folder / f"found-{rank}")
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)
