# SPDX-License-Identifier: Apache-2.0
"""What a search is made of, from its flags: data in two streams, supernet, cost and its controller, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import ExpectedCost
from common.cost.expected import bit_pairs
from common.cost.latency import Latency
from common.cost.measures import LATENCY, UNITS, Counted, Measure
from common.cost.target import TargetController, push_scale
from common.data import ImageData
from common.engine import CheckpointStore, read_json, seed_everything
from common.engine.changes import owner_of
from common.engine.checkpoint import taking_up
from common.engine.cli import Config, cost_of, target_of
from common.engine.search_loop import SearchSettings
from common.nets import Supernet, build_supernet
from common.recipes.latency_file import load_table
from common.recipes.own_space import load_search_space
from common.recipes.parts import Parts, parts_text, search_parts
from common.recipes.setup import (
    lay_out,
    load_data,
    prepare_compiler,
    prepare_torch,
    shorten,
    stem_of,
    training_stream,
)
from genotypes import PRIMITIVES


@dataclass
class PreparedSearch:
    """All that a search needs, built from its flags, before any folder is made."""

    config: Config
    device: torch.device
    data: ImageData
    supernet: Supernet
    cost: ExpectedCost
    loop: dict[str, Any]
    """Arguments of `search` and `SearchLoop`: streams, settings, criterion, terms, controller."""
    evaluation_indices: Tensor | None
    """Training images that measure the accuracy; None: all of them train."""
    parts: Parts | None = None
    """Both parts of the training set, where there are two."""
    notes: list[str] = field(default_factory=list)

    @property
    def controller(self) -> TargetController | None:
        """The multiplier of --target-bitops, None without a target."""
        return self.loop["controller"]


def searched_bits(config: Config) -> tuple[int, ...] | None:
    """The bit-widths under search; None (full precision) for `--bits 32` or none at all."""
    return None if not config.bits or list(config.bits) == [32] else tuple(config.bits)


def prepare_search(config: Config, supernet: Callable[..., Supernet] | None = None) -> PreparedSearch:
    """Data, supernet, cost and streams, with everything refused that does not fit together (ValueError)."""
    device = prepare_torch(config)
    data = load_data(config)
    info, bits = data.info, searched_bits(config)
    seed_everything(config.seed, deterministic=config.deterministic)
    model = (supernet or build_supernet)(
        method=config.method,
        bits=bits,
        stem=stem_of(config, info.image_size),
        in_channels=info.channels,
        num_classes=info.num_classes,
        init_channels=config.init_channels,
        layers=config.layers,
        partial=config.partial,
        scheme=config.scheme,
        nodes=config.nodes,
        multiplier=config.multiplier,
        signed_activations=config.signed_activations,
        bit_mapping=config.bit_mapping,
        primitives=load_search_space(config.search_space).primitives if config.search_space else PRIMITIVES,
    )
    notes = [_start_from(model, config.init_from)] if getattr(config, "init_from", None) else []
    cost = ExpectedCost(
        model,
        input_size=info.image_size,
        eval_init_channels=config.eval_init_channels,
        eval_layers=config.eval_layers,
        measure=measure_of(config, bits),
        weighting=config.cost_weighting,
        mapping=config.bit_mapping,
        stem_bits=config.stem_bits,
        classifier_bits=config.classifier_bits,
    ).to(device)
    lay_out(model, config).to(device)
    data = data.to(device)
    parts = search_parts(config, data.train.labels)
    loop, indices = _loop_arguments(config, data, model, cost, device, parts)
    prepared = PreparedSearch(config, device, data, model, cost, loop, indices, parts, notes)
    prepared.notes.insert(0, _describe(prepared))
    if config.compile:
        prepare_compiler()
        model.compile()
    return prepared


def measure_of(config: Config, bits: tuple[int, ...] | None) -> Measure:
    """What --cost counts, or reads from --lut. Raises ValueError naming flag, file and line."""
    cost = cost_of(config)
    if cost != LATENCY:
        return Counted(cost, config.cost_accounting)
    return Latency(load_table(config.lut), bit_pairs(bits))


def cost_figure(value: float, measure: Measure, unit: bool = True) -> str:
    """A cost for the user: in G BitOps, M MACs, MB or ms."""
    factor, name = _FIGURES[measure.name]
    return f"{value / factor:.4g}{' ' + name if unit else ''}"


_FIGURES = {"bitops": (1e9, "G BitOps"), "macs": (1e6, "M MACs"), "memory": (1e6, "MB"), "latency": (1.0, "ms")}


def cost_notes(measure: Measure, bits: tuple[int, ...] | None) -> list[str]:
    """What a measure cannot tell apart, so that a search does not seem to have weighed it."""
    notes = list(measure.notes)
    if bits is not None and measure.name == "macs":
        notes.append(
            "--cost macs: does not depend on bits: it steers operations and edges, and the loss alone the bits"
        )
    if bits is not None and measure.name == "memory":
        notes.append("--cost memory: does not depend on activation bits: the loss alone steers those")
    return notes


def _loop_arguments(
    config: Config, data: ImageData, model: Supernet, cost: ExpectedCost, device: torch.device, parts: Parts
) -> tuple[dict[str, Any], Tensor]:
    """The streams over the two parts of the training set, the settings, and the cost terms with their controller."""
    streams = [
        training_stream(config, data, device, name, indices)
        for name, indices in zip(("search-train", "search-valid"), parts, strict=True)
    ]
    train_stream = shorten(streams[0], config.steps_per_epoch)
    controller = None
    if target_of(config) is not None:
        controller = target_controller(config, model, cost, config.epochs * train_stream.steps_per_epoch).to(device)
    arguments = {
        "train_stream": train_stream,
        "valid_stream": streams[1],
        "settings": search_settings(config),
        "criterion": nn.CrossEntropyLoss(),
        # Weights do not change the cost, so in full precision the weight step has no cost term.
        "weight_term": cost_term(cost, config.complexity_decay if model.bits is not None else 0.0, controller),
        "arch_term": _arch_term(config, cost, controller),
        "controller": controller,
    }
    indices = parts[1]
    if config.steps_per_epoch is not None:
        # Shortened epochs must not be outweighed by their evaluation: as many images as they train on, spread evenly.
        indices = indices[:: max(1, len(indices) // (config.steps_per_epoch * config.batch_size))]
    return arguments, indices


def target_controller(config: Config, model: nn.Module, cost: ExpectedCost, steps: int) -> TargetController:
    """The multiplier of --target-bitops or --target, its push scaled to the rates and the length of this search."""
    # Where no choice of bits changes the cost, the term's gradient in them is rounding alone.
    scale, gammas = 1.0, model.gamma_parameters() if cost.steers_bits else []
    if gammas and config.complexity_decay and config.gamma_learning_rate and config.gamma_level == "lower":
        rate = config.gamma_learning_rate / (1 - config.momentum)
        scale = push_scale(cost.term(model), gammas, weight=config.complexity_decay, rate=rate, total_steps=steps)
    target, flag = target_of(config), "--target-bitops" if config.target_bitops is not None else "--target"
    assert target is not None
    unit = UNITS[cost.measure.name]
    return TargetController(cost, target, total_steps=steps, scale=scale, flag=flag, unit=unit)


def search_settings(config: Config) -> SearchSettings:
    """The loop's settings as the flags give them."""
    same = ("epochs", "learning_rate", "learning_rate_min", "momentum", "weight_decay", "grad_clip", "precision")
    more = ("arch_learning_rate", "arch_weight_decay", "gamma_learning_rate", "gamma_weight_decay", "gamma_level")
    rest = ("arch_every", "log_every", "checkpoint_minutes")
    return SearchSettings(
        arch_begin_epoch=config.warmup_epochs,
        warmup_epochs=config.lr_warmup_epochs,
        gamma_momentum=config.momentum,
        gamma_annealed=target_of(config) is None,
        order=config.second_order if config.unrolled else "first",
        cuda_graph="off" if config.compile else config.cuda_graph,
        **{name: getattr(config, name) for name in (*same, *more, *rest)},
    )


def cost_term(
    cost: ExpectedCost, weight: float, controller: TargetController | None, share: float = 1.0
) -> Callable[[nn.Module], Tensor] | None:
    """What a loss adds: weight x multiplier x the cost term, of which alphas and betas feel `share`."""
    if not weight:
        return None
    if controller is None:
        return lambda model: weight * cost.term(model, share)

    def steered(model: nn.Module) -> Tensor:
        term = cost.term(model, share)
        return (weight * controller.multiplier).to(term.dtype) * term

    return steered


def _arch_term(
    config: Config, cost: ExpectedCost, controller: TargetController | None
) -> Callable[[nn.Module], Tensor] | None:
    """The cost term of the architecture step; gammas that move there keep the full weight, alphas and betas theirs."""
    if config.gamma_level == "lower" or not config.complexity_decay:
        return cost_term(cost, config.arch_complexity_decay, controller)
    return cost_term(cost, config.complexity_decay, controller, config.arch_complexity_decay / config.complexity_decay)


def _start_from(model: Supernet, run: Path) -> str:
    """Load the weights of an earlier search (not its alphas, betas and gammas); ValueError unless all of them fit."""
    if not (run / "config.json").is_file():
        raise ValueError(f"--init-from {run}: no run lies there (no config.json); give the folder of a search")
    record = read_json(run / "config.json")
    found = None
    if isinstance(record, dict) and record.get("stage") == "search":
        found = CheckpointStore(run / "checkpoints", config_digest=owner_of(record)).latest()
    if found is None:
        raise ValueError(f"--init-from {run}: holds no valid checkpoint of a search; give the folder of one")
    logits = {id(p) for p in (*model.arch_parameters(), *model.gamma_parameters())}
    chosen = {name for name, p in model.named_parameters() if id(p) in logits}
    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in chosen}
    with taking_up(f"--init-from {run}"):
        theirs = found[0]["model"]
        wrong = [name for name, t in ours.items() if name not in theirs or theirs[name].shape != t.shape]
        if wrong:
            raise ValueError(
                f"--init-from {run}: {len(wrong)} of its tensors do not fit, first {wrong[0]}; start from a search of "
                "the same --method, --layers, --init-channels, --partial, --nodes, --stem, --scheme and data"
            )
        model.load_state_dict({name: theirs[name] for name in ours}, strict=False)
        return f"started from {run} (after epoch {found[0]['epoch']}): {len(ours)} tensors loaded"


def _describe(prepared: PreparedSearch) -> str:
    config, data, model = prepared.config, prepared.data, prepared.supernet
    info, loop, cost = data.info, prepared.loop, prepared.cost
    weights = sum(p.numel() for p in model.weight_parameters())
    gammas = sum(p.numel() for p in model.gamma_parameters())
    alphas = sum(p.numel() for p in model.arch_parameters())
    bits = "full precision" if model.bits is None else f"bits {', '.join(map(str, model.bits))}"
    lines = [
        f"supernet: {config.method}, {config.init_channels} channels, {config.layers} cells, {bits}: "
        f"{weights / 1e6:.3f} M weights, {alphas} alphas and betas, {gammas} gammas",
        f"data: {info.name}, {len(data.train):,} training images {info.channels}x{info.image_size}x{info.image_size}, "
        f"{parts_text(config, prepared.parts)}; "
        f"{loop['train_stream'].steps_per_epoch} steps an epoch, {config.epochs} epochs",
        f"cost: of {config.eval_layers} cells of {config.eval_init_channels} channels, {reach_text(cost)}, "
        f"{cost_figure(cost.initial, cost.measure)} expected at the start",
        *cost_notes(cost.measure, model.bits),
        *target_lines(config, cost.measure),
    ]
    return "\n".join([*lines, *stream_notes(loop)])


def reach_text(cost: ExpectedCost) -> str:
    """The cheapest and the dearest network of a search."""
    least, most = (cost_figure(value, cost.measure, unit=False) for value in (cost.cheapest, cost.dearest))
    return f"{least} to {most} {_FIGURES[cost.measure.name][1]} can be reached"


def target_lines(config: Config, measure: Measure) -> list[str]:
    """What a search is to cost, where that was said."""
    target = target_of(config)
    return [] if target is None else [f"target: {cost_figure(target, measure)}, within 10%"]


def stream_notes(loop: dict[str, Any]) -> list[str]:
    """What a search's streams have to tell, each thing once."""
    streams = (loop[key] for key in ("train_stream", "valid_stream"))
    notes = (getattr(stream, "notes", ()) for stream in streams)
    return list(dict.fromkeys(note for several in notes for note in several))
