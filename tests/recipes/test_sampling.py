# SPDX-License-Identifier: Apache-2.0
"""Random networks of equal cost: the band by the exact counter, what is kept, what is drawn, the command."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from common.cost import Cost, network_cost
from common.nets import Architecture, build_network, load_architecture
from common.nets.sampling import random_bits
from common.recipes.__main__ import main
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.records import read_run
from common.recipes.sampling import Reference, draw, load_reference, slot_bits, slot_macs
from common.recipes.search import run_search
from common.recipes.train import run_training
from genotypes import lookup

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--seed", "0", "--epochs", "1")
PC_DARTS = Architecture(lookup("PC_DARTS")[1])


def cost(layers: int, architecture: Architecture) -> Cost:
    with torch.device("meta"):
        network = build_network(architecture, num_classes=10, init_channels=4, layers=layers)
    return network_cost(network, 16)


def reference(weight: int = 2, activation: int = 4, bits: tuple[int, ...] = (2, 4), layers: int = 3) -> Reference:
    return Reference(PC_DARTS.with_uniform_bits(weight, activation), partial(cost, layers), bits)


@pytest.mark.parametrize("layers", [3, 8])
def test_slots_hold_every_quantised_convolution(layers: int) -> None:
    policy = random_bits(PC_DARTS, (2, 4, 8), torch.Generator().manual_seed(0))
    whole = cost(layers, Architecture(PC_DARTS.genotype, policy))
    macs, bits = slot_macs(policy, [row for row in whole.layers if row.quantizable]), dict(slot_bits(policy))
    assert sum(macs.values()) == whole.macs_quantized
    assert sum(count * bits[slot][0] * bits[slot][1] for slot, count in macs.items()) == whole.bitops_quantized


# 2/2 and 4/4 are ends of what the same cells can cost; other cells may have too few operations for the dear one
@pytest.mark.parametrize(
    "keep, weight, activation", [("cells", 2, 4), ("cells", 2, 2), ("cells", 4, 4), ("none", 2, 4)]
)
def test_draws_cost_the_same(keep: str, weight: int, activation: int) -> None:
    wanted = reference(weight, activation)
    target = wanted.cost(wanted.architecture).bitops_quantized
    for seed in range(2):
        found = draw(wanted, keep=keep, seed=seed)
        assert wanted.cost(found).bitops_quantized == pytest.approx(target, rel=0.05)
        assert (found.genotype == PC_DARTS.genotype) == (keep == "cells")
        assert {width for _, pair in slot_bits(found.bits) for width in pair} <= {2, 4}


def test_a_seed_names_a_draw_that_can_be_saved(tmp_path: Path) -> None:
    first, again = (draw(reference(), keep="none", seed=7) for _ in range(2))
    assert first == again and first != draw(reference(), keep="none", seed=8)
    assert load_architecture(first.save(tmp_path / "a.json")) == first


def test_draws_stay_as_random_as_the_cost_allows() -> None:
    # 2 x 4 bits everywhere cost 8 a MAC, a uniform draw from 2 and 4 costs 9 on the mean: few flips are needed
    counts = Counter()
    for seed in range(4):
        for _, pair in slot_bits(draw(reference(), keep="cells", seed=seed).bits):
            counts.update(zip(("weight", "activation"), pair))
    for operand in ("weight", "activation"):
        share = counts[operand, 2] / (counts[operand, 2] + counts[operand, 4])
        assert 0.45 < share < 0.7


def test_cells_are_drawn_from_the_searchs_own_candidates() -> None:
    drawn = draw(replace(reference(), primitives=("none", "sep_conv_3x3", "skip_connect")), keep="none", seed=0)
    assert {primitive for primitive, _ in drawn.genotype.normal + drawn.genotype.reduce} == {
        "sep_conv_3x3",
        "skip_connect",
    }


def test_a_cost_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--like.*\(1, 2\) bits, which reach.*--bits"):
        draw(reference(4, 4, bits=(1, 2)), keep="cells", seed=0)


# ----------------------------------------------------------------------------------------------- from run folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke search over {2, 4} bits and a smoke training of what it found, at other sizes than the supernet's."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("runs")
    run_search(resolve_search(search_parser("s", ""), [*SMOKE, "--save", str(place / "search")]), method="m")
    flags = [*SMOKE, "--arch", str(place / "search"), "--save", str(place / "trained")]
    run_training(resolve_training(training_parser("t", ""), flags), method="m")
    return place


def test_searches_and_trainings_are_references_of_one_cost(runs: Path) -> None:
    searched, trained = load_reference(runs / "search"), load_reference(runs / "trained", bits=(2, 4))
    result = json.loads((runs / "search" / "result.json").read_text())
    for found in (searched, trained):
        assert found.cost(found.architecture).bitops_quantized == result["exact_bitops_quantized"]
        assert found.architecture.genotype == load_architecture(runs / "search").genotype
        assert found.bits == (2, 4)


def test_the_command_writes_what_training_takes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "deep" / "drawn.json"
    flags = ["random", "--like", str(runs / "search"), "--keep", "none", "--seed", "3", "--out", str(out)]
    assert main(flags) == 0 and "random cells and bits, seed 3" in capsys.readouterr().out
    text = out.read_text()
    assert main(flags) == 0 and out.read_text() == text
    save = ["--arch", str(out), "--save", str(tmp_path / "run")]
    result = run_training(resolve_training(training_parser("t", ""), [*SMOKE, *save]), method="m")
    target = json.loads((runs / "search" / "result.json").read_text())["exact_bitops_quantized"]
    assert result["cost"]["bitops_quantized"] == pytest.approx(target, rel=0.05)
    record = read_run(tmp_path / "run")
    assert (record.architecture, record.bit_set) == ("random cells and bits", (2, 4))
    # draws of several seeds share a row of a table: nothing in their settings is a draw's own
    assert "search.seed" not in record.settings


def test_errors_name_flag_and_cure(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for flags, message in (
        (["random"], "--like: missing"),
        (["random", "--like", str(tmp_path / "nowhere")], "no such"),
        (["random", "--like", str(tmp_path)], "no architecture.json"),
        (["random", "--like", str(runs / "search"), "--bits", "2"], "give --bits 2 4"),
        (["rank", str(runs / "search")], "at least two"),
        (["other"], "random, rank"),
        ([], "random, rank"),
    ):
        assert main(flags) == 2
        assert message in capsys.readouterr().err, flags
    assert main(["--help"]) == 0 and "rank SEARCH_RUN" in capsys.readouterr().out
