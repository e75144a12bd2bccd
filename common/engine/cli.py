# SPDX-License-Identifier: Apache-2.0
"""The flags that programs share: one spelling, one default, one help text each, in seven groups.

`add_data_flags(parser, stage)` and its sisters add a group for stage "search" or "train"; `derive_*` and `check_*` are
the rules across flags that go to `resolve`. The papers' spellings (`--cd`, `--allow8bit`, `--unrolled=True`,
`--epochs_no_archopt`) are aliases. The parser itself is `common.engine.parsing`, whose names are handed on here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.engine.parsing import (
    Config,
    Parser,
    Switch,
    Translation,
    bitops,
    boolean,
    choice,
    integer,
    number,
    one_of,
    print_config,
    resolve,
)

__all__ = [
    "FIXED_BITS",
    "Config",
    "Parser",
    "Switch",
    "Translation",
    "add_bit_search_flags",
    "add_data_flags",
    "add_model_flags",
    "add_optimization_flags",
    "add_quantization_flags",
    "add_run_argument",
    "add_run_flags",
    "add_search_flags",
    "add_train_flags",
    "bitops",
    "boolean",
    "check_bits",
    "check_run",
    "check_search",
    "check_target",
    "check_train",
    "choice",
    "cost_of",
    "derive_search",
    "derive_train",
    "integer",
    "number",
    "one_of",
    "print_config",
    "resolve",
    "target_of",
]

FIXED_BITS = (1, 2, 3, 4, 8, 32)
Kind = Callable[[str], Any]


class _Group:
    """A help group; its three methods write a flag in one line: names, kind, default, metavar, help."""

    def __init__(self, parser: Parser, title: str) -> None:
        self.group = parser.group(title)

    def value(self, names: str, kind: Kind, default: Any, metavar: str, help: str, **more: Any) -> None:
        self.group.add_argument(*names.split(), type=kind, default=default, metavar=metavar, help=help, **more)

    def choice(self, names: str, options: str, default: str | None, help: str) -> None:
        kind = choice(*options.split("|"))
        self.group.add_argument(*names.split(), type=kind, default=default, metavar=options, help=help)

    def switch(self, names: str, default: bool, help: str) -> None:
        self.group.add_argument(*names.split(), action=Switch, default=default, help=help)


def add_data_flags(parser: Parser, stage: str) -> None:
    """Which images, how they are augmented, how the training set is divided."""
    add = _Group(parser, "data")
    add.value("--dataset --set", str, "cifar10", "NAME", "digits, mnist, cifar10, cifar100, folder or imagenet")
    add.value("--data --data-dir", Path, None, "DIR", "where the data lie, or are downloaded to")
    add.value("--data-module", str, None, "FILE.py:FUNCTION", "data of your own: a function that gives an ImageData")
    for name, part in (("--trainfile", "training"), ("--valfile", "validation")):
        add.value(name, Path, None, "X.ffcv", f"ImageNet's {part} images in an FFCV file, in place of --data")
    parser.fix(reading=None)
    add.value("--image-size", integer(4), None, "N", "resize to N x N pixels (default: the data set's own size)")
    add.value("--classes", integer(2), None, "N", "only the images of the first N classes (default: of all)")
    readers = "threads that decode ImageNet (default: one a core); data in memory need none"
    add.value("--workers -j --num-workers", integer(0), 2, "N", readers)
    add.switch("--cutout", False, "cut a square out of every training image")
    add.value("--cutout-length", integer(1), 16, "N", "side of that square in pixels")
    workers = "False: the same as --workers 0"
    to_workers = lambda on: {} if on else {"workers": 0}  # noqa: E731
    add.group.add_argument("--use-multiprocess", action=Translation, switch=True, to=to_workers, help=workers)
    if stage == "search":
        portion = "share of the training set that trains the weights; the rest trains the architecture"
        add.value("--train-portion", number(0.01, 0.99), 0.5, "F", portion)
        add.value("--subset", number(0.01, 1), 1.0, "F", "share of the training set that the search sees, seeded")
        parts = "two shares of each class in place of those two flags: for the weights, for the architecture"
        add.value("--search-fraction", number(0, 1, positive=True), None, "F", parts, nargs="+")
    else:
        add.choice("--select", "last|val", "last", "test the last epoch's weights, or the best on a held-out part")
        held_out = "share of the training set that is held out (default: .1 with --select val, else 0)"
        add.value("--val-fraction", number(0, 0.9), None, "F", held_out)


def add_model_flags(parser: Parser, stage: str) -> None:
    """Sizes of the network; in training, the architecture."""
    add, search = _Group(parser, "model"), _is_search(stage)
    add.value("--init-channels", integer(1), 16 if search else 36, "N", "channels of the first cell")
    add.value("--layers", integer(1), 8 if search else 20, "N", "number of cells")
    add.choice("--stem", "auto|cifar|imagenet", "auto", "auto: cifar below 128 pixels")
    own = "operations of your own, and which to search among (docs/own-operation.md)"
    add.value("--search-space", Path, None, "FILE.py", own)
    parser.fix(search_space_digest=None)
    if search:
        add.choice("--method", "darts|pc-darts", "pc-darts", "full channels, or partial channels with edge weights")
        add.value("--partial", integer(1), 4, "K", "pc-darts: 1/K of the channels pass the candidate operations")
        add.value("--nodes", integer(1), 4, "N", "intermediate nodes of a cell")
        add.value("--multiplier", integer(1), 4, "N", "how many of the last nodes a cell hands on")
        add.value("--eval-init-channels", integer(1), 36, "N", "channels of the network to be trained: its cost counts")
        add.value("--eval-layers", integer(1), 20, "N", "cells of the network to be trained")
    else:
        add.value("--arch", str, "PC_DARTS", "NAME|FILE|RUN", "a named genotype, an architecture.json, or a search run")


def add_quantization_flags(parser: Parser, stage: str) -> None:
    """Bit-widths and quantisers."""
    add, bits = _Group(parser, "quantisation"), one_of(*FIXED_BITS)
    if _is_search(stage):
        add.value("--bits", _bits_or_none, [2, 4], "B", "bit-widths to choose among; none: full precision", nargs="+")
        to_bits = lambda on: {"bits": [2, 4, 8] if on else [2, 4]}  # noqa: E731
        same = "the same as --bits 2 4 8"
        add.group.add_argument("--allow8bit", action=Translation, switch=True, to=to_bits, help=same)
    else:
        add.value(
            "--wbits", bits, None, "B", "uniform weight bits in place of the architecture's own (32: full precision)"
        )
        add.value("--abits", bits, None, "B", "uniform activation bits")
        both, same = lambda value: {"wbits": value, "abits": value}, "the same as --wbits B --abits B"
        add.group.add_argument("--fixed-bit", action=Translation, to=both, type=bits, metavar="B", help=same)
        add.value("--weights-path", Path, None, "FILE", "bits from a NablaQDARTS gamma_checkpoint.t7")
        parser.ignore("the number of bit-widths is read from the architecture", "--allow8bit")
    add.choice("--weight-quantizer", "gaussian|lsq", "gaussian", "of 1-4 bits (lsq: fixed bits only)")
    add.choice("--activation-quantizer", "hwgq|lsq", "hwgq", "of 1-4 bits (lsq: fixed bits only)")
    add.choice("--scheme", "default|reference", "default", "8 bits: ours (integers can run it), or the reference's")
    add.switch("--signed-activations", False, "no ReLU before activation quantisers")
    add.value("--stem-bits", bits, 32, "B", "bits of the stem")
    add.value("--classifier-bits", bits, 32, "B", "bits of the classifier")
    mapping = "how the searched cells' bits spread over more cells" + (
        "" if _is_search(stage) else " (default: as the architecture says)"
    )
    add.choice("--bit-mapping", "relative|paper", "relative" if _is_search(stage) else None, mapping)


def _bits_or_none(text: str) -> int:
    """One bit-width under search; `none` is the same as 32."""
    return 32 if text.lower() == "none" else one_of(*FIXED_BITS)(text)


_bits_or_none.kind = "int"  # type: ignore[attr-defined]


def add_search_flags(parser: Parser, *, bits: bool = True) -> None:
    """The bilevel search: architecture logits, bit logits (`bits`; without them no cost presses either), cost."""
    add = _Group(parser, "search")
    add.value("--arch-learning-rate --arch-lr", number(0), 6e-4, "LR", "of alphas and betas (Adam)")
    add.value("--arch-weight-decay --arch-wd", number(0), 1e-3, "WD", "of alphas and betas")
    warmup = "first epochs that leave alphas and betas alone"
    add.value("--warmup-epochs --epochs-no-archopt --begin", integer(0), 15, "N", warmup)
    add.value("--arch-every", integer(1), 1, "N", "one architecture step in N weight steps, after the warm-up")
    add.switch("--unrolled", False, "second-order architecture gradients")
    add.choice("--second-order", "exact|finite-difference", "exact", "how --unrolled differentiates")
    if bits:
        _add_bit_logits(add)
        add.choice("--gamma-level", "lower|upper", "lower", "bit logits move with the weights, or with the alphas")
    add.value("--init-from", Path, None, "RUN", "start from the weights of an earlier search (not its choices)")
    add = _Group(parser, "cost")
    _add_cost(add, "in the weight step; steers the bits" if bits else "", 1e-4 if bits else 0.0)
    arch = (
        "weight of the cost in the architecture step (default: a tenth of --complexity-decay; 0 with uniform weighting)"
    )
    add.value("--arch-complexity-decay", number(0), None, "X", arch)
    weighting = "expected cost of the network to be trained, or the reference's sum over all candidates"
    add.choice("--cost-weighting", "expected|uniform", "expected", weighting)


def add_bit_search_flags(parser: Parser) -> None:
    """The search of bits alone, for a fixed network: bit logits, cost."""
    add = _Group(parser, "search")
    _add_bit_logits(add)
    add.value("--init-from", Path, None, "RUN", "start from the weights of a trained run")
    _add_cost(_Group(parser, "cost"), "in the loss", 0.0)


def _add_bit_logits(add: _Group) -> None:
    add.value("--gamma-learning-rate --q-lr --lra", number(0), 0.01, "LR", "of the bit logits (SGD)")
    add.value("--gamma-weight-decay --q-wd", number(0), 1e-3, "WD", "of the bit logits")


def _add_cost(add: _Group, where: str, decay: float) -> None:
    add.value("--complexity-decay --cd", number(0), decay, "X", f"weight of the cost {where}".rstrip())
    measured = "what steers: BitOps, MACs, bytes of weights, or measured milliseconds (default: bitops)"
    add.choice("--cost", "bitops|macs|memory|latency", None, measured)
    add.value("--lut", Path, None, "F.csv", "table for --cost latency (python -m common.cost latency measure)")
    add.value("--target-bitops", bitops, None, "G", "BitOps to hit within 10%%, such as 2.2e9, 2.2G or 350M")
    add.value("--target", number(positive=True), None, "X", "the same in the unit of --cost: BitOps, MACs, bytes, ms")
    add.choice("--cost-accounting", "exact|paper", "exact", "each layer at its true size, or the reference's count")


def add_train_flags(parser: Parser) -> None:
    """What only the training of a found network has."""
    add = _Group(parser, "training")
    add.switch("--auxiliary", False, "auxiliary classifier during training")
    add.value("--auxiliary-weight", number(0), 0.4, "W", "weight of its loss")
    add.value("--drop-path-prob", number(0, 0.99), 0.3, "P", "drop path, growing linearly from 0 to P")
    add.value("--label-smoothing --label-smooth", number(0, 0.99), 0.0, "E", "of the training loss")
    add.value("--init-from", Path, None, "RUN", "start from the weights of a trained run")
    add.value("--teacher", Path, None, "RUN", "distil from a trained run")
    matching = "channels such that quantised layers cost at most 1/F of the reference in full precision (bare: F = 18)"
    add.value("--match-bitops", number(positive=True), None, "F", matching, nargs="?", const=18.0)
    of = "cells of that reference, at --init-channels and --layers"
    add.value("--match-reference", str, "PC_DARTS", "NAME|FILE|RUN", of)
    add.value("--teacher-weight", number(0, 1), 0.5, "W", "share of the distillation loss")
    temperature = "temperature of both softmaxes in it"
    add.value("--teacher-temperature --temperature", number(positive=True), 4.0, "T", temperature)


def add_optimization_flags(parser: Parser, stage: str) -> None:
    """Epochs, batches and the weights' optimiser."""
    add, search = _Group(parser, "optimisation"), _is_search(stage)
    add.value("--epochs", integer(1), 50 if search else 600, "N", "epochs")
    add.value("--steps-per-epoch", integer(1), None, "N", "at most N steps an epoch (default: all of the data)")
    add.value("--batch-size -b", integer(1), 256 if search else 96, "N", "images a step")
    add.value(
        "--learning-rate --lr", number(positive=True), 0.1 if search else 0.025, "LR", "of the weights, at the start"
    )
    add.value("--learning-rate-min --lr-min", number(0), 0.0, "LR", "where the schedule ends; no epoch trains at 0")
    if not search:
        add.choice("--lr-schedule", "cosine|linear|step", "cosine", "learning rate by epoch")
        add.value("--lr-step-epochs --step-epoch", integer(1), 30, "N", "step schedule: epochs between two drops")
        add.value(
            "--lr-step-factor --decay-rate",
            number(maximum=1, positive=True),
            0.1,
            "F",
            "step schedule: factor of a drop",
        )
    add.value("--lr-warmup-epochs", integer(0), 0, "N", "first epochs, in which the learning rate rises linearly")
    add.value("--momentum", number(0, 0.9999), 0.9, "M", "of SGD")
    add.value("--weight-decay --wd", number(0), 3e-4, "WD", "of the weights")
    add.value("--grad-clip", number(positive=True), 5.0, "C", "largest global gradient norm of the weights")


def add_run_flags(parser: Parser, stage: str) -> None:
    """Where, how and how reproducibly the run happens."""
    add = _Group(parser, "run")
    add.value("--seed", integer(0), 2 if _is_search(stage) else 0, "N", "seed of everything random")
    add.switch("--deterministic", False, "only deterministic algorithms (slower on a GPU)")
    add.choice("--device", "auto|cpu|cuda", "auto", "auto: a GPU where there is one")
    add.switch("--use-data-parallel", False, "several GPUs; torchrun starts the processes, and is asked for otherwise")
    sharing = "batch normalisation and 8-bit ranges by the batches of all processes (default: each by its own)"
    add.switch("--sync-bn", False, sharing)
    add.switch("--batch-per-rank", False, "--batch-size counts the images of each process (default: of all together)")
    add.value("--grad-accumulation", integer(1), 1, "N", "a step averages the gradients of N parts of its batch")
    add.choice("--precision", "fp32|bf16", "fp32", "bf16: autocast")
    add.switch("--compile", False, "torch.compile the network")
    if _is_search(stage):
        graph = "capture a step as a CUDA graph (first order, one GPU); auto: where that works"
        add.choice("--cuda-graph", "off|auto|on", "off", graph)
    dense = "keep images along dense channels, faster for depthwise convolutions (--no-channels-last: along rows)"
    add.switch("--channels-last", True, dense)
    again = "compute each cell again in the backward pass: less memory, a third more time"
    add.switch("--checkpoint-cells", False, again)
    add.value("--threads", integer(1), None, "N", "CPU threads of torch (default: torch's choice)")
    add.value("--save", Path, None, "DIR", "the run's folder (default: a new one under --runs)")
    add.value("--runs", Path, Path("runs"), "DIR", "where new run folders are made")
    resume = "go on: auto finds the run of the same configuration"
    add.value("--resume", str, None, "auto|PATH", resume, nargs="?", const="auto")
    change = "go on although flags have changed, and say what is no longer exact (docs/resume.md)"
    add.switch("--allow-config-change", False, change)
    add.value("--preset", str, None, "NAME", "a set of defaults; --list-presets shows them")
    add.group.add_argument("--list-presets", action="store_true", help="show the presets and exit")
    add.value("--config", str, None, "FILE.json", "flags from a file; explicit flags win")
    add.group.add_argument("--print-config", action="store_true", help="show every value and its source, and exit")
    add.group.add_argument(
        "--dry-run", action="store_true", help="build all, run one step, show parameters, cost, memory, time, and exit"
    )
    add.value("--log-every --report-freq --log-freq", integer(1), 50, "N", "steps between log rows")
    minutes = "time between checkpoints within an epoch; every epoch ends with one"
    add.value("--checkpoint-minutes", number(positive=True), 10.0, "M", minutes)
    add.switch("--tensorboard", True, "write TensorBoard events (--no-tensorboard: do not)")
    add.switch("--plots", True, "draw curves and choices, for the run folder and TensorBoard (--no-plots: do not)")
    parser.ignore("--device chooses", "--gpu", "--use-gpu")
    parser.ignore("the run's folder is set by --save", "--model-path", "--model-save-dir")
    parser.ignore("it is taken from the data", "--trainset-num", "--class-num", "--num-classes")
    parser.ignore("nothing reads it, as in the reference", "--q-start", "--note", "--tmp-data-dir", "--dropout")
    if _is_search(stage):
        parser.ignore("a search drops no paths, as in the reference", "--drop-path-prob")


def add_run_argument(parser: Parser, *, help: str = "a run's folder") -> None:
    """A tool's positional RUN, with `--run` as an alias; both land in `.run` (Path or None)."""
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help=help)
    parser.add_argument("--run", type=Path, dest="run", metavar="RUN", help="the same as the positional RUN")


def _is_search(stage: str) -> bool:
    assert stage in ("search", "train"), stage
    return stage == "search"


# ------------------------------------------------------------------------------------------------- rules across flags


def derive_search(config: Config) -> dict[str, Any]:
    """The architecture step's cost weight (design.md 6.3), and what cells of fewer nodes hand on, where not given."""
    found = config.open_among({"multiplier": config.nodes}) if config.nodes < config.multiplier else {}
    if config.arch_complexity_decay is not None:
        return found
    tenth = float(f"{config.complexity_decay / 10:.12g}")
    return found | {"arch_complexity_decay": 0.0 if config.cost_weighting == "uniform" else tenth}


def derive_train(config: Config) -> dict[str, Any]:
    """The held-out share, where it was not given."""
    return {} if config.val_fraction is not None else {"val_fraction": 0.1 if config.select == "val" else 0.0}


def check_run(config: Config) -> list[str]:
    """Rules that both stages share; messages name the flag, the reason, the cure."""
    errors = []
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            errors.append("--device: cuda was asked for, but torch sees no GPU; use --device cpu, or see doctor.py")
    errors += _check_computing(config) + _check_sharing(config)
    if getattr(config, "cuda_graph", "off") == "on":
        errors += _check_graph(config)
    for dest in ("stem_bits", "classifier_bits"):
        if getattr(config, dest) == 1:
            errors.append(f"{_flag(dest)}: 1 bit leaves a signed input no level but zero; use 2-4, 8 or 32")
    if config.compile and config.checkpoint_cells:
        errors.append("--checkpoint-cells: with --compile the compiler chooses what is kept; drop one of the two")
    if config.learning_rate_min > config.learning_rate:
        errors.append(
            f"--learning-rate-min: {config.learning_rate_min} is above --learning-rate {config.learning_rate}; lower it"
        )
    if config.lr_warmup_epochs and config.lr_warmup_epochs >= config.epochs:
        errors.append(f"--lr-warmup-epochs: leaves none of the {config.epochs} epochs; give fewer")
    if config.allow_config_change and config.resume is None:
        errors.append("--allow-config-change: only has a meaning with --resume; add it or drop this")
    if config.data_module and ":" not in config.data_module:
        errors.append(f"--data-module: {config.data_module!r} names no function; write FILE.py:FUNCTION")
    for flag, path in (("--data", config.data), ("--save", config.save), ("--runs", config.runs)):
        if path is not None and path.is_file():
            errors.append(f"{flag}: {path} is a file; give a folder")
    return errors


def _check_computing(config: Config) -> list[str]:
    """Whether this machine can compute as --compile and --precision ask."""
    if not config.compile and config.precision == "fp32":
        return []
    import torch

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    errors, compiler = [], os.environ.get("CXX", "g++")
    if config.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        errors.append("--precision: this GPU has no bf16 (it takes compute capability 8.0); use fp32")
    if config.compile and on_gpu and importlib.util.find_spec("triton") is None:
        errors.append("--compile: needs Triton on a GPU; pip install triton, or leave --compile out")
    if config.compile and not on_gpu and shutil.which(compiler) is None:
        errors.append(f"--compile: needs a C++ compiler on the CPU, and there is no {compiler}; install it or set CXX")
    return errors


def _check_sharing(config: Config) -> list[str]:
    """Whether the batch can be shared out among processes and parts of a step."""
    errors, ranks = [], int(os.environ.get("WORLD_SIZE", "1"))
    parts = config.grad_accumulation * (1 if config.batch_per_rank else ranks)
    if config.batch_size % parts and not getattr(config, "plan", False):  # which asks for other ranks
        least = max(1, config.batch_size // parts) * parts
        among = (
            f"{config.grad_accumulation} parts"
            if config.batch_per_rank
            else (
                f"{ranks} processes" + (f" of {config.grad_accumulation} parts each" * (config.grad_accumulation > 1))
            )
        )
        errors.append(
            f"--batch-size: {config.batch_size} images cannot be shared out equally among {among}; give {least}"
        )
    if config.sync_bn and config.compile and ranks > 1:
        errors.append("--sync-bn: processes cannot meet within compiled code; drop it, or --compile")
    return errors


def _check_graph(config: Config) -> list[str]:
    import torch

    from common.engine.static_step import obstacle

    reason = obstacle(
        device="cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu",
        order=config.second_order if getattr(config, "unrolled", False) else "first",
        compiled=config.compile,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )
    return [] if reason is None else [f"--cuda-graph on: {reason}, or leave it out"]


def check_bits(config: Config) -> list[str]:
    """Rules across the flags of bits under search."""
    errors = []
    if config.bits and len(set(config.bits)) != len(config.bits):
        errors.append(f"--bits: {' '.join(map(str, config.bits))} names one twice; give each once")
    for dest in ("weight_quantizer", "activation_quantizer"):
        if getattr(config, dest) == "lsq":
            errors.append(
                f"{_flag(dest)}: lsq learns one step for one bit-width, so a search cannot mix it; train with it"
            )
    return errors


def check_target(config: Config) -> list[str]:
    """A target steers the weights of the cost, so there must be one."""
    errors, flag = [], "--target" if config.target is not None else "--target-bitops"
    if target_of(config) and not (config.complexity_decay or getattr(config, "arch_complexity_decay", None)):
        errors.append(f"{flag}: needs a cost weight to adapt; give --complexity-decay above 0")
    if config.target is not None and config.target_bitops is not None:
        errors.append("--target: is in the unit of --cost, and so is --target-bitops in BitOps; drop one of the two")
    return errors + _check_measure(config)


def cost_of(config: Config) -> str:
    """What steers a search; bitops where nothing else was said, as in runs from before there was a choice."""
    return getattr(config, "cost", None) or "bitops"


def target_of(config: Config) -> float | None:
    """What a search is to cost, in the unit of --cost."""
    return config.target_bitops if getattr(config, "target", None) is None else config.target


def _check_measure(config: Config) -> list[str]:
    """Whether the flags of the cost mean something for what is measured."""
    cost, errors = cost_of(config), []
    if cost != "bitops":
        if config.target_bitops is not None:
            errors.append(f"--target-bitops: --cost {cost} is not counted in BitOps; give --target in its own unit")
        if config.cost_accounting == "paper":
            errors.append(f"--cost-accounting paper: counts BitOps, and --cost is {cost}; drop one of the two")
        if getattr(config, "cost_weighting", "expected") == "uniform":
            errors.append(f"--cost-weighting uniform: counts BitOps, and --cost is {cost}; drop one of the two")
    if cost == "latency" and config.lut is None:
        errors.append("--cost latency: needs a table; give --lut F.csv (python -m common.cost latency measure)")
    if cost != "latency" and config.lut is not None:
        errors.append("--lut: only has a meaning with --cost latency; add it or drop this")
    return errors


def check_search(config: Config) -> list[str]:
    """Rules across the flags of a search."""
    errors = check_run(config) + check_bits(config) + check_target(config)
    if config.method == "pc-darts" and config.init_channels % config.partial:
        errors.append(f"--init-channels: {config.init_channels} is no multiple of --partial {config.partial}; give one")
    if config.multiplier > config.nodes:
        errors.append(f"--multiplier: {config.nodes} nodes cannot hand on {config.multiplier}; give at most --nodes")
    if config.warmup_epochs >= config.epochs:
        errors.append(
            f"--warmup-epochs: {config.warmup_epochs} leaves none of the {config.epochs} epochs to the architecture; "
            "give fewer, such as --warmup-epochs 0"
        )
    if config.init_from is not None and not config.init_from.is_dir():
        errors.append(f"--init-from: {config.init_from} is no folder; give the folder of a search")
    if config.explicit("second_order") and not config.unrolled:
        errors.append("--second-order: only has a meaning with --unrolled; add it")
    if config.unrolled and config.second_order == "exact":
        if config.compile:
            errors.append("--compile: compiled code is not differentiated twice; add --second-order finite-difference")
        if config.checkpoint_cells:
            errors.append(
                "--checkpoint-cells: the exact second order changes the weights between a cell and its second "
                "computation; add --second-order finite-difference"
            )
    if config.gamma_level == "upper" and config.explicit("gamma_learning_rate"):
        errors.append(
            "--gamma-learning-rate: with --gamma-level upper the bits move by --arch-learning-rate; drop one of the two"
        )
    if config.method == "darts" and config.explicit("partial"):
        errors.append("--partial: --method darts sends all channels through the operations; drop one of the two")
    if config.cost_weighting == "uniform" and config.arch_complexity_decay:
        errors.append("--arch-complexity-decay: the uniform weighting does not see the alphas; give 0, or expected")
    return errors


def check_train(config: Config) -> list[str]:
    """Rules across the flags of a training."""
    errors = check_run(config)
    if (config.wbits is None) != (config.abits is None):
        given, missing = ("--wbits", "--abits") if config.abits is None else ("--abits", "--wbits")
        errors.append(f"{given}: alone leaves the other open; give {missing} too (32: full precision)")
    if config.wbits is not None and config.weights_path is not None:
        errors.append("--weights-path: gives bits, and so do --wbits/--abits; drop one")
    for dest, bits in (("weight_quantizer", config.wbits), ("activation_quantizer", config.abits)):
        if getattr(config, dest) == "lsq" and bits == 1:
            errors.append(f"{_flag(dest)}: lsq has no 1-bit form; use 2-4 or 8 bits, or the default quantiser")
    if config.select == "val" and not config.val_fraction:
        errors.append("--val-fraction: --select val needs a held-out part; give a share above 0")
    for dest in ("teacher_weight", "teacher_temperature"):
        if config.explicit(dest) and config.teacher is None:
            errors.append(f"{_flag(dest)}: only has a meaning with --teacher RUN; add it or drop this")
    if config.explicit("match_reference") and config.match_bitops is None:
        errors.append("--match-reference: only has a meaning with --match-bitops F; add it or drop this")
    for dest in ("init_from", "teacher"):
        path = getattr(config, dest)
        if path is not None and not path.is_dir():
            errors.append(f"{_flag(dest)}: {path} is no folder; give the folder of a finished training run")
    if config.weights_path is not None and not config.weights_path.is_file():
        errors.append(f"--weights-path: {config.weights_path} does not exist; give a gamma_checkpoint.t7")
    return errors


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")
