# SPDX-License-Identifier: Apache-2.0
"""ImageNet, or any folder of photographs, decoded while it is used: DIR/train/CLASS/* and DIR/val/CLASS/*.

JPEGs go through torchvision's decoder, everything else through PIL. Which pixels a training step sees is a function of
the seed and of the position alone: any number of workers and ranks, and any resume, gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.folder import scan_folder
from common.data.images import DatasetInfo, ImageData
from common.data.order import Order
from common.data.request import Request
from common.data.streamed import (
    CENTRE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PREPARED,
    RATIO,
    SCALE,
    Batch,
    Reader,
    StreamedSplit,
    endless,
)

IMAGE_SIZE = 224
_JPEG = b"\xff\xd8\xff"
LOOKED_AT = 32
"""Images of each part that are decoded before anything starts: what is no collection of images is found out then."""
_CHUNK = 4  # images a task: fewer would cost more in handing over than they gain
Box = tuple[int, int, int, int]
"""Top, left, height, width of a crop, in pixels."""


def load_imagenet(request: Request) -> ImageData:
    """Both parts of --data DIR, nothing decoded yet. Raises ValueError for a missing or empty folder."""
    if request.root is None:
        raise ValueError(
            "--dataset imagenet: give --data DIR, with DIR/train/CLASS/* and DIR/val/CLASS/*, or --trainfile X.ffcv "
            "--valfile Y.ffcv"
        )
    classes, train, test = scan_folder(request.root)
    request.say(f"{len(train):,} + {len(test):,} images of {len(classes)} classes in {request.root}, read while used")
    info = imagenet_info(classes, request.image_size)
    splits = FileSplit(train, request.workers), FileSplit(test, request.workers)
    for split in splits:
        split.look(LOOKED_AT)
    return ImageData(info, *splits)


def imagenet_info(classes: list[str], image_size: int | None) -> DatasetInfo:
    """What both ways of reading ImageNet say of it."""
    return DatasetInfo(
        name="imagenet",
        num_classes=len(classes),
        channels=3,
        image_size=image_size or IMAGE_SIZE,
        classes=tuple(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
        pad=0,
    )


class FileSplit(StreamedSplit):
    """Image files and their classes, decoded by `workers` threads (0: by the one that reads ahead)."""

    reproducible = True

    def __init__(self, samples: list[tuple[str, int]], workers: int) -> None:
        """samples: (path, class index) in the order of their indices."""
        self.paths = [path for path, _ in samples]
        self.labels = torch.tensor([label for _, label in samples])
        self._workers = workers

    def look(self, count: int | None = None) -> None:
        """Decode `count` images, evenly spread (None: all). Raises ValueError naming the first that is none."""
        every = len(self) if count is None else min(count, len(self))
        indices = [number * len(self) // every for number in range(every)]
        with ThreadPoolExecutor(max(1, self._workers), "look") as pool:
            for _ in pool.map(self._decode, indices):
                pass

    def select(self, keep: Tensor) -> FileSplit:
        """The images at these indices."""
        return FileSplit([(self.paths[i], int(self.labels[i])) for i in keep.tolist()], self._workers)

    def training(self, order: Order, info: DatasetInfo, augment: bool) -> Reader:
        """Random crops and flips drawn from the position in the epoch, or the centre."""

        def read(epoch: int, step: int) -> Iterator[Batch]:
            wanted = (
                [(index, _draw(order, at, position) if augment else None) for index, position in _pairs(whole, here)]
                for at, whole, here in endless(order, epoch, step)
            )
            return self._decoded(wanted, info.image_size)

        return read

    def testing(self, indices: Tensor, info: DatasetInfo, batch_size: int) -> Iterator[Batch]:
        """The centre of each image once."""
        wanted = ([(index, None) for index in part.tolist()] for part in indices.split(batch_size) if len(part))
        return self._decoded(wanted, info.image_size)

    def _decoded(self, wanted: Iterator[list[tuple[int, Draw | None]]], size: int) -> Iterator[Batch]:
        """Each list of (image index, its random numbers) as a batch; the workers are `PREPARED` batches ahead."""
        if not self._workers:
            for items in wanted:
                images = np.empty((len(items), 3, size, size), np.uint8)
                self._fill(images, items)
                yield torch.from_numpy(images), self.labels[[index for index, _ in items]]
            return
        started: deque[tuple[np.ndarray, list[Future[None]], list[int]]] = deque()
        pool = ThreadPoolExecutor(self._workers, "decode")

        def start() -> None:
            items = next(wanted, None)
            if items is None:
                return
            images = np.empty((len(items), 3, size, size), np.uint8)
            tasks = [
                pool.submit(self._fill, images[at : at + _CHUNK], items[at : at + _CHUNK])
                for at in range(0, len(items), _CHUNK)
            ]
            started.append((images, tasks, [index for index, _ in items]))

        try:
            for _ in range(PREPARED):
                start()
            while started:
                images, tasks, indices = started.popleft()
                for task in tasks:
                    task.result()
                start()
                yield torch.from_numpy(images), self.labels[indices]
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, images: np.ndarray, items: list[tuple[int, Draw | None]]) -> None:
        """Decode, crop and resize into uint8 images [n, 3, S, S]."""
        for image, (index, draw) in zip(images, items, strict=True):
            decoded = self._decode(index)
            height, width = decoded.shape[1:]
            box, flip = centre_box(height, width), False
            if draw is not None:
                box, flip = draw(height, width)
            pixels = crop(decoded, box, image.shape[-1]).numpy()
            np.copyto(image, pixels[:, :, ::-1] if flip else pixels)

    def _decode(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            return decode(path)
        except (RuntimeError, OSError, SyntaxError, ValueError, EOFError) as error:
            reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).partition("\n")[0])  # without torchvision's own place
            raise ValueError(
                f"{path} (image {index}): cannot be read as an image ({reason}); replace or remove this file"
            ) from error


Draw = Callable[[int, int], tuple[Box, bool]]
"""(height, width of an image) -> its crop, and whether it is mirrored."""


def _pairs(whole: Tensor, here: slice) -> list[tuple[int, int]]:
    """(image index, position in the epoch) of a batch."""
    return list(zip(whole[here].tolist(), range(here.start, here.stop), strict=True))


def _draw(order: Order, epoch: int, position: int) -> Draw:
    return partial(random_box, order, epoch, position)


def random_box(order: Order, epoch: int, position: int, height: int, width: int) -> tuple[Box, bool]:
    """A crop of a random share of the area and a random shape, and a coin; drawn from the position alone.

    The rule is that of torchvision's RandomResizedCrop: ten tries, then the largest centred crop of a permitted shape.
    """
    draws = torch.rand(42, generator=order.generator(epoch, "crop", position), dtype=torch.float64).tolist()
    flip = draws[0] < 0.5
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for share, shape, down, right in zip(draws[2::4], draws[3::4], draws[4::4], draws[5::4], strict=True):
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * share)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(down * (height - h + 1)), int(right * (width - w + 1)), h, w), flip
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return ((height - h) // 2, (width - w) // 2, h, w), flip


def centre_box(height: int, width: int) -> Box:
    """The square in the middle whose side is 224/256 of the short side (at least a pixel)."""
    side = max(1, int(CENTRE * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


def crop(image: Tensor, box: Box, size: int) -> Tensor:
    """uint8 [3, H, W] cut to the box and resized to size x size (bilinear, antialiased; untouched where it fits)."""
    from torchvision.transforms.v2 import functional

    if box[2:] == (size, size):
        return functional.crop(image, *box)
    return functional.resized_crop(image, *box, [size, size], antialias=True)


def decode(path: str | Path) -> Tensor:
    """An image file as uint8 RGB [3, H, W]; grey and CMYK ones too. Raises what the decoders raise."""
    from torchvision.io import ImageReadMode, decode_jpeg

    data = np.fromfile(path, np.uint8)
    if data[:3].tobytes() == _JPEG:
        return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
