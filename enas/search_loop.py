# SPDX-License-Identifier: Apache-2.0
"""The search: child steps on sampled architectures, then the controller's updates, then ten architectures.

The controller stands still while the child learns, so the architectures of all steps of an epoch are drawn in one
batched run before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.engine import distributed
from common.engine.protocols import BatchStream
from common.nets.enas_space import MicroCells, parse_cells
from enas.controller import Controller, inverse_cdf
from enas.loop import RULE, ChildLoop, EvaluationSet
from enas.optimizer import HatAdam
from enas.reinforce import Baseline, policy_loss

SHOWN = 10
"""Architectures that are shown after each of the controller's phases."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Numbers of the controller's training: `updates` of `aggregate` samples after every `every` epochs."""

    learning_rate: float = 0.0035
    updates: int = 30
    aggregate: int = 10
    every: int = 1
    entropy_weight: float = 1e-4
    baseline_decay: float = 0.99
    training: bool = True


class SearchLoop(ChildLoop):
    """`ChildLoop` of a shared-weight child, and its controller.

    `rewards` gives batches of validation images by (epoch, step); `penalty` is what an architecture's cost takes off
    its accuracy.
    """

    later_columns = ("controller_loss", "entropy", "reward", "baseline", "sample_top1")

    def __init__(
        self,
        child: nn.Module,
        controller: Controller,
        *,
        rewards: BatchStream,
        policy: PolicySettings,
        penalty: Callable[[MicroCells], float] | None = None,
        **loop: Any,
    ) -> None:
        super().__init__(child, **loop)
        self.controller, self.rewards, self.policy = controller, rewards, policy
        self.penalty = penalty or (lambda cells: 0.0)
        self.optimizers["controller"] = HatAdam(controller.parameters(), policy.learning_rate)
        self.baseline = Baseline(policy.baseline_decay)
        self.updates_done = 0
        self.last_update: dict[str, float] = {}
        self.candidates: list[tuple[float, str]] = []

    def architectures(self, purpose: str, n: int) -> list[MicroCells]:
        """Samples of the present controller, a function of seed, epoch and purpose."""
        return self.controller.draw(torch.rand(n, self.controller.decisions, generator=self.generator(purpose)))

    def later_steps(self) -> int:
        """The controller's updates of this epoch."""
        policy = self.policy
        return policy.updates if policy.training and (self.epoch + 1) % policy.every == 0 else 0

    def later_steps_before(self) -> int:
        """The controller's updates of all epochs before this one."""
        policy = self.policy
        return policy.updates * (self.epoch // policy.every) if policy.training else 0

    def later_step(self, number: int) -> None:
        """One update: samples in one batched run, the accuracy of each on a batch of its own, REINFORCE."""
        policy, first = self.policy, number * self.policy.aggregate
        if number == 0:
            self.run.log(f"Epoch {self.epoch + 1}: Training controller")
        self.guard.start_of_step()
        self.model.eval()
        uniform = torch.rand(
            policy.aggregate, self.controller.decisions, generator=self.generator("controller", number)
        )
        sample = self.controller(policy.aggregate, inverse_cdf(uniform.to(self.device)))
        cells = sample.cells()
        offset = self.epoch // policy.every * policy.updates * policy.aggregate + first
        accuracies = self.one_batch_accuracies(cells, self.rewards, offset)
        entropies = sample.entropy.tolist()
        gains = [a - self.penalty(c) for a, c in zip(accuracies, cells, strict=True)]
        rewards = [g + policy.entropy_weight * e for g, e in zip(gains, entropies, strict=True)]
        before = self.baseline.value
        baselines = self.baseline.follow(rewards)
        as_tensor = sample.neg_log_prob.new_tensor
        loss = policy_loss(sample.neg_log_prob, as_tensor(rewards), as_tensor(baselines))
        self.controller.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_(p.grad for p in self.controller.parameters())  # equal but for rounding on unequal devices
        norm = nn.utils.get_total_norm([p.grad for p in self.controller.parameters()], foreach=True)
        self.guard.check(loss.detach(), norm)
        self.optimizers["controller"].step()
        self.guard.end_of_step()
        if self.guard.first_bad_step() is not None:
            self.baseline.value = before
            self.check_finite()
        costs = (
            sample.neg_log_prob.detach() * as_tensor([r - b for r, b in zip(rewards, baselines, strict=True)])
        ).tolist()
        self.updates_done += 1
        self.last_update = {
            "controller_loss": sum(costs) / len(costs),
            "entropy": sum(entropies) / len(entropies),
            "reward": sum(rewards) / len(rewards),
            "baseline": baselines[-1],
        }
        for k in range(policy.aggregate):
            if (first + k) % self.settings.log_every == 0:
                self.run.log(
                    f"ctrl_step = {self.updates_done - (k + 1 < policy.aggregate):<6d} loss = {costs[k]:<7.3f} "
                    f"ent = {entropies[k]:<5.2f}   lr = {policy.learning_rate:<6.4f}   |g| = {float(norm):<8.4f} "
                    f"acc = {accuracies[k]:<6.4f}   bl = {baselines[k]:<5.2f}  mins = {self.run.seconds / 60:<.2f}"
                )

    @torch.no_grad()
    def one_batch_accuracies(self, cells: Sequence[MicroCells], stream: BatchStream, offset: int) -> list[float]:
        """The accuracy of each architecture on one batch, the `offset`-th and those after it; reads the device once.

        Several processes share the architectures.
        """
        shares = torch.zeros(len(cells), dtype=torch.float64, device=self.device)
        # neighbours to one process: a stream that is read from files is quick in its own order
        rank, ranks, n = distributed.rank(), distributed.world_size(), len(cells)
        for k in range(rank * n // ranks, (rank + 1) * n // ranks):
            x, y = stream.batch(*divmod(offset + k, stream.steps_per_epoch))
            logits, _ = self.forward(x, cells[k])
            shares[k] = (logits.argmax(1) == y).double().mean()
        return distributed.sum_(shares).tolist()

    def after_steps(self) -> dict[str, Any]:
        """Ten architectures with their accuracy on a batch each, as the source shows them after every phase."""
        if not self.later_steps():
            return {}
        cells = self.architectures("shown", SHOWN)
        accuracies = self.one_batch_accuracies(cells, self.rewards, 1_000_003 * (self.epoch + 1))
        self.run.log(f"Here are {SHOWN} architectures")
        for one, share in zip(cells, accuracies, strict=True):
            self.run.log(f"{one}\nval_acc = {share:<6.4f}\n{RULE}")
        gains = [share - self.penalty(one) for one, share in zip(cells, accuracies, strict=True)]
        best: dict[str, float] = {}
        for gain, text in [*self.candidates, *((g, c.numbers) for g, c in zip(gains, cells, strict=True))]:
            best[text] = max(gain, best.get(text, gain))
        self.candidates = sorted(((gain, text) for text, gain in best.items()), key=lambda c: (-c[0], c[1]))[:SHOWN]
        shown = [{"cells": c.numbers, "top1": a} for c, a in zip(cells, accuracies, strict=True)]
        mean = {"sample_top1": sum(accuracies) / len(accuracies)}
        return {**self.last_update, **mean, "architectures": shown}

    def finalists(self, one: EvaluationSet) -> list[dict[str, Any]]:
        """The best architectures of the search and ten of the final controller, by accuracy on all of `one`.

        Best first; a cost that is rewarded counts in `gain`.
        """
        texts = [text for _, text in self.candidates] + [c.numbers for c in self.architectures("final", SHOWN)]
        rows = []
        for text in dict.fromkeys(texts):
            cells = parse_cells(text)
            share = self.accuracy(one, [cells] * one.batch_count)
            rows.append({"cells": text, "top1": share, "gain": share - self.penalty(cells)})
        return sorted(rows, key=lambda row: (-row["gain"], row["cells"]))

    def state_dict(self) -> dict[str, Any]:
        """`ChildLoop`'s, with the controller's."""
        return {
            **super().state_dict(),
            "controller": self.controller.state_dict(),
            "baseline": self.baseline.value,
            "updates": self.updates_done,
            "last_update": self.last_update,
            "candidates": [list(one) for one in self.candidates],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved state; see `ChildLoop`."""
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.baseline.value, self.updates_done = state["baseline"], int(state["updates"])
        self.last_update = dict(state["last_update"])
        self.candidates = [(float(gain), str(text)) for gain, text in state["candidates"]]
