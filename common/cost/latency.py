# SPDX-License-Identifier: Apache-2.0
"""A measured table of latencies, as a file and as what a search is steered by (`--cost latency --lut FILE`).

One line a place and pair of bits: mean, standard deviation and number of samples, in milliseconds of one forward of
`batch` images, and where they were measured. Nothing is interpolated: a place that was not measured is refused.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from common.cost.places import Place, Sizes, architecture_places, input_place, operation_place
from common.nets.architecture import Architecture, Bits
from common.nets.darts_space import plan_cells
from common.nets.network import Network
from common.quant import FLOAT_BITS, SUPPORTED_BITS

PLACE_COLUMNS = ("operation", "in_channels", "out_channels", "size", "stride")
FIGURE_COLUMNS = ("weight_bits", "activation_bits", "mean_ms", "std_ms", "n")
WHERE_COLUMNS = ("backend", "batch", "threads", "clock", "device", "versions")
COLUMNS = (*PLACE_COLUMNS, *FIGURE_COLUMNS, *WHERE_COLUMNS)
STANDARD_ERRORS, LEAST_SPREAD = 3.0, 0.05
"""Bits count as told apart when their totals differ by more than this many standard errors, and this share: where the
same kernels run (8-bit integers, whatever the bits) totals of two builds were 3% apart, steadily."""
_MAX_ROWS, _LARGEST = 100_000, 1_000_000
_NAME = re.compile(r"\w[\w.]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward: mean and standard deviation of n samples."""

    mean: float
    std: float
    n: int

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Conditions:
    """Where and with what a table was measured."""

    backend: str
    batch: int
    threads: int
    clock: str
    device: str
    versions: str

    def __str__(self) -> str:
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.backend}, {images} a forward, {threads} of {self.device}, {self.clock} time ({self.versions})"


@dataclass(frozen=True)
class LatencyTable:
    """Timings by place and bits, all measured under the same conditions. `name` stands in messages."""

    rows: Mapping[tuple[Place, Bits], Timing]
    conditions: Conditions
    name: str = "--lut"

    def timing(self, place: Place, bits: Bits) -> Timing:
        """What was measured there. Raises ValueError, with what the table holds, where nothing was."""
        found = self.rows.get((place, bits))
        if found is None:
            raise ValueError(
                f"{self.name}: holds no row for {place} at {bits[0]}/{bits[1]} bits, and nothing is guessed; it holds "
                f"{self._nearest(place)}. Measure this space: python -m common.cost latency measure --out FILE"
            )
        return found

    def _nearest(self, place: Place) -> str:
        same = [(other, bits) for other, bits in self.rows if other.operation == place.operation]
        if not same:
            return f"the operations {', '.join(sorted({other.operation for other, _ in self.rows}))}"
        if any(other == place for other, _ in same):
            held = sorted(bits for other, bits in same if other == place)
            return f"it at {', '.join(f'{w}/{a}' for w, a in held)} bits"
        shapes = sorted({(o.in_channels, o.out_channels, o.size, o.stride) for o, _ in same})
        shown = ", ".join(f"{i} to {o} channels at {s}x{s}, stride {t}" for i, o, s, t in shapes[:6])
        return f"{place.operation} of {shown}" + (f" and {len(shapes) - 6} more" if len(shapes) > 6 else "")

    def milliseconds(self, place: Place, bits: Bits) -> float:
        """The mean; nothing for a place where nothing happens."""
        return 0.0 if place.passes_on else self.timing(place, bits).mean

    def predict(self, architecture: Architecture, sizes: Sizes) -> float:
        """Milliseconds of a whole network: the sum over its places."""
        return sum(self.milliseconds(place, bits) for place, bits in architecture_places(architecture, sizes))

    def totals(self, pairs: Sequence[Bits]) -> dict[Bits, Timing]:
        """The sum over all places that have every one of these pairs, by pair. Raises ValueError where none has."""
        held = dict.fromkeys(place for place, _ in self.rows)  # in the order of the rows
        places = [place for place in held if all((place, pair) in self.rows for pair in pairs)]
        if not places:
            shown = ", ".join(f"{w}/{a}" for w, a in pairs)
            raise ValueError(
                f"{self.name}: no place was measured at all of the bits {shown}; measure with these --bits"
            )
        found = {}
        for pair in pairs:
            timings = [self.rows[place, pair] for place in places]
            error = math.sqrt(sum(t.standard_error**2 for t in timings))
            found[pair] = Timing(sum(t.mean for t in timings), error, 1)
        return found

    def groups(self, pairs: Sequence[Bits]) -> list[list[Bits]]:
        """The pairs of bits, put together where they do not differ in this table by more than its noise.

        From the fastest on: a group holds what is not told apart from the fastest pair in it; see LEAST_SPREAD.
        """
        totals = self.totals(pairs)
        found: list[list[Bits]] = []
        for pair in sorted(totals, key=lambda pair: totals[pair].mean):
            if not found or _differ(totals[found[-1][0]], totals[pair]):
                found.append([])
            found[-1].append(pair)
        return found

    def tells_apart(self, pairs: Sequence[Bits]) -> bool:
        """Whether some of the pairs of bits differ in this table by more than its noise."""
        return len(self.groups(pairs)) > 1

    def bits_text(self, pairs: Sequence[Bits]) -> str:
        """Among which of these bits latency can choose, in a sentence."""
        totals, groups = self.totals(pairs), self.groups(pairs)
        shown = ", ".join(f"{w}/{a}: {t.mean:.3f} +- {t.std:.3f}" for (w, a), t in totals.items())
        if len(groups) == 1:
            return (
                f"{self.conditions.backend} takes equally long at all of these bits (weight/activation; ms summed over "
                f"all places: {shown}): latency cannot choose among them, and the rows are read as equal"
            )
        text = f"bits (weight/activation) differ, in ms summed over all places: {shown}"
        alike = [", ".join(f"{w}/{a}" for w, a in sorted(group)) for group in groups if len(group) > 1]
        if alike:
            text += f"; latency cannot choose among {'; nor among '.join(alike)}, whose rows are read as equal"
        return text

    def to_csv(self) -> str:
        """The file's text, rows in the order in which they were measured."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        where = [getattr(self.conditions, name) for name in WHERE_COLUMNS]
        for (place, bits), t in self.rows.items():
            shape = [getattr(place, name) for name in PLACE_COLUMNS]
            writer.writerow([*shape, *bits, f"{t.mean:.6g}", f"{t.std:.6g}", t.n, *where])
        return buffer.getvalue()


def _differ(faster: Timing, slower: Timing) -> bool:
    gap, noise = slower.mean - faster.mean, math.hypot(faster.standard_error, slower.standard_error)
    return gap > STANDARD_ERRORS * noise and gap > LEAST_SPREAD * slower.mean


def read_table(text: str, name: str) -> LatencyTable:
    """The table in a CSV file's text. Raises ValueError with `name`, the line and what is wrong with it."""
    try:
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}: no table of latencies: {error}") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(
            f"{name}: no table of latencies; its first line must be {','.join(COLUMNS)} (python -m common.cost latency "
            "measure writes one)"
        )
    if not 1 < len(lines) <= _MAX_ROWS:
        raise ValueError(f"{name}: has {len(lines) - 1:,} rows; expected 1 to {_MAX_ROWS:,}")
    rows: dict[tuple[Place, Bits], Timing] = {}
    conditions: Conditions | None = None
    for number, line in enumerate(lines[1:], 2):
        where = f"{name}, line {number}"
        if len(line) != len(COLUMNS):
            raise ValueError(f"{where}: has {len(line)} fields; expected {len(COLUMNS)}")
        fields = dict(zip(COLUMNS, line, strict=True))
        key, timing, found = _place_of(fields, where), _timing_of(fields, where), _conditions_of(fields, where)
        if key in rows:
            raise ValueError(f"{where}: {key[0]} at {key[1][0]}/{key[1][1]} bits is there twice")
        if conditions not in (None, found):
            raise ValueError(f"{where}: was measured with {found}, the lines before with {conditions}; join no tables")
        conditions, rows[key] = found, timing
    assert conditions is not None
    return LatencyTable(rows, conditions, name)


def _place_of(fields: Mapping[str, str], where: str) -> tuple[Place, Bits]:
    if not _NAME.fullmatch(fields["operation"]):
        raise ValueError(f"{where}: operation is {fields['operation'][:40]!r}; expected a name")
    numbers = {name: _whole(fields, name, where) for name in (*PLACE_COLUMNS[1:], *FIGURE_COLUMNS[:2])}
    bits = numbers.pop("weight_bits"), numbers.pop("activation_bits")
    if not set(bits) <= set(SUPPORTED_BITS):
        raise ValueError(
            f"{where}: bits are {bits[0]}/{bits[1]}; expected some of {', '.join(map(str, SUPPORTED_BITS))}"
        )
    return Place(fields["operation"], **numbers), bits


def _timing_of(fields: Mapping[str, str], where: str) -> Timing:
    mean, std = (_number(fields, name, where) for name in ("mean_ms", "std_ms"))
    if mean == 0:
        raise ValueError(f"{where}: mean_ms is 0; expected a time above it")
    return Timing(mean, std, _whole(fields, "n", where))


def _conditions_of(fields: Mapping[str, str], where: str) -> Conditions:
    counts = {name: _whole(fields, name, where) for name in ("batch", "threads")}
    texts = {name: fields[name] for name in ("backend", "clock", "device", "versions")}
    for name, text in texts.items():
        if not text.isprintable() or not 0 < len(text) <= 500:
            raise ValueError(f"{where}: {name} is {text[:40]!r}; expected some words")
    return Conditions(**texts, **counts)


def _whole(fields: Mapping[str, str], name: str, where: str) -> int:
    text = fields[name]
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= _LARGEST):
        raise ValueError(f"{where}: {name} is {text[:40]!r}; expected a whole number from 1 to {_LARGEST:,}")
    return int(text)


def _number(fields: Mapping[str, str], name: str, where: str) -> float:
    try:
        value = float(fields[name])
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise ValueError(f"{where}: {name} is {fields[name][:40]!r}; expected a number from 0 up")
    return value


class Latency:
    """A table as the measure of a search (`common.cost.measures.Measure`), in milliseconds.

    Where the table cannot tell bits of the search apart, it gives their mean for each of them, so that no noise of the
    measurement steers a choice of bits.
    """

    name, accounting = "latency", "exact"

    def __init__(self, table: LatencyTable, pairs: Iterable[Bits]) -> None:
        self.table, self.pairs = table, list(pairs)
        groups = table.groups(self.pairs) if len(self.pairs) > 1 else [self.pairs]
        self._alike = [[self.pairs.index(pair) for pair in group] for group in groups]
        text = [table.bits_text(self.pairs)] if len(self.pairs) > 1 else []
        self.notes = (f"latency: {table.conditions}", *text)

    def values(self, place: Place, pairs: Sequence[Bits]) -> list[float]:
        """See Measure."""
        return self._levelled([self.table.milliseconds(place, pair) for pair in pairs], pairs)

    def _levelled(self, found: list[float], pairs: Sequence[Bits]) -> list[float]:
        """Times at the pairs, with its mean in place of each that belongs to a group."""
        if list(pairs) != self.pairs:
            return found
        levelled = list(found)
        for group in self._alike:
            mean = sum(found[index] for index in group) / len(group)
            for index in group:
                levelled[index] = mean
        return levelled

    def convolutions(
        self, network: Network, image_size: int, names: Sequence[str], pairs: Sequence[Bits]
    ) -> tuple[list[list[float]], float]:
        """See Measure. A table has rows for single convolutions where it was measured with --convolutions.

        What is not a convolution under search (sums, pooling, normalisation, the ends) takes what a network at the
        first of `pairs` takes, less its convolutions there.
        """
        sizes = _sizes_of(network, image_size)
        inside = [self._convolution_place(network, sizes, name) for name in names]
        rows = [self._levelled([self.table.milliseconds(place, pair) for pair in pairs], pairs) for place in inside]
        whole = self.table.predict(replace(network.architecture, bits=None).with_uniform_bits(*pairs[0]), sizes)
        return rows, whole - sum(self.table.milliseconds(place, pairs[0]) for place in inside)

    @staticmethod
    def _convolution_place(network: Network, sizes: Sizes, name: str) -> Place:
        """The place of a convolution by its name in the network: `cells.3.operations.2.depthwise1`."""
        _, index, part, *rest = name.split(".")
        genotype = network.architecture.genotype
        multipliers = (len(genotype.normal_concat), len(genotype.reduce_concat))
        plan = plan_cells(sizes.layers, sizes.init_channels, sizes.stem, *multipliers)[int(index)]
        size = _map_size(network, sizes, int(index))
        if part.startswith("preprocess"):
            return _inside(input_place(plan, int(part[-1]), size), ".".join(rest))
        primitive, state = (genotype.reduce if plan.reduction else genotype.normal)[int(rest[0])]
        return _inside(operation_place(primitive, plan, size, state), ".".join(rest[1:]))


def _inside(place: Place, name: str) -> Place:
    """A single convolution of a place."""
    return replace(place, operation=f"{place.operation}.{name}")


def _sizes_of(network: Network, image_size: int) -> Sizes:
    first = network.cells[0]
    stem = network.stem if network.stem_kind == "cifar" else network.stem0
    return Sizes(
        stem=network.stem_kind,
        in_channels=network.in_channels,
        num_classes=network.classifier.out_features,
        init_channels=first.channels // (2 if first.reduction else 1),
        layers=len(network.cells),
        image_size=image_size,
        stem_bits=getattr(stem[0], "weight_bits", FLOAT_BITS),
        classifier_bits=network.classifier.weight_bits,
    )


def _map_size(network: Network, sizes: Sizes, index: int) -> int:
    """Height of the maps that a cell reads."""
    before = sum(cell.reduction for cell in list(network.cells)[:index])
    return (sizes.image_size if sizes.stem == "cifar" else sizes.image_size // 8) >> before
