# SPDX-License-Identifier: Apache-2.0
"""The search recipe and qdarts/search.py on digits at smoke size: files, figures, resume, target, refusals."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cost import network_cost
from common.data import split_search
from common.engine import CheckpointStore, read_json
from common.nets import build_network, build_supernet, load_architecture
from common.recipes.findings import parameter_free_share
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.search import run_search
from common.recipes.search_setup import prepare_search
from genotypes import lookup

SMALL = ("--nodes", "2", "--multiplier", "2")
SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard")


class Stop(Exception):
    """Stands for a crash."""


def config_of(*flags: str):
    return resolve_search(search_parser("search.py", "test"), [*SMOKE, *flags])


def run(save: Path | None, *flags: str, on_step: Callable[[int], None] | None = None, **more: Any) -> dict[str, Any]:
    folder = ["--save", str(save)] if save else []
    return run_search(config_of(*flags, *folder), method="qdarts", on_step=on_step, **more)


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def final_state(folder: Path) -> dict[str, Any]:
    found = CheckpointStore(folder / "checkpoints", config_digest=read_json(folder / "config.json")["digest"]).latest()
    assert found is not None
    return found[0]


def assert_same_state(a: Any, b: Any, where: str = "state") -> None:
    """Every tensor bit for bit, every number equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds", "images_per_second"):
                assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same_state(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "search"
    run(folder)
    return folder


def test_the_result_says_everything(found: Path) -> None:
    result = read_json(found / "result.json")
    assert (result["finished"], result["stage"], result["method"]) == (True, "search", "qdarts")
    assert (result["epochs"], result["steps"], result["target_bitops"], result["target_reached"]) == (2, 4, None, None)
    assert 0 <= result["metrics"]["valid_top1"] <= 1 and math.isfinite(result["metrics"]["valid_loss"])
    for name in ("architecture", "cells_svg", "cells_png", "history", "metrics"):
        assert (found / result["artefacts"][name]).stat().st_size > 0, name
    rows = (found / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,train_loss,train_top1,valid_loss,valid_top1")
    assert [row.split(",")[:2] for row in rows[1:]] == [["2", "0"], ["4", "1"]]


def test_the_found_architecture_is_the_last_epochs(found: Path) -> None:
    architecture, last = load_architecture(found), history(found)[-1]
    data = architecture.to_json()
    assert data["genotype"] == last["genotype"] == read_json(found / "result.json")["genotype"]
    assert data["bits"] == last["bits"]
    assert data["search"]["dataset"] == "digits" and data["search"]["epochs"] == 2


def test_history_has_one_line_an_epoch_and_honest_costs(found: Path) -> None:
    rows = history(found)
    assert [row["epoch"] for row in rows] == [0, 1]
    architecture = load_architecture(found)
    network = build_network(architecture, in_channels=1, num_classes=10, init_channels=4, layers=3)
    cost = network_cost(network, 16)
    assert rows[-1]["exact_bitops"] == cost.bitops and rows[-1]["exact_bitops_quantized"] == cost.bitops_quantized
    for row in rows:
        assert row["alpha_entropy"] == pytest.approx(math.log(8), abs=1e-3)
        assert row["gamma_entropy"] == pytest.approx(math.log(2), abs=1e-3)
        assert all(sum(edge) == pytest.approx(1, abs=1e-4) for edge in row["alphas"]["normal"])
        assert len(row["betas"]["reduce"]) == 14 and sum(row["betas"]["reduce"]) == pytest.approx(4, abs=1e-4)
        assert "seconds" not in row and "images_per_second" not in row


def test_the_printed_command_trains_it(found: Path) -> None:
    """The flags that it names give the searched network: sizes, data, and the run as architecture."""
    command = shlex.split(read_json(found / "result.json")["train_command"])
    assert command[0] == "python" and Path(command[1]).resolve().parts[-2:] == ("qdarts", "train.py")
    config = resolve_training(training_parser("train.py", "test"), command[2:])
    assert Path(config.arch).resolve() == found.resolve()
    assert (config.init_channels, config.layers, config.dataset, config.preset) == (4, 3, "digits", "smoke")
    assert command[2:] and load_architecture(config.arch).bits is not None


def test_two_runs_are_bit_equal(found: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    assert (tmp_path / "again" / "history.jsonl").read_bytes() == (found / "history.jsonl").read_bytes()
    assert_same_state(final_state(tmp_path / "again"), final_state(found))


@pytest.mark.parametrize(
    "stop, flags",
    [
        (1, ("--target-bitops", "0.032G")),
        (2, ()),
        (3, ("--unrolled",)),
        (3, ("--unrolled", "--second-order", "finite-difference", "--bits", "none")),
    ],
)
def test_a_resumed_search_is_bit_equal(tmp_path: Path, stop: int, flags: tuple[str, ...]) -> None:
    """Stopped in the middle of an epoch (1, 3) and at its last step (2); checkpoints come every step."""
    often = (*SMALL, *flags, "--checkpoint-minutes", "1e-9")
    run(tmp_path / "straight", *often)

    def crash(step: int) -> None:
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "resumed", *often, on_step=crash)
    taken: list[int] = []
    result = run(tmp_path / "resumed", *often, "--resume", "auto", on_step=taken.append)
    assert len(taken) == 4 - stop + (stop == 2), "it went on from the newest checkpoint"
    assert (tmp_path / "resumed" / "history.jsonl").read_bytes() == (
        tmp_path / "straight" / "history.jsonl"
    ).read_bytes()
    assert_same_state(final_state(tmp_path / "resumed"), final_state(tmp_path / "straight"))
    straight = read_json(tmp_path / "straight" / "result.json")
    assert result["metrics"] == straight["metrics"] and result["steps"] == 4


def test_a_finished_run_says_so(found: Path) -> None:
    again = run(found, "--resume", "auto", on_step=lambda step: pytest.fail("a step was taken"))
    assert again == read_json(found / "result.json")


def test_full_precision_search(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "--bits", "none", "--method", "DARTS", *SMALL)
    architecture = load_architecture(tmp_path / "run")
    assert architecture.bits is None and history(tmp_path / "run")[0]["gamma_entropy"] is None
    assert history(tmp_path / "run")[0]["betas"] is None
    assert result["exact_bitops"] == 1024 * result["cost"]["macs"]


def test_paper_preset_is_the_references_accounting(tmp_path: Path) -> None:
    """Uniform weighting steers bits alone, by the reference's complexity; its mapping needs 8 searched cells."""
    flags = ("--cost-accounting", "paper", "--cost-weighting", "uniform", "--scheme", "reference")
    prepared = prepare_search(config_of(*flags))
    model, loop = prepared.supernet, prepared.loop
    assert loop["arch_term"] is None and loop["weight_term"] is not None and model.scheme == "reference"
    loop["weight_term"](model).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.arch_parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.gammas.values())


def test_target(tmp_path: Path) -> None:
    result = run(tmp_path / "run", "--target-bitops", "0.032G")
    assert result["target_bitops"] == 0.032e9
    assert result["target_reached"] == (abs(result["exact_bitops"] / 0.032e9 - 1) <= 0.1)
    ends = prepare_search(config_of()).cost.ends
    left = 0.032e9 - ends
    assert result["target_error_movable"] == pytest.approx((result["steered_bitops"] - 0.032e9) / left)
    assert "of the part that choices can move)" in (tmp_path / "run" / "log.txt").read_text()
    assert all("cost_multiplier" in row for row in history(tmp_path / "run"))
    missed = run(tmp_path / "missed", "--target-bitops", "0.045G", "--epochs", "1", "--steps-per-epoch", "1")
    assert missed["target_reached"] is False
    assert "NOT reached" in (tmp_path / "missed" / "log.txt").read_text()


def test_unreachable_target_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--target-bitops 1e\+12: this search reaches .* to .* BitOps"):
        run(tmp_path / "run", "--target-bitops", "1T")
    assert not (tmp_path / "run").exists()


def test_search_sees_two_disjoint_parts_of_the_training_set_only() -> None:
    prepared = prepare_search(config_of("--seed", "5"))
    train, valid = split_search(prepared.data.train.labels, 0.5, 5)
    assert not set(train.tolist()) & set(valid.tolist())
    for stream, indices in ((prepared.loop["train_stream"].stream, train), (prepared.loop["valid_stream"], valid)):
        assert torch.equal(stream._order.indices, indices) and stream._split is prepared.data.train
    assert set(prepared.evaluation_indices.tolist()) <= set(valid.tolist())


def test_init_from_takes_weights_and_not_choices(found: Path) -> None:
    """The weights are the earlier search's, the logits freshly drawn as without it."""
    plain, started = prepare_search(config_of()), prepare_search(config_of("--init-from", str(found)))
    state = final_state(found)["model"]
    assert torch.equal(started.supernet.classifier.weight, state["classifier.weight"])
    assert torch.equal(started.supernet.alphas_normal, plain.supernet.alphas_normal)
    assert not torch.equal(started.supernet.alphas_normal, state["alphas_normal"])
    with pytest.raises(ValueError, match=r"--init-from .*do not fit"):
        prepare_search(config_of("--init-from", str(found), "--layers", "4"))


def test_init_from_refuses_what_is_no_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--init-from .*no run lies there"):
        prepare_search(config_of("--init-from", str(tmp_path)))


def test_supernet_may_be_another(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def mine(**arguments: Any):
        seen.update(arguments)
        return build_supernet(**arguments)

    run(None, "--dry-run", supernet=mine)
    assert seen["bits"] == (2, 4) and seen["in_channels"] == 1 and seen["init_channels"] == 8


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(None, "--dry-run", "--target-bitops", "0.032G")
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and outcome["estimated_seconds"] > 0
    assert all(word in text for word in ("M weights", "BitOps", "peak memory", "2 steps an epoch", "dry run"))


def test_compiled_code_is_not_differentiated_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_of("--compile", "--unrolled")
    assert re.search("--compile.*finite-difference", capsys.readouterr().err)


def test_share_of_parameter_free_operations() -> None:
    """Counted by hand: in a reduction, a skip from the cell's inputs halves the image and has weights."""
    from common.nets import Architecture

    genotype = lookup("PC_DARTS")[1]
    free = sum("pool" in name or name == "skip_connect" for name, _ in genotype.normal)
    free += sum("pool" in name or (name == "skip_connect" and state > 1) for name, state in genotype.reduce)
    assert parameter_free_share(Architecture(genotype)) == free / 16


@pytest.mark.parametrize("how", [["qdarts/search.py"], ["-m", "qdarts.search"]])
def test_entry_point_from_any_directory(root: Path, tmp_path: Path, how: list[str]) -> None:
    """`--help` names the groups and is quick; errors name the flag and exit with 2."""
    command = [sys.executable, *how] if how[0] == "-m" else [sys.executable, str(root / how[0])]
    where = root if how[0] == "-m" else tmp_path
    done = subprocess.run([*command, "--help"], cwd=where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--target-bitops" in done.stdout
    bad = [*command, "--epoch", "3", "--bits", "5"]
    done = subprocess.run(bad, cwd=where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--epochs" in done.stderr and "--bits" in done.stderr
