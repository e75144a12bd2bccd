# SPDX-License-Identifier: Apache-2.0
"""The one training recipe: flags -> data, architecture, network -> loop -> test once -> cost -> result.json.

Every method trains its networks here, so that a table compares methods and not conventions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.cost import Cost, network_cost
from common.data import DatasetInfo, ImageData, hold_out
from common.engine import distributed, read_json, seed_everything
from common.engine.accumulation import Batch, batches_of
from common.engine.cli import Config
from common.engine.progress import duration
from common.engine.protocols import BatchStream
from common.engine.train_loop import TrainSettings, train
from common.nets import Architecture, Network, build_network, load_architecture
from common.recipes.elapsed import time_before
from common.recipes.matching import match_channels, matching_text
from common.recipes.plan import plan_training, silent_run
from common.recipes.plots import plot_run
from common.recipes.setup import (
    lay_out,
    load_data,
    open_run,
    prepare_compiler,
    prepare_torch,
    shorten,
    stem_of,
    tell,
    training_stream,
)
from common.recipes.trained import (
    cost_text,
    evaluate_split,
    final_figures,
    load_trained,
    mean_bits,
    network_state,
)

# What a network may have and the one whose weights it starts from may lack: learned steps and running ranges.
_OPTIONAL = (".step", ".maximum", ".ready")


@dataclass
class Prepared:
    """All that a training needs, built from its flags, before any folder is made."""

    config: Config
    device: torch.device
    data: ImageData
    architecture: Architecture
    build: dict[str, Any]
    network: Network
    cost: Cost
    notes: list[str]
    matched: dict[str, Any] | None = None
    """How --match-bitops chose the channels."""


# ------------------------------------------------------------------------------------------------------ preparation


def resolve_architecture(config: Config) -> Architecture:
    """--arch with the bits that the flags put on it. Raises ValueError naming the flag or file."""
    architecture = load_architecture(config.arch)
    if config.bit_mapping is not None:
        architecture = architecture.with_mapping(config.bit_mapping)
    if config.weights_path is not None:
        from common.recipes.gammas import import_gammas

        architecture = import_gammas(architecture, config.weights_path, config.bit_mapping or "relative")
    if config.wbits is not None:
        architecture = architecture.with_uniform_bits(config.wbits, config.abits)
    return architecture


def network_arguments(config: Config, info: DatasetInfo) -> dict[str, Any]:
    """The keyword arguments of `build_network` beside the architecture, as JSON values."""
    same = ("init_channels", "layers", "auxiliary", "scheme", "weight_quantizer", "activation_quantizer")
    bits = ("signed_activations", "stem_bits", "classifier_bits")
    return {
        "stem": stem_of(config, info.image_size),
        "in_channels": info.channels,
        "num_classes": info.num_classes,
        **{name: getattr(config, name) for name in (*same, *bits)},
    }


def prepare(config: Config, say: Callable[[str], None] = print) -> Prepared:
    """Data, architecture and network of a training, with everything refused that does not fit together."""
    device = prepare_torch(config)
    architecture = resolve_architecture(config)
    data = load_data(config, say)
    build = network_arguments(config, data.info)
    matched = None
    if config.match_bitops is not None:
        matched = match_channels(config, architecture, build, data.info.image_size)
        if config.explicit("init_channels"):  # kept, so that the run can be repeated
            config.given = {"init_channels": config.init_channels}
        config.init_channels = build["init_channels"] = matched["channels"]
        config.sources["init_channels"] = "derived"
    seed_everything(config.seed, deterministic=config.deterministic)
    network = build_network(architecture, **build)
    cost = network_cost(network, data.info.image_size)
    notes = [_describe(config, architecture, data, cost)] + ([matching_text(matched)] if matched else [])
    if config.init_from is not None:
        notes.append(start_from(network, config.init_from))
    lay_out(network, config).to(device)
    return Prepared(config, device, data.to(device), architecture, build, network, cost, notes, matched)


def _describe(config: Config, architecture: Architecture, data: ImageData, cost: Cost) -> str:
    weight, activation = mean_bits(cost)
    bits = "full precision" if weight == activation == 32 else f"{weight:.2f} weight, {activation:.2f} activation bits"
    info = data.info
    return (
        f"architecture: {config.arch}"
        + (f" = {architecture.name}" if architecture.name not in (None, config.arch) else "")
        + f", {bits}\n"
        f"data: {info.name}, {len(data.train):,} training and {len(data.test):,} test images of "
        f"{info.channels}x{info.image_size}x{info.image_size}, {info.num_classes} classes\n"
        f"network: {cost_text(cost)}"
    )


def start_from(network: Network, run: Path) -> str:
    """Load a run's weights into the network; ValueError unless every convolution and the classifier fit."""
    source, _, info = load_trained(run, flag="--init-from")
    theirs, ours = source.state_dict(), network.state_dict()
    missing = [name for name in ours if name not in theirs and not _optional(name)]
    unknown = [name for name in theirs if name not in ours and not _optional(name)]
    shapes = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    for names, what in ((missing, "it lacks"), (unknown, "this network lacks"), (shapes, "other shape:")):
        if names:
            raise ValueError(
                f"--init-from {run}: {len(names)} of its tensors do not fit ({what} {names[0]}); "
                "start from a run of the same cells, --layers, --init-channels, --stem and data"
            )
    taken = {name: tensor for name, tensor in theirs.items() if name in ours}
    network.load_state_dict(taken, strict=False)
    left = sorted(ours.keys() - taken.keys())
    return f"started from {run} (epoch {info['epoch']}): {len(taken)} tensors loaded" + (
        f", {len(left)} new: {left[0]} ..." if left else ""
    )


def _optional(name: str) -> bool:
    return name.startswith("auxiliary_head.") or name.endswith(_OPTIONAL)


# ------------------------------------------------------------------------------------------------------ the training


def run_training(config: Config, *, method: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train what the flags say and return what result.json holds (for --dry-run: what it found).

    `on_step` is called with the number of steps done (tests stop a run by it). Raises ValueError for what does not fit,
    NonFiniteError when the training leaves the finite numbers.
    """
    if config.plan:
        return plan_training(config, lambda: loop_of(prepare(config)))
    prepared = prepare(config)
    stream, held_out = _streams(prepared)
    settings = training_settings(config)
    arguments = _arguments(prepared)
    if config.dry_run:
        return _dry_run(prepared, stream, settings, arguments)
    run = open_run(config, method=method, stage="train", dataset=prepared.data.info.name)
    with run:
        if run.already_finished:
            return read_json(run.folder / "result.json")
        for note in (*prepared.notes, *getattr(stream, "notes", ())):
            run.log(note)
        if distributed.is_main():
            prepared.architecture.save(run.folder / "architecture.json")
        outcome = train(
            prepared.network,
            stream=stream,
            settings=settings,
            evaluate=held_out,
            run=run,
            extra_state=network_state(prepared.architecture, prepared.build, prepared.data.info),
            on_step=on_step,
            **arguments,
        )
        result = _result(prepared, outcome.epochs, outcome.steps, outcome.selected_epoch, outcome.row)
        run.log(result_text(result))
        plot_run(run, config)
        run.finish(result)
        return read_json(run.folder / "result.json")


def _arguments(prepared: Prepared) -> dict[str, Any]:
    """What the loop is told beside network, stream and settings."""
    teacher, forward = _teacher(prepared), None
    if prepared.config.compile:
        prepare_compiler()
        forward = torch.compile(prepared.network)
    return {
        "criterion": nn.CrossEntropyLoss(label_smoothing=prepared.config.label_smoothing),
        "num_classes": prepared.data.info.num_classes,
        "teacher": teacher,
        "forward": forward,
    }


def loop_of(prepared: Prepared) -> tuple[Network, DatasetInfo, BatchStream, TrainSettings, dict[str, Any]]:
    """What the loop trains, on what, for how long, and what else it is told (for plans and measurements)."""
    stream, settings = _streams(prepared)[0], training_settings(prepared.config)
    return prepared.network, prepared.data.info, stream, settings, _arguments(prepared)


def training_settings(config: Config) -> TrainSettings:
    """The loop's settings as the flags give them."""
    same = ("epochs", "learning_rate", "learning_rate_min", "momentum", "weight_decay", "grad_clip", "drop_path_prob")
    more = ("auxiliary_weight", "teacher_weight", "teacher_temperature", "select", "precision", "log_every")
    return TrainSettings(
        schedule=config.lr_schedule,
        step_epochs=config.lr_step_epochs,
        step_factor=config.lr_step_factor,
        warmup_epochs=config.lr_warmup_epochs,
        checkpoint_minutes=config.checkpoint_minutes,
        **{name: getattr(config, name) for name in (*same, *more)},
    )


def _streams(prepared: Prepared) -> tuple[BatchStream, Callable[[nn.Module], dict[str, Any]] | None]:
    """The training batches, and what measures the held-out part (None where nothing is held out)."""
    config, data, device = prepared.config, prepared.data, prepared.device
    kept, held = None, None
    if config.val_fraction:
        kept, held = hold_out(data.train.labels, config.val_fraction, config.seed)
    stream = training_stream(config, data, device, "train", kept)
    if held is None:
        return shorten(stream, config.steps_per_epoch), None

    def measure(network: nn.Module) -> dict[str, Any]:
        return evaluate_split(network, data.train, data.info, config.precision, held)

    return shorten(stream, config.steps_per_epoch), measure


def _teacher(prepared: Prepared) -> Network | None:
    if prepared.config.teacher is None:
        return None
    teacher, _, info = load_trained(prepared.config.teacher, flag="--teacher")
    for key in ("num_classes", "in_channels"):
        if info["build"][key] != prepared.build[key]:
            raise ValueError(
                f"--teacher {prepared.config.teacher}: has {key} {info['build'][key]}, these data "
                f"{prepared.build[key]}; give a run on the same data"
            )
    prepared.notes.append(f"teacher: {prepared.config.teacher}, {info['method']} on {info['dataset']}")
    return teacher.to(prepared.device).requires_grad_(False)


def _dry_run(
    prepared: Prepared, stream: BatchStream, settings: TrainSettings, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Two steps (the first warms up, the second is timed), and what the whole run would take."""
    times: list[float] = []

    def stamp(step: int) -> None:
        if prepared.device.type == "cuda":
            torch.cuda.synchronize(prepared.device)
        times.append(time.monotonic())

    rows: list[dict[str, Any]] = []
    two = shorten(_Repeated(stream), 2)
    once = replace(settings, epochs=1, warmup_epochs=0, select="last")
    train(prepared.network, stream=two, settings=once, run=silent_run(rows), on_step=stamp, **arguments)
    step_seconds = times[1] - times[0]
    whole = step_seconds * stream.steps_per_epoch * settings.epochs
    tell("\n".join(prepared.notes))
    tell(
        f"one step of {prepared.config.batch_size} images: {step_seconds:.3f} s, peak memory "
        f"{rows[-1]['peak_memory_mb']:,.0f} MB; {stream.steps_per_epoch} steps an epoch, {settings.epochs} epochs: "
        f"about {duration(whole)} (evaluation not counted)\ndry run: nothing was written"
    )
    return {"dry_run": True, "step_seconds": step_seconds, "estimated_seconds": whole, "cost": prepared.cost.to_json()}


class _Repeated:
    """The first batch of a stream, as often as wanted: an epoch may have a single step."""

    def __init__(self, stream: BatchStream) -> None:
        self._first, self.steps_per_epoch = batches_of(stream, 0, 0), 1_000_000

    def batch(self, epoch: int, step: int) -> Batch:
        """The stream's first batch."""
        return self._first[0]

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """All batches of the stream's first step."""
        return self._first


# ------------------------------------------------------------------------------------------------------ the result


def _result(prepared: Prepared, epochs: int, steps: int, selected: int, row: dict[str, Any]) -> dict[str, Any]:
    """The test, once, and everything that a table needs to know."""
    config, data = prepared.config, prepared.data
    final = final_figures(prepared.network, data, prepared.device, prepared.build, prepared.cost, config.precision)
    final["metrics"] |= {"train_loss": row.get("train_loss"), "train_top1": row.get("train_top1")}
    if "valid_top1" in row:
        final["metrics"] |= {"val_top1": row["valid_top1"], "val_loss": row["valid_loss"]}
    return {
        "epochs": epochs,
        "steps": steps,
        "selected_epoch": selected,
        "n_train": len(data.train) - round(config.val_fraction * len(data.train)),
        **final,
        "matched": prepared.matched,
        "architecture": prepared.architecture.name or config.arch,
        **time_before(config, "train"),
    }


def result_text(result: dict[str, Any]) -> str:
    """The last line of a training."""
    found, n = result["metrics"], result["n_test"]
    return (
        f"test: top-1 {100 * found['test_top1']:.2f}% ({found['test_correct']} of {n}), "
        f"top-5 {100 * found['test_top5']:.2f}%, loss {found['test_loss']:.4f} "
        f"(weights of epoch {result['selected_epoch']})"
    )
