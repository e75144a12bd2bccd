# SPDX-License-Identifier: Apache-2.0
"""Every program that makes runs, as small as it goes: seconds each on digits, without a download.

`{trained}` stands for a finished full-precision training of PC_DARTS of that size (`TRAINED`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

COMMON = ("--device", "cpu", "--no-tensorboard", "--threads", "1")
SMOKE = ("--preset", "smoke", *COMMON)
CELLS = ("--nodes", "2", "--multiplier", "2")
TRAINED = ("ptq/train.py", *SMOKE, "--arch", "PC_DARTS", "--epochs", "1")
ENAS = (*SMOKE, "--blocks", "2", "--steps-per-epoch", "2", "--no-epoch-test")
ENAS_SEARCH = (*ENAS, "--controller-num-aggregate", "2", "--controller-train-steps", "2")
ARC = "0 2 1 4 1 0 2 1  1 3 1 4 0 1 1 1"

RUNS: dict[str, tuple[str, ...]] = {
    "qdarts search": ("qdarts/search.py", *SMOKE, *CELLS, "--target-bitops", "0.032G"),
    "qdarts train": ("qdarts/train.py", *SMOKE, "--arch", "PC_DARTS", "--wbits", "4", "--abits", "4"),
    "darts search": ("darts/search.py", *SMOKE, *CELLS, "--beta-decay", "5"),
    "darts train": ("darts/train.py", *SMOKE, "--arch", "DARTS", "--drop-path-prob", "0.3"),
    "fbqat search": ("fbqat/search.py", *SMOKE, *CELLS),
    "fbqat train": (
        *("fbqat/train.py", *SMOKE, "--arch", "PC_DARTS", "--fixed-bit", "4", "--teacher", "{trained}"),
        *("--weight-quantizer", "lsq", "--activation-quantizer", "lsq"),
    ),
    "qsubnet search": ("qsubnet/search.py", *SMOKE, "--init-from", "{trained}"),
    "qsubnet train": ("qsubnet/train.py", *SMOKE, "--arch", "PC_DARTS", "--wbits", "2", "--abits", "4"),
    "ptq search": ("ptq/search.py", *SMOKE, *CELLS),
    "ptq train": ("ptq/train.py", *SMOKE, "--arch", "PC_DARTS", "--val-fraction", "0.2", "--select", "val"),
    "ptq quantize": ("ptq/quantize.py", "{trained}", *COMMON[:2], *COMMON[3:], "--n-sample", "2", "--batch-size", "16"),
    "enas search": ("enas/search.py", *ENAS_SEARCH),
    "enas train": ("enas/train.py", *ENAS, "--fixed-arc", ARC, "--keep-prob", "0.8"),
}


def argv_of(name: str, *more: str, trained: Path | None = None) -> tuple[str, list[str]]:
    """(program, its command line) of one of RUNS."""
    program, *words = RUNS[name]
    return program, [str(trained) if word == "{trained}" else word for word in words] + [*more]


def call(program: str, argv: list[str]) -> tuple[int, str]:
    """Run a program's main in this process: its exit code, and what it said."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = module.main(argv)
    return code, said.getvalue()
