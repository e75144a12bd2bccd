# SPDX-License-Identifier: Apache-2.0
"""Architecture = genotype + bit policy + provenance: the only thing that passes from a search to a training.

SPACES says how each search space checks, reads and writes its genotypes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.nets import enas_space
from common.nets.darts_space import validate_genotype
from common.nets.enas_space import MicroCells
from common.nets.operations import OPERATIONS
from common.quant import SUPPORTED_BITS
from common.strict_json import parse_json
from genotypes import Genotype, lookup

SCHEMA = 1
DARTS = "darts"
MAPPINGS = ("relative", "paper")
_INTEGERS = re.compile(r"(\s|#[^\n]*\n)*(\[|\d+\s+\d+\s)")  # no name and no path begins like this
_MAX_FILE_BYTES = 4_000_000  # an architecture is a few kilobytes; more is not one

_MAX_NAME, _MAX_PATH = 255, 4000  # bytes that a system takes

Bits = tuple[int, int]
"""(weight bits, activation bits)."""


@dataclass(frozen=True)
class CellBits:
    """Bits of one searched cell: its two input operations, and each genotype pair (None where nothing is quantised)."""

    reduction: bool
    preprocess0: Bits
    preprocess1: Bits
    operations: tuple[Bits | None, ...]


@dataclass(frozen=True)
class BitPolicy:
    """Which bits each quantised operation takes; exactly one of the three forms is set.

    `uniform`: one pair for all. `cells`: one entry per cell of the supernet, grown to a network of any depth by
    `mapping`: "relative" takes the searched cell at the same relative depth within the same stage (stages lie between
    reductions), "paper" the reference's rule. `layers`: one pair per convolution, by its name in the network.
    """

    uniform: Bits | None = None
    cells: tuple[CellBits, ...] = ()
    layers: Mapping[str, Bits] = field(default_factory=dict)
    mapping: str = "relative"

    def __post_init__(self) -> None:
        forms = [self.uniform is not None, bool(self.cells), bool(self.layers)]
        if sum(forms) != 1:
            raise ValueError("bits: give exactly one of uniform, cells and layers")
        if self.mapping not in MAPPINGS:
            raise ValueError(f"bits.mapping: {self.mapping!r} is unknown; choose among {', '.join(MAPPINGS)}")

    @property
    def kind(self) -> str:
        """uniform, cells or layers."""
        return "uniform" if self.uniform is not None else "cells" if self.cells else "layers"

    def source_cells(self, reductions: list[bool]) -> list[int]:
        """For every cell of a network (is it a reduction?), the searched cell whose bits it takes."""
        return map_cells([c.reduction for c in self.cells], reductions, self.mapping)


def _stages(reductions: list[bool]) -> list[int]:
    """The stage of each cell: how many reductions stand before it."""
    return [sum(reductions[:i]) for i in range(len(reductions))]


def map_cells(searched: list[bool], grown: list[bool], mapping: str) -> list[int]:
    """For each cell of the grown network the index of the searched cell that gives it its bits.

    `searched` and `grown` tell for every cell whether it is a reduction. Raises ValueError when a cell type of the
    grown network was not searched, or when the paper's mapping meets a search of another size than 8 cells.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"--bit-mapping: {mapping!r} is unknown; choose {' or '.join(MAPPINGS)}")
    by_type = {kind: [i for i, r in enumerate(searched) if r == kind] for kind in (False, True)}
    for kind, name in ((False, "normal"), (True, "reduction")):
        if kind in grown and not by_type[kind]:
            raise ValueError(f"bits.cells: the network has {name} cells but none was searched; search with more layers")
    if mapping == "paper":
        if len(by_type[False]) != 6 or len(by_type[True]) != 2:
            raise ValueError(
                "--bit-mapping paper: needs the bits of 6 normal and 2 reduction cells (a search of 8 cells)"
            )
        sources = []
        for i, kind in enumerate(grown):
            before = sum(1 for k in grown[:i] if k == kind)
            row = 0 if i > (9 if kind else 6) else before
            sources.append(by_type[kind][min(row, len(by_type[kind]) - 1)])
        return sources
    from_stage, to_stage = _stages(searched), _stages(grown)
    sources = []
    for i, kind in enumerate(grown):
        same = [j for j in by_type[kind] if from_stage[j] == to_stage[i]]
        if not same:
            nearest = min({from_stage[j] for j in by_type[kind]}, key=lambda s: (abs(s - to_stage[i]), s))
            same = [j for j in by_type[kind] if from_stage[j] == nearest]
        peers = [k for k, other in enumerate(grown) if other == kind and to_stage[k] == to_stage[i]]
        sources.append(same[peers.index(i) * len(same) // len(peers)])
    return sources


@dataclass(frozen=True)
class Architecture:
    """Chosen cells, chosen bits (None: full precision), and where they come from."""

    genotype: Genotype | MicroCells
    bits: BitPolicy | None = None
    space: str = DARTS
    search: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __post_init__(self) -> None:
        _space(self.space).validate(self.genotype)
        if self.bits is not None and self.space != DARTS:
            raise ValueError(f"bits: the layers of {self.space} have types, which train.py --layer-bits sets; use null")
        if self.bits is not None and self.bits.cells:
            _check_cells(self.genotype, self.bits.cells)

    def require(self, space: str) -> None:
        """Raise ValueError unless the architecture belongs to that space."""
        if self.space != space:
            raise ValueError(f"the architecture is of the space {self.space}, and this works on {space}")

    def pairs(self, kind: str) -> tuple[tuple[str, int], ...]:
        """(operation, state that it reads) of the cell "normal" or "reduce", two for each node."""
        if isinstance(self.genotype, MicroCells):
            return self.genotype.pairs(kind == "reduce")
        return getattr(self.genotype, kind)

    def concat(self, kind: str) -> tuple[int, ...]:
        """The states that the cell "normal" or "reduce" hands on."""
        if isinstance(self.genotype, MicroCells):
            return tuple(self.genotype.unused(kind == "reduce"))
        return tuple(getattr(self.genotype, f"{kind}_concat"))

    def with_uniform_bits(self, weight: int, activation: int) -> Architecture:
        """The same cells with one bit pair everywhere."""
        self.require(DARTS)
        if weight == activation == 32:
            return replace(self, bits=None)
        return replace(self, bits=BitPolicy(uniform=_bits([weight, activation], "--wbits/--abits")))

    def with_mapping(self, mapping: str) -> Architecture:
        """The same architecture, grown by another bit mapping (no effect unless its bits are per searched cell)."""
        if self.bits is None or not self.bits.cells:
            return self
        return replace(self, bits=replace(self.bits, mapping=mapping))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of architecture.json."""
        return {
            "schema": SCHEMA,
            "space": self.space,
            "name": self.name,
            "genotype": _space(self.space).to_json(self.genotype),
            "bits": None if self.bits is None else _bits_to_json(self.bits),
            "search": dict(self.search),
        }

    def save(self, path: Path) -> Path:
        """Write the JSON file (aside, synced, then renamed); return its path. OSError names it and leaves no debris."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            with open(aside, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            aside.replace(path)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        finally:
            aside.unlink(missing_ok=True)
        return path

    @staticmethod
    def from_json(data: Any, source: str = "architecture") -> Architecture:
        """Read and validate the object of an architecture.json; every error names `source` and the field."""
        try:
            return _from_json(data)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def genotype_to_json(genotype: Genotype) -> dict[str, Any]:
    """Genotype as JSON lists."""
    return {
        "normal": [[p, s] for p, s in genotype.normal],
        "normal_concat": list(genotype.normal_concat),
        "reduce": [[p, s] for p, s in genotype.reduce],
        "reduce_concat": list(genotype.reduce_concat),
    }


def _bits_to_json(policy: BitPolicy) -> dict[str, Any]:
    if policy.uniform is not None:
        return {"kind": "uniform", "uniform": list(policy.uniform)}
    if policy.layers:
        return {"kind": "layers", "layers": {name: list(pair) for name, pair in policy.layers.items()}}
    cells = [
        {
            "type": "reduction" if c.reduction else "normal",
            "preprocess0": list(c.preprocess0),
            "preprocess1": list(c.preprocess1),
            "operations": [None if pair is None else list(pair) for pair in c.operations],
        }
        for c in policy.cells
    ]
    return {"kind": "cells", "mapping": policy.mapping, "cells": cells}


def _object(data: Any, where: str, required: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, found {type(data).__name__}")
    if missing := required - data.keys():
        raise ValueError(f"{where}: field {sorted(missing)[0]!r} is missing")
    if unknown := data.keys() - required - optional:
        raise ValueError(f"{where}: unknown field {sorted(map(str, unknown))[0]!r}")
    return data


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError(f"{where}: expected a list, found {type(data).__name__}")
    if len(data) > 10_000:
        raise ValueError(f"{where}: {len(data)} entries are too many")
    return data


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: expected an integer, found {value!r}")
    return value


def _bits(data: Any, where: str) -> Bits:
    pair = _list(data, where)
    if len(pair) != 2:
        raise ValueError(f"{where}: expected [weight bits, activation bits], found {data!r}")
    for value in pair:
        if _integer(value, where) not in SUPPORTED_BITS:
            raise ValueError(
                f"{where}: {value} bits are not supported; choose among {', '.join(map(str, SUPPORTED_BITS))}"
            )
    return pair[0], pair[1]


def _pairs(data: Any, where: str) -> tuple[tuple[str, int], ...]:
    pairs = []
    for k, entry in enumerate(_list(data, where)):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{where}[{k}]: expected [primitive, state], found {entry!r}")
        pairs.append((entry[0], _integer(entry[1], f"{where}[{k}]")))
    return tuple(pairs)


def genotype_from_json(data: Any, where: str = "genotype") -> Genotype:
    """Read a genotype written by genotype_to_json; raises ValueError naming the field."""
    data = _object(data, where, {"normal", "normal_concat", "reduce", "reduce_concat"})
    concat = {
        key: tuple(_integer(s, f"{where}.{key}") for s in _list(data[key], f"{where}.{key}"))
        for key in ("normal_concat", "reduce_concat")
    }
    return Genotype(
        _pairs(data["normal"], f"{where}.normal"),
        concat["normal_concat"],
        _pairs(data["reduce"], f"{where}.reduce"),
        concat["reduce_concat"],
    )


def _policy_from_json(data: Any) -> BitPolicy:
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "uniform":
        return BitPolicy(uniform=_bits(_object(data, "bits", {"kind", "uniform"})["uniform"], "bits.uniform"))
    if kind == "layers":
        layers = _object(data, "bits", {"kind", "layers"})["layers"]
        if not isinstance(layers, dict) or not layers:
            raise ValueError("bits.layers: expected an object of layer names")
        return BitPolicy(layers={name: _bits(pair, f"bits.layers.{name}") for name, pair in layers.items()})
    if kind != "cells":
        raise ValueError(f"bits.kind: {kind!r} is unknown; known: uniform, cells, layers")
    data = _object(data, "bits", {"kind", "cells"}, {"mapping"})
    cells = []
    for k, entry in enumerate(_list(data["cells"], "bits.cells")):
        where = f"bits.cells[{k}]"
        entry = _object(entry, where, {"type", "preprocess0", "preprocess1", "operations"})
        if entry["type"] not in ("normal", "reduction"):
            raise ValueError(f"{where}.type: {entry['type']!r} is unknown; known: normal, reduction")
        operations = tuple(
            None if pair is None else _bits(pair, f"{where}.operations[{n}]")
            for n, pair in enumerate(_list(entry["operations"], f"{where}.operations"))
        )
        ends = [_bits(entry[key], f"{where}.{key}") for key in ("preprocess0", "preprocess1")]
        cells.append(CellBits(entry["type"] == "reduction", ends[0], ends[1], operations))
    if not cells:
        raise ValueError("bits.cells: empty")
    return BitPolicy(cells=tuple(cells), mapping=data.get("mapping", "relative"))


def needs_bits(primitive: str, stride: int) -> bool:
    """Whether an operation holds convolutions (pooling and the identity do not)."""
    if primitive == "skip_connect":
        return stride == 2
    return "pool" not in primitive


def _check_cells(genotype: Genotype, cells: tuple[CellBits, ...]) -> None:
    for k, cell in enumerate(cells):
        pairs = genotype.reduce if cell.reduction else genotype.normal
        if len(cell.operations) != len(pairs):
            raise ValueError(f"bits.cells[{k}].operations: expected {len(pairs)} entries, found {len(cell.operations)}")
        for n, ((primitive, state), pair) in enumerate(zip(pairs, cell.operations, strict=True)):
            stride = 2 if cell.reduction and state < 2 else 1
            if pair is None and needs_bits(primitive, stride):
                raise ValueError(f"bits.cells[{k}].operations[{n}]: missing bits for {primitive}")


def _from_json(data: Any) -> Architecture:
    data = _object(data, "architecture", {"schema", "space", "genotype", "bits"}, {"search", "name"})
    if data["schema"] is True or data["schema"] != SCHEMA:
        raise ValueError(f"schema: {data['schema']!r} is not {SCHEMA}, the one this version reads")
    space = _space(data["space"])
    search, name = data.get("search") or {}, data.get("name")
    if not isinstance(search, dict):
        raise ValueError("search: expected an object")
    if name is not None and not isinstance(name, str):
        raise ValueError("name: expected a string")
    bits = None if data["bits"] is None else _policy_from_json(data["bits"])
    return Architecture(space.from_json(data["genotype"]), bits, data["space"], search, name)


@dataclass(frozen=True)
class Space:
    """How the genotypes of one search space are checked, written and read; each raises ValueError naming the field."""

    validate: Callable[[Any], None]
    to_json: Callable[[Any], dict[str, Any]]
    from_json: Callable[[Any], Any]


def _validate_darts(genotype: Genotype) -> None:
    validate_genotype(genotype, tuple(OPERATIONS))


SPACES: dict[str, Space] = {
    DARTS: Space(_validate_darts, genotype_to_json, genotype_from_json),
    enas_space.SPACE: Space(enas_space.validate_cells, enas_space.cells_to_json, enas_space.cells_from_json),
}
"""The search spaces by name; `networks.NETWORKS` builds from them."""


def _space(name: Any) -> Space:
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"space: {name!r} is unknown; known: {', '.join(SPACES)}")
    return SPACES[name]


def written_out(target: str) -> bool:
    """Whether the text is an architecture's numbers, rather than its name or the path of a file."""
    return _INTEGERS.match(target) is not None


def _may_exist(target: str) -> bool:
    """Whether a file system could know this name."""
    try:
        parts = [os.fsencode(part) for part in target.split(os.sep)]
    except UnicodeEncodeError:
        return False
    return max(map(len, parts)) <= _MAX_NAME and len(target) <= _MAX_PATH and "\0" not in target


def load_architecture(name_or_path: str | Path) -> Architecture:
    """Resolve a genotype's name, an architecture.json, a run folder that holds one, or the numbers of two micro cells.

    A path that exists wins over a name, but a folder without an architecture.json does not hide one (the project's
    own `darts/`). Raises ValueError that names the file and field, or the nearest names.
    """
    if isinstance(name_or_path, str) and written_out(name_or_path):
        return Architecture(enas_space.parse_cells(name_or_path), space=enas_space.SPACE)
    if not _may_exist(str(name_or_path)):
        raise ValueError(f"{str(name_or_path)[:60]!r}...: no name, no file and no folder is called so")
    path = Path(name_or_path)
    if path.is_dir() and not (path / "architecture.json").is_file():
        try:
            canonical, genotype = lookup(str(name_or_path))
        except ValueError:
            cure = "name a search's run folder"
            if (path / "config.json").is_file():
                cure = "a search writes it at its end; go on with that run first (--resume auto), or name another"
            raise ValueError(f"{name_or_path}: this folder holds no architecture.json; {cure}") from None
        return Architecture(genotype, name=canonical)
    path = path / "architecture.json" if path.is_dir() else path
    if path.is_file():
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for an architecture")
        try:
            data = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from error
        return Architecture.from_json(data, str(path))
    if path.suffix == ".json" or path.parent != Path("."):
        raise ValueError(f"{name_or_path}: no such file or folder")
    canonical, genotype = lookup(str(name_or_path))
    return Architecture(genotype, name=canonical)
