# SPDX-License-Identifier: Apache-2.0
"""The recipes: flags to a finished search or training, and what the tools share about runs.

The only room of common that sees every wing. Public names are handed on lazily, so that `--help` never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

# module -> the public names that it hands on
_NAMES: dict[str, tuple[str, ...]] = {
    "flags": (
        "full_precision_search_parser",
        "resolve_search",
        "resolve_training",
        "run_program",
        "search_parser",
        "training_parser",
    ),
    "presets": ("PRESETS", "Preset", "presets_for"),
    "train": ("run_training",),
    "trained": ("evaluate_network", "load_trained", "mean_bits"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module that owns `name` when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
