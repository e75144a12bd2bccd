# SPDX-License-Identifier: Apache-2.0
"""The places of a network where something is computed: all that the cost of an operation depends on but its bits.

A network of the DARTS space is a stem, cells of input operations, chosen operations, sums and a concatenation, and a
classifier. Each place can be built by itself, at any bits, to be counted or timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from common.nets.architecture import Architecture, Bits, needs_bits
from common.nets.darts_space import CellPlan, output_channels, plan_cells
from common.nets.network import cell_bits, cifar_stem, imagenet_stems
from common.nets.operations import OPERATIONS, preprocess
from common.quant import FLOAT_BITS, QuantConv2d, QuantLinear

PREPROCESS, STEM, CLASSIFIER, SUM, CONCAT = "preprocess", "stem", "classifier", "sum", "concat"
"""Places that are no primitive."""
FLOAT: Bits = (FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True)
class Place:
    """An operation (a primitive or one of the five above) on maps of `in_channels` and `size` x `size` pixels.

    `stride` is how much smaller its output is: 1 or 2, and 8 for ImageNet's two stems.
    """

    operation: str
    in_channels: int
    out_channels: int
    size: int
    stride: int = 1

    def __str__(self) -> str:
        shape = f"{self.in_channels} to {self.out_channels} channels at {self.size}x{self.size}"
        return f"{self.operation} ({shape}, stride {self.stride})"

    @property
    def passes_on(self) -> bool:
        """Whether nothing happens there: a skip connection of stride 1."""
        return self.operation == "skip_connect" and self.stride == 1


class _Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape: a node's addition."""
        return x + x


class _Concat(nn.Module):
    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, parts * C, H, W]: what a cell hands on."""
        return torch.cat([x] * self.parts, 1)


class _Classifier(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        return self.linear(x.mean((2, 3)))


def build_place(place: Place, bits: Bits = FLOAT, **quantizers: str) -> nn.Module:
    """The module of a place at its bits, as an evaluation network has it.

    `quantizers` are scheme, weight_quantizer and activation_quantizer of `QuantConv2d`. Raises ValueError for an
    operation that nobody registered.
    """
    conv = partial(QuantConv2d, weight_bits=bits[0], activation_bits=bits[1], **quantizers)
    c_in, c_out = place.in_channels, place.out_channels
    if place.operation == PREPROCESS:
        return preprocess(conv, nn.BatchNorm2d, c_in, c_out, place.stride == 2)
    if place.operation == STEM and place.stride == 1:
        return cifar_stem(c_out, c_in, partial(conv, signed=True))
    if place.operation == STEM:
        return nn.Sequential(*imagenet_stems(c_out, c_in, partial(conv, signed=True), conv))
    if place.operation == CLASSIFIER:
        widths = {"weight_bits": bits[0], "activation_bits": bits[1]}
        return _Classifier(QuantLinear(c_in, c_out, **widths, signed=True, **quantizers))
    if place.operation in (SUM, CONCAT):
        return _Sum() if place.operation == SUM else _Concat(c_out // c_in)
    if place.operation not in OPERATIONS:
        raise ValueError(f"{place.operation} is no operation; register it in common.nets.OPERATIONS")
    return OPERATIONS[place.operation](conv, nn.BatchNorm2d, c_in, place.stride)


def cell_sizes(plans: Sequence[CellPlan], image_size: int, stem: str) -> list[int]:
    """Height of the map that each cell's operations of stride 2, or of a normal cell, read."""
    size = image_size if stem == "cifar" else image_size // 8
    sizes = []
    for plan in plans:
        sizes.append(size)
        size = size // 2 if plan.reduction else size
    return sizes


def operation_place(primitive: str, plan: CellPlan, size: int, state: int, width: int = 1) -> Place:
    """A primitive on an edge that leaves `state` of a cell whose inputs are `size` wide; it sees 1/`width` of the
    channels.
    """
    stride = 2 if plan.reduction and state < 2 else 1
    channels = plan.channels // width
    return Place(primitive, channels, channels, size if stride == 2 or not plan.reduction else size // 2, stride)


def input_place(plan: CellPlan, which: int, size: int) -> Place:
    """A cell's input operation 0 or 1; the first halves what comes from before a reduction."""
    halve = plan.reduction_before and which == 0
    c_in = plan.last if which else plan.before_last
    return Place(PREPROCESS, c_in, plan.channels, size * 2 if halve else size, 2 if halve else 1)


def stem_place(stem: str, in_channels: int, init_channels: int, size: int) -> Place:
    """The stem of a network; ImageNet's two are one place."""
    cifar = stem == "cifar"
    return Place(STEM, in_channels, 3 * init_channels if cifar else init_channels, size, 1 if cifar else 8)


def fixed_places(
    plans: Sequence[CellPlan], sizes: Sequence[int], nodes: Sequence[int], multipliers: Sequence[int], classes: int
) -> Iterator[Place]:
    """What no choice changes but the stem: each cell's sums and concatenation, and the classifier.

    `nodes` and `multipliers`: of normal and of reduction cells.
    """
    for plan, size in zip(plans, sizes, strict=True):
        inner = size // 2 if plan.reduction else size
        for _ in range(nodes[plan.reduction]):
            yield Place(SUM, plan.channels, plan.channels, inner)
        yield Place(CONCAT, plan.channels, plan.channels * multipliers[plan.reduction], inner)
    last = sizes[-1] // 2 if plans[-1].reduction else sizes[-1]
    yield Place(CLASSIFIER, output_channels(list(plans), *multipliers), classes, last)


@dataclass(frozen=True)
class Sizes:
    """What a network is built with, besides its cells."""

    stem: str
    in_channels: int
    num_classes: int
    init_channels: int
    layers: int
    image_size: int
    stem_bits: int = FLOAT_BITS
    classifier_bits: int = FLOAT_BITS


def architecture_places(architecture: Architecture, sizes: Sizes) -> list[tuple[Place, Bits]]:
    """Every place of an architecture's network with its bits: their costs add up to the network's."""
    genotype = architecture.genotype
    multipliers = (len(genotype.normal_concat), len(genotype.reduce_concat))
    plans = plan_cells(sizes.layers, sizes.init_channels, sizes.stem, *multipliers)
    maps = cell_sizes(plans, sizes.image_size, sizes.stem)
    stem = stem_place(sizes.stem, sizes.in_channels, sizes.init_channels, sizes.image_size)
    found = [(stem, (sizes.stem_bits, sizes.stem_bits))]
    for plan, size, bits in zip(plans, maps, cell_bits(architecture, plans), strict=True):
        found += [(input_place(plan, 0, size), bits.preprocess0), (input_place(plan, 1, size), bits.preprocess1)]
        pairs = genotype.reduce if plan.reduction else genotype.normal
        for (primitive, state), pair in zip(pairs, bits.operations, strict=True):
            place = operation_place(primitive, plan, size, state)
            found.append((place, (pair if needs_bits(primitive, place.stride) else None) or FLOAT))
    nodes = (len(genotype.normal) // 2, len(genotype.reduce) // 2)
    for place in fixed_places(plans, maps, nodes, multipliers, sizes.num_classes):
        bits = sizes.classifier_bits if place.operation == CLASSIFIER else FLOAT_BITS
        found.append((place, (bits, bits)))
    return found


def space_places(primitives: Sequence[str], sizes: Sizes, nodes: int = 4, multiplier: int = 4) -> dict[Place, bool]:
    """Every place that a network of a search space can have -> whether its bits are chosen there."""
    plans = plan_cells(sizes.layers, sizes.init_channels, sizes.stem, multiplier, multiplier)
    maps = cell_sizes(plans, sizes.image_size, sizes.stem)
    found = {stem_place(sizes.stem, sizes.in_channels, sizes.init_channels, sizes.image_size): False}
    for plan, size in zip(plans, maps, strict=True):
        found |= {input_place(plan, which, size): True for which in (0, 1)}
        for primitive in primitives:
            for state in (0, 2):
                place = operation_place(primitive, plan, size, state)
                if primitive != "none" and not place.passes_on:
                    found[place] = needs_bits(primitive, place.stride)
    found |= dict.fromkeys(fixed_places(plans, maps, (nodes,) * 2, (multiplier,) * 2, sizes.num_classes), False)
    return found
