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

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from common.engine import distributed
from common.engine.board import Board, Painter
from common.engine.changes import Change, as_text, check_epochs, effects, owner_of
from common.engine.checkpoint import CheckpointStore, load_state
from common.engine.environment import describe, started_as
from common.engine.files import TEMPORARY, fsync_folder, plain, unwritten, write_json
from common.engine.folders import (
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    LOG,
    METRICS,
    OWN,
    RESULT,
    SCHEMA,
    TENSORBOARD,
    hold,
    is_empty,
    is_finished,
    make_folder,
    named,
    newest,
    read_config,
    refuse_links,
)
from common.engine.growing import (
    GROWING,
    check_noted,
    csv_end,
    csv_line,
    csv_rows,
    digest_of,
    jsonl_end,
    reading_rows,
    too_long,
)
from common.engine.identity import VOLATILE, Identity
from common.engine.progress import duration, say


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

    def __init__(self, identity: Identity, *, quiet: bool, tensorboard: bool) -> None:
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
        identity = Identity(method, stage, dataset, seed, values, VOLATILE | {*volatile}, contents or {})
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
            self._append(METRICS, csv_line(self._columns))
        unknown = [key for key in row if key not in self._columns]
        if unknown:
            raise ValueError(f"metrics.csv has no column {', '.join(unknown)}: its first row fixes the columns")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics.csv has a row of step {self._last_step} already; step {step} cannot follow it")
        values = {**row, "step": step}
        # Before this row is in the file: what is rebuilt from it must not hold the row twice.
        board = self._open_board()
        self._append(METRICS, csv_line([values.get(key, "") for key in self._columns]))
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
        if path.name in OWN:
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
            folder = save if save is not None else newest(root, self._identity)
            if folder is None and changeable is not None:
                raise ValueError(
                    "--allow-config-change: no run has these flags, and none is named whose flags could change; "
                    "add --save DIR, or give --resume RUN"
                )
            if folder is None or is_empty(folder):
                return _Place(self._start_folder(root, folder), "fresh", self.digest)
            return self._go_on(folder, None, keep, f"--resume auto with {folder}", changeable)
        folder, checkpoint = named(Path(resume))
        if save is not None and Path(save).resolve() != folder.resolve():
            raise ValueError(f"--save {save} and --resume {resume} name two folders; drop --save to go on in {folder}")
        return self._go_on(folder, checkpoint, keep, f"--resume {resume}", changeable)

    def _start_folder(self, root: Path, save: Path | None) -> Path:
        if save is None:
            folder = make_folder(root, self._identity)
        else:
            folder = Path(save)
            if not is_empty(folder):
                raise ValueError(
                    f"--save {folder}: it exists and is not empty, and nothing is overwritten; name another folder,"
                    " or go on with the run in it by --resume auto"
                )
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(folder)
        if not is_empty(folder):  # another process was faster
            raise ValueError(f"--save {folder}: another run has just started there; name another folder")
        return folder

    def _go_on(
        self, folder: Path, checkpoint: Path | None, keep: int, flag: str, changeable: Mapping[str, str] | None
    ) -> _Place:
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"{flag}: no run lies there (no {CONFIG}), and nothing is overwritten; name another folder"
            )
        refuse_links(folder, flag)
        saved = read_config(folder)
        changes = self._identity.changes(saved)
        finished = is_finished(folder)
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
        self._lock = hold(folder)
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
            for name in (LOG, *GROWING):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        else:
            step = place.meta["step"]
            sessions = read_config(folder).get("sessions", [])
            check_noted(place.meta)
            messages, cuts = too_long(folder, place.meta)
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
            self._columns, self._last_step = csv_end(place.folder / METRICS)
            self._last_epoch = jsonl_end(place.folder / HISTORY)
            for name in GROWING:
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
        digests = {name: digest_of(self.folder / name, length) for name, length in lengths.items()}
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
        with reading_rows(self.folder / METRICS):
            for row in csv_rows(self.folder / METRICS):
                board.scalars(row, int(row["step"]))
        with reading_rows(self.folder / HISTORY):
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


def _changes(sessions: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """What else is not as in the session before, so that going on may not be bit-exact."""
    before = sessions[-1] if sessions and isinstance(sessions[-1], dict) else {}
    keys = [key for key in ("git", "versions", "device") if key in before and before[key] != now[key]]
    return [f"not as before, so maybe not bit-exact: {key} {before[key]} -> {now[key]}" for key in keys]


def _other_ranks(meta: Mapping[str, Any]) -> list[str]:
    before, now = meta.get("world_size", 1), distributed.world_size()
    return [] if before == now else [f"not as before, so not bit-exact: processes {before} -> {now}"]
