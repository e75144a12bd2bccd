# SPDX-License-Identifier: Apache-2.0
"""The training of a child, one architecture or a new one every step, and the lines that ENAS-QNN prints.

An epoch is its child steps, then what a subclass adds (the controller's updates), then the evaluation. `position`
counts both kinds of steps within the epoch, so that a run can go on from any of them, bit for bit: every random choice
is a function of the seed and of where it is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from common.engine import distributed, preemption
from common.engine.accumulation import batches_of
from common.engine.checkpoint import taking_up
from common.engine.environment import peak_memory_mb
from common.engine.guard import FiniteGuard, NonFiniteError
from common.engine.metrics import ClassificationMeter
from common.engine.progress import Eta, progress
from common.engine.protocols import BatchStream
from common.engine.run import Run
from common.engine.seeding import derive, rng_state, set_rng_state
from common.engine.static_step import load_plain_state
from common.nets.enas_layers import latent_weights
from common.nets.enas_space import MicroCells
from enas.optimizer import HatAdam
from enas.rules import cosine_restarts, loss_of, staircase

RULE = "-" * 80


@dataclass(frozen=True, kw_only=True)
class ChildSettings:
    """Numbers of a child's training; `learning_rate` None is the cosine with restarts between the two rates."""

    epochs: int
    rate_max: float = 0.05
    rate_min: float = 0.0005
    first_period: int = 10
    period_factor: int = 2
    cosine: bool = True
    plain_rate: float = 0.1
    decay_factor: float = 0.1
    decay_every: int = 100
    grad_bound: float | None = 5.0
    loss: str = "hinge"
    auxiliary_weight: float = 0.4
    train_auxiliary: bool = True
    l2: float = 0.0
    clip_weights: bool = True
    drop_path: float = 0.0
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 25
    eval_every: int = 1
    checkpoint_minutes: float = 10.0


@dataclass(frozen=True)
class EvaluationSet:
    """Images to evaluate on after an epoch: `name` "valid" or "test", their number, and their batches.

    Of several processes each gives the batches rank, rank + ranks, ... of the `batch_count`.
    """

    name: str
    images: int
    batch_count: int
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]


class ChildLoop:
    """State and steps of a training; `epoch` and `position` name the next step to be done.

    `later_columns` are the figures that `after_steps` may add to an epoch's row.
    """

    later_columns: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        stream: BatchStream,
        settings: ChildSettings,
        num_classes: int,
        evaluations: Sequence[EvaluationSet],
        run: Run,
        extra_state: Mapping[str, Any] = MappingProxyType({}),
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.stream, self.settings, self.run = model, stream, settings, run
        self.evaluations, self.extra_state, self.on_step = evaluations, dict(extra_state), on_step
        self.criterion = loss_of(settings.loss)
        self.trained = [
            p
            for name, p in model.named_parameters()
            if settings.train_auxiliary or not name.startswith("auxiliary_head.")
        ]
        self.latent = latent_weights(model)
        self.device = self.trained[0].device
        self.optimizers: dict[str, HatAdam] = {"child": HatAdam(self.trained, settings.rate_max)}
        self.meter = ClassificationMeter(num_classes, self.device)
        # loss, gradient norm and correct answers of the newest step, for its line
        self.newest = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.guard = FiniteGuard(self.device)
        self.epoch = self.position = 0
        self.arcs: list[MicroCells] = []
        self.batch_size = 0  # of the newest step
        self.row: dict[str, Any] = {}  # of the newest epoch
        self.saved_at = time.monotonic()

    # --------------------------------------------------------------------------------- what a subclass may change

    def architectures(self, purpose: str, n: int) -> list[MicroCells]:
        """The architectures of n forwards of this epoch; empty: the model has its own."""
        return []

    def later_steps(self) -> int:
        """Steps of this epoch after those of the child."""
        return 0

    def later_steps_before(self) -> int:
        """Such steps of all epochs before this one."""
        return 0

    def later_step(self, number: int) -> None:
        """One of them."""

    def after_steps(self) -> dict[str, Any]:
        """What is done once after all steps of an epoch; figures for the epoch's row."""
        return {}

    # --------------------------------------------------------------------------------- the child's step

    @property
    def steps(self) -> int:
        """Child steps of an epoch."""
        return self.stream.steps_per_epoch

    @property
    def global_step(self) -> int:
        """Child steps done since the training began."""
        return self.epoch * self.steps + min(self.position, self.steps)

    def rate(self) -> float:
        """The learning rate of this epoch."""
        s = self.settings
        if s.cosine:
            return cosine_restarts(
                self.epoch, rate=s.rate_max, least=s.rate_min, first=s.first_period, factor=s.period_factor
            )
        return staircase(self.epoch, rate=s.plain_rate, factor=s.decay_factor, every=s.decay_every)

    def forward(self, x: Tensor, cells: MicroCells | None) -> tuple[Tensor, Tensor | None]:
        """Logits in float32 and the auxiliary head's."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            logits, auxiliary = self.model(x) if cells is None else self.model(x, cells)
        return logits.float(), None if auxiliary is None else auxiliary.float()

    def one_step(self) -> None:
        """One step of the child on this position's batch; nothing here waits for the device."""
        s = self.settings
        batches = batches_of(self.stream, self.epoch, self.position)
        self.guard.start_of_step()
        # Dropout, drop path and stochastic signs: so that a step can be done again, whatever was done since.
        torch.manual_seed(derive(s.seed, "enas", "step", self.epoch, self.position, distributed.rank()))
        if s.drop_path:
            total = s.epochs * self.steps
            self.model.drop_path_probability = s.drop_path * min(1.0, (self.global_step + 1) / total)
        self.model.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        counts: Tensor | None = None
        for x, y in batches:
            loss, found = self._descend(x, y, len(batches))
            losses.append(loss)
            counts = found if counts is None else counts + found
        assert counts is not None
        mean = torch.stack(losses).mean()
        used = [p for p in self.trained if p.grad is not None]
        if distributed.world_size() > 1:
            # every rank drew the same architecture, so the same weights have gradients; see common.engine.train_loop
            buffers = (buffer for buffer in self.model.buffers() if buffer.is_floating_point())
            distributed.average_([*(p.grad for p in used), mean, *buffers], sums=[counts])
        norm = nn.utils.get_total_norm([p.grad for p in used], foreach=True)
        self.guard.check(mean, norm)
        if s.grad_bound is not None:
            nn.utils.clip_grads_with_norm_(used, s.grad_bound, norm, foreach=True)
        self.optimizers["child"].step()
        self._clip()
        self.meter.add(counts)
        self.position += 1
        self.batch_size = sum(len(y) for _, y in batches) * distributed.world_size()
        with torch.no_grad():
            correct = counts[-self.meter.num_classes :].sum()
            self.newest.copy_(torch.stack([counts[0] / self.batch_size, norm, correct]))
        self.guard.end_of_step()

    def _descend(self, x: Tensor, y: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """Add one of a step's `parts` batches to the gradients; its loss, and what the meter counts of it."""
        s = self.settings
        logits, auxiliary = self.forward(x, self.arcs[self.position] if self.arcs else None)
        plain = loss = self.criterion(logits, y)
        if auxiliary is not None:
            loss = loss + s.auxiliary_weight * self.criterion(auxiliary, y)
        if s.l2:
            loss = loss + s.l2 * torch.stack([p.square().sum() for p in self.trained]).sum()
        (loss if parts == 1 else loss / parts).backward()
        return loss.detach(), self.meter.measure(logits.detach(), y, plain.detach() * len(y))

    @torch.no_grad()
    def _clip(self) -> None:
        """Keep the latent weights that this step moved in [-1, 1]."""
        moved = [p for p in self.latent if p.grad is not None]
        if self.settings.clip_weights and moved:
            torch._foreach_clamp_min_(moved, -1.0)
            torch._foreach_clamp_max_(moved, 1.0)

    # --------------------------------------------------------------------------------- epochs

    def run_epochs(self) -> dict[str, Any]:
        """All epochs that are left; the last one's row."""
        found = self.run.resume_state()
        self.protect()
        if found is not None:
            with taking_up("--resume"):
                self.load_state_dict(found[0])
        eta = Eta(self.settings.epochs, done=self.epoch)
        with preemption.listening():
            while self.epoch < self.settings.epochs:
                self.row = self._one_epoch()
                eta.step()
                self.store()
                self.run.log(f"{self.epoch} of {self.settings.epochs} epochs done, {eta.text()}")
            preemption.give_way_at_the_end(self._saved_step())
        return self.row

    def _one_epoch(self) -> dict[str, Any]:
        """What is left of this epoch's steps, then its evaluation and rows. Ends at the next epoch's first position."""
        s = self.settings
        rate, started, first = self.rate(), time.monotonic(), self.position
        for group in self.optimizers["child"].param_groups:
            group["lr"] = rate
        self.guard.restart(self.position)
        if self.position < self.steps:
            self.arcs = self.architectures("child", self.steps)
        self.model.train()
        label = f"epoch {self.epoch + 1}/{s.epochs}"
        for _ in progress(range(first, self.steps), total=self.steps, label=label, start=first):
            preemption.give_way(self._saved_step(), self.save)
            self.one_step()
            if self.global_step % s.log_every == 0:
                self._child_line(rate)
            self._maybe_save()
        self.check_finite()
        seconds = time.monotonic() - started
        for number in range(self.position - self.steps, self.later_steps()):
            preemption.give_way(self._saved_step(), self.save)
            self.later_step(number)
            self.position += 1
            self._maybe_save()
        self.check_finite()
        found, steps_now = self.meter.result(), max(self.steps - first, 0)
        row = {"train_loss": found["loss"], "train_top1": found["top1"], "learning_rate": rate}
        self.model.eval()
        row |= self.after_steps()
        if (self.epoch + 1) % s.eval_every == 0 or self.epoch + 1 == s.epochs:
            row |= self._evaluate()
        self.run.history(row, epoch=self.epoch)
        more = {
            "images_per_second": found["n"] * steps_now / self.steps / max(seconds, 1e-9) if steps_now else "",
            "seconds": time.monotonic() - started,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        # a row's columns are the first row's: those that not every epoch fills are there from the start
        empty = dict.fromkeys([*(f"{one.name}_top1" for one in self.evaluations), *self.later_columns], "")
        scalars = {key: value for key, value in row.items() if isinstance(value, float | int)}
        self.run.metrics({"epoch": self.epoch, **empty, **scalars, **more}, step=self.global_step)
        self.epoch, self.position = self.epoch + 1, 0
        self.meter.reset()
        return row

    def _maybe_save(self) -> None:
        if time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes:
            self.save()
        if self.on_step is not None:
            self.on_step(self._saved_step())

    def save(self) -> None:
        """Write a checkpoint of this position, when every step until here was finite."""
        self.check_finite()
        self.store()

    def _saved_step(self) -> int:
        """Steps of either kind done since the run began, which number the checkpoints: they only grow."""
        return self.epoch * self.steps + self.later_steps_before() + self.position

    def _child_line(self, rate: float) -> None:
        self.check_finite()
        loss, norm, correct = self.newest.tolist()
        self.run.log(
            f"epoch = {self.global_step // self.steps:<6d}ch_step = {self.global_step:<6d} loss = {loss:<8.6f}   "
            f"lr = {rate:<8.4f} |g| = {norm:<8.4f} tr_acc = {int(correct):<3d}/{self.batch_size:>3d}   "
            f"mins = {self.run.seconds / 60:<10.2f}"
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """The lines of "Epoch e: Eval", and each accuracy as NAME_top1."""
        found = {}
        self.run.log(f"Epoch {self.epoch + 1}: Eval")
        for one in self.evaluations:
            share = self.accuracy(one, self.architectures(f"eval {one.name}", one.batch_count))
            self.run.log(f"Eval at {self.global_step}")
            self.run.log(f"{one.name.capitalize()} Num examples:  {one.images}")
            self.run.log(f"{one.name}_accuracy: {share:<6.4f}")
            found[f"{one.name}_top1"] = share
        return found

    @torch.no_grad()
    def accuracy(self, one: EvaluationSet, arcs: Sequence[MicroCells]) -> float:
        """Share of right answers on all images, batch k by architecture k (without any: by the model's own)."""
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for turn, (x, y) in enumerate(one.batches()):
            number = turn * distributed.world_size() + distributed.rank()
            logits, _ = self.forward(x, arcs[number] if arcs else None)
            correct += (logits.argmax(1) == y).sum()
        return int(distributed.sum_(correct)) / one.images

    # --------------------------------------------------------------------------------- state

    def generator(self, *words: str | int) -> torch.Generator:
        """The random numbers of one purpose of this epoch."""
        return torch.Generator().manual_seed(derive(self.settings.seed, "enas", *words, self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, loadable with weights_only=True."""
        return {
            **self.extra_state,
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "meter": self.meter.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "steps_per_epoch": self.steps,
            "row": dict(self.row),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved state. Raises ValueError when it belongs to data of another size."""
        if state["steps_per_epoch"] != self.steps:
            raise ValueError(
                f"--resume: the checkpoint counts {state['steps_per_epoch']} steps an epoch and these data give "
                f"{self.steps}; resume with the same data and --batch-size"
            )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            load_plain_state(optimizer, state["optimizers"][name])
        self.meter.load_state_dict(state["meter"])
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.row = dict(state["row"])
        set_rng_state(state["rng"])

    def protect(self) -> None:
        """Let the guard mask every optimiser from the first bad step on; once, when the loop is whole."""
        self.guard.protect(self._unmasked_state, *self.optimizers.values())

    def _unmasked_state(self) -> list[Tensor]:
        """What a step changes before it is known to be finite."""
        return [*self.model.buffers(), *self.meter.state_dict().values()]

    def store(self) -> None:
        """Write a checkpoint of this position."""
        self.run.checkpoints.save(self.state_dict(), step=self._saved_step(), epoch=self.epoch)
        self.saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raise NonFiniteError, after saving the last good state, when a step was not finite. Waits for the device."""
        bad = self.guard.first_bad_step()
        if bad is None:
            return
        self.guard.restore()
        self.position = bad
        self.store()
        raise NonFiniteError(
            f"step {bad + 1} of epoch {self.epoch + 1} gave a loss or gradient that is not finite; the state before it "
            "is saved. Lower --learning-rate or use --precision fp32"
        )
