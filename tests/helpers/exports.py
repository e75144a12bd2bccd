# SPDX-License-Identifier: Apache-2.0
"""Networks in memory, ready to be exported: ranges, learned steps and running statistics are set, on real images."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import evaluation_batches, load
from common.export.formats import Source
from common.nets import Architecture, network_of


@cache
def digits(size: int = 16, count: int = 48) -> tuple[Tensor, Tensor]:
    """The first test images of digits, normalised, [count, 1, size, size], and their labels."""
    data = load("digits", image_size=size)
    x, y = next(iter(evaluation_batches(data.test, data.info, count, "cpu")))
    return x, y


@cache
def photographs(size: int = 32, count: int = 32) -> tuple[Tensor, Tensor]:
    """Pieces of two real photographs, normalised as CIFAR-10 is, [count, 3, size, size], with labels by their place."""
    from sklearn.datasets import load_sample_images

    whole = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for number in range(count):
        side = int(torch.randint(32, 200, (), generator=generator))
        top, left = (int(torch.randint(limit - side, (), generator=generator)) for limit in (427, 640))
        piece = whole[number % 2][:, top : top + side, left : left + side].float().unsqueeze(0) / 255
        pieces.append(F.interpolate(piece, (size, size), mode="bilinear", antialias=True))
    mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
    std = torch.tensor((0.2470, 0.2435, 0.2616)).view(1, 3, 1, 1)
    return (torch.cat(pieces) - mean) / std, torch.arange(count) % 10


@torch.no_grad()
def settle(network: nn.Module, x: Tensor) -> nn.Module:
    """The network as after a training, in place: normalisations that do something, and all that forwards set."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
    network.train()
    for _ in range(3):
        network(x)
    return network.eval()


def source_of(architecture: Architecture, x: Tensor, y: Tensor | None = None, seed: int = 0, **build: Any) -> Source:
    """A settled network on the images x, which are its test and its training set."""
    torch.manual_seed(seed)
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    build = {"in_channels": x.shape[1], "num_classes": 10, "auxiliary": False, **build}
    network = settle(network_of(architecture, **build), x)
    data = {"name": "images", "num_classes": 10, "channels": x.shape[1], "image_size": x.shape[2]}
    return Source(
        network=network,
        architecture=architecture,
        build=build,
        folded=False,
        data=data | {"mean": [0.5] * x.shape[1], "std": [0.25] * x.shape[1]},
        test=lambda: iter([(x, y)]),
        training=lambda count: iter([x[:count]]),
        say=lambda text: None,
    )
