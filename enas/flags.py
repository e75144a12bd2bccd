# SPDX-License-Identifier: Apache-2.0
"""The flags of search and training, with the source's spellings (`--child_num_layers`, `--controller_lr`, ...).

Imports no torch, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common.engine import cli
from common.engine.changes import CHANGEABLE as CHANGEABLE_ANYWHERE
from common.engine.changes import OLD_LOSS, OLD_SCHEDULE
from common.engine.cli import Config, Parser, Switch, bitops, choice, integer, number
from common.engine.parsing import boolean
from common.recipes.contents import derive_contents
from common.recipes.flags import check_data, check_launch

# The source's two default architectures, of its training scripts.
CIFAR_ARC = "1 2 1 3 0 1 0 4 1 1 1 1 0 1 0 1 1 0 0 1 0 1 0 4 1 0 2 0 0 3 1 1 0 0 0 0 4 1 1 0"
MNIST_ARC = "1 2 0 0 1 1 0 1 1 1 0 0 1 1 1 3 0 1 1 0 1 4 1 1 2 0 1 3 1 3 1 2 1 0 1 0 3 1 1 0"

# Where the source's scripts differ by data set; grey images are MNIST's case.
PER_DATASET: dict[str, dict[str, dict[str, Any]]] = {
    "search": {"grey": {"epochs": 300, "layers": 2}, "colour": {"epochs": 150, "layers": 3}},
    "train": {
        "grey": {"epochs": 300, "layers": 6, "learning_rate_min": 1e-5, "arch": MNIST_ARC},
        "colour": {"epochs": 5, "layers": 15, "learning_rate_min": 1e-4, "arch": CIFAR_ARC},
    },
}
_HELD_OUT = {"mnist": 5000 / 60000, "cifar10": 5000 / 50000, "cifar100": 5000 / 50000}
_SMALL = {"dataset": "digits", "image_size": 16, "out_filters": 4, "layers": 2, "batch_size": 64, "log_every": 10}
_SMOKE = {**_SMALL, "image_size": 8, "out_filters": 2, "layers": 1, "batch_size": 16, "epochs": 2, "log_every": 1}
_SMOKE |= {"plots": False}
# A child of shared weights learns by its number of steps, whatever their size: small images and cells give 17,000 steps
# in half an hour.
_HOUR = {"image_size": 16, "batch_size": 64, "loss": "cross-entropy", "auxiliary": False}
_QUICK = {**_SMALL, "out_filters": 8, "learning_rate": 0.05}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "search": {
        "quickstart": {
            "about": "digits at a size for minutes on a laptop",
            **_QUICK,
            # Weights that thousands of cells share take long to fit any; fewer cells and a loss whose slope never ends
            # get there in a thousand steps, the hinge and its rate do not (see README.md).
            "layers": 1,
            "blocks": 2,
            "batch_size": 32,
            "loss": "cross-entropy",
            "learning_rate": 0.01,
            "epochs": 30,
            "lr_period": 30,
            "controller_train_steps": 10,
            "eval_layers": 2,
            "eval_out_filters": 8,
        },
        "hour": {
            "about": "MNIST or CIFAR-10 at 16 pixels: with its training about an hour of one CPU core",
            **_HOUR,
            "layers": 1,
            "out_filters": 8,
            "epochs": 20,
            "lr_period": 20,
            "log_every": 100,
            "eval_layers": 2,
            "eval_out_filters": 16,
        },
        "smoke": {
            "about": "digits, a few steps: seconds, for tests; its figures mean nothing",
            **_SMOKE,
            "steps_per_epoch": 2,
            "controller_train_steps": 2,
            "controller_num_aggregate": 3,
            "eval_out_filters": 2,
            "eval_layers": 1,
        },
    },
    "train": {
        "quickstart": {"about": "digits at a size for minutes on a laptop", **_QUICK, "epochs": 16},
        "hour": {
            "about": "the size of the search's preset of that name",
            **_HOUR,
            "layers": 2,
            "out_filters": 16,
            "epochs": 5,
            "lr_period": 5,
            "log_every": 100,
        },
        "smoke": {
            "about": "digits, a few steps: seconds, for tests; its figures mean nothing",
            **_SMOKE,
            "steps_per_epoch": 3,
        },
    },
}


_OLD_CONTROLLER = "the controller's updates that are done had the old value"
_CHANGES = {
    OLD_SCHEDULE: "lr_cosine lr_period lr_period_factor child_lr child_lr_dec_rate child_lr_dec_every",
    OLD_LOSS: "loss l2",
    "the steps that are done saw images, paths and features as before": "augment drop_path_keep_prob keep_prob",
    "latent weights may lie where the other setting would not have let them": "clip_weights",
    "epochs that are done were evaluated as before": "eval_every_epochs epoch_test",
    _OLD_CONTROLLER: "controller_lr controller_entropy_weight controller_bl_dec cost_weight "
    "controller_tanh_constant controller_op_tanh_reduce controller_temperature",
}
CHANGEABLE = CHANGEABLE_ANYWHERE | {flag: effect for effect, flags in _CHANGES.items() for flag in flags.split()}
"""Flags that a run may change when it goes on, each with what is no longer exact then."""


def _optional(kind: Any) -> Any:
    """A flag's kind that also takes None, as the source's flags do."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    return convert


def make_parser(prog: str, description: str, stage: str) -> Parser:
    """Every flag of stage "search" or "train"."""
    parser = Parser(prog=prog, description=description)
    cli.add_data_flags(parser, "train")
    parser.set_defaults(image_size=32)
    parser.group("data").add_argument("--augment", action=Switch, default=False, help=_AUGMENT)
    _add_model(parser, stage)
    _add_child(parser, stage)
    if stage == "search":
        _add_controller(parser)
    cli.add_run_flags(parser, stage)
    parser.set_defaults(log_every=25 if stage == "search" else 50)
    parser.fix(stem_bits=32, classifier_bits=32, lr_warmup_epochs=0, search_space=None)
    _ignore_source(parser, stage)
    return parser


_AUGMENT = "shift training images by up to an eighth and mirror them where that makes sense (the source: never)"


def _add_model(parser: Parser, stage: str) -> None:
    add = parser.group("model").add_argument
    search = stage == "search"
    cells = "reductions stand at L // 4, 2 (L // 4) + 1 and L of L + 2 cells (default: by data set)"
    add("--layers", "--child-num-layers", type=integer(1), default=3 if search else 15, metavar="L", help=cells)
    filters = "channels of the first cell's nodes; a reduction doubles them"
    add(
        "--out-filters", "--child-out-filters", type=integer(1), default=20 if search else 16, metavar="F", help=filters
    )
    if search:
        blocks = "blocks of a cell (the source's own default, 3, gives cells that its training cannot take)"
        add("--blocks", "--child-num-cells", type=integer(1, 32), default=5, metavar="B", help=blocks)
        evaluated = "{} of the network to be trained: its cost counts (default: as train.py)"
        add("--eval-layers", type=integer(1), metavar="L", help=evaluated.format("layers"))
        add("--eval-out-filters", type=integer(1), default=16, metavar="F", help=evaluated.format("channels"))
    else:
        arch = "a search's run or file, or both cells as integers: \"0 2 1 4 ...\" (default: the source's, by data set)"
        names = ("--arch", "--fixed-arc", "--child-fixed-arc")
        add(*names, type=str, default=CIFAR_ARC, metavar="ARC|FILE|RUN", help=arch)
        drop = "share of paths that the last cell keeps at the end of the training"
        kept = number(0.01, 1)
        add("--drop-path-keep-prob", "--child-drop-path-keep-prob", type=_optional(kept), default=1.0, help=drop)
    kinds = "binary, stochastic, ternary, kbit1 ... kbit8, float: one for all, or the stem's and each cell's"
    add("--layer-bits", nargs="+", default=None, metavar="TYPE", help=f"{kinds} (default: kbit4 kbit4, then ternary)")
    add(
        "--auxiliary",
        "--child-use-aux-heads",
        action=Switch,
        default=True,
        help="auxiliary classifier during training",
    )
    keep = "share of features that the classifier's dropout keeps"
    add("--keep-prob", "--child-keep-prob", type=number(0.01, 1), default=1.0, metavar="P", help=keep)
    compat = "keep the source's accidents: hinge targets +1 and -3, an untrained auxiliary head, a ternary y branch in "
    compat += "the first cell, rescaled gradients there, no clipping of gradients and latent weights"
    add("--compat", action=Switch, default=False, help=compat)


def _add_child(parser: Parser, stage: str) -> None:
    add, search = parser.group("optimisation").add_argument, stage == "search"
    by_data = "(default: by data set)"
    add(
        "--epochs", "--num-epochs", type=integer(1), default=150 if search else 5, metavar="N", help=f"epochs {by_data}"
    )
    add("--steps-per-epoch", type=integer(1), metavar="N", help="at most N steps an epoch (default: all of the data)")
    add("--batch-size", "-b", type=integer(1), default=128, metavar="N", help="images a step")
    positive = number(positive=True)
    top, low = ("--learning-rate", "--lr", "--child-lr-max"), ("--learning-rate-min", "--lr-min", "--child-lr-min")
    add(*top, type=positive, default=0.05, metavar="LR", help="at the start of every period of the cosine")
    add(*low, type=number(0), default=5e-4 if search else 1e-4, metavar="LR", help=f"at its end {by_data}")
    add("--lr-cosine", "--child-lr-cosine", type=boolean, default=True, help="False: a staircase instead")
    add("--lr-period", "--child-lr-T-0", type=integer(1), default=10, metavar="N", help="epochs of the first period")
    factor = "each period is so many times the one before"
    add("--lr-period-factor", "--child-lr-T-mul", type=integer(1), default=2, metavar="N", help=factor)
    add("--child-lr", type=positive, default=0.1, metavar="LR", help="of the staircase, at the start")
    add("--child-lr-dec-rate", type=positive, default=0.1, metavar="F", help="of the staircase: factor of a drop")
    every = "of the staircase: epochs between two drops"
    add("--child-lr-dec-every", type=integer(1), default=100, metavar="N", help=every)
    bound = "largest global gradient norm; none: no limit"
    default = 5.0 if search else None
    add("--grad-clip", "--child-grad-bound", type=_optional(positive), default=default, metavar="C", help=bound)
    add("--l2", "--child-l2-reg", type=number(0), default=0.0, metavar="W", help="weight of the sum of squares")
    kinds = choice("hinge", "squared-hinge", "cross-entropy")
    add("--loss", type=kinds, default="hinge", metavar="hinge|squared-hinge|cross-entropy", help="of the child")
    clip = "keep latent weights in [-1, 1]"
    add("--clip-weights", action=Switch, default=True, help=clip)
    add("--eval-every-epochs", type=integer(1), default=1, metavar="N", help="evaluate after every N epochs")
    add("--epoch-test", action=Switch, default=True, help="print the test line too; nothing is selected by it")


def _add_controller(parser: Parser) -> None:
    add, positive = parser.group("controller").add_argument, number(positive=True)
    add("--controller-training", type=boolean, default=True, help="False: architectures stay what chance makes them")
    add("--controller-lr", type=positive, default=0.0035, metavar="LR", help="learning rate")
    squash = "logits become C tanh(logits); none: they stay"
    add("--controller-tanh-constant", type=_optional(positive), default=1.1, metavar="C", help=squash)
    add("--controller-op-tanh-reduce", type=positive, default=2.5, metavar="R", help="C / R for operations")
    add("--controller-temperature", type=_optional(positive), default=None, metavar="T", help="logits are divided by T")
    entropy = "weight of the entropy in the reward"
    add("--controller-entropy-weight", type=number(0), default=1e-4, metavar="W", help=entropy)
    add(
        "--controller-bl-dec", type=number(0, 1), default=0.99, metavar="D", help="decay of the rewards' moving average"
    )
    add("--controller-train-steps", type=integer(1), default=30, metavar="N", help="updates after an epoch")
    add("--controller-num-aggregate", type=integer(1), default=10, metavar="N", help="samples averaged in an update")
    add("--controller-train-every", type=integer(1), default=1, metavar="N", help="updates after every N epochs")
    reward = "accuracy-bitops takes --cost-weight x the share by which the network's cost exceeds --target-bitops"
    kinds = choice("accuracy", "accuracy-bitops")
    add("--reward", type=kinds, default="accuracy", metavar="accuracy|accuracy-bitops", help=reward)
    add("--target-bitops", type=bitops, metavar="G", help="BitOps that cost nothing, such as 2.2e9, 2.2G or 350M")
    add("--cost-weight", type=number(0), default=0.5, metavar="W", help="accuracy that a doubled cost takes away")


_POLICY = ("training", "lr", "tanh-constant", "op-tanh-reduce", "temperature", "entropy-weight", "bl-dec")
_POLICY += ("train-steps", "num-aggregate", "train-every")


def _ignore_source(parser: Parser, stage: str) -> None:
    """Flags of the source that nothing reads there, or that have no meaning here."""
    parser.ignore("the run's folder is set by --save", "--output-dir", "--reset-output-dir")
    parser.ignore("nothing reads it, as in the source", "--child-cutout-size", "--controller-keep-prob")
    parser.ignore("nothing reads it, as in the source", "--controller-use-critic", "--controller-skip-target")
    parser.ignore("nothing reads it, as in the source", "--controller-skip-weight", "--controller-forwards-limit")
    parser.ignore("no augmented copies are kept; --augment draws anew at every step", "--n-aug-img")
    parser.ignore("it is taken from the data", "--channel", "--img-size", "--search-for", "--data-format")
    parser.ignore("gradients are clipped by --grad-clip", "--child-clip-mode")
    parser.ignore("one process computes all samples of an update", "--controller-sync-replicas")
    if stage == "search":
        parser.ignore("a search drops no paths", "--child-drop-path-keep-prob", "--drop-path-keep-prob")
        parser.ignore("a search samples its architectures", "--child-fixed-arc", "--fixed-arc")
    else:
        parser.ignore("a training has no controller", *(f"--controller-{name}" for name in _POLICY))
        parser.ignore("the architecture says it", "--child-num-cells", "--blocks")


def resolve(parser: Parser, argv: Sequence[str], stage: str) -> Config:
    """The flags, checked; every error is reported at once (exit code 2)."""

    def by_dataset(config: Config) -> dict[str, Any]:
        return _by_dataset(config, stage)

    checks = [cli.check_run, check_data, _check_network, _check_computing]
    checks += [partial(check_launch, prog=parser.prog, argv=argv)]
    checks += [_check_reward, _check_held_out] if stage == "search" else [_check_architecture]
    return cli.resolve(parser, argv, presets=PRESETS[stage], derive=[by_dataset, derive_contents], validate=checks)


def _by_dataset(config: Config, stage: str) -> dict[str, Any]:
    """The source's defaults for this data set, where nobody said otherwise, and the validation part of a search."""
    name = str(config.dataset).lower().replace("-", "")
    kind = "grey" if name in ("mnist", "digits") else "colour"
    found = dict(PER_DATASET[stage][kind])
    if stage == "search":
        found |= {"val_fraction": _HELD_OUT.get(name, 0.1)}
        if config.eval_layers is None:
            found |= {"eval_layers": PER_DATASET["train"][kind]["layers"]}
    else:
        layers = config.open_among(found).get("layers", config.layers)
        found |= {"val_fraction": 0.0} | _types_of_search(config, layers)
    if config.compat:
        found |= {"clip_weights": False, "grad_clip": None}
    return config.open_among(found)


def _types_of_search(config: Config, layers: int) -> dict[str, Any]:
    """The types of layers of the search which found the architecture, where they fit a network of L = `layers`."""
    from common.nets import load_architecture
    from common.nets.enas_layers import types_fit

    try:
        types = load_architecture(config.arch).search.get("layer_bits")
    except (ValueError, OSError):
        return {}  # the flags' check says what is wrong
    return {"layer_bits": types} if isinstance(types, list) and types_fit(types, layers + 2) else {}


def _check_computing(config: Config) -> list[str]:
    """What other methods have and this one does not."""
    errors = []
    if config.select != "last":
        errors.append("--select: this method tests the last epoch's weights; leave it out")
    if config.compile:
        errors.append("--compile: architectures change from step to step, so nothing stays compiled; leave it out")
    if getattr(config, "cuda_graph", "off") == "on":
        errors.append("--cuda-graph: architectures change from step to step, so no graph can be replayed; leave it out")
    if config.checkpoint_cells and hasattr(config, "controller_lr"):
        errors.append("--checkpoint-cells: the shared child keeps what it computes; give a smaller --batch-size")
    return errors


def _check_network(config: Config) -> list[str]:
    from common.nets.enas_layers import resolve_layer_types
    from common.nets.enas_space import check_image_size

    errors = []
    for check in (
        lambda: resolve_layer_types(config.layer_bits, config.layers + 2),
        lambda: check_image_size(config.image_size or 32, config.layers),
    ):
        try:
            check()
        except ValueError as error:
            errors.append(str(error))
    return errors


def _check_architecture(config: Config) -> list[str]:
    from common.nets import load_architecture
    from common.nets.enas_space import SPACE

    try:
        load_architecture(config.arch).require(SPACE)
    except (ValueError, OSError) as error:
        return [f"--fixed-arc: {error}"]
    return []


def _check_reward(config: Config) -> list[str]:
    if config.reward == "accuracy-bitops" and config.target_bitops is None:
        return ["--reward: accuracy-bitops needs a cost to aim at; add --target-bitops G"]
    if config.reward == "accuracy" and config.target_bitops is not None:
        return ["--target-bitops: only has a meaning with --reward accuracy-bitops; add it or drop this"]
    return []


def _check_held_out(config: Config) -> list[str]:
    if config.val_fraction > 0:
        return []
    return ["--val-fraction: the controller's rewards need images that are held out; give a share above 0"]


def source_values(config: Config) -> Mapping[str, Any]:
    """What the source's scripts print at their start: every flag and its value."""
    return {key: value for key, value in config.as_dict().items() if key not in ("print_config", "list_presets")}
