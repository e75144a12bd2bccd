# SPDX-License-Identifier: Apache-2.0
"""Run folders as records: what a table needs of a run, read with every field checked, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.engine.changes import changes_of, flag
from common.engine.files import read_json
from common.engine.folders import is_held
from common.recipes.contents import CONTENTS
from common.recipes.history import epochs_over

# flags that do not make two runs different experiments
_INCIDENTAL = frozenset(
    (
        *("seed", "arch", "run", *CONTENTS, "data", "save", "runs", "resume", "preset", "config", "print_config"),
        *("list_presets", "dry_run", "log_every", "checkpoint_minutes", "tensorboard", "plots", "workers"),
        *("threads", "quiet", "allow_config_change"),
    )
)
# whether, but not which: paths differ from seed to seed
_OTHER_RUNS = ("teacher", "init_from", "weights_path", "match_reference")
_TRAINED = ("train", "quantize")  # a network quantised after its training counts as a trained one
_SOURCES = ("arch", "run", "init_from")  # flags that lead to the run from which an architecture came
_BEFORE = ("before_seconds", "before_search_seconds")  # what a run started from: all of it, and its searches
_COST = ("parameters", "macs", "bitops", "bitops_quantized", "bitops_paper", "weight_bytes", "weight_bytes_fp32")


@dataclass(frozen=True)
class Record:
    """One run. Shares and accuracies are fractions, times seconds, memory bytes; None: not known or not applicable."""

    folder: Path
    stage: str
    """search or train; what was quantised after its training counts as trained."""
    method: str
    dataset: str
    seed: int | None
    finished: bool
    progress: str = ""
    """How far an unfinished run came."""
    held: bool | None = None
    """Whether a process works on an unfinished run; None: not known."""
    changed: tuple[str, ...] = ()
    """Which flags had other values at first (--allow-config-change), such as `--epochs 12 -> 7`."""
    architecture: str = ""
    search: str = ""
    """Which search found the architecture, the same text for all of its trainings; empty: none did."""
    bits: tuple[float, float] | None = None
    """Mean weight and activation bits; None: full precision."""
    searched_bits: bool = False
    bit_set: tuple[int, ...] = ()
    """The bit-widths that a search chose among, where that is known."""
    correct: int | None = None
    n_test: int | None = None
    accuracy: float | None = None
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """Cost, times, and what else the table shows, by name."""
    size: tuple[Any, ...] = ()
    """What must agree within a row, as (name, value): network, image size, epochs, number of images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The flags that make the experiment, its search's as `search.NAME`, without seed and paths."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting came from: flag, preset NAME, default, derived (from other flags)."""
    device: str = ""
    digest: str = ""
    """Of the run's configuration, as its config.json says it; empty: not known."""
    cells: str = ""
    """Its cells and bits as a text; with the place of the images, where they are a folder."""
    started_from: tuple[str, ...] = ()
    """What the flags in CONTENTS led to: digest of that run's configuration, else of the content, else the place."""

    @property
    def state(self) -> str:
        """finished, running or not finished, and how far."""
        if self.finished:
            return "finished"
        return f"{'running' if self.held else 'not finished'}, {self.progress}"


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Run folders among and below `paths`, each once, and one message for every path without any.

    A run folder holds a config.json or a result.json; hidden folders are passed over.
    """
    found: dict[Path, Path] = {}
    problems = []
    for path in paths:
        if not path.exists():
            problems.append(f"{path}: no such folder")
        elif not path.is_dir():
            problems.append(f"{path}: not a folder; name a run's folder")
        else:
            inside = [path] if _is_run(path) else [sub for sub in sorted(_folders(path)) if _is_run(sub)]
            if not inside:
                problems.append(f"{path}: holds no run (neither config.json nor result.json)")
            for run in inside:
                found.setdefault(run.resolve(), run)
    return list(found.values()), problems


def _folders(path: Path, depth: int = 4) -> Iterable[Path]:
    for sub in path.iterdir():
        if sub.is_dir() and not sub.name.startswith(".") and not sub.is_symlink():
            yield sub
            if depth > 1 and not _is_run(sub):
                yield from _folders(sub, depth - 1)


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "result.json").is_file()


def read_run(folder: Path) -> Record:
    """Read one run. Raises ValueError, one line that names the file and the field, when it cannot be read."""
    config = _read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if not (folder / "result.json").exists():
        return _unfinished(folder, config, {})
    result = _read_object(folder / "result.json")
    if result.get("finished") is not True:
        return _unfinished(folder, config, result)
    where = f"{folder / 'result.json'}"
    if result.get("schema") != 1:
        raise ValueError(f"{where}: schema {result.get('schema')!r} is not 1, the one this version reads")
    fields = _Fields(result, where)
    stage = fields.text("stage")
    if stage not in ("search", *_TRAINED):
        raise ValueError(f"{where}: field stage: {stage!r} is none of search, {', '.join(_TRAINED)}")
    common = {
        "folder": folder,
        "stage": "train" if stage in _TRAINED else stage,
        "method": fields.text("method"),
        "dataset": fields.text("dataset"),
        "seed": fields.integer("seed"),
        "finished": True,
        "settings": _settings(config),
        "sources": _sources(config),
        "device": _device(result.get("device")),
        "changed": _changed(config),
        "digest": str(config.get("digest") or ""),
        "cells": _cells(folder, _flags(config)),
        "started_from": _started_from(folder, _flags(config)),
    }
    return _search(fields, common) if stage == "search" else _train(fields, common)


def _train(fields: _Fields, common: dict[str, Any]) -> Record:
    correct, n_test = fields.integer("metrics.test_correct"), fields.integer("n_test")
    if not 0 <= correct <= n_test or n_test == 0:
        raise ValueError(f"{fields.where}: {correct} correct of n_test = {n_test} is impossible")
    numbers = {name: fields.number(f"cost.{name}", required=False) for name in _COST}
    before = fields.number("source_seconds", required=False)  # the training of what was quantised afterwards
    numbers |= {"train_seconds": fields.number("seconds") + (before or 0)}
    numbers |= {"epochs": fields.number("epochs", required=False), "source_seconds": before}
    numbers |= {name: fields.number(name, required=False) for name in ("search_seconds", *_BEFORE)}
    numbers |= {"test_loss": fields.number("metrics.test_loss", required=False)}
    numbers |= {"test_top5": fields.number("metrics.test_top5", required=False)}
    weight = fields.number("bits_mean.weight", required=False)
    activation = fields.number("bits_mean.activation", required=False)
    quantised = weight is not None and activation is not None and (weight, activation) != (32, 32)
    network = fields.get("network") if isinstance(fields.get("network"), dict) else {}
    numbers["init_channels"] = fields.number("network.init_channels", required=False)
    size = {key: network.get(key) for key in ("init_channels", "layers", "stem", "image_size")}
    size |= {key: fields.get(key) for key in ("epochs", "n_train", "n_test")}
    size["steps_per_epoch"] = _shortened(fields, common["folder"])
    if common["settings"].get("match_bitops"):
        del size["init_channels"]
        size["match_bitops"] = common["settings"]["match_bitops"]
    return Record(
        **common | _architecture(common, fields),
        bits=(weight, activation) if quantised else None,
        correct=correct,
        n_test=n_test,
        accuracy=correct / n_test,
        numbers=numbers,
        size=tuple(size.items()),
    )


def _shortened(fields: _Fields, folder: Path) -> Any:
    """The steps to which a training's epochs were cut, None for whole epochs; of what was quantised: its training's."""
    if fields.get("steps_per_epoch") is not None:
        return fields.get("steps_per_epoch")
    flags = _flags(_config_of(folder))
    if fields.get("stage") == "quantize":  # an older version did not say it
        sources = (_flags(_config_of(place)) for place in _places(folder, [flags.get("run")]))
        flags = next((found for found in sources if found), {})
    return flags.get("steps_per_epoch")


def _search(fields: _Fields, common: dict[str, Any]) -> Record:
    names = ("exact_bitops", "exact_bitops_quantized", "expected_bitops", "target_bitops", "parameter_free_share")
    numbers = {name: fields.number(name, required=False) for name in names}
    numbers |= {"search_seconds": fields.number("seconds"), "epochs": fields.number("epochs", required=False)}
    numbers |= {name: fields.number(name, required=False) for name in _BEFORE}
    reached = fields.get("target_reached")
    if reached is not None:
        numbers["target_reached"] = float(bool(reached))
    accuracy = fields.number("metrics.valid_top1", required=False)
    return Record(**common, accuracy=accuracy, numbers=numbers, size=(("epochs", fields.get("epochs")),))


def _unfinished(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> Record:
    """What is known of a run that has not finished; never fails on what is not there yet."""
    flags = _flags(config)
    known = {**flags, **config, **result}
    parts = folder.resolve().parent.name.split("-")
    seed = known.get("seed")
    return Record(
        folder=folder,
        stage="search" if known.get("stage", "search" if "search" in parts else "train") == "search" else "train",
        method=str(known.get("method") or parts[0]),
        dataset=str(known.get("dataset") or "?"),
        seed=seed if isinstance(seed, int) else None,
        finished=False,
        progress=_progress(folder, flags.get("epochs")),
        held=is_held(folder),
        changed=_changed(config),
        architecture=str(known.get("arch") or ""),
        settings=_settings(config),
    )


def _changed(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that changed when the run went on, one text each; a note that is none counts as none."""
    notes = (one for one in changes_of(config) if {"flag", "before", "after"} <= one.keys())
    return tuple(f"{flag(str(o['flag']))} {json.dumps(o['before'])} -> {json.dumps(o['after'])}" for o in notes)


def _progress(folder: Path, epochs: Any) -> str:
    """How many epochs are over, such as `3 of 20 epochs done`: history.jsonl has a line for each."""
    done = epochs_over(folder)
    return f"{done} of {epochs} epochs done" if isinstance(epochs, int) else f"{done} epochs done"


def _architecture(common: Mapping[str, Any], fields: _Fields) -> dict[str, Any]:
    """What is known of a trained architecture and of its search, as fields of the record."""
    folder, text = common["folder"], str(fields.get("architecture") or "")
    data = _read_object(folder / "architecture.json") if (folder / "architecture.json").is_file() else {}
    searched_bits = isinstance(data.get("bits"), dict) and data["bits"].get("kind") != "uniform"
    provenance = data.get("search")
    name = data.get("name") if isinstance(data.get("name"), str) else None
    if not isinstance(provenance, dict) or not provenance:
        name = name or (Path(text).stem if text.endswith(".json") else Path(text).name) or "?"
        return {"architecture": name, "searched_bits": searched_bits}
    digest, finder = provenance.get("flags_digest"), provenance.get("method")
    origin = _search_config(folder, digest)
    bits = _flags(origin).get("bits") or provenance.get("bits")
    return {
        "architecture": name or ("found" if finder in (None, common["method"]) else f"found by {finder}"),
        "search": str(digest or json.dumps(provenance, sort_keys=True, default=str)),
        "searched_bits": searched_bits,
        "bit_set": tuple(bits) if searched_bits and isinstance(bits, list) else (),
        "settings": common["settings"] | {f"search.{key}": value for key, value in _settings(origin).items()},
        "sources": common["sources"] | {f"search.{key}": value for key, value in _sources(origin).items()},
    }


def _search_config(folder: Path, digest: Any, depth: int = 3) -> dict[str, Any]:
    """The config.json of the search that has this digest, along the runs that led here; {} where it is gone."""
    config = _config_of(folder)
    if digest is None or config.get("digest") == digest:
        return config if digest else {}
    for place in _places(folder, [_flags(config).get(key) for key in _SOURCES]) if depth else ():
        if found := _search_config(place, digest, depth - 1):
            return found
    return {}


def _config_of(folder: Path) -> dict[str, Any]:
    """A run's config.json; {} where there is none."""
    try:
        return _read_object(folder / "config.json")
    except (OSError, ValueError):
        return {}


def _places(folder: Path, names: Iterable[Any]) -> list[Path]:
    """Where the runs may lie that a run names by their paths from the folder in which its command was typed."""
    texts = [name for name in names if isinstance(name, str)]
    places = [base / name for name in texts for base in (Path(), *folder.resolve().parents)]
    return [place for place in places if (place / "config.json").is_file()]


def _flags(config: Mapping[str, Any]) -> dict[str, Any]:
    return config["config"] if isinstance(config.get("config"), dict) else {}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    volatile = config.get("volatile") if isinstance(config.get("volatile"), list) else []
    kept = {key: value for key, value in _flags(config).items() if key not in _INCIDENTAL and key not in volatile}
    if kept.get("match_bitops"):  # that factor says the size; the channels follow from what was found
        kept.pop("init_channels", None)
    else:
        kept.pop("match_reference", None)
    if changes := changes_of(config):  # no other run had these flags in this order
        kept["changed_on_the_way"] = [[one.get("flag"), one.get("before"), one.get("after")] for one in changes]
    return kept | {key: True for key in _OTHER_RUNS if kept.get(key)}


def _cells(folder: Path, flags: Mapping[str, Any]) -> str:
    """See `Record.cells`. Where the images lie is no part of a configuration's digest."""
    data = _read_object(folder / "architecture.json") if (folder / "architecture.json").is_file() else {}
    images = flags.get("data") if flags.get("dataset") == "folder" else None
    return json.dumps([data.get("genotype"), data.get("bits"), images], sort_keys=True, default=str)


def _started_from(folder: Path, flags: Mapping[str, Any]) -> tuple[str, ...]:
    """See `Record.started_from`; the cells count by themselves, wherever they came from."""
    found = []
    for key, place_flag in CONTENTS.items():
        if place_flag != "arch" and flags.get(place_flag):
            runs = (_config_of(place).get("digest") for place in _places(folder, [flags[place_flag]]))
            found.append(f"{place_flag}: {next(filter(None, runs), None) or flags.get(key) or flags[place_flag]}")
    return tuple(found)


def _sources(config: Mapping[str, Any]) -> dict[str, str]:
    return config["sources"] if isinstance(config.get("sources"), dict) else {}


def _device(value: Any) -> str:
    """The device as one short text: the GPUs where they were used, else the processor."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else ""
    gpus = value.get("cuda")
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else str(gpus[0])
    cores = value.get("cores")
    return ", ".join([str(value.get("cpu") or "CPU"), *([f"{cores} cores"] if cores else [])])


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


@dataclass(frozen=True)
class _Fields:
    """Typed access to a result's fields by dotted names; every error names file and field."""

    data: Mapping[str, Any]
    where: str

    def get(self, name: str) -> Any:
        at: Any = self.data
        for part in name.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        return at

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.where}: field {name} is missing or not a text")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.where}: field {name} is missing or not a whole number")
        return value

    def number(self, name: str, *, required: bool = True) -> float | None:
        value = self.get(name)
        if value is None and not required:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.where}: field {name} is missing or not a number")
        return float(value)
