# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation: a finished full-precision training -> the same network at few bits, a run like any other.

Normalisations are folded into the convolutions, both grids of every quantised layer are fixed on training images
(`common/quant/calibrated.py`), and each layer's bias takes up the mean error that its rounding makes (Nagel et al.,
Data-free quantization, ICCV 2019, with calibration images in place of their assumptions). No weight is trained.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cost import network_cost
from common.data import ImageData, hold_out, open_stream
from common.engine import derive, distributed, read_json
from common.engine.cli import Config
from common.nets import Network, build_network
from common.quant import FLOAT_BITS, CalibratedQuantizer, QuantConv2d, QuantLinear, fold_normalization
from common.quant.quantizers import ACTIVATION_QUANTIZERS, make_quantizer
from common.recipes.elapsed import as_list, parts_of
from common.recipes.setup import data_flags, load_data, open_run, prepare_torch, tell
from common.recipes.train import result_text
from common.recipes.trained import cost_text, final_figures, load_trained, network_state

SAMPLES = 32768
"""How many values of a layer's input its grid is fixed on, over all calibration batches; the extremes come on top."""


@dataclass
class Source:
    """The training that is quantised: its network (folded unless --bn-bits) and its data, both on the device."""

    run: Path
    flags: dict[str, Any]
    info: dict[str, Any]
    result: dict[str, Any]
    network: Network
    data: ImageData
    device: torch.device


@dataclass
class Observed:
    """What one layer of the full-precision network sees and gives on the calibration images."""

    inputs: list[Tensor] = field(default_factory=list)
    """Values drawn from its input, one tensor a batch."""
    extremes: list[Tensor] = field(default_factory=list)
    """Smallest and largest value of its input, one tensor a batch."""
    means: list[Tensor] = field(default_factory=list)
    """Mean of its output per channel, one tensor a batch."""


@dataclass
class Calibration:
    """The calibration images, [B, C, H, W] a batch, and what the full-precision layers make of them, by name."""

    batches: list[Tensor]
    observed: dict[str, Observed]

    @classmethod
    def of(cls, source: Source, config: Config) -> Calibration:
        """Draw the images by the flags and look at every layer."""
        batches = calibration_batches(source, config)
        return cls(batches, observe(source.network, batches, config.seed))


# ------------------------------------------------------------------------------------------------------ the recipe


def run_post_training(config: Config, *, method: str) -> list[dict[str, Any]]:
    """Quantise the training that the flags name at every pair of widths; the results, one run folder each.

    Raises ValueError for what does not fit, naming the flag or file.
    """
    pairs = width_pairs(config.param_bits, config.fwd_bits)
    source = open_source(config)
    if config.seed is None:
        config.seed, config.sources["seed"] = source.info["seed"], "derived"
    calibration = cache(partial(Calibration.of, source, config))  # made when the first pair that is not finished asks
    results = []
    for pair in pairs:
        one = Config(**vars(config) | {"param_bits": pair[0], "fwd_bits": pair[1], "tensorboard": False})
        one.source_digest = source.info["state_digest"]  # another training at the same place is another experiment
        if config.save is not None and len(pairs) > 1:
            one.save = config.save / "w{}a{}".format(*pair)
        results.append(_quantize(source, one, calibration, method))
    tell(table(results))
    return results


def width_pairs(weights: Sequence[int], activations: Sequence[int]) -> list[tuple[int, int]]:
    """(weight, activation) bits: pairwise where both lists are of one length, else all combinations; each pair once."""
    same = len(weights) == len(activations)
    pairs = zip(weights, activations, strict=True) if same else product(weights, activations)
    return list(dict.fromkeys(pairs))


def open_source(config: Config) -> Source:
    """The finished full-precision training RUN and its data. Raises ValueError naming the folder and the cure."""
    if config.run is None:
        raise ValueError("RUN: is missing; give the folder of a full-precision training")
    device = prepare_torch(config)
    network, flags, info = load_trained(config.run)
    low = any(min(layer.weight_bits, layer.activation_bits) < FLOAT_BITS for layer in _layers(network).values())
    if low or info["stage"] != "train":
        raise ValueError(f"RUN {config.run}: is quantised already; give a full-precision training")
    if not (config.run / "result.json").is_file():
        raise ValueError(f"RUN {config.run}: its training is not finished; go on with it first (--resume {config.run})")
    build = info["build"]
    flags_of_data = data_flags(flags, f"RUN {config.run}", data_module=config.data_module) | {
        "image_size": info["data"]["image_size"]
    }
    if config.data is not None:
        flags_of_data |= {"data": config.data, "trainfile": None, "valfile": None}
    data = load_data(Namespace(**flags_of_data))
    if (data.info.num_classes, data.info.channels) != (build["num_classes"], build["in_channels"]):
        raise ValueError(
            f"--data {flags_of_data['data']}: other classes or channels than {config.run} was trained on; "
            "give its own data"
        )
    network.auxiliary_head = None  # only a training has a use for it
    if config.bn_bits is None:
        fold_normalization(network)
    result = read_json(config.run / "result.json")
    return Source(config.run, flags, info, result, network.to(device), data.to(device), device)


def _quantize(source: Source, config: Config, calibration: Callable[[], Calibration], method: str) -> dict[str, Any]:
    """One pair of widths, from the full-precision network to result.json."""
    run = open_run(config, method=method, stage="quantize", dataset=source.data.info.name)
    with run:
        if run.already_finished:
            return {**read_json(run.folder / "result.json"), "folder": str(run.folder)}
        network, build = quantized_network(source, config)
        calibrate(network, calibration().observed, config.overflow_rate)
        if config.bias_correction:
            correct_biases(network, calibration())
        cost = network_cost(network, source.data.info.image_size)
        images = sum(map(len, calibration().batches))
        run.log(
            f"{source.run} at {config.param_bits} weight and {config.fwd_bits} activation bits, by "
            f"{config.quant_method} on {images:,} training images\nnetwork: {cost_text(cost)}"
        )
        if distributed.is_main():
            network.architecture.save(run.folder / "architecture.json")
        post_training = {"folded": config.bn_bits is None, "training": source.flags, "source": str(source.run)}
        state = network_state(network.architecture, build, source.data.info)
        state |= {"model": network.state_dict(), "epoch": source.info["epoch"], "post_training": post_training}
        run.checkpoints.save(state, step=1, epoch=source.info["epoch"])
        final = final_figures(network, source.data, source.device, build, cost, source.flags["precision"])
        result = _result(source, config, final)
        run.log(result_text(result))
        run.finish(result)
        return {**read_json(run.folder / "result.json"), "folder": str(run.folder)}


def _result(source: Source, config: Config, final: dict[str, Any]) -> dict[str, Any]:
    """As of a training, so that the rows of one network stand together."""
    kept = ("epochs", "steps", "selected_epoch", "n_train", "architecture")
    times = ("search_seconds", "before_seconds", "before_search_seconds")
    final["network"]["folded"] = config.bn_bits is None
    return {
        **{name: source.result.get(name) for name in (*kept, *times)},
        "steps_per_epoch": source.flags.get("steps_per_epoch"),
        **final,
        "quant_method": config.quant_method,
        "fp32_top1": source.result["metrics"]["test_top1"],
        "source": str(source.run),
        "source_seconds": source.result["seconds"],
        "started_from": as_list(parts_of(source.run) or {}),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each pair of widths."""
    head = (
        f"{'weights':>8}{'inputs':>8}{'top-1':>9}{'full':>9}{'loss':>10}{'BitOps':>11}{'weights, kB':>13}  run folder"
    )
    lines = [head]
    for result in results:
        bits, found, cost = result["bits_mean"], result["metrics"], result["cost"]
        lines.append(
            f"{bits['weight']:>8g}{bits['activation']:>8g}{100 * found['test_top1']:>8.2f}%"
            f"{100 * result['fp32_top1']:>8.2f}%{found['test_loss']:>10.4f}{cost['bitops'] / 1e9:>9.4g} G"
            f"{cost['weight_bytes'] / 1e3:>13.1f}  {result['folder']}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ the network


def quantized_network(source: Source, config: Config) -> tuple[Network, dict[str, Any]]:
    """The source's weights in a network at the flags' bits, not yet calibrated, and `build_network`'s arguments."""
    build = source.info["build"] | {
        "auxiliary": False,
        "signed_activations": False,
        "scheme": "default",
        "weight_quantizer": config.quant_method,
        "activation_quantizer": config.quant_method,
        "stem_bits": config.stem_bits,
        "classifier_bits": config.classifier_bits,
    }
    architecture = source.network.architecture.with_uniform_bits(config.param_bits, config.fwd_bits)
    network = build_network(architecture, **build)
    if config.bn_bits is None:
        fold_normalization(network)
    missing, unexpected = network.load_state_dict(source.network.state_dict(), strict=False)
    assert not unexpected and all(name.endswith((".low", ".high")) for name in missing), (missing, unexpected)
    if config.bn_bits is not None:
        quantize_normalization(network, config.quant_method, config.bn_bits, config.overflow_rate)
    return network.to(source.device).eval(), build


@torch.no_grad()
def quantize_normalization(network: nn.Module, method: str, bits: int, overflow_rate: float) -> None:
    """Put scale, shift and running statistics of every normalisation on a grid of its own, in place."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                grid = make_quantizer(ACTIVATION_QUANTIZERS, method, bits)
                tensor.copy_(grid.calibrate(tensor, overflow_rate)(tensor))
            module.running_var.clamp_min_(0)  # a grid may lie a little below the smallest variance


def calibrate(network: nn.Module, observed: dict[str, Observed], overflow_rate: float) -> None:
    """Fix both grids of every quantised layer: on its weight, and on what its namesake saw at its input.

    The extremes of all batches belong to what was seen, but not to a ranking of what was drawn: there each would stand
    for thousands of values.
    """
    for name, layer in _layers(network).items():
        if isinstance(layer.quantize_weight, CalibratedQuantizer):
            layer.quantize_weight.calibrate(layer.weight, overflow_rate)
        quantizer = layer.quantize_activation
        if isinstance(quantizer, CalibratedQuantizer):
            seen = observed[name]
            extremes = [] if quantizer.ranked and overflow_rate else seen.extremes
            quantizer.calibrate(torch.cat([*seen.inputs, *extremes]), overflow_rate)


# -------------------------------------------------------------------------------------------------- the calibration


def calibration_batches(source: Source, config: Config) -> list[Tensor]:
    """Training images as the network is tested on them (no augmentation), none of them held out, drawn by the seed."""
    data, flags = source.data, source.flags
    held_out = flags["val_fraction"] and hold_out(data.train.labels, flags["val_fraction"], flags["seed"])
    stream = open_stream(
        data.train,
        data.info,
        indices=held_out[0] if held_out else None,
        batch_size=config.batch_size,
        seed=config.seed,
        name="calibration",
        augment=False,
        drop_last=False,
        device=source.device,
    )
    return [stream.batch(0, step)[0] for step in range(min(config.n_sample, stream.steps_per_epoch))]


@torch.no_grad()
def observe(network: nn.Module, batches: Sequence[Tensor], seed: int) -> dict[str, Observed]:
    """What every convolution and linear layer sees and gives in one pass over the batches, by name."""
    generator = torch.Generator().manual_seed(derive(seed, "calibration samples"))
    found: dict[str, Observed] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        values, seen = inputs[0].reshape(-1), found.setdefault(name, Observed())
        drawn = torch.randint(len(values), (SAMPLES // len(batches),), generator=generator).to(values.device)
        seen.inputs.append(values[drawn])
        seen.extremes.append(torch.stack(values.aminmax()))
        seen.means.append(_channel_means(output))

    with _hooked(network, note):
        for x in batches:
            network(x)
    return found


@torch.no_grad()
def correct_biases(network: nn.Module, calibration: Calibration) -> None:
    """Let every bias take up the mean error of its layer's outputs, in one pass over the batches.

    A layer is corrected before the next one computes, so that each sees what the corrected ones before it give. The
    k-th batch moves a bias by 1 / k of the error that is left on it: its correction is the mean over the batches.
    """

    def correct(step: int, name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if layer.bias is None:
            return None
        error = (calibration.observed[name].means[step] - _channel_means(output)) / (step + 1)
        layer.bias += error
        return output + error.view(1, -1, *(1,) * (output.dim() - 2))

    for step, x in enumerate(calibration.batches):
        with _hooked(network, partial(correct, step)):
            network(x)


def _layers(network: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    """Every layer that could be quantised, by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


@contextmanager
def _hooked(network: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Within it, `hook(name, layer, inputs, output)` follows every layer's forward."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in _layers(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_means(x: Tensor) -> Tensor:
    """Mean of x [B, C, ...] over all but C."""
    return x.mean([d for d in range(x.dim()) if d != 1])
