# SPDX-License-Identifier: Apache-2.0
"""Augmentation and normalisation of whole batches, on whatever device the batch is; no draw happens here.

Each function takes the random numbers it needs as tensors of one entry per image, so that what a batch becomes is
decided by its caller and can be checked image by image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor | None) -> Tensor:
    """Pad by `pad` black pixels, crop back at (top, left), mirror where `flip`: [B, C, H, W] to the same, any dtype.

    top, left: int64 [B] in 0..2 x pad, the crop's corner in the padded image; flip: bool [B] or None. Equal to
    torchvision's RandomCrop(H, padding=pad) followed by RandomHorizontalFlip for the same numbers.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    # Whole rows are picked first (one copy per row); a single gather along the columns then crops and mirrors.
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * (height + 2 * pad)
    rows = planes + (top.view(batch, 1, 1) + torch.arange(height, device=images.device))
    picked = padded.view(-1, width + 2 * pad).index_select(0, rows.view(-1))
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flip is not None:
        columns = torch.where(flip.view(batch, 1), width - 1 - columns, columns)
    columns = (columns + left.view(batch, 1)).view(batch, 1, 1, width).expand(batch, channels, height, width)
    return picked.view(batch, channels, height, -1).gather(3, columns)


def cutout_(images: Tensor, length: int, centre_y: Tensor, centre_x: Tensor) -> Tensor:
    """Zero a square of side `length` around (centre_y, centre_x) of each image [B, C, H, W], in place.

    Centres (int64 [B]) lie anywhere in the image and the square is clipped at its borders. Applied after
    normalisation, as DARTS does, so that the hole has the colour of the mean (arXiv 1708.04552).
    """
    height, width = images.shape[-2:]
    offset_y = torch.arange(height, device=images.device) - (centre_y.view(-1, 1) - length // 2)
    offset_x = torch.arange(width, device=images.device) - (centre_x.view(-1, 1) - length // 2)
    hole_y = (offset_y >= 0) & (offset_y < length)
    hole_x = (offset_x >= 0) & (offset_x < length)
    return images.masked_fill_((hole_y[:, :, None] & hole_x[:, None, :])[:, None], 0.0)


class Normalizer:
    """uint8 [B, C, H, W] to float32 (x / 255 - mean) / std, as one multiplication and one addition."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str) -> None:
        """mean, std: per channel, of pixel values in 0..1; device: where the batches are."""
        shape = (1, len(mean), 1, 1)
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self._scale = torch.tensor(scale, device=device).view(shape)
        self._shift = torch.tensor(shift, device=device).view(shape)

    def __call__(self, images: Tensor) -> Tensor:
        """The normalised batch, float32, contiguous."""
        return images.float().mul_(self._scale).add_(self._shift)
