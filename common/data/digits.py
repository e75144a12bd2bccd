# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's bundled digits: 1,797 real handwritten 8x8 images that come with the package."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch

from common.data.images import DatasetInfo, ImageData, Split, channel_statistics, resize_float
from common.data.request import Request
from common.data.splits import stratified

TEST_IMAGES = 360
DEFAULT_SIZE = 16


def _read() -> torch.Tensor:
    """[1797, 65] float64: 64 pixels of 0..16, then the label.

    The package's file is read without importing the package, which takes longer than all the rest of a start.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ValueError("--dataset digits: needs scikit-learn; pip install scikit-learn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        with gzip.open(file, "rt", encoding="ascii") as lines:
            return torch.from_numpy(np.loadtxt(lines, delimiter=","))
    from sklearn.datasets import load_digits as read  # a release that keeps its files elsewhere

    data, target = read(return_X_y=True)
    return torch.from_numpy(np.column_stack([data, target]))


def load_digits(request: Request) -> ImageData:
    """The digits, one channel, resized to 16x16 (or the size asked for); 1,437 to train on, 360 to test.

    The split is stratified and fixed: no seed and no random generator takes part in it. Source: E. Alpaydin and
    C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, as shipped by scikit-learn.
    """
    table = _read()
    # The file holds 0..16; resizing in float and rounding once keeps what little resolution there is.
    pixels = table[:, :-1].float().mul_(255 / 16).view(-1, 1, 8, 8)
    images = resize_float(pixels, request.image_size or DEFAULT_SIZE)
    labels = table[:, -1].long()
    # An order by digest is the same on every machine and with every version of every library.
    digests = [hashlib.sha256(f"digits {index}".encode()).digest() for index in range(len(labels))]
    order = torch.tensor(sorted(range(len(labels)), key=digests.__getitem__))
    test = stratified(labels, TEST_IMAGES, order)
    train = Split(images[~test], labels[~test])
    mean, std = channel_statistics(train.images)
    size = images.shape[-1]
    info = DatasetInfo(
        name="digits",
        num_classes=10,
        channels=1,
        image_size=size,
        classes=tuple(str(digit) for digit in range(10)),
        mean=mean,
        std=std,
        flip=False,
        pad=max(1, size // 8),
    )
    return ImageData(info, train, Split(images[test], labels[test]))
