# SPDX-License-Identifier: Apache-2.0
"""Draw the cells of a genotype, an architecture.json or a run: operations and bits on the edges, as SVG and PNG.

    python visualize.py PC_DARTS
    python visualize.py runs/qdarts-search/digits-s0-20260101T120000 --format svg pdf --out cells

A name's picture goes into the working folder under that name, a run's into its folder as `cells`. Wrong arguments and
unknown names end with exit code 1, as in the PaddleSlim script of the same name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from common.engine.parsing import Parser, integer

USAGE = (
    "python visualize.py TARGET [--format svg|png|pdf ...] [--out FILE] [--wbits W --abits A] [--search-space FILE.py]"
)
_ENDINGS = ("svg", "png", "pdf")


class _Parser(Parser):
    """The shared parser, but every error ends with the usage line and exit code 1."""

    def fail(self, errors: Sequence[str]) -> NoReturn:
        self.exit(1, "".join(f"visualize.py: {error}\n" for error in errors) + f"usage: {USAGE}\n")


def _parser() -> Parser:
    parser = _Parser(prog="visualize.py", usage=USAGE, description="Draw both cells, with operations and bits.")
    parser.add_argument("target", nargs="*", default=[], metavar="TARGET", help="a genotype's name, a file or a run")
    parser.add_argument("--run", metavar="TARGET", help="the same as TARGET")
    parser.add_argument("--format", nargs="+", default=[], metavar="F", help="svg, png, pdf (default: svg and png)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture's path; its ending names the format")
    parser.add_argument("--wbits", type=integer(1, 32), metavar="W", help="draw with uniform weight bits")
    parser.add_argument("--abits", type=integer(1, 32), metavar="A", help="draw with uniform activation bits")
    own = "operations of your own that the cells hold"
    parser.add_argument("--search-space", type=Path, metavar="FILE.py", help=own)
    return parser


def target_stem(target: str, out: Path | None) -> Path:
    """Where the picture goes, without ending: --out, a run's `cells`, beside a file, or NAME in the working folder.

    An architecture written out as integers has no name: its picture gets one from their digest.
    """
    if out is not None:
        return out.with_suffix("") if out.suffix.lower().lstrip(".") in _ENDINGS else out
    text = re.sub(r"#[^\n]*", "", target)
    if len(text.split()) > 4 and not re.search(r"[^\d\s,\[\]]", text):
        return Path(f"enas-{sha256(' '.join(re.findall('[0-9]+', text)).encode()).hexdigest()[:8]}")
    path = Path(target)
    if path.is_dir():
        return path / "cells"
    return path.with_suffix("") if path.is_file() else Path(path.name)


def chosen_formats(formats: Sequence[str], out: Path | None) -> list[str]:
    """The formats asked for; without --format the ending of --out, without either svg and png.

    Raises ValueError when --format and the ending of --out say different things.
    """
    ending = out.suffix.lower().lstrip(".") if out is not None else ""
    if formats and ending in _ENDINGS and list(formats) != [ending]:
        raise ValueError(f"--format {' '.join(formats)} contradicts --out {out}; leave one of them out")
    return list(formats) or ([ending] if ending in _ENDINGS else ["svg", "png"])


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

    from common.nets.architecture import load_architecture
    from common.recipes.pictures import draw_cells

    try:
        if (args.wbits is None) != (args.abits is None):
            raise ValueError("--wbits and --abits: give both or neither")
        formats = chosen_formats(asked, args.out)
        if args.search_space is not None:
            from common.recipes.own_space import load_search_space

            load_search_space(args.search_space)
        architecture = load_architecture(targets[0])
        if args.wbits is not None:
            architecture = architecture.with_uniform_bits(args.wbits, args.abits)
        stem = target_stem(targets[0], args.out)
        title = architecture.name or (stem.name if stem.name.startswith("enas-") else Path(targets[0]).resolve().name)
        written = draw_cells(architecture, stem, formats=formats, title=title)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
