# SPDX-License-Identifier: Apache-2.0
"""Kernels of our own, each beside its PyTorch twin: which one computes is decided per tensor."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

import torch

from common.quant.kernels import native
from common.quant.kernels.native import disabled, usable

__all__ = ["disabled", "triton_kernels", "usable"]


def triton_kernels() -> ModuleType | None:
    """The Triton kernels, for tensors on a GPU; None while disabled, or where they do not run (said once).

    The first call imports Triton and tries it on the card, so it must not be inside the capture of a CUDA graph.
    """
    return _triton() if native.enabled() else None


@cache
def _triton() -> ModuleType | None:
    try:
        from common.quant.kernels import triton

        if torch.cuda.is_available():
            triton.probe()
    except Exception as error:  # Triton's own kinds, its compilers', the driver's: all of them mean the twin
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"Triton kernels: not available, computing without them (slower): {reason}", file=sys.stderr)
        return None
    return triton
