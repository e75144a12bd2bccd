# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: the project's root on the path, one torch thread, oracles by name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _operations_as_before() -> Iterator[None]:
    """The registry of operations is the process's: what a test registers (`--search-space`) must not meet the next."""
    from common.nets import OPERATIONS
    from common.recipes.own_space import load_search_space

    before = dict(OPERATIONS)
    yield
    if before != OPERATIONS:
        OPERATIONS.clear()
        OPERATIONS.update(before)
        load_search_space.cache_clear()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def oracle() -> Any:
    """Read one file of tests/oracles by its stem."""

    def read(stem: str) -> Any:
        return json.loads((ROOT / "tests" / "oracles" / f"{stem}.json").read_text())

    return read
