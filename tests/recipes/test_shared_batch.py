# SPDX-License-Identifier: Apache-2.0
"""One process against several ranks with the same global batch: the same search and the same training, to 1e-10.

The one process normalises with torch's own layers and knows no ranks. float64, so that 1e-10 means something. Of
fixed bits one operand is: sums of discrete weights times discrete activations meet, and lie exactly between two levels
of the next quantiser or at a maximum of equals, where the last digit of a sum decides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.engine import distributed
from common.engine.accumulation import accumulated
from common.engine.search_loop import SearchLoop, SearchSettings
from common.engine.train_loop import TrainSettings, train
from common.nets import build_network, build_supernet, load_architecture, share_statistics
from common.quant import share_first_steps, share_ranges
from tests.helpers.ranks import on_ranks

BOUND = 1e-10
SIZE, CLASSES, BATCH = 8, 4, 8


class Slices:
    """Made-up images; a step's batch is shared out among the ranks in order."""

    def __init__(self, salt: int, parts: int) -> None:
        source = torch.Generator().manual_seed(salt)
        self.x = torch.randn(5 * BATCH, 3, SIZE, SIZE, generator=source, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (5 * BATCH,), generator=source)
        self.size = BATCH // parts
        self.steps_per_epoch = len(self.x) // self.size

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        ranks, rank = distributed.world_size(), distributed.rank()
        here = slice(step * self.size, (step + 1) * self.size)
        own = [t[here].chunk(ranks)[rank] for t in (self.x.roll(-epoch, 0), self.y.roll(-epoch, 0))]
        return own[0], own[1]


def share(model: nn.Module) -> None:
    """What the recipes tell a model with --sync-bn."""
    if distributed.world_size() > 1:
        reduction = distributed.Reduction()
        share_first_steps(model, reduction)
        share_ranges(model, reduction)
        share_statistics(model, reduction)
    for module in (m for m in model.modules() if hasattr(m, "shard")):
        module.shard = (distributed.rank(), distributed.world_size())


def state_of(model: nn.Module, **more: float) -> dict[str, Any]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {**{name: value.detach().double().clone() for name, value in named.items()}, **more}


def searched(setting: dict[str, Any], order: str, parts: int, steps: int) -> dict[str, Any]:
    """Weights, gammas, alphas, betas and statistics after some steps of both kinds."""
    torch.manual_seed(0)
    defaults = {"num_classes": CLASSES, "init_channels": 8, "layers": 3, "nodes": 2, "multiplier": 2, "partial": 2}
    again = setting.get("checkpoint_cells", False)
    setting = {name: value for name, value in setting.items() if name != "checkpoint_cells"}
    model = build_supernet(**(defaults | {"method": "pc-darts"} | setting)).double()
    model.checkpoint_cells = again
    share(model)
    settings = SearchSettings(epochs=1, arch_begin_epoch=0, order=order, learning_rate=0.05, arch_learning_rate=3e-3)
    loop = SearchLoop(
        model,
        train_stream=accumulated(Slices(1, parts), parts),
        valid_stream=accumulated(Slices(2, parts), parts),
        settings=settings,
        criterion=nn.CrossEntropyLoss(),
        weight_term=None,
        arch_term=None,
    )
    loop.model.train()
    loop.start_epoch()
    for _ in range(steps):
        loop.one_step()
    assert loop.guard.first_bad_step() is None
    return state_of(model, loss=float(loop.totals[0]), images=float(loop.totals[2]))


def trained(setting: dict[str, Any], parts: int) -> dict[str, Any]:
    """Weights and statistics after an epoch of a training with drop path and the auxiliary head."""
    torch.manual_seed(0)
    architecture = load_architecture("PC_DARTS").with_uniform_bits(*setting["bits"])
    more = {name: setting[name] for name in ("weight_quantizer", "activation_quantizer", "scheme") if name in setting}
    network = build_network(
        architecture, stem="cifar", in_channels=3, num_classes=CLASSES, init_channels=4, layers=3, **more
    ).double()
    share(network)
    torch.manual_seed(1)
    settings = TrainSettings(epochs=2, drop_path_prob=0.4 if parts == 1 else 0.0, learning_rate=0.05)
    outcome = train(
        network,
        stream=accumulated(Slices(3, parts), parts),
        settings=settings,
        criterion=nn.CrossEntropyLoss(),
        num_classes=CLASSES,
    )
    return state_of(network, loss=outcome.row["train_loss"], top1=outcome.row["train_top1"])


def assert_equal(whole: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    for name, value in whole.items():
        for part in parts:
            found, wanted = (torch.as_tensor(v, dtype=torch.float64) for v in (part[name], value))
            assert (found - wanted).abs().max() <= BOUND * wanted.abs().max().clamp_min(1.0), name
        first, *others = (torch.as_tensor(part[name]) for part in parts)
        assert all(torch.equal(first, other) for other in others), f"{name}: the ranks have parted"


MIXED, FLOAT = {"bits": (2, 4, 8)}, {"bits": None, "method": "darts"}
REFERENCE = {"bits": (2, 8), "scheme": "reference"}
QUICK = [(MIXED, "exact", 2, 1, 2)]
THOROUGH = [
    *((setting, order, ranks, 1, 4) for setting in (MIXED, FLOAT) for order in ("first", "exact") for ranks in (2, 4)),
    *((FLOAT, "finite-difference", ranks, 1, 3) for ranks in (2, 4)),
    *((setting, order, 2, 2, 3) for setting in (MIXED, FLOAT) for order in ("first", "exact", "finite-difference")),
    (REFERENCE, "first", 2, 1, 3),
    (MIXED | {"checkpoint_cells": True}, "first", 2, 1, 3),
]


@pytest.mark.parametrize(
    ("setting", "order", "ranks", "parts", "steps"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in THOROUGH)],
)
def test_a_search(setting: dict[str, Any], order: str, ranks: int, parts: int, steps: int) -> None:
    work = lambda: searched(setting, order, parts, steps)  # noqa: E731
    assert_equal(work(), on_ranks(ranks, work))


LSQ = {"bits": (32, 4), "weight_quantizer": "lsq", "activation_quantizer": "lsq"}


@pytest.mark.parametrize(
    ("setting", "ranks", "parts"),
    [
        ({"bits": (32, 8)}, 2, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [({"bits": (32, 32)}, 4, 1), ({"bits": (32, 2)}, 2, 2), (LSQ, 2, 1), (LSQ, 4, 2)]
        ),
    ],
)
def test_a_training(setting: dict[str, Any], ranks: int, parts: int) -> None:
    work = lambda: trained(setting, parts)  # noqa: E731
    assert_equal(work(), on_ranks(ranks, work))
