#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained run on data: loss, top-1, top-5, cost, and a table of classes.

Without further flags it uses the run's own data and test set, and gives the figures of its result.json. Data of one's
own need --data-module again: a Python file is not executed because a run names it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.engine.cli import Config, Parser, add_run_argument, choice, integer
from common.recipes.flags import run_program

PROG = "evaluate.py"


def parser() -> Parser:
    """The flags."""
    parser = Parser(prog=PROG, description=__doc__, usage="%(prog)s RUN [flags]")
    add_run_argument(parser, help="a training run's folder")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FOLDER", help="one of its checkpoints (default: the newest valid one)")
    add("--dataset", "--set", metavar="NAME", help="other data of as many classes (default: the run's own)")
    add("--data", type=Path, metavar="DIR", help="where the data lie (default: as in the run)")
    add(
        "--trainfile", type=Path, metavar="X.ffcv", help="ImageNet's FFCV files in place of --data (default: the run's)"
    )
    add("--valfile", type=Path, metavar="Y.ffcv", help="as above; the file that is tested on")
    add("--workers", "-j", type=integer(0), metavar="N", help="threads that decode ImageNet (default: one a core)")
    add("--data-module", metavar="FILE.py:FUNCTION", help="data of your own, also where the run names them")
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own that the network holds")
    add("--split", type=choice("test", "val"), default="test", metavar="test|val", help="val: the held-out part")
    add("--device", type=choice("auto", "cpu", "cuda"), default="auto", metavar="auto|cpu|cuda", help="where")
    add("--threads", type=integer(1), metavar="N", help="CPU threads of torch (default: torch's choice)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def evaluate(config: Config) -> dict[str, Any]:
    """The figures as one JSON object. Raises ValueError for what does not fit."""
    from common.cost import network_cost
    from common.data import hold_out
    from common.recipes.recorded import same_function
    from common.recipes.setup import load_data, prepare_torch
    from common.recipes.trained import evaluate_split, load_trained

    if config.run is None:
        raise ValueError("RUN: is missing; give the folder of a training run")
    device = prepare_torch(config)
    if config.search_space is not None:
        from common.recipes.own_space import load_search_space

        load_search_space(config.search_space)
    network, trained, info = load_trained(config.run, config.checkpoint)
    build, size = info["build"], info["data"]["image_size"]
    check_places(config)
    # The run's own data: executed is what the flag names, whatever the run's record says.
    module = config.data_module
    own = config.dataset is None and (module is None or same_function(module, trained.get("data_module")))
    data = load_data(argparse.Namespace(**_data_flags(config, trained, own), image_size=size), _aside)
    for key, found in (("num_classes", data.info.num_classes), ("in_channels", data.info.channels)):
        if build[key] != found:
            raise ValueError(
                f"--dataset {data.info.name}: has {key} {found}, the network {build[key]}; give other data"
            )
    split, indices = data.test, None
    if config.split == "val":
        if not own or not trained["val_fraction"]:
            raise ValueError("--split val: this run held nothing out of its training set; use --split test")
        if config.valfile is not None and config.trainfile is None:
            raise ValueError("--split val: is a part of the training images; give --trainfile, or neither file")
        split, indices = data.train, hold_out(data.train.labels, trained["val_fraction"], trained["seed"])[1]
    network.to(device)
    found = evaluate_split(network, split.to(device), data.info, trained["precision"], indices)
    counts = zip(data.info.classes, found.pop("per_class"), strict=True)
    return {
        "run": str(config.run),
        "checkpoint": info["checkpoint"],
        "epoch": info["epoch"],
        "dataset": data.info.name,
        "split": config.split,
        **found,
        "cost": network_cost(network, size).to_json(),
        "per_class": [{"class": name, "n": n, "correct": correct} for name, (n, correct) in counts],
    }


def check_places(config: Config) -> None:
    """Raise ValueError where the flags name two places for the images, or the wrong file of the two."""
    files = [flag for flag in ("trainfile", "valfile") if getattr(config, flag) is not None]
    if files and config.data is not None:
        raise ValueError(f"--data: the images are in one place; drop it or --{files[0]}")
    if files == ["trainfile"] and config.split == "test":
        raise ValueError("--trainfile: tested is --valfile; give that (or --split val for the held-out part)")


def _aside(text: str) -> None:
    print(text, file=sys.stderr)


def _data_flags(config: Config, trained: dict[str, Any], own: bool) -> dict[str, Any]:
    """Where the images lie: the training's places, unless the flags name others."""
    from common.recipes.setup import data_flags

    # Other images than the run's: what it says of its own does not matter.
    known = trained if own and not (config.trainfile or config.valfile) else {**trained, "data_module": None}
    found = data_flags(known, f"RUN {config.run}", data_module=config.data_module, workers=config.workers)
    del found["image_size"]
    if not own:
        found |= {"data": None, "trainfile": None, "valfile": None, "classes": None}
        found["dataset"] = config.dataset or trained["dataset"]
    if config.data is not None:
        found |= {"data": config.data, "trainfile": None, "valfile": None}
    if config.trainfile is not None or config.valfile is not None:
        # Nothing is trained here, so one file will do.
        either = config.valfile or config.trainfile
        files = {"trainfile": config.trainfile or either, "valfile": either}
        found |= {"dataset": "imagenet", "data": None, "data_module": None, **files}
    return found


def text(found: dict[str, Any]) -> str:
    """The figures as tables."""
    cost = found["cost"]
    lines = [
        f"{found['run']}, epoch {found['epoch']}, on {found['dataset']} ({found['split']}, {found['n']:,} images)",
        f"loss   {found['loss']:.4f}",
        f"top-1  {100 * found['top1']:.2f}%  ({found['correct']} of {found['n']})",
        f"top-5  {100 * found['top5']:.2f}%",
        "",
        f"parameters        {cost['parameters']:>16,}",
        f"MACs              {cost['macs']:>16,}",
        f"BitOps            {cost['bitops']:>16,}",
        f"  quantised layers{cost['bitops_quantized']:>16,}",
        f"  paper's count   {cost['bitops_paper']:>16,.0f}",
        f"weights, bytes    {cost['weight_bytes']:>16,.0f}  (fp32 {cost['weight_bytes_fp32']:,})",
        f"activations, bytes{cost['activation_bytes']:>16,.0f}",
        "",
        f"{'class':<24}{'n':>8}{'correct':>9}{'top-1':>9}",
    ]
    for row in found["per_class"]:
        share = f"{100 * row['correct'] / row['n']:.2f}%" if row["n"] else "-"
        lines.append(f"{row['class']:<24}{row['n']:>8}{row['correct']:>9}{share:>9}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; the exit code."""
    config = parser().parse_args(argv)

    def work() -> None:
        from common.engine.distributed import is_main

        found = evaluate(config)
        if is_main():
            print(json.dumps(found, indent=2) if config.json else text(found))

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
