# SPDX-License-Identifier: Apache-2.0
"""Architecture gradients against autograd through a training step that is written out by hand."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.engine import distributed
from common.engine.bilevel import ORDERS, InnerGroup, architecture_gradients, inner_groups
from tests.helpers.fill import fill, fill_logits, oracle_batch, waves
from tests.helpers.plain_supernet import PlainSupernet


class SmoothModel(nn.Module):
    """Two mixed layers: softplus or tanh, mixed by alpha; one gamma gate per layer. Smooth everywhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 0.4) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.w1, self.w2, self.unused = draw(5, 6), draw(6, 3), draw(4)
        self.gamma = draw(2, 2)
        self.alpha, self.beta, self.idle = draw(2, 2), draw(2), draw(3)

    def forward(self, x: Tensor) -> Tensor:
        return smooth_forward(x, self.w1, self.w2, self.gamma, self.alpha, self.beta)


def smooth_forward(x: Tensor, w1: Tensor, w2: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    for layer, w in enumerate((w1, w2)):
        a, g = alpha[layer].softmax(0), gamma[layer].softmax(0)
        y = x @ (g[0] * w + g[1] * w.sin())
        x = beta.softmax(0)[layer] * (a[0] * F.softplus(y) + a[1] * y.tanh())
    return x


class Objective(nn.Module):
    def __init__(self, model: nn.Module, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y) + self.weight * (self.model.gamma.softmax(-1)[:, 0] ** 2).sum()


@pytest.fixture
def setting() -> dict:
    generator = torch.Generator().manual_seed(3)
    model = SmoothModel()
    batches = [
        (torch.randn(7, 5, generator=generator, dtype=torch.float64), torch.randint(0, 3, (7,), generator=generator))
        for _ in range(2)
    ]
    weights, gammas = [model.w1, model.w2, model.unused], [model.gamma]

    def buffers(parameters: list[nn.Parameter]) -> list[Tensor]:
        return [0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    return {
        "model": model,
        "arch": [model.alpha, model.beta, model.idle],
        "train_objective": Objective(model, 0.3),
        "valid_objective": Objective(model, 0.1),
        "train_batch": batches[0],
        "valid_batch": batches[1],
        "inner": [
            InnerGroup(weights, 0.5, 0.9, 3e-2, buffers(weights)),
            InnerGroup(gammas, 0.2, 0.7, 1e-2, buffers(gammas)),
        ],
    }


def by_hand(setting: dict, unrolled: bool) -> tuple[Tensor, list[Tensor]]:
    """Autograd straight through one training step, every variable written out."""
    model = setting["model"]
    alpha, beta = (p.detach().clone().requires_grad_() for p in (model.alpha, model.beta))
    inner = [p.detach().clone().requires_grad_() for p in (model.w1, model.w2, model.gamma)]

    def loss_of(values: list[Tensor], batch: tuple[Tensor, Tensor], weight: float) -> Tensor:
        logits = smooth_forward(batch[0], *values, alpha, beta)
        return F.cross_entropy(logits, batch[1]) + weight * (values[2].softmax(-1)[:, 0] ** 2).sum()

    if unrolled:
        train = loss_of(inner, setting["train_batch"], 0.3)
        gradients = torch.autograd.grad(train, inner, create_graph=True)
        first, second = setting["inner"]
        rule = [(first, first.buffers[0]), (first, first.buffers[1]), (second, second.buffers[0])]
        inner = [
            w - group.learning_rate * (group.momentum * buffer + g + group.weight_decay * w)
            for w, g, (group, buffer) in zip(inner, gradients, rule, strict=True)
        ]
    loss = loss_of(inner, setting["valid_batch"], 0.1)
    return loss.detach(), list(torch.autograd.grad(loss, [alpha, beta]))


def call(setting: dict, order: str, side_pass=nullcontext) -> Tensor:
    keys = ("arch", "train_objective", "valid_objective", "train_batch", "valid_batch", "inner")
    return architecture_gradients(**{k: setting[k] for k in keys}, order=order, side_pass=side_pass)


@pytest.mark.parametrize("order", ["first", "exact"])
def test_equals_autograd_through_the_step(setting: dict, order: str) -> None:
    expected_loss, expected = by_hand(setting, unrolled=order == "exact")
    loss = call(setting, order)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-12)
    for parameter, gradient in zip(setting["arch"], expected, strict=False):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)
    assert not loss.requires_grad


def test_second_order_differs_from_first(setting: dict) -> None:
    """The comparison above would be empty if the implicit term were negligible here."""
    first, second = by_hand(setting, False)[1][0], by_hand(setting, True)[1][0]
    assert (first - second).norm() > 0.05 * first.norm()


def test_finite_difference_is_the_exact_one_on_a_smooth_net(setting: dict) -> None:
    call(setting, "exact")
    exact = [p.grad.clone() for p in setting["arch"][:2]]
    call(setting, "finite-difference")
    for parameter, gradient in zip(setting["arch"], exact, strict=False):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=1e-6)


def test_finite_difference_is_the_papers_formula(setting: dict) -> None:
    """DARTS equation 8 with R = .01 / |u|, restated on copies of the model."""
    setting["inner"] = [InnerGroup([setting["model"].w1, setting["model"].w2], 0.5, 0.0, 0.0)]
    call(setting, "finite-difference")
    model = setting["model"]
    inner = ["w1", "w2"]

    def gradients(values: list[Tensor], part: str, names: list[str]) -> list[Tensor]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in zip(inner, values, strict=True):
                getattr(other, name).copy_(value)
        objective = Objective(other, {"train": 0.3, "valid": 0.1}[part])
        return list(torch.autograd.grad(objective(*setting[f"{part}_batch"]), [getattr(other, n) for n in names]))

    w = [getattr(model, name).detach() for name in inner]
    ahead = [a - 0.5 * g for a, g in zip(w, gradients(w, "train", inner), strict=True)]
    v = gradients(ahead, "valid", inner)
    radius = 0.01 / torch.cat([t.flatten() for t in v]).norm()
    plus = gradients([a + radius * t for a, t in zip(w, v, strict=True)], "train", ["alpha"])[0]
    minus = gradients([a - radius * t for a, t in zip(w, v, strict=True)], "train", ["alpha"])[0]
    expected = gradients(ahead, "valid", ["alpha"])[0] - 0.5 * (plus - minus) / (2 * radius)
    torch.testing.assert_close(model.alpha.grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_touches_nothing_but_the_architecture_gradients(setting: dict, order: str) -> None:
    model = setting["model"]
    model.w1.grad = torch.full_like(model.w1, 7.0)
    state = copy.deepcopy(model.state_dict())
    buffers = [b.clone() for group in setting["inner"] for b in group.buffers]
    call(setting, order)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(
        torch.equal(a, b) for a, b in zip(buffers, [b for g in setting["inner"] for b in g.buffers], strict=True)
    )
    assert torch.equal(model.w1.grad, torch.full_like(model.w1, 7.0))
    assert model.w2.grad is None and model.gamma.grad is None and model.unused.grad is None
    assert model.idle.grad is None and all(p.requires_grad for p in model.parameters())


def test_weights_come_back_when_a_pass_fails(setting: dict) -> None:
    model, before = setting["model"], copy.deepcopy(setting["model"].state_dict())

    class Broken(Objective):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    setting["valid_objective"] = Broken(model, 0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(setting, "finite-difference")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("order", ORDERS)
def test_every_pass_is_a_side_pass(setting: dict, order: str) -> None:
    inside, seen = [], []

    @contextmanager
    def side_pass():
        inside.append(True)
        yield
        inside.pop()

    setting["model"].register_forward_pre_hook(lambda *_: seen.append(bool(inside)))
    call(setting, order, side_pass)
    assert all(seen) and len(seen) == {"first": 1, "finite-difference": 4, "exact": 2}[order]


def test_zero_validation_gradient_is_no_division_by_zero(setting: dict) -> None:
    class Constant(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.model.alpha.sum() + 0 * self.model(x).sum()

    setting["valid_objective"] = Constant(setting["model"])
    call(setting, "finite-difference")
    torch.testing.assert_close(setting["model"].alpha.grad, torch.ones(2, 2, dtype=torch.float64))


def test_inner_groups_read_the_optimisers() -> None:
    model = SmoothModel()
    weights = torch.optim.SGD([model.w1, model.w2], lr=0.1, momentum=0.9, weight_decay=3e-4)
    gammas = torch.optim.SGD([model.gamma], lr=0.01, momentum=0.5, weight_decay=1e-3)
    assert inner_groups(weights)[0].buffers == [None, None]
    model.w1.grad = torch.ones_like(model.w1)
    weights.step()
    weights.param_groups[0]["lr"] = 0.07
    first, second = inner_groups(weights, gammas)
    assert (first.learning_rate, first.momentum, first.weight_decay) == (0.07, 0.9, 3e-4)
    assert first.buffers[0] is weights.state[model.w1]["momentum_buffer"] and first.buffers[1] is None
    assert second.parameters == [model.gamma] and second.learning_rate == 0.01


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_two_ranks_are_averaged_in_every_pass(
    setting: dict, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equal ranks: the mean is the own gradient, so only the calls are counted, and that they get tensors."""
    calls: list[int] = []

    def average(gradients) -> None:
        calls.append(len([g for g in gradients if isinstance(g, Tensor)]))

    monkeypatch.setattr(distributed, "average_", average)
    call(setting, order)
    assert len(calls) == {"first": 1, "finite-difference": 4, "exact": 3}[order] and min(calls) >= 2


def test_refuses_what_it_cannot_do(setting: dict) -> None:
    with pytest.raises(ValueError, match="finite-difference"):
        call(setting, "second")
    setting["inner"] = None
    with pytest.raises(ValueError, match="inner groups"):
        call(setting, "exact")


ORACLES = [("darts", "super_darts_forward"), ("pc-darts", "super_pcdarts_forward")]


class CrossEntropy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)


def oracle_step(method: str, order: str, momentum_buffers: bool) -> tuple[nn.Module, Tensor]:
    model = fill_logits(fill(PlainSupernet(method=method)))
    weights = list(model.weight_parameters())
    buffers = [0.01 * waves(p.shape, "cos") if momentum_buffers else None for p in weights]
    objective = CrossEntropy(model)
    loss = architecture_gradients(
        arch=list(model.arch_parameters()),
        train_objective=objective,
        valid_objective=objective,
        train_batch=(oracle_batch("cos"), torch.tensor([3, 7, 1, 9])),
        valid_batch=(oracle_batch("sin"), torch.tensor([0, 2, 4, 6])),
        inner=[InnerGroup(weights, 0.025, 0.9, 3e-4, buffers)],
        order=order,
        side_pass=nullcontext,
    )
    return model, loss


@pytest.mark.parametrize("method, stem", ORACLES)
def test_first_order_equals_the_oracle(oracle, method: str, stem: str) -> None:
    truth = oracle(stem)["results"]
    model, loss = oracle_step(method, "first", False)
    assert loss.item() == pytest.approx(truth["val_loss"], abs=1e-8)
    for parameter, expected in zip(model.arch_parameters(), truth["first_order_arch_grads"], strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("momentum", ["momentum0", "momentum_buf"])
@pytest.mark.parametrize("method, stem", ORACLES)
def test_finite_difference_equals_the_oracle(oracle, method: str, stem: str, momentum: str) -> None:
    results = oracle(stem)["results"]
    truth = results[f"second_order_{momentum}"]
    model, loss = oracle_step(method, "finite-difference", momentum == "momentum_buf")
    assert loss.item() == pytest.approx(truth["unrolled_val_loss"], abs=1e-8)
    arch = list(model.arch_parameters())
    for parameter, expected in zip(arch, truth["final"], strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.optim.Adam(arch, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3, fused=True).step()
    after = results["alphas_after_one_adam_step_lr3e-4_wd1e-3_betas.5_.999"][f"second_order_{momentum}"]
    for parameter, expected in zip(arch, after, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
