# SPDX-License-Identifier: Apache-2.0
"""A run's curves as one picture: loss, accuracy, entropy, cost, reward and learning rate, epoch by epoch.

What is drawn is what metrics.csv has; a run that is still going, or was killed while it wrote, is drawn as far as it
came.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.recipes.paint import COLOURS, FAINT, INK, canvas, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One plot: its title, the columns of metrics.csv with their labels, and what a value is multiplied by."""

    title: str
    columns: Mapping[str, str]
    factor: float = 1.0
    logarithmic: bool = False


PANELS = (
    Panel("loss", {"train_loss": "training", "valid_loss": "validation"}),
    Panel(
        "accuracy, %",
        {
            "train_top1": "training",
            "valid_top1": "validation",
            "test_top1": "test",
            "sample_top1": "ten samples, a batch each",
        },
        factor=100.0,
    ),
    Panel("entropy, nats", {"alpha_entropy": "alphas", "gamma_entropy": "gammas", "entropy": "controller"}),
    Panel("reward", {"reward": "reward", "baseline": "its moving average"}),
    Panel(
        "cost, M BitOps",
        {
            "expected_bitops": "expected",
            "exact_bitops": "exact",
            "exact_bitops_quantized": "exact, quantised layers",
            "steered_bitops": "exact, as steered",
        },
        factor=1e-6,
    ),
    Panel(
        "share of operations, %",
        {"skip_share": "skip connections", "parameter_free_share": "without parameters"},
        factor=100.0,
    ),
    Panel("multiplier of the cost", {"cost_multiplier": "multiplier"}),
    Panel(
        "learning rate",
        {"learning_rate": "weights", "gamma_learning_rate": "gammas", "arch_learning_rate": "alphas"},
        logarithmic=True,
    ),
)
_COLUMNS = 3


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """Each column of a run's metrics.csv, one number an epoch (its newest row), NaN where there is none.

    A last line that is only half written is passed over. Raises ValueError where there is nothing to draw yet.
    """
    file = folder / "metrics.csv"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no metrics.csv; name a run folder, after its first epoch") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); name another run") from None
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    epochs: dict[float, dict[str, str]] = {}
    for row in reader:
        epoch = _number(row.get("epoch"))
        if not math.isnan(epoch):
            epochs[epoch] = row
    if not epochs:
        raise ValueError(f"{file}: has no row of an epoch yet; wait for the first one")
    rows = [epochs[epoch] for epoch in sorted(epochs)]
    return {name: [_number(row.get(name)) for row in rows] for name in reader.fieldnames or []}


def _number(text: object) -> float:
    try:
        return float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return math.nan


def draw_curves(folder: Path, form: str = "svg") -> bytes:
    """The picture of a run's curves, in `form` svg, png or pdf. Raises ValueError as `read_metrics`."""
    found = read_metrics(folder)
    drawn = _drawn(folder, found)
    across = min(_COLUMNS, len(drawn))
    down = -(-len(drawn) // across)
    with canvas(3.9 * across, 2.7 * down + 0.3) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        figure.suptitle("/".join(folder.resolve().parts[-2:]), color=INK)
        for axes, (panel, shown) in zip(grid.flat, drawn, strict=False):
            _plot(axes, panel, [epoch + 1 for epoch in found["epoch"]], shown)
        for axes in list(grid.flat)[len(drawn) :]:
            axes.set_axis_off()
        return saved(figure, form)


def draw_panels(folder: Path) -> dict[str, bytes]:
    """The same curves, an SVG a panel, by the panel's title: for a page that arranges them. Raises as `draw_curves`."""
    found, pictures = read_metrics(folder), {}
    for panel, shown in _drawn(folder, found):
        with canvas(3.9, 2.7) as figure:
            _plot(figure.add_subplot(), panel, [epoch + 1 for epoch in found["epoch"]], shown)
            pictures[panel.title] = saved(figure, "svg")
    return pictures


def _drawn(folder: Path, found: Mapping[str, list[float]]) -> list[tuple[Panel, dict[str, list[float]]]]:
    """The panels for which there are numbers; ValueError where there is none."""
    drawn = [(panel, shown) for panel in PANELS if (shown := _shown(panel, found))]
    if not drawn:
        raise ValueError(f"{folder / 'metrics.csv'}: holds none of the curves; name a run of a search or a training")
    return drawn


def _shown(panel: Panel, found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The panel's curves that hold a number, by label."""
    shown = {}
    for column, label in panel.columns.items():
        values = [panel.factor * value for value in found.get(column, [])]
        if any(math.isfinite(value) for value in values):
            shown[label] = values
    return shown


def _plot(axes: Axes, panel: Panel, epochs: list[float], shown: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (label, values) in enumerate(shown.items()):
        pairs = [(e, v) for e, v in zip(epochs, values, strict=True) if math.isfinite(v)]
        mark = "o" if len(pairs) < 30 else None
        axes.plot(*zip(*pairs, strict=True), label=label, color=COLOURS[number], marker=mark, markersize=3)
    axes.set_title(panel.title, color=INK, fontsize=9)
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seen = [v for values in shown.values() for v in values if math.isfinite(v)]
    if panel.logarithmic and min(seen) > 0 and max(seen) > 10 * min(seen):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # below the axis and its name, where it covers nothing
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 3.9}
    axes.legend(frameon=False, fontsize=8, ncols=2, columnspacing=1.2, **below)
