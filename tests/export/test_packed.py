# SPDX-License-Identifier: Apache-2.0
"""Packed files: networks of any architecture come back as what they were, and no other file is taken for one."""

from __future__ import annotations

import copy
import inspect
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from common.cost import network_cost
from common.export import packed
from common.export.formats import Source
from common.export.integer_network import integer_network
from common.export.packed import from_bytes, packed_bytes_of, read_packed
from common.export.proof import compare, describe, exact_figures, layer_figures
from common.nets import OPERATIONS, Architecture, BitPolicy, build_network
from common.nets.enas_layers import LAYER_TYPES
from common.nets.enas_space import SPACE, build_micro_network, random_cells
from common.nets.operations import ConvFactory, NormFactory
from common.nets.sampling import random_bits, random_genotype
from common.quant import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from common.quant.integer import Grid, IntegerLayer
from genotypes import lookup
from tests.helpers.exports import digits, photographs, source_of
from tests.helpers.mangled import many

SIZES = {"init_channels": 4, "layers": 3, "stem": "cifar"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def darts_source(seed: int, bits: tuple[int, ...], ends: int, x: Tensor, **build: Any) -> Source:
    """A random genotype with random bits for every operation."""
    architecture = Architecture(random_genotype(generator(seed), nodes=2, multiplier=2))
    architecture = Architecture(architecture.genotype, random_bits(architecture, bits, generator(seed)))
    return source_of(architecture, x, seed=seed, stem_bits=ends, classifier_bits=ends, **SIZES | build)


def file_of(source: Source, dtype: torch.dtype = torch.float32) -> bytes:
    network = copy.deepcopy(source.network).to(dtype)
    return packed_bytes_of(integer_network(network), describe(source))


def tensors_of(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(data)


@torch.no_grad()
def check_round_trip(source: Source) -> None:
    """Through the file: equal codes and logits in float64, equal sums in float32, and the cost model's bytes."""
    network, images = copy.deepcopy(source.network).double(), next(iter(source.test()))
    back = from_bytes(file_of(source, torch.float64), "file").network
    x = images[0].double()
    torch.testing.assert_close(back(x)[0], network(x)[0], rtol=1e-9, atol=1e-9)
    found = compare(network, back, [images])
    assert (found.flipped, found.images) == (0, len(x))
    data = file_of(source)
    figures = layer_figures(source, from_bytes(data, "file").network, "file")
    assert figures["different"] == 0
    cost = network_cost(source.network, source.image_shape)
    expected = [8 * row.weight_bytes / row.weight_bits for row in cost.layers]
    stored = sum(-(-int(n) * row.weight_bits // 8) for n, row in zip(expected, cost.layers) if row.weight_bits < 32)
    assert tensors_of(data)["codes"].numel() == stored
    assert len(data) <= 1.05 * cost.weight_bytes + 100 * len(cost.layers) + 150  # the header, of networks below 20 layers
    # running statistics do not go into the file, and neither do the weights that codes stand for
    low = sum(int(n) for n, row in zip(expected, cost.layers) if row.weight_bits < 32)
    assert tensors_of(data)["floats"].numel() <= cost.parameters - low


@many(5)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([(1,), (2, 4), (2, 4, 8), (3, 8), (1, 2, 3, 4, 8, 32), (32,)]),
    ends=st.sampled_from([2, 8, 32]),
    stem=st.sampled_from(["cifar", "imagenet"]),
    quantizer=st.sampled_from(["default", "lsq", "signed"]),
)
@example(seed=3, bits=(2, 4, 8), ends=8, stem="imagenet", quantizer="lsq")
def test_random_cells_and_bits(seed: int, bits: tuple[int, ...], ends: int, stem: str, quantizer: str) -> None:
    build: dict[str, Any] = {"stem": stem}
    if quantizer == "lsq" and 1 not in bits:
        build |= {"weight_quantizer": "lsq", "activation_quantizer": "lsq"}
    elif quantizer == "signed":
        build["signed_activations"] = True
    x = digits(32 if stem == "imagenet" else 16, 12)[0]
    check_round_trip(darts_source(seed, bits, ends, x, **build))


@many(5)
@given(seed=st.integers(0, 1000), types=st.lists(st.sampled_from(LAYER_TYPES), min_size=5, max_size=5))
@example(seed=0, types=["kbit8"] * 5)
@example(seed=1, types=["binary", "ternary", "kbit4", "kbit8", "float"])
def test_random_cells_of_the_micro_space(seed: int, types: list[str]) -> None:
    architecture = Architecture(random_cells(2, generator(seed)), space=SPACE)
    x = digits(16, 12)[0]
    source = source_of(architecture, x, seed=seed, out_filters=4, layers=2, image_size=16, layer_bits=types)
    check_round_trip(source)


def test_pointwise_layers_read_sums_and_take_more_than_32_bits_where_they_must() -> None:
    architecture = Architecture(random_cells(2, generator(0)), space=SPACE)
    build = {"out_filters": 48, "layers": 2, "image_size": 16, "layer_bits": ["kbit8"]}
    source = source_of(architecture, digits(16, 4)[0], **build)
    layers = {n: m for n, m in integer_network(source.network).named_modules() if isinstance(m, IntegerLayer)}
    readers = {name: layer for name, layer in layers.items() if layer.reads_sums}
    assert readers and all("pointwise" in name for name in readers)
    for layer in readers.values():
        bound = int(layer.weight.long().abs().sum((1, 2, 3)).max()) * layer.reads_sums
        assert layer.accumulator == (torch.int64 if bound >= 2**31 else torch.int32)
    assert torch.int64 in {layer.accumulator for layer in readers.values()}
    assert all(layers[name.replace("pointwise", "depthwise")].rescale is None for name in readers)
    assert layer_figures(source, integer_network(source.network), "file")["different"] == 0


@pytest.mark.slow
def test_random_networks_on_pieces_of_photographs() -> None:
    for seed in range(12):
        bits = ((2, 4), (8,), (2, 4, 8), (1, 3))[seed % 4]
        source = darts_source(seed, bits, (8, 32)[seed % 2], photographs()[0], init_channels=8, layers=4)
        check_round_trip(source)
        assert exact_figures(source, "file")["flipped"] == 0


def test_bits_by_layer_come_back_from_the_table() -> None:
    architecture = Architecture(lookup("PC_DARTS")[1])
    plain = source_of(architecture, digits(16, 4)[0], **SIZES)
    names = [row.name for row in network_cost(plain.network, 16).layers if row.name.startswith("cells.")]
    choices = [(2, 4), (32, 4), (8, 32), (32, 32), (1, 8)]
    layers = {name: choices[number % 5] for number, name in enumerate(names)}
    source = source_of(Architecture(architecture.genotype, BitPolicy(layers=layers)), digits(16, 4)[0], **SIZES)
    check_round_trip(source)
    data = file_of(source)
    assert from_bytes(data, "file").description.architecture == source.architecture
    assert len(data) - len(tensors_of(data)["codes"]) < 100 * len(names) + 4 * sum(
        tensors_of(data)[name].numel() for name in ("floats", "scales")
    )


class Gate(nn.Module):
    """An operation of one's own: state of three types, a normalisation that nobody names, a quantised convolution."""

    def __init__(self, conv: ConvFactory, norm: NormFactory, channels: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = conv(channels, channels, 3, stride=stride, padding=1), norm(channels)
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(-1, 1, 1))
        self.register_buffer("order", torch.arange(channels - 1, -1, -1))
        self.second = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x) * self.gate)[:, self.order])


class Ladder(nn.Module):
    """A quantiser of one's own: whole multiples of a sixteenth."""

    def __init__(self, bits: int, *, scheme: str = "default", signed: bool = False) -> None:
        super().__init__()
        self.top = 2 ** (bits - 1) - 1
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return (x * 16).round().clamp(-self.top, self.top) / 16

    def integer_grid(self, weight: Tensor | None) -> Grid:
        return Grid(self.bits, 2 * self.top + 1, 1, -self.top, torch.tensor(1 / 16))


def test_operations_and_quantisers_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    OPERATIONS["gate"] = Gate  # conftest takes it away again
    genotype = lookup("PC_DARTS")[1]
    genotype = genotype._replace(normal=(("gate", 0), *genotype.normal[1:]))
    architecture = Architecture(genotype).with_uniform_bits(4, 4)
    with monkeypatch.context() as patch:
        patch.setitem(WEIGHT_QUANTIZERS, "ladder", Ladder)
        patch.setitem(ACTIVATION_QUANTIZERS, "ladder", Ladder)
        own = {"weight_quantizer": "ladder", "activation_quantizer": "ladder"}
        source = source_of(architecture, digits(16, 6)[0], **SIZES, **own)
        check_round_trip(source)
        data = file_of(source, torch.float64)
    # the file alone knows the grids: the quantisers are not registered any more
    found = from_bytes(data, "file").network
    assert found.cells[0].operations[0].order.tolist() == [3, 2, 1, 0]
    x = next(iter(source.test()))[0].double()
    torch.testing.assert_close(found(x)[0], source.network.double()(x)[0], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    """A small file with layers of many bits."""
    source = darts_source(5, (1, 2, 3, 4, 8), 32, digits(16, 12)[0])
    path = tmp_path_factory.mktemp("packed") / "packed.safetensors"
    path.write_bytes(file_of(source))
    return source, path


def test_another_process_needs_the_file_alone(good: tuple[Source, Path], root: Path, tmp_path: Path) -> None:
    source, path = good
    x = next(iter(source.test()))[0]
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from common.export.runtimes import load_runner\n"
        "torch.set_num_threads(1)\n"
        "run = load_runner(sys.argv[1], threads=1); x = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(run(x), sys.argv[3]); print(run.name, '|', run.arithmetic)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("packed | integer codes")
    with torch.no_grad():
        expected = integer_network(source.network)(x)[0]
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)


def test_the_file_is_the_same_each_time(good: tuple[Source, Path]) -> None:
    assert file_of(good[0]) == good[1].read_bytes()


def test_loading_leaves_the_random_numbers_alone(good: tuple[Source, Path]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read_packed(good[1])
    assert torch.equal(torch.rand(3), expected)


def test_every_flipped_byte_is_refused_by_name(good: tuple[Source, Path], tmp_path: Path) -> None:
    data, path = good[1].read_bytes(), tmp_path / "flipped.safetensors"
    for place in (*range(0, 64), *range(64, len(data), 37), len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(path)):
            read_packed(path)


def test_a_header_is_read_only_as_it_was_written(good: tuple[Source, Path]) -> None:
    header = {"format": "a", "schema": 1, "network": {}, "sha256": {}}
    text = packed.compressed(header)
    assert packed.decompressed(text) == header
    for place in range(len(text)):  # the last ones too, which stand for fewer bits than they could
        for other in "0aZ~":
            if other != text[place]:
                with pytest.raises(ValueError):
                    packed.decompressed(text[:place] + other + text[place + 1 :])
    for longer in (text + "0", text + text, text[:-1]):
        with pytest.raises(ValueError):
            packed.decompressed(longer)


def test_a_small_header_that_unpacks_to_much_is_refused(good: tuple[Source, Path]) -> None:
    data = rewritten(good[1].read_bytes(), lambda h, t: h.update(format="x" * 50_000_000))
    assert len(data) < 200_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="longer than 4,194,304 bytes"):
            from_bytes(data, "file")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_cut_off_files_and_other_files_are_refused_by_name(good: tuple[Source, Path], tmp_path: Path) -> None:
    data, path = good[1].read_bytes(), tmp_path / "cut.safetensors"
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"{path}: .*export it again"):
            read_packed(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"{path}: no packed network"):
        read_packed(path)
    with pytest.raises(ValueError, match=f"{tmp_path / 'none'}"):
        read_packed(tmp_path / "none")


def rewritten(data: bytes, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> bytes:
    """The file with another header and other tensors whose digests all fit: made by someone, not damaged."""
    size = struct.unpack("<Q", data[:8])[0]
    header = packed.decompressed(json.loads(data[8 : 8 + size])["__metadata__"]["packed"])
    tensors = {name: tensor.clone() for name, tensor in tensors_of(data).items()}
    change(header, tensors)
    text = json.dumps(header["network"], separators=(",", ":"))
    header["sha256"] = {name: packed._digest(tensor) for name, tensor in tensors.items()}
    header["sha256"]["network"] = packed._sha256(text.encode())
    from safetensors.torch import save

    return save(tensors, {"packed": packed.compressed(header)})


def genotype_of(name: str) -> dict[str, Any]:
    return Architecture(lookup(name)[1]).to_json()


def set_row(row: int, column: str, value: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["layers"][row, packed.COLUMNS.index(column)] = value

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "another architecture": (lambda h, t: h["network"].update(architecture=genotype_of("PC_DARTS")), "layers"),
    "more channels": (lambda h, t: h["network"]["build"].update(init_channels=8), "its architecture has .* weights"),
    "a network without end": (lambda h, t: h["network"]["build"].update(layers=10**9), "its tensors deny"),
    "channels of no number": (
        lambda h, t: h["network"]["build"].update(init_channels="9"),
        "gives init_channels a value",
    ),
    "channels of a fraction": (lambda h, t: h["network"]["build"].update(init_channels=4.0), "gives init_channels a"),
    "channels of a truth": (lambda h, t: h["network"]["build"].update(init_channels=True), "gives init_channels a"),
    "a list of channels": (lambda h, t: h["network"]["build"].update(init_channels=[4]), "gives init_channels a"),
    "no layers": (lambda h, t: h["network"]["build"].update(layers=0), "gives layers the value 0"),
    "more cells than layers": (lambda h, t: h["network"]["build"].update(layers=1500), "gives layers the value 1500"),
    "unknown arguments": (lambda h, t: h["network"]["build"].update(colour=3), "colour"),
    "bits of no kind": (lambda h, t: h["network"]["architecture"].update(bits="by hand"), "bits"),
    "a later schema": (lambda h, t: h.update(schema=2), "schema 2"),
    "another format": (lambda h, t: h.update(format="other"), "'other'"),
    "no architecture": (lambda h, t: h["network"].pop("architecture"), "describes no network"),
    "fewer codes": (lambda h, t: t.update(codes=t["codes"][:-1]), "bytes"),
    "more codes": (lambda h, t: t.update(codes=torch.cat([t["codes"], t["codes"]])), "more codes"),
    "fewer floats": (lambda h, t: t.update(floats=t["floats"][:-1]), "another size"),
    "more floats": (lambda h, t: t.update(floats=torch.cat([t["floats"]] * 2)), "more than its network takes"),
    "not finite": (lambda h, t: t["scales"].fill_(float("nan")), "not finite"),
    "half precision": (lambda h, t: t.update(scales=t["scales"].half(), floats=t["floats"].half()), "no type"),
    "a tensor less": (lambda h, t: t.pop("scales"), "lacks scales"),
    "a tensor more": (lambda h, t: t.update({"other.x": torch.zeros(1)}), "more than its network takes"),
    "wrong offsets": (lambda h, t: t["offsets"].add_(1), "begin elsewhere"),
    "a narrow table": (lambda h, t: t.update(layers=t["layers"][:, :3].contiguous()), "layers are in the file"),
    "no table": (lambda h, t: t.update(layers=t["layers"][0, 0].clone()), ""),
    "nine bits": (set_row(1, "weight_bits", 9), "no grid has"),
    "too many levels": (set_row(1, "weight_levels", 999), "no grid has"),
    "sums of no layer": (set_row(1, "input_kind", 5), "its input is of another kind"),
    "an unknown rounding": (set_row(1, "input_kind", 7), "its input is of another kind"),
    "no input scale": (set_row(1, "constants", 0), "no scale|begin elsewhere"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_do_not_fit_are_refused(name: str, good: tuple[Source, Path], tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = tmp_path / "changed.safetensors"
    path.write_bytes(rewritten(good[1].read_bytes(), change))
    with pytest.raises(ValueError, match=f"{path}: .*({message})"):
        read_packed(path)


def test_a_small_file_takes_no_memory_for_a_large_network(
    good: tuple[Source, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, build, built = tmp_path / "large.safetensors", packed.network_of, []

    def noted(*arguments: Any, **keywords: Any) -> nn.Module:
        network = build(*arguments, **keywords)
        built.append({parameter.device.type for parameter in network.parameters()})
        return network

    monkeypatch.setattr(packed, "network_of", noted)
    path.write_bytes(rewritten(good[1].read_bytes(), lambda h, t: h["network"]["build"].update(init_channels=1500)))
    with pytest.raises(ValueError, match=f"{path}: its architecture has [0-9,]+ weights, and it holds no more than"):
        read_packed(path)
    assert built == [{"meta"}]
    read_packed(good[1])
    assert built[1:] == [{"meta"}, {"cpu"}]


def test_every_argument_of_a_builder_is_known_to_the_reader() -> None:
    taken: set[str] = set()
    for builder in (build_network, build_micro_network):
        taken |= {p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert taken == packed.BUILD.keys() | set(packed._QUANTIZATION)


def test_the_changes_are_what_is_refused(good: tuple[Source, Path]) -> None:
    same = rewritten(good[1].read_bytes(), lambda header, tensors: None)
    assert from_bytes(same, "file").description == read_packed(good[1]).description


def test_networks_that_integers_cannot_hold_are_refused_with_the_layer() -> None:
    source = source_of(Architecture(lookup("PC_DARTS")[1]).with_uniform_bits(8, 8), digits(16, 8)[0], **SIZES)
    integer_network(source.network)
    source.network.cells[1].preprocess0.bn = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match="cells.1.preprocess0.bn: normalises by each batch's own statistics"):
        integer_network(source.network)
    scheme = {**SIZES, "scheme": "reference"}
    source = source_of(Architecture(lookup("PC_DARTS")[1]).with_uniform_bits(8, 8), digits(16, 8)[0], **scheme)
    with pytest.raises(ValueError, match=r"cells.0.preprocess0.conv .*--scheme default"):
        integer_network(source.network)
