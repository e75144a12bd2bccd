# SPDX-License-Identifier: Apache-2.0
"""The controller against the reference's values, its distribution against its logits, REINFORCE against enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from common.nets import MicroCells
from common.nets.enas_space import validate_cells
from enas.controller import Controller, ControllerSettings, given, greedy, inverse_cdf, max_entropy
from enas.reinforce import Baseline, policy_loss
from tests.helpers.fill import waves

NAMES = {
    "lstm": "lstm/layer_0/w",
    "start": "g_emb",
    "embedding": "emb/w",
    "op_weight": "softmax/w",
    "op_bias": "softmax/b",
    "key": "attention/w_1",
    "query": "attention/w_2",
    "score": "attention/v",
}


def filled(settings: ControllerSettings) -> Controller:
    """A controller as the oracle fills it, in float64."""
    controller = Controller(settings).double()
    with torch.no_grad():
        for name, parameter in controller.named_parameters():
            if name != "op_bias":  # keeps its start, [10, 10, 0, 0, 0]
                parameter.copy_(0.1 * waves(parameter.shape))
    return controller


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("B3_tanh1.1_reduce2.5_tempNone", ControllerSettings(blocks=3)),
        (
            "B3_tanhNone_reduce1.0_temp5.0",
            ControllerSettings(blocks=3, tanh_constant=None, op_tanh_reduce=1.0, temperature=5.0),
        ),
        ("B5_tanh1.1_reduce2.5_tempNone", ControllerSettings(blocks=5)),
    ],
)
def test_oracle(oracle: Any, name: str, settings: ControllerSettings) -> None:
    truth = oracle("enas_qnn")["controller"][name]
    controller = filled(settings)
    found = controller(2, greedy)
    for cells in found.cells():
        assert list(cells.normal) == truth["greedy_normal"] and list(cells.reduce) == truth["greedy_reduce"]
    assert found.entropy.tolist() == pytest.approx([truth["entropy_sum"]] * 2, abs=1e-8)
    assert found.neg_log_prob.tolist() == pytest.approx([truth["neg_log_prob_sum"]] * 2, abs=1e-8)
    assert not found.entropy.requires_grad
    found.neg_log_prob.mean().backward()
    own = dict(controller.named_parameters())
    assert sum(p.numel() for p in own.values()) == truth["n_params"]
    for mine, theirs in NAMES.items():
        assert list(own[mine].shape) == truth["shapes"][f"controller/{theirs}"]
        norm = own[mine].grad.norm().item()
        assert norm == pytest.approx(truth["grad_norms"][f"controller/{theirs}"], rel=1e-8), mine
    total = torch.cat([p.grad.flatten() for p in own.values()]).norm().item()
    assert total == pytest.approx(truth["grad_norm_of_neg_log_prob"], rel=1e-10)
    # the same architecture, given: the same probability
    scored = controller(1, given(found.cells()[:1]))
    assert scored.neg_log_prob.item() == pytest.approx(truth["neg_log_prob_sum"], abs=1e-8)


@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
def test_greatest_entropy(oracle: Any, blocks: int) -> None:
    assert max_entropy(blocks) == pytest.approx(oracle("enas_qnn_quantizers")["max_total_entropy"][str(blocks)])
    controller = Controller(ControllerSettings(blocks=blocks))
    found = controller(8, inverse_cdf(torch.rand(8, controller.decisions)))
    assert (found.entropy < max_entropy(blocks)).all()


def test_samples_are_what_the_numbers_say() -> None:
    torch.manual_seed(0)
    controller = Controller(ControllerSettings(blocks=3))
    uniform = torch.rand(6, controller.decisions)
    together = controller.draw(uniform)
    assert together == [controller.draw(uniform[k : k + 1])[0] for k in range(6)]
    for cells in together:  # valid, and in the order of the source: x input, x operation, y input, y operation
        validate_cells(cells)
    largest = controller.draw(torch.full((1, controller.decisions), 1.0 - 2**-24))[0]
    assert largest.cell(False) == [(c + 1, 4, c + 1, 4) for c in range(3)]
    smallest = controller.draw(torch.zeros(1, controller.decisions))[0]
    assert smallest.normal == (0,) * 12


def chi_square_bound(freedom: int) -> float:
    """The 99.9% quantile of chi-square (Wilson and Hilferty's approximation, good to a per cent)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_sampling_follows_the_logits() -> None:
    """Chi-square of every decision's choices against the softmax of its own logits, along one prefix."""
    torch.manual_seed(1)
    controller = Controller(ControllerSettings(blocks=2, tanh_constant=None))
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(4)
        controller.op_bias.copy_(torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0]]))
    n, generator = 4000, torch.Generator().manual_seed(2)
    prefix = controller(1, greedy).cells() * n
    follow, draws = given(prefix), inverse_cdf(torch.rand(n, controller.decisions, generator=generator))
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def choose(logits: torch.Tensor, decision: int) -> torch.Tensor:
        drawn.append((logits[0], draws(logits, decision)))
        return follow(logits, decision)

    with torch.no_grad():
        controller(n, choose)
    assert len(drawn) == 16
    for logits, chosen in drawn:
        p = logits.exp() / logits.exp().sum()
        counts = torch.bincount(chosen, minlength=len(p))
        statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
        assert statistic < chi_square_bound(len(p) - 1), (p, counts)


def reward_of(cells: MicroCells) -> float:
    """Some reward that depends on the whole cell."""
    x, x_op, y, y_op = cells.normal
    return ((3 * x + 2 * x_op + 5 * y + 7 * y_op) % 11) / 11


def test_reinforce_is_the_gradient_of_the_expected_reward() -> None:
    """sum over all architectures of p (reward - b) d(-log p) = -d E[reward], by enumeration, whatever the baseline."""
    torch.manual_seed(4)
    controller = Controller(ControllerSettings(blocks=1, hidden=4)).double()
    with torch.no_grad():
        controller.op_bias.zero_()
    halves = list(itertools.product(range(2), range(5), range(2), range(5)))
    space = [MicroCells(normal, reduce) for normal in halves for reduce in halves]
    rewards = torch.tensor([reward_of(cells) for cells in space], dtype=torch.float64)
    found = controller(len(space), given(space))
    probabilities = (-found.neg_log_prob).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    parameters = list(controller.parameters())
    truth = torch.autograd.grad((probabilities * rewards).sum(), parameters, retain_graph=True)
    for baseline in (0.0, 0.4):  # a baseline changes the variance, not the mean
        b = torch.full_like(rewards, baseline)
        loss = policy_loss(found.neg_log_prob, rewards, b, weights=probabilities.detach())
        for f, t in zip(torch.autograd.grad(loss, parameters, retain_graph=True), truth, strict=True):
            torch.testing.assert_close(f, -t, atol=1e-10, rtol=1e-8)


def test_baseline(oracle: Any) -> None:
    truth = oracle("enas_qnn_quantizers")["baseline_bl_dec.99_rewards[.5,.6,.9]"]
    baseline = Baseline(0.99)
    assert [baseline.update(reward) for reward in (0.5, 0.6, 0.9)] == pytest.approx(truth, abs=1e-15)
    again = Baseline(0.99)
    assert again.follow([0.5, 0.6, 0.9]) == pytest.approx(truth, abs=1e-15)
    assert again.value == baseline.value
