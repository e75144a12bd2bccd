# SPDX-License-Identifier: Apache-2.0
"""fbqat/train.py on digits at smoke size: bits must be given, every weight of --init-from is kept, LSQ, a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.engine import read_json
from common.engine.cli import Config
from common.nets import load_architecture
from common.quant import LsqQuantizer, QuantConv2d
from common.recipes.flags import resolve_training, training_parser
from common.recipes.train import prepare, run_training
from common.recipes.trained import load_trained
from fbqat.train import check_bits, derive_cells, main

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard")
LSQ = ("--weight-quantizer", "lsq", "--activation-quantizer", "lsq")


def config_of(*flags: str) -> Config:
    parser = training_parser("train.py", "test")
    return resolve_training(parser, [*SMOKE, *flags], derive=[derive_cells], validate=[check_bits])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision training, of other cells than the default ones."""
    folder = tmp_path_factory.mktemp("runs") / "fp32"
    flags = [*SMOKE, "--arch", "DARTS_V2", "--seed", "7", "--save", str(folder)]
    run_training(resolve_training(training_parser("train.py", "test"), flags), method="any")
    return folder


@pytest.mark.parametrize("flags", [(), ("--arch", "DARTS_V2"), ("--wbits", "4")])
def test_bits_must_be_given(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*SMOKE, *flags])
    assert stop.value.code == 2
    assert ("--abits" if flags[:1] == ("--wbits",) else "--fixed_bit 2 or 4") in capsys.readouterr().err


def test_bits_that_are_refused_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SMOKE, "--fixed_bit", "5"])
    assert "1 error," in (said := capsys.readouterr().err) and "'5' is not offered" in said


@pytest.mark.parametrize("more", [(), LSQ])
def test_init_from_keeps_every_weight_and_the_cells(source: Path, more: tuple[str, ...]) -> None:
    prepared = prepare(config_of("--fixed_bit", "4", "--init-from", str(source), *more))
    assert prepared.architecture.genotype == load_architecture("DARTS_V2").genotype
    theirs = load_trained(source)[0].state_dict()
    ours = prepared.network.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    convolutions = {name for name, m in prepared.network.named_modules() if isinstance(m, QuantConv2d)}
    assert convolutions and all(f"{name}.weight" in theirs for name in convolutions)


def test_an_architecture_that_is_named_wins(source: Path) -> None:
    config = config_of("--fixed_bit", "2", "--init-from", str(source), "--arch", "PC_DARTS")
    assert config.arch == "PC_DARTS"
    with pytest.raises(ValueError, match="--init-from"):  # other cells: its weights do not fit
        prepare(config)


def test_a_quantised_run_lends_its_cells_alone(source: Path, tmp_path: Path) -> None:
    """--arch RUN may be a training at other bits; the flags' bits hold in every convolution of the cells."""
    assert main([*SMOKE, "--arch", str(source), "--wbits", "2", "--abits", "4", "--save", str(tmp_path / "a")]) == 0
    network = prepare(config_of("--arch", str(tmp_path / "a"), "--fixed_bit", "8")).network
    bits = {(m.weight_bits, m.activation_bits) for m in network.cells.modules() if isinstance(m, QuantConv2d)}
    assert bits == {(8, 8)}
    assert network.stem[0].weight_bits == network.classifier.weight_bits == 32


def test_lsq_from_a_run_with_a_teacher(source: Path, tmp_path: Path) -> None:
    flags = ["--fixed_bit", "2", "--init-from", str(source), "--teacher", str(source), *LSQ]
    assert main([*SMOKE, *flags, "--save", str(tmp_path / "run")]) == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert result["method"] == "fbqat" and result["bits_mean"] == {"weight": 2.0, "activation": 2.0}
    steps = [m for m in load_trained(tmp_path / "run")[0].modules() if isinstance(m, LsqQuantizer)]
    assert steps and all(bool(one.ready) for one in steps)
