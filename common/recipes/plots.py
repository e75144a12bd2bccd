# SPDX-License-Identifier: Apache-2.0
"""A run's pictures in its folder: curves.svg, and a search's alphas.svg, gammas.svg, bits.svg; and TensorBoard's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.engine.files import write_bytes
from common.recipes.curves import draw_curves
from common.recipes.heatmaps import choice_images, heat_maps

if TYPE_CHECKING:
    from numpy import ndarray

    from common.engine.cli import Config
    from common.engine.run import Run

_IMAGES = 10  # epochs of a run that TensorBoard shows as pictures; each takes about a second to draw


def draw_plots(folder: Path) -> list[Path]:
    """Draw what the run has written so far, over older pictures; the files, curves first.

    Raises ValueError where there is nothing to draw yet or a file cannot be read, OSError where none can be written.
    """
    pictures = {"curves": draw_curves(folder)}
    if (folder / "history.jsonl").is_file():
        pictures |= heat_maps(folder)
    return [write_bytes(folder / f"{name}.svg", data) for name, data in pictures.items()]


def plot_run(run: Run, config: Config) -> None:
    """`draw_plots` at the end of a run, unless --no-plots; a run of hours does not fail for its pictures."""
    from common.engine import distributed

    if not getattr(config, "plots", False) or not distributed.is_main():
        return
    try:
        for path in draw_plots(run.folder):
            run.artefact(path.stem, path)
    except (ValueError, ImportError, OSError) as error:
        run.log(f"no curves: {error}")


def show_choices(run: Run, config: Config) -> None:
    """Let TensorBoard show a search's choices (alphas, gammas, cells) at some epochs, unless --no-plots."""
    if not getattr(config, "plots", False):
        return
    every = -(-config.epochs // _IMAGES)

    def paint(row: Mapping[str, Any]) -> dict[str, ndarray]:
        done = row["epoch"] + 1
        if done % every and done != config.epochs and done != 1:
            return {}
        try:
            return epoch_images(row, run.folder)
        except (ValueError, ImportError) as error:
            run.log(f"no picture of epoch {done}: {error}")
            return {}

    run.paint(paint)


def epoch_images(row: Mapping[str, Any], folder: Path) -> dict[str, ndarray]:
    """An epoch's choices as RGB, uint8 [height, width, 3], by name. Raises ValueError for a row without cells."""
    from common.recipes.chosen import choice_of
    from common.recipes.pictures import cells_rgb

    choice = choice_of(row, folder)
    title = f"epoch {row['epoch'] + 1}" + (f": the best of {choice.sampled} samples" if choice.sampled else "")
    cells = cells_rgb(choice.architecture, title=title, margins=choice.margins)
    return {**choice_images(row), "cells": cells}
