# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation by the statistics of all ranks' batches (`--sync-bn`), on any device and twice differentiable.

torch's SyncBatchNorm refuses CPU tensors and is differentiated once. Here the first and second moments are averaged
over the ranks by a differentiable reduction, so that gradients of every order are those of one process with the whole
batch. Moments travel in float64: the variance is their difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.quant import Reduction

_DIMS = (0, 2, 3)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training batch is that of all ranks; in evaluation it is the plain one.

    Made of a plain one, whose parameters and buffers it takes over.
    """

    def __init__(self, plain: nn.BatchNorm2d, reduction: Reduction) -> None:
        nn.Module.__init__(self)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
            setattr(self, name, getattr(plain, name))
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(plain, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(plain, name))
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same, normalised."""
        if not self.training:
            return super().forward(x)
        low = x.dtype in (torch.bfloat16, torch.float16)
        mean, var = self._statistics(x.float() if low else x)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        as_image = lambda t: t.to(x.dtype).view(1, -1, 1, 1)  # noqa: E731
        return torch.addcmul(as_image(shift), x, as_image(scale))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] over all ranks' pixels; the running ones follow.

        Nothing here reads the running ones: a cell that is computed again must give the same bits.
        """
        var, mean = torch.var_mean(x, _DIMS, correction=0)
        first = mean.double()
        wide_mean, second = self.reduction.mean(torch.stack([first, var.double() + first.square()])).unbind()
        wide_var = (second - wide_mean.square()).clamp_min(0)
        if self.track_running_stats and self.running_mean is not None:
            self._follow(wide_mean.detach(), wide_var.detach(), x.numel() // x.shape[1] * self.reduction.ranks)
        return wide_mean.to(mean.dtype), wide_var.to(var.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.double()
        for running, value in ((self.running_mean, mean), (self.running_var, var * (count / max(count - 1, 1)))):
            running.copy_(running + share * (value - running))


def share_statistics(module: nn.Module, reduction: Reduction) -> None:
    """Replace every `nn.BatchNorm2d` within `module` by one over all ranks; parameters, buffers and names stay."""
    made: dict[int, SharedBatchNorm2d] = {}  # one that stands in two places stays one
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                own = made.setdefault(id(child), None) or SharedBatchNorm2d(child, reduction)
                made[id(child)] = own
                setattr(parent, name, own)


def reduction_of(norm: nn.Module) -> Reduction | None:
    """The reduction that a normalisation's statistics go through; None: they are this rank's."""
    return getattr(norm, "reduction", None)
