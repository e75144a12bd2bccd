# SPDX-License-Identifier: Apache-2.0
"""The ImageNet recipe: what --dataset imagenet means for flags that nobody set, and which flags name its images.

Imports no torch. Numbers: the ImageNet search and training of arXiv 1907.05737 (section 4.4), which NablaQDARTS takes
over; its batch on the same network for a search of bits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.engine.cli import Config

SEARCH: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 1024,
    "learning_rate": 0.5,
    "learning_rate_min": 0.0,
    "arch_learning_rate": 6e-3,
    "partial": 2,
    "eval_init_channels": 48,
    "eval_layers": 14,
    "search_fraction": [0.1, 0.025],
    "cutout": False,
}
TRAIN: dict[str, Any] = {
    "epochs": 250,
    "batch_size": 1024,
    "learning_rate": 0.5,
    "lr_schedule": "linear",
    "weight_decay": 3e-5,
    "init_channels": 48,
    "layers": 14,
    "auxiliary": True,
    "drop_path_prob": 0.0,
    "label_smoothing": 0.1,
    "cutout": False,
}
BITS: dict[str, Any] = {"batch_size": 1024, "init_channels": 48, "layers": 14, "cutout": False}
# Epochs that are shares of all: the rate's rise, and those before the architecture moves. (of how many, in how many)
RISE = {"search": (5, 50), "train": (5, 250)}
ARCH_WAITS = (35, 50)
_RECIPES = {"search": SEARCH, "train": TRAIN, "bits": BITS}
FILES = "ffcv: exact order; crops and flips not bit-reproducible"
FOLDER = "image files: bit-reproducible"


def is_imagenet(config: Config) -> bool:
    """Whether the flags name ImageNet; .ffcv files are always it."""
    return config.data_module is None and "".join(c for c in config.dataset.lower() if c.isalnum()) == "imagenet"


def derive_imagenet(config: Config, stage: str) -> dict[str, Any]:
    """What --trainfile, --valfile and --dataset imagenet say of the flags that nobody set.

    stage: "search", "train" or "bits" (a search of bits alone).
    """
    found: dict[str, Any] = {}
    if (config.trainfile or config.valfile) and not config.explicit("dataset"):
        found["dataset"] = config.dataset = "imagenet"
    if not is_imagenet(config):
        return found
    recipe = dict(_RECIPES[stage])
    if stage == "search" and config.method != "pc-darts":
        del recipe["partial"]
    if any(config.explicit(other) for other in ("train_portion", "subset") if hasattr(config, other)):
        recipe.pop("search_fraction", None)
    recipe |= {"workers": free_cores()}
    found |= config.open_among(recipe)
    epochs = found.get("epochs", config.epochs)
    if stage in RISE:
        found |= config.open_among({"lr_warmup_epochs": _share(epochs, *RISE[stage])})
    if stage == "search":
        found |= config.open_among({"warmup_epochs": min(_share(epochs, *ARCH_WAITS), epochs - 1)})
    return found | {"reading": FILES if config.trainfile else FOLDER}


def _share(epochs: int, part: int, whole: int) -> int:
    return round(epochs * part / whole)


def free_cores() -> int:
    """Cores of this machine for each of the processes that share it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_imagenet(config: Config) -> list[str]:
    """Whether the flags name images once, and parts of them once."""
    errors, files = [], [flag for flag in ("trainfile", "valfile") if getattr(config, flag) is not None]
    if len(files) == 1:
        other = "--valfile" if files == ["trainfile"] else "--trainfile"
        errors.append(f"--{files[0]}: .ffcv files come in pairs; give {other} too")
    if files and not is_imagenet(config):
        errors.append(f"--{files[0]}: .ffcv files are read as --dataset imagenet; drop one of the two")
    if len(files) == 2 and Path(config.trainfile).resolve() == Path(config.valfile).resolve():
        errors.append(f"--valfile: {config.valfile} is the file of --trainfile; training and test must not overlap")
    if files and config.data is not None:
        errors.append(f"--{files[0]}: --data names another copy of the images; drop one of the two")
    planned = getattr(config, "plan", False)  # which needs the published sizes alone
    if not files and is_imagenet(config) and config.data is None and not planned:
        errors.append(
            "--dataset: imagenet needs --data DIR, with DIR/train/CLASS/* and DIR/val/CLASS/*, or --trainfile X.ffcv "
            "--valfile Y.ffcv (scripts/write_imagenet.sh)"
        )
    fraction = getattr(config, "search_fraction", None)
    if fraction is not None:
        if len(fraction) != 2:
            errors.append(
                "--search-fraction: takes two shares, for the weights and for the architecture, such as .1 .025"
            )
        if sum(fraction) > 1 + 1e-9:
            errors.append(f"--search-fraction: {' and '.join(map(str, fraction))} are more than all images; give less")
        for dest in ("train_portion", "subset"):
            if config.explicit(dest):
                errors.append(f"--{dest.replace('_', '-')}: --search-fraction says it already; drop one of the two")
    return errors
