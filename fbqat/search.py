#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search the full-precision cells that are trained at fixed bits: PC-DARTS (ICLR 2020), or DARTS."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.recipes.flags import full_precision_search_parser, resolve_search, run_program

PROG = "fbqat/search.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say; the exit code."""
    config = resolve_search(full_precision_search_parser(PROG, __doc__), sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from common.recipes.search import SearchHooks, run_search

        run_search(config, method="fbqat", hooks=SearchHooks(train_flags=("--fixed_bit", "4")))

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
