# SPDX-License-Identifier: Apache-2.0
"""What a bit search is made of, from its flags: the network and its weights, all training images, cost, settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.data import ImageData, take_subset
from common.engine import seed_everything
from common.engine.cli import Config, target_of
from common.engine.search_loop import SearchSettings
from common.nets import build_network, load_architecture
from common.recipes.parts import Parts, parts_text, search_parts
from common.recipes.search_setup import (
    PreparedSearch,
    cost_notes,
    cost_term,
    measure_of,
    reach_text,
    stream_notes,
    target_controller,
    target_lines,
)
from common.recipes.setup import (
    lay_out,
    load_data,
    prepare_compiler,
    prepare_torch,
    shorten,
    stem_of,
    training_stream,
)
from common.recipes.train import start_from
from qsubnet.cost import SubnetCost
from qsubnet.subnet import Subnet


def prepare_subnet(config: Config) -> PreparedSearch:
    """Data, network, cost and stream of a bit search, with everything refused that does not fit (ValueError)."""
    device = prepare_torch(config)
    architecture = load_architecture(config.arch).with_uniform_bits(32, 32)
    data = load_data(config)
    info = data.info
    seed_everything(config.seed, deterministic=config.deterministic)
    network = build_network(
        architecture,
        stem=stem_of(config, info.image_size),
        in_channels=info.channels,
        num_classes=info.num_classes,
        init_channels=config.init_channels,
        layers=config.layers,
        scheme=config.scheme,
        stem_bits=config.stem_bits,
        classifier_bits=config.classifier_bits,
    )
    notes = [start_from(network, config.init_from)] if config.init_from is not None else []
    subnet = Subnet(network, tuple(config.bits), scheme=config.scheme, signed_activations=config.signed_activations)
    lay_out(subnet, config).to(device)
    cost = SubnetCost(subnet, info.image_size, measure=measure_of(config, subnet.bits)).to(device)
    data = data.to(device)
    loop, parts = _loop_arguments(config, data, subnet, cost, device)
    prepared = PreparedSearch(config, device, data, subnet, cost, loop, parts and parts[1], parts, notes)
    prepared.notes.insert(0, _describe(prepared))
    if config.compile:
        prepare_compiler()
        subnet.compile()
    return prepared


def _loop_arguments(
    config: Config, data: ImageData, subnet: Subnet, cost: SubnetCost, device: torch.device
) -> tuple[dict[str, Any], Parts | None]:
    """Arguments of the loop; the images that train and those that train nothing (None: all do). One level: one stream,
    one loss.
    """
    parts, kept, labels = None, None, data.train.labels
    if config.search_fraction is not None or config.train_portion < 1:
        parts = search_parts(config, labels)
        kept = parts[0]
    elif config.subset < 1:
        kept = take_subset(labels, config.subset, config.seed)
    stream = shorten(training_stream(config, data, device, "search-train", kept), config.steps_per_epoch)
    controller = None
    if target_of(config) is not None:
        controller = target_controller(config, subnet, cost, config.epochs * stream.steps_per_epoch).to(device)
    arguments = {
        "train_stream": stream,
        "valid_stream": None,
        "settings": search_settings(config),
        "criterion": nn.CrossEntropyLoss(),
        "weight_term": cost_term(cost, config.complexity_decay, controller),
        "arch_term": None,
        "controller": controller,
    }
    return arguments, parts


def search_settings(config: Config) -> SearchSettings:
    """The loop's settings as the flags give them; the logits fall with the weights' rate, unless a target is held."""
    same = ("epochs", "learning_rate", "learning_rate_min", "momentum", "weight_decay", "grad_clip", "precision")
    more = ("gamma_learning_rate", "gamma_weight_decay", "log_every", "checkpoint_minutes")
    return SearchSettings(
        warmup_epochs=config.lr_warmup_epochs,
        schedule=config.lr_schedule,
        step_epochs=config.lr_step_epochs,
        step_factor=config.lr_step_factor,
        gamma_momentum=config.momentum,
        gamma_annealed=target_of(config) is None,
        arch_begin_epoch=0,
        cuda_graph="off" if config.compile else config.cuda_graph,
        **{name: getattr(config, name) for name in (*same, *more)},
    )


def _describe(prepared: PreparedSearch) -> str:
    config, info, subnet, cost = prepared.config, prepared.data.info, prepared.supernet, prepared.cost
    weights, images = sum(p.numel() for p in subnet.weight_parameters()), len(prepared.data.train)
    resolved = subnet.network.architecture.name
    name = f"{config.arch} = {resolved}" if resolved not in (None, config.arch) else config.arch
    seen = "" if config.subset == 1 else f"{config.subset:.0%} are seen: "
    seen += f"{config.train_portion:.0%} of them train weights and bits"
    if config.search_fraction is not None:
        seen = parts_text(config, prepared.parts)
    steps = prepared.loop["train_stream"].steps_per_epoch
    lines = [
        f"network: {name}, {config.init_channels} channels, {config.layers} cells, {weights / 1e6:.3f} M weights; "
        f"bits {', '.join(map(str, subnet.bits))} for each of {len(subnet.convolutions)} convolutions",
        f"data: {info.name}, {images:,} training images {info.channels}x{info.image_size}x{info.image_size}, "
        f"{seen}; {steps} steps an epoch, "
        f"{config.epochs} epochs",
        f"cost: {reach_text(cost)}",
        *cost_notes(cost.measure, subnet.bits),
        *target_lines(config, cost.measure),
    ]
    return "\n".join([*lines, *stream_notes(prepared.loop)])
