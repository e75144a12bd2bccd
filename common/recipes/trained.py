# SPDX-License-Identifier: Apache-2.0
"""Trained networks: loading one from its run folder, evaluating it, and its cost in one line.

Training, post-training quantisation, evaluation and export build on this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import Cost
from common.data import DatasetInfo, ImageData, Split, StreamedSplit, evaluation_batches
from common.engine import CheckpointStore, ClassificationMeter, distributed, load_state, read_json
from common.engine.changes import owner_of
from common.engine.checkpoint import state_digest, taking_up
from common.engine.files import check_schema
from common.nets import Architecture, EvaluationNetwork, network_of
from common.quant import fold_normalization
from common.strict_json import parse_json

EVALUATION_BATCH = 256  # fixed: the reference's 8-bit scheme lets a sample's output depend on its batch
_LARGEST_IMAGE = 4096  # pixels of a side
TRAINED_STAGES = ("train", "quantize")  # the stages whose runs end with a network to use


def evaluate_split(
    network: nn.Module,
    split: Split | StreamedSplit,
    info: DatasetInfo,
    precision: str = "fp32",
    indices: Tensor | None = None,
) -> dict[str, Any]:
    """`evaluate_network` on a split or the part `indices` of it. Several processes share its batches and sum up, so
    that the figures are those of one, whatever their number.
    """
    device = next(network.parameters()).device
    place = {"rank": distributed.rank(), "ranks": distributed.world_size()}
    batches = evaluation_batches(split, info, EVALUATION_BATCH, device, indices=indices, **place)
    return evaluate_network(network, batches, info.num_classes, precision, shared=True)


@torch.inference_mode()
def evaluate_network(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    precision: str = "fp32",
    shared: bool = False,
) -> dict[str, Any]:
    """loss (cross-entropy), top1, top5 (fractions), n, correct, per_class of a network on every image of `batches`.

    `shared`: each process has batches of its own, and the figures are of all of them.
    """
    device = next(network.parameters()).device
    meter = ClassificationMeter(num_classes, device)
    network.eval()
    for x, y in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(x)
        logits = (output[0] if isinstance(output, tuple) else output).float()
        meter.update(logits, y, nn.functional.cross_entropy(logits, y, reduction="sum"))
    if shared:
        meter.sum_over_ranks_()
    return meter.result()


def network_state(architecture: Architecture, build: dict[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """What a checkpoint holds, beside the tensors, to build its network again."""
    data = {"name": info.name, "num_classes": info.num_classes, "channels": info.channels}
    return {
        "build": build,
        "architecture": json.dumps(architecture.to_json()),
        "data": {**data, "image_size": info.image_size},
    }


def final_figures(
    network: nn.Module, data: ImageData, device: torch.device, build: dict[str, Any], cost: Cost, precision: str
) -> dict[str, Any]:
    """The fields of result.json that come from a finished network alone; it is tested here, on every test image."""
    test = evaluate_split(network, data.test, data.info, precision)
    weight, activation = mean_bits(cost)
    return {
        "n_test": len(data.test),
        "metrics": {f"test_{name}": test[name] for name in ("loss", "top1", "top5", "correct")},
        "cost": cost.to_json(),
        "bits_mean": {"weight": weight, "activation": activation},
        "network": {**build, "image_size": data.info.image_size},
    }


def load_trained(
    run: Path, checkpoint: Path | None = None, *, flag: str = "RUN"
) -> tuple[EvaluationNetwork, dict[str, Any], dict[str, Any]]:
    """The trained network of a run folder, as trained or as quantised afterwards, on the CPU and in evaluation mode.

    `checkpoint` names one of its checkpoints in place of the newest valid one. Returns (network, config, info): the
    training's flags by name, and method, dataset, seed, digest, stage, architecture, build (arguments of `network_of`),
    folded (whether normalisations are part of the convolutions), data (of the images), epoch, checkpoint and
    state_digest (its SHA-256). Raises ValueError naming `flag`, folder and cure.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise ValueError(f"{flag} {run}: no run lies there (no config.json); give the folder of a training run")
    record = read_json(run / "config.json")
    check_schema(record, 1, f"{flag} {run}: config.json", "a run's configuration")
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{flag} {run}: its config.json is not a run's")
    if record.get("stage") not in TRAINED_STAGES:
        raise ValueError(f"{flag} {run}: a {record.get('stage')} run; give a training run (train.py --arch {run})")
    if checkpoint is not None:
        state, meta = load_state(Path(checkpoint))
        if meta["config_digest"] != owner_of(record):
            raise ValueError(f"--checkpoint {checkpoint}: belongs to another run than {run}; name one of its own")
    else:
        found = CheckpointStore(run / "checkpoints", config_digest=owner_of(record)).latest()
        if found is None:
            raise ValueError(f"{flag} {run}: holds no valid checkpoint; train it first (--resume {run})")
        state, meta = found
    with taking_up(f"{flag} {run}"):
        network = _rebuilt(state, f"{flag} {run}")
        trained = state.get("post_training", {}).get("training", record["config"])
        info = {
            **{key: record.get(key) for key in ("method", "dataset", "seed", "digest", "stage")},
            "architecture": _architecture_of(state, f"{flag} {run}"),
            "build": state["build"],
            "folded": bool(state.get("post_training", {}).get("folded")),
            "data": state["data"],
            "epoch": state["epoch"],
            "checkpoint": meta.get("path", str(checkpoint)),
            "state_digest": state_digest(meta),
        }
    return network.eval(), trained, info


def _rebuilt(state: dict[str, Any], where: str) -> EvaluationNetwork:
    """The network that a training's checkpoint describes, with its weights. ValueError where it describes none."""
    if not {"build", "architecture", "data", "model", "epoch"} <= state.keys():
        raise ValueError(f"{where}: its checkpoint is not one of a training")
    build, data, model = state["build"], state["data"], state["model"]
    known = [size for tensor in model.values() for size in tensor.shape]
    # A file of a few bytes may ask for a network of any size: none is larger than what the weights show.
    largest = max([len(model), *known, data["image_size"]])
    wrong = [name for name, value in build.items() if type(value) is int and not 0 <= value <= largest]
    wrong += [name for name in ("num_classes", "channels", "image_size") if type(data[name]) is not int]
    if wrong or data["image_size"] > _LARGEST_IMAGE:
        raise ValueError(f"{where}: its checkpoint gives {(wrong or ['image_size'])[0]} a value that its weights deny")
    network = network_of(_architecture_of(state, where), **build)
    if state.get("post_training", {}).get("folded"):
        fold_normalization(network)
    network.load_state_dict(model)
    return network


def _architecture_of(state: dict[str, Any], where: str) -> Architecture:
    return Architecture.from_json(parse_json(state["architecture"]), f"{where} (checkpoint)")


def cost_text(cost: Cost) -> str:
    """One line: parameters, MACs, BitOps, weight memory."""
    return (
        f"{cost.parameters / 1e6:.3f} M parameters, {cost.macs / 1e6:.2f} M MACs, {cost.bitops / 1e9:.4g} G BitOps "
        f"({cost.bitops_quantized / 1e9:.4g} G in quantised layers), {cost.weight_bytes / 1e6:.3f} MB of weights"
    )


def mean_bits(cost: Cost) -> tuple[float, float]:
    """Mean bits of the layers that methods quantise: of their weights, and of their input activations."""
    layers = [layer for layer in cost.layers if layer.quantizable]
    weights = sum(layer.weight_bytes / layer.weight_bits for layer in layers)
    activations = sum(layer.activation_bytes / layer.activation_bits for layer in layers)
    if not weights or not activations:
        return 32.0, 32.0
    return (
        sum(layer.weight_bytes for layer in layers) / weights,
        sum(layer.activation_bytes for layer in layers) / activations,
    )
