# SPDX-License-Identifier: Apache-2.0
"""A user's own data set: `--data-module file.py:function`, see docs/own-data.md."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.images import DatasetInfo, ImageData, Split, channel_statistics, check, resize
from common.data.request import Request

_PARTS = ("train_images", "train_labels", "test_images", "test_labels")
_RETURNS = "must return an ImageData or (train_images, train_labels, test_images, test_labels)"


def load_own(spec: str, request: Request) -> ImageData:
    """What the function named by `spec` ("file.py:function") returns, validated; see docs/own-data.md.

    The function is called with `root` and `image_size` if it has parameters of these names, else with nothing.
    Raises ValueError naming --data-module, the field and the reason for anything that is not as promised.
    """
    source = f"--data-module {spec}"
    function, name = _find(spec, source)
    given = {"root": request.root, "image_size": request.image_size}
    parameters = inspect.signature(function).parameters
    try:
        result = function(**{key: value for key, value in given.items() if key in parameters})
    except MemoryError:
        raise  # says by itself what to lower
    except Exception as error:  # the user's own code: whatever it raises is told with its place
        raise ValueError(f"{source}: the function failed: {type(error).__name__}: {error}") from error
    if isinstance(result, tuple | list) and len(result) == 4:
        result = _from_arrays(result, name, source)
    if not isinstance(result, ImageData):
        raise ValueError(f"{source}: {_RETURNS}, not {type(result).__name__}")
    check(result, source)
    size = request.image_size
    if size and size != result.info.image_size:
        info = replace(result.info, image_size=size)
        train, test = (Split(resize(part.images, size), part.labels) for part in (result.train, result.test))
        result = ImageData(info, train, test)
    return result


def _find(spec: str, source: str) -> tuple[Callable[..., Any], str]:
    file, _, attribute = spec.rpartition(":")
    if not file or not attribute:
        raise ValueError(f"{source}: expected file.py:function")
    path = Path(file).expanduser().resolve()
    module = import_file(path, source)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"{source}: {path} has no function {attribute!r} (it has: {', '.join(known) or 'none'})")
    return function, path.stem


def import_file(path: Path, source: str) -> ModuleType:
    """Run a user's Python file and give its module; ValueError, beginning with `source`, when that fails."""
    if not path.is_file():
        raise ValueError(f"{source}: no such file: {path}")
    if (run := _run_around(path)) is not None:
        raise ValueError(
            f"{source}: {path} lies in the folder of a run ({run}), whose files are data and are never executed; read "
            "it, and copy it elsewhere if it is yours"
        )
    # A name of its own, so that two files called data.py do not meet in sys.modules.
    module_name = f"own_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise ValueError(f"{source}: {path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's own code, as above
        del sys.modules[module_name]
        raise ValueError(f"{source}: importing failed: {type(error).__name__}: {error}") from error
    return module


def _run_around(path: Path) -> Path | None:
    """The run folder that holds a file; None where none does. A run from elsewhere may name what it brought along."""
    marks = ("result.json", "checkpoints", "history.jsonl")
    for folder in path.parents:
        if (folder / "config.json").is_file() and any((folder / mark).exists() for mark in marks):
            return folder
    return None


def _from_arrays(arrays: Any, name: str, source: str) -> ImageData:
    tensors = [_tensor(value, part, source) for value, part in zip(arrays, _PARTS, strict=True)]
    labels, test_labels = (
        _labels(tensor, part, source) for tensor, part in zip(tensors[1::2], _PARTS[1::2], strict=True)
    )
    images = tensors[0]
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"{source}: train_images have shape {tuple(images.shape)}; expected [N, C, H, W], channels first, H = W"
        )
    if images.dtype != torch.uint8:
        raise ValueError(f"{source}: train_images have type {images.dtype}; expected uint8 pixels, 0..255")
    if not len(images) or not len(labels):
        raise ValueError(f"{source}: train_images or train_labels are empty")
    if int(labels.min()) < 0:
        raise ValueError(f"{source}: train_labels hold {int(labels.min())}; expected 0..K-1")
    counts = torch.bincount(labels)
    gaps = (counts == 0).nonzero().flatten().tolist()
    if gaps:
        raise ValueError(f"{source}: no training image has label {gaps[0]}; labels must be 0..K-1 without gaps")
    mean, std = channel_statistics(images)
    size = images.shape[-1]
    info = DatasetInfo(
        name=name,
        num_classes=len(counts),
        channels=images.shape[1],
        image_size=size,
        classes=tuple(str(label) for label in range(len(counts))),
        mean=mean,
        std=std,
        flip=False,
        pad=size // 8,
    )
    return ImageData(info, Split(images, labels), Split(tensors[2], test_labels))


def _tensor(value: Any, part: str, source: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    try:
        return torch.from_numpy(np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {part} is no array of numbers ({error})") from error


def _labels(value: Tensor, part: str, source: str) -> Tensor:
    if value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"{source}: {part} have type {value.dtype}, shape {tuple(value.shape)}; expected integers [N]")
    return value.long()
