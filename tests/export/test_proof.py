# SPDX-License-Identifier: Apache-2.0
"""The proof finds what is not the network: a wrong code, a wrong constant, a layer that does more than it says."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import export
from common.export import proof
from common.export.formats import FORMATS, Source
from common.export.integer_network import integer_network
from common.export.onnx_formats import compare_whole
from common.export.packed import packed_bytes_of, read_packed
from common.nets import Architecture
from common.quant import QuantConv2d
from common.quant.integer import IntegerLayer
from genotypes import lookup
from tests.helpers.exports import digits, source_of

PAIR = {"init_channels": 4, "layers": 3, "stem": "cifar"}


@pytest.fixture(scope="module")
def source() -> Source:
    architecture = Architecture(lookup("PC_DARTS")[1]).with_uniform_bits(4, 8)
    return source_of(architecture, *digits(16, 20), **PAIR)


@pytest.fixture
def integers(source: Source) -> dict[str, IntegerLayer]:
    """The layers of the network in integers; `[""]` is the network."""
    network = integer_network(source.network)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, IntegerLayer)}
    return {"": network, **layers}


def test_a_whole_proof(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    FORMATS["packed"].write(source, path)
    figures = FORMATS["packed"].check(source, path)
    with torch.no_grad():
        x, y = next(iter(source.test()))
        logits, packed = source.network(x)[0], read_packed(path).network(x)[0]
    whole = figures["float32"]
    assert whole["images"] == figures["float64"]["images"] == 20
    assert whole["top1"] == (logits.argmax(1) == y).double().mean().item()
    assert whole["top1_packed"] == (packed.argmax(1) == y).double().mean().item()
    assert whole["top1_agreement"] == (packed.argmax(1) == logits.argmax(1)).double().mean().item()
    assert whole["largest_logit_difference"] == pytest.approx((packed - logits).abs().max().item(), abs=1e-6)
    assert figures["float64"]["flipped"] == figures["layers"]["different"] == 0
    inputs = sum(layer.activation_bytes for layer in proof.network_cost(source.network, 16).layers if layer.quantizable)
    assert whole["codes"] == 20 * inputs  # at 8 bits every element of an input is one byte, and one code
    assert figures["size"]["bytes"] == path.stat().st_size and figures["size"]["within"]
    assert 0 < figures["layers"]["from_whole"] < 0.25


def test_one_wrong_code_is_found(source: Source, integers: dict[str, IntegerLayer]) -> None:
    layer = integers["cells.1.operations.2.pointwise1"]
    layer._carried[0, 0, 0, 0] += 2
    with pytest.raises(ValueError, match=r"file: cells.1.operations.2.pointwise1: .* sums differ"):
        proof.layer_figures(source, integers[""], "file")


def test_a_wrong_constant_flips_codes(source: Source, integers: dict[str, IntegerLayer]) -> None:
    batch = next(iter(source.test()))
    assert proof.compare(source.network, integers[""], [batch]).flipped_share < 1e-3
    integers["cells.0.preprocess0.conv"].shift += 0.5
    found = proof.compare(source.network, integers[""], [batch])
    assert found.flipped_share > 0.01 and "cells.0.preprocess0.conv" not in found.by_layer


class Doubled(QuantConv2d):
    """A layer that says it is a convolution, and is two."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return 2 * super().forward(x, relu)


def test_a_layer_that_does_more_than_it_says_is_refused(source: Source, tmp_path: Path) -> None:
    other = copy.deepcopy(source.network)
    other.cells[1].preprocess1.conv.__class__ = Doubled
    changed = Source(**{**vars(source), "network": other})
    with pytest.raises(ValueError, match="file: .* codes differ from the network's in float64"):
        proof.exact_figures(changed, "file")
    with pytest.raises(ValueError, match=r"file: cells.1.preprocess1.conv: .* sums differ"):
        proof.layer_figures(changed, integer_network(other), "file")


def test_images_are_counted_once_whatever_the_batches(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (part[:11] for part in next(iter(source.test())))
    packed = integer_network(source.network)
    whole = proof.compare(source.network, packed, [(x, y)])
    monkeypatch.setattr(proof, "_CODES_AT_ONCE", 1)  # one image at a time
    parts = proof.compare(source.network, packed, [(x[:7], y[:7]), (x[7:], y[7:])])
    assert (parts.images, parts.codes, parts.correct) == (whole.images, whole.codes, whole.correct)
    few = proof.compare(source.network, packed, [(x[:7], y[:7]), (x[7:], y[7:])], images=9)
    assert few.images == 9 and few.codes == whole.codes * 9 // 11


def with_other_constants(source: Source, path: Path, change: Callable[[IntegerLayer], None]) -> Path:
    """A whole packed file, digests and all, of a network whose layers were changed."""
    network = integer_network(source.network)
    for module in network.modules():
        if isinstance(module, IntegerLayer):
            change(module)
    path.write_bytes(packed_bytes_of(network, proof.describe(source)))
    return path


def test_wrong_constants_on_disk_are_refused(source: Source, tmp_path: Path) -> None:
    def larger(layer: IntegerLayer) -> None:
        layer.rescale = layer.rescale * 1.7

    def shifted(layer: IntegerLayer) -> None:
        layer.shift = None if layer.shift is None else layer.shift * 1.00001

    for change in (larger, shifted):
        path = with_other_constants(source, tmp_path / "packed.safetensors", change)
        with pytest.raises(ValueError, match=r"packed.safetensors: its scales are not the network's"):
            proof.check_packed(source, path)
    path = with_other_constants(source, path, larger)
    with pytest.raises(ValueError, match=r"packed.safetensors: cells.*gives outputs 0.* of their largest away"):
        proof.layer_figures(source, read_packed(path).network, str(path))


def test_wrong_numbers_in_full_precision_are_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    proof.write_packed(source, path)
    other = copy.deepcopy(source.network)
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"packed.safetensors: its (floats|scales) are not the network's"):
        proof.check_packed(Source(**{**vars(source), "network": other}), path)


@pytest.mark.parametrize("name", ["packed", "onnx", "torch"])
def test_what_is_not_finite_is_refused_before_it_is_written(name: str, source: Source, tmp_path: Path) -> None:
    for value, where in ((float("nan"), "classifier.weight"), (float("inf"), "cells.0.preprocess0.bn.running_mean")):
        other = copy.deepcopy(source.network)
        other.state_dict()[where].view(-1)[0] = value
        with pytest.raises(ValueError, match=f"{where}: holds numbers that are not finite"):
            FORMATS[name].write(Source(**{**vars(source), "network": other}), tmp_path / FORMATS[name].file)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers_are_never_equal(source: Source) -> None:
    class NoNumbers:
        path = Path("network.onnx")

        def __call__(self, images: Tensor) -> Tensor:
            return source.network(images)[0] * float("nan")

    with pytest.raises(ValueError, match=r"network.onnx: logits are not finite"):
        compare_whole(source, source.network, NoNumbers())
    packed = integer_network(source.network)
    packed.register_forward_hook(lambda module, inputs, output: (output[0] * float("nan"), None))
    assert proof.compare(source.network, packed, source.test()).largest_logit_difference == float("inf")
    with pytest.raises(ValueError, match="logits are not finite"):
        proof.whole_figures(source, packed)


def test_a_file_beyond_its_allowance_is_said_to_be_so(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    proof.write_packed(Source(**{**vars(source), "data": {**source.data, "note": os.urandom(100_000).hex()}}), path)
    size = proof.size_figures(source, path)
    assert not size["within"] and size["bytes"] > size["allowed"]
    entry = {"file": path.name, "bytes": size["bytes"], "figures": {"size": size}}
    said = export.text({"files": {"packed": entry}, "refused": {}})
    assert f"larger than the {size['allowed']:,} bytes that the cost model's count allows" in said
    proof.write_packed(source, path)
    entry["figures"] = {"size": proof.size_figures(source, path)}
    assert "larger than" not in export.text({"files": {"packed": entry}, "refused": {}})
