# SPDX-License-Identifier: Apache-2.0
"""Like for like: for one genotype every method quantises the same tensors, at the same cost, by the same recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import darts.train
import fbqat.train
import ptq.quantize
import ptq.train
import qdarts.train
import qsubnet.train
from common.cost import Cost, network_cost
from common.engine.cli import Config
from common.nets import Architecture, Network, build_network
from common.nets.sampling import random_bits
from common.recipes.train import prepare, training_settings
from common.recipes.trained import load_trained
from genotypes import lookup
from qsubnet.subnet import OPERANDS, Subnet

SMOKE = ("--preset", "smoke", "--device", "cpu", "--no-tensorboard")
RECIPE = ("--no-auxiliary", "--no-cutout", "--drop_path_prob", "0")
GENOTYPE = lookup("PC_DARTS")[1]
SIZES = {"in_channels": 1, "num_classes": 10, "init_channels": 4, "layers": 3}
LSQ = ("--weight-quantizer", "lsq", "--activation-quantizer", "lsq")
TRAININGS = {"darts": darts.train, "ptq": ptq.train, "fbqat": fbqat.train, "qsubnet": qsubnet.train}
TRAININGS["qdarts"] = qdarts.train


def config_of(main: Callable[[Sequence[str]], int], monkeypatch: pytest.MonkeyPatch, *flags: str) -> Config:
    """What an entry point would train."""
    seen: list[Config] = []
    monkeypatch.setattr("common.recipes.train.run_training", lambda config, **_: seen.append(config))
    assert main([*SMOKE, *RECIPE, *flags]) == 0
    return seen[0]


def quantised(cost: Cost) -> dict[str, tuple[int, int]]:
    """Bits by name of every layer that is not in full precision."""
    rows = {row.name: (row.weight_bits, row.activation_bits) for row in cost.layers}
    return {name: pair for name, pair in rows.items() if min(pair) < 32}


def bitops(cost: Cost) -> dict[str, Any]:
    names = ("macs", "macs_quantized", "bitops", "bitops_quantized", "bitops_paper", "activation_bytes")
    return {name: getattr(cost, name) for name in names}


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    """The cost of each method's network of the one genotype, 4 bits for weights and activations."""
    folder, monkeypatch = tmp_path_factory.mktemp("four"), pytest.MonkeyPatch()
    subnet = Subnet(build_network(GENOTYPE, **SIZES), (2, 4))
    with torch.no_grad():
        for conv in subnet.convolutions.values():
            for operand in OPERANDS:
                getattr(conv, f"gamma_{operand}")[1] = 1.0
    files = {"qsubnet": subnet.architecture().save(folder / "qsubnet.json")}
    cells = random_bits(Architecture(GENOTYPE), (4,), torch.Generator().manual_seed(0))
    files["qdarts"] = Architecture(GENOTYPE, cells).save(folder / "qdarts.json")
    flags = {
        "fbqat, HWGQ": (fbqat.train, "--fixed_bit", "4"),
        "fbqat, LSQ": (fbqat.train, "--fixed_bit", "4", *LSQ),
        "qsubnet": (qsubnet.train, "--arch", str(files["qsubnet"])),
        "qdarts": (qdarts.train, "--arch", str(files["qdarts"])),
    }
    with monkeypatch.context() as patch:
        found = {name: prepare(config_of(one.main, patch, *more)).cost for name, (one, *more) in flags.items()}
    source, low = folder / "fp32", folder / "ptq"
    assert ptq.train.main([*SMOKE, *RECIPE, "--epochs", "1", "--save", str(source)]) == 0
    widths = ("--param_bits", "4", "--fwd_bits", "4", "--n_sample", "1", "--batch_size", "8", "--device", "cpu")
    assert ptq.quantize.main([str(source), *widths, "--save", str(low)]) == 0
    found["ptq"] = network_cost(load_trained(low)[0], 16)
    return found


def test_every_method_quantises_the_cells_convolutions(four_bits: dict[str, Cost]) -> None:
    network: Network = build_network(GENOTYPE, **SIZES)
    names = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d) and n.startswith("cells.")}
    for method, cost in four_bits.items():
        assert quantised(cost) == dict.fromkeys(names, (4, 4)), method


def test_every_method_costs_the_same(four_bits: dict[str, Cost]) -> None:
    assert len(four_bits) == 5
    full = network_cost(build_network(GENOTYPE, **SIZES), 16)
    for method, cost in four_bits.items():
        assert bitops(cost) == bitops(four_bits["qdarts"]), method
        assert cost.bitops_quantized * 64 == full.bitops_quantized and cost.macs == full.macs, method
        weights = {row.name: row.weight_bytes for row in cost.layers}
        assert weights == {row.name: row.weight_bytes for row in four_bits["qdarts"].layers}, method


def test_every_method_trains_by_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same flags give the same loop, data and augmentation, whichever entry point reads them."""
    more = {"fbqat": ("--fixed_bit", "4"), "qsubnet": ("--fixed_bit", "4")}
    found = {
        name: config_of(entry.main, monkeypatch, "--arch", "PC_DARTS", *more.get(name, ()))
        for name, entry in TRAININGS.items()
    }
    incidental = {"wbits", "abits"}
    wanted = {k: v for k, v in found["qdarts"].as_dict().items() if k not in incidental}
    for name, config in found.items():
        assert training_settings(config) == training_settings(found["qdarts"]), name
        assert {k: v for k, v in config.as_dict().items() if k not in incidental} == wanted, name
