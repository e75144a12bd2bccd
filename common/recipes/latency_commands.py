# SPDX-License-Identifier: Apache-2.0
"""Time the operations of a search space into a table, and see how well its sums predict whole networks.

    python -m common.cost latency measure --out lut.csv
    python -m common.cost latency check --lut lut.csv

`measure` times every operation of the space at every shape and pair of bits, and the stem, the cells' inputs, sums and
concatenations and the classifier, with a backend of your choice; a search takes the table by --cost latency --lut
lut.csv. `check` times whole networks drawn at random and compares. Measure on the machine that will run the network,
with nothing else on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.engine.parsing import Config, Parser, Switch, choice, integer, number, one_of
from common.recipes.flags import run_program

if TYPE_CHECKING:
    from common.recipes.latency import Space

PROG = "python -m common.cost latency"
BACKENDS = ("torch", "onnxruntime", "onnx", "onnx-int8")
_BITS = (1, 2, 3, 4, 8, 32)


def measure_parser() -> Parser:
    """The flags of `measure`."""
    parser = Parser(prog=f"{PROG} measure", description="Time every operation of a search space into a table.")
    add = parser.add_argument
    add("--out", type=Path, metavar="F.csv", help="the table's file (must not be there yet)")
    backends = "torch: fake-quantised; onnxruntime: full precision; onnx, onnx-int8: export.py's formats in it"
    add("--backend", type=choice(*BACKENDS), default="torch", metavar="|".join(BACKENDS), help=backends)
    bits = "bits that the search chooses among; none: full precision"
    add("--bits", type=_bits_or_none, nargs="+", default=[2, 4], metavar="B", help=bits)
    single = "single convolutions too, which a search of bits on a fixed network needs"
    add("--convolutions", action=Switch, default=False, help=single)
    add("--batch", type=integer(1), default=1, metavar="N", help="images of a forward")
    _add_space(parser)
    _add_timing(parser)
    least = "milliseconds that a sample lasts at least, by repeating the call"
    parser.group("timing").add_argument("--least-ms", type=number(positive=True), default=2.0, metavar="MS", help=least)
    return parser


def check_parser() -> Parser:
    """The flags of `check`."""
    parser = Parser(prog=f"{PROG} check", description="Compare a table's sums with whole networks drawn at random.")
    add = parser.add_argument
    add("--lut", type=Path, metavar="F.csv", help="a table that measure wrote, on this machine")
    bits = "bits to draw from (default: all that the table has)"
    add("--bits", type=_bits_or_none, nargs="+", default=None, metavar="B", help=bits)
    add("--architectures", type=integer(3), default=20, metavar="N", help="how many networks are drawn")
    add("--seed", type=integer(0), default=0, metavar="N", help="names the draw")
    add("--out", type=Path, metavar="F.csv", help="also write predicted and measured times there")
    add("--json", action=Switch, default=False, help="one JSON object")
    _add_space(parser)
    _add_timing(parser)
    return parser


def _bits_or_none(text: str) -> int:
    return 32 if text.lower() == "none" else one_of(*_BITS)(text)


def _add_space(parser: Parser) -> None:
    from common.data import SHAPES

    add, ends = parser.group("search space").add_argument, one_of(*_BITS)
    add("--dataset", "--set", default="cifar10", metavar="NAME", help=f"sizes of {', '.join(SHAPES)}")
    add("--image-size", type=integer(8), metavar="N", help="pixels (default: the data set's)")
    add("--in-channels", type=integer(1), metavar="N", help="channels of the images (default: the data set's)")
    add("--classes", type=integer(2), metavar="N", help="classes (default: the data set's)")
    stem = "stem (default: cifar below 128 pixels)"
    add("--stem", type=choice("auto", "cifar", "imagenet"), default="auto", metavar="auto|cifar|imagenet", help=stem)
    add("--init-channels", type=integer(1), default=36, metavar="N", help="the search's --eval-init-channels")
    add("--layers", type=integer(1), default=20, metavar="N", help="the search's --eval-layers")
    add("--nodes", type=integer(1), default=4, metavar="N", help="nodes of a cell")
    add("--multiplier", type=integer(1), default=4, metavar="N", help="how many of them a cell hands on")
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own, as in the search")
    add("--stem-bits", type=ends, default=32, metavar="B", help="bits of the stem")
    add("--classifier-bits", type=ends, default=32, metavar="B", help="bits of the classifier")


def _add_timing(parser: Parser) -> None:
    add = parser.group("timing").add_argument
    add("--threads", type=integer(1), default=1, metavar="N", help="CPU threads (check: those of the table)")
    clock = "cpu: processor time of one thread, on a machine that others use too (check: the table's)"
    add("--clock", type=choice("wall", "cpu"), default="wall", metavar="wall|cpu", help=clock)
    add("--samples", type=integer(2), default=20, metavar="N", help="samples of each time, taken in turns")


def space_of(config: Config, bits: Sequence[int] | None) -> Space:
    """The search space that the flags name. Raises ValueError naming the flag."""
    from common.cost.places import Sizes
    from common.data import SHAPES
    from common.nets.darts_space import check_image_size
    from common.recipes.latency import Space
    from genotypes import PRIMITIVES

    name = config.dataset.lower()
    given = (config.in_channels, config.image_size, config.classes)
    if name not in SHAPES and None in given:
        raise ValueError(f"--dataset {name}: its sizes are not known; give --image-size, --in-channels and --classes")
    channels, size, classes = (a or b for a, b in zip(given, SHAPES.get(name, given), strict=True))
    stem = ("imagenet" if size >= 128 else "cifar") if config.stem == "auto" else config.stem
    check_image_size(size, stem)
    if config.multiplier > config.nodes:
        raise ValueError(f"--multiplier: {config.nodes} nodes cannot hand on {config.multiplier}; give at most --nodes")
    if bits is not None and len(set(bits)) != len(bits):
        raise ValueError(f"--bits: {' '.join(map(str, bits))} names one twice; give each once")
    primitives = PRIMITIVES
    if config.search_space is not None:
        from common.recipes.own_space import load_search_space

        primitives = load_search_space(config.search_space).primitives
    ends = {"stem_bits": config.stem_bits, "classifier_bits": config.classifier_bits}
    sizes = Sizes(stem, channels, classes, config.init_channels, config.layers, size, **ends)
    searched = None if bits is None or list(bits) == [32] else tuple(bits)
    return Space(sizes, searched, primitives, config.nodes, config.multiplier)


def measure_table(config: Config) -> None:
    """Measure, write the table, and say whether latency can choose among the bits."""
    import torch

    from common.engine.files import write_bytes
    from common.recipes import latency

    if config.out is None:
        raise ValueError("--out: missing; name the table's file")
    if config.out.exists():
        raise ValueError(f"--out {config.out}: is there already, and nothing is overwritten; name another file")
    if config.clock == "cpu" and config.threads != 1:
        raise ValueError("--clock cpu: adds up all threads; give --threads 1, or --clock wall")
    space = space_of(config, config.bits)
    torch.set_num_threads(config.threads)
    table = latency.measure(
        space,
        latency.BACKENDS[config.backend],
        batch=config.batch,
        rounds=config.samples,
        least_seconds=1e-3 * config.least_ms,
        convolutions=config.convolutions,
        clock=config.clock,
        say=lambda text: print(text, file=sys.stderr),
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(config.out, table.to_csv().encode())
    print(f"{config.out}: {len(table.rows)} rows, {table.conditions}")
    if space.bits is not None and len(space.bits) > 1:
        from common.cost.expected import bit_pairs

        print(table.bits_text(bit_pairs(space.bits)))


def check_table(config: Config) -> None:
    """Compare, print the figures and write the rows."""
    import torch

    from common.engine.files import write_bytes
    from common.recipes import latency
    from common.recipes.latency_file import load_table
    from common.recipes.timing import CLOCKS

    if config.lut is None:
        raise ValueError("--lut: missing; name a table that measure wrote")
    table = load_table(config.lut)
    bits = config.bits or sorted({weight for place, (weight, _) in table.rows if place.operation == "preprocess"})
    space = space_of(config, bits)
    for name in ("threads", "clock"):
        theirs = getattr(table.conditions, name)
        if config.explicit(name) and getattr(config, name) != theirs:
            raise ValueError(f"--{name}: the table was measured with {theirs}; leave --{name} out")
    if table.conditions.clock not in CLOCKS:
        raise ValueError(f"{table.name}: its clock {table.conditions.clock} is not one of {', '.join(CLOCKS)}")
    torch.set_num_threads(table.conditions.threads)
    backend = latency.BACKENDS.get(table.conditions.backend)
    if backend is None:
        raise ValueError(f"{table.name}: its backend {table.conditions.backend} is not one of {', '.join(BACKENDS)}")
    here = latency.conditions(backend, table.conditions.batch, table.conditions.clock)
    if here != table.conditions:
        print(f"note: measured here with {here}; the table with {table.conditions}", file=sys.stderr)
    found = latency.check(
        table, space, backend, count=config.architectures, seed=config.seed, rounds=config.samples
    ) | {"lut": str(config.lut), "conditions": str(here)}
    print(json.dumps(found, indent=2) if config.json else as_text(found))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(config.out, as_csv(found).encode())


def as_text(found: dict[str, Any]) -> str:
    """The rows as Markdown, and how they agree."""
    lines = ["| architecture | predicted, ms | measured, ms | error |", "| ---: | ---: | ---: | ---: |"]
    for row in found["rows"]:
        p, m = row["predicted_ms"], row["measured_ms"]
        lines.append(f"| {row['architecture']} | {p:.3f} | {m:.3f} | {p / m - 1:+.1%} |")
    rho = found["spearman"]
    order = (
        "no order: one side has the same time throughout"
        if rho is None
        else f"Spearman's rho {rho:+.3f} (permutation p = {found['spearman_p']:.4f})"
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{found['conditions']}, {found['architectures']} architectures of seed {found['seed']}: mean absolute "
            f"percentage error {found['mape']:.1%}, {order}; with predictions scaled by {found['scale']:.3f}: "
            f"{found['mape_scaled']:.1%}",
        ]
    )


def as_csv(found: dict[str, Any]) -> str:
    """A line an architecture."""
    rows = [f"{row['architecture']},{row['predicted_ms']:.6g},{row['measured_ms']:.6g}" for row in found["rows"]]
    return "\n".join(["architecture,predicted_ms,measured_ms", *rows, ""])


COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Config], None]]] = {
    "measure": (measure_parser, measure_table),
    "check": (check_parser, check_table),
}


def main(argv: Sequence[str]) -> int:
    """`latency measure` and `latency check`; the exit code."""
    command, *rest = argv or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        print(f"{PROG}: {command!r} is not one of {', '.join(COMMANDS)}; --help shows them", file=sys.stderr)
        return 2
    make_parser, work = COMMANDS[command]
    config = make_parser().parse_args(rest)
    return run_program(lambda: work(config), f"{PROG} {command}", config)
