# SPDX-License-Identifier: Apache-2.0
"""The tests' own edge-by-edge supernet against the oracles: it must be right before anything is compared with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.fill import fill, fill_logits, oracle_batch
from tests.helpers.plain_supernet import (
    REFERENCE_SLOTS,
    PlainSupernet,
    fill_reference_gammas,
    reference_gamma_name,
)

TRAIN_LABELS = torch.tensor([3, 7, 1, 9])
VALID_LABELS = torch.tensor([0, 2, 4, 6])


def close(actual: torch.Tensor, expected: Any, atol: float = 1e-8) -> None:
    """Assert equality with an oracle's list."""
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize("method, stem", [("darts", "super_darts_forward"), ("pc-darts", "super_pcdarts_forward")])
def test_full_precision_equals_oracle(oracle: Any, method: str, stem: str) -> None:
    truth = oracle(stem)["results"]
    net = fill_logits(fill(PlainSupernet(method=method)))
    assert sum(p.numel() for p in net.weight_parameters()) == truth["params"]
    logits = net(oracle_batch())
    close(logits, truth["train_logits"])
    loss = F.cross_entropy(logits, TRAIN_LABELS)
    assert loss.item() == pytest.approx(truth["loss"], abs=1e-8)
    loss.backward()
    for parameter, gradient in zip(net.arch_parameters(), truth["arch_grads"], strict=True):
        close(parameter.grad, gradient)


@pytest.mark.parametrize("tuned", [False, True])
def test_quantised_equals_oracle(oracle: Any, tuned: bool) -> None:
    truth = oracle("qdarts")["forward"]["results"]["allow8bit_False"]
    net = PlainSupernet(method="pc-darts", bits=(2, 4), scheme="reference", tuned=tuned)
    net = fill_reference_gammas(fill_logits(fill(net)))
    logits = net(oracle_batch())
    close(logits, truth["train_logits"])
    loss, complexity = F.cross_entropy(logits, TRAIN_LABELS), net.complexity()
    assert loss.item() == pytest.approx(truth["ce"], abs=1e-8)
    assert complexity.item() == pytest.approx(truth["complexity_loss"], rel=1e-7)  # the reference sums it in float32
    (loss + 1e-4 * complexity).backward()
    for key, gamma in net.gammas.items():
        assert gamma.grad.abs().sum().item() == pytest.approx(
            truth["gamma_grads_sumabs"][reference_gamma_name(key)], abs=1e-8
        )
    slots = net.gammas["reduce_activation"].grad.abs().sum((0, 1, 3))
    close(slots, [truth["gamma_activ_cellr_slot_grad_sumabs_per_op_slot"][s] for s in REFERENCE_SLOTS["reduce"]])
