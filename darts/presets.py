# SPDX-License-Identifier: Apache-2.0
"""The defaults of PaddleSlim's DARTS example (its release 1.1.1), beside those of the papers' authors."""

from __future__ import annotations

from common.recipes.presets import Preset

PRESETS = {
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
    )
}
