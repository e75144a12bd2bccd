# SPDX-License-Identifier: Apache-2.0
"""benchmarks/loaders.py runs through at smoke size and writes what it promises, with ffcv and without."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import loaders
from common.data import ffcv as room


def test_smoke_without_ffcv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "why_missing", lambda: "No module named 'ffcv'")
    output = tmp_path / "results" / "loaders.json"
    assert loaders.main(["--smoke", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert set(result["sides"]) == {"PIL", "decode_jpeg"} and set(result["ratios"]) == {"decode_jpeg / PIL"}
    assert all(side["images_per_second"] > 0 for side in result["sides"].values())
    assert "ffcv is not measured: No module named 'ffcv'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed: bash scripts/install_ffcv.sh")
def test_smoke_with_ffcv(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaders.main(["--smoke"]) == 0
    said = capsys.readouterr().out
    for side in ("| PIL |", "| decode_jpeg |", "| ffcv jpg, plain |", "| ffcv raw |", "| ffcv proportion / plain |"):
        assert side in said


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    runs = {"decode_jpeg": [[10, 4], [30, 8], [8, 6]], "PIL": [[10, 2], [10, 2], [2, 2]]}
    figures = {name: {"runs": values} for name, values in runs.items()}
    assert loaders._ratios(figures) == {"decode_jpeg / PIL": {"value": 3, "per_cpu_second": 3, "goal": 1.5}}
