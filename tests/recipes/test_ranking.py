# SPDX-License-Identifier: Apache-2.0
"""Rank correlations against scipy; single architectures in a supernet against its definition; the rank command."""

from __future__ import annotations

import csv
import json
import math
import random
from itertools import permutations
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from common.nets import Architecture
from common.nets.sampling import choose, random_bits, random_genotype
from common.recipes.__main__ import main
from common.recipes.flags import resolve_search, search_parser
from common.recipes.ranking import agreement, kendall, spearman, supernet_accuracy
from common.recipes.search import run_search
from common.recipes.searched import load_searched
from tests.helpers.fake_runs import train_result, write_run

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--seed", "0")


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_correlations_equal_scipy(n: int, levels: int) -> None:
    source = random.Random(n + levels)
    for _ in range(5):
        x, y = ([source.randrange(levels) / 7 for _ in range(n)] for _ in range(2))
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
            assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_no_order_gives_no_correlation() -> None:
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2], [5, 5]), ([], [])):
        assert spearman(x, y) is None and kendall(x, y) is None
        assert agreement(x, y) == {"n": len(x), "spearman": None, "spearman_p": None, "kendall": None}


def test_p_is_the_share_of_permutations() -> None:
    x, y = [0.1, 0.4, 0.35, 0.8, 0.7], [0.2, 0.3, 0.5, 0.9, 0.6]
    rhos = [abs(stats.spearmanr(x, shuffled).statistic) for shuffled in permutations(y)]
    found = agreement(x, y)
    exact = sum(rho >= found["spearman"] - 1e-9 for rho in rhos) / math.factorial(5)
    assert found["spearman_p"] == pytest.approx(exact, abs=0.02) and found == agreement(x, y)


# ------------------------------------------------------------------------------------------------ in a supernet


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke search over {2, 4} bits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("search") / "run"
    run_search(resolve_search(search_parser("s", ""), [*SMOKE, "--save", str(folder)]), method="m")
    return folder


def architectures(n: int) -> list[Architecture]:
    """Random ones of the smoke supernet's three cells, with random bits."""
    found = []
    for seed in range(n):
        source = torch.Generator().manual_seed(seed)
        genotype = random_genotype(source)
        found.append(Architecture(genotype, random_bits(Architecture(genotype), (2, 4), source, layers=3)))
    return found


def test_an_opened_search_is_as_it_stood(search: Path) -> None:
    prepared = load_searched(search)
    found = prepared.supernet.architecture().to_json()
    saved = json.loads((search / "architecture.json").read_text())
    assert found["genotype"] == saved["genotype"] and found["bits"] == saved["bits"]
    assert prepared.config.epochs == 2 and prepared.config.init_channels == 8


def test_the_supernet_is_read_alone_for_each_architecture(search: Path) -> None:
    prepared = load_searched(search)
    weights = {name: tensor.clone() for name, tensor in prepared.supernet.state_dict().items()}
    one, two = architectures(2)
    first = supernet_accuracy(prepared, weights, one)
    supernet_accuracy(prepared, weights, two)
    assert supernet_accuracy(prepared, weights, one) == first
    # by definition: the statistics are the mean over the batches of the training stream
    stem, stream = prepared.supernet.stem, prepared.loop["train_stream"]
    batches = [stem[0](stream.batch(0, step)[0]).transpose(0, 1).flatten(1) for step in range(stream.steps_per_epoch)]
    torch.testing.assert_close(stem[1].running_mean, torch.stack([b.mean(1) for b in batches]).mean(0))
    torch.testing.assert_close(stem[1].running_var, torch.stack([b.var(1) for b in batches]).mean(0))
    assert accuracy_by_hand(prepared, weights, one) == pytest.approx(first)


def accuracy_by_hand(prepared, weights, architecture: Architecture) -> float:
    """The share of right answers, with statistics and normalisation by hand."""
    model, data, stream = prepared.supernet, prepared.data, prepared.loop["train_stream"]
    model.load_state_dict(weights)
    choose(model, architecture)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # keep each batch's own
    kept = []
    with torch.no_grad():
        model.train()
        for step in range(stream.steps_per_epoch):
            model(stream.batch(0, step)[0])
            kept.append([(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms])
        for norm, values in zip(norms, zip(*kept)):
            norm.running_mean.copy_(torch.stack([mean for mean, _ in values]).mean(0))
            norm.running_var.copy_(torch.stack([var for _, var in values]).mean(0))
        model.eval()
        chosen = prepared.evaluation_indices
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.info.mean, data.info.std))
        logits = model((data.train.images[chosen].float() / 255 - mean) / std)
    return float((logits.argmax(1) == data.train.labels[chosen]).float().mean())


def test_the_command_ranks_trainings(search: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainings = []
    for k, architecture in enumerate(architectures(4)):
        result = train_result(correct=340 + 5 * k)
        trainings.append(str(write_run(tmp_path / f"t{k}", result, architecture=architecture.to_json())))
    out = tmp_path / "table" / "rank.csv"
    assert main(["rank", str(search), *trainings, "--out", str(out), "--device", "cpu"]) == 0
    said, rows = capsys.readouterr().out, list(csv.DictReader(out.open()))
    assert [row["run"] for row in rows] == trainings and all(run in said for run in trainings)
    inside, trained = ([float(row[key]) for row in rows] for key in ("supernet_top1", "test_top1"))
    assert trained == [(340 + 5 * k) / 360 for k in range(4)]
    if len(set(inside)) > 1:
        assert float(rows[0]["spearman"]) == pytest.approx(stats.spearmanr(inside, trained).statistic)
        assert f"n = 4: Spearman's rho {float(rows[0]['spearman']):+.3f}" in said
    write_run(tmp_path / "half")
    for wrong, message in (
        ([str(search), *trainings[:1], str(tmp_path / "half")], "no finished training"),
        ([trainings[0], *trainings[1:]], "SEARCH_RUN"),
        ([str(search), str(search), str(search)], "no finished training"),
    ):
        assert main(["rank", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_architecture_outside_the_space_is_named(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = [
        write_run(
            tmp_path / f"t{k}", train_result(), architecture=Architecture(random_genotype(torch.Generator())).to_json()
        )
        for k in range(2)
    ]
    assert main(["rank", str(search), *map(str, runs)]) == 2
    assert f"{runs[0]}: bits: 32 is not among" in capsys.readouterr().err
