# SPDX-License-Identifier: Apache-2.0
"""The collectives on two gloo ranks, against sums written out; how many messages they are."""

from __future__ import annotations

from typing import Any

import torch

from common.engine import distributed
from common.quant import LsqQuantizer, RunningMaximum, share_first_steps, share_ranges
from tests.helpers.ranks import on_ranks


def work() -> dict[str, Any]:
    rank, reduction = distributed.rank(), distributed.Reduction()
    found: dict[str, Any] = {"ranks": reduction.ranks}
    means = [torch.full((2,), float(rank)), torch.tensor(rank + 1.0, dtype=torch.float64)]
    sums = [torch.tensor([1.0, rank]), torch.tensor([rank, 5])]
    with distributed.counted() as traffic:
        distributed.average_(means, sums=sums)
    found |= {"means": means, "sums": sums, "traffic": [traffic.messages, traffic.bytes]}

    # loss of rank r: (r + 1) m^2, m the mean over the ranks of x = 3 + r; and its gradient's square, differentiated
    x = torch.tensor(3.0 + rank, dtype=torch.float64, requires_grad=True)
    m = reduction.mean(x)
    (first,) = torch.autograd.grad((rank + 1) * m**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first**2, x)
    found |= {"m": m.detach(), "first": first.detach(), "second": second, "most": reduction.maximum(x)}

    kept, step = RunningMaximum(), LsqQuantizer(4)
    share_ranges(kept, reduction)
    share_first_steps(step, reduction)
    kept(torch.tensor([rank + 1.0]))
    with distributed.counted() as traffic:
        kept.frozen = True
        kept(torch.tensor([10.0 + rank]))  # an architecture step: the range stands, nobody is asked
    found |= {"range": kept.maximum.clone(), "asked": traffic.messages}
    step(torch.full((1, 4), rank + 1.0))
    return found | {"step": step.step.detach().clone()}


def test_two_ranks() -> None:
    one, two = on_ranks(2, work)
    assert one["ranks"] == 2
    for found in (one, two):
        assert found["means"][0].tolist() == [0.5, 0.5] and found["means"][1] == 1.5
        assert found["sums"][0].tolist() == [2.0, 1.0] and found["sums"][1].tolist() == [1, 10]
        assert found["traffic"] == [3, 4 * 4 + 8 + 2 * 8]  # a message for each type
        assert found["m"] == 3.5 and found["most"] == 4.0
        # d/dx_r of m^2 + 2 m^2 is 3 m; each rank's square of it gives 2 * 3 m * 3 / 2, and two ranks have one
        assert found["first"] == 3 * 3.5 and found["second"] == 2 * (2 * 10.5 * 1.5)
        assert found["range"] == 2.0 and found["asked"] == 0
        torch.testing.assert_close(found["step"], torch.tensor(2 * 1.5 / 15**0.5))


def test_on_one_process_nothing_is_sent() -> None:
    x = torch.ones(3)
    with distributed.counted() as traffic:
        distributed.average_([x], sums=[x])
        assert distributed.Reduction().mean(x) is x and distributed.Reduction().maximum(x) is x
        assert distributed.sum_(x) is x
    assert (traffic.messages, traffic.bytes) == (0, 0)
