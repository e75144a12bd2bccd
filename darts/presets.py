# SPDX-License-Identifier: Apache-2.0
"""The defaults of PaddleSlim's DARTS example (its release 1.1.1), and the fast recipe on those of the authors."""

from __future__ import annotations

from common.recipes.presets import PRESETS as SHARED
from common.recipes.presets import Preset

# What the shared `fast` says about rates and warm-up is relative to PC-DARTS; DARTS has no warm-up and half the rate.
FAST = {
    "pc-darts": {name: SHARED["fast"].search[name] for name in ("arch_learning_rate", "warmup_epochs")},
    "darts": {"arch_learning_rate": 1.2e-3},
}

PRESETS = {
    "fast": Preset(
        SHARED["fast"].about,
        search={name: value for name, value in SHARED["fast"].search.items() if name not in FAST["pc-darts"]},
    ),
    "paddle": Preset(
        "the defaults of PaddleSlim's example: for --method PC-DARTS too, and the cell that it trains is its own",
        search={
            "method": "darts",
            "batch_size": 64,
            "learning_rate": 0.025,
            "learning_rate_min": 0.0,
            "arch_learning_rate": 3e-4,
            "warmup_epochs": 0,
        },
        train={
            "arch": "PADDLE_DARTS_V2",
            "batch_size": 96,
            "learning_rate": 0.025,
            "auxiliary": True,
            "cutout": True,
            "drop_path_prob": 0.2,
        },
    ),
    "paddle-imagenet": Preset(
        "PaddleSlim's train_imagenet.py: batches of 128, the rate falls by 3% every epoch",
        train={
            "dataset": "imagenet",
            "arch": "DARTS_V2",
            "epochs": 250,
            "batch_size": 128,
            "learning_rate": 0.1,
            "lr_schedule": "step",
            "lr_step_epochs": 1,
            "lr_step_factor": 0.97,
            "lr_warmup_epochs": 0,
            "weight_decay": 3e-5,
            "init_channels": 48,
            "layers": 14,
            "auxiliary": True,
            "drop_path_prob": 0.0,
            "label_smoothing": 0.1,
            "cutout": False,
        },
    ),
}
