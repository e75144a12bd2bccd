# SPDX-License-Identifier: Apache-2.0
"""architecture.json: round trips of anything valid, refusal of everything else with the field's name, bit mappings."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.nets import Architecture, load_architecture
from common.nets.architecture import BitPolicy, CellBits, map_cells
from genotypes import GENOTYPES, PRIMITIVES, Genotype

WIDTHS = st.sampled_from([1, 2, 3, 4, 8, 32])
BITS = st.tuples(WIDTHS, WIDTHS)
NAMES = [p for p in PRIMITIVES if p != "none"]


@st.composite
def cell_pairs(draw: st.DrawFn, nodes: int) -> tuple[tuple[str, int], ...]:
    """A valid cell of `nodes` nodes."""
    pairs = []
    for node in range(nodes):
        for _ in range(2):
            pairs.append((draw(st.sampled_from(NAMES)), draw(st.integers(0, node + 1))))
    return tuple(pairs)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Any valid architecture, with any of the three kinds of bits or none."""
    cells = {}
    for kind in ("normal", "reduce"):
        nodes = draw(st.integers(1, 4))
        states = range(nodes + 2)
        cells[kind] = draw(cell_pairs(nodes))
        cells[f"{kind}_concat"] = tuple(draw(st.lists(st.sampled_from(states), unique=True, min_size=1)))
    genotype = Genotype(cells["normal"], cells["normal_concat"], cells["reduce"], cells["reduce_concat"])
    form = draw(st.sampled_from(["none", "uniform", "cells", "layers"]))
    policy = None
    if form == "uniform":
        policy = BitPolicy(uniform=draw(BITS))
    elif form == "layers":
        policy = BitPolicy(layers=draw(st.dictionaries(st.text("abc.0", min_size=1), BITS, min_size=1, max_size=4)))
    elif form == "cells":
        entries = []
        for reduction in draw(st.lists(st.booleans(), min_size=1, max_size=4)):
            pairs = genotype.reduce if reduction else genotype.normal
            entries.append(CellBits(reduction, draw(BITS), draw(BITS), tuple(draw(BITS) for _ in pairs)))
        policy = BitPolicy(cells=tuple(entries), mapping=draw(st.sampled_from(["relative", "paper"])))
    search = draw(
        st.dictionaries(st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=8), st.none()), max_size=3)
    )
    return Architecture(genotype, policy, search=search, name=draw(st.none() | st.text(max_size=8)))


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_json_round_trip(architecture: Architecture) -> None:
    text = json.dumps(architecture.to_json())
    again = Architecture.from_json(json.loads(text), "round trip")
    assert again == architecture
    assert json.dumps(again.to_json()) == text


def test_file_and_folder_round_trip(tmp_path: Path) -> None:
    architecture = load_architecture("PC_DARTS").with_uniform_bits(2, 4)
    path = architecture.save(tmp_path / "architecture.json")
    assert load_architecture(path) == load_architecture(tmp_path) == load_architecture(str(tmp_path)) == architecture
    assert [p.name for p in tmp_path.iterdir()] == ["architecture.json"]


@pytest.mark.parametrize("name", ["pc_darts", "PCDARTS", "darts", "DARTS_V2", "qdarts_imgnt"])
def test_names_resolve(name: str) -> None:
    found = load_architecture(name)
    assert found.bits is None and found.genotype == GENOTYPES[found.name]


def test_a_name_wins_over_a_folder_that_holds_no_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own folder is called darts/: `--arch darts` from its root means the cell."""
    (tmp_path / "darts").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_architecture("darts").name == "DARTS_V2"


def valid(kind: str) -> dict[str, Any]:
    """A valid JSON object with bits of `kind`."""
    data = load_architecture("DARTS_V2").to_json()
    cells = {"preprocess0": [2, 4], "preprocess1": [2, 4], "operations": [[2, 4]] * 8}
    data["bits"] = {
        "none": None,
        "uniform": {"kind": "uniform", "uniform": [2, 4]},
        "layers": {"kind": "layers", "layers": {"cells.0.preprocess0.conv": [2, 4]}},
        "cells": {"kind": "cells", "cells": [{"type": "normal", **cells}, {"type": "reduction", **cells}]},
    }[kind]
    return copy.deepcopy(data)


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one entry."""

    def apply(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return apply


def remove(*path: str | int) -> Callable[[dict[str, Any]], None]:
    """Removal of one entry."""

    def apply(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return apply


BAD = [
    ("none", change("schema", to=2), "schema"),
    ("none", change("schema", to="1"), "schema"),
    ("none", remove("schema"), "schema"),
    ("none", change("space", to="chess"), "space"),
    ("none", remove("space"), "space"),
    ("none", remove("genotype"), "genotype"),
    ("none", change("genotype", to=[]), "genotype"),
    ("none", remove("genotype", "normal"), "normal"),
    ("none", remove("genotype", "reduce_concat"), "reduce_concat"),
    ("none", change("genotype", "normal", to="sep_conv_3x3"), "genotype.normal"),
    ("none", change("genotype", "normal", 3, to=["sep_conv_3x3"]), r"genotype.normal\[3\]"),
    ("none", change("genotype", "normal", 3, 0, to="sep_conv_9x9"), r"genotype.normal\[3\].*sep_conv_9x9"),
    ("none", change("genotype", "normal", 3, 0, to="none"), r"genotype.normal\[3\].*none"),
    ("none", change("genotype", "normal", 3, 0, to=None), r"genotype.normal\[3\]"),
    ("none", change("genotype", "reduce", 0, 1, to=2), r"genotype.reduce\[0\].*2"),
    ("none", change("genotype", "reduce", 0, 1, to=-1), r"genotype.reduce\[0\].*-1"),
    ("none", change("genotype", "reduce", 0, 1, to=0.5), r"genotype.reduce\[0\]"),
    ("none", change("genotype", "reduce", 0, 1, to=True), r"genotype.reduce\[0\]"),
    ("none", change("genotype", "reduce", 7, 1, to=5), r"genotype.reduce\[7\].*5"),
    ("none", remove("genotype", "normal", 7), "genotype.normal"),
    ("none", change("genotype", "normal", to=[]), "genotype.normal"),
    ("none", change("genotype", "normal_concat", to=[]), "normal_concat"),
    ("none", change("genotype", "normal_concat", to=[2, 2]), "normal_concat"),
    ("none", change("genotype", "normal_concat", to=[6]), "normal_concat"),
    ("none", change("genotype", "normal_concat", to=["2"]), "normal_concat"),
    ("none", change("surprise", to=1), "surprise"),
    ("none", change("genotype", "surprise", to=1), "surprise"),
    ("none", remove("bits"), "bits"),
    ("none", change("search", to=[1]), "search"),
    ("none", change("name", to=3), "name"),
    ("none", change("bits", to=4), "bits"),
    ("none", change("bits", to={"kind": "mystery"}), "bits.kind.*mystery"),
    ("uniform", change("bits", "uniform", to=[2]), "bits.uniform"),
    ("uniform", change("bits", "uniform", to=[2, 5]), "bits.uniform.*5"),
    ("uniform", change("bits", "uniform", to=[2, "4"]), "bits.uniform"),
    ("uniform", remove("bits", "uniform"), "uniform"),
    ("layers", change("bits", "layers", to={}), "bits.layers"),
    ("layers", change("bits", "layers", "cells.0.preprocess0.conv", to=[2, 7]), "bits.layers.cells.0.*7"),
    ("cells", change("bits", "cells", to=[]), "bits.cells"),
    ("cells", change("bits", "cells", 1, "type", to="big"), r"bits.cells\[1\].type.*big"),
    ("cells", remove("bits", "cells", 1, "preprocess1"), r"bits.cells\[1\].*preprocess1"),
    ("cells", change("bits", "cells", 1, "preprocess1", to=None), r"bits.cells\[1\].preprocess1"),
    ("cells", change("bits", "cells", 0, "operations", 2, to=[3]), r"bits.cells\[0\].operations\[2\]"),
    ("cells", change("bits", "cells", 0, "operations", 0, to=None), r"bits.cells\[0\].operations\[0\].*sep_conv_3x3"),
    ("cells", remove("bits", "cells", 0, "operations", 7), r"bits.cells\[0\].operations"),
    ("cells", change("bits", "mapping", to="by luck"), "bits.mapping.*by luck"),
    ("cells", change("bits", "surprise", to=1), "surprise"),
]


@pytest.mark.parametrize("kind, spoil, message", BAD)
def test_bad_objects_are_refused(
    kind: str, spoil: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    data = valid(kind)
    Architecture.from_json(data, "before")
    spoil(data)
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"spoiled\.json.*{message}"):
        load_architecture(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, "\x00\x01", '{"schema": NaN}']
)
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spoiled.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"spoiled\.json"):
        load_architecture(path)


def test_missing_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    for target in (
        tmp_path / "absent.json",
        tmp_path / "absent" / "run",
        tmp_path,
        tmp_path / "binary.json",
        "PC_DARTZ",
    ):
        with pytest.raises(ValueError, match=str(target)):
            load_architecture(target)


def test_uniform_bits() -> None:
    base = load_architecture("PC_DARTS")
    assert base.with_uniform_bits(32, 32).bits is None
    assert base.with_uniform_bits(2, 32).bits.uniform == (2, 32)
    with pytest.raises(ValueError, match="5"):
        base.with_uniform_bits(5, 2)


N, R = False, True
EIGHT = [N, N, R, N, N, R, N, N]


def grown(layers: int) -> list[bool]:
    """Which cells of a network reduce."""
    return [i in (layers // 3, 2 * layers // 3) for i in range(layers)]


def test_relative_mapping() -> None:
    assert map_cells(EIGHT, grown(8), "relative") == list(range(8))
    three = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7, 7]
    assert map_cells(EIGHT, grown(20), "relative") == three
    assert map_cells(EIGHT, grown(14), "relative") == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7]
    # 3 cells: normal, reduction, reduction: the later stages have no normal cell of their own and take the first
    assert map_cells([N, R, R], grown(8), "relative") == [0, 0, 1, 0, 0, 2, 0, 0]
    assert map_cells(EIGHT, [N, R, R], "relative") == [0, 2, 5]


def test_paper_mapping_is_the_reference_rule() -> None:
    """model.py 175-185: i > 6 takes normal row 0, i > 9 reduction row 0 (reference.md 1.5, defects 33 and 34)."""
    normal, reduction = [0, 1, 3, 4, 6, 7], [2, 5]
    assert map_cells(EIGHT, grown(8), "paper") == [0, 1, 2, 3, 4, 5, 6, 0]
    assert map_cells(EIGHT, grown(20), "paper") == [*normal, reduction[0], *[0] * 6, reduction[0], *[0] * 6]
    assert map_cells(EIGHT, grown(14), "paper") == [0, 1, 3, 4, 2, 6, 7, 0, 0, 5, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="paper"):
        map_cells([N, R, R], grown(20), "paper")
