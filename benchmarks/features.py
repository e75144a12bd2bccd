# SPDX-License-Identifier: Apache-2.0
"""What features cost: whole searches on digits with and without each, in CPU seconds of the process.

The base writes no TensorBoard events, is not deterministic and saves a checkpoint at the end of every epoch, as every
run does. Variants: `tensorboard`; `deterministic`; `checkpoints`, which saves after every step, so that the difference
over the number of further checkpoints is the cost of one. Runs alternate; figures are medians of n of paired
differences; the base's own two halves (`again`) show how large a difference is noise.

    python benchmarks/features.py --json benchmarks/results/features.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from common.engine import read_json

BASE = ("--no-tensorboard", "--no-plots")
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": BASE,
    "again": BASE,
    "tensorboard": ("--tensorboard", "--no-plots"),
    "deterministic": (*BASE, "--deterministic"),
    "checkpoints": (*BASE, "--checkpoint-minutes", "1e-9"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="n, runs of each variant")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each search")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Run every variant n times and deliver the figures."""
    args = parse(argv)
    where = measuring.machine()
    flags = ["--preset", "smoke"] if args.smoke else ["--preset", "quickstart", "--epochs", str(args.epochs)]
    names = ("base", "tensorboard") if args.smoke else tuple(VARIANTS)
    runs: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for name in names[:: 1 if repeat % 2 == 0 else -1]:
                folder = Path(scratch) / f"{name}-{repeat}"
                runs[name].append(search([*flags, *VARIANTS[name], "--save", str(folder)]))
        done = read_json(Path(scratch) / "base-0" / "result.json")
    variants = {name: figures(runs[name], runs["base"]) for name in names}
    if "checkpoints" in variants:
        further = done["steps"] - done["epochs"]
        variants["checkpoints"]["seconds_each"] = round(variants["checkpoints"]["extra_seconds"] / further, 4)
    result = {
        "schema": 1,
        "benchmark": "features",
        "n": args.repeats,
        "flags": flags,
        "steps": done["steps"],
        "variants": variants,
        "machine": where,
        "versions": measuring.versions(),
    }
    measuring.deliver(result, table(result), args.json)
    return 0


def search(flags: list[str]) -> float:
    """CPU seconds of one search; RuntimeError with what it said where it failed."""
    command = [sys.executable, str(measuring.ROOT / "qdarts" / "search.py"), "--dataset", "digits", *flags]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (code {done.returncode}):\n{done.stderr[-2000:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def figures(runs: list[float], base: list[float]) -> dict[str, Any]:
    """Median seconds, and the median of the paired differences to the base, in seconds and as a share of it."""
    extra = [own - other for own, other in zip(runs, base, strict=True)]
    return {
        "seconds": round(median(runs), 3),
        "extra_seconds": round(median(extra), 3),
        "extra_share": round(median(e / b for e, b in zip(extra, base, strict=True)), 4),
        "runs": [round(run, 3) for run in runs],
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [f"search.py {' '.join(result['flags'])}; CPU seconds, medians of n = {result['n']}", ""]
    rows += ["| variant | seconds | over the base | share |", "| --- | ---: | ---: | ---: |"]
    for name, row in result["variants"].items():
        extra = f"{row['extra_seconds']:+.2f} | {100 * row['extra_share']:+.1f}%"
        rows.append(f"| {name} | {row['seconds']:.2f} | {extra} |")
        if "seconds_each" in row:
            rows.append(f"| one checkpoint | | {row['seconds_each']:+.3f} | |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
