# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run at smoke size, their instruments count what they should, and the page shows the results' figures.

No time is asserted: counts and bytes are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import enas_step, page, run_all, scaling
from benchmarks.measuring import OperationCounter, SavedBytes, count_nodes, counting_nodes
from benchmarks.sides import Setting, build_side
from common.nets.enas_space import random_cells
from common.quant.kernels import native
from tests.helpers.plain_supernet import PlainSupernet

# A weight step at C=16, 8 cells, {2,4}: the reference's host syncs, and the plain side's leaf ops.
CONVOLUTIONS, REFERENCE_SYNCS, PLAIN_OPS = 1394, 4183, 163_911


def run(root: Path, script: str, *flags: str) -> str:
    """Stdout of a benchmark."""
    command = [sys.executable, str(root / "benchmarks" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------------ instruments


def test_operations_views_and_reads_are_told_apart() -> None:
    x = torch.randn(3, 4)
    with OperationCounter() as counter:
        y = (x.transpose(0, 1) + 1).reshape(12)
        y.sum().item()
        y.tolist()
    assert counter.leaves["add"] == counter.leaves["sum"] == counter.leaves["_local_scalar_dense"] == 1
    assert counter.views["transpose"] == 1 and "transpose" not in counter.leaves
    assert dict(counter.syncs) == {"_local_scalar_dense": 1, "tolist": 1}
    y.tolist()
    assert counter.syncs["tolist"] == 1  # nothing is counted outside


def test_saved_bytes_count_each_storage_once_and_end_with_the_graph() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    counter = SavedBytes(layer)
    with counter.counting():
        y = layer(x)  # saves x; the weight is a parameter
        assert counter.live == x.numel() * 4
        z = (y.exp() * x).sum()  # exp saves its output, the product that output and x again
        assert counter.live == counter.peak == 2 * x.numel() * 4
        z.backward()
    assert counter.live == 0 and counter.peak == 2 * x.numel() * 4
    assert x.grad is not None


def test_nodes_of_a_graph() -> None:
    x = torch.randn(3, requires_grad=True)
    y = (x * 2).exp()
    assert count_nodes(y) == 3  # exp, mul and the accumulation of x's gradient
    with counting_nodes() as counts:
        torch.autograd.grad(y.sum(), x)
        (x * 2).sum().backward()
    assert counts == [4, 3]


def test_slope_of_a_power() -> None:
    rows = [{"value": v, "seconds": 3 * v**1.5} for v in (8, 16, 64)]
    assert scaling.slope(rows, "seconds") == pytest.approx(1.5)


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.fixture(scope="module")
def measured(root: Path) -> dict[str, Any]:
    """The fused side against the plain one, at smoke size, as the command prints it."""
    return check_supernet_step(run(root, "supernet_step.py", "--smoke", "--against", "plain", "--json"))


def test_supernet_step(measured: dict[str, Any]) -> None:
    assert set(measured["sides"]) == {"fused", "plain"} and measured["setting"]["bits"] == [2, 4]
    assert measured["against"] == "plain" and measured["threads"] == 1


def test_the_plain_side_does_what_the_reference_does(measured: dict[str, Any]) -> None:
    """Its reads of the host are the reference's: two deviations and a size of every convolution, and the first size."""
    sizes = {name: measured["setting"][name] for name in ("method", "init_channels", "layers")}
    number = len(PlainSupernet(bits=(2, 4), **sizes).mixed_convolutions())
    counts = measured["sides"]["plain"]["counts"]
    assert REFERENCE_SYNCS == 3 * CONVOLUTIONS + 1
    assert counts["weight_step"]["syncs"] == 3 * number + 1
    assert counts["weight_step"]["leaf_ops"] / number == pytest.approx(PLAIN_OPS / CONVOLUTIONS, rel=0.05)
    # the architecture step differentiates as much, and has neither cost term nor SGD
    assert 0.6 < counts["architecture_step"]["leaf_ops"] / counts["weight_step"]["leaf_ops"] < 0.8


def test_the_fused_steps_are_bounded(measured: dict[str, Any]) -> None:
    fused, plain = measured["sides"]["fused"], measured["sides"]["plain"]
    for step in ("architecture_step", "weight_step"):
        ours, theirs = fused["counts"][step], plain["counts"][step]
        assert ours["syncs"] == 0
        assert ours["leaf_ops"] < theirs["leaf_ops"] / 5 and ours["nodes"] < theirs["nodes"] / 8
        assert fused["saved_mib"][step] < plain["saved_mib"][step] / 3


# --------------------------------------------------------------------------------------------------------- programs


def check_supernet_step(text: str) -> dict[str, Any]:
    """The one JSON object on stdout, with the promised keys."""
    result = json.loads(text)
    for name in ("iteration_ratio", "weight_step_ratio", "architecture_step_ratio", "memory_factor", "data_share"):
        assert result[name] >= 0, name
    assert result["n"] == 1 and len(result["sides"]) == 2 and "torch" in result["versions"] and result["machine"]["cpu"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--against plain-tuned", "--second-order finite-difference", "--bits 32 --method darts", "--bits 2 4 8"]
)
def test_supernet_step_variants(root: Path, flags: str) -> None:
    result = check_supernet_step(run(root, "supernet_step.py", "--smoke", "--json", *flags.split()))
    if "second-order" in flags:
        assert set(result["sides"]) == {"fused", "first-order"}
        first, second = (result["sides"][side]["counts"] for side in ("first-order", "fused"))
        assert second["architecture_step"]["leaf_ops"] > 3 * first["architecture_step"]["leaf_ops"]
        assert second["weight_step"]["leaf_ops"] == first["weight_step"]["leaf_ops"]
    if "tuned" in flags:
        counts = [step["syncs"] for side in result["sides"].values() for step in side["counts"].values()]
        assert counts == [0, 0, 0, 0]


def test_operators_of_a_whole_step_are_bounded() -> None:
    """At the size of the papers' search: no wait for the device, and at most 8,000 operators and kernels a step."""
    setting = Setting(batch_size=2)
    side = build_side("fused", setting)
    side.take(setting.batches())
    side.architecture_step()  # optimisers make their state
    side.weight_step()
    for step in (side.architecture_step, side.weight_step):
        with OperationCounter() as counted:
            step()
        assert not counted.syncs, counted.syncs
        if native.library() is not None:
            assert sum(counted.leaves.values()) <= 8000, counted.leaves.most_common(9)


def test_kernels(root: Path) -> None:
    result = json.loads(run(root, "kernels.py", "--smoke", "--json")) if native.library() is not None else None
    for found in (result or {"kernels": {}})["kernels"].values():
        assert found["ratio"] > 0 and found["saved_mib"] <= found["twin_saved_mib"]


@pytest.mark.slow
def test_enas_step(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    said = run(root, "enas_step.py", "--smoke", "--json", str(output))
    result = json.loads(output.read_text())
    assert result["child_ratio"] > 0 and f"| {result['child_ratio']:.2f} |" in said
    assert {len(side["runs"]) for side in (*result["child"].values(), *result["controller"].values())} == {1}


def test_both_sides_of_the_enas_step_compute_the_same() -> None:
    args = enas_step.parse(["--smoke"])
    cells = random_cells(args.blocks, torch.Generator().manual_seed(3))
    sides = [enas_step.child_side(args, everything) for everything in (False, True)]
    outputs = []
    for side in sides:
        logits, _ = side.model(enas_step.batch_of(args)[0], cells)
        logits.square().sum().backward()
        outputs.append((logits, side.model.stem[0].weight.grad))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # the plain way gives the operations that were not sampled gradients too, all of them zero
    left = [p for p in sides[0].model.parameters() if p.grad is None]
    assert left and sum(p.grad is None for p in sides[1].model.parameters()) < len(left)


@pytest.mark.slow
def test_training_step(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "figures.json"
    said = run(root, "training_step.py", "--smoke", "--json", str(output))
    sides = json.loads(output.read_text())["sides"]
    assert set(sides) == {"float", "fixed", "lsq"} and "| lsq |" in said
    assert sides["float"]["time_ratio"] == sides["float"]["saved_ratio"] == 1


def test_startup(root: Path) -> None:
    result = json.loads(run(root, "startup.py", "--smoke", "--json"))
    case = result["cases"]["search digits"]
    assert case["seconds"] == pytest.approx(case["imports"] + case["data"] + case["build"], abs=0.01)
    assert case["done"] == pytest.approx(case["seconds"] + case["step"], abs=0.01) and case["step"] > 0
    assert case["slowest_imports"]["torch"] > 0


@pytest.mark.slow
def test_scaling(root: Path, tmp_path: Path) -> None:
    flags = ["--csv", str(tmp_path / "s.csv"), "--plot", str(tmp_path / "s.svg"), "--json"]
    result = json.loads(run(root, "scaling.py", "--smoke", *flags))
    assert len(result["rows"]) == 4 and (tmp_path / "s.csv").read_text().count("\n") == 5
    assert (tmp_path / "s.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_ranks(root: Path) -> None:
    search, training = json.loads(run(root, "ranks.py", "--smoke", "--json"))["rows"]
    for row in (search, training):
        seconds = row["seconds"]
        assert row["strong"] == pytest.approx(seconds["one"] / seconds["strong"] / 2, abs=0.01)
        assert row["weak"] == pytest.approx(seconds["one"] / seconds["weak"], abs=0.01) and row["bytes"] > 10_000
    assert (search["messages"], training["messages"]) == (2, 1), "one for each kind of step"


@pytest.mark.slow
def test_features(root: Path) -> None:
    result = json.loads(run(root, "features.py", "--smoke", "--json"))
    assert set(result["variants"]) == {"base", "tensorboard"} and result["steps"] == 4


# --------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("file", page.PAGES, ids=lambda file: file.name)
def test_the_pages_show_the_results(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert page.render(text, page.load()) == text, "run python benchmarks/page.py"


def test_the_page_has_every_planned_result_once() -> None:
    texts = [file.read_text(encoding="utf-8") for file in page.PAGES if file.parent.name == "docs"]
    names = re.findall(r"<!-- figures: (\w+) -->", "".join(texts))
    assert sorted(names) == sorted({"summary", "fast_preset_quickstart", *run_all.PLAN})
    assert {source for _, source, _, _ in page.GOALS} <= set(run_all.PLAN)
    assert all(Path(run_all.command(name, None)[0]).is_file() for name in run_all.PLAN)


def test_a_bound_is_kept_or_missed() -> None:
    assert [page.verdict(v, ">= 4") for v in (4.0, 3.99)] == ["reached", "missed"]
    assert [page.verdict(v, "<= 0") for v in (0, 1)] == ["reached", "missed"]
    assert page.verdict(1.0, "") == ""


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="no benchmark makes the figures 'weather'"):
        page.figures("weather", {})
