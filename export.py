#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Export a trained run: integers packed at their own bits, ONNX and others, each proved on images before it is left.

    python export.py runs/qdarts-train/digits-s0-20260101T120000 --format packed
    python export.py RUN --format all --out network

The files and their record, export.json, go into `export` in the run's folder, or into --out. docs/export.md says what
each format holds and what its proof means. `evaluate.py DIR` measures what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.engine.cli import Config, Parser, add_run_argument, integer
from common.export.formats import FORMATS
from common.recipes.flags import run_program

PROG = "export.py"


def parser() -> Parser:
    """The flags."""
    parser = Parser(prog=PROG, description=__doc__, usage="%(prog)s RUN --format F [F ...] [flags]")
    add_run_argument(parser, help="a training run's folder, or that of a post-training quantisation")
    add = parser.add_argument
    listed = "; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items())
    add("--format", nargs="+", default=[], metavar="F", help=f"{listed}; all: every one that holds the network")
    add("--out", type=Path, metavar="DIR", help="where the files go (default: export in the run's folder)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="one of its checkpoints (default: the newest valid one)")
    add("--data", type=Path, metavar="DIR", help="where the data lie (default: as in the run)")
    add("--data-module", metavar="FILE.py:FUNCTION", help="data of your own, also where the run names them")
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own that the network holds")
    add("--images", type=integer(1), metavar="N", help="check on the first N test images (default: on all)")
    add("--threads", type=integer(1), metavar="N", help="CPU threads of torch (default: torch's choice)")
    add("--json", action="store_true", help="print export.json instead of lines")
    return parser


def check(config: Config) -> None:
    """Raise ValueError for what is missing or unknown."""
    known = ", ".join((*FORMATS, "all"))
    if config.run is None:
        raise ValueError("RUN: is missing; give the folder of a training run")
    if not config.format:
        raise ValueError(f"--format: is missing; give one or more of {known}")
    for name in config.format:
        if name not in (*FORMATS, "all"):
            raise ValueError(f"--format: {name!r} is unknown; choose among {known}")


def export(config: Config) -> dict[str, Any]:
    """Export as the flags say; the record. Raises ValueError."""
    check(config)
    import torch

    from common.recipes.exporting import export_run

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.search_space is not None:
        from common.recipes.own_space import load_search_space

        load_search_space(config.search_space)
    where = {name: getattr(config, name) for name in ("checkpoint", "data", "data_module", "images")}
    return export_run(config.run, config.format, config.out, say=_aside if config.json else print, **where)


def _aside(text: str) -> None:
    print(text, file=sys.stderr)


def text(manifest: dict[str, Any], asked: Sequence[str] = ()) -> str:
    """The record in lines: every file with its size and, of formats that were asked for (none: all), their proofs."""
    every = not asked or "all" in asked
    lines = []
    for name, entry in manifest["files"].items():
        new = every or name in asked
        lines.append(f"{name:<12}{entry['bytes']:>14,} bytes  {entry['file']}" + ("" if new else "  (as it was)"))
        lines += [f"    {line}" for line in (_proof(entry["figures"]) if new else [])]
    return "\n".join(lines + [f"{name:<12}not written: {reason}" for name, reason in manifest["refused"].items()])


def _proof(figures: dict[str, Any]) -> list[str]:
    """What the check of one file found; export.json has every figure, and docs/export.md what they mean."""
    lines = [*_size(figures), *_packed(figures)]
    if "layers" in figures and "layer_error" in figures["layers"]:
        layers = figures["layers"]
        lines.append(
            f"{layers['layers']} layers on the same codes, {layers['images']:,} images: outputs within "
            f"{layers['layer_error']:.1e} of the largest"
            + (f"; {layers['flipped']:,} of {layers['codes']:,} codes differ" if layers["codes"] else "")
        )
    if "integer_kernels" in figures:
        floats = ", ".join(f"{count} {reason}" for reason, count in figures["float_layers"].items())
        lines.append(f"{figures['integer_kernels']} layers on integer kernels; in floats: {floats or 'none'}")
    if "counts" in figures:
        counts = figures["counts"]
        lines.append(f"qonnx counts {counts['bitops']:,.0f} BitOps and {counts['macs']:,.0f} MACs, as the cost model")
    if "whole" in figures:
        whole = figures["whole"]
        lines.append(_alike(whole["images"], whole["top1_agreement"], whole["top1"], whole["top1_file"]))
    return lines


def _size(figures: dict[str, Any]) -> list[str]:
    lines = []
    if "of_fp32_file" in figures:
        lines.append(f"{figures['of_fp32_file']:.2f} of the network's own ONNX file in full precision")
    if "size" in figures:
        size = figures["size"]
        lines.append(
            f"{size['of_fp32']:.2f} of the weights in full precision ({size['weight_bytes_fp32']:,.0f} bytes; the cost "
            f"model counts {size['weight_bytes']:,.0f})"
        )
        if not size["within"]:
            lines.append(f"larger than the {size['allowed']:,} bytes that the cost model's count allows for it")
    return lines


def _packed(figures: dict[str, Any]) -> list[str]:
    """The three parts of a packed file's proof, those that are there."""
    lines = []
    if "float64" in figures:
        exact = figures["float64"]
        lines.append(
            f"float64, {exact['images']:,} images: {exact['flipped']:,} of {exact['codes']:,} codes differ, logits "
            f"within {exact['largest_logit_difference']:.1e}"
        )
    if "sums" in figures.get("layers", {}):
        layers = figures["layers"]
        lines.append(
            f"float32, {layers['layers']} layers on the same codes: {layers['different']:,} of {layers['sums']:,} sums "
            "differ"
        )
    if "float32" in figures:
        whole = figures["float32"]
        lines.append(f"float32, from image to logits: {whole['flipped']:,} of {whole['codes']:,} codes differ")
        lines.append(_alike(whole["images"], whole["top1_agreement"], whole["top1"], whole["top1_packed"]))
    return lines


def _alike(images: int, agreement: float, top1: float, top1_file: float) -> str:
    return (
        f"{agreement:.2%} of {images:,} images classified as the network does; top-1 {top1_file:.2%}, the network's "
        f"{top1:.2%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the flags say; the exit code."""
    config = parser().parse_args(argv)

    def work() -> None:
        manifest = export(config)
        print(json.dumps(manifest, indent=2) if config.json else text(manifest, config.format))

    return run_program(work, PROG, config)


if __name__ == "__main__":
    sys.exit(main())
