# SPDX-License-Identifier: Apache-2.0
"""Kernels of our own, each beside its PyTorch twin: which one computes is decided per tensor."""

from common.quant.kernels.native import disabled, usable

__all__ = ["disabled", "usable"]
