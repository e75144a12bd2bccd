# SPDX-License-Identifier: Apache-2.0
"""What --preset fast costs and saves: the runs of benchmarks/fast_preset.sh, fast against default, paired by seed.

Of every seed with both trainings finished: test top-1, BitOps and seconds of the search. Differences are fast minus
default with Student's 95% interval over the seeds. "Equivalent" is said only where the interval of the accuracy
lies within one point. The interval holds what a seed changes (splits, weights, order, training), not the finite test
set, which both sides share.

    python benchmarks/fast_preset.py RUNS [--size quickstart] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from common.engine.files import read_json, write_json
from common.recipes.presets import PRESETS
from common.recipes.statistics import mean_interval

SIDES = ("default", "fast")
POINT = 0.01
# What no preset means for the flags that fast changes (common/engine/cli.py); a test compares them.
DEFAULTS = {"epochs": 50, "warmup_epochs": 15, "arch_every": 1, "arch_learning_rate": 6e-4, "gamma_learning_rate": 0.01}


def fast_flags(size: str) -> list[str]:
    """What `fast` changes, at the sizes of another preset: each value in the same proportion to that preset's own.

    Whole numbers are rounded, epochs to at least 1.
    """
    words: list[str] = []
    for name, value in PRESETS["fast"].search.items():
        own = PRESETS[size].search.get(name, DEFAULTS[name])
        scaled = own * value / DEFAULTS[name]
        number = (
            str(max(0 if name == "warmup_epochs" else 1, round(scaled))) if isinstance(own, int) else f"{scaled:.6g}"
        )
        words += ["--" + name.replace("_", "-"), number]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that holds s<seed>/{default,fast}/{search,train}")
    parser.add_argument("--size", default="quickstart", help="the preset of both sides")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    pairs = read_pairs(args.runs)
    if not pairs:
        print(f"fast_preset: {args.runs}: no seed has both trainings finished yet", file=sys.stderr)
        return 0
    result = {
        "schema": 1,
        "benchmark": "fast_preset",
        "size": args.size,
        "fast": fast_flags(args.size),
        **compare(pairs),
        "machine": measuring.machine(),
        "versions": measuring.versions(),
    }
    print(table(result))
    if args.json is not None:
        write_json(args.json, result)
    return 0


def read_pairs(runs: Path) -> dict[int, dict[str, dict[str, float]]]:
    """seed -> side -> figures, of the seeds whose four runs are finished."""
    found = {}
    for folder in sorted(runs.glob("s*"), key=lambda path: (len(path.name), path.name)):
        results = {side: [folder / side / stage / "result.json" for stage in ("search", "train")] for side in SIDES}
        if all(path.is_file() for pair in results.values() for path in pair):
            found[int(folder.name[1:])] = {side: _figures(*map(read_json, pair)) for side, pair in results.items()}
    return found


def _figures(search: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, float]:
    return {
        "top1": train["metrics"]["test_top1"],
        "bitops": train["cost"]["bitops"],
        "bitops_quantized": train["cost"]["bitops_quantized"],
        "seconds": search["seconds"],
    }


def compare(pairs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means of both sides, paired differences (top-1, in fractions) and ratios (the rest), their 95% intervals."""
    figures: dict[str, Any] = {}
    for name in ("top1", "bitops", "bitops_quantized", "seconds"):
        sides = {side: [pair[side][name] for pair in pairs.values()] for side in SIDES}
        if name == "top1":
            change = [fast - default for default, fast in zip(sides["default"], sides["fast"], strict=True)]
            interval = mean_interval(change)
            found = {"difference": fmean(change)}
        else:  # a ratio of positive figures: its logarithm is what varies evenly
            change = [math.log(fast / default) for default, fast in zip(sides["default"], sides["fast"], strict=True)]
            logs = mean_interval(change)
            interval = None if logs is None else (math.exp(logs[0]), math.exp(logs[1]))
            found = {"ratio": math.exp(fmean(change))}
        figures[name] = {**sides, **found, "interval": interval}
    interval = figures["top1"]["interval"]
    equivalent = interval is not None and max(map(abs, interval)) <= POINT
    return {"seeds": list(pairs), "n": len(pairs), "figures": figures, "equivalent": equivalent}


def table(result: Mapping[str, Any]) -> str:
    """The figures for people, in Markdown."""
    figures, n = result["figures"], result["n"]
    lines = [
        f"`--preset fast` against none at the sizes of {result['size']}, n = {n} seeds: {' '.join(result['fast'])}",
        "",
    ]
    lines += ["| | default | fast | fast against default | 95% interval |", "| --- | ---: | ---: | ---: | ---: |"]
    top1 = figures["top1"]
    points = [100 * end for end in top1["interval"]] if top1["interval"] else None
    lines.append(
        f"| test top-1, % | {100 * fmean(top1['default']):.2f} | {100 * fmean(top1['fast']):.2f} "
        f"| {100 * top1['difference']:+.2f} points | {_ends(points, '+.2f')} |"
    )
    for name, label, unit in (
        ("bitops", "BitOps, G", 1e9),
        ("bitops_quantized", "of quantised layers, G", 1e9),
        ("seconds", "search, s", 1.0),
    ):
        row = figures[name]
        default, fast = (fmean(row[side]) / unit for side in SIDES)
        lines.append(
            f"| {label} | {default:.4g} | {fast:.4g} | x {row['ratio']:.3f} | {_ends(row['interval'], '.3f')} |"
        )
    verdict = "equivalent: the interval lies" if result["equivalent"] else "not shown to be equivalent: no interval"
    return "\n".join([*lines, "", f"{verdict} within one point of accuracy"])


def _ends(interval: Sequence[float] | None, form: str) -> str:
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


if __name__ == "__main__":
    sys.exit(main())
