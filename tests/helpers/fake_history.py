# SPDX-License-Identifier: Apache-2.0
"""Searches written by hand: config.json and history.jsonl with choices, logits and figures, for what draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from genotypes import PRIMITIVES

NODES = 4
KINDS = ("normal", "reduce")


def softmax_tables(random: numpy.random.Generator, sharpness: float) -> dict[str, Any]:
    """Per kind of cell [edges, primitives], each row a softmax."""
    tables = {}
    for kind in KINDS:
        logits = sharpness * random.normal(size=(NODES * (NODES + 3) // 2, len(PRIMITIVES)))
        shares = numpy.exp(logits) / numpy.exp(logits).sum(1, keepdims=True)
        tables[kind] = shares.round(6).tolist()
    return tables


def read_off(table: list[list[float]]) -> list[list[Any]]:
    """Each node's two strongest edges, each with its strongest primitive but `none`."""
    pairs, first = [], 0
    for node in range(NODES):
        edges = table[first : first + node + 2]
        best = [max(range(1, len(row)), key=row.__getitem__) for row in edges]  # `none` is the first
        strongest = sorted(range(len(edges)), key=lambda s: -edges[s][best[s]])[:2]
        pairs += [[PRIMITIVES[best[s]], s] for s in strongest]
        first += node + 2
    return pairs


def epoch(number: int, *, seed: int = 0, cells: int = 5, bits: bool = True) -> dict[str, Any]:
    """A row of history.jsonl of a search of `cells` cells; later ones are surer of their choices."""
    random = numpy.random.default_rng([seed, number])
    alphas = softmax_tables(random, 0.3 + 0.5 * number)
    genotype: dict[str, Any] = {}
    for kind in KINDS:
        genotype |= {kind: read_off(alphas[kind]), f"{kind}_concat": [2, 3, 4, 5]}
    policy = []
    for index in range(cells):
        kind = "reduce" if index in (cells // 3, 2 * cells // 3) else "normal"
        pairs = []
        for name, state in genotype[kind]:
            plain = "pool" in name or (name == "skip_connect" and not (kind == "reduce" and state < 2))
            pairs.append(None if plain else random.choice([2, 4], 2).tolist())
        ends = {f"preprocess{i}": random.choice([2, 4], 2).tolist() for i in range(2)}
        policy.append({"type": "reduction" if kind == "reduce" else "normal", **ends, "operations": pairs})
    return {
        "epoch": number,
        "genotype": genotype,
        "bits": {"kind": "cells", "mapping": "relative", "cells": policy} if bits else None,
        "train_loss": 2.0 / (number + 1),
        "train_top1": 0.3 + 0.1 * number,
        "valid_loss": 2.2 / (number + 1),
        "valid_top1": 0.25 + 0.1 * number,
        "expected_bitops": 4.5e7 - 1e6 * number,
        "exact_bitops": 4.4e7 - 1e6 * number,
        "alphas": alphas,
        "primitives": list(PRIMITIVES),
    }


def sampled_epoch(number: int) -> dict[str, Any]:
    """A row of a search that samples micro cells of two blocks; the second sample is the best."""
    cells = [f"0 {k % 5} 1 2 1 {k % 5} 2 4 0 0 0 1 2 3 2 {k % 5}" for k in range(number, number + 3)]
    samples = [{"cells": text, "top1": top1} for text, top1 in zip(cells, (0.5, 0.7, 0.6), strict=True)]
    figures = {"train_loss": 1.0, "sample_top1": 0.6, "reward": 0.5 + 0.01 * number, "baseline": 0.5}
    return {"epoch": number, **figures, "architectures": samples}


def write_search(folder: Path, rows: list[dict[str, Any]], *, tail: str = "", **flags: Any) -> Path:
    """The folder of a search that is still going; `tail`: what stands behind the last whole line."""
    folder.mkdir(parents=True)
    known = {"epochs": 9, "dataset": "digits", "eval_layers": 8, "eval_init_channels": 8, "stem": "cifar", **flags}
    identity = {"schema": 1, "method": "qdarts", "stage": "search", "dataset": "digits", "seed": 0}
    (folder / "config.json").write_text(json.dumps({**identity, "config": known, "volatile": []}))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "history.jsonl").write_text(text + tail)
    return folder


def finish(folder: Path, row: dict[str, Any]) -> None:
    """architecture.json of a search that ended with this row."""
    whole = {"schema": 1, "space": "darts", "name": None, "search": {}}
    (folder / "architecture.json").write_text(json.dumps({**whole, **{k: row[k] for k in ("genotype", "bits")}}))
