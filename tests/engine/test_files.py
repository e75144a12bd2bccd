# SPDX-License-Identifier: Apache-2.0
"""Small files: old or new, never torn; JSON as data with limits."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from common.engine.files import plain, read_json, write_bytes, write_json


def test_round_trip(tmp_path: Path) -> None:
    value = {"a": (1, 2.5, None), "b": {"c": Path("x/y")}, 3: True, "nan": float("nan")}
    path = write_json(tmp_path / "x.json", value)
    assert read_json(path) == {"a": [1, 2.5, None], "b": {"c": "x/y"}, "3": True, "nan": None}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "x", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*x: File too large"):
            write_bytes(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_not_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"row\.a\[1\]: Tensor"):
        plain({"a": [0, torch.zeros(1)]}, "row")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[" * 100_000, "deep"), ("{", "not valid"), (" " * 2000, "bytes of JSON"), ("\udcff", "not valid")],
)
def test_bad_json_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"bad\.json.*{reason}"):
        read_json(path, limit=200_000 if reason == "deep" else 1000)
    with pytest.raises(ValueError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")
