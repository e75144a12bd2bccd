# SPDX-License-Identifier: Apache-2.0
"""Records of runs as rows of a table, and the table as Markdown, CSV or JSON.

A row never mixes data sets, image sizes, network sizes or numbers of epochs and images. Rows stand in the order in
which their runs were named: nothing is ranked.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.recipes.records import Record
from common.recipes.statistics import mean_and_deviation, mean_interval, wilson_interval

GROUP_FIELDS = ("method", "architecture", "bits", "settings", "seed", "run")
"""What rows can be told apart by, beside what never mixes."""
DEFAULT_GROUPS = ("method", "architecture", "bits", "settings")
_NUMBERS = (
    *("parameters", "macs", "bitops", "bitops_quantized", "bitops_paper", "weight_bytes", "weight_bytes_fp32"),
    *("exact_bitops", "exact_bitops_quantized", "expected_bitops", "target_bitops", "target_reached"),
    *("parameter_free_share", "epochs", "test_loss", "test_top5", "search_seconds", "train_seconds"),
)

_BITOPS = ("bitops", "bitops_quantized", "bitops_paper")


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed only (or by what the caller asked to put together)."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """One of its runs, for what all of them share."""
        return self.records[0]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each run, as fractions."""
        return [record.accuracy for record in self.records if record.accuracy is not None]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%: Wilson's of a single trained run, Student's t of the mean of several."""
        if len(self.records) == 1:
            record = self.first
            return wilson_interval(record.correct, record.n_test) if record.correct is not None else None
        return mean_interval(self.accuracies) if self.accuracies else None

    def mean(self, name: str) -> float | None:
        """Mean of a number over the runs; None where any run lacks it."""
        values = [record.numbers.get(name) for record in self.records]
        present = [value for value in values if value is not None]
        return mean_and_deviation(present)[0] if len(present) == len(values) and present else None

    @property
    def bits(self) -> tuple[float, float] | None:
        """Mean weight and activation bits; None: full precision."""
        pairs = [record.bits for record in self.records if record.bits is not None]
        if not pairs:
            return None
        return mean_and_deviation([pair[0] for pair in pairs])[0], mean_and_deviation([pair[1] for pair in pairs])[0]

    def common(self, value: Callable[[Record], str]) -> str:
        """What all runs share, or all the values, separated by commas."""
        return ", ".join(dict.fromkeys(text for record in self.records if (text := value(record))))


def group(records: Iterable[Record], by: Sequence[str] = DEFAULT_GROUPS) -> list[Row]:
    """Rows in order of their first run. Searches and unfinished runs have a row each.

    Raises ValueError for a field that is not one of GROUP_FIELDS.
    """
    unknown = [name for name in by if name not in GROUP_FIELDS]
    if unknown:
        raise ValueError(f"--group-by: {unknown[0]!r} is not one of {', '.join(GROUP_FIELDS)}")
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        alone = record.stage == "search" or not record.finished
        key = ("run", str(record.folder)) if alone else (record.dataset, record.size, *(_key(record, f) for f in by))
        rows.setdefault(key, []).append(record)
    return [Row(tuple(found)) for found in rows.values()]


def _key(record: Record, name: str) -> Any:
    if name == "bits":
        return "searched" if record.searched_bits else record.bits
    if name == "settings":
        return json.dumps(record.settings, sort_keys=True, default=str)
    return str(record.folder) if name == "run" else getattr(record, name)


def differences(rows: Sequence[Row]) -> list[str]:
    """For rows that would look the same (same method, architecture and bits): the flags that tell them apart."""
    texts = []
    for row in rows:
        look = _look(row)
        twins = [other for other in rows if _look(other) == look]
        keys = sorted({key for twin in twins for record in twin.records for key in record.settings})
        sizes = dict(row.first.size)
        told = [
            key if row.first.settings.get(key) is True else f"{key}={row.first.settings.get(key)}"
            for key in keys
            if len({json.dumps(twin.first.settings.get(key), default=str) for twin in twins}) > 1
        ]
        told += [
            f"{key}={value}"
            for key, value in sizes.items()
            if key not in keys and len({str(dict(twin.first.size).get(key)) for twin in twins}) > 1
        ]
        texts.append(" ".join(told))
    return texts


def _look(row: Row) -> tuple[str, str, Any]:
    return row.first.method, row.first.architecture, _key(row.first, "bits")


def as_objects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat object a row: fractions, bytes, seconds and plain counts, named as in result.json."""
    objects = []
    for row, differs in zip(rows, differences(rows), strict=True):
        record, interval = row.first, row.interval
        mean, deviation = mean_and_deviation(row.accuracies) if row.accuracies else (None, None)
        weight, activation = row.bits or (None, None)
        entry: dict[str, Any] = {
            "stage": record.stage,
            "dataset": record.dataset,
            "method": row.common(lambda r: r.method),
            "architecture": row.common(lambda r: r.architecture),
            "differs": differs,
            "weight_bits": weight,
            "activation_bits": activation,
            "finished": record.finished,
            "progress": record.progress,
            "n": len(row.records),
            "seeds": [r.seed for r in row.records],
            "accuracy": mean,
            "accuracy_std": deviation,
            "accuracy_low": interval[0] if interval else None,
            "accuracy_high": interval[1] if interval else None,
            "interval": None if interval is None else "wilson" if len(row.records) == 1 else "student",
            "test_correct": [r.correct for r in row.records],
            "n_test": record.n_test,
        }
        entry |= {name: _plain(row.mean(name)) for name in _NUMBERS}
        entry |= {key: value for key, value in record.size if key not in entry}
        entry |= {"device": row.common(lambda r: r.device), "runs": [str(r.folder) for r in row.records]}
        objects.append(entry)
    return objects


def _plain(value: float | None) -> float | int | None:
    """Whole numbers without a decimal point."""
    return int(value) if value is not None and value == int(value) else value


def to_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list, one object a row."""
    return json.dumps(as_objects(rows), indent=2, default=str) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with every column of the JSON; lists are joined by spaces, unknown values empty."""
    objects = as_objects(rows)
    columns = list(dict.fromkeys(key for entry in objects for key in entry))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for entry in objects:
        writer.writerow({key: _cell(value) for key, value in entry.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(str(item) for item in value if item is not None)
    return "" if value is None else value


def to_markdown(rows: Sequence[Row]) -> str:
    """One Markdown table a data set and size for the trainings, one a data set for the searches; columns aligned."""
    parts = []
    for stage, table in (("train", _train_table), ("search", _search_table)):
        kinds: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row.first.stage == stage and row.first.finished:
                kinds.setdefault(_kind(row), []).append(row)
        for row in rows:  # an unfinished run stands in the first table of its data set
            if row.first.stage == stage and not row.first.finished:
                same = [kind for kind in kinds if kind[0] == row.first.dataset]
                kinds.setdefault(same[0] if same else (row.first.dataset,), []).append(row)
        parts += [table(members) for members in kinds.values()]
    return "\n".join(parts)


def _kind(row: Row) -> tuple[Any, ...]:
    size = dict(row.first.size)
    return (row.first.dataset, size.get("image_size"), size.get("n_test"), size.get("n_train"))


def _train_table(rows: Sequence[Row]) -> str:
    finished = [row for row in rows if row.first.finished]
    ops, unit = _unit([row.mean(n) for row in finished for n in _BITOPS])
    memory, bytes_unit = _unit([row.mean("weight_bytes") for row in finished])
    alone = all(len(row.records) == 1 for row in rows)
    several = len({row.common(lambda r: r.method) for row in rows}) > 1
    columns: dict[str, list[str]] = {}
    for row, differs in zip(rows, differences(rows), strict=True):
        name = row.common(lambda r: r.architecture) or "?"
        weight, fp32 = row.mean("weight_bytes"), row.mean("weight_bytes_fp32")
        cells = {"method": row.common(lambda r: r.method)} if several else {}
        cells |= {
            "architecture": f"{name} {differs}".strip(),
            "w/a": _bits(row),
            "accuracy %": _accuracy(row),
            "params M": _number(row.mean("parameters"), 1e6),
            "MACs M": _number(row.mean("macs"), 1e6),
            f"BitOps {unit}": "/".join(_number(row.mean(name), ops) for name in _BITOPS) if row.first.finished else "-",
            f"memory {bytes_unit}B": _number(weight, memory)
            + (f" ({100 * weight / fp32:.0f}%)" if weight and fp32 else ""),
            "time s": _times(row),
        }
        cells |= {"seed": str(row.first.seed)} if alone else {"n": str(len(row.records))}
        for key, cell in cells.items():
            columns.setdefault(key, []).append(cell)
    if alone and len(set(columns["seed"])) == 1:
        columns["n"] = ["1" for _ in columns.pop("seed")]
    notes = [
        "w/a: mean bits of weights/activations. accuracy: of one run with Wilson's 95% interval; of n runs mean ± std.",
        "BitOps: all layers/quantised layers only/the paper's accounting. memory: of the weights (share of fp32).",
        "time: search + training.",
    ]
    return _heading(rows, finished, "test images") + _aligned(columns) + _notes(rows, notes)


def _search_table(rows: Sequence[Row]) -> str:
    names = ("exact_bitops", "exact_bitops_quantized", "target_bitops", "expected_bitops")
    ops, unit = _unit([row.mean(name) for row in rows for name in names])
    columns: dict[str, list[str]] = {}
    for row in rows:
        reached, share = row.mean("target_reached"), row.mean("parameter_free_share")
        cells = {
            "search": row.first.method,
            "run": row.first.folder.name or str(row.first.folder),
            "seed": "-" if row.first.seed is None else str(row.first.seed),
            "validation %": f"{100 * row.accuracies[0]:.1f}" if row.accuracies else _accuracy(row),
            f"BitOps {unit}": _number(row.mean("exact_bitops"), ops),
            "quant.": _number(row.mean("exact_bitops_quantized"), ops),
            "expected": _number(row.mean("expected_bitops"), ops),
            "target": _number(row.mean("target_bitops"), ops),
            "reached": "-" if reached is None else "yes" if reached else "no",
            "free ops": "-" if share is None else f"{100 * share:.0f}%",
            "search s": _seconds(row.mean("search_seconds")),
        }
        for key, cell in cells.items():
            columns.setdefault(key, []).append(cell)
    notes = ["BitOps: exact cost of what was found; free ops: share of operations without parameters."]
    return _heading(rows, [row for row in rows if row.first.finished], "") + _aligned(columns) + _notes(rows, notes)


def _heading(rows: Sequence[Row], finished: Sequence[Row], counted: str) -> str:
    """Data set, sizes and whatever else all rows share, so that it needs no column."""
    sizes = dict(finished[0].first.size) if finished else {}
    title = f"### {rows[0].first.dataset}" + (": searches" if rows[0].first.stage == "search" else "")
    if sizes.get("image_size"):
        title += f", {sizes['image_size']}x{sizes['image_size']}"
    if counted and sizes.get("n_test"):
        title += f", {sizes['n_test']} {counted}"
    shared = []
    words = {
        "init_channels": "{} channels",
        "layers": "{} layers",
        "epochs": "{} epochs",
        "n_train": "{} to learn from",
    }
    methods = {row.common(lambda r: r.method) for row in rows}
    if rows[0].first.stage == "train" and len(methods) == 1:
        shared.append(methods.pop())
    for key, text in words.items():
        values = {dict(row.first.size).get(key) for row in finished}
        if len(values) == 1 and (value := values.pop()) is not None:
            shared.append(text.format(value))
    seeds = sorted({record.seed for row in finished for record in row.records if record.seed is not None})
    if seeds:
        shared.append(("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)))
    devices = dict.fromkeys(device for row in finished if (device := row.common(lambda r: r.device)))
    shared += list(devices)
    return title + "\n\n" + (", ".join(shared) + "\n\n" if shared else "")


def _notes(rows: Sequence[Row], notes: Sequence[str]) -> str:
    unfinished = [
        f"not finished: {row.first.folder} ({row.first.progress}); `--resume auto` goes on with it."
        for row in rows
        if not row.first.finished
    ]
    return "\n" + "\n".join([*unfinished, *notes]) + "\n"


def _aligned(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; the first columns left, numbers right."""
    lines: list[list[str]] = [[], []]
    count = max(len(cells) for cells in columns.values())
    lines += [[] for _ in range(count)]
    for name, cells in columns.items():
        width = max(2, len(name), *(len(cell) for cell in cells))
        left = name in ("method", "architecture", "search", "run", "accuracy %")
        lines[0].append(f"{name:<{width}}" if left else f"{name:>{width}}")
        lines[1].append("-" * width if left else "-" * (width - 1) + ":")
        for line, cell in zip(lines[2:], cells, strict=True):
            cell = cell.replace("|", "\\|")
            line.append(f"{cell:<{width}}" if left else f"{cell:>{width}}")
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _accuracy(row: Row) -> str:
    if not row.first.finished:
        return "not finished"
    if not row.accuracies:
        return "-"
    mean, deviation = mean_and_deviation(row.accuracies)
    if deviation is not None:
        return f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    low, high = row.interval or (mean, mean)
    return f"{100 * mean:.1f} [{100 * low:.1f}-{100 * high:.1f}]"


def _bits(row: Row) -> str:
    if not row.first.finished:
        return "-"
    if row.bits is None:
        return "fp32"
    return "/".join(f"{value:.0f}" if value == int(value) else f"{value:.1f}" for value in row.bits)


def _unit(values: Iterable[float | None]) -> tuple[float, str]:
    """The decimal unit in which the smallest positive value is at least 1 (beyond T and below 1: the end)."""
    positive = [value for value in values if value]
    smallest = min(positive, default=1.0)
    for scale, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if smallest >= scale:
            return scale, name
    return 1.0, ""


def _number(value: float | None, scale: float) -> str:
    """Three significant digits, never in exponent form."""
    if value is None:
        return "-"
    scaled = value / scale
    if scaled == 0:
        return "0"
    digits = 2
    while digits > 0 and abs(scaled) >= 10 ** (3 - digits):
        digits -= 1
    if abs(scaled) < 1:
        digits = 3
    return f"{scaled:.{digits}f}"


def _times(row: Row) -> str:
    """Seconds of the search, where there was one, and of the training."""
    search, train = row.mean("search_seconds"), row.mean("train_seconds")
    return _seconds(train) if search is None else f"{_seconds(search)}+{_seconds(train)}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
