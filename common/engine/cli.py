# SPDX-License-Identifier: Apache-2.0
"""Flags: one parser, one set of shared groups, one order of precedence, for every entry point.

A program makes a `Parser`, adds the groups that it needs (`add_data_flags(parser, stage)`, ...), adds flags of its own with the ordinary
`add_argument`, and calls `resolve`. Spellings of the papers (`--batch_size`, `--cd`, `--allow8bit`, `--unrolled=True`) and ours are the
same flags. Values come from the defaults, then `--preset`, then `--config FILE.json`, then the command line; where each came from is kept.
Everything that is wrong is reported at once, before any work, and the program ends with exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

STAGES = ("search", "train")
SEARCHABLE_BITS = (1, 2, 3, 4, 8, 32)
# These say how a run is shown, found or repeated, never what it computes: a resumed run may change them.
VOLATILE = frozenset(
    "save resume runs preset config print_config list_presets dry_run log_every checkpoint_minutes tensorboard workers data threads".split()
)
_TRUE = frozenset(("true", "yes", "on", "t", "y", "1"))
_FALSE = frozenset(("false", "no", "off", "f", "n", "0"))


# ---------------------------------------------------------------------------------------------------------------- kinds of values


def _kind(name: str) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    def mark(convert: Callable[[str], Any]) -> Callable[[str], Any]:
        convert.kind = name  # type: ignore[attr-defined]
        return convert

    return mark


def integer(minimum: int | None = None, maximum: int | None = None) -> Callable[[str], int]:
    """A whole number within inclusive bounds; the returned converter raises ValueError with reason and cure."""

    @_kind("int")
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number; give one{_bounds(minimum, maximum)}") from None
        return _within(value, minimum, maximum)

    return convert


def number(
    minimum: float | None = None, maximum: float | None = None, *, positive: bool = False
) -> Callable[[str], float]:
    """A finite number within inclusive bounds (`positive`: above zero)."""

    @_kind("float")
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number; give one{_bounds(minimum, maximum)}") from None
        if not math.isfinite(value):
            raise ValueError(f"{text!r} is not finite; give a finite number{_bounds(minimum, maximum)}")
        if positive and value <= 0:
            raise ValueError(f"{text} is not above zero; give a positive number")
        return _within(value, minimum, maximum)

    return convert


def choice(*names: str) -> Callable[[str], str]:
    """One of `names`, in any case, with '-' and '_' the same or left out (PC-DARTS, pc_darts, PCDARTS)."""
    plain = {name.lower().replace("_", "").replace("-", ""): name for name in names}

    @_kind("choice")
    def convert(text: str) -> str:
        found = plain.get(text.lower().replace("_", "").replace("-", ""))
        if found is None:
            near = _nearest(text.lower(), names)
            raise ValueError(
                f"{text!r} is not one of {', '.join(names)}" + (f"; did you mean {near!r}?" if near else "")
            )
        return found

    convert.names = names  # type: ignore[attr-defined]
    return convert


def one_of(*values: int) -> Callable[[str], int]:
    """A whole number out of a short list (bit-widths)."""

    @_kind("int")
    def convert(text: str) -> int:
        if not text.isdigit() or int(text) not in values:
            raise ValueError(f"{text!r} is not offered; give one of {', '.join(map(str, values))}")
        return int(text)

    return convert


@_kind("bitops")
def bitops(text: str) -> float:
    """A number of BitOps: 2.2e9, or with a unit K, M, G, T (powers of 1000): 2.2G."""
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    factor = units.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError:
        raise ValueError(f"{text!r} is not a number of BitOps; give one such as 2.2e9, 2.2G or 350M") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{text!r} must be finite and above zero; give one such as 2.2G or 350M")
    return value


@_kind("bool")
def boolean(text: str) -> bool:
    """true/false, yes/no, on/off, 1/0 in any case."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false; give True or False, or the flag without a value")


def _bounds(minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f" between {minimum} and {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return f" of at most {maximum}" if maximum is not None else ""


def _within(value: Any, minimum: float | None, maximum: float | None) -> Any:
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(f"{value} is out of range; give a number{_bounds(minimum, maximum)}")
    return value


def _nearest(word: str, words: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return close[0] if close else None


# ---------------------------------------------------------------------------------------------------------------- the parser


class Switch(argparse.Action):
    """A boolean: `--flag`, `--flag=False`, `--flag no`, `--no-flag`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        positive = [name for name in option_strings if name.startswith("--")]
        negative = [f"--no-{name[2:]}" for name in positive]
        self.negative = frozenset(negative)
        super().__init__([*option_strings, *negative], dest, nargs="?", const=True, type=boolean, metavar="", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)


class Translation(argparse.Action):
    """A spelling of a paper that sets other flags: `to(value)` gives {dest: value}. `switch`: the value is a boolean."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        to: Callable[[Any], dict[str, Any]],
        switch: bool = False,
        **kwargs: Any,
    ) -> None:
        self.to = to
        self.negative: frozenset[str] = frozenset()
        if switch:
            kwargs |= {"nargs": "?", "const": True, "type": boolean, "metavar": ""}
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for key, value in self.to(values).items():
            setattr(namespace, key, value)


class _Help(argparse.HelpFormatter):
    """Aliases once, then the metavar; the default at the end of every line that has one."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=36, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        hidden = getattr(action, "negative", frozenset())
        names = ", ".join(name for name in action.option_strings if name not in hidden)
        if action.type is boolean:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, False, argparse.SUPPRESS) or not action.option_strings or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """argparse with '-' and '_' the same in option names, no abbreviations, and every error reported together.

    `parse_args` is `resolve` without presets.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("usage", "%(prog)s [flags]")
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)
        self.ignored: dict[str, str] = {}

    def find(self, name: str) -> argparse.Action | None:
        """The action of an option as typed: `--batch_size`, `--batch-size`, `-batch_size`, `-j`."""
        if name in self._option_string_actions:
            return self._option_string_actions[name]
        return self._option_string_actions.get("--" + name.lstrip("-").replace("_", "-"))

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The argument group of this title, made when it is not there."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def ignore(self, reason: str, *names: str) -> None:
        """Accept flags (with or without a value) that mean nothing here; `resolve` says so with `reason`."""
        for name in names:
            self.ignored[name] = reason
            self.add_argument(
                name, action=Translation, to=lambda value: {}, nargs="?", const="", help=argparse.SUPPRESS
            )

    def dests(self) -> dict[str, argparse.Action]:
        """dest -> its first action, for every flag that has a value of its own."""
        found: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in (argparse.SUPPRESS, "help"):
                found.setdefault(action.dest, action)
        return found

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Config:  # type: ignore[override]
        """`resolve` without presets."""
        return resolve(self, sys.argv[1:] if args is None else args)

    def fail(self, errors: Sequence[str]) -> NoReturn:
        """Print every error to stderr and exit with code 2."""
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        lines = [
            f"{self.prog}: {count}, nothing was started:",
            *(f"  {error}" for error in errors),
            f"  ({self.prog} --help lists the flags)",
        ]
        self.exit(2, "\n".join(lines) + "\n")


class Config(argparse.Namespace):
    """Resolved values as attributes by dest; `sources[dest]` is "default", "preset NAME", "config FILE", "flag" or "derived"."""

    sources: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON types (paths as text), without the sources."""
        return {key: _jsonable(value) for key, value in sorted(vars(self).items()) if key != "sources"}

    def explicit(self, dest: str) -> bool:
        """Whether the user gave this value (by flag or config file), rather than a default or a preset."""
        source = self.sources.get(dest, "default")
        return source == "flag" or source.startswith("config")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------- resolution


def resolve(
    parser: Parser,
    argv: Sequence[str],
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    validate: Sequence[Callable[[Config], list[str]]] = (),
    derive: Sequence[Callable[[Config], dict[str, Any]]] = (),
) -> Config:
    """Read `argv`: defaults < preset < config file < flags; all errors together, exit code 2.

    `presets`: name -> {dest: value}, an entry "about" describes it. `derive` fills values that follow from others (only those that
    nobody set), before `validate`, whose functions return messages "--flag: reason; cure". `--help`, `--list-presets` and
    `--print-config` print and exit with 0.
    """
    presets = presets or {}
    errors: list[str] = []
    given = _scan(parser, argv, errors)
    actions = parser.dests()
    values = {dest: parser.get_default(dest) for dest in actions}
    sources = dict.fromkeys(values, "default")
    if given.pop("list_presets", False):
        _list_presets(presets)
        parser.exit(0)
    file = given.get("config")
    from_file = _read_config(parser, Path(file), errors) if file else {}
    name = given.get("preset", from_file.get("preset", values.get("preset")))
    if name and name not in presets:
        near = _nearest(str(name), list(presets))
        errors.append(
            f"--preset: {name!r} is not one of {', '.join(presets) or '(none here)'}"
            + (f"; did you mean {near!r}?" if near else "")
        )
    preset = {key: value for key, value in presets.get(name or "", {}).items() if key != "about"}
    assert set(preset) <= set(values), (
        f"preset {name} sets flags that do not exist: {sorted(set(preset) - set(values))}"
    )
    for layer, source in ((preset, f"preset {name}"), (from_file, f"config {file}"), (given, "flag")):
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    config = Config(**values)
    config.sources = sources
    for rule in derive:
        for dest, value in rule(config).items():
            setattr(config, dest, value)
            sources[dest] = "derived"
    for check in validate:
        errors.extend(check(config))
    if errors:
        parser.fail(list(dict.fromkeys(errors)))
    if getattr(config, "print_config", False):
        print_config(config)
        parser.exit(0)
    return config


def print_config(config: Config) -> None:
    """One line a value on stdout: name, value, source."""
    shown = {
        key: json.dumps(value) for key, value in config.as_dict().items() if key not in ("print_config", "list_presets")
    }
    width = max(map(len, shown))
    value_width = min(36, max(map(len, shown.values())))
    for key, value in shown.items():
        print(f"{key:<{width}}  {value:<{value_width}}  {config.sources.get(key, 'default')}")


def _list_presets(presets: Mapping[str, Mapping[str, Any]]) -> None:
    for name, preset in presets.items():
        print(f"{name}: {preset.get('about', '')}")
        rest = {key: value for key, value in preset.items() if key != "about"}
        for key, value in rest.items():
            print(f"    --{key.replace('_', '-')} {json.dumps(value)}")


def _looks_like_flag(token: str) -> bool:
    return token.startswith("--") or (len(token) > 1 and token[0] == "-" and token[1].isalpha())


def _scan(parser: Parser, argv: Sequence[str], errors: list[str]) -> dict[str, Any]:
    """The values on the command line; unlike argparse it goes on after an error, so that all of them are seen."""
    given: dict[str, Any] = {}
    loose: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if not _looks_like_flag(token):
            loose.append(token)
            continue
        if token == "--":
            loose.extend(tokens)
            break
        name, equals, value = token.partition("=")
        action = parser.find(name)
        if action is None:
            errors.append(_unknown(name, parser))
            if not equals and tokens and not _looks_like_flag(tokens[0]):
                tokens.popleft()
            continue
        raw = [value] if equals else _take(action, tokens)
        _accept(parser, action, name, raw, given, errors)
    _positionals(parser, loose, given, errors)
    return given


def _unknown(name: str, parser: Parser) -> str:
    known = [option for option, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    near = _nearest("--" + name.lstrip("-").replace("_", "-"), known)
    return f"{name}: there is no such flag" + (f"; did you mean {near}?" if near else "; --help lists them all")


def _take(action: argparse.Action, tokens: deque[str]) -> list[str]:
    """The values that belong to an option written without '='."""
    if action.nargs == 0 or not tokens or _looks_like_flag(tokens[0]):
        return []
    if action.type is boolean:
        # a bare `--cutout` may be followed by a positional
        return [tokens.popleft()] if tokens[0].lower() in _TRUE | _FALSE else []
    if action.nargs not in ("+", "*"):
        return [tokens.popleft()]
    taken = []
    while tokens and not _looks_like_flag(tokens[0]):
        taken.append(tokens.popleft())
    return taken


def _accept(
    parser: Parser, action: argparse.Action, name: str, raw: list[str], given: dict[str, Any], errors: list[str]
) -> None:
    """Convert one option's values into `given`, or add to `errors`."""
    if isinstance(action, argparse._HelpAction):
        parser.print_help()
        parser.exit(0)
    if isinstance(action, argparse._VersionAction):
        print(action.version)
        parser.exit(0)
    canonical = "--" + name.lstrip("-").replace("_", "-") if len(name) > 2 else name
    if canonical in parser.ignored:
        print(f"note: {name} is accepted and ignored: {parser.ignored[canonical]}", file=sys.stderr)
        return
    try:
        value = _converted(action, raw)
    except (ValueError, argparse.ArgumentTypeError) as error:
        errors.append(f"{name}: {error}")
        return
    if canonical in getattr(action, "negative", ()):
        value = not value
    if isinstance(action, Translation):
        given.update(action.to(value))
    elif isinstance(action, argparse._AppendAction):
        given[action.dest] = [*given.get(action.dest, []), value]
    else:
        given[action.dest] = value


def _converted(action: argparse.Action, raw: list[str]) -> Any:
    convert: Callable[[str], Any] = action.type or str  # type: ignore[assignment]
    if action.nargs == 0:
        if raw:
            raise ValueError("takes no value")
        return action.const
    if not raw:
        if action.nargs == "*":
            return []
        if action.nargs == "?":
            return action.const
        raise ValueError("needs a value")
    if action.nargs in ("+", "*"):
        if getattr(convert, "kind", "") == "int":
            raw = [part for item in raw for part in item.split(",") if part]
        return [_checked(action, convert(item)) for item in raw]
    return _checked(action, convert(raw[0]))


def _checked(action: argparse.Action, value: Any) -> Any:
    if action.choices is not None and value not in action.choices:
        near = _nearest(str(value), [str(item) for item in action.choices])
        raise ValueError(
            f"{value!r} is not one of {', '.join(map(str, action.choices))}"
            + (f"; did you mean {near!r}?" if near else "")
        )
    return value


def _positionals(parser: Parser, loose: list[str], given: dict[str, Any], errors: list[str]) -> None:
    rest = list(loose)
    for action in parser._get_positional_actions():
        many = action.nargs in ("+", "*")
        raw, rest = (rest, []) if many else (rest[:1], rest[1:])
        name = str(action.metavar or action.dest)
        if raw:
            try:
                given[action.dest] = _converted(action, raw)
            except (ValueError, argparse.ArgumentTypeError) as error:
                errors.append(f"{name}: {error}")
        elif action.nargs not in ("?", "*") and action.dest not in given:
            errors.append(f"{name}: is missing; see --help")
    errors.extend(f"{item!r}: belongs to no flag; see --help" for item in rest)


def _read_config(parser: Parser, path: Path, errors: list[str]) -> dict[str, Any]:
    """{dest: value} of a JSON file of flags; keys in any spelling, values typed like the flags."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        errors.append(f"--config: cannot read {path}: {error.strerror}; give a JSON file of flags")
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        errors.append(f'--config: {path} is not JSON ({error}); it holds one object, such as {{"seed": 1}}')
        return {}
    if not isinstance(content, dict):
        errors.append(f'--config: {path} holds no object; it must be one, such as {{"seed": 1}}')
        return {}
    found: dict[str, Any] = {}
    by_dest = parser.dests()
    for key, value in content.items():
        action = parser.find("--" + key) or by_dest.get(key)
        if action is None or isinstance(action, argparse._HelpAction):
            errors.append(
                _unknown("--" + key, parser)
                .replace("--" + key, f"--config {path}: {key!r}", 1)
                .replace("flag", "key", 1)
            )
            continue
        try:
            found.update(_from_json(action, value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            errors.append(f"--config {path}: {key!r}: {error}")
    return found


def _from_json(action: argparse.Action, value: Any) -> dict[str, Any]:
    kind = getattr(action.type, "kind", "text")
    many = action.nargs in ("+", "*")
    if value is None:
        if action.default is not None or isinstance(action, Translation):
            raise ValueError("must not be null")
        return {action.dest: None}
    if isinstance(value, list) != many:
        raise ValueError("must be a list" if many else "must not be a list")
    for item in value if many else [value]:
        wants_bool = kind == "bool" or action.nargs == 0
        fits = isinstance(item, bool) if wants_bool else not isinstance(item, bool | dict | list)
        if kind in ("int", "float"):
            fits = fits and isinstance(item, int | float)
        if kind in ("text", "choice"):
            fits = fits and isinstance(item, str)
        if not fits:
            wanted = {"int": "a number", "float": "a number", "bitops": "a number or text like 2.2G"}.get(kind, "text")
            raise ValueError(f"{json.dumps(item)} has the wrong type; give {'true or false' if wants_bool else wanted}")
    if action.nargs == 0:
        return {action.dest: action.const if value else action.default}
    converted = _converted(action, [str(item) for item in (value if many else [value])])
    return action.to(converted) if isinstance(action, Translation) else {action.dest: converted}


# ---------------------------------------------------------------------------------------------------------------- shared groups


def _by_stage(stage: str, search: Any, train: Any) -> Any:
    assert stage in STAGES, stage
    return search if stage == "search" else train


def add_data_flags(parser: Parser, stage: str) -> None:
    """Which images, how they are augmented, how the training set is divided."""
    add = parser.group("data").add_argument
    add("--dataset", "--set", metavar="NAME", default="cifar10", help="digits, mnist, cifar10, cifar100 or folder")
    add("--data", type=Path, metavar="DIR", help="where the data lie, or are downloaded to")
    add("--data-module", metavar="FILE.py:FUNCTION", help="data of your own: a function that gives an ImageData (docs)")
    add("--image-size", type=integer(4), metavar="N", help="resize to N x N pixels (default: the data set's own size)")
    add(
        "--workers",
        "-j",
        type=integer(0),
        metavar="N",
        default=2,
        help="reader processes, where data do not fit into memory",
    )
    add("--cutout", action=Switch, default=False, help="cut a square out of every training image")
    add("--cutout-length", type=integer(1), metavar="N", default=16, help="side of that square in pixels")
    add(
        "--use-multiprocess",
        action=Translation,
        switch=True,
        to=lambda on: {} if on else {"workers": 0},
        help="False: the same as --workers 0",
    )
    if stage == "search":
        add(
            "--train-portion",
            type=number(0.01, 0.99),
            metavar="F",
            default=0.5,
            help="share of the training set that trains the weights; the rest trains the architecture",
        )
    else:
        add(
            "--select",
            type=choice("last", "val"),
            metavar="last|val",
            default="last",
            help="which weights are tested: the last epoch's, or the best on a held-out part of the training set",
        )
        add(
            "--val-fraction",
            type=number(0, 0.9),
            metavar="F",
            help="share of the training set that is held out (default: .1 with --select val, else 0)",
        )


def add_model_flags(parser: Parser, stage: str) -> None:
    """Sizes of the network."""
    add = parser.group("model").add_argument
    add(
        "--init-channels",
        type=integer(1),
        metavar="N",
        default=_by_stage(stage, 16, 36),
        help="channels of the first cell",
    )
    add("--layers", type=integer(1), metavar="N", default=_by_stage(stage, 8, 20), help="number of cells")
    add(
        "--stem",
        type=choice("auto", "cifar", "imagenet"),
        metavar="auto|cifar|imagenet",
        default="auto",
        help="auto: cifar below 128 pixels",
    )
    if stage == "search":
        add(
            "--method",
            type=choice("darts", "pc-darts"),
            metavar="DARTS|PC-DARTS",
            default="pc-darts",
            help="supernet: full channels, or partial channels with edge weights",
        )
        add(
            "--partial",
            type=integer(1),
            metavar="K",
            default=4,
            help="PC-DARTS: 1/K of the channels pass the candidate operations",
        )
        add("--nodes", type=integer(1), metavar="N", default=4, help="intermediate nodes of a cell")
        add("--multiplier", type=integer(1), metavar="N", default=4, help="how many of the last nodes a cell hands on")
        add(
            "--eval-init-channels",
            type=integer(1),
            metavar="N",
            default=36,
            help="channels of the network to be trained, whose cost is searched",
        )
        add("--eval-layers", type=integer(3), metavar="N", default=20, help="cells of the network to be trained")
    else:
        add(
            "--arch",
            metavar="NAME|FILE|RUN",
            default="PC_DARTS",
            help="a named genotype, an architecture.json, or a search run's folder",
        )


def add_quantization_flags(parser: Parser, stage: str) -> None:
    """Bit-widths and quantisers."""
    add = parser.group("quantisation").add_argument
    if stage == "search":
        add(
            "--bits",
            type=one_of(*SEARCHABLE_BITS),
            nargs="+",
            metavar="B",
            default=[2, 4],
            help="bit-widths to choose among",
        )
        add(
            "--allow8bit",
            action=Translation,
            switch=True,
            to=lambda on: {"bits": [2, 4, 8] if on else [2, 4]},
            help="the same as --bits 2 4 8",
        )
    else:
        add(
            "--wbits",
            type=one_of(*SEARCHABLE_BITS),
            metavar="B",
            help="uniform weight bits (32: full precision), in place of the architecture's own",
        )
        add("--abits", type=one_of(*SEARCHABLE_BITS), metavar="B", help="uniform activation bits")
        add(
            "--fixed-bit",
            action=Translation,
            type=one_of(*SEARCHABLE_BITS),
            metavar="B",
            to=lambda bits: {"wbits": bits, "abits": bits},
            help="the same as --wbits B --abits B",
        )
        add("--weights-path", type=Path, metavar="FILE", help="bits from a NablaQDARTS gamma_checkpoint.t7")
        parser.ignore("the number of bit-widths is read from the architecture", "--allow8bit")
    add(
        "--weight-quantizer",
        type=choice("gaussian", "lsq"),
        metavar="gaussian|lsq",
        default="gaussian",
        help="of 1-4 bits (lsq: fixed bits only)",
    )
    add(
        "--activation-quantizer",
        type=choice("hwgq", "lsq"),
        metavar="hwgq|lsq",
        default="hwgq",
        help="of 1-4 bits (lsq: fixed bits only)",
    )
    add(
        "--scheme",
        type=choice("default", "reference"),
        metavar="default|reference",
        default="default",
        help="8 bits: per output channel with running ranges, or the reference code's",
    )
    add("--signed-activations", action=Switch, default=False, help="no ReLU before activation quantisers")
    add("--stem-bits", type=one_of(2, 4, 8, 32), metavar="B", default=32, help="bits of the stem")
    add("--classifier-bits", type=one_of(2, 4, 8, 32), metavar="B", default=32, help="bits of the classifier")
    add(
        "--bit-mapping",
        type=choice("relative", "paper"),
        metavar="relative|paper",
        default="relative",
        help="how the bits of searched cells spread over more cells",
    )


def add_search_flags(parser: Parser) -> None:
    """The bilevel search: architecture and bit logits, cost."""
    add = parser.group("search").add_argument
    add(
        "--arch-learning-rate",
        "--arch-lr",
        type=number(0),
        metavar="LR",
        default=6e-4,
        help="of alphas and betas (Adam)",
    )
    add("--arch-weight-decay", "--arch-wd", type=number(0), metavar="WD", default=1e-3, help="of alphas and betas")
    add(
        "--warmup-epochs",
        "--epochs-no-archopt",
        "--begin",
        type=integer(0),
        metavar="N",
        default=15,
        help="first epochs that leave alphas and betas alone",
    )
    add("--unrolled", action=Switch, default=False, help="second-order architecture gradients")
    add(
        "--second-order",
        type=choice("exact", "finite-difference"),
        metavar="exact|finite-difference",
        default="exact",
        help="how --unrolled differentiates",
    )
    add("--gamma-learning-rate", "--q-lr", type=number(0), metavar="LR", default=0.01, help="of the bit logits (SGD)")
    add("--gamma-weight-decay", "--q-wd", type=number(0), metavar="WD", default=1e-3, help="of the bit logits")
    add(
        "--gamma-level",
        type=choice("lower", "upper"),
        metavar="lower|upper",
        default="lower",
        help="bit logits move with the weights, or with the alphas",
    )
    add = parser.group("cost").add_argument
    add(
        "--complexity-decay",
        "--cd",
        type=number(0),
        metavar="X",
        default=1e-4,
        help="weight of the cost in the weight step; steers the bits",
    )
    add(
        "--arch-complexity-decay",
        type=number(0),
        metavar="X",
        help="weight of the cost in the architecture step (default: a tenth of --complexity-decay; 0 with --cost-weighting uniform)",
    )
    add("--target-bitops", type=bitops, metavar="G", help="BitOps to hit within 10%%, such as 2.2e9, 2.2G or 350M")
    add(
        "--cost-accounting",
        type=choice("exact", "paper"),
        metavar="exact|paper",
        default="exact",
        help="every layer at its true size, or the reference's group-blind count",
    )
    add(
        "--cost-weighting",
        type=choice("expected", "uniform"),
        metavar="expected|uniform",
        default="expected",
        help="expected cost of the network to be trained, or the reference's sum over all candidates",
    )


def add_train_flags(parser: Parser) -> None:
    """What only the training of a found network has."""
    add = parser.group("training").add_argument
    add("--auxiliary", action=Switch, default=False, help="auxiliary classifier during training")
    add("--auxiliary-weight", type=number(0), metavar="W", default=0.4, help="weight of its loss")
    add(
        "--drop-path-prob",
        type=number(0, 0.99),
        metavar="P",
        default=0.3,
        help="drop path, growing linearly from 0 to P",
    )
    add(
        "--label-smoothing", type=number(0, 0.99), metavar="E", default=0.0, help="label smoothing of the training loss"
    )
    add("--init-from", type=Path, metavar="RUN", help="start from the weights of a trained run")
    add("--teacher", type=Path, metavar="RUN", help="distil from a trained run")
    add("--teacher-weight", type=number(0, 1), metavar="W", default=0.5, help="share of the distillation loss")
    add(
        "--teacher-temperature",
        "--temperature",
        type=number(positive=True),
        metavar="T",
        default=4.0,
        help="temperature of both softmaxes in it",
    )


def add_optimization_flags(parser: Parser, stage: str) -> None:
    """Epochs, batches and the weights' optimiser."""
    add = parser.group("optimisation").add_argument
    add("--epochs", type=integer(1), metavar="N", default=_by_stage(stage, 50, 600), help="epochs")
    add("--steps-per-epoch", type=integer(1), metavar="N", help="at most N steps an epoch (default: all of the data)")
    add("--batch-size", "-b", type=integer(1), metavar="N", default=_by_stage(stage, 256, 96), help="images a step")
    add(
        "--learning-rate",
        "--lr",
        type=number(0),
        metavar="LR",
        default=_by_stage(stage, 0.1, 0.025),
        help="of the weights, at the start",
    )
    add(
        "--learning-rate-min",
        "--lr-min",
        type=number(0),
        metavar="LR",
        default=0.0,
        help="end of the schedule; no epoch trains at exactly 0",
    )
    if stage == "train":
        add(
            "--lr-schedule",
            type=choice("cosine", "linear", "step"),
            metavar="cosine|linear|step",
            default="cosine",
            help="learning rate by epoch",
        )
        add(
            "--lr-step-epochs",
            "--step-epoch",
            type=integer(1),
            metavar="N",
            default=30,
            help="step: epochs between two drops",
        )
        add(
            "--lr-step-factor",
            "--decay-rate",
            type=number(0, 1),
            metavar="F",
            default=0.1,
            help="step: factor of a drop",
        )
    add(
        "--lr-warmup-epochs",
        type=integer(0),
        metavar="N",
        default=0,
        help="first epochs with a learning rate that rises linearly",
    )
    add("--momentum", type=number(0, 0.9999), metavar="M", default=0.9, help="of SGD")
    add("--weight-decay", "--wd", type=number(0), metavar="WD", default=3e-4, help="of the weights")
    add(
        "--grad-clip",
        type=number(positive=True),
        metavar="C",
        default=5.0,
        help="largest global gradient norm of the weights",
    )


def add_run_flags(parser: Parser, stage: str) -> None:
    """Where, how and how reproducibly the run happens."""
    add = parser.group("run").add_argument
    add("--seed", type=integer(0), metavar="N", default=_by_stage(stage, 2, 0), help="seed of everything random")
    add("--deterministic", action=Switch, default=False, help="only deterministic algorithms (slower on a GPU)")
    add(
        "--device",
        type=choice("auto", "cpu", "cuda"),
        metavar="auto|cpu|cuda",
        default="auto",
        help="auto: a GPU where there is one",
    )
    add("--precision", type=choice("fp32", "bf16"), metavar="fp32|bf16", default="fp32", help="bf16: autocast")
    add("--compile", action=Switch, default=False, help="torch.compile the network")
    add("--threads", type=integer(1), metavar="N", help="CPU threads of torch (default: torch's choice)")
    add("--save", type=Path, metavar="DIR", help="the run's folder (default: a new one under --runs)")
    add("--runs", type=Path, metavar="DIR", default=Path("runs"), help="where new run folders are made")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on: auto finds the run of the same configuration",
    )
    add("--preset", metavar="NAME", help="a set of defaults; --list-presets shows them")
    add("--list-presets", action="store_true", help="show the presets and exit")
    add("--config", metavar="FILE.json", help="flags from a file; explicit flags win")
    add("--print-config", action="store_true", help="show every value and where it came from, and exit")
    add(
        "--dry-run",
        action="store_true",
        help="build everything, run one step, show parameters, cost, memory and time, and exit",
    )
    add(
        "--log-every",
        "--report-freq",
        "--log-freq",
        type=integer(1),
        metavar="N",
        default=50,
        help="steps between log rows",
    )
    add(
        "--checkpoint-minutes",
        type=number(positive=True),
        metavar="M",
        default=10.0,
        help="time between checkpoints within an epoch; every epoch ends with one",
    )
    add("--tensorboard", action=Switch, default=True, help="write TensorBoard events")
    parser.ignore("--device chooses", "--gpu", "--use-gpu")
    parser.ignore("the run's folder is set by --save", "--model-path", "--model-save-dir")
    parser.ignore("it is taken from the data", "--trainset-num", "--class-num", "--num-classes")
    parser.ignore("nothing reads it, as in the reference", "--q-start", "--note", "--tmp-data-dir", "--dropout")


def add_run_argument(parser: Parser, *, help: str = "a run's folder") -> None:
    """A tool's positional RUN, with `--run` as an alias; both land in `.run` (Path or None)."""
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help=help)
    parser.add_argument("--run", type=Path, dest="run", metavar="RUN", help="the same as the positional RUN")


# ---------------------------------------------------------------------------------------------------------------- rules across flags


def derive_search(config: Config) -> dict[str, Any]:
    """The architecture step's cost weight, where it was not given (design.md 6.3)."""
    if config.arch_complexity_decay is not None:
        return {}
    return {
        "arch_complexity_decay": 0.0
        if config.cost_weighting == "uniform"
        else float(f"{config.complexity_decay / 10:.12g}")
    }


def derive_train(config: Config) -> dict[str, Any]:
    """The held-out share, where it was not given."""
    return {} if config.val_fraction is not None else {"val_fraction": 0.1 if config.select == "val" else 0.0}


def check_run(config: Config) -> list[str]:
    """Rules that both stages share."""
    errors = []
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            errors.append("--device: cuda was asked for, but torch sees no GPU; use --device cpu, or see doctor.py")
    if config.learning_rate_min > config.learning_rate:
        errors.append(
            f"--learning-rate-min: {config.learning_rate_min} is above --learning-rate {config.learning_rate}; lower it"
        )
    if config.lr_warmup_epochs and config.lr_warmup_epochs >= config.epochs:
        errors.append(
            f"--lr-warmup-epochs: {config.lr_warmup_epochs} leaves none of the {config.epochs} epochs; give fewer"
        )
    if config.data_module and ":" not in config.data_module:
        errors.append(f"--data-module: {config.data_module!r} names no function; write FILE.py:FUNCTION")
    for flag, path in (("--data", config.data),):
        if path is not None and path.exists() and not path.is_dir():
            errors.append(f"{flag}: {path} is a file; give a folder")
    if config.save is not None and config.save.is_file():
        errors.append(f"--save: {config.save} is a file; give a folder")
    return errors


def check_search(config: Config) -> list[str]:
    """Rules across the flags of a search."""
    errors = check_run(config)
    if len(set(config.bits)) != len(config.bits):
        errors.append(f"--bits: {config.bits} names one twice; give each once")
    for flag, value in (
        ("--weight-quantizer", config.weight_quantizer),
        ("--activation-quantizer", config.activation_quantizer),
    ):
        if value == "lsq":
            errors.append(
                f"{flag}: lsq learns one step size per bit-width and cannot be mixed in a search; use it in training"
            )
    if config.method == "pc-darts" and config.init_channels % config.partial:
        errors.append(
            f"--init-channels: {config.init_channels} cannot be divided by --partial {config.partial}; give a multiple of it"
        )
    if config.multiplier > config.nodes:
        errors.append(
            f"--multiplier: a cell of {config.nodes} nodes cannot hand on {config.multiplier}; give at most --nodes"
        )
    if config.warmup_epochs >= config.epochs:
        errors.append(
            f"--warmup-epochs: {config.warmup_epochs} leaves none of the {config.epochs} epochs to the architecture; give fewer, such as --warmup-epochs 0"
        )
    if config.explicit("second_order") and not config.unrolled:
        errors.append("--second-order: only has a meaning with --unrolled; add it")
    if config.target_bitops and not (config.complexity_decay or config.arch_complexity_decay):
        errors.append("--target-bitops: needs a cost weight to adapt; give --complexity-decay above 0")
    if config.cost_weighting == "uniform" and config.arch_complexity_decay:
        errors.append(
            "--arch-complexity-decay: the uniform weighting does not see the alphas; use --cost-weighting expected, or 0"
        )
    return errors


def check_train(config: Config) -> list[str]:
    """Rules across the flags of a training."""
    errors = check_run(config)
    if (config.wbits is None) != (config.abits is None):
        given, missing = ("--wbits", "--abits") if config.abits is None else ("--abits", "--wbits")
        errors.append(f"{given}: alone leaves the other open; give {missing} too (32: full precision)")
    if config.wbits is not None and config.weights_path is not None:
        errors.append("--weights-path: gives bits, and so do --wbits/--abits; drop one")
    quantizers = (
        ("--weight-quantizer", config.weight_quantizer, config.wbits),
        ("--activation-quantizer", config.activation_quantizer, config.abits),
    )
    for flag, value, bits in quantizers:
        if value == "lsq" and bits == 1:
            errors.append(f"{flag}: lsq has no 1-bit form; use 2-4 or 8 bits, or the default quantiser")
    if config.select == "val" and not config.val_fraction:
        errors.append("--val-fraction: --select val needs a held-out part; give a share above 0")
    for dest in ("teacher_weight", "teacher_temperature"):
        if config.explicit(dest) and config.teacher is None:
            errors.append(f"--{dest.replace('_', '-')}: only has a meaning with --teacher RUN; add it or drop this")
    for dest in ("init_from", "teacher"):
        path = getattr(config, dest)
        if path is not None and not path.is_dir():
            errors.append(
                f"--{dest.replace('_', '-')}: {path} is no folder; give the folder of a finished training run"
            )
    if config.weights_path is not None and not config.weights_path.is_file():
        errors.append(f"--weights-path: {config.weights_path} does not exist; give a gamma_checkpoint.t7")
    return errors
