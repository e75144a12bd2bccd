# SPDX-License-Identifier: Apache-2.0
"""An inner step at learning rate zero goes nowhere: the second order is then the first, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.engine.search_loop import SearchLoop, SearchSettings
from common.nets import build_supernet


class Stream:
    """Batches that depend on their position only."""

    steps_per_epoch = 3

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.seed + 10 * epoch + step)
        y = torch.randint(0, 3, (4,), generator=generator)
        return torch.randn(4, 1, 8, 8, generator=generator), y


def alphas_after(method: str, order: str, learning_rate: float) -> list[Tensor]:
    """Alphas (and betas) after two steps of a search on a tiny supernet."""
    torch.manual_seed(1)
    sizes = {"in_channels": 1, "num_classes": 3, "init_channels": 8, "layers": 3, "nodes": 2, "multiplier": 2}
    model = build_supernet(method=method, bits=None, **sizes)
    with torch.no_grad():
        for p in model.arch_parameters():
            p.copy_(torch.randn_like(p))
    settings = SearchSettings(epochs=1, learning_rate=learning_rate, arch_begin_epoch=0, order=order)
    loop = SearchLoop(
        model, train_stream=Stream(1), valid_stream=Stream(2), settings=settings, criterion=nn.CrossEntropyLoss()
    )
    model.train()
    loop.start_epoch()
    for _ in range(2):
        loop.one_step()
    return [p.detach().clone() for p in model.arch_parameters()]


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
@pytest.mark.parametrize("order", ["finite-difference", "exact"])
def test_unrolled_equals_first_order_at_learning_rate_zero(method: str, order: str) -> None:
    for first, second in zip(alphas_after(method, "first", 0.0), alphas_after(method, order, 0.0), strict=True):
        assert torch.equal(first, second)


def test_with_a_learning_rate_they_differ() -> None:
    pairs = zip(alphas_after("darts", "first", 0.1), alphas_after("darts", "exact", 0.1), strict=True)
    assert any(not torch.equal(first, second) for first, second in pairs)
