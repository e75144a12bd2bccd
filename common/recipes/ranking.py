# SPDX-License-Identifier: Apache-2.0
"""Does the supernet rank architectures as training does? The accuracy of single ones in it, and rank correlation."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data import evaluation_batches
from common.nets import Architecture, load_architecture
from common.nets.sampling import choose
from common.quant.quantizers import RunningMaximum
from common.recipes.records import read_run
from common.recipes.search_setup import PreparedSearch
from common.recipes.searched import load_searched
from common.recipes.trained import EVALUATION_BATCH, evaluate_network

STATISTICS_BATCHES = 20
_SHUFFLES = 10_000


def rank(search: Path, trainings: Sequence[Path], **changes: Any) -> dict[str, Any]:
    """Accuracy of each trained architecture in the search's supernet and after its own training, and how they agree.

    `changes`: flags of the search for here and now, such as data=. Raises ValueError naming the run that does not fit.
    """
    records = [read_run(run) for run in trainings]
    for record in records:
        if record.stage != "train" or not record.finished:
            raise ValueError(f"TRAIN_RUN {record.folder}: is no finished training; name runs of train.py")
    prepared = load_searched(search, "SEARCH_RUN", **changes)
    weights = {name: tensor.clone() for name, tensor in prepared.supernet.state_dict().items()}
    rows = []
    for record in records:
        try:
            inside = supernet_accuracy(prepared, weights, load_architecture(record.folder))
        except ValueError as error:
            raise ValueError(f"TRAIN_RUN {record.folder}: {error}") from error
        cost = record.numbers.get("bitops_quantized")
        rows.append(
            {
                "run": str(record.folder),
                "architecture": record.architecture,
                "bitops_quantized": None if cost is None else int(cost),
                "supernet_top1": inside,
                "test_top1": record.accuracy,
            }
        )
    agreed = agreement([row["supernet_top1"] for row in rows], [row["test_top1"] for row in rows])
    return {"search": str(search), **agreed, "rows": rows}


def supernet_accuracy(prepared: PreparedSearch, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
    """Top-1 (fraction) of one architecture with the supernet's weights, on the images that the search validates on.

    Statistics of normalisation and quantiser ranges are gathered anew, on training images, for this architecture alone
    (as Guo et al., Single Path One-Shot, 2020, do): the search's are those of all operations mixed.
    """
    model, info = prepared.supernet, prepared.data.info
    model.load_state_dict(weights)
    choose(model, architecture)
    _gather_statistics(model, prepared)
    batches = evaluation_batches(
        prepared.data.train, info, EVALUATION_BATCH, prepared.device, indices=prepared.evaluation_indices
    )
    return evaluate_network(model, batches, info.num_classes, prepared.config.precision)["top1"]


@torch.no_grad()
def _gather_statistics(model: nn.Module, prepared: PreparedSearch) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
        elif isinstance(module, RunningMaximum):
            module.ready.fill_(False)
    model.train()
    stream = prepared.loop["train_stream"]
    for step in range(min(STATISTICS_BATCHES, stream.steps_per_epoch)):
        model(stream.batch(0, step)[0])


# ------------------------------------------------------------------------------------------------ rank correlation


def agreement(x: Sequence[float], y: Sequence[float]) -> dict[str, float | int | None]:
    """n, Spearman's rho with its p, and Kendall's tau-b; None where one side is constant.

    p is the share of 10,000 random pairings (fixed seed, the given one counts as one) with a rho at least as far from
    zero: a few architectures show little, and p says so.
    """
    rho = spearman(x, y)
    found = {"n": len(x), "spearman": rho, "spearman_p": None, "kendall": kendall(x, y)}
    if rho is None:
        return found
    ranks, shuffled, source = _ranks(x), _ranks(y), random.Random(0)
    extreme = 1
    for _ in range(_SHUFFLES - 1):
        source.shuffle(shuffled)
        extreme += abs(_pearson(ranks, shuffled) or 0.0) >= abs(rho) - 1e-12
    return found | {"spearman_p": extreme / _SHUFFLES}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks, ties at their mean rank; None where one side has no order."""
    return _pearson(_ranks(x), _ranks(y))


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """tau-b: concordant minus discordant pairs over the root of the pairs untied in x times those untied in y."""
    signs = [[(a < b) - (a > b) for i, a in enumerate(side) for b in side[:i]] for side in (x, y)]
    return _pearson(*signs, centred=False)


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


def _pearson(x: Sequence[float], y: Sequence[float], centred: bool = True) -> float | None:
    """Correlation; None where one side does not vary. `centred` False takes both means as zero."""
    means = [sum(side) / max(1, len(side)) if centred else 0.0 for side in (x, y)]
    a, b = ([value - mean for value in side] for side, mean in zip((x, y), means, strict=True))
    scale = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / scale if scale else None
