# SPDX-License-Identifier: Apache-2.0
"""darts/search.py, ptq/search.py, fbqat/search.py: defaults per method, seed commands, collapse, early stop, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import common.recipes.search as recipe
from common.engine import CheckpointStore, read_json
from common.engine.cli import Config
from common.nets import load_architecture
from common.recipes.findings import collapse_warning, skip_shares
from common.recipes.flags import full_precision_search_parser, resolve_search
from common.recipes.search import run_search
from darts.collapse import hooks_of
from darts.presets import PRESETS
from darts.search import main, make_parser, recipe_of_method

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--nodes", "2", "--multiplier", "2")


class Stop(Exception):
    """Stands for a crash."""


def resolved(*flags: str) -> Config:
    return resolve_search(make_parser(), flags, PRESETS, derive=[recipe_of_method])


def run(save: Path, *flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    config = resolved(*SMOKE, *flags, "--save", str(save))
    return run_search(config, method="darts", hooks=hooks_of(config), on_step=on_step)


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    found = CheckpointStore(folder / "checkpoints", config_digest=read_json(folder / "config.json")["digest"]).latest()
    assert found is not None
    return found[0]["model"]


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # batch, rate, its end, alphas' rate, epochs before the architecture moves (specs of the three public codes)
        ((), ("darts", 64, 0.025, 0.001, 3e-4, 0, False)),
        (("--unrolled=True",), ("darts", 64, 0.025, 0.001, 3e-4, 0, True)),
        (("--method=PC-DARTS",), ("pc-darts", 256, 0.1, 0.0, 6e-4, 15, False)),
        (("--method=PC-DARTS", "--batch_size=128"), ("pc-darts", 128, 0.1, 0.0, 6e-4, 15, False)),
        (("--preset", "paddle"), ("darts", 64, 0.025, 0.0, 3e-4, 0, False)),
        (("--preset", "paddle", "--method=PC-DARTS"), ("pc-darts", 64, 0.025, 0.0, 3e-4, 0, False)),
        (("--preset", "smoke", "--method=PC-DARTS"), ("pc-darts", 16, 0.1, 0.0, 6e-4, 0, False)),
        (
            [
                "--method=PC-DARTS",
                "--batch_size=256",
                "--learning_rate=0.1",
                "--arch_learning_rate=6e-4",
                "--epochs_no_archopt=15",
            ],
            ("pc-darts", 256, 0.1, 0.0, 6e-4, 15, False),
        ),
    ],
)
def test_defaults_are_the_authors(flags: tuple[str, ...], expected: tuple[Any, ...]) -> None:
    c = resolved(*flags)
    found = (c.method, c.batch_size, c.learning_rate, c.learning_rate_min, c.arch_learning_rate, c.warmup_epochs)
    assert (*found, c.unrolled) == expected
    assert (c.epochs, c.momentum, c.weight_decay, c.arch_weight_decay, c.grad_clip) == (
        *((50,) if c.preset != "smoke" else (2,)),
        0.9,
        3e-4,
        1e-3,
        5.0,
    )
    assert c.bits is None and c.complexity_decay == 0 and c.arch_complexity_decay == 0
    assert c.second_order == "finite-difference"


@pytest.mark.parametrize(("method", "rate", "warmup"), [("DARTS", 1.2e-3, 0), ("PC-DARTS", 2.4e-3, 7)])
def test_fast_keeps_its_proportions_to_either_methods_recipe(method: str, rate: float, warmup: int) -> None:
    plain, fast = resolved(f"--method={method}"), resolved(f"--method={method}", "--preset", "fast")
    assert (fast.arch_learning_rate, fast.warmup_epochs, fast.epochs, fast.arch_every) == (rate, warmup, 25, 2)
    assert fast.arch_learning_rate == 4 * plain.arch_learning_rate
    assert fast.batch_size == plain.batch_size and fast.learning_rate == plain.learning_rate
    assert resolved("--preset", "fast", "--arch-learning-rate", "1e-3").arch_learning_rate == 1e-3


def test_what_follows_from_the_method_is_shown_as_derived() -> None:
    sources = resolved("--method=PC-DARTS", "--learning_rate=0.2").sources
    assert sources["batch_size"] == "derived" and sources["learning_rate"] == "flag"


@pytest.mark.parametrize("program", ["ptq", "fbqat"])
def test_the_other_methods_search_as_pc_darts_does(program: str) -> None:
    c = resolve_search(full_precision_search_parser(f"{program}/search.py", "test"), [])
    found = (c.method, c.batch_size, c.learning_rate, c.arch_learning_rate, c.warmup_epochs, c.bits)
    assert found == ("pc-darts", 256, 0.1, 6e-4, 15, None)


def test_flags_of_bits_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        resolved("--bits", "4", "--gamma-learning-rate", "0.1")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--bits: there is no such flag" in error and "--gamma-learning-rate: there is no such flag" in error


def test_paddles_other_flags_are_taken_or_said_to_be_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--log_freq=20 --use_multiprocess=False --momentum 0.9 --use_gpu True --class_num=10 --trainset_num=50000"
    more = (
        "--model_save_dir=x --grad_clip 5 --cutout False --cutout_length=16 --init_channels=16 --layers=8 --epochs=50"
    )
    c = resolved(*flags.split(), *more.split())
    assert (c.log_every, c.workers, c.cutout, c.epochs) == (20, 0, False, 50)
    notes = capsys.readouterr().err
    for name in ("--use_gpu", "--class_num", "--trainset_num", "--model_save_dir"):
        assert f"{name} is accepted and ignored" in notes


def test_data_parallel_without_torchrun_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["--use_data_parallel", "1", "--epochs", "3"])
    assert stop.value.code == 2
    line = "torchrun --nproc_per_node=4 darts/search.py --use_data_parallel 1 --epochs 3"
    said = capsys.readouterr().err
    assert line in [row.strip() for row in said.splitlines()] and "several processes" not in said
    # as typed elsewhere
    typed = str(Path(__file__).resolve().parents[2] / "darts" / "search.py")
    monkeypatch.setattr("sys.argv", [typed])
    with pytest.raises(SystemExit):
        main(["--use_data_parallel", "1"])
    assert f"torchrun --nproc_per_node=4 {typed} --use_data_parallel 1\n" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolved("--use_data_parallel", "1").use_data_parallel


def test_imagenet_without_its_images_is_told_where_to_get_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        resolved("--dataset", "imagenet")
    assert stop.value.code == 2 and "--dataset: imagenet needs --data DIR" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- searches


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run(folder)
    return folder


def test_a_search_says_its_skips_and_its_genotype(found: Path) -> None:
    architecture, rows = load_architecture(found), history(found)
    assert architecture.bits is None and architecture.search["supernet"] == "darts"
    for row in rows:
        cells = [[name for name, _ in row["genotype"][kind]] for kind in ("normal", "reduce")]
        shares = [cell.count("skip_connect") / 4 for cell in cells]
        assert [row["skip_share_normal"], row["skip_share_reduce"]] == shares
        assert row["skip_share"] == sum(shares) / 2
    g = architecture.genotype
    line = f"genotype = Genotype(normal={list(g.normal)}, normal_concat=range(2, 4), reduce={list(g.reduce)}, "
    assert line + "reduce_concat=range(2, 4))" in (found / "log.txt").read_text()
    result = read_json(found / "result.json")
    assert result["stopped_early"] is False and result["epochs"] == 2
    assert "darts/train.py" in result["train_command"]


def test_the_warning_of_a_collapsed_cell() -> None:
    cell = [["skip_connect", 0], ["sep_conv_3x3", 1]] * 4
    row = {"genotype": {"normal": cell}, "alphas": {"normal": []}}
    assert "4 of 8 operations of the normal cell are skip connections" in (collapse_warning(row) or "")
    less = {"genotype": {"normal": [["max_pool_3x3", 0], *cell[1:]]}}
    assert collapse_warning(row | less) is None
    assert collapse_warning(row | {"alphas": None}) is None  # cells that nobody searched do not collapse
    assert skip_shares(load_architecture("PC_DARTS")) == {
        "skip_share": 1 / 16,
        "skip_share_normal": 1 / 8,
        "skip_share_reduce": 0.0,
    }


def test_watching_the_eigenvalue_changes_nothing(tmp_path: Path) -> None:
    small = ("--nodes", "1", "--multiplier", "1", "--batch-size", "8")
    run(tmp_path / "plain", *small)
    run(tmp_path / "watched", *small, "--track-eigenvalue")
    for plain, watched in zip(history(tmp_path / "plain"), history(tmp_path / "watched"), strict=True):
        assert watched.pop("dominant_eigenvalue") != 0
        assert watched == plain
    theirs = final_weights(tmp_path / "watched")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in final_weights(tmp_path / "plain").items())
    assert "dominant_eigenvalue" in (tmp_path / "watched" / "metrics.csv").read_text().splitlines()[0]


def test_beta_decay_pulls_from_the_second_epoch_on(found: Path, tmp_path: Path) -> None:
    run(tmp_path / "decayed", "--beta-decay", "50")
    (first, second), (plain, later) = history(tmp_path / "decayed"), history(found)
    assert first == plain and second["alphas"] != later["alphas"]


EARLY = ("--early-stop-skips", "1", "--epochs", "5", "--seed", "4")


def test_early_stop_and_resume_give_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the deciding epoch, and once more between the decision and the result."""
    whole = run(tmp_path / "whole", *EARLY)
    rows = history(tmp_path / "whole")
    skips = [sum(name == "skip_connect" for name, _ in row["genotype"]["normal"]) for row in rows]
    assert whole["stopped_early"] is True and whole["epochs"] == len(rows) < 5
    assert skips[-1] >= 1 and max(skips[:-1], default=0) < 1
    assert "(--early-stop-skips 1)" in (tmp_path / "whole" / "log.txt").read_text()

    def crash(step: int) -> None:
        if step == whole["steps"] - 1:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "cut", *EARLY, on_step=crash)
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> None:
            raise Stop

        patch.setattr(recipe, "_conclude", fail)
        with pytest.raises(Stop):
            run(tmp_path / "cut", *EARLY, "--resume", "auto")
    again = run(tmp_path / "cut", *EARLY, "--resume", "auto")
    for key in ("stopped_early", "epochs", "steps", "genotype", "metrics"):
        assert again[key] == whole[key], key
    assert (tmp_path / "cut" / "history.jsonl").read_text() == (tmp_path / "whole" / "history.jsonl").read_text()


def test_the_rule_waits_for_the_architecture(tmp_path: Path) -> None:
    config = resolved(*SMOKE, "--early-stop-skips", "1", "--warmup-epochs", "1")
    stop = hooks_of(config).stop
    row = {"genotype": {"normal": [["skip_connect", 0]]}}
    assert stop is not None and stop(0, row) is None and "1 skip connections" in (stop(1, row) or "")
