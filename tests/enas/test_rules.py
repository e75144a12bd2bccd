# SPDX-License-Identifier: Apache-2.0
"""Losses, learning rates and the optimiser against the oracle's figures and their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.engine.guard import FiniteGuard
from enas.optimizer import HatAdam
from enas.rules import cosine_restarts, hinge, loss_of, staircase
from tests.helpers.enas_fill import source_hinge


def test_learning_rate(oracle: Any) -> None:
    truth = oracle("enas_qnn_quantizers")["cosine_lr_search(0.05,0.0005,T0=10,Tmul=2)"]
    for epoch, rate in truth.items():
        found = cosine_restarts(int(epoch), rate=0.05, least=0.0005, first=10, factor=2)
        assert found == pytest.approx(rate, abs=1e-8), epoch  # the oracle is float32 in places
    assert f"{cosine_restarts(181, rate=0.05, least=0.0005, first=10, factor=2):.4f}" == "0.0456"  # the published log
    restarts = [e for e in range(311) if cosine_restarts(e, rate=1.0, least=0.0, first=10, factor=2) == 1.0]
    assert restarts == [0, 10, 30, 70, 150, 310]
    assert [staircase(e, rate=0.1, factor=0.1, every=100) for e in (0, 99, 100)] == pytest.approx([0.1, 0.1, 0.01])


def test_hinge(oracle: Any) -> None:
    truth = oracle("enas_qnn_quantizers")["hinge"]
    logits, labels = torch.tensor(truth["logits"], dtype=torch.float64), torch.tensor(truth["labels"])
    assert loss_of("reference-hinge")(logits, labels).item() == pytest.approx(truth["reference_value(off-target -3)"])
    assert loss_of("hinge")(logits, labels).item() == pytest.approx(truth["intended_hinge(+-1)"])
    assert loss_of("squared-hinge")(logits, labels).item() == pytest.approx(truth["intended_squared_hinge"])
    x, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(hinge(x, y, wrong=-3.0), source_hinge(x, y))


def test_adam(oracle: Any) -> None:
    truth = oracle("enas_qnn_quantizers")["tf_adam_beta1_0_eps1e-3_lr.05_p0=1_grads[.1,-.2,.3,.05]"]
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = HatAdam([p], 0.05)
    for gradient, value in zip((0.1, -0.2, 0.3, 0.05), truth, strict=True):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        assert p.tolist() == pytest.approx([value] * 2, abs=1e-9)


def test_no_gradient_is_gradient_zero() -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(4)]
    sides = []
    for missing in (True, False):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = HatAdam(parameters, 0.05)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            for k, p in enumerate(parameters):
                gradient = torch.randn(p.shape, generator=generator)
                absent = (step + k) % 3 == 0
                p.grad = None if absent and missing else torch.zeros_like(p) if absent else gradient
            optimizer.step()
        sides.append(parameters)
    for a, b in zip(*sides, strict=True):
        assert torch.equal(a, b)


def test_a_masked_step_changes_nothing() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = HatAdam([p], 0.05)
    guard = FiniteGuard(torch.device("cpu"))
    guard.protect(list, optimizer)
    p.grad = torch.randn(5)
    optimizer.step()
    before = [p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())]
    p.grad = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0])
    guard.check(p.grad.norm())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [p.detach(), *optimizer.state[p].values()], strict=True))


def test_state_goes_through_a_checkpoint() -> None:
    torch.manual_seed(0)
    values, gradients = torch.randn(4), torch.randn(6, 4)
    whole, cut = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    one, other = HatAdam([whole], 0.05), HatAdam([cut], 0.05)
    for k, gradient in enumerate(gradients):
        if k == 3:
            state, cut = other.state_dict(), torch.nn.Parameter(cut.detach().clone())
            other = HatAdam([cut], 0.05)
            other.load_state_dict(state)
        for p, optimizer in ((whole, one), (cut, other)):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(whole, cut)
