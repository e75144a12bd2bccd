# SPDX-License-Identifier: Apache-2.0
"""The FILL formulas of tests/oracles/README.md: every tensor from its own shape and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def waves(shape: Iterable[int], kind: str = "sin", dtype: torch.dtype = torch.float64) -> Tensor:
    """sin(i*i) or cos(i*i) for i = 0, 1, ... in C order, in the given shape."""
    shape = tuple(shape)
    index = torch.arange(int(torch.tensor(shape).prod()) if shape else 1, dtype=torch.float64)
    values = torch.sin(index * index) if kind == "sin" else torch.cos(index * index)
    return values.reshape(shape).to(dtype)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Fill every convolution, linear layer and affine batch norm of `model` in place; returns it in float64."""
    model.double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(0.1 * waves(module.weight.shape))
            if module.bias is not None:
                module.bias.copy_(0.1 * waves(module.bias.shape))
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.copy_(1 + 0.1 * waves(module.weight.shape))
            module.bias.copy_(0.1 * waves(module.bias.shape))
    return model


@torch.no_grad()
def fill_logits(model: nn.Module) -> nn.Module:
    """Fill alphas (and betas where there are any) as super_*_forward.json: normal by the sine, reduce by the cosine."""
    for name in ("alphas", "betas"):
        for cell_type, kind in (("normal", "sin"), ("reduce", "cos")):
            logits = getattr(model, f"{name}_{cell_type}", None)
            if logits is not None:
                logits.copy_(waves(logits.shape, kind))
    return model


def oracle_batch(kind: str = "cos", batch: int = 4, size: int = 16, channels: int = 3) -> Tensor:
    """The input of the oracles: cos(i*i) (training) or sin(i*i) (validation), NCHW in float64."""
    return waves((batch, channels, size, size), kind)
