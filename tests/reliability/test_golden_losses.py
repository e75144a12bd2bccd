# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of every method on synthetic data give the stored losses: a method changes on purpose or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.golden_losses import LOSSES, QUICK, losses_of, minor, stored

# Other processors add in another order; quantisers amplify that within twenty steps to about a thousandth (see the
# table of docs/reliability.md). A wrong momentum, decay or clipping is off by tenths.
NEAR = 0.01


def check(name: str, tmp_path: Path) -> None:
    wanted = stored().get(minor())
    if wanted is None:
        pytest.skip(f"no losses are stored for torch {minor()}: python -m tests.reliability.golden_losses --write")
    assert losses_of(name, tmp_path) == pytest.approx(wanted[name], rel=NEAR)


@pytest.mark.parametrize("name", QUICK)
def test_a_method_computes_what_it_did(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in QUICK])
def test_every_method_computes_what_it_did(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_what_is_stored_is_complete() -> None:
    for losses in stored().values():
        assert losses.keys() == LOSSES.keys() and all(len(one) == 20 for one in losses.values())
        assert all(0 < loss < 100 for one in losses.values() for loss in one)
