# SPDX-License-Identifier: Apache-2.0
"""The dominant eigenvalue on two ranks is that of the whole batch, and both take as many turns to find it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.engine import distributed
from common.engine.search_loop import Objective
from common.nets import build_supernet, share_statistics
from darts.collapse import dominant_eigenvalue
from tests.helpers.ranks import on_ranks


def work() -> float:
    torch.manual_seed(0)
    net = build_supernet(num_classes=4, init_channels=4, layers=3, nodes=1, multiplier=1).double()
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    ranks, rank = distributed.world_size(), distributed.rank()
    if ranks > 1:
        share_statistics(net, distributed.Reduction())
    batch = (x.chunk(ranks)[rank], y.chunk(ranks)[rank])
    objective = Objective(net, nn.CrossEntropyLoss(), None, "fp32")
    return dominant_eigenvalue(objective, [net.alphas_normal, net.alphas_reduce], batch, side_pass=net.side_pass)


@pytest.mark.slow
def test_the_eigenvalue_of_the_whole_batch() -> None:
    assert on_ranks(2, work) == pytest.approx([work()] * 2, rel=1e-8)
