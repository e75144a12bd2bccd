# SPDX-License-Identifier: Apache-2.0
"""What a backward pass has to be given: the bytes that autograd holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedBytes:
    """Bytes of the storages that autograd holds for the backward pass, each counted once; `peak` is the most at a time.

    Parameters and buffers of `module` do not count: they are there anyway.
    """

    def __init__(self, module: nn.Module) -> None:
        self._ignored = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self._holders: Counter[int] = Counter()
        self.live = self.peak = 0

    @contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Within it, every tensor that an operation saves is seen."""
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(self, t), lambda saved: saved.tensor):
            yield self

    def change(self, tensor: Tensor, by: int) -> None:
        """One holder more, or fewer, of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._ignored:
            return
        self._holders[key] += by
        if self._holders[key] == (1 if by > 0 else 0):
            self.live += by * storage.nbytes()
            self.peak = max(self.peak, self.live)


class _Saved:
    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        self.owner, self.tensor = owner, tensor.detach()  # the output itself would keep its own graph alive
        owner.change(self.tensor, 1)

    def __del__(self) -> None:
        self.owner.change(self.tensor, -1)
