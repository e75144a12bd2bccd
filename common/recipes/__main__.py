# SPDX-License-Identifier: Apache-2.0
"""Baselines of a search: networks drawn at random at its cost, and how well its supernet ranks trained networks.

    python -m common.recipes random --like RUN --keep cells --seed 0 --out random-bits.json
    python -m common.recipes random --like RUN --keep none --seed 0 --out random-cells.json
    python -m common.recipes rank SEARCH_RUN TRAIN_RUN... [--out rank.csv]

`random` writes an architecture that train.py --arch takes, within 5% of the BitOps (quantised layers) of the network of
RUN, a search or a training. `rank` compares the accuracy that each trained architecture has in the search's supernet,
on the search's validation images, with the test accuracy of its training.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.engine.files import write_bytes
from common.engine.parsing import Config, Parser, choice, integer, one_of
from common.recipes.flags import run_program

PROG = "python -m common.recipes"


def random_parser() -> Parser:
    """The flags of `random`."""
    parser = Parser(prog=f"{PROG} random", description="Draw a network of the cost of RUN's.")
    add = parser.add_argument
    add("--like", type=Path, metavar="RUN", help="the search or training whose network sets the cost")
    add("--keep", type=choice("cells", "none"), default="cells", metavar="cells|none", help="what is not drawn")
    add("--bits", type=one_of(1, 2, 3, 4, 8), nargs="+", metavar="B", help="bits to draw from (default: RUN's)")
    add("--seed", type=integer(0), default=0, metavar="N", help="names the draw")
    add("--out", type=Path, default=Path("random.json"), metavar="F.json", help="the architecture's file")
    add("--data", type=Path, metavar="DIR", help="where the images lie (default: where RUN had them)")
    _add_own_code(parser)
    return parser


def rank_parser() -> Parser:
    """The flags of `rank`."""
    parser = Parser(
        prog=f"{PROG} rank",
        usage="%(prog)s SEARCH_RUN TRAIN_RUN... [flags]",
        description="Rank trained networks by their accuracy in a search's supernet, and compare.",
    )
    add = parser.add_argument
    add("runs", nargs="*", default=[], metavar="RUN", help="a search, then finished trainings")
    add("--out", type=Path, metavar="F.csv", help="also write the rows there")
    add("--data", type=Path, metavar="DIR", help="where the images lie (default: where the search had them)")
    add("--device", type=choice("auto", "cpu", "cuda"), default="auto", metavar="auto|cpu|cuda", help="what computes")
    _add_own_code(parser)
    return parser


def _add_own_code(parser: Parser) -> None:
    add, once = parser.add_argument, "that the search was made with; a record's own word executes none"
    add("--data-module", metavar="FILE.py:FUNCTION", help=f"the data of your own {once}")
    add("--search-space", type=Path, metavar="FILE.py", help=f"the operations of your own {once}")


def draw_random(config: Config) -> None:
    """Draw, write and say what it costs."""
    if config.like is None:
        raise ValueError("--like: missing; name the run of a search or of a training")
    from common.recipes.sampling import draw, load_reference

    reference = load_reference(config.like, config.bits, config.data, config.data_module, config.search_space)
    architecture = draw(reference, keep=config.keep, seed=config.seed)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    architecture.save(config.out)
    cost, target = (reference.cost(each).bitops_quantized for each in (architecture, reference.architecture))
    print(
        f"{architecture.name}, seed {config.seed}: {cost / 1e9:.4g} G BitOps in quantised layers "
        f"({cost / target - 1:+.1%} of the {target / 1e9:.4g} G of {config.like}): {config.out}"
    )


def rank_trained(config: Config) -> None:
    """Rank, print the table and the correlations, write the CSV."""
    if len(config.runs) < 3:
        raise ValueError("RUN: give a search, then at least two finished trainings")
    from common.recipes.ranking import rank

    changes = {"device": config.device} | ({"data": config.data} if config.data else {})
    changes |= {"data_module": config.data_module, "search_space": config.search_space}
    search, *trainings = map(Path, config.runs)
    found = rank(search, trainings, **changes)
    print(as_text(found))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(config.out, as_csv(found).encode())


def as_text(found: dict[str, Any]) -> str:
    """The rows as Markdown, and a line of how they agree."""
    lines = ["| training | in the supernet | trained | G BitOps |", "| --- | ---: | ---: | ---: |"]
    for row in found["rows"]:
        bitops = "-" if row["bitops_quantized"] is None else f"{row['bitops_quantized'] / 1e9:.4g}"
        lines.append(f"| {row['run']} | {row['supernet_top1']:.2%} | {row['test_top1']:.2%} | {bitops} |")
    if found["spearman"] is None:
        return "\n".join([*lines, "", f"n = {found['n']}: one side has the same accuracy throughout, so no order"])
    return "\n".join(
        [
            *lines,
            "",
            f"n = {found['n']}: Spearman's rho {found['spearman']:+.3f} (permutation p = {found['spearman_p']:.3f}), "
            f"Kendall's tau-b {found['kendall']:+.3f}",
        ]
    )


def as_csv(found: dict[str, Any]) -> str:
    """A line a training, each with the search and the correlations, so that files of several searches can be joined."""
    same = {key: value for key, value in found.items() if key != "rows"}
    rows = [{**row, **same} for row in found["rows"]]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Config], None]]] = {
    "random": (random_parser, draw_random),
    "rank": (rank_parser, rank_trained),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        print(f"{PROG}: {command!r} is not one of {', '.join(COMMANDS)}; --help shows them", file=sys.stderr)
        return 2
    make_parser, work = COMMANDS[command]
    config = make_parser().parse_args(rest)
    return run_program(lambda: work(config), f"{PROG} {command}", config)


if __name__ == "__main__":
    sys.exit(main())
