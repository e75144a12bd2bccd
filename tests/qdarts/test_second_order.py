# SPDX-License-Identifier: Apache-2.0
"""Second order on tiny supernets: exact against autograd straight through a training step that is written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.engine.bilevel import InnerGroup, architecture_gradients
from common.nets import Supernet, build_supernet
from common.quant.kernels import disabled

LR, GAMMA_LR, MOMENTUM, DECAY, GAMMA_DECAY = 0.05, 0.3, 0.9, 3e-4, 1e-3


class Objective(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


def setting(**options) -> tuple[Supernet, dict]:
    torch.manual_seed(0)
    defaults = {"method": "pc-darts", "bits": (2, 4), "num_classes": 3, "init_channels": 8, "layers": 3}
    model = build_supernet(**defaults | {"nodes": 2, "multiplier": 2} | options).double()
    with torch.no_grad():
        for p in (*model.arch_parameters(), *model.gamma_parameters()):
            p.copy_(torch.randn_like(p))  # far from equal, so that every path counts
    batches = [(torch.randn(4, 3, 8, 8).double(), torch.randint(0, 3, (4,))) for _ in range(2)]
    weights, gammas = model.weight_parameters(), model.gamma_parameters()

    def buffers(parameters: list[nn.Parameter]) -> list[Tensor]:
        return [0.1 * torch.randn_like(p) for p in parameters]

    inner = [InnerGroup(weights, LR, MOMENTUM, DECAY, buffers(weights))]
    if gammas:
        inner.append(InnerGroup(gammas, GAMMA_LR, MOMENTUM, GAMMA_DECAY, buffers(gammas)))
    objective = Objective(model)
    return model, {
        "arch": model.arch_parameters(),
        "train_objective": objective,
        "valid_objective": objective,
        "train_batch": batches[0],
        "valid_batch": batches[1],
        "inner": inner,
        "side_pass": model.side_pass,
    }


def by_hand(model: Supernet, arguments: dict) -> list[Tensor]:
    """d L_valid(w - lr (m buf + dL_train/dw + wd w), alpha) / d alpha, by autograd through the whole expression."""
    names = {id(p): name for name, p in model.named_parameters()}
    inner = [
        (p, b, group) for group in arguments["inner"] for p, b in zip(group.parameters, group.buffers, strict=True)
    ]
    with model.side_pass():
        (x, y), (u, v) = arguments["train_batch"], arguments["valid_batch"]
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, [p for p, _, _ in inner], create_graph=True, allow_unused=True)
        ahead = {}
        for (p, buffer, group), g in zip(inner, gradients, strict=True):
            if g is not None:
                step = group.momentum * buffer + g + group.weight_decay * p
                ahead[names[id(p)]] = p - group.learning_rate * step
        return list(
            torch.autograd.grad(F.cross_entropy(functional_call(model, ahead, (u,)), v), model.arch_parameters())
        )


@pytest.mark.parametrize("options", [{}, {"bits": (2, 4, 8)}, {"bits": None}, {"bits": None, "method": "darts"}])
def test_exact_is_autograd_through_the_step(options: dict) -> None:
    """Quantised (through the straight-through surrogate, both levels' rates and momenta) and in full precision."""
    model, arguments = setting(**options)
    expected = by_hand(model, arguments)
    architecture_gradients(**arguments, order="exact")
    exact = [p.grad.clone() for p in model.arch_parameters()]
    for gradient, reference in zip(exact, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-10)
    architecture_gradients(**arguments, order="first")
    first = torch.cat([p.grad.flatten() for p in model.arch_parameters()])
    assert (torch.cat([g.flatten() for g in exact]) - first).norm() > 0.02 * first.norm(), "or nothing was tested"


def test_passes_leave_running_ranges_alone() -> None:
    model, arguments = setting(bits=(2, 8))
    model(arguments["train_batch"][0])
    before = {name: b.clone() for name, b in model.named_buffers() if "maximum" in name}
    assert before
    for order in ("first", "finite-difference", "exact"):
        architecture_gradients(**arguments, order=order)
    assert all(torch.equal(b, dict(model.named_buffers())[name]) for name, b in before.items())


@disabled()  # the kernels know no softplus
def test_finite_difference_is_exact_on_a_smooth_supernet() -> None:
    """Softplus in place of ReLU, and average in place of maximum pooling, make the full-precision supernet smooth."""
    import common.nets.stacks as stacks
    import common.nets.supernet as module

    class Smooth:
        def __getattr__(self, name: str):
            if name == "relu":
                return F.softplus
            if name == "max_pool2d":
                return F.avg_pool2d
            return getattr(F, name)

    model, arguments = setting(bits=None, method="darts")
    arguments["inner"] = [InnerGroup(model.weight_parameters(), LR, 0.0, DECAY)]
    original, module.F, stacks.F = module.F, Smooth(), Smooth()
    try:
        for part in model.modules():
            for name, child in list(part.named_children()):
                if isinstance(child, nn.MaxPool2d):
                    setattr(part, name, nn.AvgPool2d(3, child.stride, 1, count_include_pad=False))
                if isinstance(child, nn.ReLU):
                    setattr(part, name, nn.Softplus())
        architecture_gradients(**arguments, order="exact")
        exact = torch.cat([p.grad.flatten() for p in model.arch_parameters()])
        architecture_gradients(**arguments, order="first")
        first = torch.cat([p.grad.flatten() for p in model.arch_parameters()])
        architecture_gradients(**arguments, order="finite-difference")
        difference = torch.cat([p.grad.flatten() for p in model.arch_parameters()])
    finally:
        module.F = stacks.F = original
    assert (difference - exact).norm() < 1e-2 * (exact - first).norm()
