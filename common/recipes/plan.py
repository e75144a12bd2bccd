# SPDX-License-Identifier: Apache-2.0
"""What a step would take on many ranks, without them: --plan.

One process plays rank 0 of all of them: torch's fake process group swallows the messages, which `distributed.counted`
counts as the loop sends them. The step itself is a real one, on the CPU and on two images: what is reduced does not
depend on the batch, and what autograd holds grows with it linearly. Times are a model, from the user's own figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.data import DatasetInfo
from common.engine import distributed
from common.engine.cli import Config
from common.engine.memory import SavedBytes
from common.engine.progress import duration
from common.engine.protocols import BatchStream
from common.engine.search_loop import SearchLoop
from common.engine.train_loop import TrainSettings, train
from common.quant.kernels import disabled
from common.recipes.setup import images_at_once

PLANNED_IMAGES = 2  # of a planned step: batch normalisation needs more than one


@dataclass(frozen=True)
class StepPlan:
    """One kind of step on one rank: its messages, their bytes, and what autograd holds at most for one image."""

    messages: int
    bytes: int
    saved_per_image: int


@dataclass(frozen=True)
class Plan:
    """A run on `ranks` ranks, `per_node` of them on a node. Bytes are of one rank, batches in images."""

    ranks: int
    per_node: int
    batch: int
    """Of a step, over all ranks."""
    at_once: int
    """Images that a rank computes on at a time."""
    parts: int
    """Of a rank's share, one after the other (--grad-accumulation)."""
    steps_per_epoch: int
    weight: StepPlan
    weight_steps: int
    arch: StepPlan | None
    """The architecture step of a search, None of a training."""
    arch_steps: int
    static: int
    """Weights, gradients, optimisers' states, the copies that a non-finite step falls back to."""

    @property
    def nodes(self) -> int:
        """How many nodes the ranks fill."""
        return -(-self.ranks // self.per_node)

    @property
    def saved(self) -> int:
        """What autograd holds at most on a rank."""
        return self.at_once * max(step.saved_per_image for step in (self.weight, self.arch) if step is not None)

    @property
    def memory(self) -> int:
        """All that is known of a rank's memory."""
        return self.static + self.bucket + self.saved

    @property
    def bucket(self) -> int:
        """The messages of a step lie beside the gradients."""
        return max(step.bytes for step in (self.weight, self.arch) if step is not None)

    def message_seconds(self, step: StepPlan, gbps: float) -> float:
        """How long a ring all-reduce of the step's bytes takes at `gbps` gigabits a second; latency is not in it."""
        return 2 * (self.ranks - 1) / self.ranks * step.bytes * 8 / (gbps * 1e9)


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Within it this process is rank 0 of so many, and what it sends to the others goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan_search(config: Config, prepare: Callable[[], Any]) -> dict[str, Any]:
    """Plan a search, print the plan and return it. `prepare` gives the PreparedSearch, and raises what it raises."""
    with _as_planned(config):
        prepared = prepare()
        loop = SearchLoop(prepared.supernet, **prepared.loop)
        loop.model.train()
        loop.start_epoch()
        batches = _batches(config, prepared.data.info)
        weight = _second(loop.model, lambda: loop.weight_step(batches))
        arch = _second(loop.model, lambda: loop.architecture_step(batches, batches)) if loop.arch else None
        settings = prepared.loop["settings"]
        searching = max(0, settings.epochs - settings.arch_begin_epoch) * loop.steps
        plan = _plan(
            config,
            loop.steps,
            weight=weight,
            arch=arch,
            arch_steps=-(-searching // settings.arch_every) if arch else 0,
            # alphas and their two moments have copies, so have all buffers
            static=_bytes(loop.model.parameters(), 3) + _bytes(loop.model.buffers(), 2) + _bytes(loop.arch, 4),
        )
    return _deliver(plan, config)


def _second(model: nn.Module, step: Callable[[], Any]) -> StepPlan:
    """What the second such step sends and holds: a first one may set ranges that stay."""
    step()
    with distributed.counted() as traffic, SavedBytes(model).counting() as saved:
        step()
    return StepPlan(traffic.messages, traffic.bytes, saved.peak // PLANNED_IMAGES)


def plan_training(
    config: Config, prepare: Callable[[], tuple[nn.Module, DatasetInfo, BatchStream, TrainSettings, dict[str, Any]]]
) -> dict[str, Any]:
    """Plan a training. `prepare` gives what `common.recipes.train.loop_of` gives."""
    with _as_planned(config):
        network, info, real, settings, arguments = prepare()
        stream, seen = _Planned(_batches(config, info)), []
        once = replace(settings, epochs=1, warmup_epochs=0, select="last")
        with distributed.counted() as traffic, SavedBytes(network).counting() as saved:
            note = lambda step: seen.append((traffic.messages, traffic.bytes))  # noqa: E731
            train(network, stream=stream, settings=once, run=silent_run(), on_step=note, **arguments)
        first, second = seen
        weight = StepPlan(second[0] - first[0], second[1] - first[1], saved.peak // PLANNED_IMAGES)
        static = _bytes(network.parameters(), 3) + _bytes(network.buffers(), 2)
        plan = _plan(config, real.steps_per_epoch, weight=weight, arch=None, arch_steps=0, static=static)
    return _deliver(plan, config)


class _Planned:
    """Two steps of the same batches."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches, self.steps_per_epoch = batches, 2

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The first of a step's."""
        return self._batches[0]

    def batches(self, epoch: int, step: int) -> list[tuple[Tensor, Tensor]]:
        """All of a step's."""
        return self._batches


def silent_run(rows: list[dict[str, Any]] | None = None) -> SimpleNamespace:
    """A run folder that keeps nothing; its metrics go to `rows`."""
    kept: list[dict[str, Any]] = [] if rows is None else rows
    return SimpleNamespace(
        log=lambda text: None,
        metrics=lambda row, step: kept.append(row),
        history=lambda row, epoch: None,
        checkpoints=SimpleNamespace(save=lambda *args, **kwargs: None),
        resume_state=lambda: None,
    )


@contextmanager
def _as_planned(config: Config) -> Iterator[None]:
    """The ranks, on the CPU and without a compiler. For GPUs (all but --device cpu) the CPU's own kernels are off: they
    keep less for the backward pass, and share statistics in other messages.
    """
    kernels = nullcontext() if config.device == "cpu" else disabled()
    config.device, config.compile = "cpu", False
    with pretended(config.world_size), kernels:
        yield


def _batches(config: Config, info: DatasetInfo) -> list[tuple[Tensor, Tensor]]:
    """As many batches as a step has, of a few random images each."""
    source = torch.Generator().manual_seed(0)
    shape = (PLANNED_IMAGES, info.channels, info.image_size, info.image_size)
    labels = torch.arange(PLANNED_IMAGES) % info.num_classes
    return [(torch.randn(shape, generator=source), labels) for _ in range(config.grad_accumulation)]


def _plan(config: Config, steps: int, **more: Any) -> Plan:
    ranks, at_once = config.world_size, images_at_once(config)
    return Plan(
        ranks=ranks,
        per_node=min(ranks, config.gpus_per_node),
        batch=at_once * config.grad_accumulation * ranks,
        at_once=at_once,
        parts=config.grad_accumulation,
        steps_per_epoch=steps,
        weight_steps=steps * config.epochs,
        **more,
    )


def _bytes(tensors: Iterable[Tensor], times: int) -> int:
    return times * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------------------------ what is said


def _deliver(plan: Plan, config: Config) -> dict[str, Any]:
    """Print the plan, with a modelled time where the figures for it were given; the plan as JSON values."""
    nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)}"
    parts = f" in {plan.parts} parts of {plan.at_once}" if plan.parts > 1 else ""
    lines = [
        f"plan: {plan.ranks} ranks, {plan.per_node} on each of {nodes}; nothing is trained or written",
        f"batch: {plan.batch} images a step, {plan.batch // plan.ranks} a rank{parts}; "
        f"{plan.steps_per_epoch:,} steps an epoch, {config.epochs} epochs",
    ]
    steps = {"weight step": plan.weight} | ({"architecture step": plan.arch} if plan.arch else {})
    lines += [
        f"{name}: {step.messages:,} message{'s' * (step.messages > 1)}, {_size(step.bytes)} a rank"
        for name, step in steps.items()
    ]
    lines += [
        f"memory of a rank: about {_size(plan.memory)} = {_size(plan.static)} weights, gradients, optimiser and copies"
        f" + {_size(plan.bucket)} message + {_size(plan.saved)} kept for the backward pass ({plan.at_once} images);"
        " the libraries' own and fragmentation come on top"
    ]
    model = modelled(plan, config)
    if model is not None:
        lines += _model_lines(plan, config, model)
    elif config.link_gbps is None or config.step_seconds is None:
        lines.append(
            f"time: none without --link-gbps and --step-seconds; measure a step on one GPU by --dry-run --batch-size "
            f"{plan.at_once}"
        )
    print("\n".join(lines))
    derived = {"nodes": plan.nodes, "memory": plan.memory, "saved": plan.saved}
    return {"plan": True, **asdict(plan), **derived, "model": model}


def modelled(plan: Plan, config: Config) -> dict[str, float] | None:
    """Seconds of a step of each kind, of the whole run, and efficiency; None without the user's two figures.

    A step is what was measured on one rank (once for each part), then its messages: the loops reduce after the backward
    pass, so that nothing overlaps.
    """
    if config.link_gbps is None or config.step_seconds is None:
        return None
    measured = list(config.step_seconds) * (3 - len(config.step_seconds))
    found, whole, computing = {}, 0.0, 0.0
    kinds = (("weight", plan.weight, plan.weight_steps), ("architecture", plan.arch, plan.arch_steps))
    for (name, step, count), alone in zip(kinds, measured, strict=False):
        if step is None:
            continue
        found[f"{name}_step"] = plan.parts * alone + plan.message_seconds(step, config.link_gbps)
        whole += count * found[f"{name}_step"]
        computing += count * plan.parts * alone
    return {**found, "run": whole, "efficiency": computing / whole}


def _model_lines(plan: Plan, config: Config, model: dict[str, float]) -> list[str]:
    steps = ", ".join(f"{name.replace('_', ' ')} {model[name]:.3f} s" for name in model if name.endswith("_step"))
    return [
        f"time (a model, not a measurement): {steps}; {duration(model['run'])} in all, {model['efficiency']:.0%} of it "
        "computing (loading and evaluation not counted)",
        f"  step = --step-seconds + 2 (N - 1) / N x bytes / --link-gbps {config.link_gbps:g}: a ring over all ranks "
        "whose slowest link is "
        + ("between nodes" if plan.nodes > 1 else "within the node")
        + ", no latency, no overlap",
    ]


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count} bytes"
