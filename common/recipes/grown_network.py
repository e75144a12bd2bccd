# SPDX-License-Identifier: Apache-2.0
"""The evaluation network behind a picture: which one a run, a file or a name means, and what every cell of it holds.

Bits and costs are read off the network itself, built without memory for its weights, so that the picture shows what a
training would compute with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.cost.counting import Cost, network_cost
from common.data.registry import SHAPES
from common.engine.files import read_json
from common.nets.architecture import DARTS, Architecture, Bits
from common.nets.darts_space import is_reduction
from common.nets.enas_layers import resolve_layer_types
from common.nets.enas_space import reduction_layers
from common.nets.networks import network_of
from common.quant import FLOAT_BITS
from common.recipes.target import Target

_DEFAULTS = {"layers": 20, "init_channels": 36, "out_filters": 36}  # the papers' CIFAR-10 networks
# What the network of each space takes of a result.json's `network`, which says more
_ARGUMENTS = (
    *("stem", "in_channels", "num_classes", "init_channels", "layers", "scheme", "stem_bits", "classifier_bits"),
    *("weight_quantizer", "activation_quantizer", "signed_activations"),
)
_MICRO_ARGUMENTS = ("in_channels", "num_classes", "out_filters", "layers", "image_size", "layer_bits", "compat")
_CLASSES = 10  # where nobody says how many there are, and nothing that is shown depends on it
_MOST = 10_000  # cells or channels: more is a damaged file
_PIXELS = {"cifar": 32, "imagenet": 224}


@dataclass(frozen=True)
class GrownCell:
    """One cell of the network. Bits are those of its convolutions, each pair once."""

    index: int
    reduction: bool
    channels: int
    pixels: int
    bitops: int
    """Of all its convolutions, for one image."""
    source: int | None
    """The searched cell that gave its bits; None: they do not come from one."""
    kind: str
    """The type of its layers, where these have names."""
    inputs: tuple[tuple[str, tuple[Bits, ...]], ...]
    operations: tuple[tuple[str, int, tuple[Bits, ...]], ...]
    """(operation, state that it reads, bits), two for each node."""


@dataclass(frozen=True)
class Grown:
    """A whole evaluation network; stem and classifier with their bits."""

    architecture: Architecture
    cells: tuple[GrownCell, ...]
    stem: tuple[Bits, ...]
    classifier: tuple[Bits, ...]
    pixels: int
    pixels_known: bool
    """False: nothing says how large the images are, and the sizes are those of a usual one."""
    bitops: int | None
    """Of all layers, stem and classifier too; None: nothing says how many classes there are."""
    text: str
    """Its size, and where that comes from."""

    def shown(self, *, bits: bool | None) -> Grown:
        """With bits (True), without them (False), or as it is (None); ValueError where it has none to show."""
        if bits and not any(pairs for cell in self.cells for _, _, pairs in cell.operations):
            raise ValueError("--bits: the network has no bits; name a run with some, or add --wbits and --abits")
        return without_bits(self) if bits is False else self


def grow(target: Target, *, layers: int | None = None, mapping: str | None = None) -> Grown:
    """The network that a target's training builds: of a search the one that it steered for, else the training's own.

    `layers` and `mapping` (relative or paper) replace what the target says. Raises ValueError where they do not fit.
    """
    architecture = target.architecture if mapping is None else target.architecture.with_mapping(mapping)
    if mapping is not None and (architecture.bits is None or not architecture.bits.cells):
        raise ValueError("--bit-mapping: the bits are not those of searched cells, so nothing is mapped; leave it out")
    build, pixels, known, text = _size(target, layers)
    classes_known = build["num_classes"] is not None
    build["num_classes"] = build["num_classes"] or _CLASSES
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = network_of(architecture, **build)
    cost = network_cost(network, pixels)
    ends = [tuple(dict.fromkeys(_bits(cost, prefix))) for prefix in ("stem", "classifier")]
    cells = _cells(architecture, build, cost, pixels)
    total = cost.bitops if known and classes_known else None
    grown = Grown(architecture, cells, ends[0], ends[1], pixels, known, total, text)
    quantised = any(layer.weight_bits != FLOAT_BITS for layer in cost.layers if layer.name.startswith("cells."))
    return grown if quantised else without_bits(grown)


def _size(target: Target, layers: int | None) -> tuple[dict[str, Any], int, bool, str]:
    """Arguments of `network_of`, the images' side, whether that is known, and a line about it."""
    flags = target.flags or {}
    darts = target.architecture.space == DARTS
    done = _trained(target)
    if done:
        names = _ARGUMENTS if darts else _MICRO_ARGUMENTS
        build = {name: done[name] for name in names if name in done}
        pixels: Any = done.get("image_size")
    else:
        build, pixels = _from_flags(flags, darts, target)
    if layers is not None:
        build["layers"] = layers
    known = isinstance(pixels, int)
    pixels = pixels if known else _PIXELS[build.get("stem", "cifar")]
    if not darts:
        build["image_size"] = pixels
    width = build["init_channels"] if darts else build["out_filters"]
    source = "as trained" if done else "by the run's flags" if flags else "the papers' size"
    cells = build["layers"] + (0 if darts else 2)
    size = f"{cells} cells, {width} channels" + (f", {pixels}x{pixels} pixels" if known else "")
    return build, pixels, known, f"{size} ({source})"


def _trained(target: Target) -> dict[str, Any]:
    """The `network` of a finished training's result.json; empty for all else."""
    if target.run is None or not (target.run / "result.json").is_file():
        return {}
    result = read_json(target.run / "result.json")
    network = result.get("network") if isinstance(result, dict) else None
    return dict(network) if isinstance(network, dict) else {}


def _from_flags(flags: Mapping[str, Any], darts: bool, target: Target) -> tuple[dict[str, Any], Any]:
    """The same of a search or an unfinished training by its flags; what they do not say is the papers'."""

    def said(name: str) -> int:
        found = flags.get(f"eval_{name}") or flags.get(name) or _DEFAULTS.get(name)
        if type(found) is not int or not 1 <= found <= _MOST:
            raise ValueError(f"{target.run}/config.json: {name} is {found!r}, no size of a network; name another run")
        return found

    dataset = str(flags.get("dataset")) if flags else "cifar10"
    channels, usual, classes = SHAPES.get(dataset, (3, None, None))
    # ImageNet's folder may hold a part of its classes, and nothing but the images says so
    classes = (said("classes") if flags.get("classes") else None) or (None if dataset == "imagenet" else classes)
    pixels = said("image_size") if flags.get("image_size") else usual
    build: dict[str, Any] = {"in_channels": channels, "num_classes": classes, "layers": said("layers")}
    if darts:
        stem = flags.get("stem")
        found = "imagenet" if isinstance(pixels, int) and pixels >= 128 else "cifar"
        build |= {"init_channels": said("init_channels"), "stem": stem if stem in tuple(_PIXELS) else found}
        build |= {name: flags[name] for name in ("stem_bits", "classifier_bits", "scheme") if flags.get(name)}
    else:
        build["out_filters"] = said("out_filters")
        types = flags.get("layer_bits")
        fits = types and len(types) in (1, build["layers"] + 3)
        build["layer_bits"] = list(types) if fits else None
    return build, pixels


def _cells(architecture: Architecture, build: Mapping[str, Any], cost: Cost, pixels: int) -> tuple[GrownCell, ...]:
    darts = architecture.space == DARTS
    layers = build["layers"]
    if darts:
        reductions = [is_reduction(index, layers) for index in range(layers)]
        channels, kinds = build["init_channels"], [""] * layers
        pixels = pixels if build["stem"] == "cifar" else pixels // 8
    else:
        reductions = [index in reduction_layers(layers) for index in range(layers + 2)]
        channels = build["out_filters"]
        kinds = [str(kind) for kind in resolve_layer_types(build.get("layer_bits"), layers + 2)[1:]]
    policy = architecture.bits
    sources: Sequence[int | None] = [None] * len(reductions)
    if policy is not None and policy.cells:
        sources = policy.source_cells(reductions)
    inputs = (("c_{k-2}", "preprocess0"), ("c_{k-1}", "preprocess1")) if darts else (("both", "calibration"),)
    inputs = inputs if darts else (*inputs, ("c_{k-1}", "base"))
    found = []
    for index, reduction in enumerate(reductions):
        channels, pixels = (2 * channels, pixels // 2) if reduction else (channels, pixels)
        prefix = f"cells.{index}"
        pairs = architecture.pairs("reduce" if reduction else "normal")
        found.append(
            GrownCell(
                index,
                reduction,
                channels,
                pixels,
                sum(layer.bitops for layer in cost.layers if layer.name.startswith(f"{prefix}.")),
                sources[index],
                kinds[index],
                tuple((name, tuple(_bits(cost, f"{prefix}.{part}."))) for name, part in inputs),
                tuple((op, s, tuple(_bits(cost, f"{prefix}.operations.{k}."))) for k, (op, s) in enumerate(pairs)),
            )
        )
    return tuple(found)


def _bits(cost: Cost, prefix: str) -> list[Bits]:
    return [(layer.weight_bits, layer.activation_bits) for layer in cost.layers if layer.name.startswith(prefix)]


def searched_kinds(architecture: Architecture) -> list[bool]:
    """For each searched cell whose bits the architecture holds whether it is a reduction; empty: none does."""
    return [cell.reduction for cell in architecture.bits.cells] if architecture.bits is not None else []


def without_bits(grown: Grown) -> Grown:
    """The same network, to be drawn without bits."""
    cells = tuple(
        replace(
            cell,
            source=None,
            inputs=tuple((name, ()) for name, _ in cell.inputs),
            operations=tuple((operation, state, ()) for operation, state, _ in cell.operations),
        )
        for cell in grown.cells
    )
    return replace(grown, cells=cells, stem=(), classifier=())
