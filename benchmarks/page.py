# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md, and those of other pages about speed, written from benchmarks/results/*.json.

A table stands between the lines `<!-- figures: NAME -->` and `<!-- end -->`; the text around them is written by hand.

    python benchmarks/page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    data_pipeline,
    enas_step,
    fast_preset,
    features,
    kernels,
    loaders,
    ranks,
    scaling,
    startup,
    supernet_step,
    training_step,
)
from benchmarks.measuring import RESULTS, ROOT

PAGES = (*(ROOT / "docs" / name for name in ("performance.md", "imagenet.md", "cluster.md")), ROOT / "README.md")
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
REFERENCE_OPS = 216_702  # of a weight step; counted by a rule that is not known here
_NOT_YET = "Not measured yet."


def _of(name: str, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results[name][key]


def _slowest_start(until: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: max(case.get(until, float("nan")) for case in results["startup"]["cases"].values())


def _training(side: str, key: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["training_step"]["sides"][side][key]


def _loaders(pair: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["loaders"]["ratios"].get(pair, {}).get("value", float("nan"))


def _second_order(results: dict[str, Any]) -> float:
    return 1 / results["supernet_second_order"]["iteration_ratio"]


def _worst_syncs(results: dict[str, Any]) -> float:
    counts = results["supernet_plain"]["sides"]["fused"]["counts"]
    return max(step["syncs"] for step in counts.values())


def _leaf_ops(side: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["supernet_plain"]["sides"][side]["counts"]["weight_step"]["leaf_ops"]


def _reference_share(results: dict[str, Any]) -> float:
    return _leaf_ops("plain")(results) / REFERENCE_OPS


_PLAIN, _TUNED, _EIGHT, _FLOAT = "supernet_plain", "supernet_tuned", "supernet_8bit", "supernet_float"
_ITERATION, _FIXED, _LSQ = "iteration_ratio", "fixed", "lsq"

# What is to be reached: label, the result that it is read from, the figure, and its bound ("" where none is set).
GOALS: list[tuple[str, str, Callable[[dict[str, Any]], float], str]] = [
    ("{2,4} search, iteration, against plain", _PLAIN, _of(_PLAIN, _ITERATION), ">= 4.5"),
    ("its weight step", _PLAIN, _of(_PLAIN, "weight_step_ratio"), ">= 4"),
    ("its architecture step", _PLAIN, _of(_PLAIN, "architecture_step_ratio"), ">= 5"),
    ("{2,4} search, iteration, against plain-tuned", _TUNED, _of(_TUNED, _ITERATION), ">= 2"),
    ("memory of an iteration, plain over fused", _PLAIN, _of(_PLAIN, "memory_factor"), ">= 8"),
    ("host syncs in a step", _PLAIN, _worst_syncs, "<= 0"),
    ("{2,4,8} search, iteration, against plain", _EIGHT, _of(_EIGHT, _ITERATION), ">= 4"),
    ("full-precision PC-DARTS, iteration, against plain", _FLOAT, _of(_FLOAT, _ITERATION), ">= 2"),
    ("full-precision DARTS, iteration, against plain", "supernet_darts", _of("supernet_darts", _ITERATION), ""),
    ("second-order over first-order iteration", "supernet_second_order", _second_order, "<= 2.6"),
    ("quantised over float training step, time", "training_step", _training(_FIXED, "time_ratio"), "<= 1.35"),
    ("the same, activation memory", "training_step", _training(_FIXED, "saved_ratio"), "<= 0.6"),
    ("learned steps (LSQ) over float, time", "training_step", _training(_LSQ, "time_ratio"), ""),
    ("the same, activation memory", "training_step", _training(_LSQ, "saved_ratio"), ""),
    ("leaf ops of the fused weight step", _PLAIN, _leaf_ops("fused"), "<= 8000"),
    ("leaf ops of plain's weight step over the reference's 216,702", _PLAIN, _reference_share, ">= 0.95"),
    ("data pipeline's share of an iteration", _PLAIN, _of(_PLAIN, "data_share"), "<= 0.03"),
    ("start to first step (imports, data, build), slowest, seconds", "startup", _slowest_start("seconds"), "<= 6"),
    ("the same until that step is done", "startup", _slowest_start("done"), ""),
    ("ENAS child's step, against all five operations", "enas_step", _of("enas_step", "child_ratio"), ">= 3"),
    *((f"images per second, {pair}", "loaders", _loaders(pair), f">= {goal}") for pair, goal in loaders.GOALS.items()),
]


def verdict(value: float, bound: str) -> str:
    """Whether a figure keeps a bound such as ">= 4" ("": nothing to keep)."""
    if not bound:
        return ""
    sign, limit = bound.split()
    kept = value >= float(limit) if sign == ">=" else value <= float(limit)
    return "reached" if kept else "missed"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or say by the exit code whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    args = parser.parse_args(argv)
    if args.check:
        return int(
            any(render(page.read_text(encoding="utf-8"), load()) != page.read_text(encoding="utf-8") for page in PAGES)
        )
    write()
    return 0


def load() -> dict[str, Any]:
    """All results, by file name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def write() -> None:
    """Bring the pages' tables up to date."""
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8"), load()), encoding="utf-8")


def render(text: str, results: dict[str, Any]) -> str:
    """The page with its tables from these results. Raises ValueError for a table that nothing makes."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{figures(match[2], results)}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def figures(name: str, results: dict[str, Any]) -> str:
    """One table, or that it is not measured yet."""
    if name in ("summary", "speed"):
        return summary(results) if name == "summary" else speed(results)
    tables = {
        "training_step": training_step.table,
        "startup": startup.table,
        "features": features.table,
        "scaling": scaling.table,
        "data_pipeline": data_pipeline.table,
        "kernels": kernels.table,
        "enas_step": enas_step.table,
        "loaders": loaders.table,
        "ranks": ranks.table,
        "fast_preset_quickstart": fast_preset.table,
    }
    if not name.startswith("supernet_") and name not in tables:
        raise ValueError(f"docs/performance.md: no benchmark makes the figures {name!r}")
    if name not in results:
        return _NOT_YET
    result = results[name]
    return f"{tables.get(name, supernet_step.table)(result)}\n\n{provenance(result)}"


def summary(results: dict[str, Any]) -> str:
    """What is to be reached against what was measured."""
    rows = ["| what | goal | measured | |", "| --- | ---: | ---: | --- |"]
    for label, source, read, bound in GOALS:
        if source not in results:
            rows.append(f"| {label} | {bound} | - | not measured yet |")
            continue
        value = read(results)
        if value != value:  # taken before this figure was
            rows.append(f"| {label} | {bound} | - | not measured yet |")
            continue
        rows.append(f"| {label} | {bound} | {_number(value)} | {verdict(value, bound)} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def speed(results: dict[str, Any]) -> str:
    """README's table: the production supernet against the plain one."""
    settings = {_PLAIN: "{2, 4}", _EIGHT: "{2, 4, 8}", _FLOAT: "full precision"}
    rows = ["| PC-DARTS search, bits | iteration, CPU s | plain, CPU s | times faster | peak memory, times smaller |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    found = [name for name in settings if name in results]
    for name in found:
        result = results[name]
        fused, plain = (result["sides"][side]["iteration"] for side in ("fused", "plain"))
        ratios = f"{result['iteration_ratio']:.1f} | {result['memory_factor']:.1f}"
        rows.append(f"| {settings[name]} | {fused:.2f} | {plain:.2f} | {ratios} |")
    return "\n".join([*rows, "", provenance(results[found[0]])]) if found else _NOT_YET


def provenance(result: dict[str, Any]) -> str:
    """Where a result was taken."""
    where, with_ = result["machine"], result["versions"]
    memory = f", {where['memory_gib']:.0f} GiB" if "memory_gib" in where else ""
    found = ", ".join(f"{name} {version}" for name, version in with_.items())
    return f"*{where['cpu']}, {where['cores']} cores{memory}, load {where['load']} at the start; {found}.*"


if __name__ == "__main__":
    sys.exit(main())
