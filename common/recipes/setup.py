# SPDX-License-Identifier: Apache-2.0
"""What both recipes prepare in the same way: device, threads, data, stem, shortened epochs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.data import ImageData, load
from common.engine.cli import Config
from common.engine.train_loop import BatchStream


class FirstSteps:
    """A stream whose epochs end after at most `steps` steps (--steps-per-epoch)."""

    def __init__(self, stream: BatchStream, steps: int) -> None:
        self.stream, self.steps_per_epoch = stream, min(steps, stream.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The stream's own batch."""
        return self.stream.batch(epoch, step)


def shorten(stream: BatchStream, steps: int | None) -> BatchStream:
    """The stream itself, or its first steps where a limit is given."""
    return stream if steps is None else FirstSteps(stream, steps)


def prepare_torch(config: Config) -> torch.device:
    """Set --threads and say where the run computes (--device; auto: a GPU where torch sees one)."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def load_data(config: Config, say: Callable[[str], None] = print) -> ImageData:
    """The images that the flags name, on the CPU. Raises ValueError that names the flag, the reason and the cure."""
    return load(config.dataset, root=config.data, image_size=config.image_size, data_module=config.data_module, say=say)


def stem_of(config: Config, image_size: int) -> str:
    """The stem: as given, or ImageNet's from 128 pixels on."""
    if config.stem != "auto":
        return config.stem
    return "imagenet" if image_size >= 128 else "cifar"
