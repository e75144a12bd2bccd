# SPDX-License-Identifier: Apache-2.0
"""What a run stands on: times of run folders written by hand, each run counted once, older ones as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.engine import cli
from common.recipes.elapsed import parts_of, time_before
from tests.helpers.fake_runs import architecture_json, search_result, train_result, write_run


def config(**flags: Any) -> cli.Config:
    """Flags of which a run may have only some."""
    return cli.Config(sources={}, **flags)


def run(root: Path, name: str, stage: str, seconds: float, found_by: str | None = None, **flags: str) -> str:
    """A finished run ROOT/NAME whose flags name other runs of ROOT; its digest is its name."""
    named = {key: str(root / value) if (root / value).is_dir() else value for key, value in flags.items()}
    make = {"search": search_result, "train": train_result}[stage]
    result = make(seconds=seconds) | time_before(config(**named), stage)
    made = write_run(
        root / name, result, config=named, architecture=architecture_json(search={"flags_digest": found_by or name})
    )
    written = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(written | {"digest": name}))
    return str(made)


def fields(stage: str = "train", **flags: str) -> tuple[float | None, ...]:
    """search_seconds, before_seconds and before_search_seconds."""
    found = time_before(config(**flags), stage)
    return tuple(found.get(key) for key in ("search_seconds", "before_seconds", "before_search_seconds"))


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, str]:
    """Cells of a search (100 s), trained (20 s), searched for bits from there (7 s)."""
    cells = run(tmp_path, "cells", "search", 100.0)
    plain = run(tmp_path, "plain", "train", 20.0, "cells", arch="cells")
    bits = run(tmp_path, "bits", "search", 7.0, arch="cells", init_from="plain")
    return {"cells": cells, "plain": plain, "bits": bits}


def test_nothing_stands_before_a_name() -> None:
    assert fields(arch="PC_DARTS") == (None, 0, 0)
    assert fields("search") == (None, 0, 0) and "search_seconds" not in time_before(config(), "search")


def test_a_bit_search_counts_its_cells_and_its_weights_once(chain: dict[str, str]) -> None:
    assert fields(arch=chain["cells"]) == (100, 0, 0)
    assert fields("search", arch=chain["cells"]) == (None, 100, 100)
    # the cells' search is behind --arch and behind --init-from
    assert fields("search", arch=chain["cells"], init_from=chain["plain"]) == (None, 120, 100)
    assert fields("search", arch=chain["plain"], init_from=chain["plain"]) == (None, 120, 100)
    # cells taken from a training need its search, not its weights
    assert fields("search", arch=chain["plain"]) == (None, 100, 100)


def test_a_training_of_what_it_found_counts_all_of_it(chain: dict[str, str]) -> None:
    assert fields(arch=chain["bits"]) == (7, 120, 100)
    both = {"init_from": chain["plain"], "teacher": chain["plain"]}
    assert fields(arch=chain["bits"], **both) == (7, 120, 100)
    found = time_before(config(arch=chain["bits"], **both), "train")["started_from"]
    assert {part["digest"]: part["seconds"] for part in found} == {"cells": 100, "plain": 20, "bits": 7}


def test_weights_and_teachers_count_with_all_that_they_started_from(chain: dict[str, str], tmp_path: Path) -> None:
    assert fields(arch="PC_DARTS", init_from=chain["plain"]) == (None, 120, 100)
    assert fields(arch=chain["plain"], init_from=chain["plain"]) == (100, 20, 0)
    deep = run(tmp_path, "deep", "train", 3.0, "bits", arch="bits", teacher="plain")
    assert fields(arch="PC_DARTS", teacher=deep) == (None, 130, 107)
    # its cells: a bit search, and what that started from; its teacher did not find them, but the bit search needed it
    assert fields(arch=deep) == (7, 120, 100)
    own = run(tmp_path, "own", "train", 4.0, "cells", arch="cells", teacher="deep")
    assert fields(arch=own) == (100, 0, 0)


def test_runs_of_older_versions_count_as_they_did(tmp_path: Path, chain: dict[str, str]) -> None:
    older = write_run(
        tmp_path / "older",
        train_result(seconds=5.0, search_seconds=100.0),
        architecture=architecture_json(search={"flags_digest": "cells"}),
    )
    assert fields(arch="PC_DARTS", init_from=str(older)) == (None, 105, 100)
    assert fields(arch=chain["cells"], init_from=str(older)) == (100, 5, 0)
    assert fields(arch=str(older), init_from=str(older)) == (100, 5, 0)
    bare = write_run(tmp_path / "bare", train_result(seconds=6.0, search_seconds=50.0))
    assert fields(arch=str(bare)) == (50, 0, 0)
    quantised = train_result(stage="quantize", seconds=1.0, search_seconds=100.0, source_seconds=5.0)
    folder = write_run(tmp_path / "quantised", quantised, architecture=architecture_json())
    assert fields(arch="PC_DARTS", teacher=str(folder)) == (None, 106, 100)


def test_what_is_not_known_is_not_a_figure(tmp_path: Path, chain: dict[str, str]) -> None:
    begun = write_run(tmp_path / "begun", None, config={"arch": "PC_DARTS"})
    assert parts_of(begun) is None and parts_of(tmp_path / "nowhere") is None
    assert fields(arch=chain["cells"], init_from=str(begun)) == (100, None, None)
    assert fields(arch=str(begun)) == (None, 0, 0)
