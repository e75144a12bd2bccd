# SPDX-License-Identifier: Apache-2.0
"""Cells that are computed again in the backward pass, for networks that do not fit otherwise (--checkpoint-cells).

Of a cell only its inputs are kept. The second computation is the first one over again: the same random numbers, the
running ranges as the first one left them, and no second note of the batch in any running statistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.quant import frozen_ranges


def recomputed(cell: nn.Module, *inputs: Any, random: bool = False) -> Tensor:
    """`cell(*inputs)`, computed again when a gradient asks for what is within. `random`: it draws random numbers.

    Its parameters must be in backward what they were in forward: not so within `functional_call`.
    """
    if not torch.is_grad_enabled():
        return cell(*inputs)
    return checkpoint(
        cell,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: (nullcontext(), _without_traces(cell)),
    )


@contextmanager
def _without_traces(module: nn.Module) -> Iterator[None]:
    """Within it forwards may write to the module's buffers; afterwards these hold what they held before."""
    buffers = [buffer.detach() for buffer in module.buffers()]
    copies = [buffer.clone() for buffer in buffers]
    try:
        with frozen_ranges(module):
            yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
