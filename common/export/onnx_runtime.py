# SPDX-License-Identifier: Apache-2.0
"""ONNX files in onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.export.onnx_check import Execute
from common.export.onnx_trace import IMAGES

if TYPE_CHECKING:
    from onnx import ModelProto

_INEXACT = ("ConvMulFusion",)
"""Left out: it moves the factor behind a convolution into its weights, so that sums which cancel exactly no longer do;
a binary activation takes the sign of what is left."""


def onnxruntime() -> Any:
    """The package, or ValueError with how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--format: needs onnxruntime ({error}); bash scripts/setup.sh export") from None
    return onnxruntime


def open_session(
    model: ModelProto | Path,
    threads: int | None = None,
    *,
    integer: bool = False,
    save: str = "",
    where: str = "the graph",
) -> Any:
    """A session on the CPU. Stored weights are widened once, when the file is loaded, unless `integer`: then what
    stands between quantised tensors runs on integer kernels where there are any. `save`: where to put the graph as it
    runs. Raises ValueError, beginning with the path or `where`, where onnxruntime cannot load it.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if save:
        options.optimized_model_filepath = save
    if not integer:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source, where = (str(model), f"{model}") if isinstance(model, Path) else (model.SerializeToString(), where)
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=None if integer else _INEXACT
        )
    except Exception as error:  # its own exceptions derive from Exception alone
        raise ValueError(
            f"{where}: onnxruntime {ort.__version__} cannot load it ({str(error)[:300]}); 2-bit weights need a newer "
            "one (pip install -U onnxruntime)"
        ) from error


def run_session(session: Any, names: list[str] | None, feeds: dict[str, np.ndarray], where: str) -> list[np.ndarray]:
    """The outputs of a session. Raises ValueError, beginning with `where`, for what onnxruntime raises."""
    try:
        return session.run(names, feeds)
    except Exception as error:  # its own exceptions derive from Exception alone
        raise ValueError(
            f"{where}: onnxruntime {onnxruntime().__version__} cannot run it ({str(error).strip()[:300]}); export the "
            "run again, or use a newer one (pip install -U onnxruntime)"
        ) from error


def execute_by_onnxruntime(model: ModelProto) -> Execute:
    """A cut graph in onnxruntime."""
    session = open_session(model, threads=torch.get_num_threads())
    names = [output.name for output in session.get_outputs()]
    known = {entry.name for entry in session.get_inputs()}

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: value for name, value in feeds.items() if name in known}
        values = run_session(session, names, given, "the graph, cut at its layers")
        return dict(zip(names, values, strict=True))

    return run


class OnnxRunner:
    """An ONNX file of any of the formats; what it says of itself is in its metadata."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnx

        self.path, self.threads = Path(path), threads
        try:
            model = onnx.load(str(path))
        except Exception as error:  # whatever the parser meets in a damaged file
            raise ValueError(f"{path}: is no ONNX file ({str(error)[:200]}); export the run again") from error
        about = {entry.key: entry.value for entry in model.metadata_props}
        if not {"format", "arithmetic"} <= about.keys():
            raise ValueError(
                f"{path}: was not written by export.py (its metadata name no format); give a file that was"
            )
        self.name, self.arithmetic = about["format"], about["arithmetic"]
        if self.name == "qonnx":
            from common.export.qonnx_runtime import executor_of

            self._run = executor_of(model, f"{path}")
        else:
            session = open_session(model, threads, integer=self.name == "onnx-int8", where=f"{path}")
            self._run = lambda images: run_session(session, None, {IMAGES: images}, f"{path}")[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return torch.from_numpy(self._run(images.contiguous().numpy()))
