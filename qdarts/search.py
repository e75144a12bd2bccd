#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search cells and bit-widths together (nablaQDARTS, TMLR 2025), on the training set of a data set of images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import resolve_search, run_program, search_parser

PROG = "qdarts/search.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say; the exit code."""
    config = resolve_search(search_parser(PROG, __doc__), sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from common.recipes.search import run_search

        run_search(config, method="qdarts")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
