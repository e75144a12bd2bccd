# SPDX-License-Identifier: Apache-2.0
"""The evaluation network: stem, the chosen cells at their bits, auxiliary head, classifier, drop path."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.architecture import DARTS, Architecture, BitPolicy, Bits, CellBits
from common.nets.darts_space import CellPlan, check_image_size, output_channels, plan_cells
from common.nets.operations import OPERATIONS, ConvFactory, Shard, drop_path, plain_convolution, preprocess
from common.nets.recompute import recomputed
from common.quant import FLOAT_BITS, QuantConv2d, QuantLinear, step_parameters
from common.quant.layers import attach_quantizers
from genotypes import Genotype

STEMS = ("cifar", "imagenet")
_FLOAT: Bits = (FLOAT_BITS, FLOAT_BITS)


class Cell(nn.Module):
    """One chosen cell: two input operations, two operations per node, the concatenation of the listed states."""

    shard: Shard = (0, 1)

    def __init__(
        self, architecture: Architecture, plan: CellPlan, make_conv: partial[QuantConv2d], bits: CellBits
    ) -> None:
        super().__init__()
        genotype = architecture.genotype
        pairs, concat = (
            (genotype.reduce, genotype.reduce_concat) if plan.reduction else (genotype.normal, genotype.normal_concat)
        )
        channels = plan.channels
        self.preprocess0 = preprocess(
            _at(make_conv, bits.preprocess0), nn.BatchNorm2d, plan.before_last, channels, plan.reduction_before
        )
        self.preprocess1 = preprocess(_at(make_conv, bits.preprocess1), nn.BatchNorm2d, plan.last, channels, False)
        self.operations = nn.ModuleList()
        for (primitive, state), pair in zip(pairs, bits.operations, strict=True):
            stride = 2 if plan.reduction and state < 2 else 1
            self.operations.append(
                OPERATIONS[primitive](_at(make_conv, pair or _FLOAT), nn.BatchNorm2d, channels, stride)
            )
        self.states = tuple(state for _, state in pairs)
        self.concat, self.reduction, self.channels = concat, plan.reduction, channels

    def forward(self, before_last: Tensor, last: Tensor, dropping: float | Tensor | None) -> Tensor:
        """Outputs of the two cells before, probability of dropping a path -> [B, len(concat) * channels, H, W]."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        for node in range(len(self.operations) // 2):
            parts = []
            for k in (2 * node, 2 * node + 1):
                part = self.operations[k](states[self.states[k]])
                if dropping is not None and not isinstance(self.operations[k], nn.Identity):
                    part = drop_path(part, dropping, self.shard)
                parts.append(part)
            states.append(parts[0] + parts[1])
        return torch.cat([states[s] for s in self.concat], 1)


def _at(make_conv: partial[QuantConv2d], bits: Bits) -> ConvFactory:
    return partial(make_conv, weight_bits=bits[0], activation_bits=bits[1])


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier of DARTS: pooling 5x5, 1x1 convolution to 128, 2x2 to 768, linear.

    `stem` sets the pooling's stride: 3 on CIFAR's 8x8 maps, 2 on ImageNet's 7x7, both to 2x2. ImageNet's head has no
    normalisation after its 2x2 convolution, as in the published code.
    """

    least: ClassVar = {"cifar": 8, "imagenet": 7}

    def __init__(self, channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(5, 3 if stem == "cifar" else 2, 0, count_include_pad=False)
        self.conv1, self.bn1 = plain_convolution(channels, 128, 1), nn.BatchNorm2d(128)
        self.conv2 = plain_convolution(128, 768, 2)
        self.bn2 = nn.BatchNorm2d(768) if stem == "cifar" else nn.Identity()
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], H and W at least `least` -> [B, classes]; larger maps are averaged at the end."""
        x = F.relu(self.bn1(self.conv1(self.pool(F.relu(x)))))
        return self.classifier(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def cifar_stem(channels: int, in_channels: int, conv: ConvFactory) -> nn.Sequential:
    """3x3 convolution to `channels` at full resolution."""
    return nn.Sequential(conv(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels))


def imagenet_stems(
    channels: int, in_channels: int, conv: ConvFactory, inner: ConvFactory
) -> tuple[nn.Module, nn.Module]:
    """The two ImageNet stems: to 1/4 and to 1/8 of the resolution; `inner` makes the convolutions after the first."""
    first = nn.Sequential(
        conv(in_channels, channels // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(),
        inner(channels // 2, channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(channels),
    )
    second = nn.Sequential(nn.ReLU(), inner(channels, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels))
    return first, second


class Network(nn.Module):
    """A network of `layers` chosen cells. `drop_path_probability` may be set between steps (training only).

    `memory_format` is how images are held in memory, from the input on; with `checkpoint_cells` the backward pass
    computes each cell again instead of keeping what is within.
    """

    memory_format = torch.channels_last
    checkpoint_cells = False

    def __init__(
        self,
        architecture: Architecture,
        *,
        stem: str,
        in_channels: int,
        num_classes: int,
        init_channels: int,
        layers: int,
        auxiliary: bool,
        make_conv: partial[QuantConv2d],
        stem_bits: int,
        classifier_bits: int,
    ) -> None:
        super().__init__()
        genotype = architecture.genotype
        multipliers = (len(genotype.normal_concat), len(genotype.reduce_concat))
        plans = plan_cells(layers, init_channels, stem, *multipliers)
        self.architecture, self.stem_kind, self.in_channels = architecture, stem, in_channels
        # The same number twice: compiled code reads the tensor, which may change without compiling again.
        self.register_buffer("_drop_path", torch.zeros(()), persistent=False)
        self._drops_paths, self._drop_path_probability = False, 0.0
        image_conv = partial(make_conv, weight_bits=stem_bits, activation_bits=stem_bits, signed=True)
        inner_conv = partial(make_conv, weight_bits=stem_bits, activation_bits=stem_bits)
        if stem == "cifar":
            self.stem = cifar_stem(3 * init_channels, in_channels, image_conv)
        else:
            self.stem0, self.stem1 = imagenet_stems(init_channels, in_channels, image_conv, inner_conv)
        bits = cell_bits(architecture, plans)
        self.cells = nn.ModuleList(Cell(architecture, plan, make_conv, b) for plan, b in zip(plans, bits, strict=True))
        self.auxiliary_index = 2 * layers // 3
        self.auxiliary_channels = plans[self.auxiliary_index].channels * multipliers[1]
        self.auxiliary_head = AuxiliaryHead(self.auxiliary_channels, num_classes, stem) if auxiliary else None
        self.classifier = QuantLinear(
            output_channels(plans, *multipliers),
            num_classes,
            weight_bits=classifier_bits,
            activation_bits=classifier_bits,
            signed=True,
            **make_conv.keywords,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, in_channels, H, W] -> (logits [B, classes], the auxiliary head's, or None outside training)."""
        x = x.contiguous(memory_format=self.memory_format)
        if self.stem_kind == "cifar":
            before_last = last = self.stem(x)
        else:
            before_last = self.stem0(x)
            last = self.stem1(before_last)
        auxiliary, dropping = None, self._dropping()
        for index, cell in enumerate(self.cells):
            inputs = (before_last, last, dropping)
            before_last = last
            last = recomputed(cell, *inputs, random=dropping is not None) if self.checkpoint_cells else cell(*inputs)
            if index == self.auxiliary_index and self.auxiliary_head is not None and self.training:
                auxiliary = self.auxiliary_head(last)
        return self.classifier(last.mean((2, 3))), auxiliary

    @property
    def drop_path_probability(self) -> float:
        """Probability with which training drops a path, for each image of its own."""
        return self._drop_path_probability

    @drop_path_probability.setter
    def drop_path_probability(self, probability: float) -> None:
        """Set it, between steps."""
        self._drop_path_probability, self._drops_paths = probability, probability > 0
        self._drop_path.fill_(probability)

    def _dropping(self) -> float | Tensor | None:
        if not (self.training and self._drops_paths):
            return None
        return self._drop_path if torch.compiler.is_compiling() else self._drop_path_probability

    def weight_parameters(self) -> list[nn.Parameter]:
        """Every parameter, the learned quantiser steps included."""
        return list(self.parameters())

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """Learned quantiser steps (LSQ): trained without weight decay."""
        return step_parameters(self)

    def auxiliary_parameters(self) -> int:
        """Parameters of the auxiliary head that fits this network, whether or not it was built with one."""
        with torch.device("meta"):
            head = AuxiliaryHead(self.auxiliary_channels, self.classifier.out_features, self.stem_kind)
        return sum(p.numel() for p in head.parameters())

    def check_input(self, image_size: int) -> None:
        """Raise ValueError, with the reason and the cure, where images of this size do not fit the network."""
        check_image_size(image_size, self.stem_kind)
        least = AuxiliaryHead.least[self.stem_kind]
        found = image_size // (4 if self.stem_kind == "cifar" else 32)
        if self.auxiliary_head is not None and found < least:
            raise ValueError(
                f"--auxiliary: the head pools 5x5 windows of a map of at least {least}x{least}, and images of "
                f"{image_size}x{image_size} give {found}x{found} after the {self.stem_kind} stem and two reductions; "
                "leave --auxiliary out or use larger images"
            )


def cell_bits(architecture: Architecture, plans: list[CellPlan]) -> list[CellBits]:
    """The bits of every cell of the network, in its order."""
    policy: BitPolicy | None = architecture.bits
    if policy is not None and policy.cells:
        sources = policy.source_cells([plan.reduction for plan in plans])
        return [policy.cells[s] for s in sources]
    pair = policy.uniform if policy is not None and policy.uniform is not None else _FLOAT
    genotype = architecture.genotype
    return [
        CellBits(p.reduction, pair, pair, (pair,) * len(genotype.reduce if p.reduction else genotype.normal))
        for p in plans
    ]


def build_network(
    architecture: Architecture | Genotype,
    *,
    stem: str = "cifar",
    in_channels: int = 3,
    num_classes: int,
    init_channels: int,
    layers: int,
    auxiliary: bool = False,
    scheme: str = "default",
    weight_quantizer: str = "gaussian",
    activation_quantizer: str = "hwgq",
    signed_activations: bool = False,
    stem_bits: int = FLOAT_BITS,
    classifier_bits: int = FLOAT_BITS,
) -> Network:
    """Build the evaluation network of an architecture (a bare genotype: in full precision).

    `stem` "cifar" (full resolution, 3 x init_channels) or "imagenet" (to 1/8, init_channels). The architecture's bit
    policy sets the bits of every convolution of the cells; stem, classifier and auxiliary head stay full precision
    unless `stem_bits` / `classifier_bits` quantise them, symmetric and signed at their real-valued inputs.
    `signed_activations` keeps the negatives of 8-bit activations. `scheme` "reference" is the reference's per-channel
    8 bits. Raises ValueError on unknown names and sizes.
    """
    if isinstance(architecture, Genotype):
        architecture = Architecture(architecture)
    architecture.require(DARTS)
    if stem not in STEMS:
        raise ValueError(f"stem: {stem!r} is unknown; choose cifar or imagenet")
    for flag, value in (("--init-channels", init_channels), ("--layers", layers), ("classes", num_classes)):
        if value < 1:
            raise ValueError(f"{flag}: {value} must be at least 1")
    if signed_activations:
        activation_quantizer = _signed_at_8(activation_quantizer)
    make_conv = partial(
        QuantConv2d, weight_quantizer=weight_quantizer, activation_quantizer=activation_quantizer, scheme=scheme
    )
    network = Network(
        architecture,
        stem=stem,
        in_channels=in_channels,
        num_classes=num_classes,
        init_channels=init_channels,
        layers=layers,
        auxiliary=auxiliary,
        make_conv=make_conv,
        stem_bits=stem_bits,
        classifier_bits=classifier_bits,
    )
    if architecture.bits is not None and architecture.bits.layers:
        _set_layer_bits(network, architecture.bits, make_conv)
    # depthwise convolutions are 1.5 times faster along dense channels, on CPU too
    return network.to(memory_format=torch.channels_last)


def _signed_at_8(name: str) -> str:
    if name != "hwgq":
        raise ValueError(f"--signed-activations: only hwgq knows it, not {name}; leave one of the two flags out")
    return "hwgq-signed8"


def _set_layer_bits(network: Network, policy: BitPolicy, make_conv: partial[QuantConv2d]) -> None:
    """Apply a per-layer policy: every convolution of the cells, by its name in the network."""
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, QuantConv2d) and n.startswith("cells.")}
    if unknown := policy.layers.keys() - convolutions.keys():
        raise ValueError(f"bits.layers: {sorted(unknown)[0]!r} is no convolution of this network; were layers changed?")
    if missing := convolutions.keys() - policy.layers.keys():
        raise ValueError(f"bits.layers: {sorted(missing)[0]!r} has no bits")
    keywords = make_conv.keywords
    for name, (weight, activation) in policy.layers.items():
        attach_quantizers(
            convolutions[name],
            weight,
            activation,
            keywords["weight_quantizer"],
            keywords["activation_quantizer"],
            keywords["scheme"],
            signed=False,
        )
