# SPDX-License-Identifier: Apache-2.0
"""Is a written graph the network? Every layer is fed the codes that the fake-quantised network has there.

The graph is cut at every layer's quantised input: what the layer reads becomes an input of its own, and what stood
there before becomes an output. One run on a batch then gives, for every layer apart from all others, its outputs on the
network's own codes, what is computed between the layers from the network's own outputs, and the codes that the graph
would have taken (where they differ from the network's a value lay on the border of two levels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.export.onnx_graph import Places, Written
from common.export.onnx_trace import IMAGES, LOGITS, quantizable_layers
from common.nets import EvaluationNetwork
from common.quant.integer import activation_grid, encode

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4
"""As far as a layer's outputs may be from the network's, as a share of the largest of them."""

Execute = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Inputs by name -> outputs by name."""


@dataclass(frozen=True)
class LayerSeen:
    """What one layer of the network saw and gave on a batch: before its quantiser, after it, output."""

    before: Tensor
    quantized: Tensor
    output: Tensor


@dataclass
class Agreement:
    """How far a file's graph is from the network, over `images` images: the largest error of any layer's output and of
    any tensor before a quantiser, relative to the largest value there; and the share of codes that differ.
    """

    images: int
    layers: int
    layer_error: float
    layer: str
    between_error: float
    between: str
    codes: int
    flipped: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"flipped_share": self.flipped / max(1, self.codes)}


@contextmanager
def watched(network: EvaluationNetwork) -> Iterator[dict[str, LayerSeen]]:
    """Within it, every forward fills the dictionary with what each layer saw, by name."""
    seen: dict[str, LayerSeen] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor], keywords: dict[str, Any], output: Tensor) -> None:
            x = F.relu(inputs[0]) if (keywords.get("relu") or (len(inputs) > 1 and inputs[1])) else inputs[0]
            quantized = layer.quantize_activation(x)
            before = quantized if isinstance(layer.quantize_activation, nn.ReLU) else x
            seen[name] = LayerSeen(before, quantized, output)

        return hook

    layers = quantizable_layers(network)
    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cut(written: Written) -> ModelProto:
    """The graph with an input `<layer>.forced` in every layer's place, and all of `Places` as outputs."""
    import onnx
    from onnx import helper

    model = onnx.ModelProto()
    model.CopyFrom(written.model)
    integer = {place.codes for place in written.places.values()} - {None}
    forced = {place.codes or place.quantized: f"{name}.forced" for name, place in written.places.items()}
    for node in model.graph.node:
        node.input[:] = [forced.get(name, name) for name in node.input]
    for tensor, name in forced.items():
        kind = onnx.TensorProto.UINT8 if tensor in integer else onnx.TensorProto.FLOAT
        model.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    wanted = {
        name: onnx.TensorProto.FLOAT for place in written.places.values() for name in (place.before, place.output)
    }
    wanted |= {name: onnx.TensorProto.UINT8 if name in integer else onnx.TensorProto.FLOAT for name in forced}
    for name in (IMAGES, LOGITS):
        wanted.pop(name, None)
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items())
    return model


@torch.inference_mode()
def check_layers(
    network: EvaluationNetwork,
    places: dict[str, Places],
    execute: Execute,
    batches: Iterable[Tensor],
    tolerance: float = TOLERANCE,
    between_tolerance: float | None = TOLERANCE,
) -> Agreement:
    """Compare a cut graph, run by `execute`, with the network on batches of images [B, C, H, W].

    `places` says what is where in the graph; without `between_tolerance` what stands between the layers is only
    reported. Raises ValueError naming the layer that is further off than `tolerance`.
    """
    grids = {name: activation_grid(layer, name) for name, layer in quantizable_layers(network).items()}
    layer_errors, between_errors = _Errors(), _Errors()
    images = codes = flipped = 0
    network.eval()
    for x in batches:
        with watched(network) as seen:
            logits = network(x)[0]
        feeds = {IMAGES: x.numpy()}
        for name, place in places.items():
            feeds[f"{name}.forced"] = _forced(seen[name].quantized, grids[name], place.codes is not None)
        found = execute(feeds)
        for name, place in places.items():
            layer_errors.add(name, _through(seen[name].output, place.affine), found[place.output])
            if place.before in found:
                between_errors.add(name, seen[name].before, found[place.before])
            grid, computed = grids[name], found.get(place.codes or place.quantized)
            if grid is not None and computed is not None:
                codes += computed.size
                flipped += _flips(feeds[f"{name}.forced"], computed, 1.0 if place.codes else float(grid.scale))
        between_errors.add(LOGITS, logits, found[LOGITS])
        images += len(x)
    layer_error, layer = layer_errors.largest()
    between_error, between = between_errors.largest()
    stages = ((layer_error, layer, tolerance), (between_error, f"what stands before {between}", between_tolerance))
    for error, where, bound in stages:
        if bound is not None and not error <= bound:
            raise ValueError(
                f"{where} is {error:.2g} of its largest value away from the network's, more than {bound:g}"
            )
    return Agreement(images, len(grids), layer_error, layer, between_error, between, codes, flipped)


def _through(output: Tensor, affine: tuple[np.ndarray, np.ndarray] | None) -> Tensor:
    if affine is None:
        return output
    factor, shift = (torch.from_numpy(part).view(1, -1, 1, 1) for part in affine)
    return (output.double() * factor + shift).to(output.dtype)


def _forced(quantized: Tensor, grid: Any, as_codes: bool) -> np.ndarray:
    if not as_codes:
        return quantized.contiguous().numpy()
    codes = encode(quantized.clone(), grid)
    return (codes - grid.lowest).to(torch.uint8).contiguous().numpy()


def _flips(forced: np.ndarray, computed: np.ndarray, step: float) -> int:
    return int((np.abs(forced.astype(np.float32) - computed.astype(np.float32)) > 0.5 * step).sum())


class _Errors:
    """Per tensor: the largest difference, and the largest value that it is held against."""

    def __init__(self) -> None:
        self.difference: dict[str, float] = {}
        self.size: dict[str, float] = {}

    def add(self, name: str, wanted: Tensor, found: np.ndarray) -> None:
        expected = wanted.numpy()
        if expected.shape != found.shape:
            raise ValueError(f"{name} gives {found.shape} where the network gives {expected.shape}")
        if not expected.size:
            return
        error = float(np.abs(expected - found).max())
        self.difference[name] = max(self.difference.get(name, 0.0), error if np.isfinite(error) else np.inf)
        self.size[name] = max(self.size.get(name, 0.0), float(np.abs(expected).max()))

    def largest(self) -> tuple[float, str]:
        """(largest relative error, the tensor's name)."""
        relative = {name: error / (self.size[name] or 1.0) for name, error in self.difference.items()}
        name = max(relative, key=relative.__getitem__)
        return relative[name], name
