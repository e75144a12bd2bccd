#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a network at the bits that search.py found for each of its convolutions (--arch RUN)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Config
from common.recipes.flags import brings_bits, resolve_training, run_program, training_parser

PROG = "qsubnet/train.py"


def check_bits(config: Config) -> list[str]:
    """What is trained has the bits that were found for it."""
    if brings_bits(config) is not False:
        return []
    return [
        f"--arch: {config.arch} brings no bits; give the folder of a run of qsubnet/search.py, or --wbits B --abits B"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    given = sys.argv[1:] if argv is None else argv
    config = resolve_training(training_parser(PROG, __doc__), given, validate=[check_bits])

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="qsubnet")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
