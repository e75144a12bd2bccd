# SPDX-License-Identifier: Apache-2.0
"""Exact cost of a network: parameters, MACs, BitOps, weight and activation memory, layer by layer.

MACs are multiply-accumulates of convolutions and linear layers for one image, groups counted (torch's FlopCounterMode
gives twice as many). BitOps = MACs x weight bits x activation bits, full precision being 32 x 32. The `paper` figure
is the group-blind count of nablaQDARTS's public code (Cin Cout k k Hin Win / stride^2), kept to compare with its
tables.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.nets import Architecture, EvaluationNetwork, network_of
from common.quant import FLOAT_BITS, MixedQuantConv2d, QuantConv2d, QuantLinear


@dataclass(frozen=True)
class LayerShape:
    """What the cost of one convolution or linear layer depends on."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    groups: int
    stride: int
    in_elements: int
    out_pixels: int
    weights: int
    weight_bits: int
    activation_bits: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.out_pixels * self.out_channels * (self.in_channels // self.groups) * self.kernel

    @property
    def paper_size(self) -> float:
        """The reference's `size_product`, in units of one: groups ignored, input pixels over stride squared.

        The reference keeps it in millions as a float32, so that its sums carry that rounding: kept here too.
        """
        filter_size = self.in_channels * self.out_channels * self.kernel * 1e-6 / self.stride
        millions = filter_size * (self.in_elements / self.in_channels)
        return torch.tensor(millions, dtype=torch.float32).item() * 1e6


@dataclass(frozen=True)
class LayerCost:
    """One row of the per-layer table; memory in bytes, activations are the layer's input for one image."""

    name: str
    macs: int
    weight_bits: int
    activation_bits: int
    bitops: int
    weight_bytes: float
    activation_bytes: float
    quantizable: bool


@dataclass(frozen=True)
class Cost:
    """Cost of one network for one image.

    `bitops` counts every convolution and linear layer at its real bits; `bitops_quantized` only those that the methods
    quantise (the cells' convolutions, and the ends when flags quantise them), comparable with the paper's figures;
    `bitops_paper` the same layers in the paper's group-blind accounting. `weight_bytes` packs every quantised weight at
    its bits, everything else at 32; `activation_bytes` sums the inputs of all counted layers at their bits.
    """

    parameters: int
    parameters_with_auxiliary: int
    macs: int
    macs_quantized: int
    bitops: int
    bitops_quantized: int
    bitops_paper: float
    weight_bytes: float
    weight_bytes_fp32: int
    activation_bytes: float
    layers: tuple[LayerCost, ...] = ()

    def to_json(self, per_layer: bool = False) -> dict[str, Any]:
        """A JSON object, with the per-layer rows on request."""
        data = asdict(self)
        if not per_layer:
            del data["layers"]
        return data


def trace_layers(module: nn.Module, input_shape: Sequence[int]) -> list[LayerShape]:
    """Shapes of all convolutions and linear layers that a forward of one image [C, H, W] meets, in call order.

    Nothing is computed: a copy runs on a batch of no images, in evaluation mode. (The meta device would do as well,
    but its operators import torch's compiler, a good second of every start.)
    """
    try:
        return _trace(_shell(module), input_shape, "cpu", images=0)
    except Exception:
        # An operation of the user's own may not take an empty batch, and says so as it likes: a maximum over it is
        # an IndexError, a division by its size a ZeroDivisionError. What is really wrong fails again on one image.
        return _trace(copy.deepcopy(module).to("meta"), input_shape, "meta", images=1)


def _shell(module: nn.Module) -> nn.Module:
    """A copy on the CPU whose weights were never written: their memory is not even touched."""
    own: dict[int, Any] = {}
    for p in module.parameters():
        own[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
    for buffer in module.buffers():
        own[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(module, own)


def _trace(module: nn.Module, input_shape: Sequence[int], device: str, images: int) -> list[LayerShape]:
    module.eval()
    for layer in list(module.modules()):
        if isinstance(layer, (QuantConv2d, QuantLinear)):  # no shape depends on them, and they are most of the time
            layer.quantize_weight = layer.quantize_activation = nn.Identity()
        elif isinstance(layer, MixedQuantConv2d):
            layer.mix_activation = None  # without it no ReLU is folded into the layer
            layer.forward = partial(nn.Conv2d.forward, layer)
    found: list[LayerShape] = []
    names = {m: name for name, m in module.named_modules()}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x, *_), linear = inputs, isinstance(layer, nn.Linear)
        weight = layer.weight
        found.append(
            LayerShape(
                name=names[layer],
                in_channels=layer.in_features if linear else layer.in_channels,
                out_channels=layer.out_features if linear else layer.out_channels,
                kernel=1 if linear else layer.kernel_size[0] * layer.kernel_size[1],
                groups=1 if linear else layer.groups,
                stride=1 if linear else layer.stride[0] * layer.stride[1],
                in_elements=x.shape[1:].numel(),
                out_pixels=1 if linear else output.shape[2] * output.shape[3],
                weights=weight.numel(),
                weight_bits=getattr(layer, "weight_bits", FLOAT_BITS),
                activation_bits=getattr(layer, "activation_bits", FLOAT_BITS),
            )
        )

    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        module(torch.zeros(images, *input_shape, device=device, dtype=_dtype(module)))
    for hook in hooks:
        hook.remove()
    return found


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def image_shape(input_size: int | Sequence[int], in_channels: int) -> tuple[int, int, int]:
    """[C, H, W] of an image from its size: H (= W), (H, W) or (C, H, W)."""
    if isinstance(input_size, int):
        return in_channels, input_size, input_size
    size = tuple(input_size)
    return (in_channels, *size) if len(size) == 2 else (size[0], size[1], size[2])


def network_cost(network: EvaluationNetwork, input_size: int | Sequence[int]) -> Cost:
    """Exact cost of an evaluation network for one image of `input_size` (H, (H, W) or (C, H, W)).

    The auxiliary head is not part of the network that is used, so it counts in `parameters_with_auxiliary` alone.
    Raises ValueError when images of that size do not fit.
    """
    shape = image_shape(input_size, network.in_channels)
    network.check_input(shape[1])
    shapes = trace_layers(network, shape)
    rows = [(layer_cost(s), s) for s in shapes]
    quantized = [(row, s) for row, s in rows if row.quantizable]
    head = {id(p) for p in (network.auxiliary_head.parameters() if network.auxiliary_head else ())}
    parameters = sum(p.numel() for p in network.parameters() if id(p) not in head)
    low = sum(s.weights for s in shapes if s.weight_bits != FLOAT_BITS)
    packed = sum(s.weights * s.weight_bits for s in shapes if s.weight_bits != FLOAT_BITS)
    return Cost(
        parameters=parameters,
        parameters_with_auxiliary=parameters + network.auxiliary_parameters(),
        macs=sum(s.macs for s in shapes),
        macs_quantized=sum(row.macs for row, _ in quantized),
        bitops=sum(row.bitops for row, _ in rows),
        bitops_quantized=sum(row.bitops for row, _ in quantized),
        bitops_paper=sum(s.paper_size * s.weight_bits * s.activation_bits for _, s in quantized),
        weight_bytes=(packed + (parameters - low) * FLOAT_BITS) / 8,
        weight_bytes_fp32=parameters * 4,
        activation_bytes=sum(row.activation_bytes for row, _ in rows),
        layers=tuple(row for row, _ in rows),
    )


def architecture_cost(architecture: Architecture, image_size: int, /, **build: Any) -> Cost:
    """`network_cost` of the network that `network_of` would make; nothing is computed, no random number drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = network_of(architecture, **build)
    return network_cost(network, image_size)


def layer_cost(shape: LayerShape) -> LayerCost:
    """Cost of one layer; quantizable are the cells' convolutions, and whatever is quantised."""
    low = min(shape.weight_bits, shape.activation_bits) < FLOAT_BITS
    return LayerCost(
        name=shape.name,
        macs=shape.macs,
        weight_bits=shape.weight_bits,
        activation_bits=shape.activation_bits,
        bitops=shape.macs * shape.weight_bits * shape.activation_bits,
        weight_bytes=shape.weights * shape.weight_bits / 8,
        activation_bytes=shape.in_elements * shape.activation_bits / 8,
        quantizable=low or shape.name.startswith("cells."),
    )
