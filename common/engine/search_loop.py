# SPDX-License-Identifier: Apache-2.0
"""The loop of every differentiable search: an architecture step, then a weight step, for some epochs.

It runs any module that offers ``weight_parameters()``, ``arch_parameters()`` and ``genotype()``; ``gamma_parameters()``
(bit logits, trained by a second SGD) and ``side_pass()`` (forwards that leave running ranges alone) are optional. It
knows neither data sets nor costs: batches come from streams, cost terms and their controller are arguments.

Within a step nothing is read back from the device. A non-finite loss or gradient masks every update from then on, on
the device; the loop sees it at the next log point, goes back to the last good state, saves it and stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from common.engine import distributed, preemption
from common.engine.accumulation import Batch, add, as_list, batches_of, divide
from common.engine.bilevel import ORDERS, architecture_gradients, inner_groups
from common.engine.checkpoint import taking_up
from common.engine.guard import FiniteGuard, NonFiniteError, prepare_adam, prepare_sgd
from common.engine.optimizers import SGD, Adam
from common.engine.progress import Eta, progress, say
from common.engine.protocols import BatchStream, RunLike
from common.engine.schedules import rate_at
from common.engine.seeding import rng_state, set_rng_state
from common.engine.static_step import MODES, StaticStep, load_plain_state, obstacle, plain_state, set_rate

GAMMA_LEVELS = ("lower", "upper")

Term = Callable[[nn.Module], Tensor]
OnEpoch = Callable[[int, dict[str, float]], bool | None]


@dataclass(kw_only=True)
class SearchSettings:
    """Numbers of one search. The defaults are those of PC-DARTS and of NablaQDARTS on CIFAR-10.

    ``learning_rate`` anneals by ``schedule`` per epoch towards ``learning_rate_min``, which no epoch reaches, after
    ``warmup_epochs`` epochs that rise linearly (``schedules.rate_at``). ``arch_begin_epoch`` epochs leave alphas and
    betas alone; from then on one step in ``arch_every`` moves them. Gammas move with the weights
    (``gamma_level="lower"``, SGD of their own) or with the alphas (``"upper"``: Adam at the architecture's learning
    rate). ``gamma_annealed=False`` keeps their rate constant: a controller of the cost needs its authority to the last
    step. ``cuda_graph``: one of ``static_step.MODES``; "auto" captures where nothing stands against it.
    """

    epochs: int
    steps_per_epoch: int | None = None
    learning_rate: float = 0.1
    learning_rate_min: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    warmup_epochs: int = 0
    schedule: str = "cosine"
    step_epochs: int = 30
    step_factor: float = 0.1
    arch_learning_rate: float = 6e-4
    arch_weight_decay: float = 1e-3
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_begin_epoch: int = 15
    arch_every: int = 1
    gamma_learning_rate: float = 0.01
    gamma_momentum: float = 0.9
    gamma_weight_decay: float = 1e-3
    gamma_level: str = "lower"
    gamma_annealed: bool = True
    order: str = "first"
    precision: str = "fp32"
    cuda_graph: str = "off"
    log_every: int = 50
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.epochs < 1:
            problems.append(f"epochs {self.epochs}: at least 1 is needed")
        if self.arch_every < 1:
            problems.append(f"arch_every {self.arch_every}: at least 1 is needed")
        if self.order not in ORDERS:
            problems.append(f"order {self.order!r}: choose one of {', '.join(ORDERS)}")
        if self.gamma_level not in GAMMA_LEVELS:
            problems.append(f"gamma level {self.gamma_level!r}: choose one of {', '.join(GAMMA_LEVELS)}")
        if self.cuda_graph not in MODES:
            problems.append(f"cuda_graph {self.cuda_graph!r}: choose one of {', '.join(MODES)}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                problems.append(f"{entry.name} {value}: must be finite and not negative")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass
class SearchOutcome:
    """What a search ends with: ``genotype`` as the model gives it, the last epoch's figures, steps of the whole run."""

    genotype: Any
    epochs: int
    steps: int
    summary: dict[str, float]
    stopped_early: bool = False


class Objective(nn.Module):
    """``forward(x, y) -> scalar``: criterion plus cost term. Keeps the last logits and the bare criterion, detached."""

    def __init__(
        self, model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], term: Term | None, precision: str
    ):
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.term = term
        self.precision = precision
        self.logits: Tensor | None = None
        self.loss: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The objective of one batch."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(x)
        if self.precision == "bf16":
            logits = logits.float()
        loss = self.criterion(logits, y)
        self.logits, self.loss = logits.detach(), loss.detach()
        return loss if self.term is None else loss + self.term(self.model)


class SearchLoop:
    """State and steps of one search; :func:`search` is the usual entrance.

    ``epoch`` and ``step`` name the next step to be done, so a state saved at any step boundary says all about the
    position in the data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        train_stream: BatchStream,
        valid_stream: BatchStream | None,
        settings: SearchSettings,
        criterion: Callable[[Tensor, Tensor], Tensor],
        weight_term: Term | None = None,
        arch_term: Term | None = None,
        controller: nn.Module | None = None,
    ) -> None:
        self.model, self.settings, self.controller = model, settings, controller
        self.train_stream, self.valid_stream = train_stream, valid_stream
        self.steps = min(train_stream.steps_per_epoch, settings.steps_per_epoch or train_stream.steps_per_epoch)
        if self.steps < 1 or (valid_stream is not None and valid_stream.steps_per_epoch < 1):
            raise ValueError(
                "--batch-size: one part of the training set has fewer images than one batch; give a smaller batch"
            )
        self.train_objective = Objective(model, criterion, weight_term, settings.precision)
        self.valid_objective = Objective(model, criterion, arch_term, settings.precision)
        self._make_optimizers()
        self.device = self.weights[0].device
        self.epoch = self.step = 0
        self.summary: dict[str, float] = {}
        self.stopped_early = False
        # Sums of this epoch's training: loss, correct, images.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.guard = FiniteGuard(self.device)
        self.guard.protect(self._unmasked_state, *self.optimizers.values())
        self.static = self._capturing()

    def _capturing(self) -> StaticStep | None:
        """The step as a CUDA graph, where the settings ask for it and nothing stands against it."""
        mode, ranks = self.settings.cuda_graph, distributed.world_size()
        if mode == "off":
            return None
        against = obstacle(device=self.device.type, order=self.settings.order, compiled=False, ranks=ranks)
        if against is not None:
            if mode == "on":
                raise ValueError(f"--cuda-graph on: {against}, or leave it out")
            return None
        for group in self.optimizers["arch"].param_groups:
            group["capturable"] = True
        return StaticStep(self._compute, capture=True, required=mode == "on")

    def _make_optimizers(self) -> None:
        s = self.settings
        self.weights = list(self.model.weight_parameters())
        self.arch = list(self.model.arch_parameters())
        gammas = list(getattr(self.model, "gamma_parameters", list)())
        _assert_partition(self.model, self.weights, self.arch, gammas)
        upper = gammas if s.gamma_level == "upper" else []
        self.gammas = [] if upper else gammas
        rates = {"momentum": s.momentum, "weight_decay": s.weight_decay}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "weights": prepare_sgd(SGD(self.weights, lr=s.learning_rate, fused=True, **rates))
        }
        if self.gammas:
            rates = {"momentum": s.gamma_momentum, "weight_decay": s.gamma_weight_decay}
            self.optimizers["gammas"] = prepare_sgd(SGD(self.gammas, lr=s.gamma_learning_rate, fused=True, **rates))
        groups: list[dict[str, Any]] = [{"params": self.arch, "weight_decay": s.arch_weight_decay}]
        if upper:
            groups.append({"params": upper, "weight_decay": s.gamma_weight_decay})
        self.arch = self.arch + upper
        adam = Adam(groups, lr=s.arch_learning_rate, betas=s.arch_betas, fused=True)
        self.optimizers["arch"] = prepare_adam(adam)
        self.side_pass: Callable[[], AbstractContextManager[object]] = getattr(self.model, "side_pass", nullcontext)

    # ------------------------------------------------------------------------------------------------ one step

    @property
    def global_step(self) -> int:
        """Steps done since the search began."""
        return self.epoch * self.steps + self.step

    def architecture_moves(self) -> bool:
        """Whether this step begins with one of the architecture (never, for a model without its parameters).

        A function of the position alone, so that a resumed search takes the same steps.
        """
        s = self.settings
        return bool(self.arch) and self.epoch >= s.arch_begin_epoch and self.global_step % s.arch_every == 0

    def start_epoch(self) -> None:
        """Set the learning rates that this epoch really uses."""
        s = self.settings
        fall = {"schedule": s.schedule, "step_epochs": s.step_epochs, "step_factor": s.step_factor, "epochs": s.epochs}
        rates = {
            "weights": rate_at(
                self.epoch, rate=s.learning_rate, least=s.learning_rate_min, warmup=s.warmup_epochs, **fall
            )
        }
        if "gammas" in self.optimizers:
            rate = s.gamma_learning_rate
            rates["gammas"] = rate_at(self.epoch, rate=rate, **fall) if s.gamma_annealed else rate
        for name, rate in rates.items():
            captured = self.static is not None
            set_rate(self.optimizers[name].param_groups[0], rate, captured=captured, device=self.device)

    def one_step(self) -> None:
        """Architecture step (once its epoch has come), then weight step, on this position's batches."""
        moving = self.architecture_moves()
        batches = batches_of(self.train_stream, self.epoch, self.step)
        count = len(batches)
        if moving:
            batches = [*batches, *self._valid_batches()]
        searching = self.epoch >= self.settings.arch_begin_epoch
        if self.static is None:  # a captured step draws nothing
            self.guard.start_of_step()
        compute = self._compute if self.static is None else self.static
        compute((searching, moving, count), *(tensor for batch in batches for tensor in batch))
        self.step += 1

    def _compute(self, variant: tuple[bool, bool, int], *tensors: Tensor) -> None:
        """What a step does on the device: training images and labels, then those of the validation half, if any.

        Of one variant, steps differ in the contents of tensors and in nothing else, so that they can be captured.
        """
        searching, moving, count = variant
        batches = list(zip(tensors[::2], tensors[1::2], strict=True))
        if moving:
            self.architecture_step(batches[:count], batches[count:])
        self.weight_step(batches[:count])
        if self.controller is not None:
            self.controller.update(self.model, searching)
        self.guard.end_of_step()

    def _valid_batches(self) -> list[Batch]:
        # The validation half is walked on its own: it may be longer or shorter than the training half.
        assert self.valid_stream is not None, "architecture parameters learn on a second stream"
        number = self.global_step // self.settings.arch_every
        return batches_of(self.valid_stream, *divmod(number, self.valid_stream.steps_per_epoch))

    def architecture_step(
        self, train_batch: Batch | Sequence[Batch], valid_batch: Batch | Sequence[Batch] | None = None
    ) -> None:
        """One Adam step of alphas and betas on a fresh validation batch (Liu et al. 2019, equations 5-8).

        A batch may be several, whose gradients are averaged.
        """
        s = self.settings
        valid_batch = self._valid_batches() if valid_batch is None else valid_batch
        inner = None
        if s.order != "first":
            sgd = [self.optimizers[name] for name in ("weights", "gammas") if name in self.optimizers]
            inner = inner_groups(*sgd)  # type: ignore[arg-type]
        loss = architecture_gradients(
            arch=self.arch,
            train_objective=self.train_objective,
            valid_objective=self.valid_objective,
            train_batch=train_batch,
            valid_batch=valid_batch,
            inner=inner,
            order=s.order,
            side_pass=self.side_pass,
        )
        self.guard.check(loss, _norm(self.arch))
        hold = getattr(self.controller, "hold", None)
        if hold is not None:
            # A controller may end the architecture's steps; masked on the device, as a non-finite step is.
            self.optimizers["arch"].found_inf = torch.maximum(self.guard.halted, hold)  # type: ignore[attr-defined]
        self.optimizers["arch"].step()
        self.optimizers["arch"].zero_grad(set_to_none=True)

    def weight_step(self, batch: Batch | Sequence[Batch]) -> None:
        """One SGD step of the weights, and of the gammas where they move with them, on one backward pass a batch.

        Afterwards every rank holds the same state, so that one of them can save it for all.
        """
        parameters, batches = self.weights + self.gammas, as_list(batch)
        losses: list[Tensor] = []
        counts, total = None, None
        for x, y in batches:
            loss = self.train_objective(x, y)
            total = add(total, torch.autograd.grad(loss, parameters, allow_unused=True))
            losses.append(loss.detach())
            counts = self._counts(y) if counts is None else counts + self._counts(y)
        assert total is not None and counts is not None
        gradients = divide(total, len(batches))
        loss = torch.stack(losses).mean()
        if distributed.world_size() > 1:
            # running statistics of the ranks' own batches: what all of them saw is their mean
            buffers = (buffer for buffer in self.model.buffers() if buffer.is_floating_point())
            distributed.average_([*(g for g in gradients if g is not None), loss, *buffers], sums=[counts])
        self.totals += counts.to(self.totals.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = _norm(self.weights)
        self.guard.check(loss, norm, _norm(self.gammas))
        # Weights only: the reference clips neither gammas nor alphas.
        torch.nn.utils.clip_grads_with_norm_(self.weights, self.settings.grad_clip, norm, foreach=True)
        for name in ("weights", "gammas"):
            if name in self.optimizers:
                self.optimizers[name].step()
                self.optimizers[name].zero_grad(set_to_none=True)

    @torch.no_grad()
    def _counts(self, labels: Tensor) -> Tensor:
        """Loss (times images), correct answers and images of the newest batch."""
        objective = self.train_objective
        correct = (objective.logits.argmax(1) == labels).sum()
        images = torch.full_like(objective.loss, len(labels))
        return torch.stack([objective.loss * images, correct, images])

    # ------------------------------------------------------------------------------------------------ epochs

    def run(
        self,
        run: RunLike | None = None,
        on_epoch: OnEpoch | None = None,
        on_step: Callable[[int], None] | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> SearchOutcome:
        """All epochs that are left; see :func:`search`."""
        log = run.log if run is not None else say
        eta = Eta(self.settings.epochs, done=self.epoch)
        self._saved_at = time.monotonic()
        while self.epoch < self.settings.epochs and not self.stopped_early:
            started, first = time.monotonic(), self.step
            self.start_epoch()
            if on_start is not None:
                on_start(self.epoch)
                if self.static is not None:
                    self.static.forget()  # a term of the loss may change by epoch
            self.model.train()
            label = f"search {self.epoch + 1}/{self.settings.epochs}"
            for step in progress(range(first, self.steps), total=self.steps, label=label, start=first):
                preemption.give_way(self.global_step, lambda: self._save(run))
                self.one_step()
                if (step + 1) % self.settings.log_every == 0 or step + 1 == self.steps:
                    self._check(run)
                    self._log_step(log)
                if self.step < self.steps and self._due():
                    self._save(run)
                if on_step is not None:
                    on_step(self.global_step)
            self._end_epoch(run, evaluate, on_epoch, started, self.steps - first)
            eta.step()
            if self.stopped_early:
                eta.total = eta.done  # nothing is left
            log(f"epoch {self.epoch}/{self.settings.epochs} done, {eta.text()}")
        preemption.give_way_at_the_end(self.global_step)
        genotype = self.model.genotype()
        return SearchOutcome(genotype, self.epoch, self.global_step, dict(self.summary), self.stopped_early)

    def _end_epoch(
        self,
        run: RunLike | None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        on_epoch: OnEpoch | None,
        started: float,
        steps: int,
    ) -> None:
        """Figures of the epoch, the callbacks, and the checkpoint, whose position is the next epoch's first step."""
        loss, correct, images = self.totals.tolist()
        seconds = time.monotonic() - started
        self.summary = {
            "train_loss": loss / images,
            "train_top1": correct / images,
            "learning_rate": float(self.optimizers["weights"].param_groups[0]["lr"]),
            "images_per_second": images * steps / self.steps / seconds,
        }
        for name, moving in (("gammas", self.gammas), ("arch", self.arch)):
            if moving:  # the rates of this epoch, as the weights' above
                group = self.optimizers[name].param_groups[0]
                self.summary[f"{name.removesuffix('s')}_learning_rate"] = float(group["lr"])
        if evaluate is not None:
            self.model.eval()
            with torch.no_grad():
                self.summary |= evaluate(self.model)
            self.model.train()
        self.summary["seconds"] = time.monotonic() - started
        if on_epoch is not None:
            self.stopped_early = bool(on_epoch(self.epoch, dict(self.summary)))
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        self.guard.end_of_step(count=False)
        self._save(run)

    def _log_step(self, log: Callable[[str], None]) -> None:
        loss, correct, images = self.totals.tolist()
        log(
            f"epoch {self.epoch + 1}/{self.settings.epochs} step {self.step}/{self.steps}: "
            f"loss {loss / images:.4f}, top-1 {100 * correct / images:.2f}%"
        )

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, loadable with weights_only=True."""
        return {
            "model": self.model.state_dict(),
            "optimizers": {name: plain_state(optimizer) for name, optimizer in self.optimizers.items()},
            "controller": self.controller.state_dict() if self.controller is not None else {},
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps,
            "totals": self.totals,
            "summary": self.summary,
            "stopped_early": self.stopped_early,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved state. Raises ValueError when it belongs to data of another size."""
        if state["steps_per_epoch"] != self.steps:
            raise ValueError(
                f"the checkpoint counts {state['steps_per_epoch']} steps an epoch and these data give {self.steps}: "
                "resume with the same data and --batch-size (with --batch-per-rank: on as many processes)"
            )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            load_plain_state(optimizer, state["optimizers"][name])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.totals.copy_(state["totals"])
        self.summary, self.stopped_early = dict(state["summary"]), bool(state.get("stopped_early", False))
        set_rng_state(state["rng"])
        self.guard.restart(self.global_step)

    def _unmasked_state(self) -> list[Tensor]:
        """What changes within a step before the step is known to be finite, and so cannot be masked.

        Batch norm statistics and quantiser ranges (by the forward), alphas and Adam's moments (stepped before the
        weights' loss is known), the controller and the running sums.
        """
        adam = self.optimizers["arch"]
        moments = [value for p in self.arch for value in adam.state[p].values() if isinstance(value, Tensor)]
        controller = list(self.controller.buffers()) if self.controller is not None else []
        return [*self.model.buffers(), *(p.detach() for p in self.arch), *moments, *controller, self.totals]

    def _due(self) -> bool:
        s = self.settings
        if s.checkpoint_steps and self.step % s.checkpoint_steps == 0:
            return True
        return time.monotonic() - self._saved_at > 60 * s.checkpoint_minutes

    def _save(self, run: RunLike | None) -> None:
        self._check(run)
        self._store(run)

    def _store(self, run: RunLike | None) -> None:
        if run is not None and distributed.is_main():
            run.checkpoints.save(self.state_dict(), step=self.global_step, epoch=self.epoch)
        self._saved_at = time.monotonic()

    def _check(self, run: RunLike | None) -> None:
        """At log points: whether every step since the last one was finite. Raises NonFiniteError after saving."""
        bad = self.guard.first_bad_step()
        if bad is None:
            return
        self.guard.restore()
        self.epoch, self.step = divmod(bad, self.steps)
        self._store(run)
        raise NonFiniteError(
            f"step {bad} (epoch {self.epoch + 1}, step {self.step + 1} of {self.steps}) gave a loss or gradient "
            "that is not finite; the state before it is saved. Lower --learning-rate or use --precision fp32"
        )


def search(
    model: nn.Module,
    *,
    train_stream: BatchStream,
    valid_stream: BatchStream | None,
    settings: SearchSettings,
    criterion: Callable[[Tensor, Tensor], Tensor],
    weight_term: Term | None = None,
    arch_term: Term | None = None,
    run: RunLike | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: Callable[[int], None] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    on_start: Callable[[int], None] | None = None,
    controller: nn.Module | None = None,
) -> SearchOutcome:
    """Search an architecture; goes on from the run's newest checkpoint where there is one.

    Args:
        model: anything with ``weight_parameters()``, ``arch_parameters()`` and ``genotype()``.
        train_stream, valid_stream: the two halves of the training set; a model without architecture parameters needs
            no second one.
        criterion: ``(logits, labels) -> scalar``.
        weight_term, arch_term: added to the loss of the weight step and of the architecture step.
        run: where checkpoints and log lines go; None keeps nothing.
        on_epoch: called with (epoch from 0, its figures) before the epoch's checkpoint; True ends the search there.
        on_step: called with the number of steps done.
        on_start: called with the epoch from 0, before its first step and when a search goes on within it.
        evaluate: figures of the model in evaluation mode, added to each epoch's.
        controller: a module of buffers with ``update(model, moving)``, called after every step; it works on the
            device. Where it has a buffer ``hold`` (float32), 1 there skips the architecture's updates.

    Raises:
        ValueError: settings or checkpoint that do not fit.
        NonFiniteError: a loss or gradient was not finite; the last good state is in the run's newest checkpoint.
        Stopped: a signal asked for it (`common.engine.preemption`); the state is saved.
    """
    loop = SearchLoop(
        model,
        train_stream=train_stream,
        valid_stream=valid_stream,
        settings=settings,
        criterion=criterion,
        weight_term=weight_term,
        arch_term=arch_term,
        controller=controller,
    )
    found = run.resume_state() if run is not None else None
    if found is not None:
        with taking_up("--resume"):
            loop.load_state_dict(found[0])
    with preemption.listening():
        return loop.run(run, on_epoch, on_step, evaluate, on_start)


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True if gradients else None)


def _assert_partition(model: nn.Module, *groups: list[nn.Parameter]) -> None:
    ids = [id(p) for group in groups for p in group]
    assert len(ids) == len(set(ids)), "weights, alphas and gammas must be disjoint"
    assert set(ids) == {id(p) for p in model.parameters()}, "weights, alphas and gammas must be all parameters"
