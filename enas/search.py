#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search micro cells of quantised layers: a controller samples them, children share their weights (ENAS, ICML 2018)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import run_program
from enas.flags import make_parser, resolve

PROG = "enas/search.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say; the exit code."""
    config = resolve(make_parser(PROG, __doc__, "search"), sys.argv[1:] if argv is None else argv, "search")

    def work() -> None:
        from enas.recipe import run_search

        run_search(config)

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
