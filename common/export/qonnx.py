# SPDX-License-Identifier: Apache-2.0
"""The format `qonnx`: one Quant node for every quantised tensor, at its own width; executed and counted by qonnx.

A Quant node computes (round(clip(x / scale + zero, lowest, highest)) - zero) scale. Its clip is that of signed or
unsigned integers of its width, so that a grid is written by its indices where its codes are no such range: scale is
multiplier x scale, zero is -base / multiplier - offset / scale, which for a mid-rise grid is no whole number (1.5 at 2
bits). qonnx computes with such a zero as with any other. Its cost counter takes a width from a Quant node only where
the zero is 0; it is asked about a copy in which all zeros are 0, since no count depends on them.

Activations whose ties fall otherwise (the sign, ternary) or whose levels are no whole range of integers are put on
their grid by standard operators first; the Quant node behind them changes nothing and says the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cost import network_cost
from common.engine.files import write_bytes
from common.export.formats import Source
from common.export.onnx_check import cut
from common.export.onnx_formats import checked, compare_whole, serialized, traced_of
from common.export.onnx_graph import Builder, Lowering, Written, finish, lower, quantize_exactly
from common.export.onnx_runtime import OnnxRunner
from common.export.onnx_trace import IMAGES, Traced, TracedLayer
from common.export.qonnx_runtime import execute_by_qonnx, package, refused, with_shapes
from common.quant.integer import Grid

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

DOMAIN = "qonnx.custom_op.general"
CHECKED_IMAGES = 32
"""A file is checked on so many test images: qonnx's executor walks the graph anew for every node of every batch."""


# ------------------------------------------------------------------------------------------------------------ the graph


def _quant(
    builder: Builder,
    x: str,
    out: str,
    *,
    bits: int,
    scale: Any,
    zero: Any = 0.0,
    signed: bool = False,
    narrow: bool = False,
    rounding: str = "ROUND",
) -> None:
    constants = [builder.constant(scale), builder.constant(zero), builder.constant(float(bits))]
    builder.add(
        "Quant",
        [x, *constants],
        out,
        domain=DOMAIN,
        signed=int(signed),
        narrow=int(narrow),
        rounding_mode=rounding,
    )


def _quant_on(builder: Builder, grid: Grid, x: str, out: str) -> None:
    """A Quant node with the levels of a grid."""
    rounding = "HALF_UP" if grid.rounding == "up" else "ROUND"
    half = 2 ** (grid.bits - 1)
    ranged = grid.lowest in (-half, 1 - half) and grid.highest == half - 1 and grid.bits > 1
    # HALF_UP is away from zero: what we mean for indices alone
    if ranged and grid.multiplier == 1 and grid.offset is None and rounding == "ROUND":
        narrow = grid.lowest == 1 - half
        _quant(builder, x, out, bits=grid.bits, scale=grid.scale.numpy(), signed=True, narrow=narrow)
        return
    scale = grid.scale.double() * grid.multiplier
    zero = -grid.base / grid.multiplier - (0.0 if grid.offset is None else grid.offset.double() / scale)
    zero = zero if isinstance(zero, float) else zero.numpy()
    _quant(builder, x, out, bits=grid.bits, scale=scale.numpy(), zero=zero, rounding=rounding)


def _activation(builder: Builder, layer: TracedLayer, x: str, out: str) -> None:
    grid = layer.activations
    if grid is None:
        if layer.sums is None:
            builder.add("Identity", [x], out)
        else:  # whole numbers already
            _quant(builder, x, out, bits=layer.sums[0], scale=layer.sums[1], signed=True)
        return
    half, whole = 2 ** (grid.bits - 1), grid.levels == 2**grid.bits
    narrow = grid.multiplier == 1 and grid.lowest == 1 - half and grid.highest == half - 1
    if grid.rounding in ("even", "up") and (whole or narrow):
        _quant_on(builder, grid, x, out)
        return
    on_grid = builder.fresh()
    quantize_exactly(builder, layer, x, on_grid)
    _quant_on(builder, grid, on_grid, out)


def _weight(builder: Builder, layer: TracedLayer, out: str) -> None:
    values = layer.values.contiguous().numpy()
    if layer.weights is None:
        builder.constant(values, name=out)
        return
    _quant_on(builder, layer.weights, builder.constant(values, name=f"{layer.name}.values"), out)


def build_qonnx(traced: Traced) -> Written:
    """The graph of the `qonnx` format."""
    builder, places = lower(traced, Lowering(_activation, _weight))
    about = {
        "format": "qonnx",
        "arithmetic": "float32 by qonnx's own executor, node by node: a reference for other tools, not made for speed",
    }
    return finish(traced, builder, places, about, {DOMAIN: 1})


def counted(model: ModelProto, image: tuple[int, int, int]) -> dict[str, float]:
    """BitOps, MACs and bits of weights by qonnx's own counter, for one image [C, H, W].

    Its usual preparation takes minutes where nodes are many; of it, types and constant weights are what counts need.
    """
    from onnx import numpy_helper
    from qonnx.analysis.inference_cost import inference_cost
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.inference_cost import compute_bops_and_macs, compute_mem_bits_and_elems

    wrapped = with_shapes(model, {IMAGES: (1, *image)})
    graph, values = wrapped.graph, {tensor.name: tensor for tensor in wrapped.graph.initializer}
    for number, node in enumerate(graph.node):
        node.name = f"node{number}"
        if node.op_type == "Quant":
            zero = numpy_helper.to_array(values[node.input[2]])
            node.input[2] = f"{node.output[0]}.zero"
            graph.initializer.append(numpy_helper.from_array(np.zeros_like(zero), node.input[2]))
    wrapped = wrapped.transform(InferDataTypes(allow_scaledint_dtypes=True))
    graph = wrapped.graph
    for node in [node for node in graph.node if node.op_type == "Quant" and node.input[0] in values]:
        constant = graph.initializer.add()
        constant.CopyFrom(values[node.input[0]])
        constant.name = node.output[0]
        graph.node.remove(node)
    found = wrapped.analysis(lambda model: inference_cost(model, discount_sparsity=False))["total_cost"]
    bitops, macs = compute_bops_and_macs(found)
    return {"bitops": bitops, "macs": macs, "weight_bits": compute_mem_bits_and_elems(found, "mem_w")[0]}


# ----------------------------------------------------------------------------------------------------------- the format


def write_qonnx(source: Source, path: Path) -> None:
    """Write the `qonnx` file."""
    package()
    write_bytes(path, serialized(source, build_qonnx(traced_of(source))))


def _first(batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The first CHECKED_IMAGES of batches of images and labels."""
    left = CHECKED_IMAGES
    for x, labels in batches():
        yield x[:left], labels[:left]
        left -= len(x)
        if left <= 0:
            return


def check_qonnx(source: Source, path: Path) -> dict[str, Any]:
    """The file in qonnx, layer by layer and as a whole, and qonnx's counts beside the cost model's.

    On the first CHECKED_IMAGES test images; `images` of the figures says on how many. Raises ValueError where a layer
    or a count differs.
    """
    import onnx

    source = replace(source, test=partial(_first, source.test))
    images = sum(len(x) for x, _ in source.test())
    source.say(f"qonnx: its own executor is slow; checking {images} images")
    written = build_qonnx(traced_of(source))
    written.model = onnx.load(str(path))
    agreement = checked(source, path, source.network, written.places, execute_by_qonnx(cut(written)))
    cost = network_cost(source.network, source.image_shape)
    try:
        found = counted(written.model, source.image_shape)
    except Exception as error:  # qonnx asserts, and raises Exception itself
        raise refused(f"{path}", "count", error) from error
    ours = {
        "bitops": cost.bitops,
        "macs": cost.macs,
        "weight_bits": 8 * sum(layer.weight_bytes for layer in cost.layers),
    }
    for name, value in ours.items():
        if value != found[name]:
            raise ValueError(f"{path}: qonnx counts {found[name]:,.0f} {name}, the cost model {value:,.0f}")
    whole = compare_whole(source, source.network, OnnxRunner(path))
    return {
        "bytes": path.stat().st_size,
        "images": images,
        "counts": found,
        "layers": agreement.to_json(),
        "whole": whole,
    }
