# SPDX-License-Identifier: Apache-2.0
"""--preset fast and its equivalence study: the plan's flags are the preset's, and the verdict follows its rule."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from benchmarks import fast_preset
from common.recipes.flags import resolve_search, search_parser
from common.recipes.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PLAN = json.loads((ROOT / "scripts" / "plans" / "fast_preset.json").read_text())


def write_runs(folder: Path, top1: dict[str, list[float]], bitops: dict[str, list[float]]) -> None:
    """Four finished runs a seed, with what the comparison reads."""
    for side, accuracies in top1.items():
        for seed, accuracy in enumerate(accuracies):
            results = {
                "search": {"seconds": 10.0 if side == "default" else 4.0},
                "train": {
                    "metrics": {"test_top1": accuracy},
                    "cost": {"bitops": bitops[side][seed], "bitops_quantized": bitops[side][seed] / 2},
                },
            }
            for stage, content in results.items():
                path = folder / f"s{seed}" / side / stage / "result.json"
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(content))


def test_only_the_search_changes_and_the_proportions_are_to_the_real_defaults() -> None:
    assert not PRESETS["fast"].train
    config = resolve_search(search_parser("search.py", ""), [])
    assert {name: getattr(config, name) for name in PRESETS["fast"].search} == fast_preset.DEFAULTS
    fast = {**fast_preset.DEFAULTS, **PRESETS["fast"].search}
    # rate x steps: how far Adam can carry an alpha, and the gammas' SGD a gamma, stays what it was (within 3%)
    moving = [(r["epochs"] - r["warmup_epochs"]) / r["arch_every"] for r in (fast_preset.DEFAULTS, fast)]
    alphas = [r["arch_learning_rate"] * m for r, m in zip((fast_preset.DEFAULTS, fast), moving, strict=True)]
    gammas = [r["gamma_learning_rate"] * r["epochs"] for r in (fast_preset.DEFAULTS, fast)]
    assert alphas[1] == pytest.approx(alphas[0], rel=0.03) and gammas[1] == pytest.approx(gammas[0])


@pytest.mark.parametrize("size", PLAN["sizes"])
def test_the_plan_runs_the_preset_at_every_size(size: str) -> None:
    assert PLAN["sizes"][size]["fast"] == fast_preset.fast_flags(size)


def test_the_script_plans_both_sides_of_five_seeds(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "benchmarks" / "fast_preset.sh")]
    done = subprocess.run([*script, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 20 and {line[2] for line in lines} == set("01234")
    assert sum("--arch-every 2" in line[3] for line in lines) == 5
    help = subprocess.run([*script, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert "bash benchmarks/fast_preset.sh" in help and "set -euo" not in help


def test_paired_differences_their_interval_and_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bitops = {"default": [2e9, 1e9, 1e9], "fast": [1e9, 1e9, 1e9]}
    write_runs(tmp_path / "near", {"default": [0.97, 0.98, 0.96], "fast": [0.971, 0.979, 0.962]}, bitops)
    assert fast_preset.main([str(tmp_path / "near"), "--json", str(tmp_path / "near.json")]) == 0
    found = json.loads((tmp_path / "near.json").read_text())
    top1 = found["figures"]["top1"]
    # differences .001, -.001, .002: mean .002 / 3, deviation .0015275, t(2) at 97.5% = 4.30265
    reach = 4.30265 * 0.00152753 / math.sqrt(3)
    assert top1["difference"] == pytest.approx(0.002 / 3)
    assert top1["interval"] == pytest.approx([0.002 / 3 - reach, 0.002 / 3 + reach], abs=1e-6)
    assert found["equivalent"] and found["n"] == 3 and found["figures"]["seconds"]["ratio"] == pytest.approx(0.4)
    assert found["figures"]["bitops"]["ratio"] == pytest.approx(0.5 ** (1 / 3))
    assert "equivalent: the interval lies within one point" in capsys.readouterr().out

    write_runs(tmp_path / "far", {"default": [0.97, 0.98, 0.96], "fast": [0.96, 0.979, 0.962]}, bitops)
    fast_preset.main([str(tmp_path / "far")])
    assert "not shown to be equivalent" in capsys.readouterr().out


def test_unfinished_seeds_and_a_single_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, {"default": [0.97], "fast": [0.97]}, {"default": [1.0], "fast": [1.0]})
    (tmp_path / "s1" / "fast").mkdir(parents=True)
    fast_preset.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "n = 1" in out and "| - |" in out and "not shown to be equivalent" in out
    assert fast_preset.main([str(tmp_path / "nowhere")]) == 0
