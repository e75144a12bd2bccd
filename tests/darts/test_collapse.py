# SPDX-License-Identifier: Apache-2.0
"""darts/collapse.py: the eigenvalue against the full Hessian, what it leaves alone, Beta-Decay by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.engine.search_loop import Objective
from common.nets import Supernet, build_supernet
from common.recipes.findings import count_skips
from darts.collapse import BetaDecay, dominant_eigenvalue

BATCH = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2, 1]))


def tiny(method: str = "darts", bits: tuple[int, ...] | None = None, spread: float = 1.0) -> Supernet:
    """Three cells of one node: two edges, so 16 alphas a cell type."""
    torch.manual_seed(3)
    options = {"in_channels": 1, "num_classes": 3, "init_channels": 8, "layers": 3, "nodes": 1, "multiplier": 1}
    model = build_supernet(method=method, bits=bits, **options)
    with torch.no_grad():
        for p in model.arch_parameters():
            p.copy_(spread * torch.randn_like(p))
    return model


def full_hessian(model: Supernet, batch: tuple[Tensor, Tensor]) -> Tensor:
    """[32, 32] in both cells' alphas, by torch's own function on a copy of the network in float64."""
    names = ("alphas_normal", "alphas_reduce")
    sizes = [getattr(model, name).shape for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in sizes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, sizes, strict=True)}
        return F.cross_entropy(functional_call(model, values, (batch[0],)), batch[1])

    point = torch.cat([getattr(model, name).detach().flatten() for name in names])
    return torch.autograd.functional.hessian(loss, point)


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_the_eigenvalue_is_that_of_the_full_hessian(method: str) -> None:
    model, batch = tiny(method).double().train(), (BATCH[0].double(), BATCH[1])
    values = torch.linalg.eigvalsh(full_hessian(model, batch))
    expected = values[values.abs().argmax()].item()
    alphas = [model.alphas_normal, model.alphas_reduce]
    objective = Objective(model, nn.CrossEntropyLoss(), None, "fp32")
    found = dominant_eigenvalue(objective, alphas, batch, tolerance=1e-12)
    assert found == pytest.approx(expected, rel=1e-8)
    assert dominant_eigenvalue(objective, alphas, batch) == pytest.approx(expected, rel=0.02)  # as a search asks for it


class Quadratic(nn.Module):
    """x^T A x / 2 of its parameter: the Hessian is A."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
        self.matrix = rotation @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ rotation.T
        self.x = nn.Parameter(torch.randn(len(eigenvalues), dtype=torch.float64))

    def forward(self, *batch: Tensor) -> Tensor:
        return self.x @ self.matrix @ self.x / 2


@pytest.mark.parametrize(("eigenvalues", "expected"), [([3.0, -5.0, 1.0], -5.0), ([2.0, 0.5], 2.0), ([0.0, 0.0], 0.0)])
def test_the_sign_is_kept_and_zero_is_found(eigenvalues: list[float], expected: float) -> None:
    model = Quadratic(eigenvalues)
    found = dominant_eigenvalue(model, [model.x], (torch.zeros(1), torch.zeros(1)), tolerance=1e-13)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bits", [None, (2, 8)])
def test_nothing_is_left_behind(bits: tuple[int, ...] | None) -> None:
    """Batch norm statistics, quantiser ranges, mode, gradients and the generators are as before."""
    model = tiny("pc-darts", bits)
    model(BATCH[0])  # so that ranges and statistics are set
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    objective = Objective(model, nn.CrossEntropyLoss(), None, "fp32")
    value = dominant_eigenvalue(objective, model.arch_parameters()[:2], BATCH, side_pass=model.side_pass, most=3)
    assert value != 0
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training and all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_beta_decay_by_hand() -> None:
    """lambda x mean of log(sum exp): at equal alphas log(8) and a pull of 1 / (8 x edges) on each."""
    model, decay = tiny(spread=0.0), BetaDecay(weight=50.0, epochs=100)
    assert decay(model) == 0
    decay.start(30)
    term = decay(model)
    torch.testing.assert_close(term.item(), 15 * torch.log(torch.tensor(8.0)).item())
    (gradient,) = torch.autograd.grad(term, model.alphas_normal)
    torch.testing.assert_close(gradient, torch.full((2, 8), 15 / (8 * 4)))
    with torch.no_grad():
        model.alphas_reduce[1, 2] = 3.0  # an outlier is pulled down more than the others
    (gradient,) = torch.autograd.grad(decay(model), model.alphas_reduce)
    torch.testing.assert_close(gradient[1], 15 / 4 * model.alphas_reduce[1].detach().softmax(-1))


def test_skips_are_counted_by_name() -> None:
    assert count_skips([["skip_connect", 0], ["sep_conv_3x3", 1], ["skip_connect", 2], ["max_pool_3x3", 0]]) == 2
