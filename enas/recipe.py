# SPDX-License-Identifier: Apache-2.0
"""Flags -> data, model, loop -> result.json, for the search and for the training of one architecture."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import Cost, architecture_cost, network_cost
from common.data import ImageData, evaluation_batches, hold_out, open_stream
from common.engine import Run, distributed, read_json, seed_everything
from common.engine.accumulation import accumulated
from common.engine.cli import Config
from common.engine.environment import peak_memory_mb, versions
from common.engine.progress import duration
from common.engine.protocols import BatchStream
from common.nets import Architecture, MicroNetwork, load_architecture, network_of, parse_cells
from common.nets.enas_layers import types_fit
from common.nets.enas_space import SPACE, MicroCells
from common.recipes.elapsed import time_before
from common.recipes.pictures import draw_cells
from common.recipes.plots import plot_run, show_choices
from common.recipes.setup import images_at_once, lay_out, load_data, open_run, prepare_torch, shorten, tell
from common.recipes.trained import cost_text, final_figures, network_state
from enas.child import SharedChild
from enas.controller import Controller, ControllerSettings, max_entropy
from enas.cost import NetworkSize, cells_bitops
from enas.flags import CHANGEABLE, PRESETS, source_values
from enas.loop import RULE, ChildLoop, ChildSettings, EvaluationSet
from enas.reinforce import cost_penalty
from enas.search_loop import PolicySettings, SearchLoop

EVALUATION_BATCH = 100  # the source's: a search draws an architecture for each batch, so it is part of the figure


@dataclass
class _Data:
    """The images of a run on its device, and the parts of the training set (None: all of it)."""

    images: ImageData
    device: torch.device
    kept: Tensor | None
    held: Tensor | None

    @property
    def train_count(self) -> int:
        """Images that the child trains on."""
        return len(self.images.train) if self.kept is None else len(self.kept)

    def training(self, config: Config) -> BatchStream:
        """This process's share of the shuffled, augmented batches that train."""
        stream = self._stream(
            config,
            "train",
            self.kept,
            batch_size=images_at_once(config),
            augment=config.augment,
            cutout=config.cutout_length if config.cutout else None,
            rank=distributed.rank(),
            ranks=distributed.world_size(),
        )
        return shorten(accumulated(stream, config.grad_accumulation), config.steps_per_epoch)

    def rewards(self, config: Config) -> BatchStream:
        """Shuffled batches of the validation part, one for each architecture: processes share architectures."""
        ranks = distributed.world_size() if config.batch_per_rank else 1
        return self._stream(config, "reward", self.held, batch_size=config.batch_size * ranks, augment=False)

    def _stream(self, config: Config, name: str, indices: Tensor | None, **more: Any) -> BatchStream:
        images, same = self.images, {"seed": config.seed, "name": name, "device": self.device}
        # as in the source an epoch's last batch is a whole one too
        return open_stream(images.train, images.info, indices=indices, fill_last=True, **same, **more)

    def evaluation(self, name: str) -> EvaluationSet:
        """All images of "valid" or "test", in order."""
        split = self.images.test if name == "test" else self.images.train
        indices = None if name == "test" else self.held
        count = len(split) if indices is None else len(indices)
        own = {"indices": indices, "rank": distributed.rank(), "ranks": distributed.world_size()}
        batches = partial(evaluation_batches, split, self.images.info, EVALUATION_BATCH, self.device, **own)
        return EvaluationSet(name, count, -(-count // EVALUATION_BATCH), batches)


def _prepare_data(config: Config) -> _Data:
    device = prepare_torch(config)
    images = load_data(config)
    kept = held = None
    if config.val_fraction:
        kept, held = hold_out(images.train.labels, config.val_fraction, config.seed)
    seed_everything(config.seed, deterministic=config.deterministic)
    return _Data(images.to(device), device, kept, held)


def child_settings(config: Config) -> ChildSettings:
    """The loop's settings as the flags give them."""
    keep = getattr(config, "drop_path_keep_prob", None)
    return ChildSettings(
        epochs=config.epochs,
        rate_max=config.learning_rate,
        rate_min=config.learning_rate_min,
        first_period=config.lr_period,
        period_factor=config.lr_period_factor,
        cosine=config.lr_cosine,
        plain_rate=config.child_lr,
        decay_factor=config.child_lr_dec_rate,
        decay_every=config.child_lr_dec_every,
        grad_bound=config.grad_clip,
        loss="reference-hinge" if config.compat and config.loss == "hinge" else config.loss,
        train_auxiliary=not config.compat,
        l2=config.l2,
        clip_weights=config.clip_weights,
        drop_path=0.0 if keep is None else 1.0 - keep,
        precision=config.precision,
        seed=config.seed,
        log_every=config.log_every,
        eval_every=config.eval_every_epochs,
        checkpoint_minutes=config.checkpoint_minutes,
    )


def _network_arguments(config: Config, data: _Data) -> dict[str, Any]:
    info = data.images.info
    return {
        "in_channels": info.channels,
        "num_classes": info.num_classes,
        "out_filters": config.out_filters,
        "layers": config.layers,
        "image_size": info.image_size,
        "layer_bits": config.layer_bits,
        "auxiliary": config.auxiliary,
        "dropout": 1.0 - config.keep_prob,
        "compat": config.compat,
    }


def _evaluations(config: Config, data: _Data, names: tuple[str, ...]) -> list[EvaluationSet]:
    return [data.evaluation(name) for name in names if name != "test" or config.epoch_test]


def _head(config: Config, model: nn.Module) -> str:
    """What the source prints first: its flags, sorted and dotted to 80 columns, and the number of parameters.

    As there, the auxiliary head's are not counted.
    """
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary_head."))
    lines = [RULE]
    for key, value in sorted(source_values(config).items()):
        lines.append(f"{key}{'.' * max(1, 80 - len(key) - len(str(value)))}{value}")
    return "\n".join([*lines, RULE, f"Model has {parameters} params"])


# ------------------------------------------------------------------------------------------------------ training


def run_training(config: Config, *, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train the architecture that the flags name and return what result.json holds (for --dry-run: what it found).

    `on_step` is called with the number of steps done (tests stop a run by it). Raises ValueError for what does not fit,
    NonFiniteError when the training leaves the finite numbers.
    """
    architecture = load_architecture(config.arch)
    data = _prepare_data(config)
    build = _network_arguments(config, data)
    network = network_of(architecture, **build)
    assert isinstance(network, MicroNetwork)
    cost = network_cost(network, data.images.info.image_size)
    lay_out(network, config).to(data.device)
    stream = data.training(config)
    loop = {
        "stream": stream,
        "settings": child_settings(config),
        "num_classes": data.images.info.num_classes,
        "evaluations": _evaluations(config, data, ("test",)),
    }
    if config.dry_run:
        return _dry_run(ChildLoop(network, run=_silent(), **loop), config, cost)
    run = open_run(config, method="enas", stage="train", dataset=data.images.info.name, changeable=CHANGEABLE)
    with run:
        if run.already_finished:
            return read_json(run.folder / "result.json")
        run.log(_head(config, network))
        run.log("\n".join([f"{architecture.genotype}\nnetwork: {cost_text(cost)}", *getattr(stream, "notes", ())]))
        if distributed.is_main():
            run.artefact("architecture", architecture.save(run.folder / "architecture.json"))
        state = network_state(architecture, build, data.images.info)
        training = ChildLoop(network, run=run, extra_state=state, on_step=on_step, **loop)
        row = training.run_epochs()
        final = final_figures(network, data.images, data.device, build, cost, config.precision)
        final["metrics"] |= {key: row.get(key) for key in ("train_loss", "train_top1")}
        text = config.arch if len(config.arch) < 40 else "enas-micro string"
        result = {
            "epochs": config.epochs,
            "steps": training.global_step,
            "selected_epoch": config.epochs,
            "n_train": data.train_count,
            **final,
            "architecture": architecture.name or text,
            **time_before(config, "train"),
        }
        found = result["metrics"]
        run.log(f"test: top-1 {100 * found['test_top1']:.2f}% ({found['test_correct']} of {result['n_test']})")
        plot_run(run, config)
        run.finish(result)
        return read_json(run.folder / "result.json")


# ------------------------------------------------------------------------------------------------------ search


def controller_settings(config: Config) -> ControllerSettings:
    """The controller's distribution as the flags give it."""
    return ControllerSettings(
        blocks=config.blocks,
        tanh_constant=config.controller_tanh_constant,
        op_tanh_reduce=config.controller_op_tanh_reduce,
        temperature=config.controller_temperature,
    )


def policy_settings(config: Config) -> PolicySettings:
    """The controller's training as the flags give it."""
    return PolicySettings(
        learning_rate=config.controller_lr,
        updates=config.controller_train_steps,
        aggregate=config.controller_num_aggregate,
        every=config.controller_train_every,
        entropy_weight=config.controller_entropy_weight,
        baseline_decay=config.controller_bl_dec,
        training=config.controller_training,
    )


def evaluation_size(config: Config, data: ImageData) -> NetworkSize:
    """The network that a found architecture will be trained in, of the search's types of layers where they fit it."""
    info = data.info
    layers, filters = config.eval_layers, config.eval_out_filters
    return NetworkSize(info.channels, info.num_classes, filters, layers, info.image_size, evaluation_types(config))


def evaluation_types(config: Config) -> list[str] | None:
    """The search's types of layers where they fit that network; None: the default ones."""
    types = config.layer_bits
    return types if types and types_fit(types, config.eval_layers + 2) else None


def _penalty(config: Config, size: NetworkSize) -> Callable[[MicroCells], float] | None:
    if config.reward == "accuracy":
        return None
    return lambda cells: cost_penalty(cells_bitops(cells, size), config.target_bitops, config.cost_weight)


def run_search(config: Config, *, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Search what the flags say and return what result.json holds; more as in `run_training`."""
    data = _prepare_data(config)
    assert data.kept is not None and data.held is not None
    child = SharedChild(blocks=config.blocks, **_network_arguments(config, data))
    lay_out(child, config).to(data.device)
    controller = Controller(controller_settings(config)).to(data.device)
    size = evaluation_size(config, data.images)
    loop = {
        "stream": data.training(config),
        "settings": child_settings(config),
        "num_classes": data.images.info.num_classes,
        "evaluations": _evaluations(config, data, ("valid", "test")),
        "rewards": data.rewards(config),
        "policy": policy_settings(config),
        "penalty": _penalty(config, size),
    }
    if config.dry_run:
        return _dry_run(SearchLoop(child, controller, run=_silent(), **loop), config, None)
    run = open_run(config, method="enas", stage="search", dataset=data.images.info.name, changeable=CHANGEABLE)
    with run:
        if run.already_finished:
            return read_json(run.folder / "result.json")
        run.log(_head(config, child))
        run.log(
            f"{data.train_count} images train, {len(data.held)} give rewards; greatest entropy of a controller of "
            f"{config.blocks} blocks: {max_entropy(config.blocks):.2f}"
        )
        if config.layer_bits and evaluation_types(config) is None:
            run.log(
                f"--layer-bits: {len(config.layer_bits)} types fit no network of --eval-layers {config.eval_layers}: "
                "costs count the default types, and train.py will take them"
            )
        show_choices(run, config)
        searching = SearchLoop(child, controller, run=run, on_step=on_step, **loop)
        row = searching.run_epochs()
        result = _conclude(run, config, data, searching, size, row)
        plot_run(run, config)
        run.finish(result)
        return read_json(run.folder / "result.json")


def _conclude(
    run: Run, config: Config, data: _Data, searching: SearchLoop, size: NetworkSize, row: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate the best architectures on the whole validation part; save the best, with its picture and command."""
    rows = searching.finalists(data.evaluation("valid"))
    for one in rows:
        one["bitops"] = cells_bitops(parse_cells(one["cells"]), size)
        run.log(f"{one['cells']}: valid_accuracy {one['top1']:.4f}, {one['bitops'] / 1e9:.4g} G BitOps when trained")
    provenance = {
        "method": "enas",
        "dataset": data.images.info.name,
        "seed": config.seed,
        "epochs": config.epochs,
        "layer_bits": config.layer_bits,
        "flags_digest": run.digest,
        "version": versions().get("project"),
    }
    best = Architecture(parse_cells(rows[0]["cells"]), space=SPACE, search=provenance)
    if distributed.is_main():
        _save(run, best)
    build = {"in_channels": size.in_channels, "num_classes": size.num_classes, "out_filters": size.out_filters}
    build |= {"layers": size.layers, "image_size": size.image_size, "layer_bits": size.layer_bits}
    cost = architecture_cost(best, size.image_size, **build)
    command = train_command(config, run)
    run.log(f"best of {len(rows)}:\n{best.genotype}\nfound network: {cost_text(cost)}\ntrain it:\n  {command}")
    # The epochs' figure is of a new architecture for every batch; the result's is the found one's.
    keys = ("train_loss", "train_top1", "entropy", "baseline", "reward", "sample_top1")
    metrics = {key: row.get(key) for key in keys} | {"sampled_valid_top1": row.get("valid_top1")}
    return {
        "epochs": config.epochs,
        "steps": searching.global_step,
        "n_train": data.train_count,
        "metrics": metrics | {"valid_top1": rows[0]["top1"]},
        "genotype": best.to_json()["genotype"],
        "finalists": rows,
        "exact_bitops": cost.bitops,
        "exact_bitops_quantized": cost.bitops_quantized,
        "exact_bitops_paper": cost.bitops_paper,
        "target_bitops": config.target_bitops,
        "cost": cost.to_json(),
        "train_command": command,
        **time_before(config, "search"),
    }


def _save(run: Run, best: Architecture) -> None:
    run.artefact("architecture", best.save(run.folder / "architecture.json"))
    try:
        for path in draw_cells(best, run.folder / "cells"):
            run.artefact(path.name.replace(".", "_"), path)
    except (ValueError, ImportError) as error:  # a search of hours must not fail for its picture
        run.log(f"no picture: {error}")


def train_command(config: Config, run: Run) -> str:
    """The command that trains what a search found, as typed in the present folder."""
    words = ["python", os.path.relpath(Path(__file__).with_name("train.py")), "--arch", os.path.relpath(run.folder)]
    words += [*(("--preset", config.preset) if config.preset in PRESETS["train"] else ()), "--dataset", config.dataset]
    for flag, value in (("--data", config.data), ("--data-module", config.data_module)):
        words += [flag, str(value)] if value is not None else []
    words += ["--layers", str(config.eval_layers), "--out-filters", str(config.eval_out_filters)]
    words += ["--image-size", str(config.image_size)] if config.image_size != 32 else []
    types = evaluation_types(config)
    words += ["--layer-bits", *types] if types else []
    return shlex.join(words + (["--compat"] if config.compat else []))


# ------------------------------------------------------------------------------------------------------ dry run


def _silent() -> Any:
    """A run that keeps nothing."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    return SimpleNamespace(
        log=nothing,
        metrics=nothing,
        history=nothing,
        resume_state=nothing,
        checkpoints=SimpleNamespace(save=nothing),
        seconds=0.0,
    )


def _dry_run(loop: ChildLoop, config: Config, cost: Cost | None) -> dict[str, Any]:
    """One step of each kind to warm up, one to be timed, and what the whole run would take."""
    loop.protect()
    steps, later = loop.steps, loop.later_steps()
    loop.arcs = loop.architectures("child", 2)
    times = {"child": 0.0, "controller": 0.0}
    for number in range(2):
        loop.model.train()
        loop.position = min(number, steps - 1)
        started = time.monotonic()
        loop.one_step()
        times["child"] = time.monotonic() - started
        if later:
            started = time.monotonic()
            loop.later_step(number)
            times["controller"] = time.monotonic() - started
    whole = config.epochs * (steps * times["child"] + later * times["controller"])
    count = sum(p.numel() for p in loop.model.parameters())
    tell(
        f"{count:,} parameters{f'; {cost_text(cost)}' if cost else ''}\none step of {config.batch_size} images: "
        f"{times['child']:.3f} s"
        + (f", one update of the controller: {times['controller']:.3f} s" if later else "")
        + f", peak memory {peak_memory_mb(loop.device):,.0f} MB; {steps} steps an epoch, {config.epochs} epochs: about "
        f"{duration(whole)} (evaluation not counted)\ndry run: nothing was written"
    )
    return {"dry_run": True, "step_seconds": times, "estimated_seconds": whole}
