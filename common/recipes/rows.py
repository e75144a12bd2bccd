# SPDX-License-Identifier: Apache-2.0
"""Records of runs as rows: runs that differ by their seed share one, with the statistics of their accuracy.

A run of the same configuration and seed as another one is no second measurement: only the first counts. A row
never mixes data sets or sizes (image, network, numbers of epochs and images).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.recipes.records import Record
from common.recipes.statistics import (
    grouped_mean_interval,
    mean_and_deviation,
    rank_labels,
    variance_components,
    wilson_interval,
)

DEFAULT_GROUPS = ("dataset", "size", "method", "architecture", "bits", "settings")
GROUP_FIELDS = (*DEFAULT_GROUPS, "seed", "run")
"""What rows can be told apart by."""
BITOPS = ("bitops", "bitops_quantized", "bitops_paper")
"""The three figures: all layers, quantised layers only, the paper's accounting."""
_NUMBERS = (
    *("parameters", "macs", *BITOPS, "weight_bytes", "weight_bytes_fp32"),
    *("exact_bitops", "exact_bitops_quantized", "expected_bitops", "target_bitops", "target_reached"),
    *("parameter_free_share", "epochs", "test_loss", "test_top5", "search_seconds", "train_seconds"),
    *("before_seconds", "before_search_seconds", "init_channels"),
)
SIZES = ("epochs", "steps_per_epoch", "layers", "init_channels", "stem")
"""What may differ from row to row of a table, and is then told."""
_SIZE_COLUMNS = ("layers", "stem", "image_size", "n_train", "steps_per_epoch", "match_bitops")
"""Sizes that are neither in _NUMBERS nor named by themselves among the columns of `as_objects`."""


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed only (or by what the caller asked to put together)."""

    records: tuple[Record, ...]
    repeats: tuple[tuple[Record, Record], ...] = ()
    """(run, the one of `records` whose configuration and seed it has) of each finished training that does not count."""

    @property
    def first(self) -> Record:
        """One of its runs, for what all of them share."""
        return self.records[0]

    @property
    def trained(self) -> bool:
        """Whether it holds finished, trained networks."""
        return self.first.finished and self.first.stage == "train"

    @property
    def accuracies(self) -> list[list[float]]:
        """Accuracy of each run, as fractions; a list for each search, or named architecture."""
        groups: dict[str, list[float]] = {}
        for record in self.records:
            if record.accuracy is not None:
                groups.setdefault(record.search or record.architecture, []).append(record.accuracy)
        return list(groups.values())

    @property
    def accuracy(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation over all runs; None where there is none."""
        values = [value for group in self.accuracies for value in group]
        return mean_and_deviation(values) if values else (None, None)

    @property
    def deviations(self) -> tuple[float | None, float | None]:
        """Standard deviation between searches and between trainings; None where a level has one member.

        Roots of the unbiased variance components; a component estimated below zero counts as zero.
        """
        between, within = variance_components(self.accuracies) if self.accuracies else (None, None)
        return _root(between), _root(within)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%: Wilson's of a single trained run, Student's t of the mean of several."""
        if len(self.records) == 1:
            record = self.first
            return wilson_interval(record.correct, record.n_test) if record.correct is not None else None
        return grouped_mean_interval(self.accuracies) if self.accuracies else None

    def mean(self, name: str) -> float | None:
        """Mean of a number over the runs; None where any run lacks it."""
        values = [record.numbers.get(name) for record in self.records]
        present = [value for value in values if value is not None]
        return mean_and_deviation(present)[0] if len(present) == len(values) and present else None

    @property
    def bits(self) -> tuple[float, float] | None:
        """Mean weight and activation bits, full precision counted as 32; None: full precision in every run."""
        pairs = [record.bits or (32.0, 32.0) for record in self.records]
        if all(record.bits is None for record in self.records):
            return None
        return mean_and_deviation([pair[0] for pair in pairs])[0], mean_and_deviation([pair[1] for pair in pairs])[0]

    @property
    def bits_label(self) -> str:
        """The setting as a name: `fp32`, `4/4` (weights/activations), `{2,4}` for a searched set; else the means."""
        if self.bits is None:
            return "fp32"
        sets = {record.bit_set for record in self.records}
        if len(sets) == 1 and (chosen := sets.pop()):
            return "{" + ",".join(map(str, chosen)) + "}"
        return self.bits_text

    @property
    def bits_text(self) -> str:
        """Mean weight/activation bits, such as `4/4` or `2.3/2.9`; `fp32` without."""
        if self.bits is None:
            return "fp32"
        return "/".join(f"{value:.0f}" if value == int(value) else f"{value:.1f}" for value in self.bits)

    def common(self, value: Callable[[Record], str]) -> str:
        """What all runs share, or all the values, separated by commas."""
        return ", ".join(dict.fromkeys(text for record in self.records if (text := value(record))))


def _root(variance: float | None) -> float | None:
    return None if variance is None else math.sqrt(max(0.0, variance))


def group(records: Iterable[Record], by: Sequence[str] = DEFAULT_GROUPS) -> list[Row]:
    """Rows in order of their first run. Searches and unfinished runs have a row each.

    Of trainings with the same configuration and seed only the first counts, unless each run is to have its own row.
    Raises ValueError for a field that is not one of GROUP_FIELDS, and where a row would mix data sets or sizes.
    """
    unknown = [name for name in by if name not in GROUP_FIELDS]
    if unknown:
        raise ValueError(f"--group-by: {unknown[0]!r} is not one of {', '.join(GROUP_FIELDS)}")
    records, rows = list(records), dict[tuple[Any, ...], list[Record]]()
    originals = {} if "run" in by else _originals(records)
    records = [record for record in records if record.folder not in originals]
    repeats: dict[Path, list[tuple[Record, Record]]] = {}
    for repeat, original in originals.values():
        repeats.setdefault(original.folder, []).append((repeat, original))
    settings = _telling_settings(records)
    for record in records:
        alone = record.stage == "search" or not record.finished
        key = (str(record.folder),) if alone else tuple(_key(record, name) for name in by if name != "settings")
        if not alone and "settings" in by:
            key += (settings[record.folder],)
        members = rows.setdefault(key, [])
        if members and (what := _unlike(members[0], record)):
            field, first, second = what
            raise ValueError(
                f"--group-by {' '.join(by)}: would mix {members[0].folder} ({first}) and {record.folder} ({second}) "
                f"in one row; add {field} to --group-by, or name runs of one {field} only"
            )
        members.append(record)
    return [
        Row(tuple(found), tuple(pair for record in found for pair in repeats.get(record.folder, ())))
        for found in rows.values()
    ]


def _originals(records: Sequence[Record]) -> dict[Path, tuple[Record, Record]]:
    """Folder -> (run, the first run that it repeats), of every finished training that repeats one.

    A repeat has the same configuration by its digest; or the same seed, settings, cells and runs that it started from,
    where the digests differ because paths do.
    """
    settings, seen, found = _telling_settings(records), dict[tuple[Any, ...], Record](), {}
    for record in records:
        if record.stage == "search" or not record.finished:
            continue
        what = (record.method, record.dataset, record.seed, record.size, record.search, record.cells)
        own = (record.architecture, record.bits, record.numbers.get("init_channels"), record.started_from)
        keys: list[tuple[Any, ...]] = [(*what, *own, settings[record.folder])]
        keys += [(*what, record.digest)] if record.digest else []
        original = next((seen[key] for key in keys if key in seen), record)
        for key in keys:
            seen.setdefault(key, original)
        if original is not record:
            found[record.folder] = (record, original)
    return found


def _unlike(first: Record, second: Record) -> tuple[str, str, str] | None:
    """(field, values, other values) of what must not be mixed and differs."""
    if first.dataset != second.dataset:
        return "dataset", f"data set {first.dataset}", f"data set {second.dataset}"
    sizes = dict(first.size), dict(second.size)
    unequal = [key for key in sizes[0] | sizes[1] if sizes[0].get(key) != sizes[1].get(key)]
    one, other = (", ".join(f"{key} {size[key]}" for key in unequal if key in size) for size in sizes)
    return ("size", one, other) if unequal else None


def _telling_settings(records: Sequence[Record]) -> dict[Path, str]:
    """The settings of each run as a text, equal for equal experiments.

    A flag that is off, and one that some of the runs of a look do not have (their version was another) while it has
    its default here, say nothing.
    """
    known: dict[Any, set[str]] = {}
    for record in records:
        known.setdefault(_look(record), set(record.settings)).intersection_update(record.settings)
    texts = {}
    for record in records:
        common = known[_look(record)]
        telling = {
            key: value
            for key, value in record.settings.items()
            if value and (key in common or record.sources.get(key) != "default")
        }
        texts[record.folder] = json.dumps(telling, sort_keys=True, default=str)
    return texts


def _key(record: Record, name: str) -> Any:
    if name == "bits":
        return ("searched", record.bit_set) if record.searched_bits else record.bits
    return str(record.folder) if name == "run" else getattr(record, name)


def _look(record: Record) -> tuple[str, str, Any]:
    return record.method, record.architecture, _key(record, "bits")


def differences(rows: Sequence[Row]) -> list[str]:
    """What tells rows apart: sizes that differ in their table, and flags between rows that would look the same.

    Rows look the same with the same method, architecture and bits. A flag that is off, has the value that most of
    these rows have, or follows from other flags goes without saying.
    """
    texts = []
    for row, sizes in zip(rows, size_differences(rows), strict=True):
        twins = [_flags(other) for other in rows if _look(other.first) == _look(row.first)]
        told = []
        for key, value in sorted(_flags(row).items()):
            if key in SIZES and row.first.finished:
                continue
            values = Counter(str(twin[key] or None) for twin in twins if key in twin)
            usual = len(values) == 1 or 2 * values[str(value or None)] > len(twins)
            silent = value is None or value is False or usual or row.first.sources.get(key) == "derived"
            if not silent or (key == "match_bitops" and value):  # a size of its own is always told
                told.append(key if value is True else f"{key}={_short(value)}")
        texts.append(" ".join([*told, *([sizes] if sizes else [])]))
    return texts


def folders_apart(rows: Sequence[Row], texts: Sequence[Any]) -> list[str]:
    """For each row whose text another row has too: the folder of its first run, and how many more it has; else empty.

    Of the folders only as many last parts stand as it takes to tell these rows apart.
    """
    told = []
    for row, text in zip(rows, texts, strict=True):
        paths = [other.first.folder.parts for other, same in zip(rows, texts, strict=True) if same == text]
        parts = 1
        while parts < max(map(len, paths)) and len({path[-parts:] for path in paths}) < len(paths):
            parts += 1
        name = str(Path(*row.first.folder.parts[-parts:])) if len(paths) > 1 else ""
        told.append(f"{name} +{len(row.records) - 1}" if name and len(row.records) > 1 else name)
    return told


def size_differences(rows: Sequence[Row]) -> list[str]:
    """Each finished row's epochs, layers, channels and so on, where they are not those of most rows of its table."""
    texts = []
    for row in rows:
        flags, told = _flags(row), []
        mates = [other for other in rows if _table(other) == _table(row)] if row.first.finished else []
        for key in SIZES if mates else ():
            most, value = usual_size(mates, key), flags.get(key)
            if key in flags and (most is None or most[0] != value):
                shown = "all" if value is None and key == "steps_per_epoch" else value
                told += [f"{key}={_short(shown)}"] if shown is not None else []
        texts.append(" ".join(told))
    return texts


def usual_size(rows: Sequence[Row], key: str) -> tuple[Any, bool] | None:
    """The value that more than half of the rows have, of those that have one, and whether all rows have it."""
    known = [flags[key] for row in rows if key in (flags := _flags(row))]
    value, count = Counter(known).most_common(1)[0] if known else (None, 0)
    return (value, count == len(rows)) if 2 * count > len(known) else None


def _table(row: Row) -> tuple[Any, ...]:
    return row.first.stage, row.first.finished, data_of(row)


def _short(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value


def _flags(row: Row) -> dict[str, Any]:
    """A row's settings and sizes by name; a budget together with the channels that it allowed."""
    flags = {**row.first.settings, **dict(row.first.size)}
    if flags.get("match_bitops"):
        channels = [int(record.numbers.get("init_channels") or 0) for record in row.records]
        ends = "-".join(str(end) for end in dict.fromkeys((min(channels), max(channels))))
        flags["match_bitops"] = f"{flags['match_bitops']:g} ({ends} channels)"
    return flags


def repeat_notes(rows: Iterable[Row]) -> list[str]:
    """One line for each run that does not count."""
    return [
        f"{repeat.folder}: the same configuration and seed as {original.folder}, not counted"
        + ("." if repeat.correct == original.correct else f", though {repeat.correct} correct, not {original.correct}.")
        for row in rows
        for repeat, original in row.repeats
    ]


def ranks(rows: Sequence[Row]) -> list[str]:
    """Each row's rank among the rows of the same data that were trained as long; `-` where there is no accuracy.

    See `rank_labels`. Rows of other channels or layers are alternatives, and ranked together.
    """
    labels = ["-"] * len(rows)
    for kind in {(data_of(row), length_of(row)) for row in rows if row.trained}:
        members = [i for i, row in enumerate(rows) if row.trained and (data_of(row), length_of(row)) == kind]
        for index, label in zip(members, rank_labels([rows[i].interval for i in members]), strict=True):
            labels[index] = label
    return labels


def length_of(row: Row) -> tuple[Any, Any]:
    """How long a row's networks were trained: epochs, and the steps to which these were cut (None: whole ones)."""
    size = dict(row.first.size)
    return size.get("epochs"), size.get("steps_per_epoch")


def data_of(row: Row) -> tuple[Any, ...]:
    """What makes accuracies comparable: data set, image size, numbers of test and training images."""
    size = dict(row.first.size)
    return (row.first.dataset, size.get("image_size"), size.get("n_test"), size.get("n_train"))


def as_objects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat object a row: fractions, bytes, seconds and plain counts, named as in result.json.

    All have the same keys in the same order, whatever the rows.
    """
    objects = []
    for row, differs, rank in zip(rows, differences(rows), ranks(rows), strict=True):
        record, interval = row.first, row.interval
        mean, deviation = row.accuracy
        search_deviation, train_deviation = row.deviations
        weight, activation = row.bits or (None, None)
        entry: dict[str, Any] = {
            "stage": record.stage,
            "dataset": record.dataset,
            "method": row.common(lambda r: r.method),
            "architecture": row.common(lambda r: r.architecture),
            "differs": differs,
            "bits": row.bits_label if row.trained else None,
            "weight_bits": weight,
            "activation_bits": activation,
            "finished": record.finished,
            "progress": record.progress,
            "rank": None if rank == "-" else rank,
            "n": len(row.records),
            "seeds": [r.seed for r in row.records],
            "accuracy": mean,
            "accuracy_std": deviation,
            "accuracy_std_searches": search_deviation,
            "accuracy_std_trainings": train_deviation,
            "accuracy_low": interval[0] if interval else None,
            "accuracy_high": interval[1] if interval else None,
            "interval": None if interval is None else "wilson" if len(row.records) == 1 else "student",
            "test_correct": [r.correct for r in row.records],
            "n_test": record.n_test,
        }
        entry |= {name: _plain(row.mean(name)) for name in _NUMBERS}
        entry |= {key: dict(record.size).get(key) for key in _SIZE_COLUMNS}
        entry |= {"device": row.common(lambda r: r.device), "runs": [str(r.folder) for r in row.records]}
        entry["not_counted"] = [str(repeat.folder) for repeat, _ in row.repeats]
        objects.append(entry)
    return objects


def _plain(value: float | None) -> float | int | None:
    """Whole numbers without a decimal point."""
    return int(value) if value is not None and value == int(value) else value
