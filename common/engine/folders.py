# SPDX-License-Identifier: Apache-2.0
"""Run folders: what lies where in one, naming and finding them, and holding one for one process."""

from __future__ import annotations

import errno
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from common.engine.files import TEMPORARY, check_schema, read_json
from common.engine.identity import Identity

SCHEMA = 1
CONFIG, LOG, METRICS, HISTORY, RESULT = "config.json", "log.txt", "metrics.csv", "history.jsonl", "result.json"
TENSORBOARD, CHECKPOINTS, LOCK = "tensorboard", "checkpoints", ".lock"
OWN = (CONFIG, LOG, METRICS, HISTORY, RESULT)
"""The files that a run writes itself."""
_LOCK_PATIENCE = 5.0  # seconds; a killed process may take a moment to let go


def make_folder(root: Path, identity: Identity) -> Path:
    """A new folder of a name that nobody has; mkdir is exclusive, so parallel jobs never share one."""
    parent = _parent(root, identity)
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    name = f"{_safe(identity.dataset)}-s{identity.seed}-{stamp}"
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _parent(root: Path, identity: Identity) -> Path:
    return Path(root) / f"{_safe(identity.method)}-{_safe(identity.stage)}"


def _safe(word: str) -> str:
    """A word for a folder's name: no separators, no leading dot, whatever a data set is called."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", word).lstrip(".-") or "unnamed"


def newest(root: Path, identity: Identity) -> Path | None:
    """The newest run of the same configuration under `root`."""
    found: list[tuple[str, int, Path]] = []
    for config in _parent(root, identity).glob(f"*/{CONFIG}"):
        name = re.fullmatch(r".*-(\d{8}T\d{6})(?:-(\d+))?", config.parent.name)
        try:
            same = not identity.changes(read_config(config.parent))
        except ValueError:
            continue  # not a run's config.json: not the one that is looked for
        if name and same:
            found.append((name[1], int(name[2] or 1), config.parent))
    return max(found)[2] if found else None


def named(path: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None) of --resume PATH: a run, its checkpoints folder, or one checkpoint."""
    path = path.resolve()
    if not path.exists():
        raise ValueError(f"--resume {path}: there is no such folder; name a run's folder or one of its checkpoints")
    if path.is_file():
        path = path.parent
    if (path / CONFIG).is_file():
        return path, None
    if path.name == CHECKPOINTS:
        return path.parent, None
    if path.parent.name == CHECKPOINTS:
        return path.parent.parent, path
    raise ValueError(f"--resume {path}: neither a run's folder (no {CONFIG}) nor a checkpoint of one")


def is_empty(folder: Path) -> bool:
    """True for a folder that is missing or holds nothing but a lock and what a killed process left unfinished."""
    folder = Path(folder)
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise ValueError(f"--save {folder}: a file, not a folder; name another")
    return all(path.name == LOCK or path.name.startswith(TEMPORARY) for path in folder.iterdir())


def refuse_links(folder: Path, flag: str) -> None:
    """Raise ValueError when one of the run's own files is a link out of its folder: writing, cutting back and removing
    would change what lies elsewhere.
    """
    home = folder.resolve()
    for path in (folder / name for name in (*OWN, TENSORBOARD, CHECKPOINTS, LOCK)):
        if path.is_symlink() and home not in path.resolve().parents:
            raise ValueError(
                f"{flag}: {path} is a link out of the run's folder, where nothing is written; put what it points to in "
                "its place"
            )


def is_finished(folder: Path) -> bool:
    """Whether result.json says that the run there ended."""
    if not (folder / RESULT).exists():
        return False
    result = read_json(folder / RESULT)
    return isinstance(result, dict) and result.get("finished") is True


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of the run there. Raises ValueError naming the file where it is none."""
    config = check_schema(read_json(folder / CONFIG), SCHEMA, str(folder / CONFIG), "a run's configuration")
    if not isinstance(config.get("config"), dict):
        raise ValueError(f"{folder / CONFIG}: config is missing or of the wrong type")
    if not isinstance(config.get("sessions", []), list):
        raise ValueError(f"{folder / CONFIG}: sessions is not a list")
    return config


def hold(folder: Path) -> IO[str] | None:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two runs in one folder are then the user's care
        return None
    try:  # not through a link, which would empty the file that it points to
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{folder / LOCK}: a link, through which nothing is written; remove it") from error
    file = os.fdopen(handle, "a+", encoding="utf-8")  # held open on purpose
    give_up = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > give_up:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise ValueError(f"{folder}: another process ({holder}) runs there; wait for it or stop it") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def is_held(folder: Path) -> bool | None:
    """Whether a process works in a run's folder; None where that cannot be told (no lock file, no such locks).

    Not for a process that holds the folder itself: to look at its own lock would let go of it.
    """
    try:
        import fcntl

        file = open(folder / LOCK, encoding="utf-8")  # noqa: SIM115 (closed below)
    except (ImportError, OSError):
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return None
    return False
