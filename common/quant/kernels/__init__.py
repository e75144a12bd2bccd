# SPDX-License-Identifier: Apache-2.0
"""Kernels of our own, each beside its PyTorch twin: which one computes is decided per tensor."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from common.quant.kernels import native
from common.quant.kernels.native import disabled, usable

__all__ = ["disabled", "triton_kernels", "usable"]


def triton_kernels() -> ModuleType | None:
    """The Triton kernels, for tensors on a GPU; None without Triton or while disabled. The first call imports it."""
    return _triton() if native._enabled else None


@cache
def _triton() -> ModuleType | None:
    try:
        from common.quant.kernels import triton
    except ImportError:
        return None
    return triton
