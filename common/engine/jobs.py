# SPDX-License-Identifier: Apache-2.0
"""Jobs: commands that wait for each other, run by an executor, with a state on disk that outlives the program.

`run_jobs` is a generator of what happens; whoever reads it prints, follows logs, writes tables. It knows an executor
by three verbs (submit, poll, cancel), so that a cluster can stand where the local processes stand now.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from common.engine.files import read_json, write_json

WAITING, RUNNING, DONE, FAILED, BLOCKED = "waiting", "running", "done", "failed", "blocked"
ATTEMPTS = 2
USAGE_ERROR = 2  # the exit code of a program that refuses its flags or files
POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0  # for a run's last checkpoint after an interrupt


@dataclass(frozen=True)
class Job:
    """One command, the folder that it writes, and the jobs (by key) that must be done before."""

    name: str
    method: str
    setting: str
    seed: int
    command: tuple[str, ...]
    folder: Path
    after: tuple[str, ...] = ()
    row: bool = False
    """Whether its folder is a row of the plan's table."""

    @property
    def key(self) -> str:
        """Seed and name: what is unique within a sweep."""
        return f"s{self.seed}/{self.name}"

    @property
    def id(self) -> str:
        """The configuration's digest: 12 hexadecimal digits of the command's SHA-256."""
        return hashlib.sha256(json.dumps(self.command).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------- state on disk


class JobStore:
    """The states of a sweep's jobs in OUT/.sweep: `<id>.json`, replaced atomically, and the log `<id>.log`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".sweep"

    def log(self, job: Job) -> Path:
        """What the job's process prints, over all its attempts."""
        return self.folder / f"{job.id}.log"

    def read(self, job: Job) -> Mapping[str, Any]:
        """The job's last known state; a job that is new, or whose file is damaged, waits."""
        try:
            found = read_json(self.folder / f"{job.id}.json")
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"state": WAITING}

    def write(self, job: Job, state: str, attempts: int, seconds: float) -> None:
        """Note a state; `seconds`: time spent on the job in all sweeps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {
            "id": job.id,
            "name": job.name,
            "method": job.method,
            "setting": job.setting,
            "seed": job.seed,
            "command": list(job.command),
            "folder": job.folder,
            "row": job.row,
            "state": state,
            "attempts": attempts,
            "seconds": seconds,
            "noted": time.time(),
            "log": self.log(job),
        }
        write_json(self.folder / f"{job.id}.json", entry)

    def is_done(self, job: Job) -> bool:
        """Whether the job has finished and the folder that its command names is still there."""
        writes = any(str(job.folder) in word for word in job.command)
        return self.read(job).get("state") == DONE and (job.folder.is_dir() or not writes)

    def noted(self, job: Job) -> float:
        """When the job's state was written, in seconds of the clock; 0 where that is not known."""
        return float(self.read(job).get("noted") or 0)

    def seconds(self, job: Job) -> float:
        """Time spent on the job so far."""
        return float(self.read(job).get("seconds") or 0)


# --------------------------------------------------------------------------------------------------------- executors


class Executor(Protocol):
    """Where commands run. A handle is the executor's own and opaque to everybody else."""

    def submit(self, command: Sequence[str], log: Path) -> Any | None:
        """Start the command with its output appended to `log`; None while somebody else still runs this very job."""

    def poll(self, handle: Any) -> int | None:
        """The exit code (negative: the signal that ended it), None while it runs."""

    def cancel(self, handle: Any, *, kill: bool = False) -> None:
        """Ask it to stop as Ctrl-C would, or end it at once; `poll` tells when it is gone."""


def python_command(command: Sequence[str]) -> list[str]:
    """The command with this very Python in place of the word `python` in front."""
    return [sys.executable, *command[1:]] if command[0] == "python" else list(command)


class LocalExecutor:
    """Processes on this machine; the word `python` in front of a command is this very Python.

    The log is the lock: a job's process holds it as long as it lives, so that a sweep that starts while an orphan of
    a killed one still runs does not start the job a second time. This process holds it too, until it has heard of the
    end: other sweeps in the same folder must not find a job that has ended and is not noted yet.

    `threads`: CPU threads of each process, unless the environment says OMP_NUM_THREADS already. `launch`: command ->
    the words to start.
    """

    def __init__(self, threads: int | None = None, launch: Callable[[Sequence[str]], list[str]] | None = None) -> None:
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        self.launch = launch or python_command
        self._locks: dict[int, IO[bytes]] = {}
        if threads is not None:
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))

    def submit(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes] | None:
        """See Executor. Raises OSError when the command does not exist or the log cannot be written."""
        words = self.launch(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.open("ab")
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a session of its own: Ctrl-C reaches the sweep alone, which hands it on and waits
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        except BlockingIOError:
            out.close()
            return None
        except OSError:
            out.close()
            raise
        self._locks[process.pid] = out
        return process

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """See Executor."""
        code = handle.poll()
        if code is not None and (lock := self._locks.pop(handle.pid, None)) is not None:
            lock.close()
        return code

    def cancel(self, handle: subprocess.Popen[bytes], *, kill: bool = False) -> None:
        """See Executor; reaches the children of the process too."""
        if handle.poll() is None:
            os.killpg(handle.pid, signal.SIGKILL if kill else signal.SIGINT)


# --------------------------------------------------------------------------------------------------------- scheduling


@dataclass(frozen=True)
class Event:
    """Something happened to a job: start, skip, busy, retry, done, failed, blocked; or `tick`, a moment of waiting."""

    kind: str
    job: Job | None = None
    code: int | None = None
    seconds: float = 0.0


@dataclass
class _Running:
    handle: Any
    attempt: int
    before: float
    """Seconds that earlier attempts took."""
    start: float

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start


def run_jobs(jobs: Sequence[Job], store: JobStore, executor: Executor, slots: int = 1) -> Iterator[Event]:
    """Run what is not done, `slots` at a time, each after those that it waits for; the order is that of `jobs`.

    A job that fails is tried once more at once, unless its exit code is that of a usage error; those that wait for it
    are then blocked, all others run on. A job is done again when one that it waits for was. Closing the generator, and
    any exception, interrupts what still runs.
    """
    return _Sweep(jobs, store, executor, slots).events()


class _Sweep:
    """One pass over the jobs: their states, and what runs."""

    def __init__(self, jobs: Sequence[Job], store: JobStore, executor: Executor, slots: int) -> None:
        self.jobs, self.store, self.executor, self.slots = jobs, store, executor, slots
        self.status = {job.key: WAITING for job in jobs}
        self.running: dict[Job, _Running] = {}
        self.ran: set[str] = set()
        self.busy: set[str] = set()

    def events(self) -> Iterator[Event]:
        try:
            while WAITING in self.status.values() or self.running:
                yield from self._launch()
                yield from self._collect()
                yield Event("tick")
                time.sleep(POLL_SECONDS if self.running or self.busy else 0)
        finally:
            self._stop()

    def _launch(self) -> Iterator[Event]:
        for job in self.jobs:
            needed = [self.status[key] for key in job.after]
            if self.status[job.key] != WAITING:
                continue
            if FAILED in needed or BLOCKED in needed:
                self.status[job.key] = BLOCKED
                yield Event("blocked", job)
            elif any(state != DONE for state in needed):
                continue
            elif self._is_done(job):
                self.status[job.key] = DONE
                yield Event("skip", job, seconds=self.store.seconds(job))
            elif len(self.running) < self.slots:
                if self._start(job, attempt=1):
                    yield Event("start", job)
                elif job.key not in self.busy:
                    self.busy.add(job.key)
                    yield Event("busy", job)

    def _is_done(self, job: Job) -> bool:
        """Done, and after the last run of what it waits for (another sweep may have seen to it since)."""
        if not self.store.is_done(job):
            return False
        before = [other for other in self.jobs if other.key in job.after and other.key in self.ran]
        return all(self.store.noted(other) < self.store.noted(job) for other in before)

    def _collect(self) -> Iterator[Event]:
        for job, entry in list(self.running.items()):
            code = self.executor.poll(entry.handle)
            if code is None:
                continue
            del self.running[job]
            self.status[job.key] = DONE if code == 0 else FAILED
            self.store.write(job, self.status[job.key], entry.attempt, entry.seconds)
            # A program that refuses its flags would refuse the same ones again; anything else may have been the moment.
            again = code not in (0, USAGE_ERROR) and entry.attempt < ATTEMPTS
            if again and self._start(job, entry.attempt + 1):
                yield Event("retry", job, code, entry.seconds)
            else:
                yield Event(self.status[job.key], job, code, entry.seconds)

    def _start(self, job: Job, attempt: int) -> bool:
        before = self.store.seconds(job)
        handle = self.executor.submit(job.command, self.store.log(job))
        if handle is None:
            return False
        self.running[job] = _Running(handle, attempt, before, time.monotonic())
        self.status[job.key] = RUNNING
        self.ran.add(job.key)
        self.store.write(job, RUNNING, attempt, before)
        return True

    def _stop(self) -> None:
        """Interrupt, wait for the last checkpoints, end what does not listen; a second Ctrl-C ends it at once."""
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for job, entry in self.running.items():
                self.executor.cancel(entry.handle)
                self.store.write(job, WAITING, entry.attempt, entry.seconds)
            while any(self.executor.poll(entry.handle) is None for entry in self.running.values()):
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            for entry in self.running.values():
                self.executor.cancel(entry.handle, kill=True)
