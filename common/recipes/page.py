# SPDX-License-Identifier: Apache-2.0
"""Runs as one page of HTML: summary, tables, accuracy against cost, then each run's cells, curves, choices and layers.

The page holds everything it shows: it loads nothing and runs nothing. It is read from run folders alone, which may
still be written to; what cannot be read or drawn is said in its place.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.engine.files import read_json
from common.engine.progress import duration
from common.recipes import page_parts as parts
from common.recipes.curves import draw_panels
from common.recipes.heatmaps import heat_maps
from common.recipes.history import read_history
from common.recipes.pareto import COSTS, draw_pareto
from common.recipes.records import Record
from common.recipes.rows import Row, data_of
from common.recipes.tables import LEFT, tables

if TYPE_CHECKING:
    from common.cost import Cost

CostOf = Callable[[Path], "Cost"]
"""The cost of a run's network, layer by layer; ValueError where it cannot be told."""

_PLOTTED = ("bitops_quantized", "weight_bytes")
_CAPTIONS = {
    "alphas": "Softmax of the alphas on every edge, by epoch; a dot marks what its cell keeps",
    "gammas": "Softmax of the gammas in every cell: expected bits by epoch, then each bit-width in the last one",
    "bits": "Mean of the bits that each depth would have, by epoch",
}
# Flags that say where a run lies or how it was watched, not what it is.
_PLACES = ("save", "runs", "resume", "config", "print_config", "list_presets", "dry_run", "plan", "quiet")


def build_page(
    rows: Sequence[Row],
    problems: Sequence[str],
    cost_of: CostOf | None = None,
    on_run: Callable[[Record], None] | None = None,
) -> str:
    """The document. `problems`: what could not be read; `cost_of`: without it no layers are shown; `on_run`: progress.

    Raises nothing for a run that is damaged or unfinished: the page says what it lacks.
    """
    records = [record for row in rows for record in row.records]
    names = _names([record.folder for record in records])
    configs = {record.folder: _config(record.folder) for record in records}
    anchors = {record.folder: f"run-{number}" for number, record in enumerate(records, 1)}
    links = "".join(f'<li><a href="#{anchors[r.folder]}">{escape(names[r.folder])}</a></li>' for r in records)
    body = [
        f'<nav aria-label="runs"><ul>{links}</ul></nav>',
        parts.section("Summary", _summary(rows, problems), "summary"),
        parts.section("Tables", _tables(rows), "tables"),
        *_pareto(rows),
        *_differences(records, names, configs),
        parts.section("Environment", _environment(records, names, configs), "environment"),
    ]
    for record in records:
        if on_run is not None:
            on_run(record)
        body.append(_run(record, names[record.folder], anchors[record.folder], configs[record.folder], cost_of))
    count = f"{len(records)} run{'s' if len(records) != 1 else ''}"
    return parts.page(f"Report of {count}", body)


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """A short name of each folder: as many last parts of its path as tell it from the others, and two at least."""
    paths = [folder.resolve().parts for folder in folders]
    names = {}
    for folder, path in zip(folders, paths, strict=True):
        count = 2
        while count < len(path) and sum(other[-count:] == path[-count:] for other in paths) > 1:
            count += 1
        names[folder] = "/".join(path[-count:])
    return names


def _config(folder: Path) -> dict[str, Any]:
    """config.json, or nothing where there is none; a damaged one was said when its run was read."""
    if not (folder / "config.json").is_file():
        return {}
    found = read_json(folder / "config.json")
    return found if isinstance(found, dict) else {}


def _flags(config: Mapping[str, Any]) -> dict[str, Any]:
    return config["config"] if isinstance(config.get("config"), dict) else {}


# ------------------------------------------------------------------------------------------------------ all runs


def _percent(row: Row) -> str:
    mean, deviation = row.accuracy
    text = f"{100 * (mean or 0):.1f}%" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
    if row.interval is None:
        return text
    low, high = (100 * min(1.0, max(0.0, end)) for end in row.interval)
    return f"{text} (95%: {low:.1f} to {high:.1f})"


def _scaled(value: float, unit: str) -> str:
    """`41.2 M BitOps` for 41,230,000, `20.5 kB` for 20,480; a longer unit stands apart."""
    gap = " " if len(unit) > 1 else ""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}{gap}{unit}"
    return f"{value:g} {unit}"


def _summary(rows: Sequence[Row], problems: Sequence[str]) -> str:
    """How many runs there are, and the best row of each data set."""
    records = [record for row in rows for record in row.records]
    done = {stage: sum(r.finished and r.stage == stage for r in records) for stage in ("train", "search")}
    going = [record for record in records if not record.finished]
    counts = [
        ("trainings finished", str(done["train"]) if done["train"] else ""),
        ("searches finished", str(done["search"]) if done["search"] else ""),
        ("not finished", str(len(going)) if going else ""),
    ]
    lines = []
    for kind in dict.fromkeys(data_of(row) for row in rows if row.trained):
        members = [row for row in rows if row.trained and data_of(row) == kind and row.accuracy[0] is not None]
        best = max(members, key=lambda row: row.accuracy[0] or 0.0, default=None)
        if best is not None:
            bitops = best.mean("bitops")
            cost = f" at {_scaled(bitops, 'BitOps')}" if bitops else ""
            name = f"{best.common(lambda r: r.method)} {best.bits_label} {best.first.architecture}".strip()
            among = f", of {len(members)} rows" if len(members) > 1 else ""
            lines.append(f"{kind[0]}: highest test accuracy {_percent(best)} by {name}{cost}{among}.")
    lines += [f"{record.folder}: {record.state}." for record in going]
    said = parts.notes(lines) + parts.notes((f"Not read: {problem}" for problem in problems), "warn")
    return f'<div class="card">{parts.facts(counts)}{said}</div>'


def _tables(rows: Sequence[Row]) -> str:
    found = []
    for one in tables(rows):
        shared = parts.notes([one.shared]) if one.shared else ""
        found.append(
            f'<div class="card"><h3>{escape(one.title)}</h3>{shared}{parts.table(one.columns, left=LEFT)}'
            f"{parts.notes(one.notes)}</div>"
        )
    return "\n".join(found)


def _pareto(rows: Sequence[Row]) -> list[str]:
    """Accuracy against each cost, a section for each kind of data."""
    sections, trained = [], [row for row in rows if row.trained]
    for number, kind in enumerate(dict.fromkeys(data_of(row) for row in trained), 1):
        members = [row for row in trained if data_of(row) == kind]
        if len(members) < 2:  # a point alone says what its table says
            continue
        body = []
        for cost in _PLOTTED:
            try:
                picture, left_out = draw_pareto(members, cost, "svg")
            except ValueError as error:
                body.append(parts.notes([str(error)], "warn"))
                continue
            caption = f"{kind[0]}: test accuracy with 95% intervals against {COSTS[cost][0]}"
            shown = parts.figure(picture, caption, f"pareto-{number}-{cost}", wide=600)
            body.append(f"<div>{shown}{parts.notes(f'left out: {text}' for text in left_out)}</div>")
        title, inside = f"Accuracy against cost: {kind[0]}", f'<div class="card">{"".join(body)}</div>'
        sections.append(parts.section(title, inside, f"pareto-{number}"))
    return sections


def _differences(
    records: Sequence[Record], names: Mapping[Path, str], configs: Mapping[Path, Mapping[str, Any]]
) -> list[str]:
    """The flags that are not the same in all runs of a stage."""
    sections = []
    for stage, title in (("search", "searches"), ("train", "trainings")):
        members = [record.folder for record in records if record.stage == stage and _flags(configs[record.folder])]
        if len(members) < 2:
            continue
        flags = {folder: _flags(configs[folder]) for folder in members}
        keys = sorted({key for own in flags.values() for key in own}.difference(_PLACES, *_volatile(configs, members)))
        keys = [key for key in keys if not key.endswith("_digest")]  # the flag beside it says what it is of
        differing = [key for key in keys if _differs(key, [configs[folder] for folder in members])]
        if differing:
            shown = {"flag": [f"<code class=flag>--{escape(key.replace('_', '-'))}</code>" for key in differing]}
            columns = shown | {names[f]: [_shown(flags[f].get(key)) for key in differing] for f in members}
            body = parts.table(columns, left=columns, raw=["flag"])
            others = [key for key in keys if key not in differing]
            same = sum(all(key in flags[folder] for folder in members) for key in others)
            some = len(others) - same
            only = f"; {some} are flags of some of them only, left as they are" if some else ""
            body += parts.notes([f"{same} further flags that matter are the same in all of them{only}."])
        else:
            body = parts.notes(["All the flags that matter are the same."])
        name = f"differences-{stage}"
        sections.append(parts.section(f"What differs between the {title}", f'<div class="card">{body}</div>', name))
    return sections


def _volatile(configs: Mapping[Path, Mapping[str, Any]], members: Sequence[Path]) -> list[list[str]]:
    """Each run's flags that never change what it computes, as its config.json says them."""
    found = [configs[folder].get("volatile") for folder in members]
    return [names for names in found if isinstance(names, list)]


def _differs(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the runs that have a flag have it at several values, or only some have it and somebody set it."""
    having = [config for config in configs if key in _flags(config)]
    if len({_shown(_flags(config)[key]) for config in having}) > 1:
        return True
    sources = [config["sources"].get(key) for config in having if isinstance(config.get("sources"), dict)]
    return len(having) < len(configs) and "flag" in sources


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _environment(
    records: Sequence[Record], names: Mapping[Path, str], configs: Mapping[Path, Mapping[str, Any]]
) -> str:
    """What the runs were made with, a line for each environment."""
    found: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        config = configs[record.folder]
        git = config.get("git") if isinstance(config.get("git"), dict) else {}
        versions = config.get("versions") if isinstance(config.get("versions"), dict) else {}
        device = config.get("device") if isinstance(config.get("device"), dict) else {}
        commit = str(git.get("commit") or "-")[:10] + (" with changes" if git.get("dirty") else "")
        software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        gpus = device.get("cuda") if isinstance(device.get("cuda"), list) else []
        hardware = ", ".join(map(str, gpus)) or str(device.get("cpu") or record.device or "-")
        threads = str(device.get("threads") or "-")
        found.setdefault((commit, software or "-", hardware, threads), []).append(names[record.folder])
    titles = ("commit", "software", "device", "threads")
    columns = {title: [key[place] for key in found] for place, title in enumerate(titles)}
    texts = [f"{len(own)}: {', '.join(own)}" if len(own) > 1 else own[0] for own in found.values()]
    columns["runs"] = [f'<div style="min-width:16em;white-space:normal">{escape(text)}</div>' for text in texts]
    return f'<div class="card">{parts.table(columns, left=columns, raw=["runs"])}</div>'


# ------------------------------------------------------------------------------------------------------ one run


def _run(record: Record, name: str, anchor: str, config: Mapping[str, Any], cost_of: CostOf | None) -> str:
    """All that there is to see of one run; what cannot be drawn is said in its place."""
    said: list[str] = []
    pieces = [parts.facts(_facts(record, config)), _command(config)]
    for title, draw in (
        ("Cells", lambda: _cells(record, anchor)),
        ("Curves", lambda: _curves(record, anchor)),
        ("Choices by epoch", lambda: _choices(record, anchor)),
        ("Layers", lambda: _layers(record, cost_of)),
    ):
        try:
            body = draw()
        except (ValueError, ImportError) as error:
            said.append(f"{title}: {error}")
            continue
        pieces.append(f"<h3>{title}</h3>{body}" if body else "")
    body = "\n".join(pieces) + parts.notes(said, "warn")
    return f'<section class="run" id="{anchor}"><h2>{escape(name)}</h2>\n{body}\n</section>\n'


def _facts(record: Record, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    numbers = {name: value for name, value in record.numbers.items() if value is not None and math.isfinite(value)}
    seconds = numbers.get("train_seconds") or numbers.get("search_seconds")
    if record.stage == "search":
        seconds = numbers.get("search_seconds")
    bits = "" if record.bits is None else "/".join(f"{value:.3g}" for value in record.bits)
    accuracy = "" if record.accuracy is None else f"{100 * record.accuracy:.2f}%"
    of = f" ({record.correct:,} of {record.n_test:,})" if record.correct is not None else ""
    sizes = [f"{key.replace('_', ' ')} {value}" for key, value in record.size if value is not None]
    bitops = numbers.get("bitops") or numbers.get("exact_bitops")
    quantised = numbers.get("bitops_quantized") or numbers.get("exact_bitops_quantized")
    memory = numbers.get("weight_bytes")
    sessions = len(config["sessions"]) if isinstance(config.get("sessions"), list) else 0
    return [
        ("state", record.state),
        ("run", f"{record.stage} by {record.method}, {record.dataset}, seed {record.seed}"),
        ("architecture", record.architecture),
        ("test accuracy" if record.stage == "train" else "validation accuracy", accuracy + of),
        ("mean bits, weights/activations", bits),
        ("BitOps, all layers", _scaled(bitops, "") if bitops else ""),
        ("BitOps, quantised layers", _scaled(quantised, "") if quantised else ""),
        ("memory of the weights", _scaled(memory, "B") if memory else ""),
        ("parameters", f"{numbers['parameters']:,.0f}" if "parameters" in numbers else ""),
        ("time", duration(seconds) if seconds else ""),
        ("size", ", ".join(sizes)),
        ("device", record.device),
        ("folder", str(record.folder)),
        ("sessions", str(sessions) if sessions > 1 else ""),
        ("flags changed on its way", "; ".join(record.changed)),
    ]


def _command(config: Mapping[str, Any]) -> str:
    """The command of each session, each once."""
    sessions = config.get("sessions") if isinstance(config.get("sessions"), list) else []
    lines = [one.get("argv") for one in (*sessions, config) if isinstance(one, Mapping)]
    shown = dict.fromkeys(shlex.join(["python", *map(str, argv)]) for argv in lines if isinstance(argv, list) and argv)
    return "".join(f"<p><code>{escape(line)}</code></p>" for line in shown)


def _cells(record: Record, anchor: str) -> str:
    """Both cells; of a search that is still going, what its newest epoch chose."""
    from common.nets import load_architecture
    from common.recipes.chosen import choice_of
    from common.recipes.pictures import cells_svg

    margins, caption = None, "Both cells"
    if (record.folder / "architecture.json").is_file():
        architecture = load_architecture(str(record.folder))
        if record.stage == "search" and (record.folder / "history.jsonl").is_file():
            try:
                row = read_history(record.folder).rows[-1]
                margins = choice_of(row, record.folder).margins if "genotype" in row else None
            except ValueError as error:
                caption = f"Both cells; how sure each choice was is not known: {error}"
    elif record.stage == "search":
        choice = choice_of(read_history(record.folder).rows[-1], record.folder)
        architecture, margins = choice.architecture, choice.margins
        caption = f"Both cells as epoch {choice.epoch + 1} has them"
    else:
        return ""
    return parts.figure(
        cells_svg(architecture, title="", margins=margins), caption, f"{anchor}-cells", themed=False, wide=640
    )


def _curves(record: Record, anchor: str) -> str:
    """The panels side by side as many as fit; nothing for a run that has no epochs (quantised after its training)."""
    if record.finished and not _has_rows(record.folder):
        return ""
    pictures = draw_panels(record.folder)
    body = "".join(
        parts.figure(svg, title, f"{anchor}-{re.sub(r'[^a-z]+', '-', title)}") for title, svg in pictures.items()
    )
    return f'<div class="panels">{body}</div>'


def _has_rows(folder: Path) -> bool:
    file = folder / "metrics.csv"
    return file.is_file() and file.stat().st_size > 0


def _choices(record: Record, anchor: str) -> str:
    if record.stage != "search" or not (record.folder / "history.jsonl").is_file():
        return ""
    pictures = heat_maps(record.folder)
    return "".join(
        parts.figure(svg, _CAPTIONS[name], f"{anchor}-{name}", wide=420 if name == "bits" else 760)
        for name, svg in pictures.items()
    )


def _layers(record: Record, cost_of: CostOf | None) -> str:
    """Every layer's cost and bits."""
    if cost_of is None or not (record.folder / "architecture.json").is_file():
        return ""
    from common.recipes.cell_style import BIT_COLOURS, on

    cost = cost_of(record.folder)
    total = max(1, cost.bitops)
    most = max((layer.bitops for layer in cost.layers), default=1) or 1

    def chip(bits: int) -> str:
        colour = BIT_COLOURS.get(bits, "#E2E6EC")
        return f'<span class="bits" style="background:{colour};color:{on(colour)}">{bits}</span>'

    def share(bitops: int) -> str:
        bar = f'<span class="bar" style="width:{60 * bitops / most:.0f}%"></span>'
        return f'<span class="share">{bar} {100 * bitops / total:.1f}%</span>'

    columns = {
        "layer": [layer.name for layer in cost.layers],
        "w": [chip(layer.weight_bits) for layer in cost.layers],
        "a": [chip(layer.activation_bits) for layer in cost.layers],
        "MACs": [f"{layer.macs:,}" for layer in cost.layers],
        "BitOps": [f"{layer.bitops:,}" for layer in cost.layers],
        "share": [share(layer.bitops) for layer in cost.layers],
        "weights, B": [f"{layer.weight_bytes:,.0f}" for layer in cost.layers],
        "input, B": [f"{layer.activation_bytes:,.0f}" for layer in cost.layers],
    }
    head = (
        f"{len(cost.layers)} layers, {_scaled(cost.bitops, 'BitOps')} ({_scaled(cost.bitops_quantized, 'BitOps')} in "
        f"quantised layers), {_scaled(cost.weight_bytes, 'B')} of weights"
    )
    note = "" if record.stage == "train" else " of the network that the search is for"
    shown = parts.table(columns, left=["layer", "share"], raw=["w", "a", "share"])
    return f"<details><summary>{escape(head + note)}</summary>{shown}</details>"


def page_file(text: str) -> Path:
    """A flag's value: the path of a page."""
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{text!r} does not end in .html; name such a file")
    return path
