# SPDX-License-Identifier: Apache-2.0
"""Start a run again from its config.json, and say whether the same came out.

    python -m common.engine repeat RUN [--save DIR]

The same program runs with the same flags in a folder of its own. What is not as then (git, versions, device) is said
first; at the end flags, history and weights are compared. On the same machine they are equal bit for bit, on a GPU
with --deterministic.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common.engine.parsing import Config, Parser
from common.recipes.flags import run_program

PROG = "python -m common.engine"


def repeat_parser() -> Parser:
    """The flags of `repeat`."""
    parser = Parser(prog=f"{PROG} repeat", usage="%(prog)s RUN [flags]", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="?", metavar="RUN", help="the folder of a run")
    add("--save", type=Path, metavar="DIR", help="the folder of its repeat (default: RUN-repeat)")
    add("--cwd", type=Path, metavar="DIR", help="from where RUN's relative paths count (default: as it was started)")
    own = "execute the Python files that RUN's --data-module or --search-space name"
    add("--own-code", action="store_true", help=own)
    add("--print-command", action="store_true", help="print the command that would be run, and exit")
    return parser


def repeat_run(config: Config) -> int:
    """Start RUN again and compare; the exit code of the program. Raises ValueError for what cannot be repeated."""
    if config.run is None:
        raise ValueError("RUN: is missing; give the folder of a run")
    from common.engine.repeat import (
        check_flags,
        compare,
        differences_here,
        free_folder,
        read_repeat,
        report_lines,
        start,
    )

    repeat = read_repeat(config.run, folder=config.cwd, own_code=config.own_code)
    save = config.save.resolve() if config.save is not None else free_folder(config.run)
    if config.print_command:
        print(repeat.text(save))
        return 0
    check_flags(repeat)
    differences = differences_here(repeat)
    print(f"repeating {config.run} in {save}" + (", not as then:" if differences else ", all as then"))
    print(report_lines(differences), end="\n" if differences else "", flush=True)
    code = start(repeat, save)
    if code == 0:
        print(f"{config.run} and {save}:\n{report_lines(compare(config.run, save))}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command != "repeat":
        print(f"{PROG}: {command!r} is not repeat; --help shows what there is", file=sys.stderr)
        return 2
    config, codes = repeat_parser().parse_args(rest), [0]
    done = run_program(lambda: codes.append(repeat_run(config)), f"{PROG} repeat")
    return done or codes[-1]


if __name__ == "__main__":
    sys.exit(main())
