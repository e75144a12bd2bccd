# SPDX-License-Identifier: Apache-2.0
"""scripts/plans/ablations.json: one thing changed at a time, targets that are what they are said to be; all of it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.cost import network_cost
from common.data import SHAPES
from common.engine.jobs import Job
from common.engine.plans import read_plan
from common.nets import build_network
from common.recipes.presets import presets_for
from genotypes import lookup

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "scripts" / "plans" / "ablations.json"
SIZES = ("paper", "small", "quickstart", "smoke")


def jobs(size: str, seed: int = 0) -> dict[str, Job]:
    plan = read_plan(PLAN)
    return {job.name: job for job in plan.jobs([seed], plan.values(size, [], Path("out")))}


def flags(job: Job) -> list[str]:
    """The words of a job's command that are not its own folder or another's."""
    return [word for word in job.command if not word.startswith("out/")]


@pytest.mark.parametrize("size", SIZES)
def test_one_thing_is_changed_at_a_time(size: str) -> None:
    every = jobs(size)
    joint = flags(every["joint/search"])
    target = joint[joint.index("--target-bitops") + 1]
    changed = {
        "half-data/search": [*joint, "--subset", "0.5"],
        "second-order/search": [*joint, "--unrolled"],
    }
    for name, job in every.items():
        group, last = name.split("/")[0], name.split("/")[-1]
        words = sorted(flags(job))
        if name in changed:
            assert words == sorted(changed[name])
        elif last == "search" and group in ("target", "lambda"):
            value = name.split("/")[1]
            flag = {"target": "--target-bitops", "lambda": "--complexity-decay"}[group]
            assert words == sorted([flag if w == "--target-bitops" else value if w == target else w for w in joint])
        elif last == "train" and job.method != "qsubnet":
            assert words == sorted(flags(every["joint/train"]))
    assert every["separate/bits"].command.count(target) == 1


@pytest.mark.parametrize("size", SIZES)
def test_targets_are_shares_of_the_full_precision_cost(size: str) -> None:
    preset = presets_for("train").get(size, {})
    channels, image_size, classes = SHAPES[preset.get("dataset", "cifar10")]
    network = build_network(
        lookup("PC_DARTS")[1],
        in_channels=channels,
        num_classes=classes,
        init_channels=preset.get("init_channels", 36),
        layers=preset.get("layers", 20),
    )
    cost = network_cost(network, preset.get("image_size", image_size))
    ends = cost.bitops - cost.bitops_quantized
    wanted = {share: ends + cost.bitops_quantized / share for share in (200, 160, 110, 80)}
    values = read_plan(PLAN).values(size, [], Path("out"))
    assert int(values["target"]) == pytest.approx(wanted[160], rel=1e-6)
    for value in values["targets"]:
        assert any(int(value) == pytest.approx(wanted[share], rel=1e-6) for share in (200, 110, 80))


def test_no_two_draws_share_a_seed() -> None:
    draws = [job for seed in (0, 1, 2) for job in jobs("small", seed).values() if "random" in job.command]
    seeds = {("none" in job.command, int(job.command[job.command.index("--seed") + 1])) for job in draws}
    assert len(seeds) == len(draws) == 3 * (3 + 8)


@pytest.mark.slow
def test_the_smallest_size_from_end_to_end(tmp_path: Path) -> None:
    command = ["sweep.py", str(PLAN), "--size", "smoke", "--seeds", "0", "--out", str(tmp_path)]
    command = [sys.executable, *command, "--set", f"results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "ablations_smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    every = jobs("smoke")
    assert sum(int(row["n"]) for row in rows) == sum(job.row for job in every.values())
    by_name = {row["architecture"]: row for row in rows}
    assert by_name["random cells and bits"]["n"] == "2" and by_name["random bits"]["n"] == "1"
    joint = next(float(row["bitops_quantized"]) for row in rows if row["runs"].endswith("joint/train"))
    for name in ("random bits", "random cells and bits"):
        assert float(by_name[name]["bitops_quantized"]) == pytest.approx(joint, rel=0.05)
    with (tmp_path / "ablations_smoke_rank_s0.csv").open() as file:
        ranked = list(csv.DictReader(file))
    assert [row["architecture"] for row in ranked] == ["random cells and bits"] * 2
    ElementTree.parse(tmp_path / "curve.svg")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("done before") == len(every)
