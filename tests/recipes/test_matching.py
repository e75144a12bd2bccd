# SPDX-License-Identifier: Apache-2.0
"""--match-bitops: the largest channels within the budget, by counting every size; what is recorded; refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cost import network_cost
from common.engine import read_json
from common.nets import Architecture, build_network
from common.recipes.flags import resolve_training, training_parser
from common.recipes.matching import largest
from common.recipes.train import prepare, run_training
from genotypes import lookup

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--arch", "DARTS_V2", "--fixed_bit", "4")


def config_of(*flags: str):
    return resolve_training(training_parser("train.py", "test"), [*SMOKE, *flags])


def quantized_bitops(name: str, bits: int, channels: int) -> int:
    architecture = Architecture(lookup(name)[1]).with_uniform_bits(bits, bits)
    network = build_network(architecture, in_channels=1, num_classes=10, init_channels=channels, layers=3)
    return network_cost(network, 16).bitops_quantized


@pytest.mark.parametrize("factor, reference", [(18.0, "PC_DARTS"), (3.0, "DARTS_V2")])
def test_one_channel_more_is_too_many(factor: float, reference: str) -> None:
    config = config_of("--match-bitops", str(factor), "--match-reference", reference)
    prepared = prepare(config)
    budget, found = quantized_bitops(reference, 32, 4) / factor, config.init_channels
    assert quantized_bitops("DARTS_V2", 4, found) <= budget < quantized_bitops("DARTS_V2", 4, found + 1)
    assert prepared.cost.bitops_quantized == prepared.matched["bitops"] <= budget
    assert prepared.matched["reference_bitops"] == quantized_bitops(reference, 32, 4)
    assert config.sources["init_channels"] == "derived" and prepared.build["init_channels"] == found
    assert any(f"matched: {found} channels" in note for note in prepared.notes)


def test_a_run_records_it_and_resumes(tmp_path: Path) -> None:
    flags = ("--match-bitops", "--epochs", "1", "--save", str(tmp_path / "run"))
    result = run_training(config_of(*flags), method="any")
    assert result["matched"]["factor"] == 18 and result["matched"]["reference_channels"] == 4
    assert result["network"]["init_channels"] == result["matched"]["channels"] != 4
    assert read_json(tmp_path / "run" / "config.json")["sources"]["init_channels"] == "derived"
    assert run_training(config_of(*flags, "--resume", "auto"), method="any") == result


def test_what_cannot_be_matched_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--match-bitops 1e\\+09: .* single channel"):
        prepare(config_of("--match-bitops", "1e9"))
    with pytest.raises(ValueError, match="--match-reference: PC_DRTS"):
        prepare(config_of("--match-bitops", "--match-reference", "PC_DRTS"))
    with pytest.raises(SystemExit):
        config_of("--match-reference", "PC_DARTS")
    assert "--match-bitops F" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [52, 53, 54, 1000, 1e6])
@pytest.mark.parametrize("start", [1, 36])
def test_largest_against_trying_all(budget: float, start: int) -> None:
    cost = lambda n: 3 * n * n + 50 * n  # noqa: E731
    assert largest(cost, budget, start=start) == max((n for n in range(1, 1000) if cost(n) <= budget), default=None)
