# SPDX-License-Identifier: Apache-2.0
"""The format `onnx-int8`: QDQ, what kernels for 8-bit integers can run. An approximation, and only where said.

A convolution in integers reads its activation codes as UINT8 (exactly: QuantizeLinear, Clip, DequantizeLinear with the
grid's own scale), its weight codes as INT8 and a bias as INT32, and what it gives is quantised to 8 bits in its turn:

- weight codes (the odd ones of a mid-rise grid, say) are multiplied by the largest whole number that INT8 holds and
  their scale is divided by it: the values stay, and the bias, which counts in the products' unit, becomes finer;
- a factor and shift per channel behind a convolution (a normalisation) goes into scale and bias; the bias is rounded;
- where a quantiser reads the output alone, its codes are the output's (nothing more is lost); elsewhere the output
  takes an affine UINT8 grid between the smallest and the largest value that training images gave there.

What keeps floats: depthwise convolutions, which are slower in integers (docs/export.md), linear layers, and layers
whose operands fit no 8-bit grid with a zero; each kind is counted in the figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.engine.files import write_bytes
from common.export.formats import Source
from common.export.onnx_check import cut
from common.export.onnx_formats import checked, compare_whole, serialized, traced_of
from common.export.onnx_graph import (
    Builder,
    Lowering,
    Places,
    Written,
    code_of,
    finish,
    lower,
    quantize_exactly,
)
from common.export.onnx_runtime import OnnxRunner, execute_by_onnxruntime, open_session
from common.export.onnx_trace import IMAGES, Traced, TracedLayer
from common.quant.integer import Grid

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from torch import Tensor

CALIBRATION_IMAGES = 256
INTEGER_KINDS = ("convolution",)
"""The kinds of layers that compute in integers."""
_LARGEST_BIAS = 2**30


# ------------------------------------------------------------------------------------------------ which layers, and why


def reason_for_floats(layer: TracedLayer) -> str:
    """Why a layer keeps floats; empty where it computes in integers."""
    if layer.kind not in INTEGER_KINDS:
        return layer.kind
    if layer.weights is None or layer.activations is None:
        return "an operand in full precision"
    if layer.weights.offset is not None or layer.weights.largest > 127:
        return "weights on no INT8 grid"
    return "" if fits_uint8(layer.activations) else "activations on no UINT8 grid"


def fits_uint8(grid: Grid) -> bool:
    """Whether codes and zero fit into UINT8, counted from the smallest code."""
    return grid.offset is None and grid.highest - grid.lowest <= 255 and 0 <= -grid.lowest <= 255


# ------------------------------------------------------------------------------------------------------------ the graph


def _activation(builder: Builder, layer: TracedLayer, x: str, out: str) -> None:
    """Codes as UINT8 and their values; in floats where the layer computes in floats.

    (Between two steps of quantisation onnxruntime would quantise that layer by itself, coarser than it is.)
    """
    grid = layer.activations
    if grid is None or reason_for_floats(layer):
        quantize_exactly(builder, layer, x, out)
        return
    scale, zero = builder.constant(grid.scale.numpy()), builder.constant(-grid.lowest, np.uint8)
    codes, span = f"{layer.name}.codes8", grid.highest - grid.lowest
    if grid.rounding == "even" and grid.multiplier == 1:
        source, unit = x, scale
    else:
        source, unit = code_of(builder, grid, x), builder.constant(1.0)
    if span == 255:
        builder.add("QuantizeLinear", [source, unit, zero], codes)
    else:
        wide = builder.add("QuantizeLinear", [source, unit, zero])
        builder.add("Clip", [wide, builder.constant(0, np.uint8), builder.constant(span, np.uint8)], codes)
    builder.add("DequantizeLinear", [codes, scale, zero], out)


def _weight(builder: Builder, layer: TracedLayer, out: str) -> None:
    """The values; `_in_integers` puts codes in their place."""
    builder.constant(layer.values.contiguous().numpy(), name=out)


@dataclass
class _Affine:
    """factor and shift per channel, float64 [C]."""

    factor: np.ndarray
    shift: np.ndarray


class _Graph:
    """The nodes of a builder, by what they read and give."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.readers: dict[str, list[NodeProto]] = {}
        self.makers: dict[str, NodeProto] = {}
        for node in builder.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            for name in node.output:
                self.makers[name] = node

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value."""
        from onnx import numpy_helper

        tensor = self.builder.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def channel_constant(self, node: NodeProto, x: str, channels: int) -> np.ndarray | None:
        """The other operand of a product or sum with x where it is one number per channel, [C]."""
        if node.op_type not in ("Mul", "Add") or len(node.input) != 2:
            return None
        other = self.value(node.input[1] if node.input[0] == x else node.input[0])
        if (
            other is None
            or other.size not in (1, channels)
            or (other.size > 1 and other.shape[-3:] != (channels, 1, 1))
        ):
            return None
        return np.broadcast_to(other.reshape(-1).astype(np.float64), (channels,))

    def chain(self, x: str, channels: int) -> list[tuple[NodeProto, np.ndarray]]:
        """The products and sums with constants per channel that follow x, each the only reader of the one before."""
        found = []
        while len(readers := self.readers.get(x, [])) == 1:
            constant = self.channel_constant(readers[0], x, channels)
            if constant is None:
                break
            found.append((readers[0], constant))
            x = readers[0].output[0]
        return found


def _split_behind_concatenations(builder: Builder, convolutions: set[str]) -> None:
    """Move factors and shifts from behind a concatenation of convolutions' outputs to each of them."""
    graph, gone, added = _Graph(builder), set(), {}
    for node in builder.nodes:
        widths = [convolution_channels(graph, name, convolutions) for name in node.input]
        alone = all(len(graph.readers[name]) == 1 for name in node.input)
        if node.op_type != "Concat" or None in widths or node.attribute[0].i != 1 or not alone:
            continue
        chain = graph.chain(node.output[0], sum(widths))
        if not chain:
            continue
        before: list[NodeProto] = []
        for position, (name, at) in enumerate(zip(list(node.input), np.cumsum([0, *widths]), strict=False)):
            x = name
            for step, constant in chain:
                part = constant[at : at + widths[position]].astype(np.float32).reshape(1, -1, 1, 1)
                x = builder.add(step.op_type, [x, builder.constant(part)])
                before.append(builder.nodes.pop())
            node.input[position] = x
        node.output[0] = chain[-1][0].output[0]
        gone |= {id(step) for step, _ in chain}
        added[id(node)] = before
    builder.nodes = [n for node in builder.nodes if id(node) not in gone for n in (*added.get(id(node), ()), node)]


def convolution_channels(graph: _Graph, name: str, convolutions: set[str]) -> int | None:
    """Output channels of the convolution (of `convolutions`, by weight) that gives this tensor."""
    node = graph.makers.get(name)
    if node is not None and node.op_type == "Add" and graph.value(node.input[1]) is not None:
        node = graph.makers.get(node.input[0])
    if node is None or node.op_type != "Conv" or node.input[1] not in convolutions:
        return None
    weight = graph.value(node.input[1])
    return None if weight is None else weight.shape[0]


def _take_in_padding(graph: _Graph, node: NodeProto) -> None:
    """Padding by zeros before a convolution becomes its own."""
    pad = graph.makers.get(node.input[0])
    if pad is None or pad.op_type != "Pad":
        return
    sides = graph.value(pad.input[1])
    fill = graph.value(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
    if sides is None or fill is None or fill.any() or sides.size != 8 or sides[[0, 1, 4, 5]].any():
        return
    own = next(attribute for attribute in node.attribute if attribute.name == "pads")
    own.ints[:] = [int(a + b) for a, b in zip(own.ints, sides[[2, 3, 6, 7]], strict=True)]
    node.input[0] = pad.input[0]


def _in_integers(builder: Builder, layer: TracedLayer, place: Places) -> None:
    """Give one convolution its integer operands, with what follows it per channel taken in."""
    graph = _Graph(builder)
    node = graph.readers[f"{layer.name}.weight"][0]
    _take_in_padding(graph, node)
    channels, affine, out = layer.codes.shape[0], _Affine(np.ones(layer.codes.shape[0]), np.zeros(1)), node.output[0]
    at_output, gone = _Affine(affine.factor, affine.shift), set()
    for step, constant in graph.chain(out, channels):
        if step.op_type == "Mul":
            affine = _Affine(affine.factor * constant, affine.shift * constant)
        else:
            affine = _Affine(affine.factor, affine.shift + constant)
        out = step.output[0]
        gone.add(id(step))
        if out == place.output:
            at_output = affine
    builder.nodes = [n for n in builder.nodes if id(n) not in gone]
    rounded = _operands(builder, layer, node, affine)
    node.output[0] = place.output = out
    place.codes = f"{layer.name}.codes8"
    ratio = affine.factor / at_output.factor
    place.affine = (ratio, rounded - at_output.shift * ratio)
    _pruned(builder)


def _operands(builder: Builder, layer: TracedLayer, node: NodeProto, affine: _Affine) -> np.ndarray:
    """Codes, scales and bias of a convolution; the shift that the rounded bias makes, [C]."""
    grid, codes = layer.weights, layer.codes.double().numpy()
    channels, each = codes.shape[0], (-1, *(1,) * (codes.ndim - 1))
    widened = max(1, 127 // max(1, int(np.abs(codes).max())))
    inputs = float(layer.activations.scale)
    scale = np.broadcast_to(grid.scale.double().numpy().reshape(-1), (channels,)) / widened * affine.factor
    codes = codes * widened * np.sign(scale).reshape(each)
    shift = np.broadcast_to(affine.shift, (channels,))
    least = np.maximum(np.abs(shift) / (inputs * _LARGEST_BIAS), np.finfo(np.float32).tiny * 2**24)
    kept = np.abs(scale) >= least  # else the channel is its shift, and a product would not show beside it
    scale, codes = np.where(kept, np.abs(scale), least), codes * kept.reshape(each)
    bias = np.round(shift / (inputs * scale))
    stored = builder.constant(codes, np.int8, name=f"{layer.name}.codes")
    builder.initializers.pop(node.input[1], None)
    zero = builder.constant(np.zeros(channels), np.int8)
    operands = [
        ("DequantizeLinear", [stored, builder.constant(scale), zero]),
        (
            "DequantizeLinear",
            [
                builder.constant(bias, np.int32, name=f"{layer.name}.bias"),
                builder.constant(inputs * scale),
                builder.constant(np.zeros(channels), np.int32),
            ],
        ),
    ]
    names, position = [], builder.nodes.index(node)
    for op, reads in operands:
        names.append(builder.add(op, reads, axis=0))
        builder.nodes.insert(position, builder.nodes.pop())
    node.input[:] = [node.input[0], *names]
    return bias * inputs * scale


def _pruned(builder: Builder) -> None:
    """Drop nodes that nobody reads."""
    from common.export.onnx_trace import LOGITS

    while True:
        read = {name for node in builder.nodes for name in node.input} | {LOGITS}
        kept = [node for node in builder.nodes if read & set(node.output)]
        if len(kept) == len(builder.nodes):
            return
        builder.nodes = kept


# --------------------------------------------------------------------------------------------------- calibrated outputs


def _open_outputs(builder: Builder, outputs: Iterable[str]) -> list[str]:
    """The outputs of convolutions in integers that no quantiser takes as its own codes."""
    graph, found = _Graph(builder), []
    for name in outputs:
        readers = graph.readers[name]
        if len(readers) == 1 and readers[0].op_type == "Relu":
            readers = graph.readers[readers[0].output[0]]
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
            found.append(name)
    return found


def _ranges(model: ModelProto, names: list[str], images: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of tensors on the images, zero included."""
    import onnx
    from onnx import helper

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session, found = open_session(shown, torch.get_num_threads()), dict.fromkeys(names, (0.0, 0.0))
    for batch in images:
        for part in batch.split(16):
            values = session.run(names, {IMAGES: part.contiguous().numpy()})
            for name, value in zip(names, values, strict=True):
                low, high = found[name]
                found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found


def _round_outputs(builder: Builder, ranges: dict[str, tuple[float, float]]) -> None:
    """Put every tensor of `ranges` on its 8-bit grid."""
    nodes: list[NodeProto] = []
    for node in builder.nodes:
        nodes.append(node)
        name = node.output[0]
        if name in ranges:
            low, high = ranges[name]
            step = max((high - low) / 255, 1e-12)
            scale = builder.constant(step)
            zero = builder.constant(round(-low / step), np.uint8)
            node.output[0] = f"{name}.exact"
            codes = builder.add("QuantizeLinear", [node.output[0], scale, zero], f"{name}.codes8")
            builder.add("DequantizeLinear", [codes, scale, zero], name)
            nodes += [builder.nodes.pop(-2), builder.nodes.pop()]
    builder.nodes = nodes


# ----------------------------------------------------------------------------------------------------------- the format


@dataclass
class Quantized:
    """The finished file and the same graph before its outputs were rounded."""

    written: Written
    exact: Written
    floats: dict[str, int]
    """Reason -> how many layers keep floats for it."""


def build_int8(traced: Traced, images: Iterable[Tensor]) -> Quantized:
    """The graph for integer kernels, its outputs calibrated on training images [B, C, H, W]."""
    reasons = {layer.name: reason_for_floats(layer) for layer in traced.layers}
    integer = [layer for layer in traced.layers if not reasons[layer.name]]
    builder, places = lower(traced, Lowering(_activation, _weight))
    _split_behind_concatenations(builder, {f"{layer.name}.weight" for layer in integer})
    for layer in integer:
        _in_integers(builder, layer, places[layer.name])
    about = {
        "format": "onnx-int8",
        "arithmetic": f"{len(integer)} of {len(traced.layers)} layers in 8-bit integers whatever their bits (this "
        "backend emulates fewer bits in 8), outputs rounded to calibrated 8-bit grids; the rest in float32",
    }
    exact = finish(traced, builder, places, about)
    outputs = _open_outputs(builder, [places[layer.name].output for layer in integer])
    ranges = _ranges(exact.model, outputs, images) if outputs else {}
    _round_outputs(builder, ranges)
    floats = {reason: sum(r == reason for r in reasons.values()) for reason in set(reasons.values()) - {""}}
    return Quantized(finish(traced, builder, places, about), exact, floats)


def write_int8(source: Source, path: Path) -> None:
    """Write the `onnx-int8` file. Raises ValueError where not one layer would run in integers."""
    traced = traced_of(source)
    reasons = [reason_for_floats(layer) for layer in traced.layers]
    if all(reasons):  # it would be another format under this one's name
        why = "; ".join(sorted(set(reasons))) or "it has no layers"
        raise ValueError(f"no layer of this network can run on 8-bit integer kernels ({why}); take --format onnx")
    built = build_int8(traced, source.training(CALIBRATION_IMAGES))
    write_bytes(path, serialized(source, built.written))


def check_int8(source: Source, path: Path) -> dict[str, Any]:
    """Every layer up to the rounding of its output, and the measured accuracy of the whole on integer kernels.

    Raises ValueError where a layer, fed the network's codes, does not give its outputs (its bias as it was rounded).
    """
    import onnx

    traced = traced_of(source)
    built = build_int8(traced, source.training(CALIBRATION_IMAGES))
    model = onnx.load(str(path))
    opened = Written(_without_rounding(model), built.written.places)
    agreement = checked(
        source,
        path,
        source.network,
        opened.places,
        execute_by_onnxruntime(cut(opened)),
        between_tolerance=None,
    )
    return {
        "bytes": path.stat().st_size,
        "integer_layers": sum(place.codes is not None for place in opened.places.values()),
        "integer_kernels": integer_kernels(path),
        "float_layers": built.floats,
        "layers": agreement.to_json(),
        "whole": compare_whole(source, source.network, OnnxRunner(path)),
    }


def _without_rounding(model: ModelProto) -> ModelProto:
    """The file's graph with every output as it was before its rounding."""
    ends = {
        f"{name.removesuffix('.exact')}": name
        for node in model.graph.node
        for name in node.output
        if name.endswith(".exact")
    }
    kept = [
        node
        for node in model.graph.node
        if node.output[0].removesuffix(".codes8") not in ends and node.output[0] not in ends
    ]
    for node in kept:
        for position, name in enumerate(node.output):
            node.output[position] = name.removesuffix(".exact")
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def integer_kernels(path: Path) -> int:
    """How many convolutions onnxruntime runs on integer kernels here."""
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "as-run.onnx"
        open_session(Path(path), 1, integer=True, save=str(saved))
        return sum(node.op_type in ("QLinearConv", "ConvInteger") for node in onnx.load(str(saved)).graph.node)
