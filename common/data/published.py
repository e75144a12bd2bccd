# SPDX-License-Identifier: Apache-2.0
"""MNIST, CIFAR-10 and CIFAR-100, after their published checksums.

CIFAR is read without torchvision, whose import takes longer than all the rest of a start; it downloads what is missing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.data.archives import aside_in, move_in, unpack_gzips, unpack_tar
from common.data.cifar_files import has_checksum, read_batch, read_names
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
    train: dict[str, str]
    """File -> MD5 of its content; `test` and `meta` likewise."""
    test: dict[str, str]
    meta: dict[str, str]
    labels: str
    """Key of the labels in those files; that of the names is made of its singular and _names."""


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
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        labels="labels",
    ),
    "cifar100": _Cifar(
        reader="CIFAR100",
        folder="cifar-100-python",
        archive="cifar-100-python",
        probe="train",
        num_classes=100,
        mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        labels="fine_labels",
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
    about = _CIFARS[name]
    found = locate_cifar(name, request.root)
    if found is not None and found.is_file():
        folder = unpack_tar(found, about.folder, request.say)
    elif found is not None:
        folder = found
    else:
        expected = f"{about.folder}/ (or {about.archive}.tar.gz)"
        folder = _download(name, about.reader, Path(about.folder), expected, request)
    for file, md5 in (about.train | about.test | about.meta).items():
        if not has_checksum(folder / file, md5):
            raise damaged(name, folder / file, folder)
    train, test = (_cifar_split(folder, files, about, request.image_size) for files in (about.train, about.test))
    names = read_names(folder / next(iter(about.meta)), about.labels[:-1] + "_names", about.num_classes)
    size = train.images.shape[-1]
    info = DatasetInfo(
        name=name,
        num_classes=about.num_classes,
        channels=3,
        image_size=size,
        classes=names,
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
    from torchvision.datasets.mnist import read_image_file, read_label_file
    from torchvision.datasets.utils import check_md5

    folder = locate_mnist(request.root)
    if folder is None:
        expected = f"{_MNIST_FOLDER}/ with the four idx files (or mnist/ with their .gz)"
        folder = _download("mnist", "MNIST", _MNIST_FOLDER, expected, request)
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


def _cifar_split(folder: Path, files: dict[str, str], about: _Cifar, image_size: int | None) -> Split:
    images, labels = zip(*(read_batch(folder / file, about.labels) for file in files), strict=True)
    return _split(torch.cat(images), torch.cat(labels), image_size)


def _download(name: str, reader: str, folder: Path, expected: str, request: Request) -> Path:
    """Fetch a set into --data (default: data/) by torchvision; whole or not at all. Returns its folder."""
    root = request.root or DEFAULT_ROOT
    if not request.download:
        raise missing(name, root, expected, "downloads are off")
    import torchvision

    with aside_in([root]) as aside, _patience(30):
        request.say(f"downloading {name} to {root / folder}")
        try:
            getattr(torchvision.datasets, reader)(aside, train=True, download=True)
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
