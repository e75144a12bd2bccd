# SPDX-License-Identifier: Apache-2.0
"""Rows as a table: Markdown, LaTeX, CSV or JSON.

Rows stand in the order in which their runs were named; the column `rank` orders what the intervals tell apart.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.recipes.rows import (
    BITOPS,
    Row,
    as_objects,
    data_of,
    differences,
    folders_apart,
    length_of,
    ranks,
    repeat_notes,
    size_differences,
    usual_size,
)

LEFT = ("method", "architecture", "search", "run", "accuracy %", "size", "device")
"""Columns of text; all others are aligned right."""
_LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "[": "{[}", "`": ""}  # after a row's end, a [ would open an argument
)


@dataclass(frozen=True)
class Table:
    """A table as text: what to write above it, its columns of equal length, and what to write below it."""

    title: str
    shared: str
    columns: dict[str, list[str]]
    notes: list[str]


def to_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list, one object a row."""
    return json.dumps(as_objects(rows), indent=2, default=str) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with every column of the JSON, always in one order.

    Lists are joined by spaces, unknown values empty.
    """
    objects = as_objects(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(objects[0]) if objects else [], lineterminator="\n")
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
    return "\n".join(_markdown(table) for table in tables(rows))


def _markdown(table: Table) -> str:
    """The columns also line up in a terminal."""
    columns = []
    for name, cells in table.columns.items():
        cells = [name, *(cell.replace("|", "\\|") for cell in cells)]
        width = max(2, *map(len, cells))
        left = name in LEFT
        padded = [f"{cell:<{width}}" if left else f"{cell:>{width}}" for cell in cells]
        columns.append([padded[0], "-" * width if left else "-" * (width - 1) + ":", *padded[1:]])
    lines = "".join("| " + " | ".join(line) + " |\n" for line in zip(*columns, strict=True))
    shared = f"{table.shared}\n\n" if table.shared else ""
    return f"### {table.title}\n\n{shared}{lines}\n" + "\n".join(table.notes) + "\n"


def to_latex(rows: Sequence[Row]) -> str:
    """The tables of `to_markdown` as LaTeX; they need `\\usepackage{booktabs}`."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(table) for table in tables(rows))


def _latex(table: Table) -> str:
    lines = [list(table.columns), *zip(*table.columns.values(), strict=True)]
    head, *body = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in lines]
    shape = "".join("l" if name in LEFT else "r" for name in table.columns)
    caption = ". ".join(text for text in (table.title, table.shared) if text)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.translate(_LATEX)}.}}",
            rf"\begin{{tabular}}{{{shape}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            r"\par\smallskip{\footnotesize " + " ".join(table.notes).translate(_LATEX) + r"\par}",
            r"\end{table}",
            "",
        ]
    )


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table a data set and size for the trainings, then one a data set for the searches."""
    found = []
    for stage, table in (("train", _train_table), ("search", _search_table)):
        kinds: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row.first.stage == stage and row.first.finished:
                kinds.setdefault(data_of(row), []).append(row)
        for row in rows:  # an unfinished run stands in the first table of its data set
            if row.first.stage == stage and not row.first.finished:
                same = [kind for kind in kinds if kind[0] == row.first.dataset]
                kinds.setdefault(same[0] if same else (row.first.dataset,), []).append(row)
        found += [table(members) for members in kinds.values()]
    return found


def _train_table(rows: Sequence[Row]) -> Table:
    finished = [row for row in rows if row.first.finished]
    ops, unit = _unit([row.mean(name) for row in finished for name in BITOPS])
    memory, bytes_unit = _unit([row.mean("weight_bytes") for row in finished])
    methods = [row.common(lambda r: r.method) for row in rows]
    names = [
        f"{row.common(lambda r: r.architecture) or '?'} {differs}".strip()
        for row, differs in zip(rows, differences(rows), strict=True)
    ]
    folders = folders_apart(rows, list(zip(methods, names, map(_bits, rows), strict=True)))
    cells = []
    for row, method, name, folder, rank in zip(rows, methods, names, folders, ranks(rows), strict=True):
        weight, fp32 = row.mean("weight_bytes"), row.mean("weight_bytes_fp32")
        share = f" ({100 * weight / fp32:.0f}%)" if weight and fp32 else ""
        seeds = {str(record.seed) for record in row.records}
        cells.append(
            {
                "method": method,
                "architecture": f"{name} {folder}".strip(),
                "w/a": _bits(row),
                "accuracy %": _accuracy(row),
                "std s/t": "/".join("-" if value is None else f"{100 * value:.2f}" for value in row.deviations),
                "rank": rank,
                "params M": _number(row.mean("parameters"), 1e6),
                "MACs M": _number(row.mean("macs"), 1e6),
                f"BitOps {unit}": "/".join(_number(row.mean(name), ops) for name in BITOPS) if row.trained else "-",
                f"memory {bytes_unit}B": _number(weight, memory) + share,
                "time s": _times(row),
                "device": _device(row),
                "n": str(len(row.records)),
                "seed": ",".join(sorted(seeds)),
            }
        )
    columns = {name: [line[name] for line in cells] for name in cells[0]}
    # what says nothing here needs no column
    alone = all(len(row.records) == 1 for row in rows)
    dropped = {
        "method": len(set(columns["method"])) == 1,
        "rank": len(finished) < 2,
        "std s/t": all(row.deviations[0] is None for row in rows),
        "device": _one_device(finished),
        "seed": not alone or len(set(columns["seed"])) == 1,
    }
    dropped["n"] = not dropped["seed"]
    columns = {name: column for name, column in columns.items() if not dropped.get(name)}
    return Table(
        *_heading(rows, finished, "test images"),
        columns,
        _unfinished_notes(rows) + _changed_notes(rows) + repeat_notes(rows) + _train_notes(columns, finished),
    )


def _train_notes(columns: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """The legend of the columns that are there, and what these finished rows do not tell."""
    notes = [
        "w/a: mean bits of weights/activations; {..}: searched among these.",
        "accuracy: of one run with Wilson's 95% interval; of n runs mean ± std with Student's interval of the mean.",
    ]
    if "std s/t" in columns:
        notes.append("std s/t: between searches/between trainings of one search (variance components).")
    if rows and all(row.deviations[1] is None for row in rows):
        notes.append(
            "No row has several trainings of one search or architecture: the spread between trainings is not measured."
        )
    if "rank" in columns:
        notes.append("rank: rows whose intervals overlap, or that a chain of overlaps connects, share one, marked =.")
        if len({length_of(row) for row in rows}) > 1:
            notes.append("Rows trained for unequal numbers of epochs or steps are ranked apart, each kind from 1 on.")
    quantised = any(record.numbers.get("source_seconds") is not None for row in rows for record in row.records)
    silent = sum(record.numbers.get("before_seconds") is None for row in rows for record in row.records)
    return [
        *notes,
        "BitOps: all layers/quantised layers only/the paper's accounting. memory: of the weights (share of fp32).",
        "time: search + training, with all that they started from (cells, weights, teacher)."
        + (" Of what was quantised after its training: that training and the quantising." if quantised else "")
        + (f" Runs that do not say what that took count without it: {silent}." if silent else ""),
    ]


def _search_table(rows: Sequence[Row]) -> Table:
    names = ("exact_bitops", "exact_bitops_quantized", "target_bitops", "expected_bitops")
    ops, unit = _unit([row.mean(name) for row in rows for name in names])
    cells = []
    folders = folders_apart(rows, [row.first.folder.name for row in rows])
    for row, size, folder in zip(rows, size_differences(rows), folders, strict=True):
        reached, share = row.mean("target_reached"), row.mean("parameter_free_share")
        cells.append(
            {
                "search": row.first.method,
                "run": folder or row.first.folder.name or str(row.first.folder),
                "seed": "-" if row.first.seed is None else str(row.first.seed),
                "validation %": _accuracy(row),
                f"BitOps {unit}": _number(row.mean("exact_bitops"), ops),
                "quant.": _number(row.mean("exact_bitops_quantized"), ops),
                "expected": _number(row.mean("expected_bitops"), ops),
                "target": _other_target(row) or _number(row.mean("target_bitops"), ops),
                "reached": "-" if reached is None else "yes" if reached else "no",
                "free ops": "-" if share is None else f"{100 * share:.0f}%",
                "search s": _search_times(row),
                "size": size,
                "device": _device(row),
            }
        )
    columns = {name: [line[name] for line in cells] for name in cells[0]}
    notes = ["BitOps: exact cost of what was found; free ops: share of operations without parameters."]
    finished = [row for row in rows if row.first.finished]
    if any(row.mean("before_seconds") for row in finished):
        notes.append("search s: (+ all that the search started from: cells, weights).")
    dropped = {"size": not any(columns["size"]), "device": _one_device(finished)}
    columns = {name: column for name, column in columns.items() if not dropped.get(name)}
    return Table(*_heading(rows, finished, ""), columns, _unfinished_notes(rows) + _changed_notes(rows) + notes)


def _other_target(row: Row) -> str:
    """The target of searches that another cost than BitOps steered, in its unit; empty where there is none."""
    asked = [(record.settings.get("cost", "bitops"), record.settings.get("target")) for record in row.records]
    cost, target = asked[0]
    if any(one != asked[0] for one in asked) or cost == "bitops" or not isinstance(target, int | float):
        return ""
    from common.cost.measures import UNITS  # brings torch

    return f"{target:.4g} {UNITS[cost]}" if cost in list(UNITS) else ""


def _heading(rows: Sequence[Row], finished: Sequence[Row], counted: str) -> tuple[str, str]:
    """Title, and the sizes and whatever else all rows share, so that it needs no column."""
    sizes = dict(finished[0].first.size) if finished else {}
    title = rows[0].first.dataset + (": searches" if rows[0].first.stage == "search" else "")
    if sizes.get("image_size"):
        title += f", {sizes['image_size']}x{sizes['image_size']}"
    if counted and sizes.get("n_test"):
        title += f", {sizes['n_test']} {counted}"
    shared = []
    words = {
        "init_channels": "{} channels",
        "layers": "{} layers",
        "epochs": "{} epochs",
        "steps_per_epoch": "{} steps an epoch",
        "n_train": "{} to learn from",
    }
    methods = {row.common(lambda r: r.method) for row in rows}
    if rows[0].first.stage == "train" and len(methods) == 1:
        shared.append(methods.pop())
    for key, text in words.items():
        usual = usual_size(finished, key)
        if usual is not None and usual[0] is not None:
            shared.append(text.format(usual[0]) + ("" if usual[1] else " unless said"))
    seeds = sorted({record.seed for row in finished for record in row.records if record.seed is not None})
    if seeds:
        shared.append(("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)))
    if finished and _one_device(finished):
        shared += [device for device in [_device(finished[0])] if device != "-"]
    return title, ", ".join(shared)


def _device(row: Row) -> str:
    return row.common(lambda r: r.device) or "-"


def _one_device(rows: Sequence[Row]) -> bool:
    """Whether the times of all rows can stand side by side."""
    return len({_device(row) for row in rows}) < 2


def _unfinished_notes(rows: Sequence[Row]) -> list[str]:
    return [
        f"running: {row.first.folder} ({row.first.progress})."
        if row.first.held
        else f"not finished: {row.first.folder} ({row.first.progress}); `--resume auto` goes on with it."
        for row in rows
        if not row.first.finished
    ]


def _changed_notes(rows: Sequence[Row]) -> list[str]:
    """Which runs are neither what their flags say nor what they were begun as."""
    records = (record for row in rows for record in row.records if record.changed)
    return [f"{record.folder}: flags changed on its way: {'; '.join(record.changed)}." for record in records]


def _accuracy(row: Row) -> str:
    """`95.65 ± 2.05 [90.6-100.0]` of several runs, `95.3 [92.6-97.0]` of one, without interval where there is none."""
    if not row.first.finished:
        return "not finished"
    mean, deviation = row.accuracy
    if mean is None:
        return "-"
    text = f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    if row.interval is None:
        return text
    low, high = (100 * min(1.0, max(0.0, end)) for end in row.interval)
    return f"{text} [{low:.1f}-{high:.1f}]"


def _bits(row: Row) -> str:
    """The searched set, where known, and the mean bits."""
    if not row.first.finished:
        return "-"
    return row.bits_text if row.bits_label == row.bits_text else f"{row.bits_label} {row.bits_text}"


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
    """Seconds of the searches, where there were any, and of the trainings, with all that they started from."""
    before, searches = _before(row, "before_seconds"), _before(row, "before_search_seconds")
    search, train = row.mean("search_seconds"), row.mean("train_seconds")
    train = None if train is None else train + before - searches
    return (
        _seconds(train)
        if search is None and not searches
        else f"{_seconds((search or 0) + searches)}+{_seconds(train)}"
    )


def _search_times(row: Row) -> str:
    """Seconds of the search, and of what it started from."""
    before = _before(row, "before_seconds")
    return _seconds(row.mean("search_seconds")) + (f" (+{_seconds(before)})" if before else "")


def _before(row: Row, name: str) -> float:
    """Mean over the runs; one that does not say it adds nothing."""
    return sum(record.numbers.get(name) or 0 for record in row.records) / len(row.records)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
