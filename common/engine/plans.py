# SPDX-License-Identifier: Apache-2.0
"""Plans: a JSON file that names jobs, with variables in their commands and a set of values for every size.

Text only: placeholders are replaced, nothing is evaluated. docs/sweep.md describes the format.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.engine.files import read_json
from common.engine.jobs import Job

Value = str | list[str]
_VARIABLE = re.compile(r"\{([A-Za-z][\w-]*)\}")
_FOLDER = re.compile(r"\{dir:([^{}]+)\}")
_NEEDED = ("name", "method")
_RESERVED = ("seed", "out", "size", "dir", "rows")
_OF_A_JOB = {"seed": "use --seeds 0 1 2", "dir": "choose another name"}
"""What each job has of its own, so that no grid can set it, and what to do instead."""


@dataclass(frozen=True)
class Template:
    """A job before its variables are filled; `grid`: variable -> values, one job for every combination."""

    name: str
    command: tuple[str, ...]
    method: str = ""
    setting: str = ""
    after: tuple[str, ...] = ()
    row: bool = False
    grid: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Jobs with variables, the variables' values by size, and the commands that make the tables."""

    path: str
    templates: tuple[Template, ...]
    variables: Mapping[str, Value] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    report: tuple[tuple[str, ...], ...] = ()

    def values(self, size: str | None, settings: Iterable[str], out: Path) -> dict[str, Value]:
        """Every variable: its default, then the size's value (size None: the first), then those of `name=value`.

        Raises ValueError for a size or a name that the plan does not have.
        """
        if size is None:
            size = next(iter(self.sizes), "")
        elif size not in self.sizes:
            raise ValueError(f"--size {size}: {self.path} has no such size; {_offer(size, self.sizes)}")
        values = {**self.variables, **self.sizes.get(size, {})}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals or name not in self.variables:
                raise ValueError(f"--set {setting}: is no NAME=VALUE of {self.path}; {_offer(name, self.variables)}")
            values[name] = shlex.split(text) if isinstance(self.variables[name], list) else text
        return {**values, "out": str(out), "size": size}

    def jobs(self, seeds: Sequence[int], values: Mapping[str, Value]) -> list[Job]:
        """The jobs of every seed, in the plan's order. Raises ValueError that names the job and what is wrong."""
        jobs = [job for seed in seeds for job in self._of_seed(seed, values)]
        first: dict[tuple[str, ...], Job] = {}
        for job in jobs:
            if (other := first.setdefault(job.command, job)) is not job:
                raise ValueError(f"{self.path}: {other.key} and {job.key} have the same command; put {{dir}} into it")
        return jobs

    def _of_seed(self, seed: int, values: Mapping[str, Value]) -> list[Job]:
        jobs: dict[str, Job] = {}
        for template in self.templates:
            where = f"{self.path}: job {template.name}"
            for point in _points(template.grid, values, where):
                fill = _Filler({**values, **point, "seed": str(seed)}, jobs, where)
                name = fill.text(template.name)
                if not _stays_inside(name):
                    raise ValueError(f"{where}: name {name!r} leads out of --out; give a name, or names parted by /")
                if name in jobs:
                    raise ValueError(f"{where}: {name} is there twice; put the grid's variables into the name")
                folder = Path(str(values["out"])) / f"s{seed}" / name
                fill.values["dir"] = str(folder)
                after = [*map(fill.jobs_named, template.after), *map(fill.jobs_mentioned, template.command)]
                jobs[name] = Job(
                    name=name,
                    method=fill.text(template.method),
                    setting=fill.text(template.setting),
                    seed=seed,
                    command=tuple(fill.words(template.command)),
                    folder=folder,
                    after=tuple(dict.fromkeys(job.key for found in after for job in found)),
                    row=template.row,
                )
        return list(jobs.values())

    def reports(self, rows: Sequence[Path], values: Mapping[str, Value]) -> list[list[str]]:
        """The commands that make the tables of these run folders."""
        fill = _Filler({**values, "rows": [str(row) for row in rows]}, {}, f"{self.path}: report")
        return [fill.words(command) for command in self.report]


@dataclass
class _Filler:
    """Replaces {variable}, then {dir:NAME}, for one job; `jobs` are those listed before it, by name."""

    values: dict[str, Value]
    jobs: Mapping[str, Job]
    where: str

    def words(self, template: Sequence[str]) -> list[str]:
        """The command: a word that is one list variable gives its words; `[--flag {x}]` goes where {x} is empty."""
        words: list[str] = []
        group: list[str] | None = None
        keep = True
        for word in template:
            if word.startswith("[-") and group is None:
                group, keep, word = [], True, word[1:]
            closes = group is not None and word.endswith("]")
            word = word[:-1] if closes else word
            empty = [name for name in _VARIABLE.findall(word) if self._value(name) in ("", [])]
            if empty and group is None and not isinstance(self._value(empty[0]), list):
                raise ValueError(f"{self.where}: {{{empty[0]}}} is empty; give --set {empty[0]}=VALUE")
            keep = keep and not empty
            (words if group is None else group).extend([] if empty else self._word(word))
            if closes:
                words += group if keep else []
                group = None
        if group is not None:
            raise ValueError(f"{self.where}: a [ without its ]; close the optional flags")
        return words

    def text(self, template: str) -> str:
        """One text with every placeholder replaced."""
        return " ".join(self._word(template)) if template else ""

    def jobs_named(self, pattern: str) -> list[Job]:
        """The jobs before this one whose name is `pattern` (placeholders filled, * stands for anything)."""
        pattern = self._with_variables(pattern)
        found = [job for name, job in self.jobs.items() if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"{self.where}: waits for {pattern}, but no job before it has that name")
        return found

    def jobs_mentioned(self, word: str) -> list[Job]:
        """The jobs whose folders a word names by {dir:NAME}."""
        names = _FOLDER.findall(self._with_variables(word))
        return [job for name in names for job in self.jobs_named(name)]

    def _word(self, word: str) -> list[str]:
        if (whole := _VARIABLE.fullmatch(word)) and isinstance(value := self._value(whole[1]), list):
            return value
        word = self._with_variables(word)
        if whole := _FOLDER.fullmatch(word):
            return [str(job.folder) for job in self.jobs_named(whole[1])]
        return [_FOLDER.sub(lambda match: " ".join(str(job.folder) for job in self.jobs_named(match[1])), word)]

    def _with_variables(self, text: str) -> str:
        def replaced(match: re.Match[str]) -> str:
            value = self._value(match[1])
            return value if isinstance(value, str) else " ".join(value)

        return _VARIABLE.sub(replaced, text)

    def _value(self, name: str) -> Value:
        if name not in self.values:
            raise ValueError(f"{self.where}: there is no variable {{{name}}}; {_offer(name, self.values)}")
        return self.values[name]


def _points(grid: Mapping[str, Value], values: Mapping[str, Value], where: str) -> list[dict[str, Value]]:
    """Every combination of a grid's values; a text such as "{samples}" names a list variable."""
    fill = _Filler(dict(values), {}, where)
    axes = [fill.words([entry]) if isinstance(entry, str) else entry for entry in grid.values()]
    return [dict(zip(grid, point)) for point in itertools.product(*axes)]


def _stays_inside(name: str) -> bool:
    """Whether a job's name, which may have parts, gives a folder below the one of its seed."""
    return "\0" not in name and all(part.strip() not in ("", ".", "..") for part in name.split("/"))


def _offer(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"


def select(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs that `only` names and, before them, all that they wait for; the order stays, nothing named: all.

    An entry is a method, a job's name, the first part of one (pcdarts for pcdarts/train), or a pattern with *.
    Raises ValueError for an entry that names none.
    """
    if not only:
        return list(jobs)
    wanted: set[str] = set()
    for entry in only:
        found = [job for job in jobs if _is_named(job, entry)]
        if not found:
            names = {name for job in jobs for name in (job.method, job.name)}
            raise ValueError(f"--only {entry}: names no job; {_offer(entry, names)}")
        wanted.update(job.key for job in found)
    for job in reversed(jobs):  # a job stands after those that it waits for
        if job.key in wanted:
            wanted.update(job.after)
    return [job for job in jobs if job.key in wanted]


def _is_named(job: Job, entry: str) -> bool:
    return job.method.lower() == entry.lower() or job.name.startswith(f"{entry}/") or fnmatchcase(job.name, entry)


# ------------------------------------------------------------------------------------------------------------ reading


def read_plan(path: Path) -> Plan:
    """Read a plan file. Raises ValueError that names the file, the field and what it must be."""
    data = read_json(path)
    where = str(path)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: is no JSON object; a plan has jobs, or a command and a grid")
    seeds = data.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{where}: seeds must be a list of whole numbers from 0 up")
    if "command" in data:
        _check_keys(data, ("about", "command", "grid", "seeds"), where)
        grid = _variables(data.get("grid", {}), f"{where}: grid")
        return grid_plan(_command(data["command"], where), grid, seeds, where)
    _check_keys(data, ("about", "seeds", "variables", "sizes", "jobs", "report"), where)
    jobs, sizes, report = data.get("jobs"), data.get("sizes", {}), data.get("report", [])
    if not (isinstance(jobs, list) and jobs and isinstance(sizes, dict) and isinstance(report, list)):
        raise ValueError(f"{where}: jobs (at least one) and report must be lists, sizes an object of names and values")
    variables = _variables(data.get("variables", {}), f"{where}: variables")
    if taken := sorted(set(variables) & set(_RESERVED)):
        raise ValueError(f"{where}: variables: {taken[0]} has a meaning of its own; choose another name")
    sizes = {name: _variables(entry, f"{where}: size {name}") for name, entry in sizes.items()}
    for name, entry in sizes.items():
        _check_keys(entry, variables, f"{where}: size {name}")
    return Plan(
        path=where,
        templates=tuple(_template(job, f"{where}: job {number}") for number, job in enumerate(jobs, 1)),
        variables=variables,
        sizes=sizes,
        seeds=tuple(seeds),
        report=tuple(_command(command, f"{where}: report") for command in report),
    )


def grid_plan(command: Sequence[str], grid: Mapping[str, Value], seeds: Sequence[int], path: str = "--grid") -> Plan:
    """One command over the values of some of its flags.

    Flags and seed are appended where the command has no placeholder for them, and so is `--save DIR --resume auto`
    where it says nothing of {dir}.
    """
    _check_grid(grid, path)
    words = list(command)
    for name in (*grid, "seed"):
        if f"{{{name}}}" not in " ".join(words):
            words += [f"--{name}", f"{{{name}}}"]
    if "{dir}" not in " ".join(words):
        words += ["--save", "{dir}", "--resume", "auto"]
    setting = " ".join(f"{name}={{{name}}}" for name in grid)
    name = "_".join(f"{name}-{{{name}}}" for name in grid) or "run"
    program = next((word for word in command if word.endswith(".py")), command[0])
    template = Template(name, tuple(words), Path(program).parent.name or program, setting, row=True, grid=grid)
    return Plan(path, (template,), seeds=tuple(seeds))


def _template(data: Any, where: str) -> Template:
    if not isinstance(data, dict) or not all(data.get(key) and isinstance(data[key], str) for key in _NEEDED):
        raise ValueError(f"{where}: needs the texts {' and '.join(_NEEDED)}, and a command")
    where = f"{where} ({data['name']})"
    _check_keys(data, ("about", "name", "method", "setting", "command", "after", "row", "grid"), where)
    grid = _variables(data.get("grid", {}), f"{where}: grid")
    _check_grid(grid, f"{where}: grid")
    after = data.get("after", [])
    if not isinstance(after, list) or not all(isinstance(entry, str) for entry in after):
        raise ValueError(f"{where}: after must be a list of names of jobs")
    return Template(
        name=data["name"],
        command=_command(data.get("command"), where),
        method=data["method"],
        setting=str(data.get("setting", "")),
        after=tuple(after),
        row=data.get("row", False) is True,
        grid=grid,
    )


def _check_grid(grid: Mapping[str, Value], where: str) -> None:
    for name, cure in _OF_A_JOB.items():
        if name in grid:
            raise ValueError(f"{where}: {name} has a meaning of its own; {cure}")


def _command(data: Any, where: str) -> tuple[str, ...]:
    """A command's words, from a list of them or from one text that is quoted as in a shell."""
    try:
        words = shlex.split(data) if isinstance(data, str) else [str(word) for word in data]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the command cannot be read ({error}); give a text or a list of words") from None
    if not words:
        raise ValueError(f"{where}: the command is empty")
    return tuple(words)


def _variables(data: Any, where: str) -> dict[str, Value]:
    """Names with texts or lists of texts; numbers become texts."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: must be an object of names and values")
    values: dict[str, Value] = {}
    for name, value in data.items():
        if not _VARIABLE.fullmatch(f"{{{name}}}") or isinstance(value, dict | bool | None):
            raise ValueError(f"{where}: {name}: give a name of letters, digits and - and a text, a number or a list")
        values[name] = [str(item) for item in value] if isinstance(value, list) else str(value)
    return values


def _check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: there is no field {key}; {_offer(key, known)}")
