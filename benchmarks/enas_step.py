# SPDX-License-Identifier: Apache-2.0
"""The shared-weight child's training step, computing what was sampled against computing everything; the controller.

Both sides hold the same child and see the same architectures, drawn uniformly from a fixed seed. `sampled` is the
production step; `all` computes all five operations of every branch and picks one of them, so that the others take part
in forward and backward, as the reference graph does. A step is forward, backward, clipping, the optimiser and the
clamping of latent weights. Steps are alternated, a pair has one architecture; figures are medians of n, in CPU seconds.

Beside them: an update's 10 samples of the controller in one batched run against 10 runs, forward and backward; and the
accuracy of ten architectures on a batch each.

    python benchmarks/enas_step.py --json benchmarks/results/enas_step.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import measuring
from common.nets.enas_space import OPERATION_NAMES, MicroCells, random_cells
from enas.child import SharedCell, SharedChild
from enas.controller import Controller, ControllerSettings, inverse_cdf
from enas.loop import ChildLoop, ChildSettings

SMOKE = {"batch_size": 4, "layers": 1, "blocks": 2, "out_filters": 2, "image_size": 8, "repeats": 1}
SAMPLES = 10


class EveryOperation:
    """The reference's way, as the `_operation` of a SharedCell: all five, of which the sampled one is picked."""

    def __init__(self, cell: SharedCell) -> None:
        self.plain = cell._operation

    def __call__(self, x: Tensor, block: int, branch: str, node: int, operation: int) -> Tensor:
        """All operations on x; the sampled one's output."""
        outputs = [self.plain(x, block, branch, node, other) for other in range(len(OPERATION_NAMES))]
        return torch.stack(outputs)[operation]


class Repeated:
    """One batch, again and again."""

    steps_per_epoch = 1_000_000

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.one = batch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch."""
        return self.one


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    source = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=source)
    return images, torch.randint(10, (args.batch_size,), generator=source)


def child_side(args: argparse.Namespace, everything: bool) -> ChildLoop:
    """A child under the loop's own step."""
    torch.manual_seed(0)
    child = SharedChild(
        in_channels=3,
        num_classes=10,
        out_filters=args.out_filters,
        layers=args.layers,
        blocks=args.blocks,
        image_size=args.image_size,
    )
    if everything:
        for layer in child.layers:
            layer.cell._operation = EveryOperation(layer.cell)
    loop = ChildLoop(
        child,
        stream=Repeated(batch_of(args)),
        settings=ChildSettings(epochs=1),
        num_classes=10,
        evaluations=[],
        run=SimpleNamespace(),  # type: ignore[arg-type]
    )
    loop.protect()
    child.train()
    return loop


def step_of(loop: ChildLoop, cells: MicroCells) -> Callable[[], object]:
    """One production step on an architecture."""
    loop.position, loop.arcs = 0, [cells]
    return loop.one_step


def controller_run(controller: Controller, uniform: Tensor, batched: bool) -> Callable[[], object]:
    """Forward and backward of the samples of an update, in one run or one by one."""

    def work() -> None:
        rows = [uniform] if batched else list(uniform.split(1))
        samples = [controller(len(row), inverse_cdf(row)).neg_log_prob for row in rows]
        controller.zero_grad(set_to_none=True)
        torch.cat(samples).mean().backward()

    return work


@torch.no_grad()
def evaluate_ten(loop: ChildLoop, cells: list[MicroCells]) -> None:
    """The accuracy of ten architectures on a batch each."""
    loop.model.eval()
    x, y = loop.stream.batch(0, 0)
    torch.stack([(loop.forward(x, one)[0].argmax(1) == y).double().mean() for one in cells]).tolist()
    loop.model.train()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(args.threads)
    where = measuring.machine()
    generator = torch.Generator().manual_seed(args.seed)
    arcs = [random_cells(args.blocks, generator) for _ in range(args.repeats + 1)]
    sides = {"sampled": child_side(args, False), "all": child_side(args, True)}
    rows: dict[str, list[float]] = {name: [] for name in sides}
    for repeat, cells in enumerate(arcs):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            seconds = measuring.cpu_seconds_of(step_of(sides[name], cells))
            if repeat:  # the first warms up
                rows[name].append(seconds)
    controller = Controller(ControllerSettings(blocks=args.blocks))
    uniform = torch.rand(SAMPLES, controller.decisions, generator=generator)
    runs: dict[str, list[float]] = {"batched": [], "one by one": []}
    for _ in range(args.repeats):
        for name in runs:
            runs[name].append(measuring.cpu_seconds_of(controller_run(controller, uniform, name == "batched")))
    ten = controller.draw(uniform)
    return {
        "schema": 1,
        "benchmark": "enas_step",
        "setting": {k: getattr(args, k) for k in ("batch_size", "layers", "blocks", "out_filters", "image_size")},
        "threads": args.threads,
        "n": args.repeats,
        "seed": args.seed,
        "child": {name: {"seconds": median(found), "runs": found} for name, found in rows.items()},
        "child_ratio": round(median(a / s for a, s in zip(rows["all"], rows["sampled"], strict=True)), 3),
        "controller": {name: {"seconds": median(found), "runs": found} for name, found in runs.items()},
        "controller_ratio": round(median(a / b for a, b in zip(runs["one by one"], runs["batched"], strict=True)), 3),
        "ten_architectures_seconds": measuring.cpu_seconds_of(lambda: evaluate_ten(sides["sampled"], ten)),
        "machine": where,
        "versions": measuring.versions(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    s, child, controller = result["setting"], result["child"], result["controller"]
    return "\n".join(
        [
            f"L={s['layers']}, B={s['blocks']}, F={s['out_filters']}, batch {s['batch_size']}, {s['image_size']} px, "
            f"{result['threads']} thread(s), n = {result['n']}",
            "",
            "| what | CPU s | the other way, CPU s | times faster |",
            "| --- | ---: | ---: | ---: |",
            f"| child's step, sampled operations against all five | {child['sampled']['seconds']:.3f} "
            f"| {child['all']['seconds']:.3f} | {result['child_ratio']:.2f} |",
            f"| controller's {SAMPLES} samples, one run against one by one | {controller['batched']['seconds']:.3f} "
            f"| {controller['one by one']['seconds']:.3f} | {result['controller_ratio']:.2f} |",
            f"| ten architectures on a batch each | {result['ten_architectures_seconds']:.3f} | | |",
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; the defaults are the CIFAR-10 search's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch-size", 128), ("layers", 3), ("blocks", 5), ("out-filters", 20), ("image-size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the architectures")
    parser.add_argument("--repeats", type=int, default=5, help="n, timed pairs of steps")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure both sides and deliver the figures."""
    args = parse(argv)
    result = compare(args)
    measuring.deliver(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
