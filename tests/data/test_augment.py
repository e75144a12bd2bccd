# SPDX-License-Identifier: Apache-2.0
"""Augmentation of whole batches against one image at a time in plain numpy, and against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.data.augment import Normalizer, crop_flip, cutout_


def one_crop_flip(image: np.ndarray, pad: int, top: int, left: int, flip: bool) -> np.ndarray:
    channels, height, width = image.shape
    canvas = np.zeros((channels, height + 2 * pad, width + 2 * pad), image.dtype)
    canvas[:, pad : pad + height, pad : pad + width] = image
    cropped = canvas[:, top : top + height, left : left + width]
    return cropped[:, :, ::-1] if flip else cropped


def one_cutout(image: np.ndarray, length: int, y: int, x: int) -> np.ndarray:
    """The loop of DARTS: clip the corners to the image, then zero what is between."""
    height, width = image.shape[1:]
    out = image.copy()
    y1, y2 = np.clip(y - length // 2, 0, height), np.clip(y - length // 2 + length, 0, height)
    x1, x2 = np.clip(x - length // 2, 0, width), np.clip(x - length // 2 + length, 0, width)
    out[:, y1:y2, x1:x2] = 0
    return out


@pytest.mark.parametrize(("channels", "size", "pad"), [(3, 32, 4), (1, 16, 2), (1, 7, 0), (2, 5, 3)])
@pytest.mark.parametrize("mirrored", [True, False])
def test_crop_and_flip_equal_one_image_at_a_time(channels: int, size: int, pad: int, mirrored: bool) -> None:
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, channels, size, size), dtype=torch.uint8, generator=source)
    top = torch.randint(2 * pad + 1, (40,), generator=source)
    left = torch.randint(2 * pad + 1, (40,), generator=source)
    flip = torch.randint(2, (40,), generator=source).bool()
    result = crop_flip(images, pad, top, left, flip if mirrored else None)
    assert result.dtype == torch.uint8
    for i in range(40):
        expected = one_crop_flip(images[i].numpy(), pad, int(top[i]), int(left[i]), bool(flip[i]) and mirrored)
        assert np.array_equal(result[i].numpy(), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 40])
def test_cutout_equals_one_image_at_a_time(length: int) -> None:
    source = torch.Generator().manual_seed(length)
    images = torch.randn(60, 3, 12, 12, generator=source)
    y, x = torch.randint(12, (2, 60), generator=source)
    y[:4], x[:4] = torch.tensor([0, 0, 11, 11]), torch.tensor([0, 11, 0, 11])
    result = cutout_(images.clone(), length, y, x)
    for i in range(60):
        assert np.array_equal(result[i].numpy(), one_cutout(images[i].numpy(), length, int(y[i]), int(x[i])))


def test_an_even_cutout_away_from_the_border_is_a_whole_square() -> None:
    result = cutout_(torch.ones(1, 1, 32, 32), 16, torch.tensor([16]), torch.tensor([16]))
    assert int((result == 0).sum()) == 16 * 16


def test_normalisation_equals_torchvision() -> None:
    from torchvision.transforms import v2

    mean, std = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    expected = v2.Normalize(list(mean), list(std))(v2.ToDtype(torch.float32, scale=True)(images))
    result = Normalizer(mean, std, "cpu")(images)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_crop_equals_torchvision_for_the_same_numbers() -> None:
    from torchvision.transforms.v2 import functional

    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    for top, left in ((0, 0), (8, 8), (3, 6)):
        expected = functional.hflip(functional.crop(functional.pad(image, [4]), top, left, 32, 32))
        result = crop_flip(image, 4, torch.tensor([top]), torch.tensor([left]), torch.tensor([True]))
        assert torch.equal(result, expected)
