# SPDX-License-Identifier: Apache-2.0
"""`python -m common.cost TARGET`: what the network of a genotype's name, an architecture file or a run costs.

TARGET may also be the integers of both micro cells. `python -m common.cost latency --help`: tables of latencies.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cost.counting import Cost, network_cost
from common.data import SHAPES, canonical_name
from common.engine import read_json
from common.engine.parsing import Config, Parser, Switch, choice, integer, one_of
from common.nets import DARTS, SPACES, Architecture, build_network, load_architecture, network_of
from common.nets.enas_layers import types_fit
from common.quant import SUPPORTED_BITS, fold_normalization
from common.recipes import latency_commands
from common.recipes.flags import run_program

_LARGEST = {"layers": 1000, "init_channels": 10_000, "out_filters": 10_000, "image_size": 4096} | {
    **{"in_channels": 10_000, "num_classes": 1_000_000, "stem_bits": 32, "classifier_bits": 32},
    **{"eval_layers": 1000, "eval_init_channels": 10_000, "eval_out_filters": 10_000},
}
"""What a run's files may say of its network at most: a file of a few bytes could ask for any size."""
_PAPER_SIZES = {"cifar": (36, 20), "imagenet": (48, 14)}


def make_parser() -> Parser:
    """The flags of `python -m common.cost`."""
    parser = Parser(prog="python -m common.cost", description=__doc__)
    add, bits = parser.add_argument, one_of(*SUPPORTED_BITS)
    add("target", nargs="?", metavar="TARGET", help="a genotype's name, an architecture.json, or a run's folder")
    add("--arch", metavar="TARGET", help="the same as the positional TARGET")
    add(
        "--dataset", "--set", default=None, metavar="NAME", help=f"{', '.join(SHAPES)} (default: the run's, or cifar10)"
    )
    add("--image-size", type=integer(4), metavar="N", help="pixels (default: the data set's)")
    add("--classes", type=integer(1), metavar="N", help="classes (default: the data set's)")
    add(
        "--init-channels",
        type=integer(1),
        metavar="N",
        help="channels of the first cell (default: the run's, or the papers')",
    )
    add("--layers", type=integer(1), metavar="N", help="cells (default: the run's, or the papers')")
    add("--space", type=choice(*SPACES), metavar="|".join(SPACES), help="the search space (default: TARGET's own)")
    add("--out-filters", type=integer(1), metavar="F", help="enas-micro: channels of the first cell (default: 16)")
    add("--in-channels", type=integer(1), metavar="N", help="channels of the images (default: the data set's)")
    types = "enas-micro: one type for all layers, or the stem's and each cell's (default: the run's, or the source's)"
    add("--layer-bits", nargs="+", metavar="TYPE", help=types)
    add("--wbits", type=bits, metavar="B", help="uniform weight bits in place of the architecture's own")
    add("--abits", type=bits, metavar="B", help="uniform activation bits")
    add("--stem-bits", type=bits, default=None, metavar="B", help="bits of the stem (default: the run's, or 32)")
    add(
        "--classifier-bits",
        type=bits,
        default=None,
        metavar="B",
        help="bits of the classifier (default: the run's, or 32)",
    )
    add("--bit-mapping", type=choice("relative", "paper"), metavar="relative|paper", help="as in train.py")
    add("--search-space", type=Path, metavar="FILE.py", help="operations of your own that the network holds")
    add("--json", action=Switch, default=False, help="one JSON object")
    add("--per-layer", action=Switch, default=False, help="a row for every layer too")
    return parser


def _run_flags(target: str) -> dict[str, Any]:
    """The flags of a run that decide its network's size, by train.py's names; {} where TARGET is no run."""
    file = Path(target) / "config.json"
    if not file.is_file():
        return {}
    record = read_json(file)
    flags = record.get("config") if isinstance(record, dict) else None
    if not isinstance(flags, dict):
        raise ValueError(f"TARGET {target}: its config.json is not a run's")
    if record.get("stage") == "search":  # a search stands for the network that it is searched for
        flags = {**flags, "init_channels": flags.get("eval_init_channels"), "layers": flags.get("eval_layers")}
        flags |= {"out_filters": flags.get("eval_out_filters")}
        _check_sizes(flags, target)
        types = flags.get("layer_bits")
        if types and not types_fit(types, (flags["layers"] or 0) + 2):  # of another depth
            flags |= {"layer_bits": None}
    result = read_json(file.with_name("result.json")) if file.with_name("result.json").is_file() else {}
    if isinstance(result, dict) and isinstance(result.get("network"), dict):  # trained: it says what it was built for
        flags = {**flags, **result["network"], "dataset": result.get("dataset"), "built": True}
    elif flags.get("data_module"):
        raise ValueError(f"TARGET {target}: its data are not the project's own; give a finished training on them")
    return _check_sizes(flags, target)


def _check_sizes(flags: dict[str, Any], target: str) -> dict[str, Any]:
    """The flags of a run, where its files give sizes that a network can have. ValueError names the one that is not."""
    for name, most in _LARGEST.items():
        value = flags.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise ValueError(f"TARGET {target}: its {name} is {str(value)[:40]}; expected a number from 1 to {most:,}")
    types, name = flags.get("layer_bits"), flags.get("dataset")
    if not (types is None or (isinstance(types, list) and all(isinstance(entry, str) for entry in types))):
        raise ValueError(f"TARGET {target}: its layer_bits are {str(types)[:40]}; expected a list of types")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"TARGET {target}: its dataset is {str(name)[:40]}; expected a name")
    missing = [name for name in ("in_channels", "image_size", "num_classes") if flags.get(name) is None]
    if flags.get("built") and missing:
        raise ValueError(f"TARGET {target}: its result.json does not say {missing[0]}")
    return flags


def cost_of(config: Config) -> tuple[Cost, dict[str, Any]]:
    """The cost, and the sizes that it holds for. Raises ValueError naming the flag or file."""
    target = config.target or config.arch
    if not target:
        raise ValueError("TARGET: missing; give a genotype's name, an architecture.json, or a run's folder")
    if (config.wbits is None) != (config.abits is None):
        raise ValueError("--wbits and --abits: give both, or none")
    if config.search_space is not None:
        from common.recipes.own_space import load_search_space

        load_search_space(config.search_space)
    run = _run_flags(target)
    architecture = load_architecture(target)
    if config.space is not None and config.space != architecture.space:
        raise ValueError(f"--space {config.space}: {target} is of the space {architecture.space}; leave --space out")
    images = _images(config, run)
    if architecture.space != DARTS:
        return _micro_cost(config, run, architecture, images)
    for flag in ("out_filters", "layer_bits"):
        if getattr(config, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: means nothing for an architecture of the space {DARTS}")
    known = {name: value for name, value in vars(config).items() if value is not None}
    size = images["image_size"]
    stem = run.get("stem") if run.get("stem") in _PAPER_SIZES else "imagenet" if size >= 128 else "cifar"
    widths = _PAPER_SIZES[stem]
    sizes = {
        "stem": stem,
        "in_channels": images["in_channels"],
        "num_classes": images["num_classes"],
        "init_channels": known.get("init_channels") or run.get("init_channels") or widths[0],
        "layers": known.get("layers") or run.get("layers") or widths[1],
        "stem_bits": known.get("stem_bits") or run.get("stem_bits") or 32,
        "classifier_bits": known.get("classifier_bits") or run.get("classifier_bits") or 32,
    }
    if config.bit_mapping is not None:
        architecture = architecture.with_mapping(config.bit_mapping)
    if config.wbits is not None:
        architecture = architecture.with_uniform_bits(config.wbits, config.abits)
    network = build_network(architecture, **sizes)
    if run.get("folded"):
        fold_normalization(network)
    name = {"target": target, "name": architecture.name, "dataset": images["dataset"], "image_size": size}
    return network_cost(network, size), {**name, **sizes}


def _images(config: Config, run: dict[str, Any]) -> dict[str, Any]:
    """dataset, image_size, in_channels and num_classes: the flags', else the run's, else the data set's."""
    known = {name: value for name, value in vars(config).items() if value is not None}
    name = known.get("dataset") or run.get("dataset") or "cifar10"
    if "dataset" not in known and run.get("built"):
        channels, size, classes = (run[key] for key in ("in_channels", "image_size", "num_classes"))
    else:
        name = name.lower() if name.lower() in SHAPES else canonical_name(name)
        if name not in SHAPES and not {"image_size", "classes"} <= known.keys():
            raise ValueError(f"--dataset {name}: its sizes are not fixed; give --image-size and --classes")
        channels, size, classes = SHAPES.get(name, (3, 0, 0))
    return {
        "dataset": name,
        "image_size": known.get("image_size") or run.get("image_size") or size,
        "in_channels": known.get("in_channels") or channels,
        "num_classes": known.get("classes") or classes,
    }


def _micro_cost(
    config: Config, run: dict[str, Any], architecture: Architecture, images: dict[str, Any]
) -> tuple[Cost, dict[str, Any]]:
    """The cost of a network of micro cells; images are 32 pixels wide unless a flag or the run says otherwise."""
    for flag in ("init_channels", "wbits", "stem_bits", "classifier_bits", "bit_mapping"):
        if getattr(config, flag) is not None:
            cure = {"init_channels": "give --out-filters"}.get(flag, "give --layer-bits")
            raise ValueError(f"--{flag.replace('_', '-')}: networks of {architecture.space} have no such size; {cure}")
    size = config.image_size or run.get("image_size") or 32
    types = config.layer_bits or run.get("layer_bits")
    sizes = {
        "in_channels": images["in_channels"],
        "num_classes": images["num_classes"],
        "out_filters": config.out_filters or run.get("out_filters") or 16,
        "layers": config.layers or run.get("layers") or (6 if images["in_channels"] == 1 else 15),
        "image_size": size,
        "layer_bits": types,
    }
    network = network_of(architecture, **sizes)
    target = {"target": config.target or config.arch, "name": architecture.name, "dataset": images["dataset"]}
    return network_cost(network, size), {**target, **sizes}


def as_text(cost: Cost, sizes: dict[str, Any], per_layer: bool) -> str:
    """The figures as aligned lines."""
    full = cost.weight_bytes_fp32
    rows = [
        ("parameters", f"{cost.parameters:,} ({cost.parameters_with_auxiliary:,} with the auxiliary head)"),
        ("MACs", f"{cost.macs:,} ({cost.macs_quantized:,} in quantised layers)"),
        ("BitOps, exact", f"{cost.bitops / 1e9:,.4f} G"),
        ("BitOps, quantised layers only", f"{cost.bitops_quantized / 1e9:,.4f} G"),
        ("BitOps, paper's accounting", f"{cost.bitops_paper / 1e9:,.4f} G"),
        ("weight memory", f"{cost.weight_bytes / 1e6:,.4f} MB ({full / cost.weight_bytes:.2f}x smaller than fp32)"),
        ("activation memory", f"{cost.activation_bytes / 1e6:,.4f} MB (inputs of all layers, one image)"),
    ]
    alias = f" = {sizes['name']}" if sizes["name"] not in (None, sizes["target"]) else ""
    shape = "F={out_filters}, L={layers}" if "stem" not in sizes else "C={init_channels}, {layers} cells, {stem} stem"
    head = (
        f"{sizes['target']}{alias}: {shape.format(**sizes)}, "
        f"{sizes['in_channels']}x{sizes['image_size']}x{sizes['image_size']} images, {sizes['num_classes']} classes"
    )
    lines = [head, *(f"  {name:<30} {value}" for name, value in rows)]
    if per_layer:
        lines.append(f"  {'layer':<44} {'MACs':>12} {'w':>3} {'a':>3} {'BitOps':>16} {'weight B':>10} {'input B':>10}")
        for r in cost.layers:
            lines.append(
                f"  {r.name:<44} {r.macs:>12,} {r.weight_bits:>3} {r.activation_bits:>3} {r.bitops:>16,} "
                f"{r.weight_bytes:>10,.0f} {r.activation_bytes:>10,.0f}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the cost; exit code 2 with one line for what the user can cure."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["latency"]:
        return latency_commands.main(given[1:])
    config = make_parser().parse_args(given)

    def show() -> None:
        cost, sizes = cost_of(config)
        if config.json:
            print(json.dumps({**sizes, **cost.to_json(config.per_layer)}, indent=2))
        else:
            print(as_text(cost, sizes, config.per_layer))

    return run_program(show, "common.cost")


if __name__ == "__main__":
    sys.exit(main())
