# SPDX-License-Identifier: Apache-2.0
"""benchmarks/data_pipeline.py runs through at smoke size and writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_smoke(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "figures.json"
    command = [sys.executable, str(root / "benchmarks" / "data_pipeline.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "512 random images" in done.stdout and "| ratio (goal 10) |" in done.stdout
    result = json.loads(output.read_text())
    assert result["n"] == 1 and result["resident"]["images_per_second"] > 0
    assert result["ratio"] > 0 and result["machine"]["cores"] >= 1 and "torch" in result["versions"]


def test_a_folder_without_cifar_is_named(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "benchmarks" / "data_pipeline.py"), "--smoke", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"--data {tmp_path}: holds no cifar-10-batches-py" in done.stderr
