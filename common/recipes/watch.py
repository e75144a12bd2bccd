# SPDX-License-Identifier: Apache-2.0
"""A run as it goes, in a terminal: how far it is, how long it takes, its figures, its cells and what they cost.

Nothing but the run's folder is read, never its process: any run can be watched, by anyone who may read its files, and
as often as wanted.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.engine.files import read_json
from common.engine.folders import is_held
from common.engine.progress import duration
from common.recipes.cell_layout import state_text
from common.recipes.curves import PANELS, read_metrics
from common.recipes.history import epochs_over

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from common.nets import Architecture

EVERY = 1.0
"""Seconds between two looks."""
_TAIL = 65536  # bytes of log.txt that are looked through
_LINES = 4  # last lines of it that are shown
_STEP = re.compile(r"epoch (\d+)/(\d+) step (\d+)/(\d+)")


@dataclass(frozen=True)
class State:
    """What a run's folder says at one moment."""

    folder: Path
    config: dict[str, Any]
    finished: bool
    done: int
    """Epochs that are over."""
    held: bool | None
    """Whether a process holds the folder; None: this system cannot tell."""
    result: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    """Its last lines."""
    network: str = ""
    """What the log says of the network that is trained."""
    architecture: Architecture | None = None
    cells_of: str = ""
    """Which cells these are, or why there are none."""
    waited: float = 0.0
    """Seconds since the last epoch ended."""

    @property
    def epochs(self) -> int | None:
        """How many there will be; None: not known."""
        flags = self.config.get("config")
        epochs = flags.get("epochs") if isinstance(flags, dict) else None
        return epochs if isinstance(epochs, int) and epochs > 0 else None

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1, with the steps of the present epoch as far as the log tells."""
        if self.finished:
            return 1.0
        steps = 0.0
        for line in reversed(self.log):
            if match := _STEP.search(line):
                epoch, _, step, of = map(int, match.groups())
                steps = step / of if of and epoch == self.done + 1 else 0.0
                break
        return min(1.0, (self.done + min(steps, 1.0)) / self.epochs) if self.epochs else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the median of the last eight epochs; None before the first, and when the run has ended."""
        each = self.seconds_per_epoch
        if each is None or self.epochs is None or self.finished:
            return None
        return max(0.0, each * (self.epochs - self.done) - min(self.waited, each))

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median of the last eight epochs; None before the first."""
        # a row within an epoch has the seconds since it began
        rows = zip(self.metrics.get("epoch", []), self.metrics.get("seconds", []), strict=False)
        whole = [value for epoch, value in rows if epoch < self.done and math.isfinite(value)]
        seconds = sorted(whole[-8:])
        return seconds[len(seconds) // 2] if seconds else None


def read_state(folder: Path) -> State:
    """A run as it stands. Raises ValueError where no run lies there; what is not there yet, or torn, is left out."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json yet, so no run has begun there; name a run's folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: is not a run's; name another folder")
    result = _result(folder)
    done = epochs_over(folder)
    waited = max(0.0, time.time() - (folder / "history.jsonl").stat().st_mtime) if done else 0.0
    try:
        metrics = read_metrics(folder)
    except ValueError:  # no row yet
        metrics = {}
    log = _log(folder)
    network = next((line.partition(": ")[2] for line in reversed(log) if line.startswith("network: ")), "")
    cells = _cells(folder, config)
    return State(folder, config, bool(result), done, is_held(folder), result, metrics, log, network, *cells, waited)


def _result(folder: Path) -> dict[str, Any]:
    if not (folder / "result.json").is_file():
        return {}
    found = read_json(folder / "result.json")
    return found if isinstance(found, dict) and found.get("finished") is True else {}


def _log(folder: Path) -> tuple[str, ...]:
    """Whole lines at the end of log.txt, without their times."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            data = file.read()
    except OSError:
        return ()
    lines = data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    return tuple(line.partition(" ")[2] for line in lines)


def _cells(folder: Path, config: dict[str, Any]) -> tuple[Architecture | None, str]:
    """The run's cells, or those of a search's newest epoch, and what they are; nothing before its first."""
    from common.nets import load_architecture
    from common.recipes.chosen import choice_of
    from common.recipes.history import read_history

    try:
        if (folder / "architecture.json").is_file():
            return load_architecture(str(folder)), "cells"
        history = folder / "history.jsonl"
        if config.get("stage") == "search" and history.is_file() and b"\n" in history.read_bytes():
            choice = choice_of(read_history(folder).rows[-1], folder)
            best = f", the best of {choice.sampled} samples" if choice.sampled else ""
            return choice.architecture, f"cells of epoch {choice.epoch + 1}{best}"
    except (ValueError, OSError) as error:
        return None, f"no cells: {error}"
    return None, ""


# ------------------------------------------------------------------------------------------------------ the view


def view(state: State) -> RenderableType:
    """The state as something that rich shows at any width."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    name = (
        f"{state.config.get('stage')} by {state.config.get('method')}, {state.config.get('dataset')}, "
        f"seed {state.config.get('seed')}"
    )
    parts: list[RenderableType] = [Text(str(state.folder), style="dim", overflow="fold"), *_progress(state)]
    if state.metrics:
        parts += [Text(), _figures(state)]
    if state.network:
        parts += [Text(), Text(state.network)]
    if state.architecture is not None:
        parts += [Text(), _Genotype(state.architecture, state.cells_of)]
    elif state.cells_of:
        parts += [Text(), Text(state.cells_of, overflow="fold")]
    if state.log:
        shown = [Text(line, style="dim", overflow="fold") for line in state.log[-_LINES:]]
        parts += [Text(), *shown]
    return Panel(Group(*parts), title=Text(name), title_align="left", padding=(0, 1))


def _progress(state: State) -> list[RenderableType]:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    of = f" of {state.epochs}" if state.epochs else ""
    words = [f"{state.done}{of} epochs"] if state.epochs or state.done else []  # quantising after training has none
    words.append(f"{100 * state.share:.0f}%")
    each, left = state.seconds_per_epoch, state.seconds_left
    words += [f"{duration(each)} an epoch"] if each is not None else []
    words += [f"{duration(left)} left"] if left is not None and state.held is not False else []
    if state.finished:
        seconds = state.result.get("seconds")
        known = isinstance(seconds, int | float) and math.isfinite(seconds)
        words.append("finished" + (f" after {duration(seconds)}" if known else ""))
    elif state.held is False:
        words.append("stopped")
    bar = Table.grid(expand=True)  # alone, a bar ends no line
    bar.add_row(ProgressBar(total=1.0, completed=state.share))
    return [bar, Text(", ".join(words), style="bold")]


def _figures(state: State) -> RenderableType:
    """Now and best of what the curves show."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("figure", "now", "best", "epoch"):
        table.add_column(title, justify="left" if title == "figure" else "right", overflow="fold")
    for panel in PANELS:
        best = {"loss": min, "accuracy, %": max}.get(panel.title)
        for column, label in panel.columns.items():
            values = [(panel.factor * v, e) for e, v in enumerate(state.metrics.get(column, [])) if math.isfinite(v)]
            if values:
                value, epoch = best(values, key=lambda pair: pair[0]) if best else (math.nan, 0)
                epochs = state.metrics["epoch"]
                more = (f"{value:.4g}", str(int(epochs[epoch]) + 1)) if best else ("", "")
                table.add_row(f"{panel.title}: {label}", f"{values[-1][0]:.4g}", *more)
    return table


@dataclass(frozen=True)
class _Genotype:
    """Both cells, a node a line: side by side where that fits, else one below the other."""

    architecture: Architecture
    what: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        yield Text(self.what, style="dim")
        columns = {"normal": self._nodes("normal"), "reduction": self._nodes("reduce")}
        wide = sum(max(map(len, lines)) for lines in columns.values()) + 12 <= options.max_width
        for titles in [list(columns)] if wide else [[title] for title in columns]:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for title in ("node", *titles):
                table.add_column(title)
            for node, cells in enumerate(zip(*(columns[title] for title in titles), strict=True)):
                table.add_row(str(node), *map(Text, cells))
            yield table

    def _nodes(self, kind: str) -> list[str]:
        words = [f"{operation}({state_text(source)})" for operation, source in self.architecture.pairs(kind)]
        return [" + ".join(words[at : at + 2]) for at in range(0, len(words), 2)]


# ------------------------------------------------------------------------------------------------------ watching


def watch(folder: Path, *, once: bool = False, console: Console | None = None) -> int:
    """Show a run until it ends; the exit code: 0 finished (or `once`), 1 stopped unfinished, 130 by Ctrl-C.

    Where stdout is no terminal, the view is printed once an epoch. Raises ValueError where no run lies in the folder,
    or rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise ValueError("needs the package rich; `pip install rich`") from None
    console = console or Console()
    state = read_state(folder)
    if once:
        console.print(view(state))
        return 0
    try:
        if console.is_terminal:
            with Live(view(state), console=console, auto_refresh=False) as live:
                while not _ended(state):
                    time.sleep(EVERY)
                    state = read_state(folder)
                    live.update(view(state), refresh=True)
        else:
            state = _print_epochs(state, console)
    except KeyboardInterrupt:
        print("stopped watching; the run goes on", file=sys.stderr)
        return 130
    if state.finished:
        return 0
    print(f"{folder}: no process works on it and it is not finished; `--resume auto` goes on with it", file=sys.stderr)
    return 1


def _ended(state: State) -> bool:
    return state.finished or state.held is False


def _print_epochs(state: State, console: Console) -> State:
    shown: int | None = None
    while True:
        if state.done != shown or _ended(state):
            console.print(view(state))
            shown = state.done
        if _ended(state):
            return state
        time.sleep(EVERY)
        state = read_state(state.folder)
