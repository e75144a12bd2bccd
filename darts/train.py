#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a cell in full precision: one that search.py found (--arch RUN), or a named one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Config, Parser
from common.recipes.flags import brings_bits, resolve_training, run_program, training_parser
from darts.presets import PRESETS

PROG = "darts/train.py"
DROP_PATH = {"darts": 0.2, "pc-darts": 0.3}


def make_parser() -> Parser:
    """The flags, with the recipe of DARTS's authors: auxiliary head and cutout, as their commands pass both."""
    parser = training_parser(PROG, __doc__)
    parser.set_defaults(arch="DARTS_V2", auxiliary=True, cutout=True, drop_path_prob=DROP_PATH["darts"])
    return parser


def recipe_of_architecture(config: Config) -> dict[str, Any]:
    """PC-DARTS drops more paths, where nobody said otherwise."""
    from common.nets import load_architecture

    try:
        architecture = load_architecture(config.arch)
    except (ValueError, OSError):
        return {}  # the flags' check says what is wrong
    partial = architecture.search.get("supernet") == "pc-darts" or "PC_DARTS" in (architecture.name or "")
    return config.open_among({"drop_path_prob": DROP_PATH["pc-darts"]}) if partial else {}


def check_full_precision(config: Config) -> list[str]:
    """Bits that an architecture brings are another method's; those that are asked for are trained."""
    if not brings_bits(config):
        return []
    return [
        f"--arch: {config.arch} brings bits, and this trains in full precision; add --wbits 32 --abits 32, or "
        "train it at its bits by qdarts/train.py"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    given = sys.argv[1:] if argv is None else argv
    config = resolve_training(
        make_parser(), given, PRESETS, derive=[recipe_of_architecture], validate=[check_full_precision]
    )

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="darts")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
