# SPDX-License-Identifier: Apache-2.0
"""The formats `onnx` and `onnx-fp32`: written, and proven in onnxruntime before they are left on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.cost import network_cost
from common.engine.files import write_bytes
from common.export.formats import Source
from common.export.integer_network import refuse_not_finite
from common.export.onnx_check import Agreement, Execute, check_layers, cut
from common.export.onnx_graph import Places, Written, write_exact, write_float
from common.export.onnx_runtime import OnnxRunner, execute_by_onnxruntime
from common.export.onnx_trace import Traced, quantizable_layers, trace
from common.export.runtimes import Runner
from common.nets import EvaluationNetwork

CHECKED_IMAGES = 1000
"""How many test images a file is checked on (all of them, where the set has fewer)."""
_VALUES_AT_ONCE = 2**26  # of all layers' inputs; each is held about six times

_traced: WeakKeyDictionary[nn.Module, Traced] = WeakKeyDictionary()


def traced_of(source: Source) -> Traced:
    """The marked graph of the source's network, traced once for all formats. Raises ValueError naming what it cannot
    hold.
    """
    if source.network not in _traced:
        refuse_not_finite(source.network)
        _traced[source.network] = trace(source.network, source.image_shape)
    return _traced[source.network]


def serialized(source: Source, written: Written) -> bytes:
    """The file's bytes; its metadata say, as JSON under `images`, what it expects of its images."""
    written.model.metadata_props.add(key="images", value=json.dumps(source.data))
    return written.model.SerializeToString()


def write_onnx(source: Source, path: Path) -> None:
    """Write the `onnx` file. Raises ValueError for what it cannot hold."""
    write_bytes(path, serialized(source, write_exact(traced_of(source))))


def write_onnx_fp32(source: Source, path: Path) -> None:
    """Write the network without its quantisers."""
    write_bytes(path, serialized(source, write_float(traced_of(source))))


def check_onnx(source: Source, path: Path) -> dict[str, Any]:
    """Every layer of the file in onnxruntime, the whole of it, and its size. Raises ValueError where it is not the
    network.
    """
    written = write_exact(traced_of(source))
    plain = len(serialized(source, write_float(traced_of(source))))
    figures = check_file(source, path, written, source.network)
    return figures | {"bytes_of_fp32_file": plain, "of_fp32_file": figures["bytes"] / plain}


def check_onnx_fp32(source: Source, path: Path) -> dict[str, Any]:
    """As `check_onnx`, against the network without its quantisers."""
    return check_file(source, path, write_float(traced_of(source)), unquantized(source.network))


def unquantized(network: EvaluationNetwork) -> EvaluationNetwork:
    """A copy that computes with what was trained, nothing quantised."""
    network = copy.deepcopy(network)
    for layer in quantizable_layers(network).values():
        layer.quantize_weight = nn.Identity()
        if not isinstance(layer.quantize_activation, nn.ReLU):
            layer.quantize_activation = nn.Identity()
    return network


def check_file(source: Source, path: Path, written: Written, network: EvaluationNetwork) -> dict[str, Any]:
    """The file in onnxruntime against `network`, layer by layer and as a whole."""
    import onnx

    written.model = onnx.load(str(path))
    agreement = checked(source, path, network, written.places, execute_by_onnxruntime(cut(written)))
    return {
        "bytes": path.stat().st_size,
        "weight_bytes": network_cost(network, source.image_shape).weight_bytes,
        "layers": agreement.to_json(),
        "whole": compare_whole(source, network, OnnxRunner(path)),
    }


def checked(
    source: Source, path: Path, network: EvaluationNetwork, places: dict[str, Places], execute: Execute, **more: Any
) -> Agreement:
    """`check_layers` on the images of the check; its error begins with the file's name."""
    try:
        return check_layers(network, places, execute, (x for x, _ in checked_batches(source)), **more)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def checked_batches(source: Source, images: int = CHECKED_IMAGES) -> Iterator[tuple[Tensor, Tensor]]:
    """The first test images and labels, few enough at a time that every layer's values fit into memory."""
    cost = network_cost(source.network, source.image_shape)
    values = sum(8 * layer.activation_bytes / layer.activation_bits for layer in cost.layers)
    size = int(min(64, max(1, _VALUES_AT_ONCE // values)))
    for x, labels in source.test():
        x, labels = x[:images], labels[:images]
        images -= len(x)
        yield from zip(x.split(size), labels.split(size), strict=True)
        if not images:
            return


@torch.inference_mode()
def compare_whole(source: Source, network: EvaluationNetwork, runner: Runner) -> dict[str, Any]:
    """From image to logits: how many images are classified alike, and rightly. Raises ValueError naming the file where
    logits are not finite.
    """
    images = alike = right = right_file = 0
    difference = largest = 0.0
    for x, labels in checked_batches(source):
        expected, found = network(x)[0], runner(x)
        if not (expected.isfinite().all() and found.isfinite().all()):  # max() would pass over them
            raise ValueError(f"{runner.path}: logits are not finite, of the file or of the network")
        images += len(x)
        alike += int((expected.argmax(1) == found.argmax(1)).sum())
        right += int((expected.argmax(1) == labels).sum())
        right_file += int((found.argmax(1) == labels).sum())
        difference = max(difference, float((expected - found).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return {
        "images": images,
        "top1_agreement": alike / images,
        "top1": right / images,
        "top1_file": right_file / images,
        "largest_logit_difference": difference,
        "largest_logit": largest,
    }
