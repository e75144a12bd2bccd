#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train one architecture of micro cells: what search.py found (--arch RUN), or a string (--fixed_arc "0 2 1 ...")."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import run_program
from enas.flags import make_parser, resolve

PROG = "enas/train.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    config = resolve(make_parser(PROG, __doc__, "train"), sys.argv[1:] if argv is None else argv, "train")

    def work() -> None:
        from enas.recipe import run_training

        run_training(config)

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
