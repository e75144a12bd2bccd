# SPDX-License-Identifier: Apache-2.0
"""The engine: command lines, run folders, checkpoints, seeds, ranks, the bilevel gradients and the two loops.

It knows no model, no quantiser and no data set: whatever it needs of them arrives as an argument. Public names are
handed on lazily (PEP 562), so that `--help` never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

# module -> the public names that it hands on; a new module adds its line here.
_NAMES: dict[str, tuple[str, ...]] = {
    "bilevel": ("InnerGroup", "architecture_gradients", "inner_groups"),
    "checkpoint": ("CheckpointStore", "load_state"),
    "distributed": ("average_", "barrier", "broadcast", "is_main", "rank", "sum_", "world_size"),
    "files": ("plain", "read_json", "write_json"),
    "guard": ("FiniteGuard", "NonFiniteError"),
    "metrics": ("ClassificationMeter", "entropy"),
    "progress": ("Eta", "duration", "say"),  # progress() itself would be hidden by its module: import it from there
    "run": ("Run",),
    "schedules": ("rate_at",),
    "search_loop": ("SearchOutcome", "SearchSettings", "search"),
    "seeding": ("derive", "rng_state", "seed_everything", "set_rng_state"),
    "train_loop": ("TrainOutcome", "TrainSettings", "train"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module that owns `name` when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
