# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over ranks against torch's on the whole batch: values, gradients of both orders, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.engine import distributed
from common.nets import SharedBatchNorm2d, share_statistics
from tests.helpers.ranks import on_ranks


def batch() -> Tensor:
    """A channel far from zero: its variance must not drown in its mean."""
    x = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x + torch.tensor([0.0, -2.0, 30.0]).view(1, 3, 1, 1)


def build(**setting: Any) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3, **setting)).double()
    if model[0].weight is not None:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
            model[0].bias.copy_(torch.tensor([0.1, 0.0, 3.0]))
    return model


def measure(setting: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradients of both orders and statistics of the whole batch, as the ranks together find them."""
    model, ranks = build(**setting), distributed.world_size()
    if ranks > 1:
        share_statistics(model, distributed.Reduction())
        assert type(model[0]) is SharedBatchNorm2d
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    parameters = [scale, *model.parameters()]
    x = batch().chunk(ranks)[distributed.rank()]
    out = model((x * scale).sin())
    first = list(torch.autograd.grad(out.exp().mean(), parameters, create_graph=True))
    # as in a second-order step: vectors that all ranks know, times the ranks' own gradients
    second = list(torch.autograd.grad(first, parameters, [torch.full_like(g, 0.3).detach() for g in first]))
    first = [g.detach().clone() for g in first]
    distributed.average_([*first, *second])
    model.eval()
    found = {"out": out.detach(), "evaluated": model(x).detach()}
    found |= {f"gradient {k}": g for k, g in enumerate(first)} | {f"second {k}": g for k, g in enumerate(second)}
    return found | {name: value.double() for name, value in model.named_buffers()}


SETTINGS = {
    "affine": {},
    "plain": {"affine": False},
    "mean of all": {"momentum": None},
    "no memory": {"track_running_stats": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_are_one_batch(name: str) -> None:
    setting = SETTINGS[name]
    whole, parts = measure(setting), on_ranks(2, lambda: measure(setting))
    if name == "no memory":  # its evaluation takes each batch for itself, so a rank's own is not the whole
        for one in (whole, *parts):
            del one["evaluated"]
    for key, value in whole.items():
        if key in ("out", "evaluated"):
            found = torch.cat([part[key] for part in parts])
        else:
            found = parts[0][key]
            assert torch.equal(found, parts[1][key]), key
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-11, msg=key)
