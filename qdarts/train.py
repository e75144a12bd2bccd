#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train an architecture: one that search.py found (--arch RUN), a named one, or one at uniform bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import resolve_training, run_program, training_parser

PROG = "qdarts/train.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    config = resolve_training(training_parser(PROG, __doc__), sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="qdarts")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
