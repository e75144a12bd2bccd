# SPDX-License-Identifier: Apache-2.0
"""The bundled digits: counts, the fixed stratified split, pixels, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.data import ImageData, load

FIRST_TEST_LABELS = [0, 8, 5, 5, 0, 8, 2, 8, 0, 1, 7, 3]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


def test_counts_and_types(digits: ImageData) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.images.shape == (1437, 1, 16, 16) and digits.test.images.shape == (360, 1, 16, 16)
    assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64
    info = digits.info
    assert (info.name, info.num_classes, info.channels, info.image_size) == ("digits", 10, 1, 16)
    assert not info.flip and info.pad == 2


def test_the_split_is_stratified_complete_and_fixed(digits: ImageData) -> None:
    from sklearn.datasets import load_digits

    whole = np.bincount(load_digits().target)
    train, test = (torch.bincount(part.labels).numpy() for part in (digits.train, digits.test))
    assert np.array_equal(train + test, whole)
    assert np.abs(test - whole * 360 / 1797).max() < 1
    torch.manual_seed(5)
    assert torch.equal(load("digits").test.images, digits.test.images)
    # Frozen: a figure reported on these 360 images must stay comparable.
    assert digits.test.labels[:12].tolist() == FIRST_TEST_LABELS


def test_train_and_test_share_no_image() -> None:
    data = load("digits", image_size=8)
    train = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in train for image in data.test.images)


def test_at_8_pixels_they_are_the_published_values() -> None:
    from sklearn.datasets import load_digits

    data = load("digits", image_size=8)
    mine = torch.cat([data.train.images, data.test.images]).flatten(1).numpy()
    theirs = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, mine)) == sorted(map(bytes, theirs))


def test_statistics_are_those_of_the_training_images(digits: ImageData) -> None:
    pixels = digits.train.images.double() / 255
    assert digits.info.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-12)
    assert digits.info.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-12)


def test_the_resized_digits_are_still_legible(digits: ImageData) -> None:
    """A nearest-neighbour rule on the resized pixels reads the test digits: labels and images belong together."""
    train, test = (part.images.flatten(1).double() for part in (digits.train, digits.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (digits.train.labels[nearest] == digits.test.labels).double().mean() > 0.97
