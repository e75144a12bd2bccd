# SPDX-License-Identifier: Apache-2.0
"""Presets: named sets of defaults per stage. No preset means the papers' hyper-parameters with design.md section 6.

`presets_for("search" | "train", extra)` is what `resolve` takes; a method adds its own through `extra`. Keys are
the flags' names in attribute form (--init-channels: init_channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One named set of defaults: what it is for, and the flags that it sets in each stage."""

    about: str
    search: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


# Common to both stages of the small presets: real images that need no download.
_SMALL = {"dataset": "digits", "log_every": 10}
# Their trainings: images too small to cut 16 pixels out of, and for an auxiliary head.
_SMALL_TRAIN = {**_SMALL, "auxiliary": False, "cutout": False}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "the defaults, but cost, bit mapping and 8 bits as in the reference code (its defects stay fixed)",
        search={
            "cost_accounting": "paper",
            "cost_weighting": "uniform",
            "bit_mapping": "paper",
            "scheme": "reference",
        },
        train={"scheme": "reference", "bit_mapping": "paper"},
    ),
    "fast": Preset(
        "a search in two fifths of the time, meant to find as much; trainings are untouched",
        # The weights of a supernet are thrown away: what counts is the order of its choices, which shows long before
        # the weights are done (as Zhou et al., CVPR 2020, use when they rank networks by short trainings). So half the
        # epochs, with the same share of warm-up. An architecture step costs about as much as a weight step, and nothing
        # asks for as many of them: every second one is left out. Rates: alphas and betas take a quarter of the steps,
        # gammas half of them, so that four times and twice the rate let them go as far. Work, in steps of either kind
        # over the steps of an epoch: 25 + 18 / 2 in place of 50 + 35. Whether it finds as much is measured
        # (benchmarks/fast_preset.sh, docs/performance.md).
        search={
            "epochs": 25,
            "warmup_epochs": 7,
            "arch_every": 2,
            "arch_learning_rate": 2.4e-3,
            "gamma_learning_rate": 0.02,
        },
    ),
    "quickstart": Preset(
        "digits at a size for minutes on a laptop",
        search={
            **_SMALL,
            "init_channels": 8,
            "layers": 5,
            "eval_init_channels": 8,
            "eval_layers": 5,
            "epochs": 12,
            "warmup_epochs": 3,
            "batch_size": 64,
            "learning_rate": 0.05,
            # a hundred architecture steps in place of thousands: larger ones
            "arch_learning_rate": 1e-2,
            "gamma_learning_rate": 0.1,
        },
        train={
            **_SMALL_TRAIN,
            "init_channels": 8,
            "layers": 5,
            "epochs": 16,
            "batch_size": 64,
            "learning_rate": 0.05,
            "drop_path_prob": 0.0,
        },
    ),
    "small": Preset(
        "CIFAR-10 shrunk to 16x16, part of it an epoch: the whole table in an hour or two on 2 CPU cores",
        search={
            **_SMALL,
            "dataset": "cifar10",
            "image_size": 16,
            "init_channels": 8,
            "layers": 5,
            "eval_init_channels": 8,
            "eval_layers": 5,
            "epochs": 15,
            "warmup_epochs": 3,
            "steps_per_epoch": 20,
            "batch_size": 64,
            "learning_rate": 0.05,
            "arch_learning_rate": 1e-2,
            "gamma_learning_rate": 0.1,
        },
        train={
            **_SMALL_TRAIN,
            "dataset": "cifar10",
            "image_size": 16,
            "init_channels": 8,
            "layers": 5,
            "epochs": 15,
            "steps_per_epoch": 60,
            "batch_size": 64,
            "learning_rate": 0.05,
            "drop_path_prob": 0.0,
        },
    ),
    "smoke": Preset(
        "digits, a few steps: seconds, for tests; its figures mean nothing",
        search={
            **_SMALL,
            "init_channels": 8,
            "layers": 3,
            "eval_init_channels": 4,
            "eval_layers": 3,
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 16,
            "steps_per_epoch": 2,
            "log_every": 1,
            "plots": False,
        },
        train={
            **_SMALL_TRAIN,
            "init_channels": 4,
            "layers": 3,
            "epochs": 2,
            "batch_size": 16,
            "steps_per_epoch": 3,
            "log_every": 1,
            "plots": False,  # they would take longer than the training
        },
    ),
}


def presets_for(stage: str, extra: Mapping[str, Preset] | None = None) -> dict[str, dict[str, Any]]:
    """name -> {"about": ..., flag: value} for stage "search" or "train", as `resolve` takes them."""
    assert stage in ("search", "train"), stage
    every = {**PRESETS, **(extra or {})}
    return {name: {"about": preset.about, **getattr(preset, stage)} for name, preset in every.items()}
