# SPDX-License-Identifier: Apache-2.0
"""The child of shared weights: sizes, values and gradients of the reference graph, and which weights a step touches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from common.nets import parse_cells
from enas.child import SharedChild
from tests.helpers.enas_fill import LABELS, README_ARC, fill_shared, images, source_hinge

CELLS = parse_cells(README_ARC)
TINY = {"in_channels": 1, "num_classes": 10, "out_filters": 2, "layers": 2, "image_size": 8}


@pytest.mark.parametrize(
    ("name", "layers", "blocks", "channels"),
    [
        ("search_cifar_default(3,3,20,ch3)", 3, 3, 3),
        ("search_mnist_default(2,3,20,ch1)", 2, 3, 1),
        ("search_cifar_cells5(3,5,20,ch3)", 3, 5, 3),
    ],
)
def test_parameters(oracle: Any, name: str, layers: int, blocks: int, channels: int) -> None:
    truth = oracle("enas_qnn")["params"][name]
    with torch.device("meta"):
        child = SharedChild(in_channels=channels, num_classes=10, out_filters=20, layers=layers, blocks=blocks)
    assert child.auxiliary_head is not None
    head = sum(p.numel() for p in child.auxiliary_head.parameters())
    assert head == truth["aux"]
    assert sum(p.numel() for p in child.parameters()) - head == truth["trainable_no_aux"]
    assert sum(tables(child).values()) == truth["n_tensors"]  # the head's among them


def tables(child: SharedChild) -> Counter[tuple[int, ...]]:
    """The shapes of the child's tensors as the source keeps them: convolutions HWIO, shared weights as tables."""
    found: Counter[tuple[int, ...]] = Counter()
    rows: dict[tuple[Any, ...], list[int]] = {}

    def own(module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                o, i, h, w = part.weight.shape
                found[(h, w, i, o)] += 1
            elif isinstance(part, nn.Linear):
                found[tuple(part.weight.t().shape)] += 1
            elif isinstance(part, nn.BatchNorm2d):
                found[tuple(part.weight.shape)] += 2

    for name, module in child.named_children():
        if name != "layers":
            own(module)
    for number, layer in enumerate(child.layers):
        for part in (layer.reduction, layer.cell.calibration, layer.cell.final_bn):
            if part is not None:
                own(part)
        for conv in layer.cell.final:
            rows.setdefault((number, "final"), []).append(conv.weight.numel())
        for key, module in layer.cell.separable.items():
            place, kernel = key.split("_")
            for name, parameter in module.named_parameters():
                rows.setdefault((number, place[:-1], kernel, name), []).append(parameter.numel())
    for sizes in rows.values():
        assert len(set(sizes)) == 1
        found[(len(sizes), sizes[0])] += 1
    return found


def test_tensor_by_tensor(oracle: Any) -> None:
    truth = oracle("enas_qnn")["tensor_shapes_search_cifar_default"]["search_cifar_default"]
    with torch.device("meta"):
        child = SharedChild(in_channels=3, num_classes=10, out_filters=20, layers=3, blocks=3)
    assert tables(child) == Counter(tuple(shape) for _, shape in truth)
    # how many of them stand in each layer, shared tables and all
    for number, layer in enumerate(child.layers):
        kept = [shape for name, shape in truth if name.startswith(f"child/layer_{number}/")]
        assert sum(p.numel() for p in layer.parameters()) == sum(torch.Size(shape).numel() for shape in kept)


def test_forward_and_gradients(oracle: Any) -> None:
    truth = oracle("enas_qnn")["forward"]["search_L3_B5_F4_readme_arcs"]
    child = SharedChild(in_channels=3, num_classes=10, out_filters=4, layers=3, blocks=5, compat=True)
    fill_shared(child).train()
    logits, auxiliary = child(images(), CELLS)
    torch.testing.assert_close(logits, torch.tensor(truth["logits"], dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(auxiliary, torch.tensor(truth["aux_logits"], dtype=torch.float64), atol=1e-8, rtol=0)
    main, side = source_hinge(logits, LABELS), source_hinge(auxiliary, LABELS)
    assert main.item() == pytest.approx(truth["hinge_main"], abs=1e-8)
    assert side.item() == pytest.approx(truth["hinge_aux"], abs=1e-8)
    total = main + 0.4 * side
    assert total.item() == pytest.approx(truth["total_main_plus_0.4aux"], abs=1e-8)
    total.backward()
    assert main.float().item() == pytest.approx(truth["tf_losses_hinge_loss_f32"], abs=1e-6)
    assert parse_cells(truth["arc"]) == CELLS
    trunk = [p for name, p in child.named_parameters() if not name.startswith("auxiliary_head.")]
    norm = torch.cat([p.grad.flatten() for p in trunk if p.grad is not None]).norm().item()
    assert norm == pytest.approx(truth["grad_global_norm_no_aux_vars"], rel=1e-10)
    child.auxiliary_head = None
    assert sum(tables(child).values()) == truth["n_tensors_no_aux"]
    stem = child.stem[0].weight.grad.permute(2, 3, 1, 0).flatten()[:5]
    torch.testing.assert_close(stem.tolist(), truth["stem_w_grad_first5_HWIO"], atol=1e-8, rtol=0)


def used_names(child: SharedChild, cells: Any) -> set[str]:
    """The parameters that an architecture uses, from its integers alone."""
    names = {name for name, _ in child.named_parameters() if ".separable." not in name and ".final." not in name}
    for number, layer in enumerate(child.layers):
        row = cells.reduce if layer.plan.reduction else cells.normal
        read = set()
        for place in range(len(row) // 4):
            for branch, at in (("x", 4 * place), ("y", 4 * place + 2)):
                node, operation = row[at], row[at + 1]
                read.add(node)
                if operation < 2:
                    key = f"layers.{number}.cell.separable.{place}{branch}{node}_{(3, 5)[operation]}."
                    names |= {name for name, _ in child.named_parameters() if name.startswith(key)}
        names |= {f"layers.{number}.cell.final.{n}.weight" for n in range(len(row) // 4 + 2) if n not in read}
    return names


@pytest.mark.parametrize("arc", [README_ARC, "1 0 0 1 2 4 2 1  1 3 1 4 0 0 2 0"])
def test_a_step_changes_exactly_the_weights_of_its_architecture(arc: str) -> None:
    torch.manual_seed(0)
    cells = parse_cells(arc)
    child = SharedChild(blocks=cells.blocks, layer_bits=["ternary"], **TINY)
    before = {name: p.detach().clone() for name, p in child.named_parameters()}
    logits, auxiliary = child(torch.randn(8, 1, 8, 8), cells)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    with torch.no_grad():
        for p in child.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    used = used_names(child, cells)
    assert {name for name, p in child.named_parameters() if p.grad is not None} == used
    changed = {name for name, p in child.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= used
    # A pointwise weight always sees signal; a whole depthwise tensor may stand outside the straight-through bounds.
    assert {name for name in used if "pointwise" in name} <= changed


def test_evaluation_is_by_the_batch_and_without_auxiliary_head() -> None:
    torch.manual_seed(0)
    child = SharedChild(blocks=5, **TINY)
    x = torch.randn(6, 1, 8, 8)
    trained, _ = child(x, CELLS)
    child.eval()
    evaluated, auxiliary = child(x, CELLS)
    assert auxiliary is None and torch.equal(trained, evaluated)
    assert not list(child.buffers())
