# SPDX-License-Identifier: Apache-2.0
"""How two gloo ranks share the work of one process: wall seconds of a search iteration and of a training step.

Every rank computes on one thread. `strong`: the same global batch, t1 / (2 t2); `weak`: the same batch on each rank,
t1 / t2; 1 would be perfect. Sides alternate, medians of n; loading images is not part of it. One machine's cores stand
for machines, so that ranks compete for its memory and its caches.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import measuring
from common.engine import distributed
from common.engine.cli import Config
from common.engine.search_loop import SearchLoop
from common.engine.train_loop import train
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.plan import silent_run
from common.recipes.search_setup import prepare_search
from common.recipes.setup import shorten
from common.recipes.train import loop_of, prepare
from tests.helpers.ranks import on_ranks

BATCHES = {"search": 64, "training": 32}
SMOKE = ["--preset", "smoke"]
FULL = ["--dataset", "cifar10"]


def main(argv: list[str] | None = None) -> int:
    """Measure both kinds of step and deliver the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="n, rounds of all sides")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a side in each round")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats, args.steps = 1, 1
    where = measuring.machine()
    torch.set_num_threads(1)
    rows = [measure(kind, args.repeats, args.steps, smoke=args.smoke) for kind in BATCHES]
    result = {
        "schema": 1,
        "benchmark": "ranks",
        "n": args.repeats,
        "steps": args.steps,
        "rows": rows,
        "machine": where,
        "versions": measuring.versions(),
    }
    measuring.deliver(result, table(result), args.json)
    return 0


def measure(kind: str, repeats: int, steps: int, *, smoke: bool) -> dict[str, Any]:
    """Seconds of a step on one rank, on two with the same global batch, and on two with twice of it."""
    batch = 8 if smoke else BATCHES[kind]
    sides = {"one": (1, batch), "strong": (2, batch), "weak": (2, 2 * batch)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (ranks, images) in sides.items():
            found = on_ranks(ranks, partial(timed, kind, images, steps, smoke))
            seconds[name].append(max(row[0] for row in found))  # the slower one is waited for
            messages, sent = found[0][1:]
    times = {name: median(values) for name, values in seconds.items()}
    print(f"{kind}: {times}", file=sys.stderr)
    return {
        "kind": kind,
        "batch_size": batch,
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "strong": round(times["one"] / (2 * times["strong"]), 3),
        "weak": round(times["one"] / times["weak"], 3),
        "messages": int(messages),
        "bytes": int(sent),
    }


def timed(kind: str, batch: int, steps: int, smoke: bool) -> list[float]:
    """On this rank: median wall seconds of a step, and the messages and bytes of one."""
    build = {"search": searching, "training": training}[kind]
    flags = [*(SMOKE if smoke else FULL), "--batch-size", str(batch), "--device", "cpu", "--no-tensorboard"]
    return build(flags, steps)


def searching(flags: list[str], steps: int) -> list[float]:
    """A search's iteration: an architecture step, then a weight step."""
    config = without_images(resolve_search(search_parser("search", ""), [*flags, "--warmup-epochs", "0"]))
    prepared = prepare_search(config)
    loop = SearchLoop(prepared.supernet, **prepared.loop)
    loop.model.train()
    loop.start_epoch()
    return clocked(loop.one_step, steps)


def training(flags: list[str], steps: int) -> list[float]:
    """A training's step."""
    config = without_images(resolve_training(training_parser("train", ""), [*flags, "--arch", "PC_DARTS"]))
    network, _, stream, settings, arguments = loop_of(prepare(config))
    stamps = []
    with distributed.counted() as traffic:
        note = lambda step: stamps.append((time.monotonic(), traffic.messages, traffic.bytes))  # noqa: E731
        once = replace(settings, epochs=1, warmup_epochs=0)
        train(network, stream=shorten(stream, steps + 2), settings=once, run=silent_run(), on_step=note, **arguments)
    times = [after[0] - before[0] for before, after in pairwise(stamps)][1:]
    return [median(times), stamps[-1][1] - stamps[-2][1], stamps[-1][2] - stamps[-2][2]]


def without_images(config: Config) -> Config:
    """Black images in the set's shape and number, as for a plan: what is measured does not look at them."""
    config.plan = True
    return config


def clocked(step: Callable[[], None], steps: int) -> list[float]:
    """Median wall seconds of `steps` steps after a first one, and the messages and bytes of the last."""
    step()
    times = []
    for _ in range(steps):
        distributed.barrier()
        started = time.monotonic()
        with distributed.counted() as traffic:
            step()
        times.append(time.monotonic() - started)
    return [median(times), traffic.messages, traffic.bytes]


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"The CIFAR-10 recipe's sizes on CPU; medians of n = {result['n']} rounds of {result['steps']} steps",
        "",
        "| step | global batch | 1 rank, s | 2 ranks, s | strong | weak | messages | MB sent by a rank |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = f"{row['seconds']['one']:.3f} | {row['seconds']['strong']:.3f}"
        sent = f"{row['messages']} | {row['bytes'] / 1e6:.2f}"
        lines.append(
            f"| {row['kind']} | {row['batch_size']} | {times} | {row['strong']:.2f} | {row['weak']:.2f} | {sent} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
