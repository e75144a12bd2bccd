#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search cells in full precision: DARTS (ICLR 2019), first or second order, or PC-DARTS (ICLR 2020)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Config, Parser, Switch, integer, number
from common.recipes.flags import full_precision_search_parser, resolve_search, run_program
from darts.presets import FAST, PRESETS

PROG = "darts/search.py"

# The authors' own recipes on CIFAR-10; PC-DARTS's are the parser's defaults but for what DARTS sets here.
DARTS = {
    "batch_size": 64,
    "learning_rate": 0.025,
    "learning_rate_min": 0.001,
    "arch_learning_rate": 3e-4,
    "warmup_epochs": 0,
}
PC_DARTS = {
    "batch_size": 256,
    "learning_rate": 0.1,
    "learning_rate_min": 0.0,
    "arch_learning_rate": 6e-4,
    "warmup_epochs": 15,
}


def make_parser() -> Parser:
    """The flags, with the defaults of DARTS."""
    parser = full_precision_search_parser(PROG, __doc__)
    parser.set_defaults(method="darts", second_order="finite-difference", **DARTS)
    add = parser.group("collapse").add_argument
    watch = "log the dominant eigenvalue of the validation loss's Hessian in alpha after every epoch"
    add("--track-eigenvalue", action=Switch, default=False, help=watch)
    skips = "stop after the first epoch of architecture steps whose normal cell has N skip connections (DARTS+)"
    add("--early-stop-skips", type=integer(1), metavar="N", help=skips)
    decay = "beta-DARTS: weight of Beta-Decay at the end, rising from 0 (the authors: 50)"
    add("--beta-decay", type=number(0), default=0.0, metavar="W", help=decay)
    return parser


def recipe_of_method(config: Config) -> dict[str, Any]:
    """What --method PC-DARTS trains with, and what --preset fast makes of it, where nobody said otherwise."""
    recipe = PC_DARTS if config.method == "pc-darts" else {}
    return config.open_among(recipe | (FAST[config.method] if config.preset == "fast" else {}))


def check_eigenvalue(config: Config) -> list[str]:
    """The eigenvalue is a second derivative."""
    if not (config.track_eigenvalue and config.compile):
        return []
    return ["--track-eigenvalue: compiled code is not differentiated twice; drop it, or --compile"]


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say; the exit code."""
    given = sys.argv[1:] if argv is None else argv
    config = resolve_search(make_parser(), given, PRESETS, derive=[recipe_of_method], validate=[check_eigenvalue])

    def work() -> None:
        from common.recipes.search import run_search
        from darts.collapse import hooks_of

        run_search(config, method="darts", hooks=hooks_of(config))

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
