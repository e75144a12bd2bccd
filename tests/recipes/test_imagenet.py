# SPDX-License-Identifier: Apache-2.0
"""ImageNet through the programs: the recipes of the papers, flags that contradict each other, whole runs, resumed."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from common.data import sample_parts
from common.engine import load_state
from common.engine.cli import Config
from common.recipes import flags as recipe_flags
from common.recipes.search import run_search
from common.recipes.train import run_training
from tests.helpers.photographs import make_folder

FFCV = pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed: bash scripts/install_ffcv.sh")
SMALL = ["--preset", "smoke", "--image-size", "64", "--stem", "imagenet", "--device", "cpu", "--no-tensorboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("imagenet"), 6, 3)


def search_config(*argv: str) -> Config:
    return recipe_flags.resolve_search(recipe_flags.search_parser("search.py", ""), argv)


def train_config(*argv: str) -> Config:
    return recipe_flags.resolve_training(recipe_flags.training_parser("train.py", ""), argv)


def program(name: str) -> ModuleType:
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------------ recipes


def test_the_search_of_the_paper() -> None:
    """specs of QDARTS/train_search_imagenet.py and of PC-DARTS: every number that differs from CIFAR-10's."""
    found = search_config("--dataset", "ImageNet", "--data", "/images").as_dict()
    wanted = {
        "batch_size": 1024, "learning_rate": 0.5, "learning_rate_min": 0.0, "lr_warmup_epochs": 5, "weight_decay": 3e-4,
        "epochs": 50, "init_channels": 16, "layers": 8, "partial": 2, "arch_learning_rate": 6e-3, "warmup_epochs": 35,
        "complexity_decay": 1e-4, "gamma_learning_rate": 0.01, "gamma_weight_decay": 1e-3, "seed": 2,
        "search_fraction": [0.1, 0.025], "eval_init_channels": 48, "eval_layers": 14, "dataset": "imagenet",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert found["reading"] == "image files: bit-reproducible" and found["workers"] >= 1


def test_the_training_of_the_paper() -> None:
    found = train_config("--dataset", "imagenet", "--data", "/images").as_dict()
    wanted = {
        "batch_size": 1024, "learning_rate": 0.5, "lr_schedule": "linear", "lr_warmup_epochs": 5, "weight_decay": 3e-5,
        "epochs": 250, "init_channels": 48, "layers": 14, "auxiliary": True, "auxiliary_weight": 0.4,
        "drop_path_prob": 0.0, "label_smoothing": 0.1, "grad_clip": 5.0, "seed": 0, "cutout": False,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_the_training_of_the_example_that_darts_follows() -> None:
    darts = program("darts.train")
    argv = ["--preset", "paddle-imagenet", "--data", "/images"]
    presets = program("darts.presets").PRESETS
    found = recipe_flags.resolve_training(darts.make_parser(), argv, presets, derive=[darts.recipe_of_architecture])
    wanted = {
        "batch_size": 128, "learning_rate": 0.1, "lr_schedule": "step", "lr_step_epochs": 1, "lr_step_factor": 0.97,
        "weight_decay": 3e-5, "epochs": 250, "init_channels": 48, "layers": 14, "auxiliary": True,
        "drop_path_prob": 0.0, "label_smoothing": 0.1, "lr_warmup_epochs": 0, "dataset": "imagenet", "cutout": False,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_shorter_searches_keep_their_proportions_and_flags_win() -> None:
    few = search_config("--dataset", "imagenet", "--data", "/images", "--epochs", "10")
    assert (few.epochs, few.lr_warmup_epochs, few.warmup_epochs) == (10, 1, 7)
    one = search_config("--dataset", "imagenet", "--data", "/images", "--epochs", "1")
    assert one.warmup_epochs == 0
    own = search_config("--dataset", "imagenet", "--data", "/images", "--partial", "4", "--train-portion", "0.5")
    assert own.partial == 4 and own.search_fraction is None
    assert search_config("--trainfile", "a.ffcv", "--valfile", "b.ffcv").dataset == "imagenet"
    assert "not bit-reproducible" in search_config("--trainfile", "a.ffcv", "--valfile", "b.ffcv").reading
    assert search_config().reading is None and search_config().search_fraction is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset", "imagenet"], "--dataset: imagenet needs --data DIR"),
        (["--trainfile", "a.ffcv"], "--trainfile: .ffcv files come in pairs; give --valfile too"),
        (["--trainfile", "a", "--valfile", "b", "--dataset", "mnist"], "--trainfile: .ffcv files are read as"),
        (["--trainfile", "a", "--valfile", "b", "--data", "c"], "--data names another copy"),
        (["--search-fraction", ".5"], "--search-fraction: takes two shares"),
        (["--search-fraction", ".5", ".6"], "are more than all images"),
        (["--search-fraction", ".5", ".5", "--subset", ".5"], "--subset: --search-fraction says it already"),
    ],
)
def test_contradictions_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search_config(*argv)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ whole runs


class Stop(Exception):
    pass


def stop_after(steps: int):  # type: ignore[no-untyped-def]
    def on_step(done: int) -> None:
        if done >= steps:
            raise Stop

    return on_step


def tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    return load_state(newest)[0]["model"]


def test_a_search_saves_its_parts_and_resumes_bit_exactly(folder: Path, tmp_path: Path) -> None:
    argv = [
        *SMALL,
        "--dataset",
        "imagenet",
        "--data",
        str(folder),
        "--search-fraction",
        ".5",
        ".4",
        "--batch-size",
        "4",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_search(search_config(*argv, "--save", str(whole)), method="qdarts")
    parts = json.loads((whole / "search_parts.json").read_text())
    labels = torch.arange(3).repeat_interleave(6)
    wanted = sample_parts(labels, (0.5, 0.4), 2)
    assert (parts["train"], parts["valid"]) == tuple(part.tolist() for part in wanted)
    assert json.loads((whole / "result.json").read_text())["artefacts"]["search_parts"] == "search_parts.json"
    with pytest.raises(Stop):
        run_search(search_config(*argv, "--save", str(cut)), method="qdarts", on_step=stop_after(3))
    resumed = search_config(*argv, "--save", str(cut), "--resume", "auto", "--workers", "1")
    run_search(resumed, method="qdarts")
    assert (cut / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
    ours, theirs = tensors(cut), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_resumes_bit_exactly_and_is_evaluated(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--dataset", "imagenet", "--data", str(folder), "--batch-size", "4", "--classes", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = run_training(train_config(*argv, "--save", str(whole)), method="qdarts")
    assert (result["n_train"], result["n_test"]) == (12, 6)
    with pytest.raises(Stop):
        run_training(train_config(*argv, "--save", str(cut)), method="qdarts", on_step=stop_after(4))
    run_training(train_config(*argv, "--save", str(cut), "--resume", "auto", "--workers", "0"), method="qdarts")
    ours, theirs = tensors(cut), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    capsys.readouterr()
    assert program("evaluate").main([str(whole), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["correct"]) == (6, result["metrics"]["test_correct"])
    assert found["loss"] == pytest.approx(result["metrics"]["test_loss"], abs=1e-9)


@FFCV
@pytest.mark.slow
def test_a_training_on_ffcv_files_says_what_it_cannot_repeat(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = program("common.data.__main__").main
    files = {part: str(tmp_path / f"{part}.ffcv") for part in ("train", "val")}
    for part, out in files.items():
        assert write([str(folder / part), "--out", out, "--compress-probability", "0"]) == 0
    argv = [*SMALL, "--trainfile", files["train"], "--valfile", files["val"], "--batch-size", "4"]
    run = tmp_path / "run"
    with pytest.raises(Stop):
        run_training(train_config(*argv, "--save", str(run)), method="qdarts", on_step=stop_after(4))
    capsys.readouterr()
    result = run_training(train_config(*argv, "--save", str(run), "--resume", "auto"), method="qdarts")
    assert "differ from run to run, also after a resume" in capsys.readouterr().out
    assert "not bit-reproducible" in json.loads((run / "config.json").read_text())["config"]["reading"]
    evaluate = program("evaluate").main
    assert evaluate([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == result["metrics"]["test_correct"]
    for places in (["--valfile", files["val"]], ["--data", str(folder)]):  # the other file, or the other path
        assert evaluate([str(run), "--json", *places]) == 0
        other = json.loads(capsys.readouterr().out)
        assert other["n"] == 9 and other["loss"] == pytest.approx(result["metrics"]["test_loss"], abs=0.1)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["--trainfile", "t"], "--trainfile: tested is --valfile"),
        (["--valfile", "v", "--data", "d"], "--data: the images are in one place; drop it or --valfile"),
    ],
)
def test_evaluation_asks_for_the_right_images(places: list[str], said: str) -> None:
    evaluation = program("evaluate")
    with pytest.raises(ValueError, match=said):
        evaluation.check_places(evaluation.parser().parse_args(["run", *places]))
    evaluation.check_places(evaluation.parser().parse_args(["run", "--trainfile", "t", "--split", "val"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qdarts", "darts", "fbqat", "ptq", "qsubnet"])
def test_every_method_searches_and_trains(folder: Path, tmp_path: Path, method: str) -> None:
    common = [*SMALL, "--dataset", "imagenet", "--data", str(folder), "--batch-size", "4"]
    found, trained = tmp_path / "search", tmp_path / "train"
    assert program(f"{method}.search").main([*common, "--search-fraction", ".5", ".4", "--save", str(found)]) == 0
    more = ["--fixed_bit", "4"] if method == "fbqat" else []
    arch = ["--arch", str(found)]
    assert program(f"{method}.train").main([*common, *more, *arch, "--save", str(trained)]) == 0
    assert json.loads((trained / "result.json").read_text())["n_test"] == 9
    if method == "ptq":
        quantised = tmp_path / "quantised"
        assert (
            program("ptq.quantize").main(
                [
                    str(trained),
                    "--n_sample",
                    "2",
                    "--param_bits",
                    "4",
                    "--fwd_bits",
                    "4",
                    "-b",
                    "4",
                    "--save",
                    str(quantised),
                ]
            )
            == 0
        )
        assert json.loads((quantised / "result.json").read_text())["n_test"] == 9
