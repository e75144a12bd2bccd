# SPDX-License-Identifier: Apache-2.0
"""`python -m common.cost` on architectures of micro cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.cost.__main__ import main
from common.nets import Architecture, parse_cells
from tests.helpers.enas_fill import README_ARC

SIZES = ["--layers", "6", "--out-filters", "16", "--in-channels", "1"]


def test_a_string_is_counted_at_its_true_bits(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for types in ([], ["--layer-bits", "binary"], ["--layer-bits", "float"]):
        assert main(["--space", "enas-micro", "--arch", README_ARC, *SIZES, *types, "--json"]) == 0
        found[types[-1] if types else "default"] = json.loads(capsys.readouterr().out)
    assert {cost["macs"] for cost in found.values()} == {found["float"]["macs"]}
    assert found["float"]["bitops"] == 1024 * found["float"]["macs"]
    assert found["binary"]["bitops"] < found["default"]["bitops"] < found["float"]["bitops"]
    # one bit for every convolution's weight, the rest (normalisation, classifier) in full
    binary, floats = found["binary"]["weight_bytes"], found["float"]["weight_bytes"]
    classifier = found["float"]["macs"] - found["float"]["macs_quantized"]
    assert floats == 4 * found["float"]["parameters"]
    assert floats / 32 < binary < floats / 32 + 4 * (classifier + 0.1 * found["float"]["parameters"])
    assert main([README_ARC, *SIZES]) == 0
    assert "F=16, L=6, 1x32x32 images, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(("depth", "taken"), [(1, True), (2, False)])
def test_a_search_stands_for_the_network_of_its_types_where_they_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int, taken: bool
) -> None:
    types = ["kbit4", "ternary", "binary", "kbit8"]
    flags = {"layer_bits": types, "eval_layers": depth, "eval_out_filters": 4, "image_size": 16, "dataset": "mnist"}
    (tmp_path / "config.json").write_text(json.dumps({"stage": "search", "config": flags}))
    Architecture(parse_cells(README_ARC), space="enas-micro").save(tmp_path / "architecture.json")
    assert main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer_bits"] == (types if taken else None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([README_ARC, "--space", "darts"], "--space darts"),
        (["PC_DARTS", "--space", "enas-micro"], "--space enas-micro"),
        ([README_ARC, "--init-channels", "4"], "--init-channels"),
        ([README_ARC, "--wbits", "2", "--abits", "2"], "--wbits"),
        (["PC_DARTS", "--out-filters", "4"], "--out-filters"),
        ([README_ARC, "--image-size", "20"], "--image-size: 20"),
        (["0 9 0 1 0 1 0 1"], "operation 9 is unknown"),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err
