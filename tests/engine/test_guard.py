# SPDX-License-Identifier: Apache-2.0
"""A step with a NaN changes nothing, bit for bit: parameters, momentum, moments, counters, buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.engine.guard import FiniteGuard, prepare_adam, prepare_sgd


def everything(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in tensors for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in (*tensors, *states)]


def build(kind: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
    if kind == "adam":
        return net, prepare_adam(torch.optim.Adam(net.parameters(), 0.1, betas=(0.5, 0.999), fused=True))
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=3e-4, fused=True)
    return net, prepare_sgd(sgd)


def one_step(net: Any, optimizer: torch.optim.Optimizer, guard: FiniteGuard, poison: float = 0.0) -> None:
    optimizer.zero_grad()
    loss = net(torch.randn(8, 4) + poison).square().mean()
    loss.backward()
    guard.check(loss.detach(), torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))
    optimizer.step()
    guard.end_of_step()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("good", [0, 3])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_state_before_the_first_bad_step_stays(kind: str, good: int, poison: float) -> None:
    net, optimizer = build(kind)
    guard = FiniteGuard(torch.device("cpu"))
    guard.protect(lambda: list(net.buffers()), optimizer)
    for _ in range(good):
        one_step(net, optimizer, guard)
    assert guard.first_bad_step() is None
    before, buffers = everything(optimizer), [buffer.clone() for buffer in net.buffers()]
    one_step(net, optimizer, guard, poison)
    one_step(net, optimizer, guard)  # later steps are masked too
    assert guard.first_bad_step() == good
    guard.restore()
    for old, new in zip((*before, *buffers), (*everything(optimizer), *net.buffers()), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_good_steps_are_the_optimisers_own(kind: str) -> None:
    net, optimizer = build(kind)
    guard = FiniteGuard(torch.device("cpu"))
    guard.protect(lambda: list(net.buffers()), optimizer)
    twin, _ = build(kind)
    plain: torch.optim.Optimizer
    if kind == "adam":
        plain = torch.optim.Adam(twin.parameters(), 0.1, betas=(0.5, 0.999), foreach=False)
    else:
        plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=3e-4, foreach=False)
    free = FiniteGuard(torch.device("cpu"))
    for model, one, watch in ((net, optimizer, guard), (twin, plain, free)):
        torch.manual_seed(1)
        for _ in range(4):
            one_step(model, one, watch)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
