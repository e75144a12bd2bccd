# SPDX-License-Identifier: Apache-2.0
"""The two parts of the training set that a search sees, and their record in its run folder."""

from __future__ import annotations

import json

from torch import Tensor

from common.data import sample_parts, split_search
from common.engine import Run, distributed, read_json
from common.engine.cli import Config
from common.engine.files import write_bytes

NAME = "search_parts.json"
Parts = tuple[Tensor, Tensor]
"""Indices (int64, sorted) of the images that train the weights, and of those that train or measure the architecture."""


def search_parts(config: Config, labels: Tensor) -> Parts:
    """As --search-fraction says, or --train-portion with --subset. Raises ValueError naming the flag."""
    if config.search_fraction is None:
        return split_search(labels, config.train_portion, config.seed, config.subset)
    train, valid = config.search_fraction
    return sample_parts(labels, (train, valid), config.seed)


def parts_text(config: Config, parts: Parts | None) -> str:
    """What a search sees of the training set, in words."""
    if config.search_fraction is not None and parts is not None:
        train, valid = config.search_fraction
        return (
            f"{len(parts[0]):,} ({train:.3g} of each class) for weights, {len(parts[1]):,} ({valid:.3g}) for the rest"
        )
    seen = "" if config.subset == 1 else f"of which {config.subset:.0%} are seen: "
    return f"{seen}{config.train_portion:.0%} for weights, the rest for the architecture"


def save_parts(run: Run, parts: Parts) -> None:
    """Write the parts into the run's folder. Raises ValueError when a resumed run began with others."""
    path = run.folder / NAME
    train, valid = (part.tolist() for part in parts)
    if path.is_file() and run.resumed_step is not None:
        saved = read_json(path)
        if not isinstance(saved, dict) or (saved.get("train"), saved.get("valid")) != (train, valid):
            raise ValueError(f"--resume: {path} names other images than these data give; resume with the same data")
    if distributed.is_main():
        text = json.dumps({"train": train, "valid": valid}, separators=(",", ":"))
        write_bytes(path, (text + "\n").encode())
    run.artefact("search_parts", path)
