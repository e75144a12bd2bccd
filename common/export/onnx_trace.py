# SPDX-License-Identifier: Apache-2.0
"""A network as an ONNX graph in which quantised operands are still marks: what the writers of ONNX formats begin with.

The network is traced once, by torch's own exporter. Around every convolution and linear layer that could be quantised
stand three marks, operators of the domain MARKS with the layer's number: `Input` (the layer's activation quantiser),
`Weight` (its weight) and `Output` (identity). Each format puts its own operators in their place, from the grids of
`common/quant/integer.py`; everything else (pooling, sums, a user's own operations) is common to all of them.

A normalisation with running statistics is traced as a scale and a shift per channel.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.export.integer_network import is_quantized, readers_of_sums
from common.nets import EvaluationNetwork
from common.quant import QuantConv2d, QuantLinear
from common.quant.integer import Grid, activation_grid, weight_codes, weight_grid

if TYPE_CHECKING:
    from onnx import ModelProto

MARKS = "marks"
OPSET = 21
"""The first with 4-bit integers; 2-bit ones raise it (onnx_graph.py)."""
IMAGES, LOGITS = "images", "logits"
"""Names of the one input [batch, C, H, W] and the one output [batch, classes] of every file."""


@dataclass(frozen=True)
class Operands:
    """What a layer computes with, in integers; each None where it is full precision.

    `codes` [out, in / groups, ...] (int16) with `weights`, their grid; `activations`: the grid of the input; `sums`:
    (bits, scale) of an input that is another layer's sums, integers as they are.
    """

    codes: Tensor | None
    weights: Grid | None
    activations: Grid | None
    sums: tuple[int, float] | None = None


@dataclass(frozen=True)
class TracedLayer:
    """One convolution or linear layer: its name in the network, and its operands.

    `values`: the weight that the layer computes with, quantised or not; `latent`: the one that was trained. `operands`:
    in integers, or why there are none, which only formats that hold integers ask for: they meet it as a ValueError.
    """

    name: str
    operands: Operands | str
    values: Tensor
    latent: Tensor
    kind: str

    @property
    def codes(self) -> Tensor | None:
        """See Operands."""
        return self._integers().codes

    @property
    def weights(self) -> Grid | None:
        """See Operands."""
        return self._integers().weights

    @property
    def activations(self) -> Grid | None:
        """See Operands."""
        return self._integers().activations

    @property
    def sums(self) -> tuple[int, float] | None:
        """See Operands."""
        return self._integers().sums

    def _integers(self) -> Operands:
        if isinstance(self.operands, str):
            raise ValueError(self.operands)
        return self.operands


@dataclass(frozen=True)
class Traced:
    """The marked graph and its layers, in the order of their numbers; `image` is [C, H, W]."""

    model: ModelProto
    layers: tuple[TracedLayer, ...]
    image: tuple[int, int, int]
    classes: int


def quantizable_layers(network: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    """Every layer that could be quantised and is used in evaluation, by name, in the network's order."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, (QuantConv2d, QuantLinear)) and not name.startswith("auxiliary_head.")
    }


def read_layers(network: nn.Module) -> tuple[TracedLayer, ...]:
    """The layers of a network. Raises ValueError that names a layer which has two names."""
    names: dict[nn.Module, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, (QuantConv2d, QuantLinear)) and names.setdefault(module, name) != name:
            raise ValueError(f"{name}: is {names[module]} too, and no format shares layers; give each use its own")
    found, sources = [], readers_of_sums(network, is_quantized)
    for name, layer in quantizable_layers(network).items():
        with torch.no_grad():
            values = layer.quantize_weight(layer.weight).detach().clone()
        kind = "linear" if isinstance(layer, nn.Linear) else "depthwise" if layer.groups > 1 else "convolution"
        operands = _operands(name, layer, sources.get(layer))
        found.append(TracedLayer(name, operands, values, layer.weight.detach(), kind))
    return tuple(found)


def _operands(name: str, layer: QuantConv2d | QuantLinear, source: nn.Module | None) -> Operands | str:
    """A layer in integers, or why it cannot be; `source`: the layer whose sums it reads."""
    try:
        codes, weights = weight_codes(layer, name) or (None, None)
        activations, sums = activation_grid(layer, name), None
        if source is not None:
            sums = layer.activation_bits, float(weight_grid(source).scale * activation_grid(source).scale)
    except ValueError as error:
        return str(error)
    return Operands(codes, weights, activations, sums)


def trace(network: EvaluationNetwork, image: tuple[int, int, int]) -> Traced:
    """Trace a trained network for images [C, H, W]; the batch stays dynamic. The network is left as it is.

    Raises ValueError where torch cannot trace it, or a layer is shared. What only some formats cannot hold, a layer
    without integers, is met where its integers are read.
    """
    marks = _symbolic()
    layers = read_layers(network)
    marked = Logits(_marked(network, marks)).eval()
    dtype = layers[0].values.dtype if layers else torch.float32
    example = torch.zeros(2, *image, dtype=dtype)
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(marked, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            onnx_program = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=[IMAGES],
                output_names=[LOGITS],
                verbose=False,
            )
        except Exception as error:  # torch's exporter raises whatever an operator of one's own makes it meet
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"RUN: torch's exporter cannot trace this network ({reason[0][:200]}); an operation of one's own must "
                "be made of torch operators alone, for any batch"
            ) from error
    model = onnx_program.model_proto
    return Traced(model, layers, image, int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value))


def _symbolic() -> Any:
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it, and says so late)
        from torch.onnx.ops import symbolic
    except ImportError as error:
        raise ValueError(
            f"--format: needs onnx, onnxscript and torch 2.8 or later ({error}); bash scripts/setup.sh export"
        ) from None
    return symbolic


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Mark(nn.Module):
    """One mark on a tensor."""

    def __init__(self, symbolic: Any, kind: str, number: int) -> None:
        super().__init__()
        self.symbolic, self.kind, self.number = symbolic, kind, number

    def forward(self, x: Tensor) -> Tensor:
        return self.symbolic(
            f"{MARKS}::{self.kind}", (x,), {"layer": self.number}, dtype=x.dtype, shape=x.shape, version=1
        )


class _MarkedLayer(nn.Module):
    """A layer with marks in its quantisers' places; a ReLU that it would take in stays outside."""

    folds_relu = False

    def __init__(self, layer: nn.Module, symbolic: Any, number: int) -> None:
        super().__init__()
        mark = _Mark(symbolic, "Input", number)
        relu = isinstance(layer.quantize_activation, nn.ReLU)  # of a full-precision layer type
        layer.quantize_activation = nn.Sequential(nn.ReLU(), mark) if relu else mark
        layer.quantize_weight = _Mark(symbolic, "Weight", number)
        self.layer, self.output = layer, _Mark(symbolic, "Output", number)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return self.output(self.layer(F.relu(x) if relu else x))


class ScaleShift(nn.Module):
    """A normalisation by running statistics, as what it is in evaluation: x scale + shift, [1, C, 1, 1] each."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            shift = torch.zeros_like(scale)
            if norm.affine:
                scale, shift = norm.weight.double() * scale, norm.bias.double()
            shift = shift - norm.running_mean.double() * scale
        kept = norm.running_mean.dtype
        self.scale = nn.Parameter(scale.to(kept).view(1, -1, 1, 1), requires_grad=False)
        self.shift = nn.Parameter(shift.to(kept).view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return x * self.scale + self.shift


class Logits(nn.Module):
    """The network's first output alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def inference_copy(network: EvaluationNetwork) -> EvaluationNetwork:
    """A copy without auxiliary head whose normalisations are scale and shift, in evaluation mode."""
    network = copy.deepcopy(network).eval()
    network.auxiliary_head = None
    network.memory_format = torch.contiguous_format
    for name, module in list(network.named_modules()):
        if type(module) is nn.BatchNorm2d and module.running_mean is not None:
            put(network, name, ScaleShift(module))
    return network.to(memory_format=torch.contiguous_format)


def put(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the network's module of that name."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)


def _marked(network: EvaluationNetwork, symbolic: Any) -> nn.Module:
    network = inference_copy(network)
    for number, (name, layer) in enumerate(quantizable_layers(network).items()):
        put(network, name, _MarkedLayer(layer, symbolic, number))
    return network
