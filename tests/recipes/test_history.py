# SPDX-License-Identifier: Apache-2.0
"""history.jsonl read at any moment: whole lines count, a torn end is told, damage is an error that names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.recipes.history import read_history

ROWS = [{"epoch": epoch, "loss": 1.5 - epoch, "name": "é"} for epoch in range(3)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_every_cut_of_the_file_gives_the_lines_that_are_whole(tmp_path: Path) -> None:
    file, first = tmp_path / "history.jsonl", TEXT.index(b"\n") + 1
    for length in range(first, len(TEXT) + 1):
        file.write_bytes(TEXT[:length])
        found = read_history(tmp_path)
        whole = TEXT[:length].count(b"\n")
        assert list(found.rows) == ROWS[:whole], length
        assert found.torn == (not TEXT[:length].endswith(b"\n")), length
    for length in range(first):
        file.write_bytes(TEXT[:length])
        with pytest.raises(ValueError, match="no whole epoch yet; wait"):
            read_history(tmp_path)


def test_the_newer_line_of_an_epoch_counts(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "x": 1}\n\n{"epoch": 0}\n{"epoch": 1, "x": 2}\n')
    assert read_history(tmp_path).rows == ({"epoch": 0}, {"epoch": 1, "x": 2})


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 2 is not JSON"), ("[1]", "line 2 is no epoch"), ('{"epoch": true}', "line 2"), ('{"e": 1}', "line 2")],
)
def test_damage_names_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "history.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=said):
        read_history(tmp_path)


def test_no_file_and_no_permission(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no history.jsonl; name the folder"):
        read_history(tmp_path)
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_history(tmp_path)
