# SPDX-License-Identifier: Apache-2.0
"""qsubnet/search.py and train.py on digits at smoke size: files, weights taken, resume, target, presets, refusals."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cost import network_cost
from common.engine import CheckpointStore, cli, read_json
from common.nets import build_network, load_architecture
from common.recipes.flags import resolve_bit_search, resolve_training, training_parser
from common.recipes.presets import PRESETS
from common.recipes.search import run_search
from common.recipes.train import run_training
from common.recipes.trained import load_trained
from qsubnet.prepare import prepare_subnet
from qsubnet.search import check, derive, main, make_parser, presets
from qsubnet.train import main as train_main

# Shared with the trainings that weights are taken from.
PLACE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard")
SMOKE = (*PLACE, "--arch", "DARTS_V2")


class Stop(Exception):
    """Stands for a crash."""


def test_a_training_wants_bits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main([*SMOKE, "--dry-run"])
    assert stop.value.code == 2 and "--arch: DARTS_V2 brings no bits" in capsys.readouterr().err
    assert train_main([*SMOKE, "--wbits", "2", "--abits", "4", "--dry-run"]) == 0


def config_of(*flags: str) -> cli.Config:
    parser = make_parser()
    return resolve_bit_search(parser, flags, presets(parser), derive=[derive], validate=[check])


def search(save: Path | None, *flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    folder = ["--save", str(save)] if save else []
    return run_search(config_of(*flags, *folder), method="qsubnet", prepare=prepare_subnet, on_step=on_step)


def final_state(folder: Path) -> dict[str, Any]:
    found = CheckpointStore(folder / "checkpoints", config_digest=read_json(folder / "config.json")["digest"]).latest()
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision training of the same size."""
    folder = tmp_path_factory.mktemp("runs") / "fp32"
    flags = [*SMOKE, "--seed", "7", "--save", str(folder)]
    run_training(resolve_training(training_parser("train.py", "test"), flags), method="any")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "search"
    assert main([*PLACE, "--init-from", str(source), "--cd", "1", "--lra", ".5", "--save", str(folder)]) == 0
    return folder


def test_the_result_says_everything(found: Path, source: Path) -> None:
    result, architecture = read_json(found / "result.json"), load_architecture(found)
    assert (result["finished"], result["stage"], result["method"]) == (True, "search", "qsubnet")
    assert (result["epochs"], result["steps"], result["target_reached"]) == (2, 4, None)
    assert architecture.genotype == load_architecture(source).genotype and architecture.name == "DARTS_V2"
    assert architecture.bits is not None and architecture.bits.kind == "layers"
    network = build_network(architecture, in_channels=1, num_classes=10, init_channels=4, layers=3)
    assert result["cost"] == network_cost(network, 16).to_json()
    rows = [json.loads(line) for line in (found / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and rows[-1]["bits"] == architecture.to_json()["bits"]
    assert rows[-1]["exact_bitops"] == result["exact_bitops"] == result["cost"]["bitops"]
    assert rows[-1]["alphas"] is None and rows[-1]["valid_top1"] is None and len(rows[-1]["gammas"]) == 4
    for name in ("architecture", "cells_svg", "cells_png", "history", "metrics"):
        assert (found / result["artefacts"][name]).stat().st_size > 0, name
    assert read_json(found / "config.json")["sources"]["arch"] == "derived"
    assert result["before_seconds"] == read_json(source / "result.json")["seconds"]


def test_a_strong_cost_takes_all_convolutions_to_the_fewest_bits(found: Path) -> None:
    architecture = load_architecture(found)
    assert architecture.bits is not None and set(architecture.bits.layers.values()) == {(2, 2)}


def test_the_printed_command_trains_it(found: Path, source: Path, tmp_path: Path) -> None:
    command = shlex.split(read_json(found / "result.json")["train_command"])
    assert Path(command[1]).parts[-2:] == ("qsubnet", "train.py")
    assert train_main([*command[2:], "--device", "cpu", "--no-tensorboard", "--save", str(tmp_path / "run")]) == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert result["cost"] == read_json(found / "result.json")["cost"] and result["method"] == "qsubnet"
    assert result["bits_mean"] == {"weight": 2.0, "activation": 2.0}
    assert result["search_seconds"] == read_json(found / "result.json")["seconds"]
    assert result["before_seconds"] == read_json(source / "result.json")["seconds"]


def test_init_from_keeps_every_weight(source: Path) -> None:
    theirs = load_trained(source)[0].state_dict()
    prepared = prepare_subnet(config_of(*PLACE, "--init-from", str(source), "--bits", "2", "4", "8"))
    ours = prepared.supernet.network.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    new = ours.keys() - theirs.keys()
    assert all(name.rsplit(".", 1)[1] in ("gamma_weight", "gamma_activation", "maximum", "ready") for name in new)
    assert any(f"{len(theirs)} tensors loaded" in note for note in prepared.notes)


def test_all_training_images_train_both(source: Path) -> None:
    """Single level: one stream over the whole training set, one loss for weights and logits."""
    prepared = prepare_subnet(config_of(*SMOKE))
    assert prepared.loop["valid_stream"] is None and prepared.evaluation_indices is None
    whole = prepare_subnet(config_of(*SMOKE, "--steps-per-epoch", "100000"))
    assert whole.loop["train_stream"].steps_per_epoch == 1437 // 16
    part = prepare_subnet(config_of(*SMOKE, "--train-portion", ".75"))
    assert part.evaluation_indices is not None and len(part.evaluation_indices) == 1437 - int(0.75 * 1437)
    half = prepare_subnet(config_of(*SMOKE, "--subset", ".5", "--steps-per-epoch", "100000"))
    assert half.loop["train_stream"].steps_per_epoch == 718 // 16


@pytest.mark.parametrize("flags", [(), ("--bits", "2", "4", "8", "--target-bitops", "31M")])
def test_a_resumed_search_is_bit_equal(tmp_path: Path, flags: tuple[str, ...]) -> None:
    often = (*SMOKE, *flags, "--checkpoint-minutes", "1e-9")
    search(tmp_path / "straight", *often)

    def crash(step: int) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        search(tmp_path / "torn", *often, on_step=crash)
    search(tmp_path / "torn", *often, "--resume", "auto")
    histories = [(tmp_path / name / "history.jsonl").read_bytes() for name in ("straight", "torn")]
    assert histories[0] == histories[1]
    models = [final_state(tmp_path / name)["model"] for name in ("straight", "torn")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_target_is_reached(tmp_path: Path) -> None:
    """Of the part that bits can move: the ends are nine tenths of this network, so all of its totals are near."""
    prepared = prepare_subnet(config_of(*SMOKE))
    ends, start = prepared.cost.ends, float(prepared.cost.exact(prepared.supernet))
    assert start - ends < 0.5 * (32e6 - ends), "it starts far off, or the test says nothing"
    flags = ("--target-bitops", "32M", "--epochs", "8", "--lra", ".1", "--steps-per-epoch", "5", "--log-every", "50")
    result = search(tmp_path / "run", *SMOKE, *flags)
    assert result["target_reached"] is True
    assert result["cost"]["bitops"] == result["steered_bitops"]
    assert result["steered_bitops"] - ends == pytest.approx(32e6 - ends, rel=0.15)
    assert result["target_error_movable"] == pytest.approx((result["steered_bitops"] - ends) / (32e6 - ends) - 1)


def test_presets_search_the_network_that_they_train() -> None:
    for name, preset in PRESETS.items():
        config, trained = config_of("--preset", name), {"init_channels": 36, "layers": 20, **preset.train}
        assert (config.init_channels, config.layers) == (trained["init_channels"], trained["layers"]), name
        assert (config.eval_init_channels, config.eval_layers) == (config.init_channels, config.layers)
        assert config.dataset == trained.get("dataset", "cifar10")


def test_fast_says_what_it_changes_here() -> None:
    """No architecture steps: what is left of the shared preset is half the epochs and twice the logits' rate."""
    fast = presets(make_parser())["fast"]
    about, plain = fast.pop("about"), config_of("--arch", "DARTS_V2")
    assert fast.keys() == {"epochs", "gamma_learning_rate"} and "architecture step" not in about
    assert 2 * fast["epochs"] == plain.epochs and "half the epochs" in about
    assert fast["gamma_learning_rate"] == 2 * plain.gamma_learning_rate and "twice the rate" in about


def test_defaults_are_the_reference_s() -> None:
    config = config_of()
    assert (config.epochs, config.lr_step_epochs, config.lr_step_factor, config.batch_size) == (50, 15, 0.1, 128)
    assert (config.learning_rate, config.gamma_learning_rate, config.complexity_decay) == (0.1, 0.01, 0.00335)
    assert (config.weight_decay, config.gamma_weight_decay, config.bits) == (1e-4, 1e-4, [2, 4])
    assert config_of("--epochs", "10").lr_step_epochs == 3
    assert config_of("--epochs", "10", "--step-epoch", "7").lr_step_epochs == 7
    assert config_of("--allow8bit").bits == [2, 4, 8]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--bits", "2", "2"), "--bits: 2 2 names one twice"),
        (("--weight-quantizer", "lsq"), "--weight-quantizer: lsq"),
        (("--bit-mapping", "paper"), "--bit-mapping: every convolution"),
        (("--init-from", "nowhere"), "--init-from: nowhere is no folder"),
        (("--arch", "PC_DRTS"), "--arch: "),
        (("--unrolled",), "there is no such flag"),
        (("--target-bitops", "31M", "--cd", "0"), "--target-bitops: needs a cost weight"),
    ],
)
def test_what_does_not_fit_is_named(flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config_of(*flags)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_other_sizes_and_costs_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLACE, "--init-from", str(source), "--init-channels", "5"]) == 2
    assert "--init-from" in capsys.readouterr().err
    assert main([*SMOKE, "--target-bitops", "1"]) == 2
    assert "--target-bitops" in capsys.readouterr().err


def test_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    search(None, *SMOKE, "--dry-run")
    assert "nothing was written" in capsys.readouterr().out and not list(tmp_path.iterdir())
