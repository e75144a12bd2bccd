# SPDX-License-Identifier: Apache-2.0
"""Tables of runs: accuracy with its uncertainty, parameters, MACs, BitOps, weight memory and time, row by row.

    python report.py runs/qdarts-train/*
    python report.py runs --format csv --out results/table.csv
    python report.py runs --group-by method,bits --format latex
    python report.py runs --pareto docs/images/pareto.svg
    python report.py runs/qdarts-search/RUN --plots
    python report.py runs --html report.html
    python report.py runs/qdarts-search/RUN --watch

Runs that differ only by their seed share a row (`--group-by run`: a row each); a grouping that would mix data sets or
sizes is refused. Runs of the same configuration and seed count once; the table names the others. Exit code 1 when a
folder could not be read; the others are printed all the same. A run may be writing while it is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.engine.files import write_bytes
from common.engine.parsing import Parser, choice
from common.recipes.page import build_page, page_file
from common.recipes.pareto import COSTS, draw_pareto, picture
from common.recipes.plots import draw_plots
from common.recipes.records import Record, find_runs, read_run
from common.recipes.rows import DEFAULT_GROUPS, GROUP_FIELDS, group, repeat_notes
from common.recipes.tables import to_csv, to_json, to_latex, to_markdown

if TYPE_CHECKING:
    from common.cost import Cost

_WRITERS = {"md": to_markdown, "csv": to_csv, "json": to_json, "latex": to_latex}
_ENDINGS = {".md": "md", ".csv": "csv", ".json": "json", ".tex": "latex"}


def _parser() -> Parser:
    parser = Parser(prog="report.py", usage="python report.py RUN... [flags]", description="Tables of runs.")
    parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help="run folders, or folders that hold some")
    parser.add_argument("--run", nargs="+", default=[], metavar="RUN", help="the same as RUN")
    parser.add_argument(
        "--format", type=choice(*_WRITERS), metavar="|".join(_WRITERS), help="default: by the ending of --out, else md"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to stdout")
    parser.add_argument(
        "--group-by",
        nargs="+",
        default=list(DEFAULT_GROUPS),
        metavar="F",
        help=f"a row for each {', '.join(DEFAULT_GROUPS)} (default); choose among {', '.join(GROUP_FIELDS)}",
    )
    parser.add_argument("--pareto", type=picture, metavar="FILE", help="draw accuracy against cost: .svg, .png or .pdf")
    costs, default = "|".join(COSTS), next(iter(COSTS))
    parser.add_argument("--pareto-x", type=choice(*COSTS), default=default, metavar=costs, help="its cost axis")
    plots = "draw each run's curves into its folder, and the choices of a search: curves.svg, alphas.svg, ..."
    parser.add_argument("--plots", action="store_true", help=plots)
    page = "write everything as one page that needs nothing else: tables, plots, cells, curves, layers"
    parser.add_argument("--html", type=page_file, metavar="OUT.html", help=page)
    parser.add_argument("--watch", action="store_true", help="follow one run in the terminal until it ends")
    own = "operations of your own that the cells name; it is run"
    parser.add_argument("--search-space", type=Path, metavar="FILE.py", help=own)
    parser.add_argument("--once", action="store_true", help="with --watch: show it as it is now, and exit")
    return parser


def read_all(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """All runs among and below `paths`, and one message for everything that could not be read."""
    folders, problems = find_runs(paths)
    records = []
    for folder in folders:
        try:
            records.append(read_run(folder))
        except ValueError as error:
            problems.append(str(error))
    return records, problems


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    paths = [Path(path) for path in (*args.runs, *args.run)]
    if not paths:
        parser.fail(["RUN: is missing; name run folders, or a folder that holds some, such as runs"])
    if args.search_space is not None:
        _load_own(parser, args.search_space)
    if args.watch or args.once:
        others = [f"--{name}" for name in ("html", "plots", "out", "pareto", "format") if getattr(args, name)]
        return _watch(parser, paths, once=args.once, watching=args.watch, others=others)
    form = args.format or _ENDINGS.get(args.out.suffix.lower() if args.out else "", "md")
    records, problems = read_all(paths)
    try:
        rows = group(records, [name for entry in args.group_by for name in entry.split(",") if name])
    except ValueError as error:
        parser.fail([str(error)])
    for message in (*problems, *(repeat_notes(rows) if form in ("csv", "json") else ())):  # no notes in these
        print(f"report.py: {message}", file=sys.stderr)
    if rows and args.pareto:
        try:
            image, left_out = draw_pareto(rows, args.pareto_x, args.pareto.suffix.lower().lstrip("."))
        except ValueError as error:
            parser.fail([str(error)])
        for message in left_out:
            print(f"report.py: --pareto leaves out {message}", file=sys.stderr)
        _write(parser, "--pareto", args.pareto, image)
    for record in records if args.plots else ():
        try:
            for path in draw_plots(record.folder):
                print(f"wrote {path}", file=sys.stderr)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            print(f"report.py: --plots: {error}", file=sys.stderr)
    if rows and args.html:
        page = build_page(rows, problems, _cost_of, lambda run: print(f"drawing {run.folder}", file=sys.stderr))
        _write(parser, "--html", args.html, page.encode())
    if rows:
        _write(parser, "--out", args.out, _WRITERS[form](rows).encode())
    return 1 if problems or not rows else 0


def _cost_of(folder: Path) -> Cost:
    """What the network of a run, or of what a search found, costs layer by layer; ValueError naming the folder."""
    from common.cost.__main__ import cost_of, make_parser

    config = make_parser().parse_args([str(folder)])
    try:
        return cost_of(config)[0]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: config.json or result.json lacks what its network was built for ({error})"
        ) from None


def _load_own(parser: Parser, file: Path) -> None:
    """--search-space: only a file that was named here is run, never one that a run's folder names."""
    from common.recipes.own_space import load_search_space

    try:
        load_search_space(file)
    except ValueError as error:
        parser.fail([str(error)])


def _watch(parser: Parser, paths: Sequence[Path], *, once: bool, watching: bool, others: Sequence[str]) -> int:
    """--watch: the one run among the paths, until it ends. `others`: flags given with it that it has no use for."""
    from common.recipes.watch import watch

    folders, problems = find_runs(paths)
    if watching and others:
        problems = [f"--watch: shows a run as it goes, and {others[0]} writes a report; leave one of the two out"]
    if not watching:
        problems = ["--once: goes with --watch; add it"]
    elif not problems and len(folders) != 1:
        problems = [f"--watch: follows one run, and there are {len(folders)}; name one of {folders[0]}, ..."]
    if problems:
        parser.fail(problems)
    try:
        return watch(folders[0], once=once)
    except ValueError as error:
        parser.fail([f"--watch: {error}"])


def _write(parser: Parser, flag: str, out: Path | None, data: bytes) -> None:
    """To the file, in one piece, or to stdout; a disk that refuses ends the program with exit code 2."""
    if out is None:
        sys.stdout.write(data.decode())
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, data)
    except OSError as error:
        parser.fail([f"{flag} {out}: {error.strerror or error}; name another file"])
    print(f"wrote {out}", file=sys.stdout if flag == "--out" else sys.stderr)  # stdout may hold the table


if __name__ == "__main__":
    sys.exit(main())
