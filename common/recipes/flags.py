# SPDX-License-Identifier: Apache-2.0
"""The command lines of searches and trainings, and the shell around an entry point.

Imports no torch, so that --help is quick.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.engine import cli
from common.engine.cli import Config, Parser
from common.recipes.contents import derive_contents
from common.recipes.imagenet import check_imagenet, derive_imagenet
from common.recipes.presets import Preset, presets_for

Derive = Callable[[Config], dict[str, Any]]
"""A rule that gives values which follow from others (`Config.open_among` keeps it off what somebody set)."""
Check = Callable[[Config], list[str]]
"""A rule across flags; gives messages "--flag: reason; cure"."""


def training_parser(prog: str, description: str) -> Parser:
    """A parser with every flag of a training; a method adds its own, and its own defaults by `set_defaults`."""
    return _parser(prog, description, "train", cli.add_train_flags)


def search_parser(prog: str, description: str) -> Parser:
    """A parser with every flag of a search; a method adds its own, and its own defaults by `set_defaults`."""
    return _parser(prog, description, "search", cli.add_search_flags)


def full_precision_search_parser(prog: str, description: str) -> Parser:
    """A search's parser without bit-widths and quantisers, and so without pressure of the cost unless asked for.

    The defaults are those of PC-DARTS on CIFAR-10 (Xu et al., 2020).
    """
    parser = _parser(prog, description, "search", partial(cli.add_search_flags, bits=False), quantized=False)
    parser.fix(**_FULL_PRECISION)
    return parser


# What a search reads of the flags that `full_precision_search_parser` leaves out.
_FULL_PRECISION: dict[str, Any] = {
    "bits": None,
    "bit_mapping": "relative",
    "scheme": "default",
    "weight_quantizer": "gaussian",
    "activation_quantizer": "hwgq",
    "signed_activations": False,
    "stem_bits": 32,
    "classifier_bits": 32,
    "gamma_learning_rate": 0.0,
    "gamma_weight_decay": 0.0,
    "gamma_level": "lower",
}


def _parser(
    prog: str, description: str, stage: str, add_own: Callable[[Parser], None], *, quantized: bool = True
) -> Parser:
    parser = Parser(prog=prog, description=description)
    cli.add_data_flags(parser, stage)
    cli.add_model_flags(parser, stage)
    if quantized:
        cli.add_quantization_flags(parser, stage)
    add_own(parser)
    cli.add_optimization_flags(parser, stage)
    cli.add_run_flags(parser, stage)
    add_plan_flags(parser)
    return parser


def add_plan_flags(parser: Parser) -> None:
    """What many ranks would take, without them."""
    add = parser.group("plan").add_argument
    plan = "print batch, memory, messages and bytes of a rank of --world-size, without any GPU; and stop"
    add("--plan", action=cli.Switch, default=False, help=plan)
    add("--world-size", type=cli.integer(1), metavar="N", help="ranks of the plan")
    add("--gpus-per-node", type=cli.integer(1), metavar="M", help="ranks of a node (default: all on one)")
    link = "for a modelled time: gigabits a second of the slowest link between ranks, one way"
    add("--link-gbps", type=cli.number(positive=True), metavar="G", help=link)
    step = "for a modelled time: a weight step's and an architecture step's seconds, measured on one GPU by --dry-run"
    add("--step-seconds", type=cli.number(positive=True), nargs="+", metavar="S", help=step)


def derive_plan(config: Config) -> dict[str, Any]:
    """All ranks on one node, where nothing else was said."""
    wanted = getattr(config, "plan", False) and config.gpus_per_node is None and config.world_size is not None
    return {"gpus_per_node": config.world_size} if wanted else {}


def check_plan(config: Config) -> list[str]:
    """Rules across the flags of a plan."""
    if not getattr(config, "plan", False):
        names = ("world_size", "gpus_per_node", "link_gbps", "step_seconds")
        given = [name for name in names if getattr(config, name, None) is not None]
        return [f"--{name.replace('_', '-')}: only has a meaning with --plan; add it or drop this" for name in given]
    if config.world_size is None:
        return ["--plan: for how many ranks? give --world-size N, such as --world-size 64 --gpus-per-node 8"]
    errors = []
    if config.dry_run:
        errors.append("--dry-run: runs a step on this machine, --plan plans for another; drop one of the two")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        errors.append("--plan: is made by one process; start it without torchrun")
    for name in ("save", "resume"):
        if config.explicit(name):
            errors.append(f"--{name}: --plan starts no run; drop one of the two")
    if config.step_seconds is not None and len(config.step_seconds) > 2:
        errors.append("--step-seconds: a weight step's, and an architecture step's; give at most these two")
    parts = config.grad_accumulation * (1 if config.batch_per_rank else config.world_size)
    if config.batch_size % parts:
        least = max(1, config.batch_size // parts) * parts
        errors.append(
            f"--batch-size: {config.batch_size} images cannot be shared out equally among {parts} parts (ranks x "
            f"--grad-accumulation); give {least}"
        )
    return errors


def resolve_training(
    parser: Parser,
    argv: Sequence[str],
    presets: Mapping[str, Preset] | None = None,
    *,
    derive: Sequence[Derive] = (),
    validate: Sequence[Check] = (),
) -> Config:
    """Flags of a training, checked; every error is reported at once (exit code 2).

    `derive` and `validate` are the method's own rules; see `cli.resolve`.
    """
    rules = [*validate, cli.check_train, check_data, check_search_space, check_architecture]
    derive = [partial(derive_imagenet, stage="train"), *derive, cli.derive_train]
    return _resolve(parser, argv, presets_for("train", presets), derive, rules)


def resolve_search(
    parser: Parser,
    argv: Sequence[str],
    presets: Mapping[str, Preset] | None = None,
    *,
    derive: Sequence[Derive] = (),
    validate: Sequence[Check] = (),
) -> Config:
    """Flags of a search, checked; every error is reported at once (exit code 2). More as in `resolve_training`."""
    rules = [*validate, cli.check_search, check_data, check_search_space, check_own_bits]
    derive = [partial(derive_imagenet, stage="search"), *derive, cli.derive_search]
    return _resolve(parser, argv, presets_for("search", presets), derive, rules)


def resolve_bit_search(
    parser: Parser,
    argv: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    *,
    derive: Sequence[Derive] = (),
    validate: Sequence[Check] = (),
) -> Config:
    """Flags of a search of bits for the network that --arch names, checked; more as in `resolve_training`.

    `presets` are those of `cli.resolve`.
    """
    bits = [cli.check_run, cli.check_bits, cli.check_target]
    rules = [*validate, *bits, check_data, check_search_space, check_architecture]
    return _resolve(parser, argv, presets, [partial(derive_imagenet, stage="bits"), *derive], rules)


def _resolve(
    parser: Parser,
    argv: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    derive: Sequence[Derive],
    validate: Sequence[Check],
) -> Config:
    """What every kind of run shares: own operations first, digests of what the flags name last, torchrun's line."""
    return cli.resolve(
        parser,
        argv,
        presets=presets,
        derive=[derive_search_space, *derive, derive_contents, derive_plan],
        validate=[*validate, check_plan, partial(check_launch, prog=parser.prog, argv=argv)],
    )


def check_launch(config: Config, prog: str, argv: Sequence[str]) -> list[str]:
    """--use_data_parallel where torchrun did not start this process: the line that does what was meant.

    It names the program as it was typed, so that it works in the same folder.
    """
    if not config.use_data_parallel or "WORLD_SIZE" in os.environ:
        return []
    import torch

    typed = Path(sys.argv[0])
    program = sys.argv[0] if typed.is_file() and typed.name == Path(prog).name else prog
    gpus = max(1, torch.cuda.device_count())
    return [
        "--use-data-parallel: torchrun starts the processes, one for each GPU; type\n    "
        + shlex.join(["torchrun", f"--nproc_per_node={gpus}", program, *argv])
    ]


def check_data(config: Config) -> list[str]:
    """The data set's name, brought to the registry's spelling (--data-module gives data without one); its files."""
    errors = check_imagenet(config)
    if config.data_module is not None:
        return errors
    from common.data import canonical_name

    try:
        config.dataset = canonical_name(config.dataset)
    except ValueError as error:
        return [*errors, str(error)]
    return errors


def derive_search_space(config: Config) -> dict[str, Any]:
    """The digest of --search-space, which belongs to what a run computes; its operations are known from here on."""
    return {} if check_search_space(config) or config.search_space is None else {"search_space_digest": _digest(config)}


def _digest(config: Config) -> str:
    from common.recipes.own_space import load_search_space

    return load_search_space(config.search_space).digest


def check_search_space(config: Config) -> list[str]:
    """Whether --search-space can be used."""
    if config.search_space is None:
        return []
    from common.recipes.own_space import load_search_space

    try:
        load_search_space(config.search_space)
    except ValueError as error:
        return [str(error)]
    return []


def check_own_bits(config: Config) -> list[str]:
    """Own operations are searched in full precision only: a supernet has no bit logits for them."""
    if config.search_space is None or not config.bits or list(config.bits) == [32] or check_search_space(config):
        return []
    from common.recipes.own_space import load_search_space

    own = load_search_space(config.search_space).own
    if own:
        return [f"--search-space: no bits are searched for {own[0]}, an operation of your own; give --bits none"]
    return []


def check_architecture(config: Config) -> list[str]:
    """Whether --arch resolves, to cells of the DARTS space; what is wrong in an architecture file is named."""
    from common.nets import DARTS, load_architecture

    try:
        load_architecture(config.arch).require(DARTS)
    except (ValueError, OSError) as error:
        return [f"--arch: {error}"]
    return []


def brings_bits(config: Config) -> bool | None:
    """Whether --arch names bits that --wbits and --abits do not replace; None where there is nothing to check.

    That is where bits are given, or where the architecture cannot be read, of which `check_architecture` says why.
    """
    from common.nets import load_architecture

    if config.wbits is not None or config.abits is not None or config.weights_path is not None:
        return None
    try:
        return load_architecture(config.arch).bits is not None
    except (ValueError, OSError):
        return None


def run_program(main: Callable[[], Any], prog: str, config: Config | None = None) -> int:
    """Run an entry point and give its exit code, with one line in place of a traceback for what the user can cure.

    `config`: its flags, of which those are named that lower what it takes when memory runs out.
    0: done. 2: something that was given is wrong (ValueError). 1: the disk or the network refused, memory does not
    suffice, or the training left the finite numbers. 130: interrupted; 128 + N: stopped by signal N after a checkpoint;
    141: the reader of our output went away.
    """
    from common.engine import distributed
    from common.engine.guard import NonFiniteError
    from common.engine.preemption import Stopped
    from common.engine.shortage import is_shortage, shortage_text

    try:
        main()
        distributed.leave()
    except ValueError as error:
        _report(prog, error)
        return 2
    except BrokenPipeError:
        # the interpreter flushes stdout once more at its end, which would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, NonFiniteError) as error:
        _report(prog, error, shortage_text(error, config) if is_shortage(error) else None)
        return 1
    except Stopped as stop:
        print(f"{prog}: {stop}; --resume auto goes on", file=sys.stderr)
        distributed.leave()
        return stop.code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; --resume auto goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if is_shortage(error):
            _report(prog, error, shortage_text(error, config))
            return 1
        if not distributed.lost_a_rank(error):
            _leave_for_launcher(error)
            raise
        print(f"{_rank()}{prog}: another process has ended, so this one ends too", file=sys.stderr)
        return 1
    return 0


def _report(prog: str, error: Exception, text: str | None = None) -> None:
    """An error in a line (`text` in its place); torchrun, which ends the other processes, shows it once more."""
    print(f"{_rank()}{prog}: {text or error}", file=sys.stderr)
    _leave_for_launcher(error)


def _rank() -> str:
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _leave_for_launcher(error: Exception) -> None:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
