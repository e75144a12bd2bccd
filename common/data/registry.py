# SPDX-License-Identifier: Apache-2.0
"""One door to every data set: `load(name)`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.data.digits import load_digits
from common.data.folder import load_folder
from common.data.imagenet import load_imagenet
from common.data.images import ImageData, check, check_own
from common.data.own import load_own
from common.data.published import load_cifar, load_mnist, locate_cifar, locate_mnist
from common.data.request import Request
from common.data.streamed import StreamedSplit

_READERS: dict[str, Callable[[Request], ImageData]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": partial(load_cifar, "cifar10"),
    "cifar100": partial(load_cifar, "cifar100"),
    "folder": load_folder,
    "imagenet": load_imagenet,
}
SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 16, 10),
    "mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "imagenet": (3, 224, 1000),
}
"""(channels, pixels, classes) of the sets whose sizes are known before they are read."""

LEAST_SIZE, LARGEST_SIZE = 4, 1024


def dataset_names() -> tuple[str, ...]:
    """The names that `load` knows, in the order in which help texts list them."""
    return tuple(_READERS)


def canonical_name(name: str) -> str:
    """The registry's spelling of `name` ("CIFAR-10" is cifar10). Raises ValueError listing the names otherwise."""
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in _READERS:
        near = difflib.get_close_matches(plain, _READERS, n=2, cutoff=0.5)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        names = ", ".join(_READERS)
        raise ValueError(f"--dataset {name}: unknown{hint}; one of {names}, or --data-module file.py:function")
    return plain


def load(
    name: str,
    *,
    root: Path | None = None,
    image_size: int | None = None,
    data_module: str | None = None,
    classes: int | None = None,
    trainfile: Path | None = None,
    valfile: Path | None = None,
    workers: int = 0,
    download: bool = True,
    say: Callable[[str], None] = print,
) -> ImageData:
    """Load a data set: into memory (CPU; `.to(device)` makes it resident elsewhere), or imagenet to be read while used.

    name: one of `dataset_names()`; not looked at when `data_module` ("file.py:function", a user's own set) is given.
    root: where its files are (--data; default: data/ in the working folder). image_size: resize to this many pixels
    (default: the set's own). classes: keep the first so many of its classes. trainfile, valfile: imagenet in .ffcv
    files, in place of root. workers: threads that decode imagenet's. download: fetch what is missing. say: told of
    anything slow before it starts.
    Raises ValueError naming the flag or file, the reason and the cure.
    """
    if image_size is not None and not LEAST_SIZE <= image_size <= LARGEST_SIZE:
        raise ValueError(f"--image-size {image_size}: must be {LEAST_SIZE} to {LARGEST_SIZE} pixels")
    files = {"trainfile": trainfile, "valfile": valfile}
    files = {key: None if path is None else Path(path).expanduser() for key, path in files.items()}
    request = Request(None if root is None else Path(root).expanduser(), image_size, download, say, workers, **files)
    if data_module is not None:
        data = check_own(load_own(data_module, request), f"--data-module {data_module}", say)
    else:
        data = _read(name, request)
    return data if classes is None else data.first_classes(classes)


def _read(name: str, request: Request) -> ImageData:
    plain = canonical_name(name)
    if request.trainfile is None and request.valfile is None:
        data = _READERS[plain](request)
        if isinstance(data.train, StreamedSplit):
            return data
        check(data, f"--dataset {plain}")
        return check_own(data, f"--data {request.root}", request.say) if plain == "folder" else data
    if plain != "imagenet":
        raise ValueError(f"--trainfile: .ffcv files are read as --dataset imagenet, not {plain}; drop one of the two")
    if request.root is not None:
        raise ValueError("--trainfile: --data names another copy of the images; drop one of the two")
    from common.data.ffcv import load_ffcv

    return load_ffcv(request)


def locate(name: str, root: Path | None = None) -> Path | None:
    """The folder or archive that `load(name, root=root)` would read; None when it would have to download.

    digits and folder: the root itself where it exists (digits need no file). Nothing is read.
    """
    plain = canonical_name(name)
    if plain == "mnist":
        return locate_mnist(root)
    if plain.startswith("cifar"):
        return locate_cifar(plain, root)
    return root if root is not None and root.is_dir() else None
