# SPDX-License-Identifier: Apache-2.0
"""A data set of no real images, the same on every machine: ten patterns of stripes under noise (`--data-module`)."""

from __future__ import annotations

import torch
from torch import Tensor


def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """640 training and 160 test images of 1x8x8, uint8, and their labels."""
    source = torch.Generator().manual_seed(2026)
    labels = torch.arange(800) % 10
    rows, columns = torch.arange(8).view(8, 1), torch.arange(8).view(1, 8)
    patterns = torch.stack([((rows * (k % 4) + columns * (k // 2 + 1)) % (2 + k // 3) == 0) * 160 for k in range(10)])
    noise = torch.randint(0, 96, (800, 8, 8), generator=source)
    images = (patterns[labels] + noise).to(torch.uint8)[:, None]
    return images[:640], labels[:640], images[640:], labels[640:]
