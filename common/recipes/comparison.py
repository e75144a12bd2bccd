# SPDX-License-Identifier: Apache-2.0
"""What evaluate.py compares: the backends of a run, of an export's folder, or of one exported file, on which images."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.engine.cli import Config
from common.export.formats import FORMATS
from common.export.runtimes import load_runner
from common.recipes.backends import (
    FAKE,
    FILES,
    FP32,
    Plan,
    Task,
    check_unchanged,
    compare,
    manifest_of,
    plan_of_folder,
    write_files,
)
from common.recipes.recorded import same_function
from common.recipes.setup import data_flags
from common.recipes.trained import load_trained


def evaluated_data(config: Config, trained: dict[str, Any], own: bool) -> dict[str, Any]:
    """Where the images lie: the training's places, unless the flags name others. `own`: the run's own images."""
    # Other images than the run's: what it says of its own does not matter.
    known = trained if own and not (config.trainfile or config.valfile) else {**trained, "data_module": None}
    found = data_flags(known, f"RUN {config.run}", data_module=config.data_module, workers=config.workers)
    del found["image_size"]
    if not own:
        found |= {"data": None, "trainfile": None, "valfile": None, "classes": None}
        found["dataset"] = config.dataset or trained["dataset"]
    if config.data is not None:
        found |= {"data": config.data, "trainfile": None, "valfile": None}
    if config.trainfile is not None or config.valfile is not None:
        # Nothing is trained here, so one file will do.
        either = config.valfile or config.trainfile
        files = {"trainfile": config.trainfile or either, "valfile": either}
        found |= {"dataset": "imagenet", "data": None, "data_module": None, **files}
    return found


def own_images(config: Config, trained: dict[str, Any]) -> bool:
    """Whether the flags leave it at the run's own images: executed is what the flag names, whatever the run says."""
    module = config.data_module
    return config.dataset is None and (module is None or same_function(module, trained.get("data_module")))


def compare_target(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """The table of backends of what TARGET names, those of `names` that --backends asks for.

    Raises ValueError naming the flag, the reason and the cure.
    """
    target, wanted = config.run, list(config.backends or names)
    if config.search_space is not None:
        from common.recipes.own_space import load_search_space

        load_search_space(config.search_space)
    if target.is_file():
        check_unchanged(target)
        load_runner(target)  # what cannot run is said before anything is timed
    run = _run_of(target)
    same = _same(config, run, target)
    with tempfile.TemporaryDirectory(prefix="qdarts-backends-") as scratch:
        if target.is_file():
            plan = Plan([Task(_name_of(target), str(target), **same)])
        elif run == target:
            plan = _plan_of_run(config, run, Path(scratch), wanted, same)
        else:
            plan = plan_of_folder(target, wanted, **same)
        if run is not None:
            checkpoint = None if config.checkpoint is None else str(config.checkpoint)
            trained = [name for name in (FP32, FAKE) if name in wanted]
            torch = [Task(name, str(run), **{**same, "checkpoint": checkpoint}) for name in trained]
            plan = Plan([*torch, *plan.tasks], plan.left_out)
        if not plan.tasks:
            known = ", ".join(FORMATS[name].file for name in FILES if name in FORMATS)
            raise ValueError(f"TARGET {target}: holds nothing to measure; export.py writes {known} there")
        found = compare(plan, say=lambda text: print(text, file=sys.stderr))
    return {"target": str(target), "run": None if run is None else str(run), **found}


def _run_of(target: Path) -> Path | None:
    """The run itself, or that which an export's record names and which is still there."""
    if (target / "config.json").is_file():
        return target
    if target.is_dir() and not any((target / form.file).is_file() for form in FORMATS.values()):
        raise ValueError(f"TARGET {target}: holds neither a run nor an exported file; give a folder that does")
    folder = target if target.is_dir() else target.parent
    known = manifest_of(folder).get("run")
    for run in (folder.parent, Path(known) if isinstance(known, str) else folder):
        if (run / "config.json").is_file() and _same_network(folder, run):
            return run
    return None


def _same_network(folder: Path, run: Path) -> bool:
    """Whether a folder's files were exported from the newest checkpoint of a run."""
    digest = manifest_of(folder).get("state_digest")
    return digest is not None and load_trained(run)[2]["state_digest"] == digest


def _same(config: Config, run: Path | None, target: Path) -> dict[str, Any]:
    """The fields that all tasks share: images, threads, how much is measured."""
    if run is not None:
        _, trained, info = load_trained(run, config.checkpoint if run == target else None)
        found = evaluated_data(config, trained, own_images(config, trained))
        found["image_size"] = info["data"]["image_size"]
    else:
        if config.dataset is None and config.data_module is None:
            raise ValueError(
                f"TARGET {target}: the run that it was exported from is not there; name its images by --dataset (and "
                "--data, or --data-module)"
            )
        none = {"dataset": config.dataset, "data_module": None, "classes": None}
        found = evaluated_data(config, none, own=False) | {"image_size": None}
        found["data_module"] = config.data_module
    data = {key: str(value) if isinstance(value, Path) else value for key, value in found.items()}
    own = None if config.search_space is None else str(config.search_space)
    threads = {"threads": config.threads, "seconds": config.seconds, "clock": config.clock}
    return {"data": data, "search_space": own, "images": config.images, **threads}


def _name_of(path: Path) -> str:
    """The format of an exported file."""
    known = [name for name, form in FORMATS.items() if form.file == path.name]
    return known[0] if known else load_runner(path).name


def _plan_of_run(config: Config, run: Path, scratch: Path, wanted: Sequence[str], same: dict[str, Any]) -> Plan:
    """A run's files: those that export.py has left in its folder, the others written for this once."""
    exported = run / "export"
    plan = Plan([])
    if config.checkpoint is None and exported.is_dir() and _same_network(exported, run):
        plan = plan_of_folder(exported, wanted, **same)
    there = {task.backend for task in plan.tasks} | plan.left_out.keys()
    missing = [name for name in FILES if name in wanted and name in FORMATS and name not in there]
    refused = {}
    if missing:
        places = {"data": config.data, "data_module": config.data_module, "checkpoint": config.checkpoint}
        refused = write_files(run, scratch, missing, say=lambda text: print(text, file=sys.stderr), **places)
    written = plan_of_folder(scratch, wanted, **same).tasks
    order = {name: position for position, name in enumerate(FILES)}
    tasks = sorted([*plan.tasks, *written], key=lambda task: order[task.backend])
    return Plan(tasks, {**plan.left_out, **refused})
