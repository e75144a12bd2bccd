# SPDX-License-Identifier: Apache-2.0
"""What runs an exported file: one callable for every format, images -> logits.

A file is known by its ending, and files of one ending by what they say of themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.export.packed import read_packed


class Runner(Protocol):
    """A network that was loaded to be used."""

    name: str
    """Of the format."""
    path: Path
    arithmetic: str
    """In a few honest words, what it computes with."""
    threads: int | None
    """Of the CPU, as asked for; None: the runtime's own choice."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] (float32, CPU; any B) -> logits [B, classes]."""
        ...


class PackedRunner:
    """The integer engine on a packed file."""

    name = "packed"
    arithmetic = "integer codes; sums exact as of int32 and int64, carried in floats; one rescaling a channel"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path, self.threads = Path(path), threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.network = read_packed(self.path).network

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return self.network(images)[0]


READERS: dict[str, tuple[str, str]] = {
    ".safetensors": ("common.export.runtimes", "PackedRunner"),
    ".onnx": ("common.export.onnx_runtime", "OnnxRunner"),
    ".pt2": ("common.export.torch_export", "TorchRunner"),
}
"""Ending -> (module, callable of path and threads that gives a Runner), imported when a file asks for it."""


def load_runner(path: Path, threads: int | None = None) -> Runner:
    """What runs an exported file. Raises ValueError that names the file, the reason and the cure."""
    path = Path(path)
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"{path}: no exported file ends so; give one that ends in {known}, or the folder of an export")
    module, name = READERS[path.suffix]
    load: Callable[..., Runner] = getattr(import_module(module), name)
    return load(path, threads)
