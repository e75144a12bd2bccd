# SPDX-License-Identifier: Apache-2.0
"""One iteration of a search on a GPU: the production search against eager PyTorch, and what a whole search would take.

Sides: `plain`, one quantiser and one convolution per operation and edge, as the reference implementation; `twin`, the
production search without kernels of our own; `triton`, with them; `bf16`, the same in bfloat16 autocast. Steps are
alternated between sides after a warm-up; figures are medians of n, in wall seconds between two synchronisations.
`busy` is the share of that time in which a kernel runs (torch.profiler): far below 1, the host's launches bound it.

The estimate multiplies the medians by the steps of a CIFAR-10 search under `--preset fast`; it leaves out start, data,
logs and checkpoints. Needs a CUDA device.

    python benchmarks/gpu_step.py --json benchmarks/results/gpu_step.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measuring
from benchmarks.sides import Setting, Side, build_side
from common.engine.search_loop import SearchSettings
from common.quant import kernels
from common.recipes.presets import PRESETS

SIDES = ("plain", "twin", "triton", "bf16")
STEPS = ("architecture_step", "weight_step")
TRAINING_IMAGES = 25_000  # CIFAR-10's training set, of which a search trains its weights on half
GOAL_RATIO, GOAL_MINUTES = 20.0, 10.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; ValueError without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=3, help="iterations of each side that do not count")
    parser.add_argument("--repeats", type=int, default=10, help="n, timed iterations of each side")
    parser.add_argument("--epochs", type=int, default=50, help="of the search that is estimated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on the CPU too: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    args = parser.parse_args(argv)
    if args.smoke:
        small = {"batch_size": 2, "init_channels": 8, "layers": 3, "image_size": 8, "warmup": 1, "repeats": 1}
        vars(args).update(small)
    elif not torch.cuda.is_available():
        raise ValueError(
            "gpu_step: this machine shows no CUDA device, and the figure is a GPU's; run it where "
            "torch.cuda.is_available(), or try its path with --smoke"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure the sides and deliver the figures."""
    args = parse(argv)
    setting = Setting(
        bits=tuple(args.bits),
        batch_size=args.batch_size,
        init_channels=args.init_channels,
        layers=args.layers,
        image_size=args.image_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    figures, steps = measure(args, setting), fast_steps(args.epochs, args.batch_size)
    result = {
        "schema": 1,
        "benchmark": "gpu_step",
        "setting": asdict(setting),
        "n": args.repeats,
        "sides": figures,
        "ratios": against_plain(figures),
        "estimate": {
            "epochs": args.epochs,
            "steps": steps,
            "minutes": {name: round(sum(steps[s] * side[s] for s in STEPS) / 60, 2) for name, side in figures.items()},
        },
        "goals": {"ratio": GOAL_RATIO, "minutes": GOAL_MINUTES},
        "machine": {**measuring.machine(), "gpu": gpu_name()},
        "versions": {**measuring.versions(), "cuda": torch.version.cuda, **triton_version()},
    }
    measuring.deliver(result, table(result), args.json)
    return 0


def measure(args: argparse.Namespace, setting: Setting) -> dict[str, dict[str, Any]]:
    """Every side's medians, memory and kernels; the sides alternate."""
    sides = {name: build(name, setting) for name in args.sides}
    for name, side in sides.items():
        for _ in range(args.warmup):
            timed(name, side)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            runs[name].append(timed(name, sides[name]))
    return {
        name: {**measuring.medians(runs[name]), "runs": runs[name], **memory(name, side), **profiled(name, side)}
        for name, side in sides.items()
    }


def build(name: str, setting: Setting) -> Side:
    """A side of this benchmark."""
    precision = "bf16" if name == "bf16" else "fp32"
    return build_side("plain" if name == "plain" else "fused", replace(setting, precision=precision))


@contextmanager
def kernels_of(name: str) -> Iterator[None]:
    """Within it the side's own choice of kernels holds."""
    if name == "twin":
        with kernels.disabled():
            yield
    else:
        yield


def timed(name: str, side: Side) -> dict[str, float]:
    """Wall seconds of both steps and of the iteration that they are."""
    seconds = {step: seconds_of(name, getattr(side, step)) for step in STEPS}
    return {**seconds, "iteration": sum(seconds.values())}


def seconds_of(name: str, work: Callable[[], object]) -> float:
    """Wall seconds of `work`, the device idle before and after."""
    gc.collect()
    with kernels_of(name):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory(name: str, side: Side) -> dict[str, float]:
    """Peak device memory of an iteration over what the sides hold between steps, in MiB."""
    if not torch.cuda.is_available():
        return {"peak_mib": 0.0}
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(name, side)
    return {"peak_mib": (torch.cuda.max_memory_allocated() - base) / measuring.MIB}


def profiled(name: str, side: Side) -> dict[str, float]:
    """Kernels of one iteration, and the seconds in which they ran."""
    if not torch.cuda.is_available():
        return {"kernels": 0, "kernel_seconds": 0.0}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        timed(name, side)
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(events), "kernel_seconds": sum(e.time_range.elapsed_us() for e in events) / 1e6}


def against_plain(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Plain over each other side, paired run by run."""
    if "plain" not in figures:
        return {}
    plain, ratios = figures["plain"]["runs"], {}
    for name in figures.keys() - {"plain"}:
        pairs = list(zip(plain, figures[name]["runs"], strict=True))
        ratios[name] = {s: round(median(a[s] / b[s] for a, b in pairs), 2) for s in ("iteration", *STEPS)}
    return ratios


def fast_steps(epochs: int, batch_size: int) -> dict[str, int]:
    """Steps of both kinds in a CIFAR-10 search of `epochs` under `--preset fast`."""
    recipe = {"warmup_epochs": SearchSettings(epochs=epochs).arch_begin_epoch, "arch_every": 1}
    recipe |= {name: value for name, value in PRESETS["fast"].search.items() if name in recipe}
    steps = TRAINING_IMAGES // batch_size
    moving = max(0, epochs - recipe["warmup_epochs"]) * steps
    return {"weight_step": epochs * steps, "architecture_step": moving // recipe["arch_every"]}


def gpu_name() -> str | None:
    """The card."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def triton_version() -> dict[str, str]:
    """Triton's, where it is installed and there is a card for it."""
    return measuring.versions("triton") if torch.cuda.is_available() and kernels.triton_kernels() else {}


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    setting = result["setting"]
    rows = [
        f"{result['machine']['gpu'] or 'no GPU: only the path was tried'}; bits {setting['bits']}, batch "
        f"{setting['batch_size']}, {setting['init_channels']} channels, {setting['layers']} cells, n = {result['n']}",
        "",
        "| side | architecture step, ms | weight step, ms | plain / it | peak MiB | kernels | busy | search, min |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, side in result["sides"].items():
        times = " | ".join(f"{1000 * side[step]:.1f}" for step in STEPS)
        ratio = result["ratios"].get(name, {}).get("iteration", 1.0)
        busy = side["kernel_seconds"] / side["iteration"]
        share = f"{side['kernels']:,} | {busy:.2f} | {result['estimate']['minutes'][name]:.1f}"
        rows.append(f"| {name} | {times} | {ratio:.1f} | {side['peak_mib']:.0f} | {share} |")
    goals = result["goals"]
    rows.append(f"\nGoals: {goals['ratio']:.0f} times plain, a search in {goals['minutes']:.0f} minutes")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
