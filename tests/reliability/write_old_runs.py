# SPDX-License-Identifier: Apache-2.0
"""Writes tests/oracles/old_runs/schema-N.tar.xz: tiny runs of every kind, as this version leaves them.

    PYTHONPATH=. python tests/reliability/write_old_runs.py

To be run once for each schema, by the last version that writes it; the archive is never written again, so that later
versions are held to what earlier ones left. Needs digits alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.engine.folders import SCHEMA
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.search import run_search
from common.recipes.train import run_training
from tests.helpers.smoke_runs import RUNS, TRAINED, call

FOLDER = Path(__file__).resolve().parents[1] / "oracles" / "old_runs"
STOPPED = {"search": 3, "train": 4, "enas-search": 4, "enas-train": 2}
"""Runs that were stopped after so many steps, each of which left a checkpoint."""
EVERY_STEP = ("--checkpoint-minutes", "1e-9")
FLAGS = {
    "search": (*RUNS["qdarts search"][1:], "--layers", "3", *EVERY_STEP),
    "train": (*RUNS["qdarts train"][1:], *EVERY_STEP),
    "trained": TRAINED[1:],
    "quantized": ("trained", *RUNS["ptq quantize"][2:]),
    "enas-search": (*RUNS["enas search"][1:], "--blocks", "1", "--no-auxiliary", *EVERY_STEP),
    "enas-train": (*RUNS["enas train"][1:], "--no-auxiliary", *EVERY_STEP),
}


class Stop(Exception):
    """Stands for a crash."""


def start(name: str, *more: str, on_step: Callable[[int], None] | None = None) -> None:
    """One of FLAGS in the folder `name` of the working folder."""
    argv = [*FLAGS[name], "--save", name, *more]
    if name == "search":
        run_search(resolve_search(search_parser("", ""), argv), method="qdarts", on_step=on_step)
    elif name == "train":
        run_training(resolve_training(training_parser("", ""), argv), method="qdarts", on_step=on_step)
    elif name.startswith("enas"):
        stage = name.partition("-")[2]
        flags, recipe = importlib.import_module("enas.flags"), importlib.import_module("enas.recipe")
        config = flags.resolve(flags.make_parser("", "", stage), argv, stage)
        getattr(recipe, {"search": "run_search", "train": "run_training"}[stage])(config, on_step=on_step)
    else:
        code, said = call({"trained": TRAINED[0], "quantized": "ptq/quantize.py"}[name], argv)
        assert code == 0, said


def write() -> Path:
    """Make the runs in a folder of their own and pack them."""
    path = FOLDER / f"schema-{SCHEMA}.tar.xz"
    assert not path.exists(), f"{path} is there: old runs are not written again"
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        for name in FLAGS:
            with contextlib.suppress(Stop):
                start(name, on_step=_stop_after(STOPPED.get(name)))
            _slim(Path(name))
        os.chdir(before)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:xz") as tar:
            for name in FLAGS:
                tar.add(Path(made) / name, name)
    return path


def _stop_after(last: int | None) -> Callable[[int], None]:
    def on_step(step: int) -> None:
        if step == last:
            raise Stop

    return on_step


def _slim(run: Path) -> None:
    """Only what a later version reads, and nothing of the machine."""
    for path in run.iterdir():
        if path.suffix in (".svg", ".png") or path.name == "log.txt":
            path.unlink()
    steps = sorted((run / "checkpoints").iterdir())
    for old in steps[:-1]:
        shutil.rmtree(old)
    record = json.loads((run / "config.json").read_text())
    for part in (record, *record["sessions"]):
        part |= {"argv": [], "cwd": ".", "device": {}}
    (run / "config.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    print(write())
