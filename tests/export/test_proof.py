# SPDX-License-Identifier: Apache-2.0
"""The proof finds what is not the network: a wrong code, a wrong constant, a layer that does more than it says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.export import proof
from common.export.formats import FORMATS, Source
from common.export.integer_network import integer_network
from common.export.packed import read_packed
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
