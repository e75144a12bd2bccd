# SPDX-License-Identifier: Apache-2.0
"""Run folders written by hand, as issue and design describe them, for the tools that only read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genotypes import lookup

COST = {
    "parameters": 61_000,
    "parameters_with_auxiliary": 61_000,
    "macs": 2_345_000,
    "bitops": 41_230_000,
    "bitops_quantized": 35_100_000,
    "bitops_paper": 39_000_000,
    "weight_bytes": 20_480,
    "weight_bytes_fp32": 244_000,
    "activation_bytes": 9000,
}
DEVICE = {"cpu": "Test CPU", "cores": 2, "threads": 2, "cuda": []}


def architecture_json(name: str | None = "PC_DARTS", *, bits: Any = None, search: Any = None) -> dict[str, Any]:
    """The object of an architecture.json with the cells of PC-DARTS."""
    _, genotype = lookup("PC_DARTS")
    cells = {key: [list(x) if isinstance(x, tuple) else x for x in value] for key, value in genotype._asdict().items()}
    return {"schema": 1, "space": "darts", "name": name, "genotype": cells, "bits": bits, "search": search or {}}


def train_result(correct: int = 350, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """result.json of a finished training on digits."""
    result: dict[str, Any] = {
        "schema": 1,
        "method": "qdarts",
        "stage": "train",
        "dataset": "digits",
        "seed": seed,
        "finished": True,
        "epochs": 20,
        "steps": 440,
        "n_train": 1437,
        "n_test": 360,
        "metrics": {"test_loss": 0.11, "test_top1": correct / 360, "test_top5": 1.0, "test_correct": correct},
        "cost": COST,
        "bits_mean": {"weight": 2.0, "activation": 2.0},
        "network": {"init_channels": 8, "layers": 5, "stem": "cifar", "in_channels": 1, "image_size": 16},
        "architecture": "PC_DARTS_cifar",
        "search_seconds": None,
        "seconds": 61.5,
        "artefacts": {},
        "versions": {},
        "device": DEVICE,
    }
    return result | changes


def search_result(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """result.json of a finished search on digits."""
    result: dict[str, Any] = {
        "schema": 1,
        "method": "qdarts",
        "stage": "search",
        "dataset": "digits",
        "seed": seed,
        "finished": True,
        "epochs": 16,
        "metrics": {"valid_top1": 0.951, "valid_loss": 0.2},
        "exact_bitops": 40_000_000,
        "exact_bitops_quantized": 34_000_000,
        "expected_bitops": 42_000_000,
        "target_bitops": 41_230_000,
        "target_reached": True,
        "parameter_free_share": 0.25,
        "seconds": 122.0,
        "device": DEVICE,
    }
    return result | changes


def write_run(
    folder: Path, result: Any = None, *, config: dict[str, Any] | None = None, architecture: Any = None
) -> Path:
    """A run folder with config.json and, where given, result.json (text is written as it is) and architecture.json."""
    folder.mkdir(parents=True)
    known = result if isinstance(result, dict) else {}
    identity = {key: known.get(key) for key in ("method", "stage", "dataset", "seed") if key in known}
    flags = {"epochs": known.get("epochs", 20), "seed": known.get("seed", 0), **(config or {})}
    whole = {
        "schema": 1,
        **identity,
        "config": flags,
        "volatile": ["save"],
        **{k: flags[k] for k in identity if k in flags},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    if result is not None:
        (folder / "result.json").write_text(result if isinstance(result, str) else json.dumps(result))
    if architecture is not None:
        (folder / "architecture.json").write_text(json.dumps(architecture))
    return folder
