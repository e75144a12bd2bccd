# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a crash cannot tear and a bad disk cannot fake.

One folder a checkpoint, `step-00001234/{state.pt, meta.json}`, written as `.tmp-<pid>-step-00001234`, synced, read
back, and renamed: a folder with that name is whole. meta.json holds the sha256 of every file and of itself, so a
flipped bit (which torch.load alone does not see), a truncation or a swapped file is found out. Which checkpoint is the
newest is found by looking at the folders, by number; there is no pointer file that could point wrong.

States are loaded with weights_only=True: a checkpoint from elsewhere is data, never code.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.engine.distributed import is_main, world_size
from common.engine.files import TEMPORARY, check_schema, fsync_folder, plain, read_json, read_regular, write_synced
from common.engine.safe_load import load_plain
from common.engine.shortage import is_shortage

SCHEMA = 1
STATE, META = "state.pt", "meta.json"
# `.replaced` is the step's former checkpoint while a newer one of the same step takes its name.
_NAME = re.compile(r"step-(\d{1,18})(\.replaced)?")
_LEAVES = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_LIMIT_META = 4 * 2**20
_FIELDS = {"step": int, "epoch": int, "config_digest": str, "files": dict, "extra": dict}


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, meta) of one checkpoint folder, its tensors on the CPU.

    Raises ValueError, naming the folder, when a file is missing, its digest does not fit, or state.pt holds anything
    but tensors and plain values (the message then names the refused global).
    """
    data, meta = _verified(Path(path))
    state = load_plain(data, f"{path}/{STATE}")
    if not isinstance(state, dict):
        raise ValueError(f"{path}/{STATE}: holds a {type(state).__name__}, not a dict of states")
    return state, meta


@contextmanager
def taking_up(what: str) -> Iterator[None]:
    """Around code that takes a loaded state apart. Raises ValueError that begins with `what` where it does not fit.

    A digest says that a state is as it was written, not that this version wrote it for this purpose.
    """
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(what) else ValueError(f"{what}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_shortage(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines)[:300]}"
        raise ValueError(f"{what}: the checkpoint does not hold what is looked for ({reason})") from error


class CheckpointStore:
    """The checkpoints of one run. One process writes; any number may read.

    `keep`: how many of the newest valid ones stay (at least 2 are sensible: the newest may turn out broken later).
    `config_digest` marks whose they are; one with another digest is not this run's. `on_message` hears what was
    skipped and why. `extra`, when set, gives JSON that is stored with each checkpoint (meta["extra"]).
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        config_digest: str,
        on_message: Callable[[str], None] | None = None,
        extra: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay")
        self.folder = Path(folder)
        self.keep = keep
        self.config_digest = config_digest
        self.extra = extra
        self._tell = on_message or _to_stderr

    def save(self, state: dict[str, Any], *, step: int, epoch: int, note: str = "") -> Path:
        """Write the state after `step` steps and return its folder; then drop the oldest beyond `keep`.

        On ranks above 0 nothing is written. Raises ValueError for a state that weights_only=True could not load again
        (naming the entry), OSError when the disk refuses (full, read-only, quota): nothing of the failed save stays and
        the earlier ones are untouched.
        """
        if not is_main():
            return self.folder / f"step-{step:08d}"
        check_loadable(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        meta = self._meta(data, step, epoch, note)
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f"{TEMPORARY}{os.getpid()}-{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            aside.mkdir()
            write_synced(aside / STATE, data)
            write_synced(aside / META, json.dumps(meta, indent=1).encode() + b"\n")
            fsync_folder(aside)
            _verified(aside)  # what the disk gives back, before anything older is dropped
            self._rename(aside, final)
        except (OSError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            message = f"the checkpoint of step {step} could not be saved in {self.folder}: {reason}"
            raise OSError(getattr(error, "errno", None) or errno.EIO, message) from error
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune(final)
        return final

    def latest(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state, meta) of the newest valid checkpoint, None when there is none; meta["path"] is its folder.

        Every newer one that is broken or another configuration's is skipped and told with the reason.
        """
        for path in self._newest_first():
            try:
                state, meta = load_state(path)
                self._check_owner(path, meta)
            except ValueError as error:
                self._tell(f"checkpoint skipped: {error}")
                continue
            return state, {**meta, "path": str(path)}
        return None

    def newest_digest(self) -> str | None:
        """sha256 of the state in the newest valid checkpoint, None when there is none."""
        newest = next(self._valid(), None)
        return None if newest is None else state_digest(_verified(newest)[1])

    def steps(self) -> list[int]:
        """The step numbers of the checkpoints that lie there, valid or not, ascending."""
        return sorted({_parse(path)[0] for path in self._newest_first()})

    def abandon_newer(self, step: int) -> list[Path]:
        """Set the checkpoints after `step` aside (renamed `abandoned-...`), for a run that goes on from an earlier one.

        Otherwise the next resume would take up the future that the user turned away from.
        """
        moved = []
        for path in self._newest_first():
            if _parse(path)[0] > step:
                stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
                moved.append(path.rename(path.with_name(f"abandoned-{stamp}-{path.name}")))
        return moved

    def _meta(self, data: memoryview, step: int, epoch: int, note: str) -> dict[str, Any]:
        meta = {
            "schema": SCHEMA,
            "step": step,
            "epoch": epoch,
            "note": note,
            "config_digest": self.config_digest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": str(torch.__version__),
            "world_size": world_size(),
            "files": {STATE: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}},
            "extra": plain(self.extra() if self.extra else {}),
        }
        return {**meta, "meta_sha256": _own_digest(meta)}

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_parse, reverse=True)

    def _check_owner(self, path: Path, meta: dict[str, Any]) -> None:
        if meta["config_digest"] != self.config_digest:
            raise ValueError(f"{path}: belongs to another configuration")

    def _valid(self) -> Iterator[Path]:
        for path in self._newest_first():
            try:
                self._check_owner(path, _verified(path)[1])
            except ValueError:
                continue
            yield path

    def _rename(self, aside: Path, final: Path) -> None:
        """Give the finished folder its name; at every instant a whole checkpoint of that step is visible."""
        former = final.with_name(final.name + ".replaced")
        if final.exists():
            if former.exists():
                self._remove(former)
            os.rename(final, former)
        try:
            os.rename(aside, final)
        except OSError:
            if former.exists() and not final.exists():
                os.rename(former, final)
            raise
        fsync_folder(self.folder)
        if former.exists():
            self._remove(former)

    def _prune(self, saved: Path) -> None:
        """Drop what is older than the `keep` newest valid ones. Fewer valid ones than that: nothing is dropped."""
        valid = self._valid()
        oldest = None
        for _ in range(self.keep):
            oldest = next(valid, None)
            if oldest is None:
                return
        for path in self._newest_first():
            if _parse(path) < _parse(oldest) and path != saved:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a crash inside rmtree must not leave half a checkpoint under a checkpoint's name.
        aside = self.folder / f"{TEMPORARY}{os.getpid()}-old-{path.name}"
        try:
            os.rename(path, aside)
            shutil.rmtree(aside)
        except OSError as error:  # the new checkpoint is safe, so a full disk is the worst that can follow: say it
            self._tell(f"old checkpoint {path} could not be removed: {error}")

    def _sweep(self) -> None:
        """Remove what a killed process left half-written. The run's lock makes this process the only writer."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


def state_digest(meta: dict[str, Any]) -> str:
    """sha256 of the state that a checkpoint's meta belongs to."""
    return meta["files"][STATE]["sha256"]


def check_loadable(value: Any, name: str = "state") -> None:
    """Raise ValueError, naming the entry, for what weights_only=True refuses: numpy scalars, namedtuples, paths, ...

    Better now, loudly, than on the day of the resume.
    """
    kind = type(value)
    if value is None or kind in _LEAVES or kind is torch.nn.Parameter or kind is Tensor:
        return
    if kind is dict or kind is collections.OrderedDict:
        for key, item in value.items():
            if type(key) not in (str, int, float, bool, tuple):
                raise ValueError(f"{name}: key {key!r} is a {type(key).__name__}; use a string or a number")
            check_loadable(item, f"{name}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            check_loadable(item, f"{name}[{index}]")
    else:
        raise ValueError(f"{name}: a {kind.__module__}.{kind.__name__} cannot be loaded again with weights_only=True")


def _verified(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of state.pt and meta.json, digests and step checked; ValueError names what is wrong."""
    meta = read_json(path / META, limit=_LIMIT_META)
    check_schema(meta, SCHEMA, f"{path}/{META}", "a checkpoint's meta")
    for key, kind in _FIELDS.items():
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{path}/{META}: {key} is missing or of the wrong type")
    if meta.get("meta_sha256") != _own_digest(meta):
        raise ValueError(f"{path}/{META}: its digest does not fit; the file was damaged or changed")
    name = _NAME.fullmatch(path.name)  # None while it is still being written, or when a user gave the copy a name
    if name is not None and int(name[1]) != meta["step"]:
        raise ValueError(f"{path}: holds step {meta['step']}, not the one in its name")
    entry = meta["files"].get(STATE)
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise ValueError(f"{path}/{META}: does not say how long {STATE} is")
    data = read_regular(path / STATE, entry["bytes"], "state")
    if entry["bytes"] != len(data):
        raise ValueError(f"{path}/{STATE}: {len(data):,} bytes, not as many as meta.json says: truncated or replaced")
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise ValueError(f"{path}/{STATE}: its sha256 does not fit meta.json; the file was damaged or replaced")
    return data, meta


def _own_digest(meta: dict[str, Any]) -> str:
    body = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parse(path: Path) -> tuple[int, bool]:
    """Sort key: by number, and a step's own folder above its replaced one."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), match[2] is None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
