# SPDX-License-Identifier: Apache-2.0
"""Draw the cells of a genotype, an architecture.json or a run; a run's whole network; a search as a film.

    python visualize.py PC_DARTS
    python visualize.py runs/qdarts-search/digits-s0-20260101T120000 --format svg pdf --out cells
    python visualize.py --grown runs/qdarts-search/digits-s0-20260101T120000
    python visualize.py runs/qdarts-search/digits-s0-20260101T120000 --animate --fps 2

A name's picture goes into the working folder under that name, a run's into its folder: `cells`, `grown`, `search`. The
run may still be going. Wrong arguments and unknown names end with exit code 1, as in PaddleSlim's script of that name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.engine.parsing import Parser, choice, integer, number

USAGE = (
    "python visualize.py TARGET [--format svg|png|pdf ...] [--out F] [--bits] [--confidence] [--wbits W --abits A]\n"
    "       python visualize.py --grown TARGET [--layers N] [--bit-mapping relative|paper] [--format ...] [--out F]\n"
    "       python visualize.py RUN --animate [--fps 2] [--format gif|mp4 ...] [--out F]"
)
_STILL, _FILM = ("svg", "png", "pdf"), ("gif", "mp4")
_ENDINGS = _STILL + _FILM
_FOREIGN = ("jpg", "jpeg", "webp", "bmp", "tif", "tiff", "eps", "ps", "webm", "mov", "avi", "html")
_PARTS = ("bits", "confidence")


class _Parser(Parser):
    """The shared parser, but every error ends with the usage line and exit code 1."""

    def fail(self, errors: Sequence[str]) -> NoReturn:
        self.exit(1, "".join(f"visualize.py: {error}\n" for error in errors) + f"usage: {USAGE}\n")


def _parser() -> Parser:
    parser = _Parser(prog="visualize.py", usage=USAGE, description="Draw cells, with operations and bits.")
    add = parser.add_argument
    add("target", nargs="*", default=[], metavar="TARGET", help="a genotype's name, a file, a run, or two ENAS cells")
    add("--run", metavar="TARGET", help="the same as TARGET")
    add("--format", nargs="+", default=[], metavar="F", help="svg, png, pdf (default: svg and png); of a film gif, mp4")
    add("--out", type=Path, metavar="FILE", help="the picture's path; its ending names the format")
    for part, text in (
        ("bits", "bits on the edges (default: where there are any)"),
        ("confidence", "line widths by softmax margin (default: where a history has it)"),
    ):
        add(f"--{part}", action="store_true", help=text)
        add(f"--no-{part}", action="store_true", help=f"leave out what --{part} shows")
    add("--wbits", type=integer(1, 32), metavar="W", help="draw with uniform weight bits")
    add("--abits", type=integer(1, 32), metavar="A", help="draw with uniform activation bits")
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own that the cells hold")
    add("--grown", action="store_true", help="the whole evaluation network, with the bits of every cell")
    add("--layers", type=integer(1, 400), metavar="N", help="--grown: cells of the network (default: the run's)")
    add("--bit-mapping", type=choice("relative", "paper"), metavar="RULE", help="--grown: how its cells take bits")
    add("--animate", action="store_true", help="a search by epoch: a GIF, and an MP4 where ffmpeg is installed")
    add("--fps", type=number(0.1, 50), metavar="N", help="--animate: frames a second (default 2)")
    return parser


def chosen_stem(out: Path | None, default: Path) -> Path:
    """Where the picture goes, without ending: --out, else the default."""
    if out is None:
        return default
    return out.with_suffix("") if out.suffix.lower().lstrip(".") in _ENDINGS else out


def chosen_formats(formats: Sequence[str], out: Path | None, default: Sequence[str]) -> list[str]:
    """The formats asked for; without --format the ending of --out, without either the default.

    Raises ValueError when --format and the ending of --out say different things.
    """
    ending = out.suffix.lower().lstrip(".") if out is not None else ""
    if ending in _FOREIGN:
        raise ValueError(f"--out {out}: no .{ending} is written; end it in one of {', '.join(_ENDINGS)}")
    if formats and ending in _ENDINGS and list(formats) != [ending]:
        raise ValueError(f"--format {' '.join(formats)} contradicts --out {out}; leave one of them out")
    return list(formats) or ([ending] if ending in _ENDINGS else list(default))


def wanted_part(args: argparse.Namespace, part: str) -> bool | None:
    """Whether --PART or --no-PART was given; None: neither. Raises ValueError for both."""
    with_it, without = getattr(args, part), getattr(args, f"no_{part}")
    if with_it and without:
        raise ValueError(f"--{part} and --no-{part}: contradict each other; leave one of them out")
    return True if with_it else False if without else None


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    for part in _PARTS:
        wanted_part(args, part)
    if (args.wbits is None) != (args.abits is None):
        raise ValueError("--wbits and --abits: give both or neither")
    if args.wbits is not None and args.no_bits:
        raise ValueError("--no-bits: contradicts --wbits and --abits; leave one of them out")
    if args.grown and args.animate:
        raise ValueError("--grown: is one picture, --animate a film; choose one of them")
    for flag, value, owner in (
        ("--layers", args.layers, "grown"),
        ("--bit-mapping", args.bit_mapping, "grown"),
        ("--fps", args.fps, "animate"),
    ):
        if value is not None and not getattr(args, owner):
            raise ValueError(f"{flag}: belongs to --{owner}; add that or leave {flag} out")
    if args.grown and args.confidence:
        raise ValueError("--confidence: a whole network shows no margins; leave --grown or --confidence out")
    if args.animate and args.wbits is not None:
        raise ValueError("--wbits: a film shows the bits of its search; leave --animate or --wbits out")


def _draw(args: argparse.Namespace, named: str, formats: Sequence[str]) -> tuple[list[Path], Sequence[str]]:
    """The files written, and what there is to say."""
    from common.recipes.target import open_target

    if args.animate:
        return _draw_film(args, Path(named), formats)
    target = open_target(named)
    if args.wbits is not None:
        target = target.with_uniform_bits(args.wbits, args.abits)
    wanted = chosen_formats(formats, args.out, ("svg", "png"))
    if args.grown:
        from common.recipes.grown import draw_grown
        from common.recipes.grown_network import grow

        grown = grow(target, layers=args.layers, mapping=args.bit_mapping).shown(bits=wanted_part(args, "bits"))
        default = target.stem.with_name("grown" if target.run else f"{target.stem.name}-grown")
        return draw_grown(grown, chosen_stem(args.out, default), formats=wanted, title=target.title), target.notes
    from common.recipes.pictures import draw_cells

    parts = {part: wanted_part(args, part) for part in _PARTS}
    target = target.shown(**parts)
    stem, kept = chosen_stem(args.out, target.stem), {"title": target.title, "margins": target.margins}
    return draw_cells(target.architecture, stem, formats=wanted, **kept), target.notes


def _draw_film(args: argparse.Namespace, run: Path, formats: Sequence[str]) -> tuple[list[Path], Sequence[str]]:
    from common.recipes.animation import draw_film, has_ffmpeg, read_film

    parts = {part: wanted_part(args, part) for part in _PARTS}
    film = read_film(run).shown(**parts)
    asked = chosen_formats(formats, args.out, ())
    notes = ["no MP4: the program ffmpeg is not installed"] if not asked and not has_ffmpeg() else []
    wanted = asked or (_FILM if has_ffmpeg() else _FILM[:1])
    written = draw_film(film, chosen_stem(args.out, run / "search"), formats=wanted, fps=args.fps or 2.0)
    return written, [*film.notes, *notes]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    asked = [part.lower() for entry in args.format for part in entry.split(",") if part]
    # `--format svg PC_DARTS`: what is no format after --format is the target
    targets = [*args.target, *([args.run] if args.run else [])]
    if not targets and len(args.format) > 1 and asked[-1] not in _ENDINGS:
        targets, asked = [args.format[-1]], asked[:-1]
    if len(targets) != 1:
        wrong = f"{len(targets)} are given ({' '.join(targets)}); name one" if targets else "is missing; name one"
        _parser().fail([f"TARGET: {wrong} genotype, architecture.json or run's folder"])
    try:
        _check(args)
        if args.search_space is not None:
            from common.recipes.own_space import load_search_space

            load_search_space(args.search_space)
        written, notes = _draw(args, targets[0], asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        flag = f"--out {args.out}" if args.out is not None else targets[0]
        print(f"{flag}: {error.strerror or error} ({error.filename}); name another place by --out", file=sys.stderr)
        return 1
    for note in notes:
        print(note, file=sys.stderr)
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
