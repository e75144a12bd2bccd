# SPDX-License-Identifier: Apache-2.0
"""Figures kept on the device: a step adds to them without the host waiting, a log point reads them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.engine import distributed


class ClassificationMeter:
    """Mean loss, top-1, top-5 (of min(5, classes)) and per-class counts of all samples since the last reset.

    Counts are integers and the loss is summed in float64, so that the figures do not depend on the batch size.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.num_classes = num_classes
        self._top = min(5, num_classes)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._count = torch.zeros(num_classes, dtype=torch.int64, device=device)  # samples of each class
        self._correct = torch.zeros(num_classes, dtype=torch.int64, device=device)  # of these, top-1 right
        self._correct_top = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, loss_sum: Tensor | float) -> None:
        """Add a batch: logits [B, classes], targets [B] int64, and the SUM of its samples' losses. No sync."""
        self.add(self.measure(logits, targets, loss_sum))

    @torch.no_grad()
    def measure(self, logits: Tensor, targets: Tensor, loss_sum: Tensor | float) -> Tensor:
        """What `add` takes of a batch, in the logits' type: such tensors may be added up, over ranks too.

        Whole numbers in it are exact up to 2^24 (float32).
        """
        best = logits.topk(self._top, dim=1).indices
        hits = (best == targets[:, None]).to(logits.dtype)
        found = logits.new_zeros(2 + 2 * self.num_classes)
        found[0], found[1] = loss_sum, hits.sum()
        found[2 : 2 + self.num_classes].index_add_(0, targets, torch.ones_like(hits[:, 0]))
        found[2 + self.num_classes :].index_add_(0, targets, hits[:, 0])
        return found

    @torch.no_grad()
    def add(self, measured: Tensor) -> None:
        """Add what `measure` gave."""
        self._loss += measured[0]
        self._correct_top += measured[1].long()
        self._count += measured[2 : 2 + self.num_classes].long()
        self._correct += measured[2 + self.num_classes :].long()

    def reset(self) -> None:
        """Forget all samples."""
        for tensor in self.state_dict().values():
            tensor.zero_()

    def sum_over_ranks_(self) -> None:
        """Add up what the ranks saw, where each saw a part of the data. Once, before `result`."""
        distributed.average_([], sums=list(self.state_dict().values()))

    def result(self) -> dict[str, Any]:
        """loss (mean), top1, top5 (fractions 0..1), n, correct, per_class [(n, correct), ...]. Waits for the device.

        Without samples loss, top1 and top5 are NaN.
        """
        head = torch.stack([self._loss, self._correct_top.double()])
        # One transfer; counts below 2**53 are exact in float64.
        figures = torch.cat([head, self._count.double(), self._correct.double()]).tolist()
        loss, top = figures[0], int(figures[1])
        counts = [int(figure) for figure in figures[2 : 2 + self.num_classes]]
        corrects = [int(figure) for figure in figures[2 + self.num_classes :]]
        n, correct = sum(counts), sum(corrects)
        share = float("nan") if n == 0 else 1.0 / n
        return {
            "loss": loss * share,
            "top1": correct / n if n else share,
            "top5": top / n if n else share,
            "n": n,
            "correct": correct,
            "per_class": list(zip(counts, corrects, strict=True)),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint in the middle of an epoch."""
        return {
            "loss": self._loss,
            "count": self._count,
            "correct": self._correct,
            "correct_top": self._correct_top,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the sums of `state_dict`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of softmax over the last dimension; logits [..., options], -inf allowed. Scalar tensor."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean()
