# SPDX-License-Identifier: Apache-2.0
"""TensorBoard: numbers, pictures and the table of runs, each once, whatever happened to the process in between."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.engine.run import Run

PAINTED = {0: (255, 0, 0), 1: (0, 255, 0), 2: (0, 0, 255)}


def begin(folder: Path, **changes: Any) -> Run:
    options: dict[str, Any] = {
        "method": "some",
        "stage": "search",
        "dataset": "digits",
        "seed": 2,
        "config": {"lr": 0.1, "bits": (2, 4), "none": None, "augment": False, "name": "x", "plots": True},
        "sources": {},
        "argv": [],
        "save": folder,
        "quiet": True,
    }
    return Run.open(**options | changes)


def paint(row: Any) -> dict[str, np.ndarray]:
    """A flat picture in the colour of its epoch; none of epoch 3."""
    if row["epoch"] not in PAINTED:
        return {}
    return {"choices": np.full((4, 6, 3), PAINTED[row["epoch"]], dtype=np.uint8)}


def one_epoch(run: Run, epoch: int) -> None:
    run.history({"loss": float(epoch)}, epoch=epoch)
    run.metrics({"epoch": epoch, "loss": epoch / 4}, step=10 * (epoch + 1))


def events(folder: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}, purge_orphaned_data=False)
    return found.Reload()


def colours(found: Any) -> list[tuple[int, tuple[int, ...]]]:
    pictures = [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in found.Images("choices")]
    assert all(picture.size == (6, 4) for _, picture in pictures)
    return [(step, picture.convert("RGB").getpixel((3, 2))) for step, picture in pictures]


@pytest.mark.parametrize("crash", [False, True])
def test_pictures_and_numbers_stand_once_each_in_order(tmp_path: Path, crash: bool) -> None:
    run = begin(tmp_path / "run")
    run.paint(paint)
    one_epoch(run, 0)
    if crash:
        run.checkpoints.save({"x": torch.zeros(1)}, step=10, epoch=1)
        one_epoch(run, 1)  # is lost with the process
        run.close()
        run = begin(tmp_path / "run", resume="auto")
        run.paint(paint)
    for epoch in (1, 2, 3):
        one_epoch(run, epoch)
    run.finish({"metrics": {"top1": 0.5}})
    found = events(tmp_path / "run")
    assert colours(found) == [(1, PAINTED[0]), (2, PAINTED[1]), (3, PAINTED[2])]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(10, 0.0), (20, 0.25), (30, 0.5), (40, 0.75)]
    assert [(e.step, e.value) for e in found.Scalars("final/top1")] == [(40, 0.5)]


def test_a_tensorboard_that_watches_forgets_what_was_lost(tmp_path: Path) -> None:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = begin(tmp_path / "run")
    one_epoch(run, 0)
    run.checkpoints.save({"x": torch.zeros(1)}, step=10, epoch=1)
    one_epoch(run, 1)
    run.close()
    watching = module.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in watching.Scalars("loss")] == [10, 20]
    with begin(tmp_path / "run", resume="auto") as run:
        one_epoch(run, 1)
        run.finish({})
    assert [event.step for event in watching.Reload().Scalars("loss")] == [10, 20]
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader").EventFileLoader
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    began = [event.step for event in loader(str(file)).Load() if event.session_log.status == event.session_log.START]
    assert began == [0]  # from which step on to forget


def test_the_table_has_the_flags_that_matter_and_the_final_figures(tmp_path: Path) -> None:
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    run = begin(tmp_path / "run")
    one_epoch(run, 0)
    final = {"metrics": {"top1": 0.5, "note": None}, "cost": {"bitops": 7}, "bits_mean": {"weight": 2.5}, "steps": 9}
    run.finish({**final, "stopped_early": True, "genotype": [1, 2], "train_command": "x"})
    content = events(tmp_path / "run").PluginTagToContent("hparams")
    started = plugin.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    flags = {key: getattr(value, value.WhichOneof("kind")) for key, value in started.hparams.items()}
    assert flags == {
        **{"method": "some", "stage": "search", "dataset": "digits", "seed": 2.0},
        **{"lr": 0.1, "bits": "2 4", "augment": False, "name": "x"},
    }  # neither what is not set nor what only says how a run is shown
    named = plugin.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    wanted = {"final/top1", "final/bitops", "final/bits_mean_weight", "final/steps"}
    assert {info.name.tag for info in named} == wanted


def test_a_run_killed_behind_its_last_checkpoint_has_its_events_all_the_same(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    one_epoch(run, 0)
    run.checkpoints.save({"x": torch.zeros(1)}, step=10, epoch=1)
    run.close()
    with begin(tmp_path / "run", resume="auto") as run:  # nothing is left to do but its end
        run.finish({"metrics": {"top1": 0.25}})
    found = events(tmp_path / "run")
    assert [e.step for e in found.Scalars("loss")] == [10] and found.Scalars("final/top1")[0].value == 0.25


def test_columns_are_open_until_the_first_row_and_then_kept_by_a_resume(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", tensorboard=False)
    assert run.columns is None
    one_epoch(run, 0)
    run.checkpoints.save({"x": torch.zeros(1)}, step=10, epoch=1)
    run.close()
    with begin(tmp_path / "run", tensorboard=False, resume="auto") as run:
        assert run.columns == ("step", "epoch", "loss")
