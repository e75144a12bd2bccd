# SPDX-License-Identifier: Apache-2.0
"""No file that ends in .pt2 runs what it brings along: whatever export.py does not write is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.export.formats import Source
from common.export.runtimes import load_runner
from common.export.torch_export import write_torch
from common.nets import Architecture
from genotypes import Genotype
from tests.helpers.exports import digits, source_of

GENOTYPE = Genotype((("skip_connect", 0), ("max_pool_3x3", 1)), (2,), (("skip_connect", 0), ("avg_pool_3x3", 1)), (2,))
GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
SAMPLES = "data/sample_inputs/model.pt"

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def source() -> Source:
    architecture = Architecture(GENOTYPE).with_uniform_bits(2, 4)
    return source_of(architecture, *digits(8, 8), init_channels=4, layers=1, stem="cifar")


@pytest.fixture(scope="module")
def good(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "network.pt2"
    write_torch(source, path)
    return path


def changed(good: Path, path: Path, change: Callable[[Members], Any], compression: int = zipfile.ZIP_STORED) -> Path:
    """The file with other members."""
    with zipfile.ZipFile(good) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def program(change: Callable[[Any], Any], member: str = GRAPH) -> Callable[[Members], None]:
    """A change of a JSON member."""

    def apply(members: Members) -> None:
        value = json.loads(members[member])
        change(value)
        members[member] = json.dumps(value).encode()

    return apply


def test_the_good_file_loads_after_the_change_of_nothing(good: Path, source: Source, tmp_path: Path) -> None:
    x = next(iter(source.test()))[0]
    same = load_runner(changed(good, tmp_path / "same.pt2", lambda members: None))(x)
    assert torch.equal(same, load_runner(good)(x))
    with torch.no_grad():
        torch.testing.assert_close(same, source.network(x)[0], rtol=1e-4, atol=1e-4)


def test_the_file_is_the_same_each_time_and_wherever_it_is_written(good: Path, source: Source, tmp_path: Path) -> None:
    write_torch(source, tmp_path / "other.pt2")
    assert (tmp_path / "other.pt2").read_bytes() == good.read_bytes()


class Evil:
    """Makes a folder when it is read by pickle."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def pickled(place: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Evil(place),), buffer)
    return buffer.getvalue()


def test_nothing_that_was_pickled_runs(good: Path, tmp_path: Path) -> None:
    place = tmp_path / "made"
    evil = pickled(place)
    # the trap works: torch itself falls into it
    trap = changed(good, tmp_path / "trap.pt2", lambda members: members.update({SAMPLES: evil}))
    with contextlib.suppress(Exception):  # what becomes of it then does not matter
        torch.export.load(str(trap))
    assert place.exists()
    place.rmdir()

    def flagged(members: Members) -> None:
        config = json.loads(members[WEIGHTS])
        entry = next(iter(config["config"].values()))
        entry["use_pickle"] = True
        members |= {WEIGHTS: json.dumps(config).encode(), f"data/weights/{entry['path_name']}": evil}

    ways: dict[str, Callable[[Members], Any]] = {
        "example images": lambda members: members.update({SAMPLES: evil}),
        "weights": flagged,
        "weights of old": lambda members: members.update({"data/weights/model.pt": evil}),
        "constants of old": lambda members: members.update({"data/constants/model.pt": evil}),
        "opaque": lambda members: members.update({"data/constants/opaque_obj_0": evil}),
    }
    for change in ways.values():
        path = changed(good, tmp_path / "evil.pt2", change)
        with pytest.raises(ValueError, match=r"evil.pt2: holds .*; give a file that export.py wrote"):
            load_runner(path)
        assert not place.exists()
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.20")
        for name in ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt"):
            archive.writestr(name, evil)
    with pytest.raises(ValueError, match="old.pt2: holds 'version'"):
        load_runner(tmp_path / "old.pt2")
    assert not place.exists()


def first_node(value: Any) -> dict[str, Any]:
    return value["graph_module"]["graph"]["nodes"][0]


def every_size(value: Any, text: str) -> None:
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict) and "expr_str" in part:
            part["expr_str"] = text
        if isinstance(part, (dict, list)):
            every_size(part, text)


CHANGES: dict[str, tuple[Callable[[Members], Any], str]] = {
    "a library": (lambda m: m.update({"data/aotinductor/model/a.so": b""}), "holds 'archive/data/aotinductor"),
    "another program": (lambda m: m.update({"models/other.json": m[GRAPH]}), "holds 'archive/models/other.json'"),
    "a path": (lambda m: m.update({"data/weights/../../x": b""}), "which no exported network has"),
    "a call as size": (program(lambda p: every_size(p, "__import__('os').getcwd()")), "as expr_str"),
    "a power as size": (program(lambda p: every_size(p, "9**9**9")), "as expr_str"),
    "an attribute as size": (program(lambda p: every_size(p, "Symbol.__class__")), "as expr_str"),
    "a function of torch": (program(lambda p: first_node(p).update(target="torch.load")), "calls 'torch.load'"),
    "a module of torch": (program(lambda p: first_node(p).update(target="torch.os.system")), "calls 'torch.os"),
    "a file's operator": (program(lambda p: first_node(p).update(target="torch.ops.aten.from_file.default")), "calls"),
    "no operator": (program(lambda p: first_node(p).update(target="torch.ops.aten.add.__class__")), "calls"),
    "a name of code": (program(lambda p: first_node(p).update(name="x): print(1) #")), "holds the text"),
    "more of a step": (program(lambda p: first_node(p)["metadata"].update(source_fn_stack="x")), "notes"),
    "conditions": (program(lambda p: p.update(guards_code=["L.x"])), "holds conditions"),
    "a type": (
        program(
            lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(in_spec='[1, {"type": "os.x"}]')
        ),
        "as in_spec",
    ),
    "an argument of code": (
        program(
            lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=["x=print(1)"])
        ),
        "holds the text",
    ),
    "no weights": (lambda m: m.update({"data/weights/weight_0": b""}), "has no content"),
    "a member less": (lambda m: m.pop("data/weights/weight_0"), "weight_0"),
    "no graph": (lambda m: m.pop(GRAPH), "lacks models/model.json"),
    "no JSON": (lambda m: m.update({GRAPH: b"{"}), "models/model.json is no JSON"),
    "a list": (lambda m: m.update({GRAPH: b"[]"}), "give a file"),
    "another order of steps": (
        program(lambda p: p["graph_module"]["graph"]["nodes"].reverse()),
        "torch cannot load it",
    ),
    "an operator of another kind": (
        program(lambda p: first_node(p).update(target="_operator.and_")),
        "torch cannot load it",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_export_does_not_write_is_refused_by_name(name: str, good: Path, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = changed(good, tmp_path / "changed.pt2", change)
    with pytest.raises(ValueError, match=f"changed.pt2: .*{message}"):
        load_runner(path)


def test_archives_that_two_readers_may_read_in_two_ways_are_refused(good: Path, tmp_path: Path) -> None:
    path = changed(good, tmp_path / "packed.pt2", lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="packed.pt2: .*compressed"):
        load_runner(path)
    data = bytearray(good.read_bytes())
    for place in range(0, len(data), len(data) // 40):
        damaged = bytearray(data)
        damaged[place] ^= 255
        path.write_bytes(damaged)
        try:
            load_runner(path)  # bytes between two members are of no account
        except ValueError as error:
            assert str(error).startswith(str(path))
