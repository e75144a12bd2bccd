# SPDX-License-Identifier: Apache-2.0
"""The training recipe on digits at smoke size: its result, evaluate.py's equal figures, resume, transfer, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from common.cost import network_cost
from common.data import evaluation_batches, load
from common.engine import CheckpointStore, read_json
from common.recipes.flags import resolve_training, training_parser
from common.recipes.train import run_training
from common.recipes.trained import load_trained


class Stop(Exception):
    """Stands for a crash."""


def train(save: Path | None, *flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    argv = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard", *flags]
    config = resolve_training(training_parser("train.py", "test"), argv + (["--save", str(save)] if save else []))
    return run_training(config, method="qdarts", on_step=on_step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two-bit"
    train(folder, "--arch", "PC_DARTS", "--wbits", "2", "--abits", "2")
    return folder


def test_the_result_says_everything(trained: Path) -> None:
    result = read_json(trained / "result.json")
    assert result["finished"] is True and result["stage"] == "train" and result["method"] == "qdarts"
    assert (result["n_train"], result["n_test"], result["epochs"], result["steps"]) == (1437, 360, 2, 6)
    assert result["bits_mean"] == {"weight": 2.0, "activation": 2.0}
    assert result["metrics"]["test_top1"] == result["metrics"]["test_correct"] / 360
    assert "val_top1" not in result["metrics"]
    assert result["network"]["image_size"] == 16 and result["network"]["in_channels"] == 1
    network, config, info = load_trained(trained)
    assert result["cost"] == network_cost(network, 16).to_json()
    assert config["wbits"] == 2 and info["epoch"] == 2
    for name, path in result["artefacts"].items():
        assert (trained / path).exists() or name == "result", name
    rows = (trained / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,train_loss,train_top1") and [row.split(",")[0] for row in rows[1:]] == list(
        "123456"
    )


def test_evaluate_gives_the_same_figures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = read_json(trained / "result.json")["metrics"]
    assert evaluate.main([str(trained), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    for mine, theirs in (
        ("loss", "test_loss"),
        ("top1", "test_top1"),
        ("top5", "test_top5"),
        ("correct", "test_correct"),
    ):
        assert found[mine] == metrics[theirs]
    assert sum(row["n"] for row in found["per_class"]) == found["n"] == 360
    assert sum(row["correct"] for row in found["per_class"]) == found["correct"]


def test_the_figures_by_hand(trained: Path) -> None:
    network, _, _ = load_trained(trained)
    data = load("digits")
    with torch.inference_mode():
        pairs = [(network(x)[0], y) for x, y in evaluation_batches(data.test, data.info, 7, "cpu")]
    logits, labels = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    metrics = read_json(trained / "result.json")["metrics"]
    assert int((logits.argmax(1) == labels).sum()) == metrics["test_correct"]
    assert torch.nn.functional.cross_entropy(logits.double(), labels).item() == pytest.approx(
        metrics["test_loss"], 1e-6
    )


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_resumed_training_is_bit_equal(tmp_path: Path, stop_after: int) -> None:
    """3: at an epoch's end; 5: in the middle of the second, where every step leaves a checkpoint."""
    flags = ("--wbits", "4", "--abits", "8", "--drop_path_prob", ".5", "--checkpoint-minutes", "1e-9")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    expected = train(whole, *flags)

    def stop(step: int) -> None:
        if step == stop_after:
            raise Stop

    with pytest.raises(Stop):
        train(torn, *flags, on_step=stop)
    assert not (torn / "result.json").exists()
    found = train(torn, *flags, "--resume", "auto")
    assert found["metrics"] == expected["metrics"]
    assert (torn / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
    steps = [[row.split(",")[0] for row in (f / "metrics.csv").read_text().splitlines()] for f in (whole, torn)]
    assert steps[0] == steps[1]
    states = [CheckpointStore(f / "checkpoints", config_digest=_digest(f)).latest() for f in (whole, torn)]
    models = [state[0]["model"] for state in states if state]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name
    assert train(torn, *flags, "--resume", "auto") == found  # finished: nothing is done


def _digest(folder: Path) -> str:
    return read_json(folder / "config.json")["digest"]


def test_two_runs_are_bit_equal_and_seeds_differ(tmp_path: Path) -> None:
    runs = [train(tmp_path / str(i), "--seed", str(seed)) for i, seed in enumerate((1, 1, 2))]
    assert runs[0]["metrics"] == runs[1]["metrics"] != runs[2]["metrics"]


def test_select_val_holds_out_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path / "run", "--select", "val", "--val-fraction", ".25")
    assert result["n_train"] == 1437 - 359
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "run"), "--split", "val", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 359 and found["top1"] == result["metrics"]["val_top1"]


def test_init_from_loads_every_weight(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = load_trained(trained)[0].state_dict()
    train(
        tmp_path / "run", "--init-from", str(trained), "--wbits", "4", "--abits", "4", "--lr", "1e-30", "--epochs", "1"
    )
    assert "started from" in capsys.readouterr().out
    ours = load_trained(tmp_path / "run")[0].state_dict()
    for name, tensor in theirs.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, ours[name]), name


def test_init_from_and_teacher_refuse_what_does_not_fit(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--init-from .*do not fit"):
        train(tmp_path / "a", "--init-from", str(trained), "--init-channels", "5")
    with pytest.raises(ValueError, match="--teacher .*no run lies there"):
        train(tmp_path / "b", "--teacher", str(tmp_path))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_teacher_changes_the_training(trained: Path, tmp_path: Path) -> None:
    plain, taught = train(tmp_path / "a"), train(tmp_path / "b", "--teacher", str(trained), "--teacher-weight", ".9")
    assert plain["metrics"]["test_loss"] != taught["metrics"]["test_loss"]


def test_the_auxiliary_head_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--auxiliary: .*use larger images"):
        train(tmp_path / "run", "--auxiliary")
    result = train(tmp_path / "run", "--auxiliary", "--image-size", "32", "--epochs", "1", "--steps-per-epoch", "1")
    assert result["cost"]["parameters_with_auxiliary"] > result["cost"]["parameters"]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train(None, "--dry-run")
    out = capsys.readouterr().out
    assert "M parameters" in out and "peak memory" in out and "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_evaluate_refuses_by_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path / "none")]) == 2
    assert f"TARGET {tmp_path / 'none'}: is not there; give a run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate.main([str(tmp_path / "empty")]) == 2
    assert "holds neither a run nor an exported file" in capsys.readouterr().err
    assert evaluate.main([str(trained), "--split", "val"]) == 2
    assert "--split val" in capsys.readouterr().err
    assert evaluate.main([str(trained), "--checkpoint", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(trained), "--splt", "val"])
    assert stop.value.code == 2


def test_bad_architectures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "architecture.json"
    file.write_text('{"schema": 1, "space": "darts", "genotype": {}, "bits": null}')
    for arch, word in (("PC_DRTS", "PC_DARTS"), (str(file), "genotype"), (str(tmp_path / "x.json"), "no such file")):
        with pytest.raises(SystemExit) as stop:
            train(None, "--arch", arch)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "--arch: " in err and word in err
