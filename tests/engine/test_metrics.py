# SPDX-License-Identifier: Apache-2.0
"""Meter and entropy against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from common.engine.metrics import ClassificationMeter, entropy


@pytest.mark.parametrize("classes", [3, 10])
def test_meter_equals_counting_by_hand(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, classes, generator=generator)
    targets = torch.randint(classes, (37,), generator=generator)
    meter = ClassificationMeter(classes, "cpu")
    for part in (slice(0, 20), slice(20, 37)):
        loss = F.cross_entropy(logits[part], targets[part], reduction="sum")
        meter.update(logits[part], targets[part], loss)
    ranked = [sorted(range(classes), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    right = [order[0] == target for order, target in zip(ranked, targets.tolist(), strict=True)]
    in_top = [target in order[:5] for order, target in zip(ranked, targets.tolist(), strict=True)]
    found = meter.result()
    assert found["n"] == 37 and found["correct"] == sum(right)
    assert found["top1"] == sum(right) / 37 and found["top5"] == sum(in_top) / 37
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)
    for c, (n, correct) in enumerate(found["per_class"]):
        mine = [hit for hit, target in zip(right, targets.tolist(), strict=True) if target == c]
        assert (n, correct) == (len(mine), sum(mine))


def test_meter_state_and_reset() -> None:
    meter, other = ClassificationMeter(4, "cpu"), ClassificationMeter(4, "cpu")
    meter.update(torch.eye(4), torch.arange(4), 2.0)
    other.load_state_dict({name: tensor.clone() for name, tensor in meter.state_dict().items()})
    assert other.result() == meter.result() and meter.result()["top1"] == 1.0
    meter.reset()
    assert math.isnan(meter.result()["loss"]) and meter.result()["n"] == 0
    assert other.result()["n"] == 4


def test_entropy() -> None:
    assert entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8))
    certain = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    assert entropy(certain).item() == pytest.approx(math.log(2) / 2)
