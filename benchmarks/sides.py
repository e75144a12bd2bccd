# SPDX-License-Identifier: Apache-2.0
"""The sides of a comparison of searches: the production loop, and plain loops over the tests' edge-by-edge network.

All of them take the same two batches and do the same two steps: Adam on alphas and betas, then SGD on weights and
gammas with the cost in the loss. The plain loop is ordinary PyTorch as the papers' codes are written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cost import ExpectedCost
from common.data import DatasetInfo, Split, Stream
from common.engine.search_loop import SearchLoop, SearchSettings
from common.nets import build_supernet
from common.recipes.search_setup import cost_term
from tests.helpers.plain_supernet import PlainSupernet

CLASSES = 10
WEIGHT_OF_COST, WEIGHT_OF_COST_UPPER = 1e-4, 1e-5  # the defaults of --complexity-decay, --arch-complexity-decay
EVALUATION = {"eval_init_channels": 36, "eval_layers": 20}


@dataclass(frozen=True)
class Setting:
    """What is searched: `bits` None is full precision; `image_size` in pixels; `order` of the architecture step.

    `precision` ("fp32" or "bf16") is the production side's; the plain sides stay in float32.
    """

    method: str = "pc-darts"
    bits: tuple[int, ...] | None = (2, 4)
    batch_size: int = 64
    init_channels: int = 16
    layers: int = 8
    image_size: int = 32
    order: str = "first"
    device: str = "cpu"
    precision: str = "fp32"

    def batches(self, seed: int = 0, batch_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Two batches of random images and labels, of training and of validation."""
        source, count = torch.Generator().manual_seed(seed), batch_size or self.batch_size
        size = (count, 3, self.image_size, self.image_size)
        draw = lambda: torch.randint(CLASSES, (count,), generator=source)  # noqa: E731
        return [(torch.randn(size, generator=source).to(self.device), draw().to(self.device)) for _ in range(2)]

    def network(self) -> dict[str, Any]:
        """What both kinds of supernet are built from."""
        sizes = {"init_channels": self.init_channels, "layers": self.layers, "num_classes": CLASSES}
        return {"method": self.method, "bits": self.bits, **sizes}


class OneBatch:
    """A stream of one batch, again and again."""

    steps_per_epoch = 1_000_000

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.always = batch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch."""
        return self.always


class FusedSide:
    """The production supernet in the production loop, with the cost terms that `search.py` adds by default."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.model = build_supernet(**setting.network())
        cost = ExpectedCost(self.model, input_size=setting.image_size, **EVALUATION).to(setting.device)
        self.model.to(setting.device)
        train, valid = (OneBatch(batch) for batch in setting.batches())
        self.train, self.valid = train, valid
        self.loop = SearchLoop(
            self.model,
            train_stream=train,
            valid_stream=valid,
            settings=SearchSettings(epochs=1, arch_begin_epoch=0, order=setting.order, precision=setting.precision),
            criterion=nn.CrossEntropyLoss(),
            weight_term=cost_term(cost, WEIGHT_OF_COST if setting.bits else 0.0, None),
            arch_term=cost_term(cost, WEIGHT_OF_COST_UPPER, None),
        )
        self.loop.start_epoch()
        self.model.train()

    def take(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Train on these batches from now on."""
        self.train.always, self.valid.always = batches

    def architecture_step(self) -> None:
        """Alphas and betas."""
        self.loop.architecture_step(self.train.always)

    def weight_step(self) -> None:
        """Weights and gammas, and what ends a step."""
        self.loop.weight_step(self.train.always)
        self.loop.guard.end_of_step()
        self.loop.step += 1


class PlainSide:
    """The edge-by-edge network under ordinary optimisers: both steps differentiate everything, as backward() does.

    `tuned` takes the fused optimisers: Adam in torch's default form reads its step counts back.
    """

    def __init__(self, setting: Setting, tuned: bool) -> None:
        torch.manual_seed(0)
        self.model = PlainSupernet(**setting.network(), tuned=tuned).to(setting.device)
        weights, gammas = self.model.weight_parameters(), self.model.gamma_parameters()
        self.weights = weights
        defaults = SearchSettings(epochs=1)
        fused = {"fused": tuned}
        own = {"momentum": defaults.momentum, "weight_decay": defaults.weight_decay, **fused}
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(weights, lr=defaults.learning_rate, **own)]
        if gammas:
            own = {"momentum": defaults.gamma_momentum, "weight_decay": defaults.gamma_weight_decay, **fused}
            self.optimizers.append(torch.optim.SGD(gammas, lr=defaults.gamma_learning_rate, **own))
        rates = {"lr": defaults.arch_learning_rate, "weight_decay": defaults.arch_weight_decay, **fused}
        self.adam = torch.optim.Adam(self.model.arch_parameters(), betas=defaults.arch_betas, **rates)
        self.clip = defaults.grad_clip
        self.model.train()
        self.take(setting.batches())

    def take(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Train on these batches from now on."""
        self.train, self.valid = batches

    def architecture_step(self) -> None:
        """Alphas and betas; the gradients of the rest are computed and dropped."""
        self.adam.zero_grad()
        x, y = self.valid
        F.cross_entropy(self.model(x), y).backward()
        self.adam.step()

    def weight_step(self) -> None:
        """Weights and gammas on one backward pass, the weights' gradients clipped."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = self.train
        loss = F.cross_entropy(self.model(x), y)
        if self.model.bits is not None:
            loss = loss + WEIGHT_OF_COST * self.model.complexity()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()


Side = FusedSide | PlainSide
SIDES = ("fused", "plain", "plain-tuned")


def build_side(name: str, setting: Setting) -> Side:
    """A side by its name."""
    return FusedSide(setting) if name == "fused" else PlainSide(setting, tuned=name == "plain-tuned")


def augmented_stream(setting: Setting, images: int) -> Stream:
    """The production stream over random resident images, cropped and mirrored as CIFAR-10 is."""
    size = setting.image_size
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
    split = Split(pixels, torch.randint(CLASSES, (images,)))
    spread = (0.5,) * 3
    info = DatasetInfo("random", CLASSES, 3, size, tuple(map(str, range(CLASSES))), spread, spread, flip=True, pad=4)
    return Stream(split, info, batch_size=setting.batch_size, seed=0, name="search-train", augment=True)
