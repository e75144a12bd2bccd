# SPDX-License-Identifier: Apache-2.0
"""A run once more, from its config.json: the same program with the same flags, and whether the same came out.

What the command line named is given again, value by value; the rest follows from the same preset, defaults and rules,
and is compared with what the run had before anything starts. Of a run folder from elsewhere nothing is executed: only
the project's own programs are started, and code of one's own (--data-module, --search-space) only when that is asked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.engine.changes import changes_of, flag, owner_of
from common.engine.environment import ROOT, describe
from common.engine.files import check_schema, read_json

# Said anew: where the run goes. Said by their values: presets apart, what other flags and files brought together.
_PLACES = frozenset(
    ("save", "runs", "resume", "allow_config_change", "config", "preset", "print_config", "list_presets", "dry_run")
)
OWN_CODE = {"data_module": "FILE.py:FUNCTION", "search_space": "FILE.py"}
"""Keys of config.json that name a file of Python which the run executes, and what their flags take."""


_KEY = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Repeat:
    """How a run is started again. `flags` lack the place; `processes` is how many shared the work."""

    run: Path
    record: Mapping[str, Any]
    program: Path
    flags: tuple[str, ...]
    folder: Path
    processes: int

    def command(self, *more: str) -> list[str]:
        """The words to start, in `folder`; several processes are started by torchrun on this machine.

        -P: else -m would put that folder, which config.json names, before torch's own on the path of modules.
        """
        launcher = ["-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        words = [sys.executable, *(launcher if self.processes > 1 else ()), str(self.program)]
        return [*words, *self.flags, *more]

    def text(self, save: Path) -> str:
        """The command as one types it."""
        return f"cd {shlex.quote(str(self.folder))} && {shlex.join(self.command('--save', str(save)))}"


def read_repeat(run: Path, *, folder: Path | None = None, own_code: bool = False) -> Repeat:
    """How to start `run` again, by its config.json.

    `folder`: from where its relative paths count (default: where it was started). `own_code`: whether files of Python
    that its flags name may be executed. Raises ValueError naming the file, the field and the cure.
    """
    path = run / "config.json"
    record = check_schema(read_json(path), 1, str(path), "a run's configuration")
    for key, kind in (("config", dict), ("sources", dict), ("method", str), ("stage", str)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{path}: {key} is missing or of the wrong type")
    sides = (record["config"], _given(record))
    code = [flag(dest) for dest in OWN_CODE if any(side.get(dest) is not None for side in sides)]
    if code and not own_code:
        raise ValueError(
            f"{path}: {' and '.join(code)} name Python files, which the run would execute; read them, then add "
            "--own-code"
        )
    place = folder if folder is not None else Path(str(record.get("cwd") or Path.cwd()))
    if not place.is_dir():
        raise ValueError(
            f"{path}: the run was started in {place}, which is not here; give --cwd DIR, from which its relative "
            "paths count"
        )
    processes = record.get("processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or not 1 <= processes <= 1024:
        raise ValueError(f"{path}: processes: {processes!r} is no number of processes")
    return Repeat(run, record, _program(path, record), tuple(_flags(record, path)), place.resolve(), processes)


def _program(path: Path, record: Mapping[str, Any]) -> Path:
    """The program's file, one of this project's. A config.json is data: what it names is not executed otherwise."""
    named = record.get("program") or f"{record['method']}/{record['stage']}.py"
    program = (ROOT / str(named)).resolve()
    parts = program.relative_to(ROOT.resolve()).parts if program.is_relative_to(ROOT.resolve()) else ()
    if len(parts) != 2 or parts[1] != f"{record['stage']}.py" or not program.is_file():
        raise ValueError(f"{path}: {named} is no program of this project; start it by hand, with the flags of argv")
    return program


def _given(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What flags said before something else followed from them."""
    given = record["config"].get("given")
    return given if isinstance(given, dict) else {}


def _flags(record: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The flags whose values somebody gave, one word each (lists: several), and the preset.

    Raises ValueError for a key or value of `path` that the program would read as another flag.
    """
    config, given = record["config"], _given(record)
    if config.get("preset") is not None:
        yield f"--preset={config['preset']}"
    for dest, value in sorted({**config, **given}.items()):
        if not _KEY.fullmatch(dest):
            raise ValueError(f"{path}: {dest[:60]!r} is no flag's key; start the run by hand, with the flags of argv")
        source = str(record["sources"].get(dest, "default"))
        if dest in _PLACES or not (dest in given or source == "flag" or source.startswith("config ")):
            continue
        words = [_word(entry) for entry in (value if isinstance(value, list) else [value])]
        if wrong := [word for word in words if word.startswith("-") and not _is_number(word)]:
            raise ValueError(
                f"{path}: {dest}: {wrong[0][:60]!r} begins as a flag does; start the run by hand, by its argv"
            )
        if isinstance(value, list):
            yield from (flag(dest), *words)
        else:
            yield f"{flag(dest)}={words[0]}"
    threads = (record.get("device") or {}).get("threads") if isinstance(record.get("device"), dict) else None
    if config.get("threads") is None and isinstance(threads, int):
        yield f"--threads={threads}"  # sums are split among them


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def free_folder(run: Path) -> Path:
    """RUN-repeat, or the first of RUN-repeat-2, -3 ... that is not there."""
    base, number = run.resolve(), 1
    while True:
        found = base.with_name(f"{base.name}-repeat" + (f"-{number}" if number > 1 else ""))
        if not found.exists():
            return found
        number += 1


def differences_here(repeat: Repeat) -> list[str]:
    """What is not as when the run was made, so that not the same may come out: git, versions, device, changed flags."""
    record, now = repeat.record, describe(repeat.record["config"].get("device"))
    lines = [f"{key}: {record.get(key)} -> {now[key]}" for key in now if record.get(key) != now[key]]
    for one in changes_of(record):
        lines.append(
            f"{flag(str(one.get('flag')))}: changed on the way from {one.get('before')} to {one.get('after')}, which "
            "the repeat has from its start"
        )
    return lines


def check_flags(repeat: Repeat) -> None:
    """Raise ValueError when defaults or presets have changed, so that the flags no longer give the run's values.

    The program itself is asked (--print-config); values that follow from files or data are compared afterwards.
    """
    command = [sys.executable, str(repeat.program), *repeat.flags, "--print-config"]
    done = subprocess.run(command, cwd=repeat.folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{repeat.run}: its flags are refused here:\n{done.stderr.strip()}")
    record, lines = repeat.record, []
    for dest, value in _printed(done.stdout).items():
        known = dest in record["config"] and dest not in _PLACES and dest != "threads"
        if known and record["sources"].get(dest, "default") != "derived":
            was = record["config"][dest]
            if was not in (value, *(value if isinstance(value, list) and len(value) == 1 else ())):
                lines.append(f"{flag(dest)}: {json.dumps(was)} -> {json.dumps(value)}")
    if lines:
        raise ValueError(
            f"{repeat.run}: defaults or presets have changed since, so that its flags give other values:\n  "
            + "\n  ".join(lines)
            + f"\ncheck out its version ({(record.get('git') or {}).get('commit', 'unknown')}) to repeat it"
        )


def _printed(text: str) -> dict[str, Any]:
    """Names and values of the lines that --print-config prints: name, JSON, source."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        try:
            found[name], _ = json.JSONDecoder().raw_decode(rest.lstrip())
        except json.JSONDecodeError:
            continue  # a note about another flag
    return found


def start(repeat: Repeat, save: Path) -> int:
    """Run it in the folder `save`, its output going where ours goes; the exit code."""
    environment = _environment()
    environment.pop("TORCHELASTIC_RESTART_COUNT", None)
    return subprocess.run(
        repeat.command("--save", str(save)), cwd=repeat.folder, env=environment, check=False
    ).returncode


def _environment() -> dict[str, str]:
    """Ours, in which no process imports modules from the folder that it is started in, as that is config.json's word.

    Relative entries of PYTHONPATH (an empty one is the working folder) stay those of here and now.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if path := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    return environment


# ----------------------------------------------------------------------------------------------------- what came out


def compare(first: Path, second: Path) -> list[str]:
    """How two runs agree: configuration, history.jsonl and the weights of the newest checkpoint, a line each."""
    return [_compare_configs(first, second), _compare_histories(first, second), _compare_weights(first, second)]


def _compare_configs(first: Path, second: Path) -> str:
    sides = []
    for run in (first, second):
        record = read_json(run / "config.json")
        volatile = record.get("volatile") or []
        sides.append({k: v for k, v in record["config"].items() if k not in volatile and v is not None})
    unequal = [key for key in sorted({*sides[0], *sides[1]}) if sides[0].get(key) != sides[1].get(key)]
    listed = "; ".join(f"{flag(key)}: {sides[0].get(key)} -> {sides[1].get(key)}" for key in unequal)
    return f"flags: differ: {listed}" if unequal else "flags: equal"


def _compare_histories(first: Path, second: Path) -> str:
    paths = [run / "history.jsonl" for run in (first, second)]
    if not all(path.is_file() for path in paths):
        return "history: none to compare"
    mine, theirs = (path.read_bytes().splitlines() for path in paths)
    for number, (one, other) in enumerate(zip(mine, theirs, strict=False), 1):
        if one != other:
            return f"history: differs from epoch {number} on"
    if len(mine) != len(theirs):
        return f"history: equal in the {min(len(mine), len(theirs))} epochs that both have ({len(mine)}, {len(theirs)})"
    return f"history: equal, {len(mine)} epochs"


def _compare_weights(first: Path, second: Path) -> str:
    import torch

    from common.engine.checkpoint import CheckpointStore

    found = []
    for run in (first, second):
        owner = owner_of(read_json(run / "config.json"))
        newest = CheckpointStore(run / "checkpoints", config_digest=owner).latest()
        if newest is None or not isinstance(newest[0].get("model"), dict):
            return f"weights: {run} has none"
        found.append((newest[0]["model"], newest[1]["step"]))
    (mine, step), (theirs, other) = found
    if step != other:
        return f"weights: of steps {step} and {other}, not compared"
    unequal = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
    if unequal or mine.keys() != theirs.keys():
        return f"weights: differ in {len(unequal)} of {len(mine)} tensors" + (f", first {unequal[0]}" * bool(unequal))
    return f"weights: bit for bit equal after step {step}, {len(mine)} tensors"


def report_lines(lines: Sequence[str]) -> str:
    """Lines below each other, indented."""
    return "\n".join(f"  {line}" for line in lines)
