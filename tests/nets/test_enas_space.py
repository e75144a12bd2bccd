# SPDX-License-Identifier: Apache-2.0
"""The micro space: strings, plan, parts and the fixed network, against the oracle and against plain definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.cost import network_cost
from common.nets import Architecture, build_micro_network, build_network, load_architecture, network_of, parse_cells
from common.nets.enas_layers import (
    FOUR_BITS,
    TERNARY,
    FactorizedReduction,
    LayerType,
    average_pool,
    batch_norm,
    max_pool,
    resolve_layer_types,
)
from common.nets.enas_space import SPACE, auxiliary_layer, plan_layers, reduction_layers
from common.recipes.pictures import draw_cells
from tests.helpers.enas_fill import LABELS, README_ARC, fill_enas, images, source_hinge

CELLS = parse_cells(README_ARC)
# The source's defaults for its two training scripts.
CIFAR_ARC = "1 2 1 3 0 1 0 4 1 1 1 1 0 1 0 1 1 0 0 1 0 1 0 4 1 0 2 0 0 3 1 1 0 0 0 0 4 1 1 0"
MNIST_ARC = "1 2 0 0 1 1 0 1 1 1 0 0 1 1 1 3 0 1 1 0 1 4 1 1 2 0 1 3 1 3 1 2 1 0 1 0 3 1 1 0"
SMALL = {"in_channels": 1, "num_classes": 10, "out_filters": 2, "layers": 1, "image_size": 8}


# ------------------------------------------------------------------------------------------------------ the strings


def test_the_two_bracketed_lines_of_a_log_paste_as_printed() -> None:
    printed = "[0 2 1 4 1 3 0 1 1 0 1 0 1 2 0 4 0 0 0 1]\n[1 3 1 4 0 1 1 1 1 2 1 4 3 2 0 2 1 1 0 3]"
    assert str(CELLS) == printed
    commented = f"# epoch 181\n{printed.replace(chr(10), '   # the normal cell' + chr(10))} # [9 9 9 9]"
    for text in (README_ARC, printed, commented, CELLS.numbers, f"  {CELLS.numbers.replace(' ', '   ')}\n"):
        assert parse_cells(text) == CELLS
    assert load_architecture(printed).genotype == load_architecture(CELLS.numbers).genotype == CELLS


def test_unused_nodes(oracle: Any) -> None:
    truth = oracle("enas_qnn_quantizers")["readme_unused"]
    for name, reduction in (("normal", False), ("reduce", True)):
        counts, unused = truth[name]
        read = [node for _, node in CELLS.pairs(reduction)]
        assert [read.count(node) for node in range(7)] == counts
        assert CELLS.unused(reduction) == unused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 0 1 0 1 0", "7 numbers do not make"),
        ("", "0 numbers do not make"),
        ("0 1 0 1 0 1 0 x", "'x' is no integer"),
        ("0 1 0 1.5 0 1 0 1", "'1.5' is no integer"),
        ("0 1 2 1 0 1 0 1", "normal cell, block 0, y: input 2 does not exist there; it may be 0 to 1"),
        ("0 1 0 1 0 1 -1 1", "reduction cell, block 0, y: input -1 does not exist"),
        ("0 1 0 1 0 5 0 1", "reduction cell, block 0, x: operation 5 is unknown"),
        ("0 1 0 1 0 1 0 1 " * 65, "520 numbers do not make"),
    ],
)
def test_bad_strings(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_cells(text)
    assert message in str(caught.value)


def test_strings_of_another_number_of_blocks() -> None:
    with pytest.raises(ValueError, match="cells of 1 blocks; this network has 5 blocks a cell: 40 numbers"):
        parse_cells("0 1 0 1 0 1 0 1", blocks=5)
    assert parse_cells(README_ARC, blocks=5) == CELLS


def test_architecture_file(tmp_path: Path) -> None:
    architecture = Architecture(CELLS, space=SPACE, search={"method": "enas"}, name="found")
    path = architecture.save(tmp_path / "architecture.json")
    assert load_architecture(tmp_path) == architecture
    assert json.loads(path.read_text())["space"] == "enas-micro"
    with pytest.raises(ValueError, match="space enas-micro"):
        build_network(architecture, num_classes=10, init_channels=4, layers=3)
    with pytest.raises(ValueError, match="space enas-micro"):
        architecture.with_uniform_bits(2, 2)
    first, second = draw_cells(architecture, tmp_path / "cells")
    assert "identity" in first.read_text() and second.stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["genotype"].update(normal=[0, 1, 0]), "cells of 3 and 20 numbers"),
        (lambda d: d["genotype"]["normal"].__setitem__(0, 2), "genotype: normal cell, block 0, x: input 2"),
        (lambda d: d["genotype"]["reduce"].__setitem__(1, True), "genotype.reduce: expected a list of integers"),
        (lambda d: d["genotype"].pop("reduce"), "genotype: expected an object"),
        (lambda d: d.update(bits={"kind": "uniform", "uniform": [2, 2]}), "bits: "),
        (lambda d: d.update(space=["enas-micro"]), "space: "),
    ],
)
def test_damaged_architecture_files(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = Architecture(CELLS, space=SPACE).to_json()
    change(data)
    with pytest.raises(ValueError) as caught:
        Architecture.from_json(data, "file.json")
    assert str(caught.value).startswith("file.json: ") and message in str(caught.value)


def test_picture_of_a_cell_that_leaves_an_input_unread(tmp_path: Path) -> None:
    cells = parse_cells("1 0 1 4  1 2 1 3    1 0 1 4  1 2 1 3")
    assert cells.unused(False) == [0, 2, 3]
    assert draw_cells(Architecture(cells, space=SPACE), tmp_path / "cells", formats=["svg"])[0].stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------ plan, types


def test_where_reductions_and_the_auxiliary_head_stand(oracle: Any) -> None:
    layers = {"(3,3,": 3, "(2,3,": 2, "(3,5,": 3, "(15,5": 15, "(6,5,": 6}
    for name, truth in oracle("enas_qnn")["params"].items():
        depth = next(value for key, value in layers.items() if key in name)
        assert list(reduction_layers(depth)) == truth["pool_layers"]
        assert [auxiliary_layer(depth)] == truth["aux_layer"]
    types = resolve_layer_types(None, 8)
    assert types == [FOUR_BITS, FOUR_BITS, *[TERNARY] * 7]
    plan = plan_layers(6, 16, types)
    assert [p.channels for p in plan] == [16, 32, 32, 64, 64, 64, 128, 128]
    assert [p.level for p in plan] == [0, 0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("binary", ("binary", 1)),
        ("Ternary", ("ternary", 2)),
        ("stochastic", ("stochastic", 1)),
        *((text, ("kbit", 4)) for text in ("4", "4bit", "kbit4", "KBIT4")),
        *((text, ("float", 32)) for text in ("float", "32")),
    ],
)
def test_layer_types(text: str, found: tuple[str, int]) -> None:
    kind = LayerType.parse(text)
    assert (kind.quantizer, kind.bits) == found
    assert LayerType.parse(str(kind)) == kind


@pytest.mark.parametrize(("names", "message"), [(["kbit9"], "kbit9"), (["binary"] * 3, "3 types"), (["int"], "'int'")])
def test_bad_layer_types(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"--layer-bits.*{message}"):
        resolve_layer_types(names, 8)


@pytest.mark.parametrize("name", ["binary", "ternary", "kbit1", "kbit3", "kbit4"])
@pytest.mark.parametrize("terms", [9, 25])
def test_bits_of_a_sum_hold_its_extremes_and_no_more(name: str, terms: int) -> None:
    kind = LayerType.parse(name)
    unit = 2.0 ** (kind.bits - 1) if name.startswith("kbit") else 1.0
    values = kind.activation()(torch.linspace(-2, 2, 401)).unique() * unit  # its levels, as integers
    largest = int((values[:, None] * values[None, :]).abs().max()) * terms
    assert 2 ** (kind.accumulator_bits(terms) - 1) <= 2 * largest < 2 ** kind.accumulator_bits(terms)
    assert LayerType.parse("float").accumulator_bits(terms) == 32


# ------------------------------------------------------------------------------------------------------ the parts


def naive_pool(x: Tensor, kernel: int, stride: int, kind: str) -> Tensor:
    """Pooling window by window, as TensorFlow's SAME rule is written."""
    out = [math.ceil(s / stride) for s in x.shape[2:]]
    before = [max((o - 1) * stride + kernel - s, 0) // 2 for o, s in zip(out, x.shape[2:], strict=True)]
    rows = []
    for i in range(out[0]):
        for j in range(out[1]):
            top, left = i * stride - before[0], j * stride - before[1]
            window = x[:, :, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            rows.append(window.mean((2, 3)) if kind == "avg" else window.amax((2, 3)))
    return torch.stack(rows, 2).view(*x.shape[:2], *out)


@pytest.mark.parametrize("size", [2, 4, 5, 8])
def test_pools(size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kernel, stride in ((3, 1), (3, 2), (5, 3)):
        torch.testing.assert_close(average_pool(x, kernel, stride), naive_pool(x, kernel, stride, "avg"))
    for stride in (1, 2):
        torch.testing.assert_close(max_pool(x, stride), naive_pool(x, 3, stride, "max"))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["float", "binary"])
def test_convolutions_pad_the_quantised_input(kernel: int, stride: int, kind: str) -> None:
    torch.manual_seed(0)
    layer = LayerType.parse(kind)
    conv = layer.conv(2, 3, kernel, stride=stride).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    value, weight = layer.activation()(x), conv.quantize_weight(conv.weight)
    out = math.ceil(6 / stride)
    before = max((out - 1) * stride + kernel - 6, 0) // 2
    padded = torch.zeros(2, 2, 6 + 2 * kernel, 6 + 2 * kernel, dtype=torch.float64)
    padded[:, :, before : before + 6, before : before + 6] = value
    expected = torch.zeros(2, 3, out, out, dtype=torch.float64)
    for i in range(out):
        for j in range(out):
            window = padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            expected[:, :, i, j] = torch.einsum("bchw,ochw->bo", window, weight)
    torch.testing.assert_close(conv(x), expected)


def test_factorized_reduction_is_padded_shifted_and_subsampled() -> None:
    torch.manual_seed(1)
    module = FactorizedReduction(TERNARY, batch_norm, 3, 4, quantize_input=True).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    value = TERNARY.activation()(x)
    shifted = torch.zeros(2, 3, 7, 7, dtype=torch.float64)
    shifted[:, :, :6, :6] = value  # one row and column of zeros at the bottom and right, then the first ones dropped
    shifted = shifted[:, :, 1:, 1:]
    parts = [
        torch.einsum("bchw,oc->bohw", v[:, :, ::2, ::2], conv.quantize_weight(conv.weight)[:, :, 0, 0])
        for v, conv in ((value, module.even), (shifted, module.odd))
    ]
    together = torch.cat(parts, 1)
    mean, var = together.mean((0, 2, 3), keepdim=True), together.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(module(x), (together - mean) / (var + 1e-6).sqrt())


# ------------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    ("arc", "layers", "channels", "name"),
    [
        (CIFAR_ARC, 15, 3, "train_arc_cifar_default(15,5,16,ch3)"),
        (MNIST_ARC, 6, 1, "train_arc_mnist_default(6,5,16,ch1)"),
    ],
)
def test_parameters(oracle: Any, arc: str, layers: int, channels: int, name: str) -> None:
    truth = oracle("enas_qnn")["params"][name]
    with torch.device("meta"):
        network = build_micro_network(
            parse_cells(arc), in_channels=channels, out_filters=16, layers=layers, auxiliary=True
        )
    assert network.auxiliary_head is not None
    head = list(network.auxiliary_head.parameters())
    own = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in head)
    assert (own, sum(p.numel() for p in head)) == (truth["trainable_no_aux"], truth["aux"])
    assert len(list(network.parameters())) == truth["n_tensors"]
    assert network.auxiliary_parameters() == truth["aux"]


def test_forward_and_gradients(oracle: Any) -> None:
    truth = oracle("enas_qnn")["forward"]["fixed_L4_B5_F4_readme_arcs"]
    network = build_micro_network(CELLS, out_filters=4, layers=4, auxiliary=True, compat=True)
    fill_enas(network).train()
    logits, auxiliary = network(images())
    torch.testing.assert_close(logits, torch.tensor(truth["logits"], dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(auxiliary, torch.tensor(truth["aux_logits"], dtype=torch.float64), atol=1e-8, rtol=0)
    main, side = source_hinge(logits, LABELS), source_hinge(auxiliary, LABELS)
    assert main.item() == pytest.approx(truth["hinge_main"], abs=1e-8)
    assert side.item() == pytest.approx(truth["hinge_aux"], abs=1e-8)
    total = main + 0.4 * side
    assert total.item() == pytest.approx(truth["total_main_plus_0.4aux"], abs=1e-8)
    assert main.float().item() == pytest.approx(truth["tf_losses_hinge_loss_f32"], abs=1e-6)
    assert parse_cells(truth["arc"]) == CELLS
    total.backward()
    assert sum(p.grad is None for p in network.parameters()) == truth["n_vars_without_grad"]
    trunk = [p for name, p in network.named_parameters() if not name.startswith("auxiliary_head.")]
    assert len(trunk) == truth["n_tensors_no_aux"]
    norm = torch.cat([p.grad.flatten() for p in trunk]).norm().item()
    # TensorFlow's own gradient is wrong here (the oracle's note): the value of the second source
    assert norm == pytest.approx(truth["torch_grad_global_norm"], rel=1e-10)


def test_without_compat_the_first_cell_has_one_type() -> None:
    def kinds(compat: bool) -> list[set[int]]:
        network = build_micro_network(CELLS, out_filters=2, layers=4, compat=compat)
        return [{m.weight_bits for m in cell.modules() if isinstance(m, nn.Conv2d)} for cell in network.cells]

    assert kinds(False) == [{4}, *[{2}] * 5]
    assert kinds(True) == [{2, 4}, *[{2}] * 5]


def test_evaluation_uses_moving_averages_and_no_auxiliary_head() -> None:
    torch.manual_seed(0)
    network = build_micro_network(CELLS, auxiliary=True, **SMALL)
    x = torch.randn(6, 1, 8, 8)
    for _ in range(3):
        assert network(x)[1].shape == (6, 10)
    network.eval()
    logits, auxiliary = network(x)
    assert auxiliary is None
    torch.testing.assert_close(network(x[:2])[0], logits[:2], atol=1e-4, rtol=1e-4)


def test_drop_path_grows_with_depth_and_spares_identities() -> None:
    torch.manual_seed(0)
    network = build_micro_network(CELLS, **SMALL)
    network.drop_path_probability = 0.6
    assert [network.dropping(i) for i in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    network.eval()
    assert network.dropping(2) is None
    network.train()
    cell = network.cells[2]  # the reductions of L = 1 stand before it
    assert [not dropped for dropped in cell.dropped] == [isinstance(o, nn.Identity) for o in cell.operations]
    drops: list[float] = []
    network.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.nets.enas_space.drop_path", lambda x, probability, shard: drops.append(probability) or x)
        network(torch.randn(2, 1, 8, 8))
    counts = [sum(c.dropped) for c in network.cells]
    assert drops == pytest.approx([p for p, n in zip((0.2, 0.4, 0.6), counts, strict=True) for _ in range(n)])


def test_cost_counts_true_bits() -> None:
    network = network_of(Architecture(CELLS, space=SPACE), in_channels=1, out_filters=4, layers=2, image_size=16)
    cost = network_cost(network, 16)
    rows = {row.name: row for row in cost.layers}
    stem = rows["stem.0"]
    assert (stem.macs, stem.weight_bits, stem.activation_bits) == (12 * 9 * 256, 4, 32)  # the image is not quantised
    assert rows["classifier"].weight_bits == 32
    assert rows["cells.1.base.conv"].bitops == rows["cells.1.base.conv"].macs * 4
    pointwise = next(row for name, row in rows.items() if name.startswith("cells.1") and "pointwise" in name)
    assert pointwise.weight_bits == 2 and pointwise.activation_bits in (5, 6)  # sums of 9 or 25 ternary products
    assert cost.bitops == sum(row.macs * row.weight_bits * row.activation_bits for row in cost.layers)
    with pytest.raises(ValueError, match="--image-size: 12"):
        network_cost(network, 12)
