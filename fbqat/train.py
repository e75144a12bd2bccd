#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train any architecture at fixed, uniform bits (--fixed_bit), from scratch or from a trained run (--init-from)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Config
from common.recipes.flags import resolve_training, run_program, training_parser

PROG = "fbqat/train.py"


def derive_cells(config: Config) -> dict[str, Any]:
    """The cells of the run whose weights are taken, where --arch names no others."""
    return {"arch": str(config.init_from)} if config.init_from and not config.explicit("arch") else {}


def check_bits(config: Config) -> list[str]:
    """Bits must be given: the architecture's own are another method's."""
    if config.wbits is not None or config.abits is not None:
        return []
    return ["--fixed-bit: this method trains at uniform bits; give --fixed_bit 2 or 4, or --wbits B --abits B"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    config = resolve_training(
        training_parser(PROG, __doc__),
        sys.argv[1:] if argv is None else argv,
        derive=[derive_cells],
        validate=[check_bits],
    )

    def work() -> None:
        from common.recipes.train import run_training

        run_training(config, method="fbqat")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
