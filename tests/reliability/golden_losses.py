# SPDX-License-Identifier: Apache-2.0
"""The losses of the first 20 steps of every method on synthetic data, stored for a minor release of torch.

    python -m tests.reliability.golden_losses          # shows how far this machine is from what is stored
    python -m tests.reliability.golden_losses --write  # stores them for the torch that is installed

They are written anew only by a change that means to change what a method computes, and the commit says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.engine.search_loop import SearchLoop
from common.engine.train_loop import _Training
from enas.loop import ChildLoop
from tests.helpers.smoke_runs import TRAINED, argv_of, call

STEPS = 20
STORED = Path(__file__).parents[1] / "oracles" / "golden_losses.json"
DATA = ("--data-module", f"{Path(__file__).with_name('synthetic.py')}:make", "--image-size", "8", "--seed", "3")
LONG = (*DATA, "--epochs", "2", "--steps-per-epoch", "10", "--batch-size", "8")
# Where values are rounded to few levels, another order of additions moves some of them by a level, and two processors
# go apart: less at this rate.
SLOWLY = (*LONG, "--learning-rate", "0.002")
# name: (run of smoke_runs.RUNS, what it changes)
LOSSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qdarts search": ("qdarts search", (*SLOWLY, "--bits", "2", "4", "8", "--target-bitops", "8M")),
    "qdarts search, second order": ("qdarts search", (*SLOWLY, "--unrolled", "--target-bitops", "8M")),
    "qdarts train": ("qdarts train", SLOWLY),
    "darts search": ("darts search", (*LONG, "--method", "darts")),
    "darts search, finite difference": (
        "darts search",
        (*LONG, "--method", "darts", "--unrolled"),
    ),
    "pc-darts search": ("darts search", (*LONG, "--method", "pc-darts")),
    "darts train": ("darts train", LONG),
    "fbqat train": ("fbqat train", SLOWLY),
    "qsubnet search": ("qsubnet search", SLOWLY),
    "enas search": ("enas search", (*LONG, "--layer-bits", "ternary")),
    "enas train": ("enas train", LONG),
}
QUICK = ("darts search",)


@contextmanager
def noted() -> Iterator[list[float]]:
    """Within it, every step adds its loss: what was descended, before the step."""
    losses: list[float] = []
    plain = {SearchLoop: SearchLoop.one_step, _Training: _Training.objective, ChildLoop: ChildLoop._descend}

    def one_step(loop: SearchLoop) -> None:
        plain[SearchLoop](loop)
        losses.append(float(loop.train_objective.loss))

    def first(kind: type) -> Callable[..., Any]:
        def calling(*arguments: Any) -> Any:
            found = plain[kind](*arguments)
            losses.append(float(found[0]))
            return found

        return calling

    SearchLoop.one_step, _Training.objective = one_step, first(_Training)
    ChildLoop._descend = first(ChildLoop)
    try:
        yield losses
    finally:
        SearchLoop.one_step, _Training.objective = plain[SearchLoop], plain[_Training]
        ChildLoop._descend = plain[ChildLoop]


def losses_of(name: str, folder: Path) -> list[float]:
    """Run it; the losses of its steps. What it starts from is trained first."""
    run, flags = LOSSES[name]
    trained = folder / "trained"
    if run in ("fbqat train", "qsubnet search") and not trained.exists():
        code, said = call(TRAINED[0], [*TRAINED[1:], *DATA, "--save", str(trained)])
        assert code == 0, said
    program, argv = argv_of(run, *flags, "--save", str(folder / name.replace(" ", "-")), trained=trained)
    with noted() as losses:
        code, said = call(program, argv)
    assert code == 0, said
    assert len(losses) == STEPS, f"{name}: {len(losses)} steps"
    return losses


def minor() -> str:
    """The torch that is installed, as the stored losses are keyed: `2.15`."""
    return ".".join(torch.__version__.split(".")[:2])


def stored() -> dict[str, dict[str, list[float]]]:
    """minor of torch -> name -> losses."""
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def main() -> None:
    """Compute all of them; show or store them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses_of(name, Path(folder)) for name in LOSSES}
    before = stored().get(minor(), {})
    for name, losses in found.items():
        wanted = before.get(name)
        off = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)) if wanted else float("nan")
        print(f"{name:<34}{losses[0]:>10.4f} -> {losses[-1]:>8.4f}   {off:.1e} from what is stored")
    if "--write" in sys.argv:
        rounded = {name: [float(f"{loss:.7g}") for loss in losses] for name, losses in found.items()}
        STORED.write_text(json.dumps(stored() | {minor(): rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
