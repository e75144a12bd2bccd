# SPDX-License-Identifier: Apache-2.0
"""A search as a film: both cells as they change by epoch, with accuracy, loss and cost under them; GIF and MP4.

Nodes and labels stand in the same place in every frame, and what two epochs have in common keeps its side, so that
only the choices move. Frames are painted by matplotlib; the GIF needs Pillow, the MP4 the program ffmpeg.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.engine.files import read_json, write_bytes
from common.nets import load_architecture
from common.recipes import cells_matplotlib as painter
from common.recipes.cell_layout import Box, Cell, Drawing, plan_pictures
from common.recipes.cell_style import BIT_COLOURS, CONCAT, FILL, INK, MIXED_COLOUR, NO_WEIGHTS, PLAIN
from common.recipes.chosen import Choice, choice_of
from common.recipes.history import read_history
from common.recipes.paint import COLOURS
from common.recipes.pictures import architecture_cells, lay_out_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

FORMATS = ("gif", "mp4")
"""The formats of a film."""
MAX_FRAMES = 300
"""Of a longer search every second epoch is shown, or every third, ...: the film must fit into memory and patience."""
HOLD_SECONDS = 3.0
"""How long the last frame stays."""
FASTEST = 50
"""Frames a second that a GIF can say (its clock ticks in hundredths of a second, and readers round a single one up)."""
_WIDTH = 1200  # pixels, at most
_STRIP, _PANEL_TEXT, _LEAST = 76.0, 148.0, 800.0  # points: height of the figures, their text, the least width


@dataclass(frozen=True)
class Panel:
    """One of the figures under the cells: its title, columns of history.jsonl with their labels, factor and unit."""

    title: str
    columns: Mapping[str, str]
    factor: float = 1.0
    form: str = "{:.4g}"


_PANELS = (
    Panel(
        "accuracy",
        {"valid_top1": "validation", "sample_top1": "samples", "train_top1": "training"},
        factor=100.0,
        form="{:.1f} %",
    ),
    Panel("loss", {"valid_loss": "validation", "train_loss": "training"}, form="{:.3f}"),
    Panel("BitOps, M", {"expected_bitops": "expected", "exact_bitops": "exact"}, factor=1e-6),
    Panel("reward", {"reward": "reward", "baseline": "its average"}, form="{:.3f}"),
)
_SHOWN_PANELS, _SHOWN_COLUMNS = 3, 2


@dataclass(frozen=True)
class Film:
    """What is shown: per epoch the choice and the figures; `notes` say what is left out."""

    name: str
    choices: tuple[Choice, ...]
    rows: tuple[Mapping[str, Any], ...]
    epochs: int | None
    """Of the whole search; None: not known."""
    notes: tuple[str, ...]

    def shown(self, *, bits: bool | None, confidence: bool | None) -> Film:
        """The film with a part (True), without it (False), or as it is (None).

        Raises ValueError, naming the flag, where a part is asked for that is not there.
        """
        if bits and not any(one.architecture.bits for one in self.choices):
            raise ValueError(f"--bits: {self.name} searched none; leave the flag out")
        if confidence and not any(one.margins for one in self.choices):
            raise ValueError(f"--confidence: {self.name} has no alphas in its history.jsonl; leave the flag out")
        choices = self.choices
        if bits is False:
            choices = tuple(replace(one, architecture=replace(one.architecture, bits=None)) for one in choices)
        if confidence is False:
            choices = tuple(replace(one, margins=None) for one in choices)
        return replace(self, choices=choices)


def read_film(run: Path) -> Film:
    """A search's history, as far as it is written. Raises ValueError naming the file, the reason and the cure."""
    history = read_history(run)
    notes = [f"{run / 'history.jsonl'}: its last line is half written and left out"] if history.torn else []
    every = max(1, -(-(len(history.rows) - 1) // (MAX_FRAMES - 1)))
    rows = [*history.rows[:-1:every], history.rows[-1]]
    if every > 1:
        notes.append(f"{len(history.rows)} epochs: {len(rows)} of them are shown")
    choices = [choice_of(row, run) for row in rows]
    if (run / "architecture.json").is_file() and choices[-1].sampled:
        found = load_architecture(str(run))  # by more than one epoch's samples
        if found.genotype != choices[-1].architecture.genotype:
            choices.append(replace(choices[-1], architecture=found, sampled=0, final=True))
            rows.append(rows[-1])
    if len({_shape(choice) for choice in choices}) > 1:
        raise ValueError(f"{run / 'history.jsonl'}: its epochs have cells of different sizes; the file is damaged")
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    flags = config.get("config") if isinstance(config, dict) else None
    epochs = flags.get("epochs") if isinstance(flags, dict) else None
    name = "/".join(run.resolve().parts[-2:])
    return Film(name, tuple(choices), tuple(rows), epochs if isinstance(epochs, int) else None, tuple(notes))


def _shape(choice: Choice) -> tuple[int, ...]:
    return tuple(len(choice.architecture.pairs(kind)) for kind in ("normal", "reduce"))


def draw_film(film: Film, stem: Path, *, formats: Iterable[str], fps: float) -> list[Path]:
    """Write `stem` + `.gif`, `.mp4`; returns the files. Raises ValueError when ffmpeg is missing or fails."""
    wanted = list(dict.fromkeys(formats))
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise ValueError(
            f"--format {' '.join(unknown)}: is no film's; choose from {', '.join(FORMATS)}, or leave --animate out"
        )
    if "mp4" in wanted and not has_ffmpeg():
        raise ValueError("--format mp4: the program ffmpeg is not installed; install it, or take --format gif")
    frames = list(_frames(film))
    stem.parent.mkdir(parents=True, exist_ok=True)
    make = {"gif": _gif, "mp4": _mp4}
    return [write_bytes(stem.with_name(f"{stem.name}.{form}"), make[form](frames, fps)) for form in wanted]


def has_ffmpeg() -> bool:
    """Whether an MP4 can be written here."""
    return shutil.which("ffmpeg") is not None


# ------------------------------------------------------------------------------------------------------- the frames


def lay_out_film(film: Film) -> list[Drawing]:
    """The drawing of every epoch, all of one size."""
    pictures = [architecture_cells(choice.architecture, choice.margins) for choice in film.choices]
    among: list[Cell] = [cell for cells in pictures for cell in cells]
    titles = [_title(film, choice) for choice in film.choices]
    drawings = [
        lay_out_cells(cells, title=title, among=among, plan=plan)
        for cells, title, plan in zip(pictures, titles, plan_pictures(pictures), strict=True)
    ]
    width = max(_LEAST, *(drawing.width for drawing in drawings))
    return [drawing.widened(width) for drawing in drawings]


def _title(film: Film, choice: Choice) -> str:
    if choice.final:
        return f"{film.name}: what was found"
    of = f" of {film.epochs}" if film.epochs else ""
    sampled = f", the best of {choice.sampled} samples" if choice.sampled else ""
    return f"{film.name}: epoch {choice.epoch + 1}{of}{sampled}"


def _frames(film: Film) -> Iterator[Image.Image]:
    """Every frame with the film's palette, its width and height even (MP4 wants that)."""
    from PIL import Image

    palette = _palette()
    panels = _panels(film.rows)
    for number, drawing in enumerate(lay_out_film(film)):
        height = drawing.height + (_STRIP if panels else 0.0)
        with painter.page(drawing.width, height) as axes:
            painter.put_drawing(axes, drawing)
            for place, panel in enumerate(panels):
                wide = (drawing.width - 20) / len(panels)
                box = Box(10 + wide * (place + 0.5), drawing.height + _STRIP / 2, wide - 10, _STRIP - 8)
                _put_panel(axes, box, panel, film.rows, number)
            rgb = painter.pixels(axes, _WIDTH * 72 / drawing.width)
        rgb = rgb[: rgb.shape[0] // 2 * 2, : rgb.shape[1] // 2 * 2]
        yield Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE)


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The first three with numbers, each with the first two columns that have some."""
    found = []
    for panel in _PANELS:
        known = [name for name in panel.columns if any(_number(row.get(name)) is not None for row in rows)]
        if known:
            found.append(replace(panel, columns={name: panel.columns[name] for name in known[:_SHOWN_COLUMNS]}))
    return found[:_SHOWN_PANELS]


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _put_panel(axes: Axes, box: Box, panel: Panel, rows: Sequence[Mapping[str, Any]], now: int) -> None:
    """Title and present values on the left, on the right their curves: the way so far, and faint what is to come."""
    left, top = box.x - box.width / 2, box.y - box.height / 2
    painter.put_text(axes, left, top + 8, panel.title, 11, ha="left", weight="bold")
    values = {name: [_number(row.get(name)) for row in rows] for name in panel.columns}
    seen = [value for column in values.values() for value in column if value is not None]
    low, span = min(seen), (max(seen) - min(seen)) or 1.0
    start, wide = left + _PANEL_TEXT, box.width - _PANEL_TEXT - 12
    for number, (name, label) in enumerate(panel.columns.items()):
        colour, y = COLOURS[number], top + 28 + 19 * number
        value = values[name][now]
        text = "-" if value is None else panel.form.format(panel.factor * value)
        painter.put_box(axes, Box(left + 5, y, 10, 10), colour, "none", 1)
        painter.put_text(axes, left + 15, y, f"{label} {text}", 10.5, ha="left")
        points = [
            (k, start + wide * k / max(1, len(rows) - 1), top + 4 + (box.height - 10) * (1 - (v - low) / span))
            for k, v in enumerate(values[name])
            if v is not None
        ]
        for kept, shade, width in ((points, "#DCE1E8", 1.2), ([p for p in points if p[0] <= now], colour, 1.6)):
            axes.plot([p[1] for p in kept], [p[2] for p in kept], color=shade, linewidth=width, zorder=1 + width)
        if value is not None:
            _, x, y = next(point for point in points if point[0] == now)
            axes.plot([x], [y], marker="o", markersize=4, color=colour, zorder=4)


# -------------------------------------------------------------------------------------------------------- the files


def _palette() -> Image.Image:
    """One palette for all frames, so that nothing flickers: the style's colours, and their way to the grounds."""
    from PIL import Image

    strong = [*BIT_COLOURS.values(), INK, PLAIN, NO_WEIGHTS, *COLOURS[:2]]
    pale = [MIXED_COLOUR, CONCAT, *FILL.values(), "#DCE1E8", "#FFFFFF", "#000000", "#D5DAE1", "#475569"]
    found = dict.fromkeys(_rgb(colour) for colour in (*strong, *pale))
    for colour in strong:  # what the rim of a letter or a line is made of
        for ground in ("#FFFFFF", "#000000", MIXED_COLOUR) if colour != INK else ("#FFFFFF", *FILL.values()):
            for share in (0.2, 0.4, 0.6, 0.8):
                mixed = (round(a + (b - a) * share) for a, b in zip(_rgb(colour), _rgb(ground), strict=True))
                found[tuple(mixed)] = None
    image = Image.new("P", (1, 1))
    image.putpalette([channel for colour in list(found)[:256] for channel in colour])
    return image


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def _gif(frames: Sequence[Image.Image], fps: float) -> bytes:
    each = max(20, round(100 / fps) * 10)
    durations = [*[each] * (len(frames) - 1), max(each, round(1000 * HOLD_SECONDS))]
    out = io.BytesIO()
    # each frame as a whole or its changed part, no colours thrown away: the palette is ours
    frames[0].save(
        out, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False, disposal=1
    )
    return out.getvalue()


def _mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    """By ffmpeg, with the encoder that it has for MP4; the last frame is repeated."""
    import tempfile

    held = [*frames, *[frames[-1]] * max(0, round(HOLD_SECONDS * fps) - 1)]
    wide, high = frames[0].size
    source = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{wide}x{high}", "-framerate", f"{fps:g}"]
    picture = ["-pix_fmt", "yuv420p", "-movflags", "+faststart", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "film.mp4"
        command = ["ffmpeg", "-hide_banner", "-loglevel", "error", *source, "-i", "-", *picture, str(target)]
        with open(Path(place) / "said.txt", "w+b") as said:
            # one frame at a time: a film's pixels together are gigabytes
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as ffmpeg:
                assert ffmpeg.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has failed, and says why
                    for frame in held:
                        ffmpeg.stdin.write(frame.convert("RGB").tobytes())
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines()
        if ffmpeg.returncode or not target.is_file():
            why = words[-1] if words else ffmpeg.returncode
            raise ValueError(f"--format mp4: ffmpeg failed ({why}); take --format gif")
        return target.read_bytes()
