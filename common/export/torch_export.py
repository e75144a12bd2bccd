# SPDX-License-Identifier: Apache-2.0
"""The format `torch`: the network as a program of torch.export, which runs without a line of this project.

Quantised weights are one byte each, the index of their level, and are widened in every pass; activations are rounded
to their grids in floats. The file's tensors are raw bytes, nothing in it is pickled, and the same network gives the
same bytes. What is read is checked by `torch_archive` before torch sees it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from common.engine.files import write_bytes
from common.export.formats import Source
from common.export.integer_network import refuse_not_finite
from common.export.onnx_check import Execute
from common.export.onnx_formats import checked, compare_whole
from common.export.onnx_graph import Places
from common.export.onnx_trace import IMAGES, LOGITS, Logits, inference_copy, put, quantizable_layers
from common.export.torch_archive import checked_program
from common.quant.integer import Grid, activation_grid, codes_of, decode, encode, indices_of, weight_codes

_ENTERS, _LEAVES = "quantize_activation", "leaves"


class Widened(nn.Module):
    """Indices (uint8) of a grid -> values. The grid's constants are buffers."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("scale", grid.scale)
        self.register_buffer("offset", grid.offset)

    def forward(self, indices: Tensor) -> Tensor:
        """The values of indices of any shape."""
        return decode(codes_of(indices, self.grid), _with(self.grid, self.scale, self.offset))


class OnGrid(Widened):
    """Values -> the nearest levels of a grid, by the quantiser's own steps."""

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, on the grid."""
        grid = _with(self.grid, self.scale, self.offset)
        return decode(encode(x, grid), grid)


def _with(grid: Grid, scale: Tensor, offset: Tensor | None) -> Grid:
    return Grid(grid.bits, grid.levels, grid.multiplier, grid.base, scale, offset, grid.rounding)


class Named(nn.Module):
    """The identity as an operator, so that its place is found in a program."""

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return torch.ops.aten.alias.default(x)


class StoredLayer(nn.Module):
    """A layer with its weight as indices; a ReLU that it would take in stays outside."""

    folds_relu = False

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        stored, activations = weight_codes(layer, name), activation_grid(layer, name)
        if stored is not None:
            codes, grid = stored
            del layer._parameters["weight"]
            layer.register_buffer("weight", indices_of(codes, grid).contiguous())
            layer.quantize_weight = Widened(grid)
        if activations is not None:
            layer.quantize_activation = nn.Sequential(OnGrid(activations), Named())
        else:
            relu = isinstance(layer.quantize_activation, nn.ReLU)
            layer.quantize_activation = nn.Sequential(nn.ReLU(), Named()) if relu else nn.Sequential(Named())
        self.layer, self.leaves = layer, Named()

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """As the layer's."""
        return self.leaves(self.layer(x.relu() if relu else x))


def stored_network(source: Source) -> nn.Module:
    """Images -> logits, by modules that hold integers. Raises ValueError for a layer without a grid, and for numbers
    that are not finite.
    """
    refuse_not_finite(source.network)
    network = inference_copy(source.network)
    for name, layer in quantizable_layers(network).items():
        put(network, name, StoredLayer(layer, name))
    return Logits(network).eval()


def write_torch(source: Source, path: Path) -> None:
    """Write the program. Raises ValueError where torch.export cannot trace the network."""
    network, example = stored_network(source), torch.zeros(2, *source.image_shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        except Exception as error:  # whatever an operator of one's own makes torch meet
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"RUN: torch.export cannot trace this network ({reason[:200]})") from error
        _strip(program.graph)
        program._example_inputs = None  # they would be pickled
        archive = io.BytesIO()  # a file's name would become part of its content
        torch.export.save(program, archive)
    write_bytes(path, archive.getvalue())


def _strip(graph: fx.Graph) -> None:
    """Leave out in which file which line stood, and keep the modules' names where `_ends` looks for them alone."""
    for node in graph.nodes:
        kept = {"val"}
        if any(path.endswith((f".layer.{_ENTERS}", f".{_LEAVES}")) for path in _paths(node)):
            kept.add("nn_module_stack")
        node.meta = {key: value for key, value in node.meta.items() if key in kept}


def check_torch(source: Source, path: Path) -> dict[str, Any]:
    """The file in torch, layer by layer on the network's codes and as a whole. Raises ValueError where it differs."""
    runner = TorchRunner(path)
    names = list(quantizable_layers(source.network))
    execute = executor(runner.module, names)
    places = {name: Places(f"{name}.before", f"{name}.input", f"{name}.output") for name in names}
    agreement = checked(source, path, source.network, places, execute)
    whole = compare_whole(source, source.network, runner)
    return {"bytes": path.stat().st_size, "layers": agreement.to_json(), "whole": whole}


class TorchRunner:
    """A program of torch.export."""

    name = "torch"
    arithmetic = "float32: weights of one byte, widened in every pass; activations rounded to their grids in floats"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path, self.threads = Path(path), threads
        if threads is not None:
            torch.set_num_threads(threads)
        program = checked_program(self.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.module = torch.export.load(program).module()
            except Exception as error:  # torch has many, and some are no kin of RuntimeError
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(f"{path}: torch cannot load it ({reason[:200]}); export the run again") from error

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return self.module(images)


# ----------------------------------------------------------------------------------------------- looking into a program


def executor(module: fx.GraphModule, names: list[str]) -> Execute:
    """The program cut at its layers: see `onnx_check.cut`, whose names are used here too."""
    enters, leaves = _ends(module, names)

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        forced = {node: feeds[f"{name}.forced"] for name, (_, node) in enters.items()}
        watch = {node: f"{name}.output" for name, node in leaves.items()}
        watch |= {node: f"{name}.input" for name, (_, node) in enters.items()}
        before: dict[fx.Node, list[str]] = {}
        for name, (node, _) in enters.items():
            before.setdefault(node, []).append(f"{name}.before")
        with torch.inference_mode():
            interpreter = _Cut(module, forced, watch, before, found)
            found[LOGITS] = interpreter.run(torch.from_numpy(feeds[IMAGES])).numpy()
        return found

    return run


class _Cut(fx.Interpreter):
    """Runs a program, notes the watched nodes, and goes on with what is forced."""

    def __init__(self, module: Any, forced: Any, watch: Any, before: Any, found: dict[str, np.ndarray]) -> None:
        super().__init__(module)
        self.forced, self.watch, self.before, self.found = forced, watch, before, found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name in (*self.before.get(n, ()), *([self.watch[n]] if n in self.watch else ())):
            self.found[name] = value.detach().clone().numpy()
        return torch.from_numpy(self.forced[n]) if n in self.forced else value


def _ends(module: fx.GraphModule, names: list[str]) -> tuple[dict[str, tuple[fx.Node, fx.Node]], dict[str, fx.Node]]:
    """For every layer, (the node that its quantiser reads, the one that it gives), and the one that the layer gives."""
    enters: dict[str, tuple[fx.Node, fx.Node]] = {}
    leaves: dict[str, fx.Node] = {}
    places = {f"network.{name}.layer.{_ENTERS}": name for name in names}
    ends = {f"network.{name}.{_LEAVES}": name for name in names}
    for node in module.graph.nodes:
        for path in _paths(node):
            if path in places:
                first = enters[places[path]][0] if places[path] in enters else node.all_input_nodes[0]
                enters[places[path]] = (first, node)
            if path in ends:
                leaves[ends[path]] = node
    if missing := [name for name in names if name not in enters or name not in leaves]:
        raise ValueError(f"{missing[0]}: is not found in the program; report this")
    return enters, leaves


def _paths(node: fx.Node) -> Iterator[str]:
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        yield path.removeprefix("L__self___").removeprefix("L['self'].")
