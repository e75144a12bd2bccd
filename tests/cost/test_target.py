# SPDX-License-Identifier: Apache-2.0
"""The controller of --target-bitops on a small search of its own: logits, a staircase of a cost, two optimisers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from common.cost.target import TargetController, movable_error, push_scale, within


class ToySearch(nn.Module):
    """8 edges with 6 operations, and a bit-width (2 or 4) per cell (6), edge and operation."""

    sizes = torch.tensor([0.0, 0.5, 2.0, 3.0, 5.0, 8.0], dtype=torch.float64)
    bits = torch.tensor([2.0, 4.0], dtype=torch.float64)

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.alphas = nn.Parameter(1e-3 * torch.randn(8, 6, generator=generator, dtype=torch.float64))
        self.gammas = nn.Parameter(1e-3 * torch.randn(6, 8, 6, 2, generator=generator, dtype=torch.float64))


class ToyCost:
    """Expected cost, and the exact one of the argmax; never below 2-bit's nor above 4-bit's ends."""

    ends, fixed, cheapest, dearest = 0.0, 20.0, 20.0, 20.0 + 6 * 8 * 8.0 * 16

    def expected(self, model: ToySearch) -> Tensor:
        width = (model.gammas.softmax(-1) * model.bits).sum(-1) ** 2
        return self.fixed + (model.alphas.softmax(-1) * model.sizes * width).sum()

    def exact(self, model: ToySearch) -> Tensor:
        operation = model.alphas.argmax(-1)
        width = model.bits[model.gammas.argmax(-1)] ** 2
        chosen = width.gather(2, operation.view(1, 8, 1).expand(6, 8, 1)).squeeze(2)
        return self.fixed + (chosen * model.sizes[operation]).sum()


def run(
    seed: int, share: float, steps: int, gamma_rate: float, arch_rate: float
) -> tuple[ToySearch, TargetController, list[float]]:
    """A search whose loss pushes alphas and gammas its own way, with noise; cost weights as in the loop."""
    generator = torch.Generator().manual_seed(100 + seed)
    model, cost = ToySearch(seed), ToyCost()
    controller = TargetController(cost, share * float(cost.exact(model)), total_steps=steps)
    initial = float(cost.expected(model).detach())
    sgd = torch.optim.SGD([model.gammas], lr=gamma_rate, momentum=0.9, weight_decay=1e-3)
    adam = torch.optim.Adam([model.alphas], lr=arch_rate, betas=(0.5, 0.999), weight_decay=1e-3)

    def noise(p: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)

    alpha_push, gamma_push = noise(model.alphas, 2e-3), noise(model.gammas, 3e-5)
    gamma_push[..., 1] -= 3e-5  # more bits are always a little better for the loss
    errors = []
    for step in range(steps):
        moving = step >= steps // 4
        for parameter, optimizer, weight, push, scale in (
            (model.alphas, adam, 1e-5, alpha_push, 4e-3),
            (model.gammas, sgd, 1e-4, gamma_push, 1e-4),
        ):
            if parameter is model.alphas and (not moving or controller.hold > 0):
                continue
            term = weight * controller.multiplier * 2489.3 * cost.expected(model) / initial
            parameter.grad = torch.autograd.grad(term, parameter)[0] + push + noise(parameter, scale)
            optimizer.step()
        controller.update(model, moving)
        errors.append(math.log(float(controller.exact) / controller.target))
    return model, controller, errors


@pytest.mark.parametrize("share", [0.5, 0.8, 1.3])
@pytest.mark.parametrize("steps, gamma_rate, arch_rate", [(200, 0.05, 3e-3), (600, 0.01, 6e-4)])
def test_settles_within_the_band(share: float, steps: int, gamma_rate: float, arch_rate: float) -> None:
    """From below (negative multiplier) and from above, at the rates of a short and of a long search."""
    for seed in range(3):
        model, controller, errors = run(seed, share, steps, gamma_rate, arch_rate)
        assert abs(errors[0]) > 0.15, "the toy starts outside the band, or the test says nothing"
        assert controller.reached(model), (seed, errors[-1])
        assert all(abs(math.exp(e) - 1) <= 0.1 for e in errors[-steps // 20 :]), "it stays there"


def test_without_a_controller_the_band_is_missed() -> None:
    """The same search under a fixed multiplier of 1 ends elsewhere: the controller does the work."""
    model, _, _ = run(0, 1.3, 600, 0.01, 6e-4)
    cost, reference = ToyCost(), ToySearch(0)
    target = 1.3 * float(cost.exact(reference))
    sgd = torch.optim.SGD([reference.gammas], lr=0.01, momentum=0.9)
    for _ in range(600):
        sgd.zero_grad()
        (1e-4 * 2489.3 * cost.expected(reference) / 300.0).backward(inputs=[reference.gammas])
        sgd.step()
    assert not within(float(cost.exact(reference)), target)
    assert within(float(cost.exact(model)), target)


class FixedCost:
    """A cost that the test sets."""

    ends, cheapest, dearest = 0.0, 1.0, 1000.0

    def __init__(self) -> None:
        self.value = torch.tensor(100.0, dtype=torch.float64)

    def exact(self, model: nn.Module) -> Tensor:
        return self.value


def test_sign_bounds_and_rest() -> None:
    cost = FixedCost()
    controller = TargetController(cost, 100.0, total_steps=100)
    controller.update(nn.Identity())
    assert controller.multiplier == 0
    for value, sign in ((400.0, 1), (20.0, -1)):
        cost.value = torch.tensor(value, dtype=torch.float64)
        for _ in range(500):
            controller.update(nn.Identity())
        assert controller.multiplier == sign * 100.0, "bounded, and negative below the target"
    cost.value = torch.tensor(100.0, dtype=torch.float64)
    for _ in range(500):
        controller.update(nn.Identity())
    assert abs(float(controller.multiplier)) < 1e-6 and float(controller.gain) == pytest.approx(0.2)


def test_gain_stays_low_before_the_architecture_moves() -> None:
    cost = FixedCost()
    controller = TargetController(cost, 50.0, total_steps=100, scale=3.0)
    for _ in range(500):
        controller.update(nn.Identity(), moving=False)
    assert controller.gain == 10 and controller.multiplier == 30


def test_only_the_part_that_can_move_counts() -> None:
    """A stem of 90 of 100 BitOps: 110 against 100 is twice the rest, and the push is a full one."""
    cost = FixedCost()
    cost.ends, cost.value = 90.0, torch.tensor(110.0, dtype=torch.float64)
    controller = TargetController(cost, 100.0, total_steps=100)
    controller.update(nn.Identity())
    assert float(controller.error) == pytest.approx(math.log(2))


@pytest.mark.parametrize("value, held", [(103.0, False), (100.3, True), (98.0, False)])
def test_ends_do_not_hold_the_architecture(value: float, held: bool) -> None:
    """A stem of 90 of 100 BitOps: 103 is 3% above the target, but 30% of what choices can move."""
    cost = FixedCost()
    cost.ends, cost.value = 90.0, torch.tensor(value, dtype=torch.float64)
    controller = TargetController(cost, 100.0, total_steps=100)
    for _ in range(100):
        controller.update(nn.Identity())
    assert bool(controller.hold) == held
    assert movable_error(value, 100.0, cost.ends) == pytest.approx((value - 100) / 10)


def test_scale_moves_a_choice_in_a_tenth_of_the_search() -> None:
    """SGD with momentum under the scaled push alone: a logit difference moves by .003 in a tenth of the steps."""
    gammas = [nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))]
    bits = torch.tensor([2.0, 4.0], dtype=torch.float64)

    def term() -> Tensor:
        return (7.0 * gammas[0].softmax(-1) @ bits).sum()

    scale = push_scale(term(), gammas, weight=1e-4, rate=0.01 / 0.1, total_steps=4000)
    sgd = torch.optim.SGD(gammas, lr=0.01, momentum=0.9)
    for _ in range(400):
        sgd.zero_grad()
        (scale * 1e-4 * term()).backward()
        sgd.step()
    difference = (gammas[0][:, 0] - gammas[0][:, 1]).detach()
    torch.testing.assert_close(difference, torch.full_like(difference, 0.003), rtol=0.05, atol=0)


def test_architecture_is_held_late_and_only_on_target() -> None:
    cost = FixedCost()
    controller = TargetController(cost, 50.0, total_steps=100)
    for step in range(1, 101):
        cost.value = torch.tensor(50.0 if step in (30, 95) else 100.0, dtype=torch.float64)
        controller.update(nn.Identity())
        assert bool(controller.hold) == (step >= 95)


@pytest.mark.parametrize("target", [0.5, 2000.0])
def test_unreachable_target_is_refused_with_both_ends(target: float) -> None:
    with pytest.raises(ValueError, match=r"--target-bitops .*1 to 1000 BitOps"):
        TargetController(FixedCost(), target, total_steps=10)


def test_state_goes_on_bit_for_bit() -> None:
    cost = FixedCost()
    first = TargetController(cost, 50.0, total_steps=100)
    for _ in range(7):
        first.update(nn.Identity())
    second = TargetController(cost, 50.0, total_steps=100)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        cost.value = torch.tensor(30.0, dtype=torch.float64)
        controller.update(nn.Identity())
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_band() -> None:
    assert within(110.0, 100.0) and within(90.0, 100.0)
    assert not within(110.1, 100.0) and not within(89.9, 100.0)
