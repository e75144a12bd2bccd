#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Quantise a finished full-precision training without further training: calibrate on training images, then test."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine.cli import Config, Parser, Switch, add_run_argument, choice, integer, number, one_of, resolve
from common.recipes.flags import check_search_space, derive_search_space, run_program

PROG = "ptq/quantize.py"
OPTIMAL = ("mse", "percentile")  # beside the four of the paper's baseline


def parser() -> Parser:
    """The flags."""
    parser = Parser(prog=PROG, description=__doc__, usage="%(prog)s RUN [flags]")
    add_run_argument(parser, help="the folder of a finished full-precision training")
    add, bits, end = parser.group("quantisation").add_argument, one_of(2, 3, 4, 8, 32), one_of(2, 3, 4, 8, 32)
    add(
        "--param-bits", type=bits, nargs="+", default=[8], metavar="B", help="bits of the weights; several: all at once"
    )
    add(
        "--fwd-bits",
        type=bits,
        nargs="+",
        default=[8],
        metavar="B",
        help="bits of the layers' inputs, pairwise with it",
    )
    methods = "mse|percentile|linear|minmax|log|tanh"
    add("--quant-method", type=choice(*methods.split("|")), default="mse", metavar=methods, help="how a grid is fixed")
    rate = "share of the values beyond the grid (default: .001 with percentile, else 0)"
    add("--overflow-rate", type=number(0, 0.5), metavar="R", help=rate)
    add(
        "--bn-bits",
        type=integer(2, 16),
        metavar="N",
        help="quantise the normalisations' tensors instead of folding them",
    )
    correction = "let the biases take up the mean error (default: with mse and percentile, where folded)"
    add("--bias-correction", action=Switch, default=None, help=correction)
    add("--stem-bits", type=end, default=32, metavar="B", help="bits of the stem")
    add("--classifier-bits", type=end, default=32, metavar="B", help="bits of the classifier")
    add = parser.group("calibration").add_argument
    add("--n-sample", type=integer(1), default=10, metavar="N", help="batches of training images")
    add("--batch-size", "-b", type=integer(1), default=96, metavar="N", help="images in each")
    add("--seed", type=integer(0), metavar="N", help="of their draw (default: the training's)")
    add("--data", type=Path, metavar="DIR", help="where the data lie (default: as in the training)")
    own = "data of your own that it was trained on; a record's own word executes no file"
    add("--data-module", metavar="FILE.py:FUNCTION", help=own)
    add = parser.group("run").add_argument
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own that the network holds")
    parser.fix(search_space_digest=None)
    add("--device", type=choice("auto", "cpu", "cuda"), default="auto", metavar="auto|cpu|cuda", help="where")
    add("--threads", type=integer(1), metavar="N", help="CPU threads of torch (default: torch's choice)")
    add(
        "--save",
        type=Path,
        metavar="DIR",
        help="the run's folder; with several widths DIR/w2a2 ... (default: new ones)",
    )
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where new run folders are made")
    add("--resume", nargs="?", const="auto", metavar="auto", help="auto: pass over what is finished")
    add("--print-config", action="store_true", help="show every value and its source, and exit")
    parser.refuse("a quantisation starts over, so nothing of other flags is left; give --save", "--allow-config-change")
    parser.refuse("the network is tested as its training computes, few batches; leave it out", "--precision")
    parser.refuse("a few batches are over before anything is compiled; leave it out", "--compile")
    parser.refuse("layers are observed one by one, whatever lies in memory; leave it out", "--channels-last")
    parser.refuse("nothing is differentiated, so nothing is kept for it; leave it out", "--checkpoint-cells")
    parser.ignore("quantising is all that this program does", "--do-quant")
    parser.ignore("--device chooses", "--gpu")
    parser.ignore(
        "it is taken from the training", "--arch", "--init-channels", "--layers", "--model-path", "--auxiliary"
    )
    return parser


def derive(config: Config) -> dict[str, Any]:
    """What follows from the method, where it was not given."""
    found: dict[str, Any] = {}
    if config.overflow_rate is None:
        found["overflow_rate"] = 0.001 if config.quant_method == "percentile" else 0.0
    if config.bias_correction is None:
        found["bias_correction"] = config.quant_method in OPTIMAL and config.bn_bits is None
    return found


def check(config: Config) -> list[str]:
    """Rules across flags."""
    errors = []
    if config.bias_correction and config.bn_bits is not None:
        errors.append("--bias-correction: needs folded normalisations, and --bn-bits keeps them; drop one of the two")
    if config.overflow_rate and config.quant_method not in ("percentile", "linear"):
        errors.append(f"--overflow-rate: {config.quant_method} has none; use percentile or linear, or leave it out")
    if config.resume not in (None, "auto"):
        errors.append(f"--resume: {config.resume!r} is not auto; a quantisation starts over, or is finished")
    return errors


def resolved(argv: Sequence[str]) -> Config:
    """The flags, checked; every error is reported at once (exit code 2)."""
    rules = {"derive": [derive_search_space, derive], "validate": [check_search_space, check]}
    return resolve(parser(), argv, **rules)


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise as the flags say; the exit code."""
    config = resolved(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        from ptq.post_training import run_post_training

        run_post_training(config, method="ptq")

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
