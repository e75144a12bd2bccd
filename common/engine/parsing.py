# SPDX-License-Identifier: Apache-2.0
"""Reading flags: one parser, one order of precedence, all errors at once.

A program makes a `Parser`, adds the shared groups of `common.engine.cli` and, with the ordinary `add_argument`, flags
of its own, and calls `resolve`. '-' and '_' are the same in names. Values come from the defaults, then `--preset`, then
`--config FILE.json`, then the command line; where each came from is kept. Everything that is wrong is reported
together, before any work, and the program ends with exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.engine.files import read_json

_TRUE = frozenset(("true", "yes", "on", "t", "y", "1"))
_FALSE = frozenset(("false", "no", "off", "f", "n", "0"))


# ------------------------------------------------------------------------------------- kinds of values


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
            value = int(text.removesuffix(".0"))  # the reference writes some whole numbers as floats
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
        known = {str(value): value for value in values}
        if text not in known:
            raise ValueError(f"{text!r} is not offered; give one of {', '.join(known)}")
        return known[text]

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


# ------------------------------------------------------------------------------------------ the parser


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
    """A spelling of a paper that sets other flags: `to(value)` gives {dest: value}; `switch`: value is a boolean."""

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
    """Aliases once, then the metavar; the default at the end of every line that has one; examples as they stand."""

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

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith("    ") else fill(part, width, indent) for part in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if (
            default is None
            or default is False
            or default == []
            or default is argparse.SUPPRESS
            or not action.option_strings
            or "default" in text
        ):
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
        self.refused: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}

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

    def refuse(self, reason: str, *names: str) -> None:
        """Flags of other programs that this one cannot follow; `resolve` refuses them with `reason`."""
        for name in names:
            self.refused[name] = reason
            self.add_argument(
                name, action=Translation, to=lambda value: {}, nargs="?", const="", help=argparse.SUPPRESS
            )

    def fix(self, **values: Any) -> None:
        """Values that a program reads and for which this parser offers no flag; a preset cannot set them either."""
        self.fixed |= values

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
    """Resolved values as attributes by dest.

    `sources[dest]` is "default", "preset NAME", "config FILE", "flag", "derived", or "fixed" (the program has no such
    flag).
    """

    sources: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The values as JSON types (paths as text), without the sources."""
        return {key: _jsonable(value) for key, value in sorted(vars(self).items()) if key != "sources"}

    def explicit(self, dest: str) -> bool:
        """Whether the user gave this value (by flag or config file), rather than a default or a preset."""
        source = self.sources.get(dest, "default")
        return source == "flag" or source.startswith("config")

    def open_among(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` (dest -> value) that neither the user nor a preset has set: what a derivation may fill."""
        return {dest: value for dest, value in values.items() if self.sources.get(dest, "default") == "default"}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------ resolution


class _Errors(list[str]):
    """What is wrong so far, and which flags have no value that the rules across flags could speak about."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser
        self.open: set[str] = set()

    def refuse(self, action: argparse.Action | None, message: str) -> None:
        """Note an error in a flag's own value, or in its name (`action`: the flag that was perhaps meant)."""
        self.append(message)
        if action is not None:
            self.open.add(_identity(action))

    def extend_across(self, messages: Sequence[str]) -> None:
        """Add what the rules across flags say, but nothing that names a flag whose value is open.

        In place of the refused value the rule saw a default, so that it would speak of something nobody wrote.
        """
        for message in messages:
            named = (self.parser.find(name) for name in re.findall(r"--[a-z][\w-]*", message))
            if self.open.isdisjoint(_identity(action) for action in named if action is not None):
                self.append(message)


def _identity(action: argparse.Action) -> str:
    """One text for all spellings of a flag."""
    return action.option_strings[0] if action.dest == argparse.SUPPRESS else action.dest


def resolve(
    parser: Parser,
    argv: Sequence[str],
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    validate: Sequence[Callable[[Config], list[str]]] = (),
    derive: Sequence[Callable[[Config], dict[str, Any]]] = (),
) -> Config:
    """Read `argv`: defaults < preset < config file < flags; all errors together, exit code 2.

    `presets`: name -> {dest: value}, an entry "about" describes it. `derive` fills values that follow from others
    (only those that nobody set), before `validate`, whose functions return messages "--flag: reason; cure"; those that
    name a flag whose own value was refused are not shown. `--help`, `--list-presets` and `--print-config` print and
    exit with 0.
    """
    presets = presets or {}
    errors = _Errors(parser)
    given = _scan(parser, argv, errors)
    actions = parser.dests()
    values = {dest: parser.get_default(dest) for dest in actions}
    sources = dict.fromkeys(values, "default") | dict.fromkeys(parser.fixed, "fixed")
    values |= parser.fixed
    if given.pop("list_presets", False):
        _list_presets(presets, parser.fixed)
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
    preset = {
        key: value for key, value in presets.get(name or "", {}).items() if key != "about" and key not in parser.fixed
    }
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
        errors.extend_across(check(config))
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


def _list_presets(presets: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Any]) -> None:
    for name, preset in presets.items():
        print(f"{name}: {preset.get('about', '')}")
        rest = {key: value for key, value in preset.items() if key != "about" and key not in fixed}
        for key, value in rest.items():
            print(f"    --{key.replace('_', '-')} {json.dumps(value)}")


def _looks_like_flag(token: str) -> bool:
    return token.startswith("--") or (len(token) > 1 and token[0] == "-" and token[1].isalpha())


def _scan(parser: Parser, argv: Sequence[str], errors: _Errors) -> dict[str, Any]:
    """The values on the command line; unlike argparse it goes on after an error, so that all of them are seen."""
    given: dict[str, Any] = {}
    loose: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if not _is_text(token):
            errors.append(f"{token[:60]!r}: is no text of UTF-8; rename the file or folder that it names")
            continue
        if not _looks_like_flag(token):
            loose.append(token)
            continue
        if token == "--":
            loose.extend(tokens)
            break
        name, equals, value = token.partition("=")
        action = parser.find(name)
        if action is None:
            message, meant = _unknown(name, parser)
            errors.refuse(meant, message)
            if not equals and tokens and not _looks_like_flag(tokens[0]):
                tokens.popleft()
            continue
        raw = [value] if equals else _take(action, tokens)
        _accept(parser, action, name, raw, given, errors)
    _positionals(parser, loose, given, errors)
    return given


def _is_text(value: str) -> bool:
    """Whether logs and file systems can take it: no lone surrogate (bytes that are no UTF-8), no NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _unknown(name: str, parser: Parser) -> tuple[str, argparse.Action | None]:
    """The message about a flag that does not exist, and the flag that was perhaps meant."""
    known = [option for option, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    near = _nearest("--" + name.lstrip("-").replace("_", "-"), known)
    message = f"{name}: there is no such flag" + (f"; did you mean {near}?" if near else "; --help lists them all")
    return message, parser.find(near) if near else None


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
    parser: Parser, action: argparse.Action, name: str, raw: list[str], given: dict[str, Any], errors: _Errors
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
    if canonical in parser.refused:
        errors.refuse(action, f"{name}: {parser.refused[canonical]}")
        return
    try:
        value = _converted(action, raw)
    except (ValueError, argparse.ArgumentTypeError) as error:
        errors.refuse(action, f"{name}: {error}")
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


def _positionals(parser: Parser, loose: list[str], given: dict[str, Any], errors: _Errors) -> None:
    rest = list(loose)
    for action in parser._get_positional_actions():
        many = action.nargs in ("+", "*")
        raw, rest = (rest, []) if many else (rest[:1], rest[1:])
        name = str(action.metavar or action.dest)
        if raw:
            try:
                given[action.dest] = _converted(action, raw)
            except (ValueError, argparse.ArgumentTypeError) as error:
                errors.refuse(action, f"{name}: {error}")
        elif action.nargs not in ("?", "*") and action.dest not in given:
            errors.append(f"{name}: is missing; see --help")
    errors.extend(f"{item!r}: belongs to no flag; see --help" for item in rest)


def _read_config(parser: Parser, path: Path, errors: _Errors) -> dict[str, Any]:
    """{dest: value} of a JSON file of flags; keys in any spelling, values typed like the flags."""
    try:
        content = read_json(path)
    except ValueError as error:
        errors.append(f'--config: {error}; give a JSON file of flags, one object such as {{"seed": 1}}')
        return {}
    if not isinstance(content, dict):
        errors.append(f'--config: {path} holds no object; it must be one, such as {{"seed": 1}}')
        return {}
    found: dict[str, Any] = {}
    by_dest = parser.dests()
    for key, value in content.items():
        action = parser.find("--" + key) or by_dest.get(key)
        if action is None or isinstance(action, argparse._HelpAction):
            message, meant = _unknown("--" + key, parser)
            message = message.replace("--" + key, f"--config {path}: {key!r}", 1).replace("flag", "key", 1)
            errors.refuse(meant, message)
            continue
        try:
            found.update(_from_json(action, value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            errors.refuse(action, f"--config {path}: {key!r}: {error}")
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
        if fits and isinstance(item, str) and not _is_text(item):
            raise ValueError(f"{item[:60]!r} is no text of UTF-8")
        if not fits:
            wanted = {"int": "a number", "float": "a number", "bitops": "a number or text like 2.2G"}.get(kind, "text")
            raise ValueError(f"{json.dumps(item)} has the wrong type; give {'true or false' if wants_bool else wanted}")
    if action.nargs == 0:
        return {action.dest: action.const if value else action.default}
    converted = _converted(action, [str(item) for item in (value if many else [value])])
    return action.to(converted) if isinstance(action, Translation) else {action.dest: converted}
