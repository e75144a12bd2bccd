# SPDX-License-Identifier: Apache-2.0
"""A user's own search space: `--search-space FILE.py`, see docs/own-operation.md."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from common.data.own import import_file
from common.nets import OPERATIONS
from common.nets.operations import plain_convolution
from genotypes import PRIMITIVES

_CHANNELS, _SIZE = 4, 8  # of the image on which an operation is tried


@dataclass(frozen=True)
class SearchSpace:
    """What a file brings: its digest, the candidates of every edge, and those among them that it registered."""

    digest: str
    primitives: tuple[str, ...]
    own: tuple[str, ...]


@cache
def load_search_space(path: Path) -> SearchSpace:
    """Run FILE.py, which registers operations in OPERATIONS and may set PRIMITIVES; each file once a process.

    Without PRIMITIVES the candidates are DARTS's and the new operations; one of the two must be there. Raises
    ValueError naming the file, the reason and the cure.
    """
    source = f"--search-space {path}"
    before = dict(OPERATIONS)
    try:
        module = import_file(Path(path).expanduser().resolve(), source)
        if changed := [name for name, builder in before.items() if OPERATIONS.get(name) is not builder]:
            raise ValueError(f"{source}: {changed[0]} is an operation already; register yours under another name")
        own = tuple(name for name in OPERATIONS if name not in before)
        for name in own:
            _try(name, source)
        primitives = _candidates(module, own, source)
    except ValueError:
        OPERATIONS.clear()
        OPERATIONS.update(before)
        raise
    digest = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    return SearchSpace(digest, primitives, tuple(name for name in primitives if name in own))


def _candidates(module: ModuleType, own: tuple[str, ...], source: str) -> tuple[str, ...]:
    if not own and not hasattr(module, "PRIMITIVES"):
        raise ValueError(
            f"{source}: registers no operation and sets no PRIMITIVES, so it would change nothing; put a builder into "
            "OPERATIONS (from common.nets), or list the candidates in PRIMITIVES"
        )
    primitives = getattr(module, "PRIMITIVES", (*PRIMITIVES, *own))
    if not isinstance(primitives, list | tuple) or not all(isinstance(name, str) for name in primitives):
        raise ValueError(f"{source}: PRIMITIVES must be a list of names")
    if unknown := [name for name in primitives if name != "none" and name not in OPERATIONS]:
        raise ValueError(f"{source}: PRIMITIVES names {unknown[0]!r}, which nobody registered in OPERATIONS")
    if len(set(primitives)) != len(primitives) or not set(primitives) - {"none"}:
        raise ValueError(f"{source}: PRIMITIVES must name at least one operation, and each once")
    return tuple(primitives)


def _try(name: str, source: str) -> None:
    """Build an operation in both strides and see that it keeps the channels and strides as asked."""
    for stride in (1, 2):
        wanted = (2, _CHANNELS, _SIZE // stride, _SIZE // stride)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                operation = OPERATIONS[name](plain_convolution, nn.BatchNorm2d, _CHANNELS, stride)
                found = tuple(operation(torch.zeros(2, _CHANNELS, _SIZE, _SIZE)).shape)
        except Exception as error:  # the user's own code: whatever it raises is told with its place
            raise ValueError(f"{source}: {name} failed at stride {stride}: {type(error).__name__}: {error}") from error
        if found != wanted:
            raise ValueError(f"{source}: {name} at stride {stride} gives {found} in place of {wanted}")
