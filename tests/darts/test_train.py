# SPDX-License-Identifier: Apache-2.0
"""darts/train.py: the authors' recipe, parameters and logits of its networks, nodes end to end, every test image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import load
from common.engine.cli import Config
from common.nets import Network, build_network, load_architecture
from common.recipes.flags import resolve_training
from common.recipes.train import network_arguments, resolve_architecture, run_training
from common.recipes.trained import load_trained
from darts.presets import PRESETS
from darts.search import main as search
from darts.train import main, make_parser, recipe_of_architecture
from tests.helpers.fill import fill, waves


class Cifar:
    """What a network must know of CIFAR-10."""

    image_size, channels, num_classes = 32, 3, 10


def resolved(*flags: str) -> Config:
    return resolve_training(make_parser(), flags, PRESETS, derive=[recipe_of_architecture])


def network(config: Config) -> Network:
    return build_network(resolve_architecture(config), **network_arguments(config, Cifar))


@pytest.mark.parametrize(
    ("flags", "drop_path"),
    [
        ((), 0.2),
        (("--arch=DARTS_V1",), 0.2),
        (("--arch=PC_DARTS",), 0.3),
        (("--arch=PC_DARTS", "--preset=paddle"), 0.2),
    ],
)
def test_the_authors_recipe(flags: tuple[str, ...], drop_path: float) -> None:
    c = resolved(*flags)
    assert (c.batch_size, c.learning_rate, c.learning_rate_min, c.epochs) == (96, 0.025, 0.0, 600)
    assert (c.init_channels, c.layers, c.weight_decay, c.grad_clip) == (36, 20, 3e-4, 5.0)
    assert (c.auxiliary, c.auxiliary_weight, c.cutout, c.cutout_length) == (True, 0.4, True, 16)
    assert c.drop_path_prob == drop_path
    assert c.wbits is None and load_architecture(c.arch).bits is None


def test_bits_of_an_architecture_are_refused_unless_bits_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = load_architecture("PC_DARTS").with_uniform_bits(2, 2).save(tmp_path / "two.json")
    flags = ["--preset", "smoke", "--device", "cpu", "--arch", str(file), "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--arch: {file} brings bits" in said and "add --wbits 32 --abits 32" in said
    assert main([*flags, "--wbits", "32", "--abits", "32"]) == 0
    assert "full precision" in capsys.readouterr().out


def test_names_and_explicit_flags_win() -> None:
    assert resolved().arch == "DARTS_V2" and resolved("--preset", "paddle").arch == "PADDLE_DARTS_V2"
    assert resolved("--arch=PC_DARTS", "--drop_path_prob", "0.1").drop_path_prob == 0.1


@pytest.mark.parametrize("preset", ["smoke", "quickstart", "small"])
def test_small_images_get_neither_head_nor_cutout(preset: str) -> None:
    config = resolved("--preset", preset)
    assert not config.auxiliary and not config.cutout


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "PC_DARTS"])
def test_parameters_of_the_published_networks(oracle: Any, name: str) -> None:
    truth = oracle("eval_params_macs")[load_architecture(name).name]["cifar_C36_L20"]
    with torch.device("meta"):
        found = network(resolved("--arch", name))
    head = sum(p.numel() for key, p in found.named_parameters() if "auxiliary" in key)
    total = sum(p.numel() for p in found.parameters())
    assert (total, total - head) == (truth["params_with_aux"], truth["params_no_aux"])


@pytest.mark.parametrize("name", ["DARTS_V2", "PC_DARTS"])
def test_first_logits_are_the_oracles(oracle: Any, name: str) -> None:
    """The training mode's logits of both heads, and the loss .4 x auxiliary, through this program's flags."""
    config = resolved("--arch", name, "--init-channels", "8", "--layers", "5")
    truth = oracle("eval_forward")["cifar"]["results"][load_architecture(name).name]
    logits, auxiliary = fill(network(config)).train()(waves((2, 3, 32, 32), "cos"))
    for found, expected in ((logits, truth["train_logits"]), (auxiliary, truth["train_aux_logits"])):
        torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
    losses = [torch.nn.functional.cross_entropy(x, torch.tensor([3, 7])) for x in (logits, auxiliary)]
    assert (losses[0] + config.auxiliary_weight * losses[1]).item() == pytest.approx(
        {"DARTS_V2": 3.901815, "PC_DARTS": 3.703604}[name], abs=1e-6
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PC-DARTS search of three nodes, two of them handed on, and the training of what it found."""
    folder = tmp_path_factory.mktemp("chain")
    smoke = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard"]
    shape = ["--nodes", "3", "--multiplier", "2", "--method", "PC-DARTS"]
    assert search([*smoke, *shape, "--save", str(folder / "search")]) == 0
    config = resolved(*smoke, "--arch", str(folder / "search"), "--save", str(folder / "train"))
    assert config.drop_path_prob == 0.3 and config.sources["drop_path_prob"] == "derived"
    run_training(config, method="darts")
    return folder


def test_nodes_and_multiplier_reach_the_trained_network(chain: Path) -> None:
    genotype = load_architecture(chain / "search").genotype
    assert len(genotype.normal) == len(genotype.reduce) == 6
    assert genotype.normal_concat == genotype.reduce_concat == (3, 4)
    trained, _, info = load_trained(chain / "train")
    assert info["method"] == "darts" and trained.classifier.in_features == 2 * 4 * 4  # 2 states, 4 channels, 2 halvings


def test_the_last_incomplete_batch_counts(chain: Path) -> None:
    """360 test images are no multiple of the evaluation's batch; all of them are counted, and rightly."""
    from common.engine import read_json

    result = read_json(chain / "train" / "result.json")
    trained, data = load_trained(chain / "train")[0], load("digits")
    pixels = data.test.images.float() / 255
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.info.mean, data.info.std))
    with torch.no_grad():
        logits = trained((pixels - mean) / std)
    logits = logits[0] if isinstance(logits, tuple) else logits
    correct = int((logits.argmax(1) == data.test.labels).sum())
    assert result["n_test"] == 360 and result["metrics"]["test_correct"] == correct
    assert result["metrics"]["test_top1"] == pytest.approx(correct / 360)


def test_a_wrong_architecture_is_refused_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--arch", "PC_DART"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("--arch") == 1
