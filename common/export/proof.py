# SPDX-License-Identifier: Apache-2.0
"""The packed file written, and the proof that it computes what the trained network computes.

The constants on disk are those of the network's form in float64, to float32's rounding, and its codes are those of a
form made anew. Three statements then, from the strictest to the plainest:

1. In float64, through the very file format, all codes of all layers are equal to the network's and so are the logits,
   to 1e-9. What the format holds is the network: nothing but rounding is left between them.
2. In float32, every layer of the file that is fed the network's own codes gives the network's own sums, as integers
   and exactly, and its output behind the normalisation, to 1e-4.
3. In float32 from image to logits a value that lies on the border of two levels may fall to either side, here as on any
   two machines: how many codes do, and how many images are classified alike, is counted over the whole test set.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cost import network_cost
from common.engine.files import write_bytes
from common.export.formats import Source
from common.export.integer_network import (
    Followed,
    integer_network,
    is_quantized,
    layers_of,
    normalizations_of,
    readers_of_sums,
)
from common.export.packed import Description, from_bytes, packed_bytes_of, read_packed, read_tensors, tensors_of
from common.quant.folding import scale_and_shift
from common.quant.integer import Grid, IntegerLayer, activation_grid, weight_grid

CHECKED_IMAGES = 1000
"""How many images statements 1 and 2 are checked on; 3 takes every test image."""
LOGIT_TOLERANCE = 1e-9
"""Of statement 1, relative to the largest logit where that is above 1."""
CONSTANT_TOLERANCE = 1e-6
"""Of constants on disk, relative: float32's rounding of the number itself and of a standard deviation."""
OUTPUT_TOLERANCE = 1e-4
"""Of a layer's outputs on the same codes, relative to the largest of them."""
_TINY = 1e-37  # below it float32 keeps fewer digits
_CODES_AT_ONCE = 2**26  # codes that are held at a time, of four or eight bytes each

Figures = dict[str, Any]


def describe(source: Source) -> Description:
    """What the file says of the network."""
    return Description(source.architecture, source.build, source.folded, source.data)


def write_packed(source: Source, path: Path) -> None:
    """Write the packed file. Raises ValueError naming the layer that has no codes."""
    write_bytes(path, packed_bytes_of(integer_network(source.network), describe(source)))


def check_packed(source: Source, path: Path) -> Figures:
    """What is said above of a written file, and its size. Raises ValueError naming the file where it does not hold."""
    check_stored(source, path)
    packed, figures = read_packed(path).network, {"size": size_figures(source, path)}
    figures["float64"] = found = exact_figures(source, str(path))
    source.say(f"packed: all {found['codes']:,} codes of {found['images']:,} images are equal in float64")
    figures["layers"] = found = layer_figures(source, packed, str(path))
    source.say(f"packed: {found['sums']:,} sums of {found['layers']} layers are equal in float32, on the same codes")
    source.say("packed: from image to logits in float32")
    figures["float32"] = whole_figures(source, packed)
    return figures


# ------------------------------------------------------------------------------------------------------------- the size


def size_figures(source: Source, path: Path) -> Figures:
    """The file's bytes beside the cost model's; `within`: whether they are no more than its count allows."""
    cost, size = network_cost(source.network, source.image_shape), path.stat().st_size
    allowed = int(1.05 * cost.weight_bytes + 100 * len(cost.layers))
    return {
        "bytes": size,
        "weight_bytes": cost.weight_bytes,
        "weight_bytes_fp32": cost.weight_bytes_fp32,
        "layers": len(cost.layers),
        "allowed": allowed,
        "within": size <= allowed,
        "of_fp32": size / cost.weight_bytes_fp32,
    }


# -------------------------------------------------------------------------------------------------- what was written


def check_stored(source: Source, path: Path) -> None:
    """Hold the file's tensors against forms of the network made anew: integers against the one in float32, where the
    codes were computed, constants against the one in float64. Raises ValueError naming the file and the tensor.
    """
    stored, fresh = read_tensors(path), tensors_of(integer_network(source.network))
    exact = tensors_of(integer_network(copy.deepcopy(source.network).double()))
    if stored.keys() != fresh.keys():
        raise ValueError(f"{path}: holds other tensors than the network has; export it again")
    for name, value in stored.items():
        constant = name in ("scales", "floats")
        expected = exact[name] if constant else fresh[name]
        equal = value.shape == expected.shape and value.dtype == fresh[name].dtype
        if equal and constant:
            equal = torch.allclose(value.double(), expected, rtol=CONSTANT_TOLERANCE, atol=_TINY)
        elif equal:
            equal = torch.equal(value, expected)
        if not equal:
            raise ValueError(f"{path}: its {name} are not the network's; export it again")


# ---------------------------------------------------------------------------------------------------- looking at layers


@dataclass(frozen=True)
class Inputs:
    """How a layer's input becomes codes: a grid, or the scale of the sums that it reads."""

    grid: Grid | None
    sums_scale: float | None

    def codes(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The codes of what the layer computes with, whole numbers as floats; x is its input behind a ReLU."""
        if self.grid is None:  # sums may be beyond what float32 counts
            return (x.double() / self.sums_scale).round_()
        value = layer.quantize_activation(x)
        value = value if self.grid.offset is None else value - self.grid.offset
        return (value / self.grid.scale).round_()


def inputs_of(network: nn.Module) -> dict[str, Inputs]:
    """The inputs of all layers of a trained network that read codes, by name."""
    layers = {name: layer for name, layer in layers_of(network).items() if is_quantized(layer)}
    sources, found = readers_of_sums(network, is_quantized), {}
    for name, layer in layers.items():
        grid = activation_grid(layer, name)
        if layer in sources:
            source = sources[layer]
            scales = weight_grid(source).scale.double() * activation_grid(source).scale.double()
            found[name] = Inputs(None, float(scales))
        elif grid is not None:
            found[name] = Inputs(grid, None)
    return found


@contextmanager
def followed(network: nn.Module, names: Iterable[str], note: Callable[..., None]) -> Iterator[None]:
    """Within it, `note(name, layer, x, output)` follows every forward of the layers of these names; x is what came in,
    behind its ReLU where the layer has one to itself.
    """

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], output: Tensor) -> None:
            relu = keywords.get("relu", False) or (len(inputs) > 1 and inputs[1])
            note(name, layer, F.relu(inputs[0]) if relu else inputs[0], output)

        return hook

    handles = [network.get_submodule(n).register_forward_hook(hook_of(n), with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Flips:
    """Two networks on the same images: the codes of all layers, and the logits."""

    images: int = 0
    codes: int = 0
    flipped: int = 0
    largest_logit_difference: float = 0.0
    largest_logit: float = 0.0
    agree: int = 0
    correct: int = 0
    correct_packed: int = 0
    by_layer: dict[str, int] = field(default_factory=dict)

    @property
    def flipped_share(self) -> float:
        """Flipped codes among all."""
        return self.flipped / max(1, self.codes)

    def to_json(self) -> Figures:
        """The figures; shares in place of what was counted for them."""
        images = max(1, self.images)
        figures = asdict(self) | {"flipped_share": self.flipped_share}
        del figures["by_layer"], figures["agree"], figures["correct"], figures["correct_packed"]
        return figures | {
            "top1_agreement": self.agree / images,
            "top1": self.correct / images,
            "top1_packed": self.correct_packed / images,
        }


@torch.inference_mode()
def compare(
    network: nn.Module, packed: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], images: int | None = None
) -> Flips:
    """Count where the codes and logits of a network and of its packed form differ, on at most `images` images."""
    inputs, found = inputs_of(network), Flips()
    kept: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        kept[name] = inputs[name].codes(x, layer)

    def count_flips(name: str, layer: IntegerLayer, x: Tensor, output: Tensor) -> None:
        codes, expected = layer.encode(x), kept.pop(name)
        flips = int((codes != expected).sum())
        found.codes, found.flipped = found.codes + expected.numel(), found.flipped + flips
        if flips:
            found.by_layer[name] = found.by_layer.get(name, 0) + flips

    dtype = next(p.dtype for p in network.parameters())
    for x, labels in _few_at_once(batches, network, images):
        x = x.to(dtype)
        with followed(network, inputs, keep):
            expected = network(x)[0]
        with followed(packed, inputs, count_flips):
            logits = packed(x)[0]
        found.images += len(x)
        found.largest_logit = _larger(found.largest_logit, expected)
        found.largest_logit_difference = _larger(found.largest_logit_difference, logits - expected)
        winners, packed_winners = expected.argmax(1), logits.argmax(1)
        found.agree += int((winners == packed_winners).sum())
        found.correct += int((winners == labels).sum())
        found.correct_packed += int((packed_winners == labels).sum())
    return found


def _larger(value: float, tensor: Tensor) -> float:
    """The larger of a value and a tensor's largest magnitude; infinity where the tensor holds no number."""
    largest = float(tensor.abs().max())
    return max(value, largest) if math.isfinite(largest) else math.inf


def _few_at_once(
    batches: Iterable[tuple[Tensor, Tensor]], network: nn.Module, images: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, cut so that the codes of one fit into memory, up to `images` images."""
    left, size = images, None
    for x, labels in batches:
        if left is not None:
            x, labels = x[:left], labels[:left]
            left -= len(x)
        if size is None:
            cost = network_cost(network, tuple(x.shape[1:]))
            elements = sum(8 * layer.activation_bytes / layer.activation_bits for layer in cost.layers)
            size = int(max(1, min(100, _CODES_AT_ONCE // elements)))
        yield from zip(x.split(size), labels.split(size), strict=True)
        if left == 0:
            return


# ------------------------------------------------------------------------------------------------------- statement 1


def exact_figures(source: Source, where: str) -> Figures:
    """The network in float64 against its own packed form with constants of float64. Raises ValueError that begins
    with `where` unless all codes are equal, and the logits to LOGIT_TOLERANCE.
    """
    network = copy.deepcopy(source.network).double()
    packed = from_bytes(packed_bytes_of(integer_network(network), describe(source)), where).network
    found = compare(network, packed, source.test(), CHECKED_IMAGES)
    if found.flipped:
        layer, flips = max(found.by_layer.items(), key=lambda pair: pair[1])
        raise ValueError(
            f"{where}: {found.flipped:,} of {found.codes:,} codes differ from the network's in float64, {flips:,} of "
            f"them in {layer}; if that is an operation or a quantiser of your own, its forward pass and its "
            "integer_grid do not belong together"
        )
    difference = found.largest_logit_difference
    if not math.isfinite(difference) or not difference <= LOGIT_TOLERANCE * max(1.0, found.largest_logit):
        raise ValueError(
            f"{where}: logits differ by {difference:.3g} in float64, where {LOGIT_TOLERANCE:g} is "
            "allowed; an operation of your own may compute with something that is not in the network's state"
        )
    return {key: found.to_json()[key] for key in ("images", "codes", "flipped", "largest_logit_difference")}


# ------------------------------------------------------------------------------------------------------- statement 2

_CLEAR = 0.25
"""As far as float32 sums may lie from whole numbers and still name them without doubt."""


@dataclass
class LayerFigures:
    """Sums of layers that are fed the same codes: how many were compared, how many differed, how far from a whole
    number the network's own float32 sums lay at most, how far the outputs differed, relative to a layer's largest, and
    how many layers had to add up the same float32 numbers in float64, since float32 cannot name their sums.
    """

    layers: int = 0
    sums: int = 0
    different: int = 0
    from_whole: float = 0.0
    output_error: float = 0.0
    in_double: list[str] = field(default_factory=list)
    largest_sum: int = 0


@torch.inference_mode()
def layer_figures(source: Source, packed: nn.Module, where: str) -> Figures:
    """Statement 2. Raises ValueError that begins with `where` and names the layer whose sums differ.

    A layer's sums come from what it gives, (output - bias) / scales - corrections, and must be the integers there.
    """
    network, inputs = source.network, inputs_of(source.network)
    every = {name: m for name, m in packed.named_modules() if isinstance(m, IntegerLayer)}
    follows = normalizations_of(network, is_quantized)
    integers = {name: m for name, m in packed.named_modules() if isinstance(m, IntegerLayer) and m.exact}
    found = LayerFigures(len(integers), largest_sum=max((m.largest_sum for m in integers.values()), default=0))
    # beyond 2^24 float32 rounds to whole numbers, so that nothing would show
    found.in_double = [name for name, integer in integers.items() if integer.carrier == torch.float64]

    def note(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        codes = inputs[name].codes(x, layer) if name in inputs else layer.quantize_activation(x)
        if name in integers:
            note_sums(name, layer, x, codes, output)
        if every[name].rescale is not None:
            error = _output_error(every[name].output(codes), output, follows.get(layer))
            found.output_error = max(found.output_error, error)
            if not error <= OUTPUT_TOLERANCE:
                raise ValueError(
                    f"{where}: {name}: gives outputs {error:.2g} of their largest away from the network's on the same "
                    "codes; export it again"
                )

    def note_sums(name: str, layer: nn.Module, x: Tensor, codes: Tensor, output: Tensor) -> None:
        if name not in found.in_double:
            expected, deviation = _sums(layer, output, inputs[name], integers[name], codes)
            if deviation > _CLEAR:
                found.in_double.append(name)
        if name in found.in_double:
            output = _added_in_double(layer, x)
            expected, deviation = _sums(layer, output, inputs[name], integers[name], codes)
        different = int((integers[name].accumulate(codes).double() != expected).sum())
        found.sums, found.different = found.sums + expected.numel(), found.different + different
        found.from_whole = max(found.from_whole, deviation)
        if different:
            raise ValueError(
                f"{where}: {name}: {different:,} of {expected.numel():,} sums differ from the network's on the same "
                "codes; if the layer is your own, its forward pass is more than a convolution of its two quantised "
                "operands"
            )

    for x, _ in _few_at_once(source.test(), network, CHECKED_IMAGES):
        with followed(network, every, note):
            network(x)
    return asdict(found) | {"in_double": len(found.in_double)}


def _output_error(found: Tensor, output: Tensor, followed_by: Followed | None) -> float:
    """How far a packed layer's output is from the network's behind its normalisation, relative to the largest there."""
    expected = output.double()
    if followed_by is not None:
        normalization, channels = followed_by
        constants = scale_and_shift(copy.deepcopy(normalization).double())
        factor, shift = (c[channels].view(1, -1, 1, 1) for c in constants)
        expected = expected * factor + shift
    return _larger(0.0, found.double() - expected) / (float(expected.abs().max()) or 1.0)


def _sums(
    layer: nn.Module, output: Tensor, reading: Inputs, integer: IntegerLayer, codes: Tensor
) -> tuple[Tensor, float]:
    """(the whole numbers nearest to a layer's sums, how far the sums are from them at most)."""
    shape = (1, -1, *(1,) * (output.dim() - 2))
    scale = weight_grid(layer).scale.double()
    scale = scale * (reading.sums_scale if reading.grid is None else reading.grid.scale.double())
    bias = 0.0 if layer.bias is None else layer.bias.double().view(shape)
    sums = (output.double() - bias) / (scale.view(shape) if scale.numel() > 1 else scale)
    corrections = integer.corrections(codes)
    sums = sums if corrections is None else sums - corrections
    return sums.round(), float((sums - sums.round()).abs().max())


def _added_in_double(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's output on the very numbers of its own type, multiplied and added up in float64."""
    weight, value = layer.quantize_weight(layer.weight), layer.quantize_activation(x)
    twin = copy.deepcopy(layer).double()
    twin.weight = nn.Parameter(weight.detach().double(), requires_grad=False)
    twin.quantize_weight = twin.quantize_activation = nn.Identity()
    return twin.forward(value.double())  # not by a call: the copy has this hook too


# ------------------------------------------------------------------------------------------------------- statement 3


def whole_figures(source: Source, packed: nn.Module) -> Figures:
    """Statement 3: both networks in float32 on every test image. Raises ValueError where logits are not finite."""
    found = compare(source.network, packed, source.test())
    if not math.isfinite(found.largest_logit_difference):
        raise ValueError("logits are not finite on the test set; export a training that went well")
    return found.to_json()
