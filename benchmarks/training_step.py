# SPDX-License-Identifier: Apache-2.0
"""A training step of the evaluation network: quantised against full precision.

The network is PC-DARTS's on CIFAR-10 with one bit pair everywhere: weights at 2 bits and activations at 4. Sides:
`float`, `fixed` (Gaussian weights, HWGQ activations) and `lsq` (learned steps for both). A step is forward, backward,
clipping and the SGD of the training loop. Each side lives in a process of its own; steps are alternated; figures are
medians of n, in CPU seconds. Activation memory is what autograd holds at most for the backward pass; the resident peak
of a side's first step over what was resident before it stands beside it.

    python benchmarks/training_step.py --json benchmarks/results/training_step.json
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measuring
from common.engine.train_loop import TrainSettings, make_optimizer
from common.nets import build_network, load_architecture

GENOTYPE, WEIGHT_BITS, ACTIVATION_BITS, CLASSES = "PC_DARTS_cifar", 2, 4, 10
QUANTIZERS = {
    "float": None,
    "fixed": {"weight_quantizer": "gaussian", "activation_quantizer": "hwgq"},
    "lsq": {"weight_quantizer": "lsq", "activation_quantizer": "lsq"},
}
SMOKE = {"batch_size": 2, "init_channels": 8, "layers": 3, "image_size": 16, "repeats": 1}
STEPS = ("training_step",)


@dataclass(frozen=True)
class Setting:
    """Sizes of the network and of its batches."""

    batch_size: int
    init_channels: int
    layers: int
    image_size: int

    def batch(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Random images and labels, the same for every side."""
        source, count = torch.Generator().manual_seed(0), size or self.batch_size
        images = torch.randn(count, 3, self.image_size, self.image_size, generator=source)
        return images, torch.randint(CLASSES, (count,), generator=source)


class TrainingSide:
    """A network under the optimiser of the training loop."""

    def __init__(self, name: str, setting: Setting) -> None:
        torch.manual_seed(0)
        architecture = load_architecture(GENOTYPE)
        quantizers = QUANTIZERS[name]
        if quantizers is not None:
            architecture = architecture.with_uniform_bits(WEIGHT_BITS, ACTIVATION_BITS)
        sizes = {"init_channels": setting.init_channels, "layers": setting.layers, "num_classes": CLASSES}
        self.model = build_network(architecture, **sizes, **(quantizers or {}))
        self.settings = TrainSettings(epochs=1)
        self.optimizer = make_optimizer(self.model, self.settings)
        self.parameters = list(self.model.parameters())
        self.model.train()
        self.take(setting.batch())

    def take(self, batch: tuple[Tensor, Tensor]) -> None:
        """Train on this batch from now on."""
        self.batch = batch

    def training_step(self) -> None:
        """One step."""
        x, y = self.batch
        F.cross_entropy(self.model(x)[0], y).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="n, timed steps of each side")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    parser.add_argument("--worker", choices=tuple(QUANTIZERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    """What the flags ask to train."""
    return Setting(**{name: getattr(args, name) for name in ("batch_size", "init_channels", "layers", "image_size")})


def main(argv: list[str] | None = None) -> int:
    """Measure all sides and deliver the figures."""
    args = parse(argv)
    setting = setting_of(args)
    if args.worker:
        torch.set_num_threads(args.threads)
        batches = setting.batch(), setting.batch(2)
        measuring.serve(lambda: measuring.answers(TrainingSide(args.worker, setting), STEPS, *batches))
        return 0
    names = ("batch_size", "init_channels", "layers", "image_size", "threads")
    options = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(measuring.Worker(__file__, *options, "--worker", name)) for name in QUANTIZERS
        }
        result = compare(args, sides)
    measuring.deliver(result, table(result), args.json)
    return 0


def compare(args: argparse.Namespace, sides: dict[str, measuring.Worker]) -> dict[str, Any]:
    """Figures of every side, and its ratios to full precision."""
    where = measuring.machine()
    figures: dict[str, dict[str, Any]] = {name: {"peak_mib": side.ask("memory")} for name, side in sides.items()}
    rows: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            rows[name].append(sides[name].ask("time")["training_step"])
    for name, side in sides.items():
        saved = side.ask("saved")["training_step"]
        counts = side.ask("count")["training_step"]
        figures[name] |= {"seconds": median(rows[name]), "runs": rows[name], "saved_mib": saved, "counts": counts}
    base = figures["float"]
    for name, figure in figures.items():
        pairs = zip(rows[name], rows["float"], strict=True)
        figure["time_ratio"] = round(median(own / full for own, full in pairs), 3)
        figure["saved_ratio"] = round(figure["saved_mib"] / base["saved_mib"], 3)
        figure["peak_ratio"] = round(figure["peak_mib"] / max(base["peak_mib"], 1e-9), 3)
    return {
        "schema": 1,
        "benchmark": "training_step",
        "genotype": GENOTYPE,
        "bits": {"weights": WEIGHT_BITS, "activations": ACTIVATION_BITS},
        "setting": asdict(setting_of(args)),
        "threads": args.threads,
        "n": args.repeats,
        "sides": figures,
        "machine": where,
        "versions": measuring.versions(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    setting = result["setting"]
    rows = [
        f"{result['genotype']}, batch {setting['batch_size']}, {setting['init_channels']} channels, "
        f"{setting['layers']} cells, {setting['image_size']} pixels; {result['threads']} thread(s), n = {result['n']}",
        "",
        "| side | step, CPU s | ratio | saved, MiB | ratio | peak, MiB | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, side in result["sides"].items():
        time = f"{side['seconds']:.3f} | {side['time_ratio']:.2f}"
        saved = f"{side['saved_mib']:.0f} | {side['saved_ratio']:.2f}"
        rows.append(f"| {name} | {time} | {saved} | {side['peak_mib']:.0f} | {side['peak_ratio']:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
