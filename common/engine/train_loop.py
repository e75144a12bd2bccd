# SPDX-License-Identifier: Apache-2.0
"""The training loop: one network, one stream of batches, SGD, a schedule by epoch, and nothing lost when it stops.

It knows no data set and no network: any module whose forward gives logits, or (logits, auxiliary logits or None), can
be trained. Everything that a step depends on is either a function of (epoch, step) or stands in the checkpoint, so a
resumed run computes the same bits as one that was never stopped. No step waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine import distributed, preemption
from common.engine.accumulation import batches_of
from common.engine.checkpoint import taking_up
from common.engine.environment import peak_memory_mb
from common.engine.guard import FiniteGuard, NonFiniteError, prepare_sgd
from common.engine.metrics import ClassificationMeter
from common.engine.optimizers import SGD
from common.engine.progress import Eta, progress, say
from common.engine.protocols import BatchStream, RunLike
from common.engine.schedules import rate_at
from common.engine.seeding import rng_state, set_rng_state
from common.engine.static_step import load_plain_state

Evaluate = Callable[[nn.Module], dict[str, Any]]


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters of a training; defaults are those of DARTS and PC-DARTS on CIFAR-10.

    `schedule` "cosine", "linear" (both from learning_rate to learning_rate_min) or "step" (times `step_factor` every
    `step_epochs`), after `warmup_epochs` that rise linearly. `select` "last" or "val": with "val" the weights of the
    epoch with the best held-out top-1 (the first such) are the result. `teacher_weight` of the loss is distillation at
    `teacher_temperature`.
    """

    epochs: int
    learning_rate: float = 0.025
    learning_rate_min: float = 0.0
    schedule: str = "cosine"
    step_epochs: int = 30
    step_factor: float = 0.1
    warmup_epochs: int = 0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    drop_path_prob: float = 0.0
    auxiliary_weight: float = 0.4
    teacher_weight: float = 0.5
    teacher_temperature: float = 4.0
    select: str = "last"
    precision: str = "fp32"
    log_every: int = 50
    checkpoint_minutes: float = 10.0


@dataclass(frozen=True)
class TrainOutcome:
    """What came out: epochs and steps done, the epoch (from 1) whose weights the network holds, that epoch's row."""

    epochs: int
    steps: int
    selected_epoch: int
    row: dict[str, Any]


def learning_rate_at(epoch: int, settings: TrainSettings) -> float:
    """The learning rate of epoch 0 .. epochs - 1 (`schedules.rate_at`)."""
    return rate_at(
        epoch,
        epochs=settings.epochs,
        rate=settings.learning_rate,
        least=settings.learning_rate_min,
        warmup=settings.warmup_epochs,
        schedule=settings.schedule,
        step_epochs=settings.step_epochs,
        step_factor=settings.step_factor,
    )


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over rows (Hinton et al., arXiv 1503.02531)."""
    logs = F.log_softmax(student.float() / temperature, dim=1)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(logs, target, reduction="batchmean", log_target=True) * temperature**2


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD with momentum; what `network.no_decay_parameters()` lists (learned quantiser steps) has no weight decay."""
    plain = list(network.no_decay_parameters()) if hasattr(network, "no_decay_parameters") else []
    without = {id(parameter) for parameter in plain}
    decayed = [parameter for parameter in network.parameters() if id(parameter) not in without]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    # fused: one kernel a step, and the form that can skip an update on the device (guard.py)
    return prepare_sgd(SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True))


class _Training:
    """The state of one training. `epoch` and `step` name the next step to be done."""

    def __init__(
        self,
        network: nn.Module,
        *,
        stream: BatchStream,
        settings: TrainSettings,
        criterion: Callable[[Tensor, Tensor], Tensor],
        num_classes: int,
        teacher: nn.Module | None,
        evaluate: Evaluate | None,
        run: RunLike | None,
        extra_state: Mapping[str, Any],
        forward: Callable[[Tensor], Any] | None,
    ) -> None:
        self.network, self.stream, self.settings, self.criterion = network, stream, settings, criterion
        self.teacher, self.evaluate, self.run, self.extra_state = teacher, evaluate, run, dict(extra_state)
        self.forward = network if forward is None else forward
        self.parameters = list(network.parameters())
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(network, settings)
        self.meter = ClassificationMeter(num_classes, self.device)
        self.guard = FiniteGuard(self.device)
        self.epoch = self.step = 0
        self.best: dict[str, Any] | None = None
        self.row: dict[str, Any] = {}
        self.log = run.log if run is not None else say
        self.saved_at = time.monotonic()
        # What the forward and the meter change before the step is known to be finite.
        self.guard.protect(lambda: [*network.buffers(), *self.meter.state_dict().values()], self.optimizer)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.stream.steps_per_epoch

    @property
    def global_step(self) -> int:
        """Steps done since the training began."""
        return self.epoch * self.steps + self.step

    # --------------------------------------------------------------------------------------------- one step

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss to descend, the criterion alone, logits [B, classes] in float32)."""
        settings = self.settings
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            logits, auxiliary = _pair(self.forward(x))
            wanted = None
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = _pair(self.teacher(x))[0]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        loss = plain = self.criterion(logits, y)
        if wanted is not None:
            soft = distillation(logits, wanted, settings.teacher_temperature)
            loss = (1 - settings.teacher_weight) * loss + settings.teacher_weight * soft
        if auxiliary is not None:
            loss = loss + settings.auxiliary_weight * self.criterion(auxiliary.to(logits.dtype), y)
        return loss, plain, logits

    def one_step(self) -> None:
        """One SGD step on this position's batch; nothing here waits for the device."""
        batches = batches_of(self.stream, self.epoch, self.step)
        self.guard.start_of_step()
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        counts: Tensor | None = None
        for x, y in batches:
            loss, plain, logits = self.objective(x, y)
            (loss if len(batches) == 1 else loss / len(batches)).backward()
            losses.append(loss.detach())
            found = self.meter.measure(logits.detach(), y, plain.detach() * len(y))
            counts = found if counts is None else counts + found
        assert counts is not None
        mean = torch.stack(losses).mean()
        if distributed.world_size() > 1:
            # Afterwards every rank holds the same state, so that one of them can save it for all: the running
            # statistics of the ranks' own batches become their mean.
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            buffers = (buffer for buffer in self.network.buffers() if buffer.is_floating_point())
            distributed.average_([*gradients, mean, *buffers], sums=[counts])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip, foreach=True)
        self.guard.check(mean, norm)
        self.optimizer.step()
        self.meter.add(counts)
        self.guard.end_of_step()
        self.step += 1

    # --------------------------------------------------------------------------------------------- epochs

    def start_epoch(self) -> float:
        """Set this epoch's learning rate and drop path; return the rate."""
        rate = learning_rate_at(self.epoch, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if hasattr(self.network, "drop_path_probability"):
            self.network.drop_path_probability = self.settings.drop_path_prob * self.epoch / self.settings.epochs
        self.network.train()
        return rate

    def run_epochs(self, on_step: Callable[[int], None] | None) -> TrainOutcome:
        """All epochs that are left."""
        settings = self.settings
        eta = Eta(settings.epochs, done=self.epoch)
        if self.epoch < settings.epochs:
            self.log(_header(self.evaluate is not None))
        while self.epoch < settings.epochs:
            rate, started, first = self.start_epoch(), time.monotonic(), self.step
            label = f"train {self.epoch + 1}/{settings.epochs}"
            for step in progress(range(first, self.steps), total=self.steps, label=label, start=first):
                preemption.give_way(self.global_step, self.save)
                self.one_step()
                if (step + 1) % settings.log_every == 0 and step + 1 < self.steps:
                    self.write_row(rate, started, self.step - first, {})
                if self.step < self.steps and time.monotonic() - self.saved_at > 60 * settings.checkpoint_minutes:
                    self.save()
                if on_step is not None:
                    on_step(self.global_step)
            self.end_epoch(rate, started, self.steps - first, eta)
        preemption.give_way_at_the_end(self.global_step)
        if settings.select == "val":
            assert self.best is not None
            return TrainOutcome(settings.epochs, self.global_step, self.best["epoch"], dict(self.best["row"]))
        return TrainOutcome(settings.epochs, self.global_step, settings.epochs, dict(self.row))

    def end_epoch(self, rate: float, started: float, steps: int, eta: Eta) -> None:
        """Held-out figures, the epoch's rows, the best weights so far, and the checkpoint."""
        self.check_finite()
        held_out = {}
        if self.evaluate is not None:
            self.network.eval()
            held_out = self.evaluate(self.network)
            self.network.train()
        figures = self.write_row(rate, started, steps, held_out)
        eta.step()
        self.log(_line(self.epoch, self.settings.epochs, figures, self.evaluate is not None, eta.text()))
        clockless = ("train_loss", "train_top1", "valid_loss", "valid_top1", "learning_rate")
        self.row = {key: figures[key] for key in clockless if figures[key] != ""}
        if self.run is not None:
            self.run.history({"epoch": self.epoch, **self.row}, epoch=self.epoch)
        if self.settings.select == "val" and (self.best is None or held_out["top1"] > self.best["row"]["valid_top1"]):
            weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
            self.best = {"epoch": self.epoch + 1, "row": self.row, "model": weights}
        self.epoch, self.step = self.epoch + 1, 0
        self.meter.reset()
        self.guard.end_of_step(count=False)  # the emptied meter is the good state now
        if self.epoch == self.settings.epochs and self.best is not None:
            # The last checkpoint holds the weights that are tested, whatever the selection.
            self.network.load_state_dict(self.best["model"])
        self.save()

    def write_row(self, rate: float, started: float, steps: int, held_out: dict[str, Any]) -> dict[str, Any]:
        """Read the meters (the log points are the only places that wait for the device) and write metrics.csv."""
        self.check_finite()
        found = self.meter.result()
        seconds = time.monotonic() - started
        row = {
            "epoch": self.epoch,
            "train_loss": found["loss"],
            "train_top1": found["top1"],
            "valid_loss": held_out.get("loss", ""),
            "valid_top1": held_out.get("top1", ""),
            "learning_rate": rate,
            "images_per_second": found["n"] / self.step * steps / max(seconds, 1e-9),
            "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        if self.run is not None:
            self.run.metrics(row, step=self.global_step)
        return row

    # --------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, loadable with weights_only=True."""
        return {
            **self.extra_state,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps,
            "row": self.row,
            "best": self.best,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved state. Raises ValueError when it belongs to data of another size."""
        if state["steps_per_epoch"] != self.steps:
            raise ValueError(
                f"--resume: the checkpoint counts {state['steps_per_epoch']} steps an epoch and these data give "
                f"{self.steps}; resume with the same data and --batch-size (with --batch-per-rank: on as many "
                "processes)"
            )
        self.network.load_state_dict(state["model"])
        load_plain_state(self.optimizer, state["optimizer"])
        self.meter.load_state_dict(state["meter"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.row, self.best = dict(state["row"]), state["best"]
        set_rng_state(state["rng"])
        self.guard.restart(self.global_step)

    def save(self) -> None:
        """Write a checkpoint of this position, when every step until here was finite."""
        self.check_finite()
        self.store()

    def store(self) -> None:
        """Write a checkpoint of this position."""
        if self.run is not None and distributed.is_main():
            self.run.checkpoints.save(self.state_dict(), step=self.global_step, epoch=self.epoch)
        self.saved_at = time.monotonic()

    def check_finite(self) -> None:
        """At log points: raise NonFiniteError, after saving the last good state, when a step was not finite."""
        bad = self.guard.first_bad_step()
        if bad is None:
            return
        self.guard.restore()
        self.epoch, self.step = divmod(bad, self.steps)
        self.store()
        raise NonFiniteError(
            f"step {bad} (epoch {self.epoch + 1}, step {self.step + 1} of {self.steps}) gave a loss or gradient that "
            "is not finite; the state before it is saved. Lower --learning-rate or use --precision fp32"
        )


def train(
    network: nn.Module,
    *,
    stream: BatchStream,
    settings: TrainSettings,
    criterion: Callable[[Tensor, Tensor], Tensor],
    num_classes: int,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    run: RunLike | None = None,
    extra_state: Mapping[str, Any] = MappingProxyType({}),
    forward: Callable[[Tensor], Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainOutcome:
    """Train a network; goes on from the run's newest checkpoint where there is one.

    Args:
        network: gives logits [B, classes], or (logits, auxiliary logits or None). `drop_path_probability` is ramped
            linearly where it has one; `no_decay_parameters()` are spared the weight decay.
        stream: the training batches.
        criterion: `(logits, labels) -> scalar`, a mean over the batch.
        teacher: a network in evaluation mode whose softened answers are learned too.
        evaluate: figures ("loss", "top1") of the network on held-out images, after every epoch.
        run: where checkpoints, rows and log lines go; None keeps nothing.
        extra_state: stored in every checkpoint (how the network is built).
        forward: what to call in place of the network in training steps (its compiled form).
        on_step: called with the number of steps done.

    Raises:
        ValueError: a checkpoint of other data.
        NonFiniteError: a loss or gradient was not finite; the last good state is in the newest checkpoint.
        Stopped: a signal asked for it (`common.engine.preemption`); the state is saved.
    """
    if settings.select == "val" and evaluate is None:
        raise ValueError("--select val: needs a held-out part; give --val-fraction above 0")
    training = _Training(
        network,
        stream=stream,
        settings=settings,
        criterion=criterion,
        num_classes=num_classes,
        teacher=teacher,
        evaluate=evaluate,
        run=run,
        extra_state=extra_state,
        forward=forward,
    )
    found = run.resume_state() if run is not None else None
    if found is not None:
        with taking_up("--resume"):
            training.load_state_dict(found[0])
    with preemption.listening():
        return training.run_epochs(on_step)


def _pair(output: Any) -> tuple[Tensor, Tensor | None]:
    return output if isinstance(output, tuple) else (output, None)


def _header(held_out: bool) -> str:
    valid = f"{'valid loss':>12}{'valid top-1':>12}" if held_out else ""
    return f"{'epoch':>9}{'rate':>10}{'train loss':>12}{'train top-1':>12}{valid}{'images/s':>10}"


def _line(epoch: int, epochs: int, row: dict[str, Any], held_out: bool, left: str) -> str:
    valid = f"{row['valid_loss']:>12.4f}{100 * row['valid_top1']:>11.2f}%" if held_out else ""
    place = f"{epoch + 1}/{epochs}"
    return (
        f"{place:>9}{row['learning_rate']:>10.5f}{row['train_loss']:>12.4f}{100 * row['train_top1']:>11.2f}%"
        f"{valid}{row['images_per_second']:>10.0f}  {left}"
    )
