# SPDX-License-Identifier: Apache-2.0
"""Exact cost against the oracles, the reference's tables, torch's own counter, and sums over the built modules."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.cost import network_cost, trace_layers
from common.cost.__main__ import cost_of, make_parser
from common.nets import Network, build_network, build_supernet, load_architecture

# reference.md 1.4: genotype -> params, quantised convolutions, (a) size product M, (b) group-aware MACs M, (a) input K,
# true weights M; measured on the reference at C=36 L=20 (CIFAR) and C=48 L=14 at 224 pixels (ImageNet).
CIFAR_TABLE = {
    "PC_DARTS_cifar": (3_634_678, 458, 4003.631, 553.679, 12589.487, 3.583),
    "DARTS_V2": (3_349_342, 438, 2851.704, 525.367, 12257.712, 3.300),
    "QDARTS_CIFAR_0": (3_870_550, 490, 6764.007, 621.416, 13418.927, 3.817),
    "QDARTS_CIFAR_1e7": (3_618_262, 442, 5426.286, 566.839, 12368.304, 3.568),
    "QDARTS_CIFAR_1e9": (3_647_206, 450, 4969.762, 562.913, 12395.952, 3.596),
    "QDARTS_CIFAR_1e15": (3_862_558, 482, 6219.773, 604.828, 13188.743, 3.809),
    "QDARTS_CIFAR_1e15_CO": (3_503_998, 406, 6249.091, 557.162, 11428.272, 3.457),
}
IMAGENET_TABLE = {
    "PC_DARTS_image": (5_342_464, 3512.728, 523.960),
    "QDARTS_IMGNT": (4_586_464, 4589.305, 456.420),
    "QDARTS_IMGNT_5e5": (4_373_536, 4903.795, 442.458),
    "QDARTS_IMGNT_1e9": (3_561_952, 2837.346, 338.048),
    "QDARTS_IMGNT_0": (3_782_560, 3285.318, 365.407),
    "QDARTS_IMGNT_1e9_100": (5_242_624, 6373.965, 546.370),
}


def network(name: str, bits: tuple[int, int] = (32, 32), **options: Any) -> Network:
    """A network without memory (meta device): counting computes nothing."""
    settings = {"num_classes": 10, "init_channels": 36, "layers": 20} | options
    with torch.device("meta"):
        return build_network(load_architecture(name).with_uniform_bits(*bits), **settings)


def imagenet(name: str, bits: tuple[int, int] = (32, 32), **options: Any) -> Network:
    """The papers' ImageNet size."""
    return network(name, bits, init_channels=48, layers=14, num_classes=1000, stem="imagenet", **options)


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "PC_DARTS_cifar", "PC_DARTS_image"])
def test_parameters_and_macs_equal_the_oracle(oracle: Any, name: str) -> None:
    truth = oracle("eval_params_macs")[name]
    for key, model, size, macs in (
        ("cifar_C36_L20", network(name, auxiliary=True), 32, "macs_32x32"),
        ("imagenet_C48_L14", imagenet(name, auxiliary=True), 224, "macs_224x224"),
    ):
        cost = network_cost(model, size)
        assert cost.parameters == truth[key]["params_no_aux"]
        assert cost.parameters_with_auxiliary == truth[key]["params_with_aux"]
        assert cost.macs == truth[key][macs]
        assert cost.bitops == cost.macs * 1024
        assert cost.weight_bytes == cost.weight_bytes_fp32 == 4 * cost.parameters


def first_quick(names: Iterable[str]) -> list[Any]:
    """The first of them, and the rest marked as slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if k else []) for k, name in enumerate(names)]


@pytest.mark.parametrize("name", first_quick(CIFAR_TABLE))
def test_cifar_table(name: str) -> None:
    parameters, convolutions, sizes, macs, inputs, weights = CIFAR_TABLE[name]
    cost = network_cost(network(name, (2, 4)), 32)
    quantised = [row for row in cost.layers if row.quantizable]
    assert cost.parameters == parameters
    assert len(quantised) == convolutions
    assert cost.bitops_paper / 8 / 1e6 == pytest.approx(sizes, abs=2e-3)
    assert cost.bitops_quantized / 8 / 1e6 == pytest.approx(macs, abs=1e-3)
    assert sum(row.activation_bytes for row in quantised) * 8 / 4 / 1e3 == pytest.approx(inputs, abs=2e-3)
    assert sum(row.weight_bytes for row in quantised) * 8 / 2 / 1e6 == pytest.approx(weights, abs=1e-3)


@pytest.mark.parametrize("name", first_quick(IMAGENET_TABLE))
def test_imagenet_table(name: str) -> None:
    parameters, sizes, macs = IMAGENET_TABLE[name]
    cost = network_cost(imagenet(name, (2, 2)), 224)
    assert cost.parameters == parameters
    assert cost.bitops_paper / 4 / 1e6 == pytest.approx(sizes, abs=1e-3)
    assert cost.bitops_quantized / 4 / 1e6 == pytest.approx(macs, abs=1e-3)


def test_published_bitops_of_pc_darts() -> None:
    """Group-aware 566.97 G full precision, 8.859 G at 4/4, 2.215 G at 2/2; group-blind 4099.72, 64.06, 16.01 G."""
    for bits, exact, paper in ((32, 566.97, 4099.72), (4, 8.859, 64.06), (2, 2.215, 16.01)):
        cost = network_cost(network("PC_DARTS", (bits, bits)), 32)
        assert cost.bitops_quantized / 1e9 == pytest.approx(exact, abs=5e-3)
        assert cost.bitops_paper / 1e9 == pytest.approx(paper, abs=1e-2)
        ends = cost.macs - cost.macs_quantized
        assert cost.bitops == cost.bitops_quantized + 1024 * ends


@pytest.mark.parametrize(
    "name, stem, size, options",
    [
        ("PC_DARTS", "cifar", 32, {}),
        ("DARTS_V2", "cifar", 16, {"in_channels": 1}),
        ("NASNet", "cifar", 32, {}),
        ("AmoebaNet", "cifar", 28, {}),
        ("DARTS_V1", "imagenet", 64, {}),
        ("NASNet", "imagenet", 64, {"layers": 4}),
    ],
)
def test_macs_equal_torchs_counter(name: str, stem: str, size: int, options: dict[str, Any]) -> None:
    settings = {"init_channels": 8, "layers": 6, "stem": stem} | options
    model = network(name, (2, 4), **settings)
    cost = network_cost(model, size)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, settings.get("in_channels", 3), size, size, device="meta"))
    assert 2 * cost.macs == counter.get_total_flops()
    assert sum(row.macs for row in cost.layers) == cost.macs


@pytest.mark.parametrize("method, key", [("darts", "search_C16_L8_cifar10"), ("pc-darts", "search_C16_L8_cifar10")])
def test_supernet_macs_equal_the_oracle(oracle: Any, method: str, key: str) -> None:
    truth = oracle(f"super_{method.replace('-', '')}_params_genotypes")["results"][key]
    with torch.device("meta"):
        model = build_supernet(method=method, num_classes=10, init_channels=16, layers=8).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * truth["macs_one_forward_32x32"]


@pytest.mark.parametrize("ends", [(32, 32), (8, 8), (4, 32)])
def test_bits_and_memory_are_sums_over_the_modules(ends: tuple[int, int]) -> None:
    model = build_network(
        load_architecture("PC_DARTS").with_uniform_bits(2, 4),
        num_classes=10,
        init_channels=8,
        layers=5,
        stem_bits=ends[0],
        classifier_bits=ends[1],
        auxiliary=True,
    )
    cost = network_cost(model, 32)
    head = {id(p) for n, p in model.named_parameters() if "auxiliary" in n}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in head)
    saved = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "auxiliary" not in name:
            saved += module.weight.numel() * (32 - getattr(module, "weight_bits", 32))
    assert cost.parameters == parameters
    assert cost.weight_bytes == (32 * parameters - saved) / 8
    assert cost.weight_bytes_fp32 == 4 * parameters
    by_name = {row.name: row for row in cost.layers}
    stem, classifier = cost.layers[0], by_name["classifier"]
    assert (stem.weight_bits, stem.activation_bits) == (ends[0], ends[0])
    assert (classifier.weight_bits, classifier.activation_bits) == (ends[1], ends[1])
    for row, bits in ((stem, ends[0]), (classifier, ends[1])):
        assert row.quantizable == (bits < 32)
        assert row.bitops == row.macs * bits * bits
    assert cost.bitops == sum(row.macs * row.weight_bits * row.activation_bits for row in cost.layers)
    assert cost.activation_bytes == sum(row.activation_bytes for row in cost.layers)
    assert classifier.macs == 10 * model.classifier.in_features
    assert stem.activation_bytes == 3 * 32 * 32 * ends[0] / 8


def test_input_size_forms_and_json() -> None:
    model = network("DARTS_V2", init_channels=8, layers=5)
    cost = network_cost(model, 32)
    assert cost == network_cost(model, (32, 32)) == network_cost(model, (3, 32, 32))
    data = cost.to_json()
    assert "layers" not in data and data["macs"] == cost.macs
    assert len(cost.to_json(per_layer=True)["layers"]) == len(cost.layers)


def test_counting_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    model = build_network(
        load_architecture("DARTS_V2").with_uniform_bits(8, 8), num_classes=4, init_channels=4, layers=3
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network_cost(model, 16)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30"):
        network_cost(network("DARTS_V2", init_channels=8, layers=5), 30)
    with pytest.raises(ValueError, match="auxiliary"):
        network_cost(network("DARTS_V2", init_channels=8, layers=5, auxiliary=True), 16)


def test_a_trained_run_costs_what_its_result_says(tmp_path: Path) -> None:
    """Data of the user's own: neither their channels nor their classes stand in the flags."""
    load_architecture("PC_DARTS").save(tmp_path / "architecture.json")
    network = {"stem": "cifar", "in_channels": 2, "num_classes": 7, "init_channels": 4, "layers": 3, "image_size": 24}
    config = {"dataset": "cifar10", "data_module": "own.py:mine", "image_size": None, "init_channels": 4, "layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({"stage": "train", "config": config}))
    parser = make_parser()
    with pytest.raises(ValueError, match="finished training"):
        cost_of(parser.parse_args([str(tmp_path)]))
    (tmp_path / "result.json").write_text(json.dumps({"dataset": "mine", "network": network}))
    cost, sizes = cost_of(parser.parse_args([str(tmp_path)]))
    size = network.pop("image_size")
    assert cost == network_cost(build_network(load_architecture("PC_DARTS"), **network), size)
    assert sizes["dataset"] == "mine" and sizes["num_classes"] == 7


def _by_its_maximum(x: torch.Tensor) -> torch.Tensor:
    return x / x.amax((0, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    "operation, error",
    [
        (lambda x: x.view(len(x), -1, 4, 4), RuntimeError),  # -1 is ambiguous where there are no images
        (_by_its_maximum, IndexError),
        (lambda x: x * (1 // len(x)), ZeroDivisionError),
    ],
)
def test_an_operation_that_cannot_take_an_empty_batch_is_traced_too_and_weights_stay(
    operation: Any, error: type[Exception]
) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(operation(x).flatten(1))

    module = Own()
    with pytest.raises(error):
        operation(torch.zeros(0, 3, 4, 4))
    before = module.linear.weight.detach().clone()
    (shape,) = trace_layers(module, (3, 4, 4))
    assert (shape.in_elements, shape.weights, shape.macs) == (48, 240, 240)
    assert torch.equal(module.linear.weight, before) and module.training
