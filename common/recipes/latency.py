# SPDX-License-Identifier: Apache-2.0
"""Measuring a table of latencies, and how well its sums predict whole networks.

A backend makes a call out of a module and its input; every place of a search space is built, made a call, and timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.cost.expected import bit_pairs
from common.cost.latency import Conditions, LatencyTable, Timing
from common.cost.places import CLASSIFIER, FLOAT, STEM, Place, Sizes, build_place, space_places
from common.engine.environment import device_names, versions
from common.nets import Architecture, build_network
from common.nets.architecture import Bits
from common.nets.sampling import random_bits, random_genotype
from common.quant import QuantConv2d
from common.recipes.ranking import agreement
from common.recipes.timing import Call, interleaved, steady
from genotypes import PRIMITIVES


@dataclass(frozen=True)
class Space:
    """A search space: the sizes of its networks, what may stand on an edge, the bits to choose among (None: none)."""

    sizes: Sizes
    bits: tuple[int, ...] | None
    primitives: tuple[str, ...] = PRIMITIVES
    nodes: int = 4
    multiplier: int = 4
    quantizers: dict[str, str] = field(default_factory=dict)

    def pairs_at(self, place: Place, chosen: bool) -> list[Bits]:
        """The pairs of bits that a place can have."""
        if chosen:
            return bit_pairs(self.bits)
        ends = {STEM: self.sizes.stem_bits, CLASSIFIER: self.sizes.classifier_bits}
        return [(ends[place.operation],) * 2] if place.operation in ends else [FLOAT]


class _Answer(nn.Module):
    """A module with the interface of a network, for the exporters: (output [B, ...] in one row an image, None)."""

    auxiliary_head = None
    memory_format = torch.contiguous_format

    def __init__(self, module: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.keywords = module, keywords

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        found = self.module(x, **self.keywords)
        return (found[0] if isinstance(found, tuple) else found).flatten(1), None


class Backend(Protocol):
    """What runs a module. `sees_bits`: whether its time can depend on the bits; else one timing stands for all."""

    name: str
    sees_bits: bool
    packages: tuple[str, ...]

    def call(self, module: nn.Module, x: Tensor, keywords: dict[str, Any], key: object) -> Call:
        """A call of the module on x. Modules of one `key` differ in nothing but bits and weights."""
        ...


class Torch:
    """torch's own kernels, fake-quantised where the module is: along dense channels, without autograd."""

    name, sees_bits, packages = "torch", True, ("torch",)

    def call(self, module: nn.Module, x: Tensor, keywords: dict[str, Any], key: object) -> Call:
        """See Backend."""
        module.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        def call() -> None:
            with torch.inference_mode():
                module(x, **keywords)

        return call


class OnnxRuntime:
    """onnxruntime's kernels on the graph that a format of export.py has for a module."""

    packages = ("torch", "onnxruntime")

    def __init__(self, name: str, sees_bits: bool) -> None:
        self.name, self.sees_bits = name, sees_bits
        self._traced: dict[object, Any] = {}

    def call(self, module: nn.Module, x: Tensor, keywords: dict[str, Any], key: object) -> Call:
        """See Backend. The graph is traced once for each key: bits and weights are put in afterwards."""
        from common.export.onnx_graph import write_exact, write_float
        from common.export.onnx_runtime import open_session
        from common.export.onnx_trace import IMAGES, read_layers, trace

        network, shape = _Answer(module, keywords), tuple(x.shape[1:])
        if key not in self._traced:
            self._traced[key] = trace(network, shape)
        traced = replace(self._traced[key], layers=read_layers(network))
        if self.name == "onnx-int8":
            from common.export.onnx_int8 import build_int8

            written = build_int8(traced, [x]).written
        else:
            written = write_float(traced) if self.name == "onnxruntime" else write_exact(traced)
        session = open_session(written.model, torch.get_num_threads(), integer=self.name == "onnx-int8")
        feed = {IMAGES: x.contiguous().numpy()}
        return lambda: session.run(None, feed)


BACKENDS: dict[str, Backend] = {
    "torch": Torch(),
    "onnxruntime": OnnxRuntime("onnxruntime", sees_bits=False),
    "onnx": OnnxRuntime("onnx", sees_bits=True),
    "onnx-int8": OnnxRuntime("onnx-int8", sees_bits=True),
}
"""Name -> what times a module: torch, fake-quantised; onnxruntime in full precision, or a format of export.py."""


@torch.no_grad()
def _settled(module: nn.Module, x: Tensor) -> nn.Module:
    """In evaluation mode, with the ranges of 8-bit quantisers set by one batch."""
    if any(isinstance(layer, QuantConv2d) and layer.activation_bits == 8 for layer in module.modules()):
        module.train()(x)
    return module.eval()


def measure(
    space: Space,
    backend: Backend,
    *,
    batch: int = 1,
    rounds: int = 20,
    least_seconds: float = 2e-3,
    convolutions: bool = False,
    clock: str = "wall",
    say: Callable[[str], None] = lambda text: None,
) -> LatencyTable:
    """Time every place of a space at every pair of its bits, in turns.

    `convolutions`: single ones too, which a search of each convolution's bits needs. Where the backend does not see
    the bits, one timing stands in all rows of its place.
    """
    keys: list[list[tuple[Place, Bits]]] = []
    calls: list[Call] = []
    for place, chosen in space_places(space.primitives, space.sizes, space.nodes, space.multiplier).items():
        pairs = space.pairs_at(place, chosen)
        for group in [[pair] for pair in pairs] if backend.sees_bits else [pairs]:
            bits = group[0] if backend.sees_bits else FLOAT
            inner = convolutions and chosen
            for name, call in _calls(place, bits, batch, backend, space.quantizers, inner):
                inside = replace(place, operation=f"{place.operation}.{name}") if name else place
                keys.append([(inside, pair) for pair in group])
                calls.append(call)
    say(f"{len(calls)} calls, {rounds} samples of each in turns")
    samples = interleaved(calls, rounds=rounds, least_seconds=least_seconds, clock=clock)
    rows = {}
    for group, taken in zip(keys, samples, strict=True):
        mean, std, n = steady(taken)
        rows |= dict.fromkeys(group, Timing(1e3 * mean, 1e3 * std, n))
    return LatencyTable(rows, conditions(backend, batch, clock))


@torch.no_grad()
def _calls(
    place: Place, bits: Bits, batch: int, backend: Backend, quantizers: dict[str, str], convolutions: bool
) -> Iterator[tuple[str, Call]]:
    """("", call) of a place; then, where asked for, (name, call) of each of its convolutions on what reaches it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_place(place, bits, **quantizers)
        x = torch.randn(batch, place.in_channels, place.size, place.size)
        _settled(module, x)
    yield "", backend.call(module, x, {}, place)
    if not convolutions:
        return
    seen: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            seen[name] = (layer, tuple(one.clone() for one in inputs), dict(keywords))

        return hook

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantConv2d)]
    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers]
    module(x)
    for hook in hooks:
        hook.remove()
    for name, (layer, inputs, keywords) in seen.items():
        yield name, backend.call(layer, inputs[0], keywords, (place, name))


def conditions(backend: Backend, batch: int, clock: str) -> Conditions:
    """Where this process measures, and with what."""
    found = versions()
    packages = [f"{name} {metadata.version(name)}" for name in backend.packages]
    text = ", ".join([f"python {found['python']}", *packages])
    return Conditions(backend.name, batch, torch.get_num_threads(), clock, str(device_names("cpu")["cpu"]), text)


def drawn(space: Space, count: int, seed: int) -> Iterator[Architecture]:
    """Architectures of a space, drawn uniformly, with bits where the space has some."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        genotype = random_genotype(generator, space.primitives, space.nodes, space.multiplier)
        architecture = Architecture(genotype, name=f"random {number}")
        if space.bits is not None:
            architecture = replace(architecture, bits=random_bits(architecture, space.bits, generator))
        yield architecture


def check(
    table: LatencyTable, space: Space, backend: Backend, *, count: int = 20, seed: int = 0, rounds: int = 20
) -> dict[str, Any]:
    """Predicted against measured latency of random architectures: rows, mean absolute percentage error, Spearman.

    Raises ValueError where the table lacks one of their places, before anything is timed.
    """
    architectures = list(drawn(space, count, seed))
    predicted = [table.predict(architecture, space.sizes) for architecture in architectures]
    calls = []
    sizes = space.sizes
    x = torch.randn(table.conditions.batch, sizes.in_channels, sizes.image_size, sizes.image_size)
    for architecture in architectures:
        if not backend.sees_bits:
            architecture = replace(architecture, bits=None)
        network = build_network(
            architecture,
            stem=sizes.stem,
            in_channels=sizes.in_channels,
            num_classes=sizes.num_classes,
            init_channels=sizes.init_channels,
            layers=sizes.layers,
            stem_bits=sizes.stem_bits if backend.sees_bits else 32,
            classifier_bits=sizes.classifier_bits if backend.sees_bits else 32,
            **space.quantizers,
        )
        calls.append(backend.call(_settled(network, x), x, {}, architecture.genotype))
    samples = interleaved(calls, rounds=rounds, clock=table.conditions.clock)
    measured = [1e3 * steady(taken)[0] for taken in samples]
    pairs = list(zip(predicted, measured, strict=True))
    agreed = agreement(predicted, measured)
    scale = sum(measured) / sum(predicted)
    return {
        "architectures": count,
        "seed": seed,
        "mape": sum(abs(p / m - 1) for p, m in pairs) / count,
        "mape_scaled": sum(abs(scale * p / m - 1) for p, m in pairs) / count,
        "scale": scale,
        "spearman": agreed["spearman"],
        "spearman_p": agreed["spearman_p"],
        "rows": [{"architecture": n, "predicted_ms": p, "measured_ms": m} for n, (p, m) in enumerate(pairs)],
    }
