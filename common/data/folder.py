# SPDX-License-Identifier: Apache-2.0
"""Any folder of images, one folder per class (torchvision's ImageFolder), decoded once into uint8 tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data.images import DatasetInfo, ImageData, Split
from common.data.request import Request
from common.data.streamed import IMAGENET_MEAN, IMAGENET_STD

_TEST_NAMES = ("val", "test", "valid", "validation")
_Samples = list[tuple[str, int]]


def load_folder(request: Request) -> ImageData:
    """ROOT/train/CLASS/* and ROOT/val/CLASS/* (or test): RGB, the centre square resized to the image size.

    Without an image size the shortest side of all images is taken. Raises ValueError for a missing or empty folder,
    classes that differ between the parts, an unreadable image (named), or a set that memory cannot hold.
    """
    if request.root is None:
        raise ValueError("--dataset folder: give --data ROOT, with ROOT/train/CLASS/* and ROOT/val/CLASS/* (or test)")
    classes, train, test = scan_folder(request.root)
    size = request.image_size or _smallest_side(train + test, request)
    _refuse_too_large(request.root, len(train) + len(test), size)
    request.say(f"decoding {len(train)} + {len(test)} images of {len(classes)} classes at {size} pixels")
    info = DatasetInfo(
        name="folder",
        num_classes=len(classes),
        channels=3,
        image_size=size,
        classes=tuple(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
        pad=4,
    )
    return ImageData(info, _decode_all(train, size), _decode_all(test, size))


def scan_folder(root: Path) -> tuple[list[str], _Samples, _Samples]:
    """Sorted class names and the (path, class index) of all images of both parts, in torchvision's order.

    Raises ValueError for a missing or empty folder, and for classes that differ between the parts.
    """
    train_dir, test_dir = _parts(root)
    classes, train = scan(train_dir)
    test_classes, test = scan(test_dir)
    if classes != test_classes:
        only = {str(train_dir): set(classes) - set(test_classes), str(test_dir): set(test_classes) - set(classes)}
        text = "; ".join(f"only in {part}: {', '.join(sorted(names)[:10])}" for part, names in only.items() if names)
        raise ValueError(f"--data {root}: the class folders differ: {text}")
    return classes, train, test


def _parts(root: Path) -> tuple[Path, Path]:
    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder")
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise ValueError(f"--data {root}: expected {root / 'train'} and {root / 'val'} (or test), a folder per class")
    if test.samefile(root / "train"):
        raise ValueError(
            f"--data {root}: {root / 'train'} and {test} are one and the same folder; training and test must not "
            "overlap"
        )
    return root / "train", test


def scan(part: Path) -> tuple[list[str], _Samples]:
    """Sorted class names and (path, class index) of all images, in torchvision's order; every class has some."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, index = find_classes(str(part))
    except FileNotFoundError as error:
        raise ValueError(f"{part}: holds no class folders (expected {part}/CLASS/image files)") from error
    samples = make_dataset(str(part), index, extensions=IMG_EXTENSIONS, allow_empty=True)
    filled = {label for _, label in samples}
    empty = [name for name in classes if index[name] not in filled]
    if empty:
        raise ValueError(f"{part}: no images in class folder {', '.join(empty[:10])} ({', '.join(IMG_EXTENSIONS)})")
    return classes, samples


def _open(path: str) -> Any:
    """A PIL image; reading its pixels comes later. Raises what PIL raises."""
    from PIL import Image

    return Image.open(path)


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be read as an image ({error}); replace or remove this file")


def _read_errors() -> tuple[type[Exception], ...]:
    from PIL import Image

    # PIL reports broken files by all of these, depending on the format.
    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _smallest_side(samples: Iterable[tuple[str, int]], request: Request) -> int:
    smallest = 0
    for path, _ in samples:
        try:
            with _open(path) as image:
                side = min(image.size)
        except _read_errors() as error:
            raise _unreadable(path, error) from error
        smallest = min(smallest or side, side)
    request.say(f"no --image-size given: {smallest} pixels, the shortest side of all images")
    return smallest


def _decode(path: str, size: int) -> np.ndarray:
    """One image as uint8 [3, size, size]: the centre square, antialiased, in RGB."""
    from PIL import Image

    try:
        with _open(path) as image:
            side = min(image.size)
            x, y = (image.size[0] - side) // 2, (image.size[1] - side) // 2
            # Cropped before it is resized, so that no pixel outside the square bleeds into its edge.
            square = image.convert("RGB").crop((x, y, x + side, y + side))
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    except _read_errors() as error:
        raise _unreadable(path, error) from error


def _decode_all(samples: _Samples, size: int) -> Split:
    from tqdm import tqdm

    images = np.empty((len(samples), 3, size, size), dtype=np.uint8)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        arrays = pool.map(lambda sample: _decode(sample[0], size), samples)
        for index, array in enumerate(tqdm(arrays, total=len(samples), desc="decoding", disable=None, leave=False)):
            images[index] = array
    finally:
        # After an unreadable image the rest need not be read.
        pool.shutdown(cancel_futures=True)
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in samples]))


def _refuse_too_large(root: Path, count: int, size: int) -> None:
    needed, free = count * 3 * size * size, available_memory()
    if free is not None and needed > 0.8 * free:
        fits = int((0.8 * free / (3 * count)) ** 0.5)
        raise ValueError(
            f"--data {root}: {count} images at {size} pixels need {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; give a smaller --image-size (at most {fits} fits) or fewer images"
        )


def available_memory() -> int | None:
    """Bytes that can still be allocated here, within the container's limit if it has one; None where unknown."""
    figures = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                figures.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            figures.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass  # not Linux, or no cgroup: go by what was found
    return min(figures, default=None)
