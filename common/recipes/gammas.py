# SPDX-License-Identifier: Apache-2.0
"""Bits from NablaQDARTS's gamma_checkpoint.t7, so that its searches can be trained here.

The reference indexes its gamma rows by primitive - 4, so that skip_connect wraps around to the last of six rows and the
fifth is never read (specs: defect 1). Here every quantised primitive has its own row, found by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.engine.files import read_regular
from common.engine.safe_load import load_plain
from common.nets import Architecture, BitPolicy, CellBits
from common.nets.darts_space import edge_index, is_reduction

BITS_BY_CHOICES = {2: (2, 4), 3: (2, 4, 8)}
"""What the reference searches: {2, 4}, or {2, 4, 8} with --allow8bit."""

SLOTS = {"sep_conv_3x3": 0, "sep_conv_5x5": 1, "dil_conv_3x3": 2, "dil_conv_5x5": 3, "skip_connect": 5}
"""Row of each primitive in the reference's six."""

_MAX_FILE_BYTES = 64 * 2**20  # a search of eight cells takes ten kilobytes
_MAX_CELLS = 1000

# The reference keeps twelve tensors in this order when it saves a list; `n` and `r` are the normal and reduction cells.
NAMES = tuple(
    f"gamma_{operand}_cell{kind}{part}"
    for kind in ("n", "r")
    for part in ("_preprocess0", "_preprocess1", "")
    for operand in ("activ", "weight")
)


def read_gammas(path: Path) -> dict[str, Tensor]:
    """The twelve gamma tensors by the reference's names. Raises ValueError that names the file and what is wrong.

    Read as data only (weights_only): a list or tuple in the order of NAMES, or a mapping with these names.
    """
    try:
        loaded = load_plain(read_regular(path, _MAX_FILE_BYTES, "gammas"), str(path))
    except ValueError as error:
        raise ValueError(f"--weights-path {error}; give a gamma_checkpoint.t7 of NablaQDARTS, tensors alone") from error
    if isinstance(loaded, Mapping):
        named = {str(name).removeprefix("module."): value for name, value in loaded.items()}
        if missing := [name for name in NAMES if name not in named]:
            raise ValueError(f"--weights-path {path}: {missing[0]} is missing; expected {', '.join(NAMES)}")
        tensors = {name: named[name] for name in NAMES}
    elif isinstance(loaded, (list, tuple)) and len(loaded) == len(NAMES):
        tensors = dict(zip(NAMES, loaded, strict=True))
    else:
        found = f"{len(loaded)} entries" if isinstance(loaded, (list, tuple)) else type(loaded).__name__
        raise ValueError(f"--weights-path {path}: expected {len(NAMES)} gamma tensors, found {found}")
    _check_shapes(tensors, path)
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def _check_shapes(tensors: Mapping[str, object], path: Path) -> None:
    first = tensors[NAMES[0]]
    choices = first.shape[-1] if isinstance(first, Tensor) and first.dim() else 0
    if choices not in BITS_BY_CHOICES:
        raise ValueError(f"--weights-path {path}: {NAMES[0]} has {choices} bit choices; the reference has 2 or 3")
    for name, tensor in tensors.items():
        tail = (choices,) if "preprocess" in name else (14, 6, choices)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape[1:]) != tail or not _is_plain(tensor):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"--weights-path {path}: {name} is {shape}; expected [cells, {', '.join(map(str, tail))}]")
        kind = name.removeprefix("gamma_activ_cell").removeprefix("gamma_weight_cell")[0]
        same = tensors[f"gamma_activ_cell{kind}"]
        if isinstance(same, Tensor) and tensor.shape[0] != same.shape[0]:
            raise ValueError(f"--weights-path {path}: {name} has {tensor.shape[0]} cells, others {same.shape[0]}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"--weights-path {path}: {name} holds values that are not finite")


def _is_plain(tensor: Tensor) -> bool:
    """Whether it lies there as numbers, no more than a supernet has: a file may claim any shape of a few bytes."""
    usual = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return usual and 1 <= tensor.shape[0] <= _MAX_CELLS


def import_gammas(architecture: Architecture, path: Path, mapping: str = "relative") -> Architecture:
    """The architecture with the most probable bits of a gamma checkpoint, undoing the reference's row order.

    Raises ValueError for a file that is not one, or for cells that the file does not fit.
    """
    tensors = read_gammas(path)
    bits = BITS_BY_CHOICES[tensors[NAMES[0]].shape[-1]]
    counts = {kind: tensors[f"gamma_weight_cell{kind}"].shape[0] for kind in ("n", "r")}
    layers = counts["n"] + counts["r"]
    reductions = [is_reduction(index, layers) for index in range(layers)]
    if sum(reductions) != counts["r"]:
        raise ValueError(f"--weights-path {path}: {counts['n']} normal and {counts['r']} reduction cells fit no depth")
    seen, cells = {"n": 0, "r": 0}, []
    for reduction in reductions:
        kind = "r" if reduction else "n"
        cells.append(_cell(architecture, tensors, bits, kind, seen[kind]))
        seen[kind] += 1
    return replace(architecture, bits=BitPolicy(cells=tuple(cells), mapping=mapping))


def _cell(
    architecture: Architecture, tensors: Mapping[str, Tensor], bits: tuple[int, ...], kind: str, cell: int
) -> CellBits:
    def best(part: str, *index: int) -> tuple[int, int]:
        rows = [tensors[f"gamma_{operand}_cell{kind}{part}"][(cell, *index)] for operand in ("weight", "activ")]
        return bits[int(rows[0].argmax())], bits[int(rows[1].argmax())]

    pairs = architecture.genotype.reduce if kind == "r" else architecture.genotype.normal
    operations = []
    for position, (primitive, state) in enumerate(pairs):
        free = "pool" in primitive or (primitive == "skip_connect" and (kind == "n" or state > 1))
        if not free and (primitive not in SLOTS or position >= 8):
            raise ValueError(f"--weights-path: the reference searches no bits for {primitive} at node {position // 2}")
        operations.append(None if free else best("", edge_index(position // 2, state), SLOTS[primitive]))
    return CellBits(kind == "r", best("_preprocess0"), best("_preprocess1"), tuple(operations))
