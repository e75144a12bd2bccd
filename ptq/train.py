#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the full-precision network that quantize.py quantises: what search.py found (--arch RUN), or a named one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Parser
from common.recipes.flags import resolve_training, run_program, training_parser

PROG = "ptq/train.py"


def parser() -> Parser:
    """The flags of every training; full precision unless bits are given, whatever bits the architecture has."""
    parser = training_parser(PROG, __doc__ or "")
    parser.set_defaults(wbits=32, abits=32)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    config = resolve_training(parser(), sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="ptq")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
