# SPDX-License-Identifier: Apache-2.0
"""Memory that does not suffice: told in one line, with the flags of the program that lower what it takes.

Python, torch's allocator on the CPU and the one on a GPU each say it in their own way.
"""

from __future__ import annotations

import errno
import re
from typing import Any

from common.engine.changes import CHANGEABLE, flag

# torch and the C++ library under it; the text is all that tells these from other RuntimeErrors.
_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|ALLOC_FAILED|"
    r"DefaultCPUAllocator",
    re.IGNORECASE,
)
_ON_GPU = re.compile(r"cuda|cublas|cudnn|hip", re.IGNORECASE)
_ASKED = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ ?[KMGT]?i?B)", re.IGNORECASE)
_LESS = ("batch_size", "n_sample", "init_channels", "out_filters", "layers", "image_size")


def is_shortage(error: BaseException) -> bool:
    """Whether the error says that memory ran out, here or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def has_room(count: int) -> bool:
    """Whether as many bytes can be had right now. A file that asks for far more than it holds is made up."""
    try:
        bytearray(count)
    except MemoryError:
        return False
    return True


def shortage_text(error: BaseException, config: Any = None) -> str:
    """What ran out, how much was asked for, and which flags of the program, with their present values, take less.

    config: the program's resolved flags (`parsing.Config`), None where it has none that matter.
    """
    text = str(error)
    where = "on the GPU" if isinstance(error, RuntimeError) and _ON_GPU.search(text) else "on this machine"
    asked = _ASKED.search(text)
    size = f" ({_readable(asked[1])} more were asked for)" if asked else ""
    return f"memory does not suffice {where}{size}; {_cure(config, gpu=where == 'on the GPU')}"


def _readable(size: str) -> str:
    if not size.endswith("bytes"):
        return size
    return f"{int(size.split()[0]) / 1e9:.3g} GB"


def _cure(config: Any, *, gpu: bool) -> str:
    have = {} if config is None else vars(config)
    sources = have.get("sources", {})
    flags = {dest: value for dest, value in have.items() if sources.get(dest) != "fixed"}
    less = [dest for dest in _LESS if isinstance(flags.get(dest), int) and flags[dest] > 1]
    ways = ["lower " + ", ".join(f"{flag(dest)} (now {flags[dest]})" for dest in less)] if less else []
    if isinstance(flags.get("grad_accumulation"), int):
        ways.append(f"raise --grad-accumulation (now {flags['grad_accumulation']})")
    if flags.get("checkpoint_cells") is False:
        ways.append("add --checkpoint-cells")
    if gpu and flags.get("precision") == "fp32":
        ways.append("add --precision bf16")
    if not ways:
        return "this program has no flag that lowers what it takes: use a machine with more, or other data"
    later = [dest for dest in ("grad_accumulation", "checkpoint_cells") if dest in flags and dest in CHANGEABLE]
    going_on = (
        f" ({' and '.join(map(flag, later))} also for a run that goes on: --resume auto --allow-config-change)"
        if later and "allow_config_change" in flags
        else ""
    )
    return ", or ".join(ways) + going_on
