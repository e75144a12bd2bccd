# SPDX-License-Identifier: Apache-2.0
"""Runs that several of these files start from, made once a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.smoke_runs import TRAINED, call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision training: teacher, start, and what is quantised."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, said = call(TRAINED[0], [*TRAINED[1:], "--save", str(folder)])
    assert code == 0, said
    return folder
