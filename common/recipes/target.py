# SPDX-License-Identifier: Apache-2.0
"""What visualize.py is asked to draw: a name, a file, two cells written out, or a run, finished or still going."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from common.engine.files import read_json
from common.nets.architecture import Architecture, load_architecture, written_out
from common.nets.enas_space import parse_cells
from common.recipes.chosen import Choice, choice_of
from common.recipes.history import read_history
from common.recipes.pictures import Margins


@dataclass(frozen=True)
class Target:
    """An architecture to draw, and what is known around it."""

    architecture: Architecture
    title: str
    stem: Path
    """Where its pictures go, without ending: a run's `cells`, beside a file, or NAME in the working folder."""
    margins: Margins | None = None
    run: Path | None = None
    """The run's folder; None: a name, a file or written-out cells."""
    flags: Mapping[str, Any] | None = None
    """The flags in the run's config.json, where that is there."""
    notes: tuple[str, ...] = ()

    def with_uniform_bits(self, weight: int, activation: int) -> Target:
        """The same cells with one bit pair everywhere."""
        return replace(self, architecture=self.architecture.with_uniform_bits(weight, activation))

    def shown(self, *, bits: bool | None, confidence: bool | None) -> Target:
        """What is to be drawn: with a part (True), without it (False), or as it is (None).

        Raises ValueError, naming the flag, where a part is asked for that is not there.
        """
        if bits and self.architecture.bits is None:
            raise ValueError(f"--bits: {self.title} has none; name a run that has some, or add --wbits and --abits")
        if confidence and self.margins is None:
            raise ValueError(
                f"--confidence: {self.title} has no softmax over operations; name the run of a search that has alphas "
                "in its history.jsonl"
            )
        kept = self.architecture if bits is not False else replace(self.architecture, bits=None)
        return replace(self, architecture=kept, margins=self.margins if confidence is not False else None)


def open_target(target: str) -> Target:
    """What a TARGET of visualize.py names. Raises ValueError naming it, the reason and the cure."""
    path = Path(target)
    if not written_out(target) and path.is_dir() and _is_run(path):
        return _open_run(path)
    architecture = load_architecture(target)
    if written_out(target):
        # an architecture written out as integers has no name: its picture gets one from their digest
        name = f"enas-{sha256(parse_cells(target).numbers.encode()).hexdigest()[:8]}"
        return Target(architecture, name, Path(name))
    stem = path / "cells" if path.is_dir() else path.with_suffix("") if path.is_file() else Path(path.name)
    return Target(architecture, architecture.name or path.resolve().name, stem)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "history.jsonl"))


def _open_run(run: Path) -> Target:
    """A run: its architecture.json or, before there is one, what its last whole epoch would give."""
    notes: list[str] = []
    choice = _last_choice(run, notes)
    name = "/".join(run.resolve().parts[-2:])
    if (run / "architecture.json").is_file():
        architecture = load_architecture(run)
        title = architecture.name or name
        margins = choice.margins if choice and choice.architecture.genotype == architecture.genotype else None
        notes = [] if margins is None else notes
    elif choice is not None:
        architecture, margins, title = choice.architecture, choice.margins, f"{name}, after epoch {choice.epoch + 1}"
        notes.append(f"{run}: has no architecture.json yet; drawn as after its epoch {choice.epoch + 1}")
    else:
        raise ValueError(f"{run}: has neither an architecture.json nor a whole epoch of a search; wait for the first")
    return Target(architecture, title, run / "cells", margins, run, read_flags(run), tuple(notes))


def _last_choice(run: Path, notes: list[str]) -> Choice | None:
    """The newest whole epoch of a search; None where the run has none (a training, a run before its first epoch)."""
    file = run / "history.jsonl"
    if not file.is_file() or not file.read_bytes().count(b"\n"):
        return None
    history = read_history(run)
    row = history.rows[-1]
    if "genotype" not in row and not row.get("architectures"):
        return None
    if history.torn:
        notes.append(f"{file}: its last line is half written and left out")
    return choice_of(row, run)


def read_flags(run: Path) -> Mapping[str, Any]:
    """The flags of a run as its config.json has them; empty where there is none. Raises ValueError: damaged."""
    if not (run / "config.json").is_file():
        return {}
    config = read_json(run / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise ValueError(f"{run / 'config.json'}: not the configuration of a run; name another run")
    return config["config"]
