# SPDX-License-Identifier: Apache-2.0
"""Sets of the published size without their images, for plans that need shapes and counts alone."""

from __future__ import annotations

import torch

from common.data.images import DatasetInfo, ImageData, Split
from common.data.registry import SHAPES, canonical_name

COUNTS = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
COUNTS["imagenet"] = (1_281_167, 50_000)
"""Training and test images as published; ImageNet's are those of ILSVRC 2012."""


def stand_in(name: str, image_size: int | None = None, classes: int | None = None) -> ImageData | None:
    """Black images in the set's shape and number, with as many of each class; None for a set of unknown size.

    They take the memory of one image. image_size and classes: as of `load`, and so is the
    ValueError for too many classes.
    """
    plain = canonical_name(name)
    if plain not in COUNTS:
        return None
    channels, size, published = SHAPES[plain]
    size = image_size or size
    labels = published if classes is None else classes
    if not 2 <= labels <= published:
        raise ValueError(f"--classes {classes}: {plain} has {published}; give 2 to that many")
    info = DatasetInfo(
        name=plain,
        num_classes=labels,
        channels=channels,
        image_size=size,
        classes=tuple(map(str, range(labels))),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        flip=channels == 3,
        pad=0,
    )
    image = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    # each class has its share of the images, so that fewer classes are fewer images
    train, test = (
        Split(image.expand(count, -1, -1, -1), torch.arange(count) % labels)
        for count in (round(count * labels / published) for count in COUNTS[plain])
    )
    return ImageData(info, train, test)
