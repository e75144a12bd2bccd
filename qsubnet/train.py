#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a network at the bits that search.py found for each of its convolutions (--arch RUN)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import resolve_training, run_program, training_parser

PROG = "qsubnet/train.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    config = resolve_training(training_parser(PROG, __doc__), sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="qsubnet")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
