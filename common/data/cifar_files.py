# SPDX-License-Identifier: Apache-2.0
"""The files of CIFAR-10 and CIFAR-100, read as data: their bytes are walked, and nothing that they say is run.

Both sets are published as pickles of one dictionary each (A. Krizhevsky, 2009). The standard library's walker lists
the values of such a file without building any object, and the three kinds wanted here are easy to tell apart: the
images are the one string of 3072 bytes an image, labels and names are what follows their key.
"""

from __future__ import annotations

import hashlib
import pickletools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PIXELS = 3 * 32 * 32
_NO_VALUE = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET")


def has_checksum(file: Path, md5: str) -> bool:
    """Whether the file is there with this MD5, the published one (a check against damage, not against forgery)."""
    return file.is_file() and hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() == md5


def read_batch(file: Path, labels_key: str) -> tuple[Tensor, Tensor]:
    """One file's images [N, 3, 32, 32] (uint8) and labels [N] (int64). Raises ValueError where it holds none."""
    labels: list[int] = []
    pixels, in_labels = b"", False
    for value in _values(file):
        if isinstance(value, bytes):
            in_labels = value == labels_key.encode()
            pixels = max(pixels, value, key=len)
        elif in_labels:
            labels.append(value)
        if labels and not in_labels and len(pixels) == PIXELS * len(labels):
            break  # what follows are file names
    if not labels or len(pixels) != PIXELS * len(labels):
        raise ValueError(f"{file}: no batch of CIFAR: {len(pixels)} bytes of images for {len(labels)} labels")
    images = torch.from_numpy(np.frombuffer(pixels, dtype=np.uint8).reshape(-1, 3, 32, 32).copy())
    return images, torch.tensor(labels, dtype=torch.int64)


def read_names(file: Path, key: str, count: int) -> tuple[str, ...]:
    """The first `count` strings after `key`: the names of the classes."""
    strings = [value for value in _values(file) if isinstance(value, bytes)]
    start = strings.index(key.encode()) + 1
    return tuple(name.decode() for name in strings[start : start + count])


def _values(file: Path) -> Iterator[bytes | int]:
    """Every string (as bytes) and every small whole number of the file, in its order."""
    with file.open("rb") as stream:
        for opcode, value, _ in pickletools.genops(stream):
            if isinstance(value, str):
                yield value.encode("latin-1")
            elif isinstance(value, (bytes, bytearray)):
                yield bytes(value)
            elif isinstance(value, int) and opcode.name not in _NO_VALUE:
                yield value
