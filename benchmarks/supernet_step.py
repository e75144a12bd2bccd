# SPDX-License-Identifier: Apache-2.0
"""One iteration of a search, architecture step and weight step: the production supernet against a plain one.

`plain` writes one quantiser and one convolution per operation and edge, NCHW, ordinary autograd, gradients of all
parameters in both steps, and reads scalars back to the host, as the reference implementation does. `plain-tuned` is
the same with channels-last, without reads, each state quantised once. `--second-order` compares the production search
with itself at first order.

Each side lives in a process of its own; their steps are alternated; figures are medians of n, in CPU seconds. Memory is
the resident peak of a side's first iteration over what was resident before it; saved bytes are what autograd holds for
the backward pass. Counts are taken at batch 2: they do not depend on the batch.

    python benchmarks/supernet_step.py --against plain --json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import measuring
from benchmarks.sides import SIDES, Setting, augmented_stream, build_side

SMOKE = {"batch_size": 2, "init_channels": 8, "layers": 3, "image_size": 16, "repeats": 1}
_REST = 4  # one more repeat, the counts and the saved bytes take at most this many repeats' time
STEPS = ("architecture_step", "weight_step")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=SIDES[1:], default="plain")
    parser.add_argument("--method", choices=("pc-darts", "darts"), default="pc-darts")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4], help="32 alone: full precision")
    parser.add_argument("--second-order", choices=("finite-difference", "exact"), help="against first order")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="n, timed iterations of each side")
    parser.add_argument("--minutes", type=float, default=8.0, help="take fewer repeats where n would last longer")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    """What the flags ask to search."""
    bits = None if args.bits == [32] else tuple(args.bits)
    same = ("method", "batch_size", "init_channels", "layers", "image_size")
    return Setting(bits=bits, order=args.second_order or "first", **{name: getattr(args, name) for name in same})


def main(argv: list[str] | None = None) -> int:
    """Measure both sides and deliver the figures."""
    args = parse(argv)
    if args.worker:
        measuring.serve(lambda: answers(args))
        return 0
    options = flags_of(args)
    if args.second_order:
        measured, base = ("fused", [*options, "--second-order", args.second_order]), ("fused", options)
    else:
        measured, base = ("fused", options), (args.against, options)
    with worker(*measured) as ours, worker(*base) as theirs:
        result = compare(args, ours, theirs)
    measuring.deliver(result, table(result), args.json)
    return 0


def flags_of(args: argparse.Namespace) -> list[str]:
    """The flags that make a worker's setting."""
    names = ("method", "batch_size", "init_channels", "layers", "image_size", "threads")
    given = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return [*given, "--bits", *map(str, args.bits)]


def worker(side: str, options: list[str]) -> measuring.Worker:
    """A process that holds one side."""
    return measuring.Worker(__file__, *options, "--worker", side)


def compare(args: argparse.Namespace, ours: measuring.Worker, theirs: measuring.Worker) -> dict[str, Any]:
    """Memory, then alternated timings, then counts and saved bytes of both sides; ratios of their medians."""
    begun, where = time.monotonic(), measuring.machine()
    names = ("fused", "first-order" if args.second_order else args.against)
    sides = dict(zip(names, (ours, theirs), strict=True))
    figures: dict[str, dict[str, Any]] = {name: {"peak_mib": side.ask("memory")} for name, side in sides.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        started = time.monotonic()
        for name in names if repeat % 2 == 0 else names[::-1]:
            seconds = sides[name].ask("time")
            rows[name].append({**seconds, "iteration": sum(seconds.values())})
        now = time.monotonic()
        if now - begun + _REST * (now - started) > 60 * args.minutes:
            break
    for name, side in sides.items():
        timed = measuring.medians(rows[name])
        figures[name] |= {**timed, "runs": rows[name], "counts": side.ask("count"), "saved_mib": side.ask("saved")}
    share = ours.ask("data") / figures["fused"]["iteration"]
    return {
        "schema": 1,
        "benchmark": "supernet_step",
        "against": names[1],
        "setting": asdict(setting_of(args)),
        "threads": args.threads,
        "n": len(rows["fused"]),
        **ratios(figures["fused"], figures[names[1]], rows["fused"], rows[names[1]]),
        "data_share": round(share, 5),
        "sides": figures,
        "machine": where,
        "versions": measuring.versions(),
    }


def ratios(
    ours: dict[str, Any], theirs: dict[str, Any], our_runs: list[dict[str, float]], their_runs: list[dict[str, float]]
) -> dict[str, float]:
    """The other side over ours: medians of the paired runs' ratios, of peak memory and of saved bytes."""
    pairs = list(zip(our_runs, their_runs, strict=True))
    found = {f"{step}_ratio": median(b[step] / a[step] for a, b in pairs) for step in ("iteration", *STEPS)}
    found["memory_factor"] = theirs["peak_mib"] / max(ours["peak_mib"], 1e-9)
    found["saved_factor"] = max(theirs["saved_mib"].values()) / max(ours["saved_mib"].values())
    return {name: round(value, 3) for name, value in found.items()}


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    setting, (ours, theirs) = result["setting"], result["sides"].values()
    ours_label = "fused" if setting["order"] == "first" else setting["order"]
    bits = "full precision" if setting["bits"] is None else f"bits {', '.join(map(str, setting['bits']))}"
    rows = [
        f"{setting['method']}, {bits}, batch {setting['batch_size']}, {setting['init_channels']} channels, "
        f"{setting['layers']} cells, {setting['image_size']} pixels; {result['threads']} thread(s), n = {result['n']}",
        "",
        f"| | {ours_label} | {result['against']} | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label, name in (("architecture step", STEPS[0]), ("weight step", STEPS[1]), ("iteration", "iteration")):
        rows.append(f"| {label}, CPU s | {ours[name]:.3f} | {theirs[name]:.3f} | {result[f'{name}_ratio']:.2f} |")
    peaks = f"{ours['peak_mib']:.0f} | {theirs['peak_mib']:.0f} | {result['memory_factor']:.2f}"
    rows.append(f"| peak memory over the base, MiB | {peaks} |")
    for step in STEPS:
        a, b = ours["saved_mib"][step], theirs["saved_mib"][step]
        rows.append(f"| saved for backward, {step.replace('_', ' ')}, MiB | {a:.0f} | {b:.0f} | {b / a:.2f} |")
        for what, label in (("leaf_ops", "leaf ops"), ("nodes", "autograd nodes"), ("syncs", "host syncs")):
            a, b = ours["counts"][step][what], theirs["counts"][step][what]
            ratio = f"{b / a:.2f}" if a else ""
            rows.append(f"| {label}, {step.replace('_', ' ')} | {a:,} | {b:,} | {ratio} |")
    rows.append(f"\nData pipeline: {100 * result['data_share']:.2f}% of an iteration of the first")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------ one side's process


def answers(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """One side, and what `compare` asks of it."""
    torch.set_num_threads(args.threads)
    setting = setting_of(args)
    side = build_side(args.worker, setting)
    small = replace(setting, batch_size=2).batches()
    known = measuring.answers(side, STEPS, setting.batches(), small)
    return {**known, "data": lambda: data_seconds(setting)}


def data_seconds(setting: Setting, images: int = 10_000) -> float:
    """CPU seconds of the two batches of an iteration, from the production stream (median of 20)."""
    stream = augmented_stream(setting, max(images, setting.batch_size))
    stream.batch(0, 0)  # draws the epoch's random numbers
    steps = [i % stream.steps_per_epoch for i in range(40)]
    pairs = zip(steps[::2], steps[1::2], strict=True)
    return median(
        measuring.cpu_seconds_of(lambda pair=pair: [stream.batch(0, step) for step in pair]) for pair in pairs
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
