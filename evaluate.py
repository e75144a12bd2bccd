#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained run on data: loss, top-1, top-5, cost, classes. Or compare the backends that can run it.

Without further flags it uses the run's own data and test set, and gives the figures of its result.json. Data of one's
own need --data-module again: a Python file is not executed because a run names it.

    python evaluate.py RUN --backends            # torch, the packed engine, onnxruntime: accuracy, speed, memory, size
    python evaluate.py RUN/export                # the same for files that export.py has written and proved
    python evaluate.py RUN/export/network.onnx   # one of them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.engine.cli import Config, Parser, add_run_argument, choice, integer, number
from common.recipes.flags import run_program

PROG = "evaluate.py"
BACKENDS = ("fp32", "fake-quantised", "packed", "onnx-fp32", "onnx", "onnx-int8", "torch")


def parser() -> Parser:
    """The flags."""
    parser = Parser(prog=PROG, description=__doc__, usage="%(prog)s TARGET [flags]")
    add_run_argument(parser, help="a training run's folder; an exported file, or the folder of an export")
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
    compared = f"compare backends, of a run too: {', '.join(BACKENDS)} (none named: all)"
    add("--backends", nargs="*", type=choice(*BACKENDS), metavar="NAME", help=compared)
    add("--images", type=integer(1), metavar="N", help="with backends: test on the first N images (default: on all)")
    seconds = "with backends: seconds of timing for each batch size"
    add("--seconds", type=number(positive=True), default=10.0, metavar="S", help=seconds)
    clock = "with backends; cpu: processor time of one thread, on a machine that others use too"
    add("--clock", type=choice("wall", "cpu"), default="wall", metavar="wall|cpu", help=clock)
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def evaluate(config: Config) -> dict[str, Any]:
    """The figures as one JSON object. Raises ValueError for what does not fit."""
    from common.cost import network_cost
    from common.data import hold_out
    from common.recipes.comparison import evaluated_data, own_images
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
    own = own_images(config, trained)
    data = load_data(argparse.Namespace(**evaluated_data(config, trained, own), image_size=size), _aside)
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


def compares(config: Config) -> bool:
    """Whether the flags ask for the table of backends. Raises ValueError for flags that mean nothing there, or here."""
    target = config.run
    if target is not None and not target.exists():
        raise ValueError(f"TARGET {target}: is not there; give a run, an exported file, or the folder of an export")
    exported = target is not None and (target.is_file() or (target.is_dir() and not (target / "config.json").exists()))
    if config.backends is None and not exported:
        for flag in ("images", "seconds", "clock"):
            if config.explicit(flag):
                raise ValueError(f"--{flag}: only has a meaning with --backends, or for exported files; drop it")
        return False
    if config.split == "val" or config.device == "cuda":
        flag = "--split val" if config.split == "val" else "--device cuda"
        raise ValueError(f"{flag}: backends are compared on test images and on the CPU; drop it")
    if config.clock == "cpu" and config.threads != 1:
        raise ValueError("--clock cpu: adds up all threads; give --threads 1, or --clock wall")
    return True


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


def backends_text(found: dict[str, Any]) -> str:
    """The table of backends."""
    from common.recipes.backends import as_text

    return as_text(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say; the exit code."""
    config = parser().parse_args(argv)

    def work() -> None:
        from common.engine.distributed import is_main

        if compares(config):
            from common.recipes.comparison import compare_target

            check_places(config)
            found, show = compare_target(config, BACKENDS), backends_text
        else:
            found, show = evaluate(config), text
        if is_main():
            print(json.dumps(found, indent=2) if config.json else show(found))

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
