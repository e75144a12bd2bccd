# SPDX-License-Identifier: Apache-2.0
"""How a search iteration grows: CPU time and memory against one size at a time, the others at a base.

The production supernet, PC-DARTS, one process per point: peak memory of its first iteration over what was resident
before, then the median CPU seconds of n iterations (architecture and weight step), and on several threads wall seconds
too. `exponent` is the slope of log(seconds) against log(size) by least squares: 1 is linear.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --csv benchmarks/results/scaling.csv \\
        --plot docs/images/scaling.svg
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring

BASE = {"batch_size": 32, "init_channels": 16, "layers": 8, "bits": (2, 4), "image_size": 32, "threads": 1}
POINTS: dict[str, tuple[Any, ...]] = {
    "batch_size": (8, 16, 32, 64, 128),
    "init_channels": (8, 16, 24, 32, 48),
    "layers": (5, 8, 11, 14, 20),
    "bits": ((4,), (2, 4), (2, 3, 4), (1, 2, 3, 4), (2, 4, 8)),
    "image_size": (16, 24, 32, 48, 64),
    "threads": (1, 2),
}
LABELS = {
    "batch_size": "batch",
    "init_channels": "channels",
    "layers": "cells",
    "bits": "bit choices",
    "image_size": "image side, pixels",
    "threads": "threads",
}
SMOKE_BASE = {**BASE, "batch_size": 2, "init_channels": 8, "layers": 3, "image_size": 16}
SMOKE_POINTS = {"batch_size": (2, 4), "bits": ((2, 4), (2,))}
COLUMNS = ("axis", "value", "bits", "seconds", "wall_seconds", "peak_mib", "saved_mib")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="n, timed iterations of each point")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    parser.add_argument("--csv", type=Path, help="write the points to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this .svg or .png (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.repeats = 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure every point and deliver the figures."""
    args = parse(argv)
    base, points = (SMOKE_BASE, SMOKE_POINTS) if args.smoke else (BASE, POINTS)
    where = measuring.machine()
    known: dict[tuple[Any, ...], dict[str, float]] = {}  # the base lies on every axis and is measured once
    rows = []
    for axis, values in points.items():
        for value in values:
            setting = {**base, axis: value}
            key = tuple(setting.values())
            if key not in known:
                known[key] = measure(setting, args.repeats)
                print(f"{LABELS[axis]} {value}: {known[key]['seconds']:.3f} s", file=sys.stderr)
            bits = " ".join(map(str, setting["bits"]))
            rows.append({"axis": axis, "value": len(value) if axis == "bits" else value, "bits": bits, **known[key]})
    result = {
        "schema": 1,
        "benchmark": "scaling",
        "n": args.repeats,
        "base": {**base, "bits": list(base["bits"])},
        "rows": rows,
        "exponents": exponents(rows),
        "machine": where,
        "versions": measuring.versions(),
    }
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows)
    measuring.deliver(result, table(result), args.json)
    return 0


def measure(setting: dict[str, Any], repeats: int) -> dict[str, float]:
    """CPU and wall seconds, peak and saved MiB of an iteration of one setting."""
    sizes = {name: str(value) for name, value in setting.items() if name != "bits"}
    options = [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", value)]
    script = Path(__file__).with_name("supernet_step.py")
    bits = ["--bits", *map(str, setting["bits"])]
    with measuring.Worker(script, *options, *bits, "--worker", "fused") as worker:
        peak = worker.ask("memory")
        clocks = measuring.medians([worker.ask("clocks") for _ in range(repeats)])
        saved = max(worker.ask("saved").values())
    figures = {"seconds": clocks["cpu"], "wall_seconds": clocks["wall"], "peak_mib": peak, "saved_mib": saved}
    return {name: round(value, 4) for name, value in figures.items()}


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per axis, the slopes of log(seconds) and log(peak) against log(size); on threads, wall seconds."""
    grouped = by_axis(rows)
    found = {}
    for axis, group in grouped.items():
        time_column = "wall_seconds" if axis == "threads" else "seconds"
        columns = {"seconds": time_column, "memory": "saved_mib"}
        found[axis] = {name: round(slope(group, column), 3) for name, column in columns.items()}
    return found


def by_axis(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each axis; of bit choices only those of 1 to 4 bits (8 bits are another quantiser)."""
    grouped = defaultdict(list)
    for row in rows:
        if row["axis"] != "bits" or "8" not in row["bits"].split():
            grouped[row["axis"]].append(row)
    return grouped


def slope(rows: list[dict[str, Any]], column: str) -> float:
    """Least-squares slope in logarithms."""
    x, y = ([math.log(max(row[name], 1e-9)) for row in rows] for name in ("value", column))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The points, one row each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel per axis: seconds (left) and saved memory (right), with the straight line through the base's point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same figures give the same file
    grouped = by_axis(rows)
    columns = min(3, len(grouped))
    lines = -(-len(grouped) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False)
    for panel, (axis, group) in zip(panels.flat, grouped.items(), strict=False):
        x = [row["value"] for row in group]
        seconds = [row["wall_seconds" if axis == "threads" else "seconds"] for row in group]
        memory = [row["saved_mib"] for row in group]
        panel.plot(x, seconds, "o-", color="tab:blue")
        panel.plot(x, [seconds[0] * value / x[0] for value in x], ":", color="grey")
        panel.set_xlabel(LABELS[axis])
        panel.set_ylabel("wall s" if axis == "threads" else "CPU s", color="tab:blue")
        panel.set_ylim(bottom=0)
        right = panel.twinx()
        right.plot(x, memory, "s--", color="tab:orange")
        right.set_ylabel("saved, MiB", color="tab:orange")
        right.set_ylim(bottom=0)
    for panel in panels.flat[len(grouped) :]:
        panel.set_axis_off()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """The points, axis by axis."""
    base = ", ".join(f"{LABELS[name]} {value}" for name, value in result["base"].items())
    rows = [f"base: {base}; n = {result['n']}", ""]
    rows += ["| axis | value | CPU s | wall s | peak, MiB | saved, MiB |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        value = f"{row['value']} ({row['bits']})" if row["axis"] == "bits" else row["value"]
        figures = f"{row['seconds']:.2f} | {row['wall_seconds']:.2f} | {row['peak_mib']:.0f} | {row['saved_mib']:.0f}"
        rows.append(f"| {LABELS[row['axis']]} | {value} | {figures} |")
    slopes = (f"{LABELS[a]} {e['seconds']:.2f} / {e['memory']:.2f}" for a, e in result["exponents"].items())
    rows.append("\nexponents of time / saved memory: " + "; ".join(slopes))
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
