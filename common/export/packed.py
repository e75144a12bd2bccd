# SPDX-License-Identifier: Apache-2.0
"""The packed file: a network's integers at their own bits, and the few floats around them, in one safetensors file.

Tensors (L layers: every convolution and linear layer, in the order of the network's modules):

    codes     uint8            packed indices of all quantised weights, layer after layer, each from a new byte
    scales    float            the constants of the layers in integers, layer after layer (`_CONSTANTS`)
    offsets   int32 [L, 2]     where a layer's bytes in `codes` begin, and its numbers in `scales`
    layers    int16 [L, 10]    what a layer's integers are (`COLUMNS`); all zeros: a layer in full precision
    floats    float            everything in full precision, in the order of the rebuilt network's state
    other.*                    state of other types, by name (of operations of one's own)

The header holds one entry, `packed`: JSON with format, schema, the network (architecture, arguments of its builder,
whether normalisations were folded, what its images are) and the sha256 of every tensor and of that description;
compressed by zlib and written in base 85, since in a small network such a text would be most of what is not weights.
A file is read strictly: its digests, its sizes and every number of its tables must fit, else it is refused by name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.engine.files import plain, read_regular
from common.export.integer_network import (
    finish_network,
    integer_form,
    layers_of,
    network_dtype,
    readers_of_sums,
)
from common.nets import Architecture, BitPolicy, EvaluationNetwork, network_of
from common.quant import FLOAT_BITS, QuantConv2d, QuantLinear, fold_normalization
from common.quant.integer import ROUNDINGS, Grid, IntegerLayer, codes_of, indices_of
from common.quant.packing import pack, packed_bytes, unpack
from common.strict_json import parse_json

FORMAT, SCHEMA = "packed integers", 1
COLUMNS = (
    *("weight_bits", "weight_levels", "weight_multiplier", "weight_base"),  # code = multiplier x index + base
    *("input_kind", "input_bits", "input_levels", "input_multiplier", "input_base"),
    "constants",
)
"""Of the tensor `layers`. weight_bits 0: values in full precision. input_kind: 0 full precision, 1 to 4 the rounding
(`ROUNDINGS`), 5 the sums of another layer. constants: two bits for each of `_CONSTANTS`, 0 none, 1 one number, 2 one
for each output channel."""
_CONSTANTS = ("input_scale", "input_offset", "weight_offset", "rescale", "shift")
_NONE, _ONE, _EACH = 0, 1, 2
_SUMS = len(ROUNDINGS) + 1
_QUANTIZATION = (
    *("weight_quantizer", "activation_quantizer", "scheme", "signed_activations"),
    *("stem_bits", "classifier_bits"),
)
"""What a builder takes that the file's own tables say of every layer."""
BUILD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("in_channels", "num_classes", "init_channels", "out_filters", "layers", "image_size"), (int,)),
    **dict.fromkeys(("auxiliary", "compat"), (bool,)),
    "stem": (str,),
    "dropout": (float,),
    "layer_bits": (list, type(None)),
}
"""The other arguments of the builders, and of what type they are. Lists are of texts."""
_BY_LAYER = "by layer"
_FILE_LIMIT = 2**34
_LARGEST_IMAGE = 4096  # pixels of a side
_HEADER_LIMIT = 2**24
_TEXT_LIMIT = 2**22  # of the header's JSON, uncompressed
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Description:
    """What a packed network is, beside its numbers: enough to build it again."""

    architecture: Architecture
    build: dict[str, Any]
    folded: bool
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        architecture = replace(self.architecture, search={}).to_json()  # where it was found is the run's to tell
        if self.architecture.bits is not None and self.architecture.bits.layers:
            architecture["bits"] = _BY_LAYER  # the table has them, without a name for each
        return {"architecture": architecture, "build": self.build, "folded": self.folded, "data": self.data}

    @staticmethod
    def from_json(data: Any, where: str) -> Description:
        """Read what `to_json` wrote, bits by layer left out. Raises ValueError that begins with `where`."""
        if not isinstance(data, dict) or set(data) != {"architecture", "build", "folded", "data"}:
            raise ValueError(f"{where}: describes no network (architecture, build, folded and data)")
        found = data["architecture"]
        if isinstance(found, dict) and found.get("bits") == _BY_LAYER:
            found = {**found, "bits": None}
        architecture = Architecture.from_json(found, where)
        if not isinstance(data["build"], dict) or not isinstance(data["data"], dict):
            raise ValueError(f"{where}: build and data must be objects")
        return Description(architecture, data["build"], data["folded"] is True, data["data"])


@dataclass(frozen=True)
class Packed:
    """What a packed file holds: the network in integers, and what it is."""

    network: nn.Module
    description: Description


# ------------------------------------------------------------------------------------------------------------ writing


def packed_bytes_of(network: nn.Module, description: Description) -> bytes:
    """The whole file of a network that `integer_network` made. Its constants keep the network's type."""
    save = _safetensors().save
    tensors = tensors_of(network)
    text = json.dumps(plain(description.to_json()), separators=(",", ":"), allow_nan=False)
    digests = {name: _digest(tensor) for name, tensor in tensors.items()} | {"network": _sha256(text.encode())}
    header = {"format": FORMAT, "schema": SCHEMA, "network": json.loads(text), "sha256": digests}
    return save(tensors, {"packed": compressed(header)})


def compressed(header: dict[str, Any]) -> str:
    """The text of the header's entry."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def decompressed(text: str) -> Any:
    """What `compressed` was given. Raises ValueError for a text that it did not write, or one too long."""
    unpacker, data = zlib.decompressobj(), base64.b85decode(text)
    if base64.b85encode(data).decode() != text:  # the last few characters can be written in several ways
        raise ValueError("its header is damaged")
    try:
        found = unpacker.decompress(data, _TEXT_LIMIT)
    except zlib.error as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"its header is cut off, or longer than {_TEXT_LIMIT:,} bytes")
    return parse_json(found)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"packed files need safetensors ({error}); bash scripts/setup.sh export") from error
    return safetensors.torch


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file of a network that `integer_network` made, by name."""
    dtype = network_dtype(network)
    codes: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
    scales: list[Tensor] = [torch.empty(0, dtype=dtype)]
    rows, offsets = [], []
    for layer in all_layers(network).values():
        offsets.append((sum(map(len, codes)), sum(map(len, scales))))
        if not isinstance(layer, IntegerLayer):
            rows.append([0] * len(COLUMNS))
            continue
        rows.append(_row(layer))
        if layer.weight_grid is not None:
            codes.append(pack(indices_of(layer.weight, layer.weight_grid), layer.weight_grid.bits))
        for name in _CONSTANTS:
            value = getattr(layer, name)
            if value is not None:
                scales.append(value.reshape(-1).to(dtype))
    floats, other = [torch.empty(0, dtype=dtype)], {}
    for name, value in network.state_dict().items():
        if value.dtype == dtype:
            floats.append(value.reshape(-1))
        else:
            other[f"other.{name}"] = value.contiguous()
    return {
        "codes": torch.cat(codes),
        "scales": torch.cat(scales),
        "offsets": torch.tensor(offsets, dtype=torch.int32).reshape(-1, 2),
        "layers": torch.tensor(rows, dtype=torch.int16).reshape(-1, len(COLUMNS)),
        "floats": torch.cat(floats),
        **other,
    }


def all_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer, in integers or not, by name and in the order of the modules."""
    kinds = (nn.Conv2d, nn.Linear, IntegerLayer)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def _row(layer: IntegerLayer) -> list[int]:
    weight, read = layer.weight_grid, layer.input_grid
    row = [0] * 4 if weight is None else [weight.bits, weight.levels, weight.multiplier, weight.base]
    if read is not None:
        row += [1 + ROUNDINGS.index(read.rounding), read.bits, read.levels, read.multiplier, read.base]
    else:
        row += [_SUMS if layer.reads_sums else 0, 0, 0, 0, 0]
    constants = 0
    for place, name in enumerate(_CONSTANTS):
        value = getattr(layer, name)
        kind = _NONE if value is None else _EACH if value.dim() else _ONE
        constants |= kind << 2 * place
    return [*row, constants]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(tensor: Tensor) -> str:
    """Of a tensor's type, shape and bytes."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode()
    return _sha256(head + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# ------------------------------------------------------------------------------------------------------------ reading


def read_packed(path: Path) -> Packed:
    """The network of a packed file. Raises ValueError that names the file: damaged, cut off, of another kind, or of
    another network than it says.
    """
    return from_bytes(read_regular(Path(path), _FILE_LIMIT), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a packed file, by name, as `read_packed` reads them. Raises ValueError that names the file."""
    data, where = read_regular(Path(path), _FILE_LIMIT), str(path)
    return _checked_tensors(data, _header(data, where), where)


def from_bytes(data: bytes, where: str) -> Packed:
    """The network in the bytes of a packed file. Raises ValueError that begins with `where`."""
    header = _header(data, where)
    tensors = _checked_tensors(data, header, where)
    description = Description.from_json(header["network"], where)
    try:
        network = _skeleton(description, tensors, where)
        _fill(network, tensors)
        if header["network"]["architecture"]["bits"] == _BY_LAYER:
            policy = _bits_by_layer(network, tensors["layers"])
            description = replace(description, architecture=replace(description.architecture, bits=policy))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    except (TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{where}: its description and tensors give no network (in building it: {reason[:200]}); export it again"
        ) from error
    return Packed(network.eval().requires_grad_(False), description)


def _bits_by_layer(network: nn.Module, rows: Tensor) -> BitPolicy:
    """Bits of every convolution of the cells, as the table has them."""
    weight, read = COLUMNS.index("weight_bits"), COLUMNS.index("input_bits")
    pairs = [(row[weight] or FLOAT_BITS, row[read] or FLOAT_BITS) for row in rows.tolist()]
    names = zip(all_layers(network), pairs, strict=True)
    return BitPolicy(layers={name: pair for name, pair in names if name.startswith("cells.")})


def _header(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object `packed` of the file's own header."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _HEADER_LIMIT):
        raise ValueError(f"{where}: cut off, or no safetensors file; export it again")
    try:
        metadata = parse_json(data[8 : 8 + size]).get("__metadata__") or {}
        header = decompressed(metadata["packed"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: no packed network, or damaged ({error}); export it again") from error
    if not isinstance(header, dict) or set(header) != {"format", "schema", "network", "sha256"}:
        raise ValueError(f"{where}: no packed network; give a file of --format packed")
    if header["format"] != FORMAT or header["schema"] is True or header["schema"] != SCHEMA:
        raise ValueError(
            f"{where}: {header['format']!r} of schema {header['schema']!r}, and this version reads {FORMAT!r} of "
            f"schema {SCHEMA}; use the version that wrote it"
        )
    return header


def _checked_tensors(data: bytes, header: dict[str, Any], where: str) -> dict[str, Tensor]:
    library = _safetensors()
    from safetensors import SafetensorError

    try:
        tensors = library.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: damaged or cut off ({error}); export it again") from error
    text = json.dumps(header["network"], separators=(",", ":"), allow_nan=False)
    found = {name: _digest(tensor) for name, tensor in tensors.items()} | {"network": _sha256(text.encode())}
    if not isinstance(header["sha256"], dict) or found.keys() != header["sha256"].keys():
        raise ValueError(f"{where}: holds other tensors than its digests are of; export it again")
    for name, digest in found.items():
        if digest != header["sha256"][name]:
            raise ValueError(f"{where}: {name} is damaged (its sha256 is another); export it again")
    return tensors


def _skeleton(description: Description, tensors: dict[str, Tensor], where: str) -> EvaluationNetwork:
    """The network of the description in full precision, of no more size than the file's tensors show."""
    needed = {"codes", "scales", "offsets", "layers", "floats"}
    if not needed <= tensors.keys():
        raise ValueError(f"{where}: lacks {', '.join(sorted(needed - tensors.keys()))}")
    build = _checked_build(description, tensors, where)
    architecture = replace(description.architecture, bits=None)
    held = 8 * tensors["codes"].numel() + tensors["floats"].numel()
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):  # no memory is taken for what the file may only claim to be
            weights = sum(layer.weight.numel() for layer in layers_of(network_of(architecture, **build)).values())
        if weights > held:
            raise ValueError(f"{where}: its architecture has {weights:,} weights, and it holds no more than {held:,}")
        network = network_of(architecture, **build)
    if description.folded:
        fold_normalization(network)
    return network.to(tensors["floats"].dtype)


def _checked_build(description: Description, tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """The arguments of the network's builder; every one of its kind, and no number beyond what the tensors show."""
    build = {key: value for key, value in description.build.items() if key not in _QUANTIZATION}
    size, rows = description.data.get("image_size"), tensors["layers"].shape[0] if tensors["layers"].dim() else 0
    numbers = 8 * tensors["codes"].numel() + tensors["floats"].numel() + rows
    largest = max(numbers, size if type(size) is int and 0 < size <= _LARGEST_IMAGE else 0)
    for name, value in build.items():
        if name not in BUILD:
            raise ValueError(
                f"{where}: gives its network {name[:60]!r}, which this version does not know; use the version that "
                "wrote it"
            )
        fits = type(value) in BUILD[name]
        if isinstance(value, list):
            fits = fits and all(type(entry) is str for entry in value)
        if not fits:
            raise ValueError(f"{where}: gives {name} a value of another kind ({str(value)[:60]!r}); export it again")
        if type(value) is int and not 1 <= value <= (rows if name == "layers" else largest):
            raise ValueError(f"{where}: gives {name} the value {value}, which its tensors deny")
    return build | ({"auxiliary": False} if "auxiliary" in build else {})


@dataclass
class _Reader:
    """Reads the layers' numbers from the concatenated tensors, front to back."""

    codes: Tensor
    scales: Tensor
    code: int = 0
    scale: int = 0

    def next_codes(self, name: str, shape: torch.Size, grid: Grid) -> Tensor:
        """The codes of a weight, int16."""
        size = packed_bytes(shape.numel(), grid.bits)
        part = self.codes[self.code : self.code + size]
        self.code += size
        indices = unpack(part, grid.bits, shape.numel())
        if indices.numel() and int(indices.max()) >= grid.levels:
            raise ValueError(f"{name}: holds the index {int(indices.max())}, and its weight has {grid.levels} levels")
        return codes_of(indices, grid).view(shape)

    def next_constant(self, name: str, kind: int, channels: int) -> Tensor | None:
        """A constant: None, a scalar or [channels]."""
        if kind not in (_NONE, _ONE, _EACH):
            raise ValueError(f"{name}: names constants of a kind that does not exist")
        if kind == _NONE:
            return None
        count = channels if kind == _EACH else 1
        part = self.scales[self.scale : self.scale + count]
        self.scale += count
        if part.numel() != count or not part.isfinite().all():
            raise ValueError(f"{name}: its constants are cut off or not finite")
        return part.clone() if kind == _EACH else part[0].clone()


def _fill(network: EvaluationNetwork, tensors: dict[str, Tensor]) -> None:
    """Put the layers in integers and everything else into the skeleton, in place. ValueError where they do not fit."""
    layers, rows = layers_of(network), tensors["layers"]
    if rows.dtype != torch.int16 or rows.shape != (len(layers), len(COLUMNS)):
        raise ValueError(f"{len(rows)} layers are in the file, and its architecture has {len(layers)}")
    if tensors["scales"].dtype != tensors["floats"].dtype or tensors["floats"].dtype not in _FLOATS:
        raise ValueError("its constants are of no type that this version reads")
    table = dict(zip(layers, rows.tolist(), strict=True))
    names = {layer: name for name, layer in layers.items()}

    def integer(layer: nn.Module) -> bool:
        return layer in names and any(table[names[layer]])

    reader = _Reader(tensors["codes"], tensors["scales"])
    sources, made = readers_of_sums(network, integer), {}
    for (name, layer), begin in zip(layers.items(), tensors["offsets"].tolist(), strict=True):
        if begin != [reader.code, reader.scale]:
            raise ValueError(f"{name}: its numbers begin elsewhere than the layers before it end")
        if integer(layer):
            reads_sums = made[sources[layer]].largest_sum if layer in sources else 0
            made[layer] = _integer_layer(name, layer, table[name], reader, reads_sums)
    if (reader.code, reader.scale) != (reader.codes.numel(), reader.scales.numel()):
        raise ValueError("holds more codes or constants than its layers take")
    finish_network(network, {names[layer]: form for layer, form in made.items()}, integer)
    _load_rest(network, tensors)


def _integer_layer(name: str, layer: nn.Module, row: list[int], reader: _Reader, reads_sums: int) -> IntegerLayer:
    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        raise ValueError(f"{name}: is in integers in the file, and full precision in its architecture")
    found = dict(zip(COLUMNS, row, strict=True))
    if (found["input_kind"] == _SUMS) != (reads_sums > 0) or not 0 <= found["input_kind"] <= _SUMS:
        raise ValueError(f"{name}: its input is of another kind than its architecture says")
    one, weight, weight_grid = torch.ones(()), torch.zeros_like(layer.weight), None
    if found["weight_bits"]:
        weight_grid = _grid(name, found, "weight", one, "even")
        weight = reader.next_codes(name, layer.weight.shape, weight_grid)
    kinds = [found["constants"] >> 2 * place & 3 for place in range(len(_CONSTANTS))]
    constants = {
        constant: reader.next_constant(name, kind, layer.weight.shape[0])
        for constant, kind in zip(_CONSTANTS, kinds, strict=True)
    }
    scale, offset = constants.pop("input_scale"), constants.pop("input_offset")
    input_grid = None
    if 0 < found["input_kind"] < _SUMS:
        if scale is None or scale.dim() or (offset is not None and offset.dim()):
            raise ValueError(f"{name}: its input has no scale")
        input_grid = replace(_grid(name, found, "input", scale, ROUNDINGS[found["input_kind"] - 1]), offset=offset)
    return integer_form(
        layer, weight, constants | {"weight_grid": weight_grid, "input_grid": input_grid, "reads_sums": reads_sums}
    )


def _grid(name: str, found: dict[str, int], operand: str, scale: Tensor, rounding: str) -> Grid:
    bits, levels, multiplier, base = (found[f"{operand}_{key}"] for key in ("bits", "levels", "multiplier", "base"))
    if not (1 <= bits <= 8 and 1 <= levels <= 2**bits and multiplier in (1, 2)):
        raise ValueError(f"{name}: no grid has {levels} levels in {bits} bits, {multiplier} apart")
    return Grid(bits, levels, multiplier, base, scale, rounding=rounding)


def _load_rest(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What is in full precision, in the order of the network's state."""
    floats, at = tensors["floats"], 0
    state = network.state_dict()
    for name, value in state.items():
        if value.dtype == floats.dtype:
            part = floats[at : at + value.numel()]
            at += value.numel()
        else:
            part = tensors.get(f"other.{name}", torch.empty(0))
        if part.numel() != value.numel() or part.dtype != value.dtype:
            raise ValueError(f"{name} is not in the file, or of another size: the file is of another network")
        state[name] = part.reshape(value.shape)
    others = sum(name.startswith("other.") for name in tensors)
    if at != floats.numel() or others != sum(value.dtype != floats.dtype for value in state.values()):
        raise ValueError("holds more than its network takes: the file is of another network")
    network.load_state_dict(state)
