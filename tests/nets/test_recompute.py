# SPDX-License-Identifier: Apache-2.0
"""Cells computed again in the backward pass: the same gradients and running state, and only their inputs kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.nets import build_network, build_supernet, load_architecture, parse_cells
from common.nets.enas_space import build_micro_network
from common.quant.kernels import disabled
from tests.helpers.saved import saved_bytes


def evaluation_network(bits: tuple[int, int] | None = None) -> nn.Module:
    architecture = load_architecture("PC_DARTS")
    architecture = architecture if bits is None else architecture.with_uniform_bits(*bits)
    return build_network(architecture, num_classes=10, init_channels=4, layers=3)


def supernet(method: str, bits: tuple[int, ...] | None) -> nn.Module:
    return build_supernet(method=method, bits=bits, num_classes=10, init_channels=8, layers=3)


CASES = {
    "network": lambda: evaluation_network(),
    "enas": lambda: build_micro_network(  # draws signs, too
        parse_cells("0 2 1 4 1 0 2 1  1 3 1 4 0 1 1 1"),
        out_filters=4,
        layers=1,
        image_size=16,
        layer_bits=["stochastic"],
    ),
    "network 4, 8 bits": lambda: evaluation_network((4, 8)),
    "pc-darts": lambda: supernet("pc-darts", None),
    "pc-darts 2, 4": lambda: supernet("pc-darts", (2, 4)),
    "pc-darts 2, 4, 8": lambda: supernet("pc-darts", (2, 4, 8)),
    "darts": lambda: supernet("darts", None),
}


def two_steps(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of a plain pass and of a side pass (no running range moves there), and the state afterwards."""
    torch.manual_seed(3)
    found = []
    for aside in (False, True):
        output = model(x) if not aside or not hasattr(model, "side_pass") else None
        if output is None:
            with model.side_pass():
                output = model(x)
                gradients = grad(output, model)
        else:
            gradients = grad(output, model)
        found += gradients
    return found, model.state_dict()


def grad(output: Any, model: nn.Module) -> list[Tensor]:
    logits = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in gradients]


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_running_state_are_those_of_one_computation(name: str) -> None:
    torch.manual_seed(0)
    plain = CASES[name]().double().train()
    if hasattr(plain, "drop_path_probability"):
        plain.drop_path_probability = 0.4
    again = copy.deepcopy(plain)
    again.checkpoint_cells = True
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    (expected, state), (found, after) = two_steps(plain, x), two_steps(again, x)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert state.keys() == after.keys()
    for key, value in state.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", ["network 4, 8 bits", "pc-darts 2, 4"])
@pytest.mark.parametrize("kernels", [True, False])
def test_only_what_enters_a_cell_is_kept(name: str, kernels: bool) -> None:
    torch.manual_seed(0)
    model = CASES[name]().train()
    x = torch.randn(8, 3, 16, 16)

    def kept() -> int:
        if kernels:
            return saved_bytes(model, lambda: model(x))
        with disabled():
            return saved_bytes(model, lambda: model(x))

    whole = kept()
    model.checkpoint_cells = True
    assert kept() < 0.35 * whole


def test_nothing_is_computed_again_without_gradients() -> None:
    model = evaluation_network().eval()
    model.checkpoint_cells = True
    calls: list[int] = []
    model.cells[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert calls == [1]
