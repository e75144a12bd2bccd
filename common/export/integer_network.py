# SPDX-License-Identifier: Apache-2.0
"""A trained network in integers: its own modules, with every quantised layer in its integer form.

A normalisation that follows quantised layers directly becomes part of their rescaling, one that follows anything else
a scale and a shift per channel; no running statistics stay. Nothing else changes, so that the network keeps its own
forward pass. Constants are computed in float64 and kept in the network's type: of a network in float64 the result
is exact to that type's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.nets import EvaluationNetwork
from common.quant import QuantConv2d, QuantLinear
from common.quant.folding import folds_of, scale_and_shift
from common.quant.integer import (
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    activation_grid,
    weight_codes,
)

QuantLayer = QuantConv2d | QuantLinear


class Affine(nn.Module):
    """x scale + shift, per channel: what a normalisation computes in evaluation mode."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


def layers_of(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every convolution and linear layer of a network, by name; the auxiliary head's are not part of what is used."""
    kinds = (nn.Conv2d, nn.Linear)
    return {n: m for n, m in network.named_modules() if isinstance(m, kinds) and not n.startswith("auxiliary_head.")}


def is_quantized(layer: nn.Module) -> bool:
    """Whether weight or input of a layer are quantised."""
    if not isinstance(layer, QuantLayer):
        return False
    quantizers = (layer.quantize_weight, layer.quantize_activation)
    return any(not isinstance(quantizer, (nn.Identity, nn.ReLU)) for quantizer in quantizers)


def readers_of_sums(network: nn.Module, integer: Callable[[nn.Module], bool]) -> dict[nn.Module, nn.Module]:
    """Layer in integers -> the layer whose sums it reads as they are, as the modules' own `sums()` say."""
    return {
        reader: source
        for module in network.modules()
        if hasattr(module, "sums")
        for source, reader in module.sums()
        if integer(reader)
    }


def refuse_not_finite(network: nn.Module) -> None:
    """Raise ValueError naming the first parameter or buffer that holds infinities or no numbers at all. Ranges of
    quantisers are left to what they give, since infinite ones say that nothing was calibrated.
    """
    for name, value in network.state_dict().items():
        of_quantizer = ".quantize_weight." in name or ".quantize_activation." in name
        if value.is_floating_point() and not of_quantizer and not value.isfinite().all():
            raise ValueError(f"{name}: holds numbers that are not finite; export a training that went well")


Followed = tuple[nn.BatchNorm2d, slice]
"""The normalisation that follows a layer, and the layer's channels there."""


def normalizations_of(network: nn.Module, integer: Callable[[nn.Module], bool]) -> dict[nn.Module, Followed]:
    """Layer -> what follows it, for those normalisations that follow layers of which `integer` is true, alone."""
    found: dict[nn.Module, Followed] = {}
    for module in network.modules():
        for layers, normalization in folds_of(module):
            if isinstance(normalization, nn.BatchNorm2d) and all(map(integer, layers)):
                at = 0
                for layer in layers:
                    found[layer] = (normalization, slice(at, at := at + layer.out_channels))
    return found


@torch.no_grad()
def integer_network(network: EvaluationNetwork) -> nn.Module:
    """A copy of a trained network in integers, in evaluation mode, of the network's own type of constants.

    Raises ValueError naming the layer where a quantiser has no codes, a range was never set, a normalisation has no
    running statistics, or a number is not finite.
    """
    network = copy.deepcopy(network).eval()
    network.auxiliary_head = None  # only a training has a use for it
    refuse_not_finite(network)
    layers = {name: layer for name, layer in layers_of(network).items() if is_quantized(layer)}
    _check_normalizations(network)
    sources, follows = readers_of_sums(network, is_quantized), normalizations_of(network, is_quantized)
    made: dict[nn.Module, IntegerLayer] = {}
    scales: dict[nn.Module, Tensor] = {}
    read = set(sources.values())
    for name, layer in layers.items():
        made[layer] = _integer_layer(name, layer, follows.get(layer), sources, made, scales, layer in read)
    finish_network(network, {name: made[layer] for name, layer in layers.items()}, is_quantized)
    return network.requires_grad_(False)


def finish_network(network: nn.Module, made: dict[str, IntegerLayer], integer: Callable[[nn.Module], bool]) -> None:
    """Put the layers `made`, by name, into a network in place, and the identity where a normalisation is part of them;
    elsewhere a scale and a shift. `integer`: whether a layer of the network is among them.
    """
    absorbed = {normalization for normalization, _ in normalizations_of(network, integer).values()}
    dtype = network_dtype(network)
    for name, layer in made.items():
        _replace(network, name, layer)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            constants = [] if module in absorbed else [c.detach().to(dtype) for c in scale_and_shift(module.double())]
            _replace(network, name, Affine(*constants) if constants else nn.Identity())


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def network_dtype(network: nn.Module) -> torch.dtype:
    """The type of the network's floats: that of the first parameter or buffer of any float type."""
    tensors = (*network.parameters(), *network.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _check_normalizations(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            raise ValueError(
                f"{name}: normalises by each batch's own statistics, so that an image's result depends on its batch; "
                "export a network with running statistics"
            )


def _integer_layer(
    name: str,
    layer: QuantLayer,
    normalization: Followed | None,
    sources: dict[nn.Module, nn.Module],
    made: dict[nn.Module, IntegerLayer],
    scales: dict[nn.Module, Tensor],
    is_read: bool,
) -> IntegerLayer:
    """One layer in integers; notes the scale of its sums in `scales`. What it reads sums of is made already."""
    found = weight_codes(layer, name)
    grid, weight_offset, weight = None, None, layer.weight.detach()
    scale = torch.ones((), dtype=torch.float64)
    if found is not None:
        weight, grid = found
        scale = grid.scale.double()
        weight_offset = None if grid.offset is None else _per_channel(grid.offset.double() / scale)
        scale = _per_channel(scale)
    input_grid, reads_sums = activation_grid(layer, name), 0
    if layer in sources:
        source = made[sources[layer]]
        if not source.exact:
            raise ValueError(f"{name}: reads the sums of a layer whose weight and input are not both quantised")
        reads_sums, scale = source.largest_sum, scale * scales[sources[layer]]
    elif input_grid is not None:
        scale = scale * input_grid.scale.double()
    scales[layer] = scale
    dtype = layer.weight.dtype
    rescale, shift = _output(layer, scale, normalization)
    constants = {
        "rescale": None if is_read else rescale.to(dtype),
        "shift": None if is_read or shift is None else shift.to(dtype),
        "weight_grid": grid,
        "weight_offset": None if weight_offset is None else weight_offset.to(dtype),
        "input_grid": input_grid,
        "reads_sums": reads_sums,
    }
    of_input = () if input_grid is None else (input_grid.scale, input_grid.offset)
    for constant in (*constants.values(), *of_input):
        if isinstance(constant, Tensor) and not constant.isfinite().all():
            raise ValueError(f"{name}: its scales are beyond what {dtype} holds; export a training that went well")
    return integer_form(layer, weight, constants)


def integer_form(layer: nn.Conv2d | nn.Linear, weight: Tensor, constants: dict[str, object]) -> IntegerLayer:
    """The integer layer of a layer's geometry."""
    if isinstance(layer, nn.Linear):
        return IntegerLinear(weight, **constants)
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    return IntegerConv2d(weight, **geometry, pad=layer.padder(), **constants)


def _per_channel(constant: Tensor) -> Tensor:
    return constant.reshape(-1) if constant.numel() > 1 else constant.reshape(())


def _output(layer: QuantLayer, scale: Tensor, normalization: Followed | None) -> tuple[Tensor, Tensor | None]:
    """(rescale, shift) of a layer's sums, in float64: with its bias and the normalisation that follows."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    if normalization is None:
        return scale, bias
    following, channels = normalization
    factor, shift = (value.detach()[channels] for value in scale_and_shift(copy.deepcopy(following).double()))
    return scale * factor, shift if bias is None else shift + bias * factor
