# SPDX-License-Identifier: Apache-2.0
"""The formats that a trained network can be exported to: what writes a file of each, and what checks it.

A format is registered here by name. Nothing heavy is imported before a format is used, since the program's flags
list them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from common.nets import Architecture, EvaluationNetwork


@dataclass(frozen=True)
class Source:
    """A trained network and its images, as every format takes them.

    `network` lies on the CPU in float32, in evaluation mode, without auxiliary head; `build` and `folded` say how it is
    built from its architecture. `data`: name, num_classes, channels, image_size, mean and std of its images.
    """

    network: EvaluationNetwork
    architecture: Architecture
    build: dict[str, Any]
    folded: bool
    data: dict[str, Any]
    test: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    """Batches (images [B, C, H, W], labels [B]) of the test set, normalised, from its first image on at each call."""
    training: Callable[[int], Iterable[Tensor]]
    """(how many) -> batches of so many training images, prepared as test images are: for calibration."""
    say: Callable[[str], None] = print

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of an image."""
        return self.data["channels"], self.data["image_size"], self.data["image_size"]


@dataclass(frozen=True)
class Format:
    """One format. `write(source, path)` and `check(source, path) -> figures` are found by module and name.

    `write` makes the file; `check` loads it in the runtime that it is for and proves it on images. Both raise
    ValueError that says why: what the format cannot hold, or what did not agree.
    """

    name: str
    file: str
    module: str
    write_name: str
    check_name: str
    summary: str

    def write(self, source: Source, path: Path) -> None:
        """Write the file."""
        getattr(import_module(self.module), self.write_name)(source, path)

    def check(self, source: Source, path: Path) -> dict[str, Any]:
        """The figures of the proof, as plain values."""
        return getattr(import_module(self.module), self.check_name)(source, path)


FORMATS: dict[str, Format] = {
    "packed": Format(
        "packed",
        "packed.safetensors",
        "common.export.proof",
        "write_packed",
        "check_packed",
        "integer codes packed at their own bits, for the integer engine of this project",
    ),
    "onnx": Format(
        "onnx",
        "network.onnx",
        "common.export.onnx_formats",
        "write_onnx",
        "check_onnx",
        "standard operators, weights stored in 2, 4 or 8 bits, arithmetic in floats; exact",
    ),
    "onnx-fp32": Format(
        "onnx-fp32",
        "network-fp32.onnx",
        "common.export.onnx_formats",
        "write_onnx_fp32",
        "check_onnx_fp32",
        "the same network without quantisers, to compare with",
    ),
    "onnx-int8": Format(
        "onnx-int8",
        "network-int8.onnx",
        "common.export.onnx_int8",
        "write_int8",
        "check_int8",
        "QDQ for 8-bit integer kernels, outputs calibrated on training images; an approximation, measured",
    ),
    "qonnx": Format(
        "qonnx",
        "network-qonnx.onnx",
        "common.export.qonnx",
        "write_qonnx",
        "check_qonnx",
        "Quant nodes at their own widths, executed and counted by qonnx",
    ),
    "torch": Format(
        "torch",
        "network.pt2",
        "common.export.torch_export",
        "write_torch",
        "check_torch",
        "a program of torch.export, weights of one byte, arithmetic in floats",
    ),
}
"""The formats by name; the order is that of `--format all`."""
