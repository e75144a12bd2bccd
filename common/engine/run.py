# SPDX-License-Identifier: Apache-2.0
"""Run folders: one folder holds everything about one search or training, and nothing in it is ever overwritten.

    config.json     resolved flags, where each came from, command line, git commit, versions, devices, all sessions
    log.txt         what was said, with times
    metrics.csv     one row a log point; tensorboard/ shows the same
    history.jsonl   one object an epoch
    checkpoints/    see checkpoint.py
    result.json     last; a run is finished exactly when it is there

metrics.csv and history.jsonl only grow. A checkpoint notes how long they were when it was made, and a resume cuts them
back to that: no row twice, none missing, whatever happened in between. The TensorBoard events are written anew from
both then, since a killed process leaves its last events unwritten. (design.md 4 and 5.)
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from common.engine import distributed
from common.engine.board import Board, Painter
from common.engine.changes import MISSING, Change, as_text, check_epochs, effects, owner_of
from common.engine.checkpoint import CheckpointStore, load_state
from common.engine.environment import describe, started_as
from common.engine.files import TEMPORARY, check_schema, fsync_folder, plain, read_json, unwritten, write_json
from common.engine.progress import duration, say

SCHEMA = 1
CONFIG, LOG, METRICS, HISTORY, RESULT = "config.json", "log.txt", "metrics.csv", "history.jsonl", "result.json"
TENSORBOARD, CHECKPOINTS, LOCK = "tensorboard", "checkpoints", ".lock"
# Flags that never change what a run computes (a preset counts by the values it gave); `volatile` adds the callers' own.
VOLATILE = frozenset(
    {"save", "runs", "root", "resume", "config", "preset", "print_config", "list_presets", "dry_run"}
    | {"allow_config_change", "quiet", "tensorboard", "plots", "workers", "checkpoint_minutes", "keep_checkpoints"}
)
_GROWING = (METRICS, HISTORY)
_OWN = (CONFIG, LOG, *_GROWING, RESULT)
_LOCK_PATIENCE = 5.0  # seconds; a killed process may take a moment to let go


@dataclass(frozen=True)
class _Identity:
    """What makes two runs the same run."""

    method: str
    stage: str
    dataset: str
    seed: int
    config: dict[str, Any]
    volatile: frozenset[str]
    contents: Mapping[str, str]

    def fields(self) -> dict[str, Any]:
        """Every key that matters, with its value. None is the same as not there: flags may come later."""
        own = {"method": self.method, "stage": self.stage, "dataset": self.dataset, "seed": self.seed}
        matter = {key: value for key, value in self.config.items() if key not in self.volatile and value is not None}
        return {**own, **matter}

    def digest(self) -> str:
        """sha256 of `fields`."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()

    def changes(self, saved: Mapping[str, Any]) -> list[Change]:
        """Every key that matters and differs from a saved config.json (None: as not there).

        A content's digest that the saved one does not have yet is as it was; where the place is another, it is that
        which is told.
        """
        old = {key: saved.get(key) for key in ("method", "stage", "dataset", "seed")}
        old |= {key: value for key, value in saved["config"].items() if key not in self.volatile}
        new = self.fields()
        found = []
        for key in sorted({*old, *new}):
            if json.dumps(old.get(key)) == json.dumps(new.get(key)):
                continue
            before, after = (json.dumps(side[key]) if key in side else MISSING for side in (old, new))
            place = self.contents.get(key)
            if place is None:
                found.append(Change(key, before, after))
            elif key in old and json.dumps(old.get(place)) == json.dumps(new.get(place)):
                found.append(Change(key, before, after, place, str(new.get(place))))
        return found


@dataclass(frozen=True)
class _Place:
    """Where a run goes and how it begins there."""

    folder: Path
    start: Literal["fresh", "resumed", "finished"]
    digest: str  # of the run's configuration, as the run there knows it
    checkpoint: Path | None = None  # the one to go on from
    meta: dict[str, Any] | None = None  # and its meta.json
    owner: str | None = None  # digest that its checkpoints bear, where flags have changed since the first
    changed: tuple[dict[str, Any], ...] = ()  # flags that change now, as config.json notes them


class Run:
    """A run folder that is open. Made by `Run.open`; a context manager, `close` lets go of the folder.

    On ranks above 0 everything that writes does nothing. Attributes: `folder`, `checkpoints`, `config` (plain JSON
    values), `digest` (of what matters in the configuration), `already_finished`, `resumed_step` (None when fresh).
    """

    folder: Path
    checkpoints: CheckpointStore
    already_finished: bool
    resumed_step: int | None

    def __init__(self, identity: _Identity, *, quiet: bool, tensorboard: bool) -> None:
        """Not for callers: `Run.open` makes runs. No file is open yet."""
        self.config, self.digest = identity.config, identity.digest()
        self._owner = self.digest  # whose the checkpoints are
        self._identity, self._quiet, self._tensorboard = identity, quiet, tensorboard
        self._main = distributed.is_main()
        self._lock: IO[str] | None = None
        self._log: IO[str] | None = None
        self._early: list[str] = []  # said before log.txt was open
        self._growing: dict[str, IO[str]] = {}
        self._board: Board | None = None
        self._painter: Painter | None = None
        self._artefacts: dict[str, str] = {}
        self._columns: list[str] | None = None
        self._last_step: int | None = None
        self._last_epoch: int | None = None
        self._checkpoint: Path | None = None
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @classmethod
    def open(
        cls,
        *,
        method: str,
        stage: str,
        dataset: str,
        seed: int,
        config: Mapping[str, Any],
        sources: Mapping[str, str],
        argv: Sequence[str],
        root: Path = Path("runs"),
        save: Path | None = None,
        resume: Literal["auto"] | Path | None = None,
        volatile: Iterable[str] = (),
        contents: Mapping[str, str] | None = None,
        changeable: Mapping[str, str] | None = None,
        keep: int = 2,
        quiet: bool = False,
        tensorboard: bool = True,
    ) -> Run:
        """Start a run in a folder of its own, or go on with one.

        `save`: the folder; without it `root/<method>-<stage>/<dataset>-s<seed>-<UTC time>` is made. `resume`: None
        starts (a `save` that holds something is refused); "auto" goes on with the newest valid checkpoint of the same
        configuration, or starts where there is none; a path names a run or one of its checkpoints. A restart by
        torchrun implies "auto". `volatile`: keys of `config` that do not matter for sameness, beside VOLATILE.
        `contents`: digest's key in `config` -> the key that says where its content lies; a run from before that
        digest was noted still counts as the same. `changeable`: keys that may differ from the run that goes on, each
        with what is no longer exact then (`changes.CHANGEABLE`); None: none may.

        Raises ValueError (flag, reason, cure): the folder is in use, holds another configuration (with the
        difference), something else, or nothing valid to go on from; OSError when it cannot be written.
        """
        values = plain(dict(config), "config")
        identity = _Identity(method, stage, dataset, seed, values, VOLATILE | {*volatile}, contents or {})
        if resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            resume = "auto"
        run = cls(identity, quiet=quiet, tensorboard=tensorboard)
        failure: Exception | None = None
        place: _Place | None = None
        if run._main:
            try:
                place = run._settle(root, save, resume, keep, changeable)
                if place.start != "finished":
                    run._enter(place, sources, argv)
            except (ValueError, OSError) as error:
                failure = error
                run.close()
        failure, place = distributed.broadcast((failure, place))
        if failure is not None or place is None:
            raise failure or RuntimeError("rank 0 gave no folder")
        run._take(place, keep)
        return run

    def log(self, text: str) -> None:
        """Say it on stdout (not when quiet) and keep it in log.txt with the time."""
        if not self._main:
            return
        if not self._quiet:
            say(text)
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = [f"{stamp} {line}\n" for line in text.splitlines() or [""]]
        if self._log is None:
            self._early += lines
        else:
            try:
                self._log.writelines(lines)
                self._log.flush()
            except OSError as error:
                raise unwritten(self.folder / LOG, error) from error

    def metrics(self, row: Mapping[str, float | int | str], *, step: int) -> None:
        """Add a row to metrics.csv and its numbers to TensorBoard. `step`: steps done, growing from row to row.

        The first row fixes the columns; a key that is missing later leaves its cell empty. Raises ValueError for a new
        key or a step that is not beyond the last row's.
        """
        if not self._main:
            return
        if self._columns is None:
            self._columns = ["step", *(key for key in row if key != "step")]
            self._append(METRICS, _csv_line(self._columns))
        unknown = [key for key in row if key not in self._columns]
        if unknown:
            raise ValueError(f"metrics.csv has no column {', '.join(unknown)}: its first row fixes the columns")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics.csv has a row of step {self._last_step} already; step {step} cannot follow it")
        values = {**row, "step": step}
        # Before this row is in the file: what is rebuilt from it must not hold the row twice.
        board = self._open_board()
        self._append(METRICS, _csv_line([values.get(key, "") for key in self._columns]))
        self._last_step = step
        if board is not None:
            board.scalars(row, step)

    def history(self, row: Mapping[str, Any], *, epoch: int) -> None:
        """Add {"epoch": epoch, **row} to history.jsonl; nothing in it may depend on clock or machine."""
        if not self._main:
            return
        if self._last_epoch is not None and epoch <= self._last_epoch:
            raise ValueError(f"history.jsonl has epoch {self._last_epoch} already; epoch {epoch} cannot follow it")
        values = {"epoch": epoch, **plain(dict(row), "history")}
        line = json.dumps(values, allow_nan=False)
        board = self._open_board() if self._painter is not None else None  # before the row is in the file, as above
        self._append(HISTORY, line + "\n")
        self._last_epoch = epoch
        if board is not None:
            board.pictures(values)

    def paint(self, painter: Painter) -> None:
        """Let TensorBoard show what the painter makes of each object of history.jsonl; to be told before the first."""
        self._painter = painter

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that metrics.csv has already; None while its first row may still choose them."""
        return None if self._columns is None else tuple(self._columns)

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` to the file `name` of the folder, atomically, and list it as an artefact."""
        path = self._inside(name)
        if path.name in _OWN:
            raise ValueError(f"{name}: the run writes this file itself; choose another name")
        if self._main:
            write_json(path, value)
            self.artefact(path.stem, path)
        return path

    def artefact(self, name: str, path: Path) -> None:
        """List a file or folder of the run in result.json. Raises ValueError when it lies outside the run's folder."""
        self._artefacts[name] = self._inside(path).relative_to(self.folder.resolve()).as_posix()

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state, meta) of the checkpoint to go on from, None for a fresh run."""
        return None if self._checkpoint is None else load_state(self._checkpoint)

    @property
    def seconds(self) -> float:
        """Wall seconds of this run, those of earlier sessions up to their checkpoint included."""
        return self._seconds_before + time.monotonic() - self._started

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Write result.json, the run's last act: `result` and who, where, how long, and every artefact's path."""
        path = self.folder / RESULT
        if not self._main:
            distributed.barrier()  # the file is there when any rank goes on
            return path
        self.log(f"finished after {duration(self.seconds)}: {path}")
        self._sync_growing()
        self._close_board(result)
        environment = describe(self.config.get("device"))
        identity = self._identity
        own = {
            "schema": SCHEMA,
            "method": identity.method,
            "stage": identity.stage,
            "dataset": identity.dataset,
            "seed": identity.seed,
            "finished": True,
        }
        end = {
            "seconds": round(self.seconds, 3),
            "config_digest": self.digest,
            "git": environment["git"],
            "versions": environment["versions"],
            "device": environment["device"],
            "artefacts": self._all_artefacts(),
        }
        write_json(path, {**own, **{key: value for key, value in result.items() if key not in {*own, *end}}, **end})
        self.close()
        distributed.barrier()
        return path

    def close(self) -> None:
        """Close the files and let go of the folder. Calling it twice is fine. Raises OSError as a write does."""
        open_ones = [self._board, *self._growing.values(), self._log, self._lock]
        self._board = self._log = self._lock = None
        self._growing = {}
        errors = []
        for file in open_ones:
            try:
                if file is not None:
                    file.close()
            except OSError as error:  # the others must be closed all the same
                errors.append(error)
        if errors:
            raise unwritten(self.folder, errors[0]) from errors[0]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else what ended the run is told
                raise

    # ---- opening: decide where (rank 0), enter the folder (rank 0), take it up (all ranks)

    def _settle(
        self,
        root: Path,
        save: Path | None,
        resume: Literal["auto"] | Path | None,
        keep: int,
        changeable: Mapping[str, str] | None,
    ) -> _Place:
        """Find or make the folder, and lock it unless the run is finished."""
        if resume is None:
            return _Place(self._start_folder(root, save), "fresh", self.digest)
        if resume == "auto":
            folder = save if save is not None else _newest(root, self._identity)
            if folder is None and changeable is not None:
                raise ValueError(
                    "--allow-config-change: no run has these flags, and none is named whose flags could change; "
                    "add --save DIR, or give --resume RUN"
                )
            if folder is None or _is_empty(folder):
                return _Place(self._start_folder(root, folder), "fresh", self.digest)
            return self._go_on(folder, None, keep, f"--resume auto with {folder}", changeable)
        folder, checkpoint = _named(Path(resume))
        if save is not None and Path(save).resolve() != folder.resolve():
            raise ValueError(f"--save {save} and --resume {resume} name two folders; drop --save to go on in {folder}")
        return self._go_on(folder, checkpoint, keep, f"--resume {resume}", changeable)

    def _start_folder(self, root: Path, save: Path | None) -> Path:
        if save is None:
            folder = _make_folder(root, self._identity)
        else:
            folder = Path(save)
            if not _is_empty(folder):
                raise ValueError(
                    f"--save {folder}: it exists and is not empty, and nothing is overwritten; name another folder,"
                    " or go on with the run in it by --resume auto"
                )
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        if not _is_empty(folder):  # another process was faster
            raise ValueError(f"--save {folder}: another run has just started there; name another folder")
        return folder

    def _go_on(
        self, folder: Path, checkpoint: Path | None, keep: int, flag: str, changeable: Mapping[str, str] | None
    ) -> _Place:
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"{flag}: no run lies there (no {CONFIG}), and nothing is overwritten; name another folder"
            )
        _refuse_links(folder, flag)
        saved = _read_config(folder)
        changes = self._identity.changes(saved)
        finished = _is_finished(folder)
        if changes and (changeable is None or finished):
            raise ValueError(
                f"{flag}: the run there has another configuration"
                + (", and it is finished" if finished and changeable is not None else "")
                + ":\n  "
                + "\n  ".join(change.line() for change in changes)
                + "\ngive the same flags and files as then (config.json has the flags), or another --save to start anew"
                + ("" if finished or changeable is not None else "; --allow-config-change lets some flags change")
            )
        # a run that knew fewer flags has another digest, by which its checkpoints are found
        own = self.digest
        self.digest, self._owner = saved.get("digest") or own, owner_of(saved) or own
        if finished:
            return _Place(folder, "finished", self.digest, owner=self._owner)
        self._lock = _lock(folder)
        store = self._store(folder, keep)
        if checkpoint is not None:
            _, meta = load_state(checkpoint)
            if meta["config_digest"] != self._owner:
                raise ValueError(f"{flag}: the checkpoint belongs to another configuration than the run it lies in")
            return self._resumed(folder, checkpoint, meta, changes, flag, changeable)
        found = store.latest()
        if found is not None:
            return self._resumed(folder, Path(found[1]["path"]), found[1], changes, flag, changeable)
        if store.steps():
            raise ValueError(
                f"{flag}: none of the checkpoints in {store.folder} is valid; delete {folder} to start anew"
            )
        if changes:  # nothing of the former flags is left in a run that starts
            self.digest = self._owner = own
        return _Place(folder, "fresh", self.digest, owner=self._owner)

    def _resumed(
        self,
        folder: Path,
        checkpoint: Path,
        meta: dict[str, Any],
        changes: Sequence[Change],
        flag: str,
        changeable: Mapping[str, str] | None,
    ) -> _Place:
        """The place of a run that goes on from a checkpoint; its flags change where they may.

        A run that has changed is another than the one of its first flags and than one that had the new ones from the
        start, so it gets a digest of its own; the mark of its checkpoints stays.
        """
        noted: list[dict[str, Any]] = []
        if changes:
            noted = effects(changes, changeable or {}, where=flag)
            check_epochs(changes, meta["epoch"], where=flag)
            text = json.dumps([self.digest, meta["step"], [(one["flag"], one["after"]) for one in noted]])
            self.digest = hashlib.sha256(text.encode()).hexdigest()
        return _Place(folder, "resumed", self.digest, checkpoint, meta, self._owner, tuple(noted))

    def _enter(self, place: _Place, sources: Mapping[str, str], argv: Sequence[str]) -> None:
        """Make the folder's files fit the place: cut back, or leftovers gone; note this session in config.json."""
        folder = self.folder = place.folder
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)
        messages: list[str] = []
        sessions: list[dict[str, Any]] = []
        step = None
        environment = describe(self.config.get("device"))
        if place.meta is None:
            for name in (LOG, *_GROWING):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        else:
            step = place.meta["step"]
            sessions = _read_config(folder).get("sessions", [])
            _check_noted(place.meta)
            messages, cuts = _too_long(folder, place.meta)
            # Before the cut: killed after it, a newer checkpoint would be gone on from whose rows are not there.
            moved = CheckpointStore(folder / CHECKPOINTS, config_digest=self._owner).abandon_newer(step)
            for path, length in cuts:
                os.truncate(path, length)
            messages += _changes(sessions, environment) + _other_ranks(place.meta)
            messages += as_text(place.changed, step)
            messages += [f"set aside, being newer than where the run goes on: {path.name}" for path in moved]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        command = {"argv": list(argv), **started_as(argv, self._identity.method, self._identity.stage)}
        session = {"started": now, **command, "resumed_step": step, **environment}
        if place.changed:
            session["changes"] = list(place.changed)
        identity = self._identity
        write_json(
            folder / CONFIG,
            {
                "schema": SCHEMA,
                "method": identity.method,
                "stage": identity.stage,
                "dataset": identity.dataset,
                "seed": identity.seed,
                "digest": self.digest,
                **({} if self._owner == self.digest else {"owner": self._owner}),
                "config": self.config,
                "sources": dict(sources),
                "volatile": sorted(identity.volatile),
                **command,
                **environment,
                "sessions": [*sessions, session],
            },
        )
        self._log = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        fsync_folder(folder)
        self._log.writelines(self._early)
        begun = f"run folder: {folder}" if step is None else f"going on in {folder} after step {step:,}"
        self.log("\n".join([begun, *messages]))

    def _take(self, place: _Place, keep: int) -> None:
        """Set what every rank needs to know; open the growing files (rank 0)."""
        self.folder, self.digest, self._owner = place.folder, place.digest, place.owner or place.digest
        self.already_finished = place.start == "finished"
        self.checkpoints = self._store(place.folder, keep)
        self._checkpoint = place.checkpoint
        self.resumed_step = None
        if place.meta is not None:
            self.resumed_step = place.meta["step"]
            self._seconds_before = float(place.meta["extra"].get("seconds", 0.0))
        if self.already_finished:
            self.log(f"already finished, nothing to do: {place.folder / RESULT}")
        elif self._main:
            self._columns, self._last_step = _csv_end(place.folder / METRICS)
            self._last_epoch = _jsonl_end(place.folder / HISTORY)
            for name in _GROWING:
                self._growing[name] = open(place.folder / name, "a", encoding="utf-8", newline="")  # noqa: SIM115

    # ---- writing

    def _store(self, folder: Path, keep: int) -> CheckpointStore:
        return CheckpointStore(
            folder / CHECKPOINTS, keep=keep, config_digest=self._owner, on_message=self.log, extra=self._extra
        )

    def _extra(self) -> dict[str, Any]:
        """What a checkpoint notes of the run around it. Rows must be durable before the checkpoint that counts them."""
        self._sync_growing()
        lengths = {name: file.tell() for name, file in self._growing.items()}
        digests = {name: _digest_of(self.folder / name, length) for name, length in lengths.items()}
        return {"seconds": round(self.seconds, 3), "files": lengths, "sha256": digests}

    def _append(self, name: str, text: str) -> None:
        try:
            self._growing[name].write(text)
            self._growing[name].flush()
        except OSError as error:
            raise unwritten(self.folder / name, error) from error

    def _sync_growing(self) -> None:
        for name, file in self._growing.items():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise unwritten(self.folder / name, error) from error

    def _open_board(self) -> Board | None:
        """The TensorBoard events, made at the first row (the import takes a second); None when off or not installed."""
        if not self._tensorboard or self._board is not None:
            return self._board
        try:
            board = Board(self.folder / TENSORBOARD, forget=self.resumed_step is not None, painter=self._painter)
        except ImportError as error:
            self._tensorboard = False
            self.log(f"no TensorBoard events, metrics.csv has the same: {error} (pip install tensorboard)")
            return None
        with _reading_rows(self.folder / METRICS):
            for row in _csv_rows(self.folder / METRICS):
                board.scalars(row, int(row["step"]))
        with _reading_rows(self.folder / HISTORY):
            lines = (self.folder / HISTORY).read_text(encoding="utf-8").splitlines() if self._painter else []
            for line in lines:
                board.pictures(json.loads(line))
        self._board = board
        return board

    def _close_board(self, result: Mapping[str, Any]) -> None:
        """The last events: the flags that matter beside the final figures. A run without a row has no events.

        Opened here too: a session that adds no row leaves them to a killed one, which may not have written its last.
        """
        board = self._open_board() if self._last_step is not None else None
        if board is not None:
            board.table(self._identity.fields(), plain(dict(result), "result"), self._last_step or 0)
            board.close()
        self._board = None

    def _inside(self, path: str | Path) -> Path:
        """The path resolved below the run's folder; ValueError when it leads out of it."""
        home = self.folder.resolve()
        inside = (home / path if isinstance(path, str) else Path(path)).resolve()
        if home not in inside.parents:
            raise ValueError(f"{path}: not inside the run's folder {self.folder}")
        return inside

    def _all_artefacts(self) -> dict[str, str]:
        """The registered ones and whatever else lies in the folder, result.json last."""
        known = set(self._artefacts.values())
        artefacts = dict(self._artefacts)
        for path in sorted(self.folder.iterdir()):
            empty = path.is_file() and not path.stat().st_size
            if path.name not in {*known, RESULT} and not path.name.startswith(".") and not empty:
                name = path.stem if path.stem not in artefacts else path.name
                artefacts[name] = path.name
        return {**artefacts, "result": RESULT}


# ---- folders


def _make_folder(root: Path, identity: _Identity) -> Path:
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


def _parent(root: Path, identity: _Identity) -> Path:
    return Path(root) / f"{_safe(identity.method)}-{_safe(identity.stage)}"


def _safe(word: str) -> str:
    """A word for a folder's name: no separators, no leading dot, whatever a data set is called."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", word).lstrip(".-") or "unnamed"


def _newest(root: Path, identity: _Identity) -> Path | None:
    """The newest run of the same configuration under `root`."""
    found: list[tuple[str, int, Path]] = []
    for config in _parent(root, identity).glob(f"*/{CONFIG}"):
        name = re.fullmatch(r".*-(\d{8}T\d{6})(?:-(\d+))?", config.parent.name)
        try:
            same = not identity.changes(_read_config(config.parent))
        except ValueError:
            continue  # not a run's config.json: not the one that is looked for
        if name and same:
            found.append((name[1], int(name[2] or 1), config.parent))
    return max(found)[2] if found else None


def _named(path: Path) -> tuple[Path, Path | None]:
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


def _is_empty(folder: Path) -> bool:
    """True for a folder that is missing or holds nothing but a lock and what a killed process left unfinished."""
    folder = Path(folder)
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise ValueError(f"--save {folder}: a file, not a folder; name another")
    return all(path.name == LOCK or path.name.startswith(TEMPORARY) for path in folder.iterdir())


def _refuse_links(folder: Path, flag: str) -> None:
    """Raise ValueError when one of the run's own files is a link out of its folder: writing, cutting back and removing
    would change what lies elsewhere.
    """
    home = folder.resolve()
    for path in (folder / name for name in (*_OWN, TENSORBOARD, CHECKPOINTS, LOCK)):
        if path.is_symlink() and home not in path.resolve().parents:
            raise ValueError(
                f"{flag}: {path} is a link out of the run's folder, where nothing is written; put what it points to in "
                "its place"
            )


def _is_finished(folder: Path) -> bool:
    if not (folder / RESULT).exists():
        return False
    result = read_json(folder / RESULT)
    return isinstance(result, dict) and result.get("finished") is True


def _read_config(folder: Path) -> dict[str, Any]:
    config = check_schema(read_json(folder / CONFIG), SCHEMA, str(folder / CONFIG), "a run's configuration")
    if not isinstance(config.get("config"), dict):
        raise ValueError(f"{folder / CONFIG}: config is missing or of the wrong type")
    if not isinstance(config.get("sessions", []), list):
        raise ValueError(f"{folder / CONFIG}: sessions is not a list")
    return config


def _lock(folder: Path) -> IO[str] | None:
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

        with open(folder / LOCK, encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):
        return None
    return False


# ---- files that grow


def _too_long(folder: Path, meta: Mapping[str, Any]) -> tuple[list[str], list[tuple[Path, int]]]:
    """(messages, the growing files to cut and how long they were when the checkpoint was made).

    Raises ValueError where what was there then is not what is there now: rows cannot follow damaged ones.
    """
    lengths, digests = meta["extra"].get("files", {}), meta["extra"].get("sha256", {})
    messages: list[str] = []
    cuts: list[tuple[Path, int]] = []
    for name in _GROWING:
        path, length = folder / name, lengths.get(name, 0)
        present = path.stat().st_size if path.exists() else 0
        damaged = name in digests and present >= length and path.exists() and _digest_of(path, length) != digests[name]
        if damaged or 0 < present < length:  # the next row would be glued to what is left of one
            raise ValueError(
                f"{path}: was {'damaged or changed' if damaged else 'cut short'} since the checkpoint of step "
                f"{meta['step']}; put the right file back, or delete it to go on without its rows"
            )
        if present < length:
            messages.append(f"{name} is not there any more ({length} bytes at the checkpoint): rows are lost")
        elif present > length:
            cuts.append((path, length))
    return messages, cuts


def _check_noted(meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint notes of its run what `Run._extra` writes, or what older versions did."""
    extra = meta["extra"]
    lengths, digests = extra.get("files", {}), extra.get("sha256", {})
    right = isinstance(lengths, dict) and isinstance(digests, dict) and type(extra.get("seconds", 0.0)) in (int, float)
    if not right or not all(type(length) is int and length >= 0 for length in lengths.values()):
        raise ValueError(f"the checkpoint of step {meta['step']}: what it notes of its run is not what a run writes")


def _digest_of(path: Path, length: int) -> str:
    """sha256 of a file's first `length` bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


def _changes(sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """What else is not as in the session before, so that going on may not be bit-exact."""
    before = sessions[-1] if sessions and isinstance(sessions[-1], dict) else {}
    keys = [key for key in ("git", "versions", "device") if key in before and before[key] != now[key]]
    return [f"not as before, so maybe not bit-exact: {key} {before[key]} -> {now[key]}" for key in keys]


def _other_ranks(meta: Mapping[str, Any]) -> list[str]:
    before, now = meta.get("world_size", 1), distributed.world_size()
    return [] if before == now else [f"not as before, so not bit-exact: processes {before} -> {now}"]


def _csv_line(cells: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)  # floats by repr: read back exactly
    return buffer.getvalue()


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _csv_end(path: Path) -> tuple[list[str] | None, int | None]:
    """(columns, last row's step) of metrics.csv, None for what is not there yet."""
    if not path.exists() or not path.stat().st_size:
        return None, None
    with _reading_rows(path):
        with open(path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file))
        rows = _csv_rows(path)
        return columns, int(rows[-1]["step"]) if rows else None


def _jsonl_end(path: Path) -> int | None:
    if not path.exists():
        return None
    with _reading_rows(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["epoch"]) if lines else None


@contextmanager
def _reading_rows(path: Path) -> Iterator[None]:
    """ValueError with the file's name for rows that are none (of a run whose checkpoints note no digest of them)."""
    try:
        yield
    except (ValueError, LookupError, TypeError, StopIteration, csv.Error) as error:
        raise ValueError(f"{path}: its rows cannot be read ({error}); delete it to go on without them") from error
