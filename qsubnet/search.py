#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Search the bits of every convolution of a fixed network (EdMIPS, CVPR 2020), weights and bits on one loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.engine import cli
from common.engine.cli import Config, Parser
from common.recipes.flags import add_plan_flags, resolve_bit_search, run_program
from common.recipes.presets import PRESETS

PROG = "qsubnet/search.py"
# Where a preset does less here than its own text says: there are no architecture steps to leave out.
ABOUT = {"fast": "half the epochs, bit logits at twice the rate: half the time; trainings are untouched"}


def make_parser() -> Parser:
    """The flags of a training's network and of a search's bits; defaults of EdMIPS, as QSubNet runs it on CIFAR-10."""
    parser = Parser(prog=PROG, description=__doc__)
    cli.add_data_flags(parser, "search")
    cli.add_model_flags(parser, "train")
    cli.add_quantization_flags(parser, "search")
    cli.add_bit_search_flags(parser)
    cli.add_optimization_flags(parser, "train")
    cli.add_run_flags(parser, "search")
    add_plan_flags(parser)
    portion = parser.find("--train-portion")
    portion.type, portion.help = cli.number(0.01, 1), "share of the training set that trains; the rest is only measured"
    parser.set_defaults(train_portion=1.0, epochs=50, batch_size=128, learning_rate=0.1, weight_decay=1e-4)
    parser.set_defaults(gamma_weight_decay=1e-4, complexity_decay=0.00335, lr_schedule="step", lr_step_epochs=15)
    parser.fix(gamma_level="lower", subset=1.0)
    return parser


def presets(parser: Parser) -> dict[str, dict[str, Any]]:
    """Every preset's search, on the network that the same preset trains."""
    flags, found = parser.dests(), {}
    for name, preset in PRESETS.items():
        size = {key: preset.train[key] for key in ("init_channels", "layers") if key in preset.train}
        kept = {key: value for key, value in {**preset.search, **size}.items() if key in flags}
        found[name] = {"about": ABOUT.get(name, preset.about), **kept}
    return found


def derive(config: Config) -> dict[str, Any]:
    """Drops of the learning rate at the same share of fewer epochs; the cells of the run whose weights are taken.

    What is searched is what will be trained: its size is the one that the shared recipe calls the evaluation network's.
    """
    sizes = {"eval_init_channels": config.init_channels, "eval_layers": config.layers}
    cells = {"arch": str(config.init_from)} if config.init_from is not None else {}
    return sizes | config.open_among({"lr_step_epochs": max(1, round(0.3 * config.epochs)), **cells})


def check(config: Config) -> list[str]:
    """Rules across the flags of a bit search."""
    errors = []
    if config.init_from is not None and not config.init_from.is_dir():
        errors.append(f"--init-from: {config.init_from} is no folder; give the folder of a finished training run")
    if config.explicit("bit_mapping"):
        errors.append("--bit-mapping: every convolution has bits of its own here, nothing is mapped; leave it out")
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say; the exit code."""
    parser = make_parser()
    given = sys.argv[1:] if argv is None else argv
    config = resolve_bit_search(parser, given, presets(parser), derive=[derive], validate=[check])

    def work() -> None:
        from common.recipes.search import run_search
        from qsubnet.prepare import prepare_subnet

        run_search(config, method="qsubnet", prepare=prepare_subnet)

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
