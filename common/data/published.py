# SPDX-License-Identifier: Apache-2.0
"""MNIST, CIFAR-10 and CIFAR-100, read by torchvision's own readers after its own checksums."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.data.archives import aside_in, move_in, unpack_gzips, unpack_tar
from common.data.images import DatasetInfo, ImageData, Split, resize
from common.data.request import DEFAULT_ROOT, Request, damaged, missing


@dataclass(frozen=True)
class _Cifar:
    """One of the two CIFAR sets (A. Krizhevsky, 2009): its names in torchvision and on disk."""

    reader: str
    folder: str
    archive: str
    probe: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFARS = {
    # Statistics of CIFAR-10 as in DARTS (arXiv 1806.09055) and its successors.
    "cifar10": _Cifar(
        reader="CIFAR10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python",
        probe="data_batch_1",
        num_classes=10,
        mean=(0.49139968, 0.48215827, 0.44653124),
        std=(0.24703233, 0.24348505, 0.26158768),
    ),
    "cifar100": _Cifar(
        reader="CIFAR100",
        folder="cifar-100-python",
        archive="cifar-100-python",
        probe="train",
        num_classes=100,
        mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    ),
}

_MNIST_FOLDER = Path("MNIST") / "raw"
# torchvision checks the four archives; these are the md5s of what is inside them.
_MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_cifar(name: str, request: Request) -> ImageData:
    """CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images, 3 x 32 x 32 (or the size asked for)."""
    import torchvision

    about = _CIFARS[name]
    reader = getattr(torchvision.datasets, about.reader)
    found = locate_cifar(name, request.root)
    if found is not None and found.is_file():
        folder = unpack_tar(found, about.folder, request.say)
    elif found is not None:
        folder = found
    else:
        expected = f"{about.folder}/ (or {about.archive}.tar.gz)"
        folder = _download(name, reader, Path(about.folder), expected, request)
    # The readers look for a folder of this name inside a root: say where it really is.
    local = type(about.reader, (reader,), {"base_folder": folder.name})
    try:
        parts = [local(folder.parent, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise damaged(name, _bad_file(reader, folder), folder) from error
    train, test = (_split(torch.from_numpy(p.data).permute(0, 3, 1, 2), p.targets, request.image_size) for p in parts)
    size = train.images.shape[-1]
    info = DatasetInfo(
        name=name,
        num_classes=about.num_classes,
        channels=3,
        image_size=size,
        classes=tuple(parts[0].classes),
        mean=about.mean,
        std=about.std,
        flip=True,
        pad=max(1, size // 8),
    )
    return ImageData(info, train, test)


def locate_cifar(name: str, root: Path | None) -> Path | None:
    """The folder or archive that `load_cifar` would read under `root` (default: data/); None when there is none."""
    about, root = _CIFARS[name], root or DEFAULT_ROOT
    archives = [f"{about.archive}{suffix}" for suffix in (".tar.gz", ".tar.xz")]
    if root.is_file() and root.name in archives:
        return root
    for folder in (root / about.folder, root):
        if (folder / about.probe).is_file():
            return folder
    return next((root / archive for archive in archives if (root / archive).is_file()), None)


def load_mnist(request: Request) -> ImageData:
    """MNIST (LeCun, Cortes, Burges): 60,000 training and 10,000 test images, 1 x 28 x 28 (or the size asked for)."""
    import torchvision
    from torchvision.datasets.mnist import read_image_file, read_label_file
    from torchvision.datasets.utils import check_md5

    folder = locate_mnist(request.root)
    if folder is None:
        expected = f"{_MNIST_FOLDER}/ with the four idx files (or mnist/ with their .gz)"
        folder = _download("mnist", torchvision.datasets.MNIST, _MNIST_FOLDER, expected, request)
    elif not _has_all(folder, ""):
        folder = unpack_gzips([folder / f"{file}.gz" for file in _MNIST_FILES], _MNIST_FOLDER, request.say)
    for file, md5 in _MNIST_FILES.items():
        if not (folder / file).is_file() or not check_md5(str(folder / file), md5):
            raise damaged("mnist", folder / file, folder)
    train, test = (
        _split(
            read_image_file(str(folder / f"{part}-images-idx3-ubyte")).unsqueeze(1),
            read_label_file(str(folder / f"{part}-labels-idx1-ubyte")),
            request.image_size,
        )
        for part in ("train", "t10k")
    )
    info = DatasetInfo(
        name="mnist",
        num_classes=10,
        channels=1,
        image_size=train.images.shape[-1],
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.1307,),
        std=(0.3081,),
        flip=False,
        pad=2,
    )
    return ImageData(info, train, test)


def locate_mnist(root: Path | None) -> Path | None:
    """The folder with MNIST's four idx files, or else with their .gz, under `root` (default: data/); or None."""
    root = root or DEFAULT_ROOT
    places = (root, root / _MNIST_FOLDER, root / "raw", root / "MNIST", root / "mnist", root / "mnist" / "raw")
    for suffix in ("", ".gz"):
        for folder in places:
            if _has_all(folder, suffix):
                return folder
    return None


def _has_all(folder: Path, suffix: str) -> bool:
    return all((folder / f"{file}{suffix}").is_file() for file in _MNIST_FILES)


def _split(images: torch.Tensor, labels: Any, image_size: int | None) -> Split:
    images = images.contiguous()
    return Split(resize(images, image_size) if image_size else images, torch.as_tensor(labels, dtype=torch.int64))


def _bad_file(reader: Any, folder: Path) -> Path:
    from torchvision.datasets.utils import check_integrity

    files = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
    bad = (folder / file for file, md5 in files if not check_integrity(str(folder / file), md5))
    return next(bad, folder)


def _download(name: str, reader: Callable[..., Any], folder: Path, expected: str, request: Request) -> Path:
    """Fetch a set into --data (default: data/) by torchvision; whole or not at all. Returns its folder."""
    root = request.root or DEFAULT_ROOT
    if not request.download:
        raise missing(name, root, expected, "downloads are off")
    with aside_in([root]) as aside, _patience(30):
        request.say(f"downloading {name} to {root / folder}")
        try:
            reader(aside, train=True, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise missing(name, root, expected, f"download failed: {' '.join(str(error).split())[:200]}") from error
        move_in(aside / folder, root / folder)
    return root / folder


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Let a connection that never answers fail: torchvision's downloads have no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
