# SPDX-License-Identifier: Apache-2.0
"""ONNX files with Quant nodes in qonnx, its own executor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from common.export.onnx_check import Execute
from common.export.onnx_trace import IMAGES, LOGITS

if TYPE_CHECKING:
    from onnx import ModelProto


def package() -> Any:
    """qonnx, or ValueError with how to get it."""
    try:
        import qonnx
    except ImportError as error:
        raise ValueError(f"--format qonnx: needs qonnx ({error}); bash scripts/setup.sh export") from None
    return qonnx


def with_shapes(model: ModelProto, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A model of fixed input shapes for qonnx, every other shape inferred."""
    import onnx

    package()
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for entry in fixed.graph.input:
        del entry.type.tensor_type.shape.dim[:]
        for size in shapes[entry.name]:
            entry.type.tensor_type.shape.dim.add().dim_value = size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in fixed.graph.output:  # known by what gives them
            entry.type.tensor_type.ClearField("shape")
        return ModelWrapper(fixed).transform(InferShapes())


def refused(where: str, what: str, error: Exception) -> ValueError:
    """What qonnx, or a package below it, raised, as an error that begins with `where`."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{where}: qonnx cannot {what} it ({type(error).__name__}: {reason[:200]}); export the run again, or in the "
        "other formats"
    )


def _executing(model: ModelProto, where: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    prepared: dict[tuple[Any, ...], Any] = {}

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        package()
        from qonnx.core.onnx_exec import execute_onnx

        shapes = {name: value.shape for name, value in feeds.items()}
        key = tuple(sorted(shapes.items()))
        try:
            if key not in prepared:
                prepared.clear()
                prepared[key] = with_shapes(model, shapes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return execute_onnx(prepared[key], feeds)
        except Exception as error:  # it asserts, and raises Exception itself
            raise refused(where, "execute", error) from error

    return run


def executor_of(model: ModelProto, where: str) -> Callable[[np.ndarray], np.ndarray]:
    """Images -> logits, by qonnx. `where`: the file, named in errors."""
    run = _executing(model, where)
    return lambda images: run({IMAGES: images})[LOGITS]


def execute_by_qonnx(model: ModelProto) -> Execute:
    """A cut graph in qonnx."""
    run = _executing(model, "the graph, cut at its layers")
    known = {entry.name for entry in model.graph.input}
    return lambda feeds: run({name: value for name, value in feeds.items() if name in known})
