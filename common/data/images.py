# SPDX-License-Identifier: Apache-2.0
"""What a data set is once it is loaded: uint8 images and labels in memory, and what is known about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.data.streamed import StreamedSplit


@dataclass(frozen=True)
class DatasetInfo:
    """What the rest of the project needs to know about a set of images.

    mean and std are per channel, of pixel values in 0..1. flip: whether training mirrors images left to right;
    pad: by how many (black) pixels training pads each side before it crops; both belong to the set, since a mirrored
    digit is no digit.
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    pad: int


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8, 0..255) and their labels [N] (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`; itself where it is there already."""
        images, labels = self.images.to(device), self.labels.to(device)
        return self if images is self.images and labels is self.labels else Split(images, labels)

    def select(self, keep: Tensor) -> Split:
        """The images at these indices (int64), in this order."""
        return Split(self.images[keep], self.labels[keep])


@dataclass(frozen=True)
class ImageData:
    """A data set: `train` is all that training may see, `test` is read once, at the end."""

    info: DatasetInfo
    train: Split | StreamedSplit
    test: Split | StreamedSplit

    def to(self, device: torch.device | str) -> ImageData:
        """The same set with both splits resident on `device` (streamed ones stay where they are)."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def first_classes(self, count: int) -> ImageData:
        """Only the images of the first `count` classes. Raises ValueError (--classes) where there are fewer."""
        if not 2 <= count <= self.info.num_classes:
            raise ValueError(f"--classes {count}: {self.info.name} has {self.info.num_classes}; give 2 to that many")
        info = replace(self.info, num_classes=count, classes=self.info.classes[:count])
        kept = (split.select((split.labels < count).nonzero().flatten()) for split in (self.train, self.test))
        return ImageData(info, *kept)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (of all pixels, in 0..1) of each channel of uint8 images [N, C, H, W].

    Computed from exact integer histograms, so that every machine and thread count gives the same floats. The
    deviation of a constant channel is given as 1, which leaves normalisation defined.
    """
    means, deviations = [], []
    values = torch.arange(256, dtype=torch.int64)
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=256)
        n, total, squares = (int((counts * values**power).sum()) for power in (0, 1, 2))
        variance = (n * squares - total * total) / (n * n)
        means.append(total / n / 255)
        deviations.append(variance**0.5 / 255 if variance > 0 else 1.0)
    return tuple(means), tuple(deviations)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] resized to `size` x `size` (bilinear, antialiased); untouched where they fit."""
    if images.shape[-2:] == (size, size):
        return images
    parts = [resize_float(part.float(), size) for part in images.split(4096)]
    return torch.cat(parts)


def resize_float(images: Tensor, size: int) -> Tensor:
    """Float images in 0..255 [N, C, H, W] resized to `size` x `size` and rounded to uint8, once, at the end."""
    resized = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def check(data: ImageData, source: str) -> ImageData:
    """`data` itself when it keeps what this module promises; ValueError naming `source` and the field otherwise."""
    info = data.info
    shape = (info.channels, info.image_size, info.image_size)
    for name, split in (("train", data.train), ("test", data.test)):
        images, labels = split.images, split.labels
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{source}: {name} images must be a uint8 tensor with values 0..255, not {kind}")
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"{source}: {name} images have shape {tuple(images.shape)}; "
                f"expected [N, {shape[0]}, {shape[1]}, {shape[2]}] (channels first, square)"
            )
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"{source}: {name} labels must be one int64 tensor of shape [N]")
        if len(images) != len(labels):
            raise ValueError(f"{source}: {len(images)} {name} images but {len(labels)} {name} labels")
        if len(labels) == 0:
            raise ValueError(f"{source}: the {name} split is empty")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= info.num_classes:
            raise ValueError(f"{source}: {name} labels run from {low} to {high}; expected 0..{info.num_classes - 1}")
    for field in ("mean", "std"):
        if len(getattr(info, field)) != info.channels:
            raise ValueError(f"{source}: info.{field} needs one figure per channel ({info.channels})")
    if len(info.classes) != info.num_classes:
        raise ValueError(f"{source}: info.classes names {len(info.classes)} of {info.num_classes} classes")
    if min(info.std) <= 0 or not info.pad >= 0:
        raise ValueError(f"{source}: info.std must be above 0 and info.pad at least 0")
    return data


def check_own(data: ImageData, source: str, say: Callable[[str], None]) -> ImageData:
    """`data` itself when each class has training images, and its test images are others, compared pixel by pixel.

    For data without a published checksum. Raises ValueError naming `source`, the overlap from a tenth of the test
    images on: a test on images that were trained on says nothing. Fewer, as collections of small images happen to
    have, are told.
    """
    info = data.info
    empty = (torch.bincount(data.train.labels, minlength=info.num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{source}: no training image has label {empty[0]} ({len(empty)} of {info.num_classes} classes are empty); "
            "nothing could learn them: add images, or leave these classes out"
        )
    seen = {_key(image) for image in data.train.images}
    shared = [index for index, image in enumerate(data.test.images) if _key(image) in seen]
    if 10 * len(shared) >= len(data.test) and shared:
        raise ValueError(
            f"{source}: {len(shared)} of {len(data.test)} test images are training images too (first: test image "
            f"{shared[0]}); training and test must not overlap: take them out of one of the two"
        )
    if shared:
        say(f"{len(shared)} of {len(data.test)} test images are training images too (first: test image {shared[0]})")
    return data


def _key(image: Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
