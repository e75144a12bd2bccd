# SPDX-License-Identifier: Apache-2.0
"""How long everything took that a run stands on: the searches and trainings before it, each counted once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.engine.cli import Config
from common.engine.files import read_json

Parts = dict[str, dict[str, Any]]
"""Digest of a run's configuration -> stage (search or train), seconds, and whether the architecture comes from it."""


def time_before(config: Config, stage: str) -> dict[str, Any]:
    """The fields of result.json on what a search or training started from, by its flags.

    search_seconds (of a training): the search that found the architecture, None where no run did.
    before_seconds: all else behind --arch, --init-from and --teacher, with all that those runs started from; a run
    that several of them lead to counts once. None: one of them does not say how long it took (it has not finished).
    before_search_seconds: the share of it that searches took. started_from: all of these runs one by one.
    """
    arch = getattr(config, "arch", None)
    found, search = _found_by(Path(arch)) if arch is not None else ({}, None)
    taken = [parts_of(Path(run)) for name in ("init_from", "teacher") if (run := getattr(config, name, None))]
    parts: Parts = {key: part | {"architecture": False} for some in taken for key, part in (some or {}).items()}
    parts |= found
    fields: dict[str, Any] = {}
    if stage == "train":
        fields["search_seconds"] = parts[search]["seconds"] if search is not None else None
    before = [part for key, part in parts.items() if stage == "search" or key != search]
    known = None not in taken
    return fields | {
        "before_seconds": sum(part["seconds"] for part in before) if known else None,
        "before_search_seconds": sum(p["seconds"] for p in before if p["stage"] == "search") if known else None,
        "started_from": as_list(parts),
    }


def as_list(parts: Parts) -> list[dict[str, Any]]:
    """The parts as result.json holds them, in `started_from`."""
    return [{"digest": digest, **part} for digest, part in parts.items()]


def parts_of(run: Path) -> Parts | None:
    """A finished run and all that it started from; None where it is no finished run.

    A run of an older version names its search, and what it quantised, but not what its weights came from.
    """
    result = _read(run / "result.json")
    seconds = _number(result, "seconds")
    if seconds is None:
        return None
    digest = str(_read(run / "config.json").get("digest") or run)
    kind = "search" if result.get("stage") == "search" else "train"
    earlier = _listed(result) if isinstance(result.get("started_from"), list) else _older(result, run, digest)
    return earlier | {digest: {"stage": kind, "seconds": seconds, "architecture": False}}


def _listed(result: Mapping[str, Any]) -> Parts:
    return {
        entry["digest"]: {key: entry.get(key) for key in ("stage", "seconds", "architecture")}
        for entry in result["started_from"]
        if isinstance(entry, dict) and isinstance(entry.get("digest"), str) and _number(entry, "seconds") is not None
    }


def _older(result: Mapping[str, Any], run: Path, digest: str) -> Parts:
    parts: Parts = {}
    if (seconds := _number(result, "search_seconds")) is not None:
        key = _search_digest(run) or f"{digest}: search"
        parts[key] = {"stage": "search", "seconds": seconds, "architecture": True}
    if (seconds := _number(result, "source_seconds")) is not None:
        parts[f"{digest}: source"] = {"stage": "train", "seconds": seconds, "architecture": False}
    return parts


def _found_by(arch: Path) -> tuple[Parts, str | None]:
    """What it took to find the architecture of a run, and which of these is the search itself.

    Nothing and None for a name, a file, an unfinished run, and a training of cells that no search here found.
    """
    parts = parts_of(arch)
    if parts is None:
        return {}, None
    search = next(reversed(parts))
    if parts[search]["stage"] != "search":  # a training: what its architecture came from, not what its weights did
        parts = {key: part for key, part in parts.items() if part["architecture"]}
        known = [_search_digest(arch), f"{search}: search"]
        search = next((key for key in known if key in parts), None)
    return {key: part | {"architecture": True} for key, part in parts.items()}, search


def _search_digest(run: Path) -> str | None:
    """Which search found a run's architecture, by its digest."""
    search = _read(run / "architecture.json").get("search")
    digest = search.get("flags_digest") if isinstance(search, dict) else None
    return digest if isinstance(digest, str) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
