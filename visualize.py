# SPDX-License-Identifier: Apache-2.0
"""Draw the cells of a genotype, an architecture.json or a run: operations and bits on the edges, SVG and PNG.

python visualize.py PC_DARTS
python visualize.py runs/qdarts-search/digits-s0-20260101T120000 --format svg pdf --out cells
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = "python visualize.py TARGET [--format svg png pdf] [--out FILE] [--wbits W --abits A]"


class _Parser(argparse.ArgumentParser):
    """Wrong arguments end with the usage and exit code 1, as in the PaddleSlim script that this one replaces."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(1, f"visualize.py: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visualize.py", usage=USAGE, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("target", nargs="*", metavar="TARGET", help="a genotype's name, an architecture.json or a run")
    parser.add_argument("--run", dest="run", metavar="TARGET", help="the same as TARGET")
    parser.add_argument("--format", nargs="+", metavar="F", help="svg, png, pdf; several at once (default: svg png)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture's path; its ending names the format")
    parser.add_argument("--wbits", type=int, metavar="W", help="draw with uniform weight bits")
    parser.add_argument("--abits", type=int, metavar="A", help="draw with uniform activation bits")
    return parser


def target_stem(target: str, out: Path | None) -> Path:
    """Where the picture goes, without ending: --out, a run's `cells`, beside a file, or NAME in the working folder."""
    if out is not None:
        return out.with_suffix("") if out.suffix.lower() in (".svg", ".png", ".pdf") else out
    path = Path(target)
    if path.is_dir():
        return path / "cells"
    return path.with_suffix("") if path.is_file() else Path(target)


def chosen_formats(formats: Sequence[str] | None, out: Path | None) -> list[str]:
    """The formats asked for; without --format the ending of --out, without either svg and png.

    Raises ValueError when --format and the ending of --out say different things.
    """
    ending = out.suffix.lower().removeprefix(".") if out is not None else ""
    named = [ending] if ending in ("svg", "png", "pdf") else []
    asked = [part for entry in formats or () for part in entry.lower().split(",") if part]
    if asked and named and asked != named:
        raise ValueError(f"--format {' '.join(asked)} contradicts --out {out}: leave one of them out")
    return asked or named or ["svg", "png"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    targets = args.target + ([args.run] if args.run else [])
    if len(targets) != 1:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 1

    from common.nets import load_architecture
    from common.recipes.pictures import draw_cells

    try:
        if (args.wbits is None) != (args.abits is None):
            raise ValueError("--wbits and --abits: give both or neither")
        formats = chosen_formats(args.format, args.out)
        architecture = load_architecture(targets[0])
        if args.wbits is not None:
            architecture = architecture.with_uniform_bits(args.wbits, args.abits)
        title = architecture.name or Path(targets[0]).resolve().name
        written = draw_cells(architecture, target_stem(targets[0], args.out), formats=formats, title=title)
    except (ValueError, OSError) as error:
        print(f"visualize.py: {error}" if isinstance(error, OSError) else error, file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
