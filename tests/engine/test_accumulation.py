# SPDX-License-Identifier: Apache-2.0
"""Steps of several batches: which ones, and the gradients of an architecture step over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.engine.accumulation import accumulated, add, batches_of, divide
from common.engine.bilevel import ORDERS, InnerGroup, architecture_gradients


class Numbered:
    """Batches that say where they come from."""

    def __init__(self, steps: int) -> None:
        self.steps_per_epoch = steps

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([epoch, step]), torch.tensor(0)


def addresses(stream: object, epoch: int, step: int) -> list[list[int]]:
    return [x.tolist() for x, _ in batches_of(stream, epoch, step)]


def test_a_step_is_the_next_batches_in_order() -> None:
    stream = accumulated(Numbered(7), 3)
    assert stream.steps_per_epoch == 2  # the seventh is left
    assert addresses(stream, 4, 1) == [[4, 3], [4, 4], [4, 5]]
    assert stream.batch(4, 1)[0].tolist() == [4, 3]
    plain = Numbered(7)
    assert accumulated(plain, 1) is plain and addresses(plain, 2, 5) == [[2, 5]]


def test_an_epoch_shorter_than_a_step_wraps_around() -> None:
    stream = accumulated(Numbered(2), 3)
    assert stream.steps_per_epoch == 1 and addresses(stream, 0, 0) == [[0, 0], [0, 1], [0, 0]]
    assert "wraps around" in stream.notes[-1]


def test_a_missing_gradient_counts_as_zero() -> None:
    one, two = torch.ones(2), torch.full((2,), 3.0)
    total = add(add(None, [one, None, None]), [two, two, None])
    found = divide(total, 2)
    assert found[0].tolist() == [2, 2] and found[1].tolist() == [1.5, 1.5] and found[2] is None


class Quadratic(nn.Module):
    """A loss of one weight and one architecture parameter, linear in the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.w * x + self.alpha.sin() - y) ** 2 * self.alpha.exp()).mean()


@pytest.mark.parametrize("order", ORDERS)
def test_two_halves_are_one_batch(order: str) -> None:
    """Nothing here looks at a batch as a whole, so its parts must give the same architecture gradient."""
    x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    found = []
    for train, valid in (((x, y), (y, x)), (halves, [(b, a) for a, b in halves])):
        model = Quadratic()
        inner = [InnerGroup([model.w], 0.1, 0.9, 3e-4, [torch.tensor(0.2, dtype=torch.float64)])]
        loss = architecture_gradients(
            arch=[model.alpha],
            train_objective=model,
            valid_objective=model,
            train_batch=train,
            valid_batch=valid,
            inner=inner,
            order=order,
            side_pass=lambda: torch.enable_grad(),
        )
        found.append((float(loss), float(model.alpha.grad)))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
