# SPDX-License-Identifier: Apache-2.0
"""Marks -> operators: the `onnx` format, the plain fp32 one, and the tools that the other ONNX formats share.

`onnx` is exact in definition and computes in floats. Weights are stored as indices of their grid in 2, 4 or 8 bits
(UINT2, UINT4, UINT8: the narrowest that holds them):

    value = DequantizeLinear(index, scale', zero) + rest,    scale' = multiplier x scale,
    zero = the integer next to -base / multiplier,    rest = scale (base + multiplier zero) + offset,

so that a mid-rise weight adds half a step, and a grid with a level zero adds nothing. Activations pass through the
quantiser's own steps (`common.quant.integer.encode`): division, rounding, clipping, product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from common.export.onnx_trace import IMAGES, LOGITS, MARKS, Traced, TracedLayer
from common.quant.integer import Grid, indices_of
from common.quant.packing import pack
from common.quant.quantizers import ZERO

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSET_2_BITS = 25
"""The first with UINT2."""
_IR_2_BITS = 13
_STORED = ((2, "UINT2"), (4, "UINT4"), (8, "UINT8"))


@dataclass
class Places:
    """The tensors of one layer in a written graph: before its activation quantiser, after it, and the layer's output.

    `codes`: where the layer takes integers as they are, their tensor, which stands in for `quantized`. `affine`: a
    factor and a shift per channel that the output has taken in.
    """

    before: str
    quantized: str
    output: str
    codes: str | None = None
    affine: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class Written:
    """A finished model, where its layers are in it, and what there is to say about how it computes."""

    model: ModelProto
    places: dict[str, Places]
    notes: list[str] = field(default_factory=list)


class Builder:
    """Nodes and constants of a graph under construction; equal constants are stored once."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def fresh(self) -> str:
        """A new tensor name."""
        self._count += 1
        return f"t{self._count}"

    def constant(self, value: Any, dtype: Any = np.float32, name: str | None = None) -> str:
        """The name of an initializer with this value."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype=dtype, order="C")  # ascontiguousarray would give a scalar a dimension
        key = (array.dtype.str, array.shape, array.tobytes())
        if name is None and key in self._shared:
            return self._shared[key]
        name = name or f"c{len(self.initializers)}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        self._shared.setdefault(key, name)
        return name

    def stored(self, indices: Tensor, bits: int, name: str) -> tuple[str, str]:
        """(name of an initializer with indices 0 ... 2^bits - 1 in the narrowest type, name of that type).

        Raises ValueError where the installed onnx has no such type.
        """
        import onnx

        width, kind = next((width, kind) for width, kind in _STORED if bits <= width)
        if not hasattr(onnx.TensorProto, kind):
            raise ValueError(
                f"--format: {name} has {bits} bits, and onnx {onnx.__version__} knows no {kind}; install onnx 1.20 or "
                "newer (bash scripts/setup.sh export)"
            )
        tensor = onnx.TensorProto(name=name, data_type=getattr(onnx.TensorProto, kind), dims=indices.shape)
        tensor.raw_data = pack(indices, width).numpy().tobytes()
        self.initializers[name] = tensor
        return name, kind

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **more: Any) -> str:
        """Append a node; the name of its output."""
        from onnx import helper

        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [output], **more))
        return output


@dataclass
class Lowering:
    """What a format puts in the marks' places: (builder, layer, tensor in, tensor out), and (builder, layer, out)."""

    activation: Callable[[Builder, TracedLayer, str, str], None]
    weight: Callable[[Builder, TracedLayer, str], None]


def lower(traced: Traced, lowering: Lowering) -> tuple[Builder, dict[str, Places]]:
    """Put a format's operators in the marks' places: the new nodes and constants, and where each layer is.

    Raises ValueError for a layer that the network uses twice.
    """
    builder, places, names = Builder(), {}, {IMAGES: IMAGES, LOGITS: LOGITS, "": ""}
    source = {tensor.name: tensor for tensor in traced.model.graph.initializer}
    weights = {node.input[0] for node in traced.model.graph.node if node.domain == MARKS and node.op_type == "Weight"}
    for name, tensor in source.items():
        if name not in weights:
            from onnx import numpy_helper

            array = numpy_helper.to_array(tensor)
            names[name] = builder.constant(array, array.dtype)
    for node in traced.model.graph.node:
        if node.domain != MARKS:
            _copied(builder, node, names)
            continue
        layer = traced.layers[node.attribute[0].i]
        out, place = names.get(node.output[0]), places.setdefault(layer.name, Places("", "", ""))
        if node.op_type == "Input":
            if place.before:
                raise ValueError(
                    f"{layer.name}: is used twice in one pass, which no format holds; give each use its own"
                )
            place.before, place.quantized = names[node.input[0]], f"{layer.name}.input"
            names[node.output[0]] = place.quantized
            lowering.activation(builder, layer, place.before, place.quantized)
        elif node.op_type == "Weight":
            names[node.output[0]] = f"{layer.name}.weight"
            lowering.weight(builder, layer, names[node.output[0]])
        else:
            place.output = f"{layer.name}.output"
            _rename(builder, names[node.input[0]], place.output)
            names[node.output[0]] = out or place.output
            if out:  # the layer's output is the network's
                builder.add("Identity", [place.output], out)
    return builder, places


def _copied(builder: Builder, node: NodeProto, names: dict[str, str]) -> None:
    """Append a copy of a node under the new names, without the exporter's notes."""
    import onnx

    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    del copied.metadata_props[:]
    copied.name = copied.doc_string = ""
    for output in node.output:
        names.setdefault(output, builder.fresh() if output else "")
    copied.input[:] = [names[name] for name in node.input]
    copied.output[:] = [names[name] for name in node.output]
    builder.nodes.append(copied)


def _rename(builder: Builder, old: str, new: str) -> None:
    """Rename a tensor among the nodes so far; the newest are looked at first, since it was made just now."""
    for node in reversed(builder.nodes):
        for side in (node.input, node.output):
            for position, name in enumerate(side):
                if name == old:
                    side[position] = new
        if new in node.output:
            return


def finish(
    traced: Traced,
    builder: Builder,
    places: dict[str, Places],
    about: dict[str, str],
    opset: dict[str, int] | None = None,
) -> Written:
    """The model of what was built; `about` becomes its metadata. Raises ValueError where onnx's checker refuses it."""
    import onnx
    from onnx import helper

    two_bits = any(
        tensor.data_type == getattr(onnx.TensorProto, "UINT2", -1) for tensor in builder.initializers.values()
    )
    imports = {entry.domain: entry.version for entry in traced.model.opset_import if entry.domain != MARKS}
    imports |= opset or {}
    if two_bits:
        imports[""] = max(imports[""], OPSET_2_BITS)
    used = {name for node in builder.nodes for name in node.input}
    images = helper.make_tensor_value_info(IMAGES, onnx.TensorProto.FLOAT, ["batch", *traced.image])
    logits = helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, ["batch", traced.classes])
    initializers = [tensor for name, tensor in builder.initializers.items() if name in used]
    graph = helper.make_graph(builder.nodes, "network", [images], [logits], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*pair) for pair in sorted(imports.items())])
    model.ir_version = _IR_2_BITS if two_bits else traced.model.ir_version
    model.producer_name = "qdarts"
    helper.set_model_props(model, about)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"--format: onnx's checker refuses the graph ({str(error)[:300]}); report this") from error
    return Written(model, places)


# ------------------------------------------------------------------------------------------------------ the formats


def write_exact(traced: Traced) -> Written:
    """The `onnx` format."""
    builder, places = lower(traced, Lowering(quantize_exactly, stored_weight))
    about = {
        "format": "onnx",
        "arithmetic": "float32: weights stored at 2, 4 or 8 bits and widened when loaded, activations rounded to their "
        "grids in floats",
    }
    return finish(traced, builder, places, about)


def write_float(traced: Traced) -> Written:
    """The same network without quantisers, every weight in fp32: what the other files are compared with."""
    builder, places = lower(traced, Lowering(pass_on, latent_weight))
    return finish(traced, builder, places, {"format": "onnx-fp32", "arithmetic": "float32, nothing quantised"})


def pass_on(builder: Builder, layer: TracedLayer, x: str, out: str) -> None:
    """No quantiser."""
    builder.add("Identity", [x], out)


def latent_weight(builder: Builder, layer: TracedLayer, out: str) -> None:
    """The weight that was trained."""
    builder.constant(layer.latent.contiguous().numpy(), name=out)


def stored_weight(builder: Builder, layer: TracedLayer, out: str) -> None:
    """A weight as indices of its grid, widened."""
    if layer.codes is None or layer.weights is None:
        builder.constant(layer.values.contiguous().numpy(), name=out)
        return
    grid = layer.weights
    indices, kind = builder.stored(indices_of(layer.codes, grid), grid.bits, f"{layer.name}.codes")
    zero = (-grid.base + grid.multiplier // 2) // grid.multiplier
    zero = min(max(zero, 0), 2**grid.bits - 1)
    per_channel = grid.scale.numel() > 1
    scale = builder.constant((grid.scale * grid.multiplier).reshape(-1 if per_channel else ()).numpy())
    zeros = indices_of_zero(builder, zero, grid, kind)
    axis = {"axis": 0} if per_channel else {}
    rest = grid.scale * (grid.base + grid.multiplier * zero) + (0 if grid.offset is None else grid.offset)
    if not rest.any():
        builder.add("DequantizeLinear", [indices, scale, zeros], out, **axis)
        return
    widened = builder.add("DequantizeLinear", [indices, scale, zeros], **axis)
    builder.add("Add", [widened, builder.constant(rest.numpy())], out)


def indices_of_zero(builder: Builder, zero: int, grid: Grid, kind: str) -> str:
    """A zero point of an index's type: a scalar, or one for each channel."""
    import torch

    count = grid.scale.numel()
    name = f"zero{zero}.{kind}" + (f".{count}" if count > 1 else "")
    if name not in builder.initializers:
        shape = (count,) if count > 1 else ()
        builder.stored(torch.full(shape, zero, dtype=torch.uint8), grid.bits, name)
    return name


def quantize_exactly(builder: Builder, layer: TracedLayer, x: str, out: str) -> None:
    """An activation quantiser by its own steps."""
    grid = layer.activations
    if grid is None:
        builder.add("Identity", [x], out)
        return
    scale = builder.constant(grid.scale.numpy())
    if grid.offset is None:
        builder.add("Mul", [code_of(builder, grid, x), scale], out)
    else:
        value = builder.add("Mul", [code_of(builder, grid, x), scale])
        builder.add("Add", [value, builder.constant(grid.offset.numpy())], out)


def code_of(builder: Builder, grid: Grid, x: str) -> str:
    """The code of every value of x, in floats: `common.quant.integer.encode` as operators."""
    one = builder.constant(1.0)
    if grid.rounding == "sign":
        above = builder.add("Greater", [x, builder.constant(ZERO)])
        return builder.add("Where", [above, one, builder.constant(-1.0)])
    if grid.rounding == "ternary":
        half, minus = builder.constant(0.5), builder.constant(-0.5)
        high = builder.add("Cast", [builder.add("Greater", [x, half])], to=1)
        low = builder.add("Cast", [builder.add("LessOrEqual", [x, minus])], to=1)
        return builder.add("Sub", [high, low])
    if grid.offset is not None:
        x = builder.add("Sub", [x, builder.constant(grid.offset.numpy())])
    x = builder.add("Div", [x, builder.constant(grid.scale.numpy())])
    first = -(grid.base % grid.multiplier)
    if grid.multiplier != 1:
        x = builder.add("Sub", [x, builder.constant(float(first))])
        x = builder.add("Div", [x, builder.constant(float(grid.multiplier))])
    if grid.rounding == "even":
        x = builder.add("Round", [x])
    else:
        x = builder.add("Floor", [builder.add("Add", [x, builder.constant(0.5)])])
    if grid.multiplier != 1:
        x = builder.add("Mul", [x, builder.constant(float(grid.multiplier))])
        x = builder.add("Add", [x, builder.constant(float(first))])
    return builder.add("Clip", [x, builder.constant(float(grid.lowest)), builder.constant(float(grid.highest))])
