# SPDX-License-Identifier: Apache-2.0
"""The executors of sweep.py, by their flags: processes on this machine, or jobs of a cluster through submitit.

On a cluster a job's process appends to the same log, holds the same lock and notes its exit code beside it, so that a
sweep that was away takes up what was submitted before: a job still queued or running is waited for, one that has ended
meanwhile counts. Before its time is over a job hears a signal, saves (`common.engine.preemption`) and queues again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.engine.files import read_json, write_json
from common.engine.jobs import Executor, LocalExecutor, python_command
from common.engine.parsing import Config, Parser, choice, integer

ROOT = Path(__file__).resolve().parents[2]
LOST = 1  # the exit code of a job that ended without noting one: killed, out of memory, out of time
DEFAULTS: Mapping[str, Any] = {
    "timeout_min": 24 * 60,
    "slurm_signal_delay_s": 180,
    "nodes": 1,
    "tasks_per_node": 1,
    "stderr_to_stdout": True,
}
"""What submitit is told unless --cluster says otherwise; the signal comes three minutes early, for a checkpoint."""
TORCHRUN = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "150",
}
"""torchrun hands these signals on to its processes, and gives them this many seconds to save."""
MAX_REQUEUES = 1000
QUEUED = 100  # jobs handed to a cluster at a time
POLL_SECONDS = 1.0  # between two looks at a job's files, which lie on a network's disk
KILL_SECONDS = 120.0  # how long a node that is taken away may take
_TRAINS = re.compile(r"(search|train)\.py")


def add_executor_flags(parser: Parser) -> None:
    """Where a sweep's jobs run."""
    add = parser.add_argument
    names = choice("local", "slurm", "submitit")
    where = "processes here; Slurm; or what submitit finds (Slurm, else processes that outlive this program)"
    add("--executor", type=names, default="local", metavar="local|slurm|submitit", help=where)
    add("--jobs", type=integer(1), metavar="N", help=f"at a time (default: 1, on a cluster {QUEUED})")
    add("--ranks", type=integer(1), default=1, metavar="N", help="torchrun: processes of each search and training")
    options = "submitit's parameters, such as timeout_min=600 gpus_per_node=8 slurm_partition=gpu"
    add("--cluster", nargs="+", action="append", default=[], metavar="NAME=VALUE", help=options)


def make_executor(config: Config) -> Executor:
    """The executor of `add_executor_flags`; sets `config.jobs`. Raises ValueError that names the flag and the cure."""
    options = dict(_option(word) for words in config.cluster for word in words)
    if config.executor == "local":
        if options:
            raise ValueError("--cluster: only has a meaning with --executor slurm or submitit; add it or drop this")
        config.jobs = config.jobs or 1
        threads = max(1, (os.cpu_count() or 1) // config.jobs) if config.jobs > 1 else None
        return LocalExecutor(threads, lambda command: ranked(command, config.ranks))
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError(
            "--executor slurm: there is no sbatch here; start on a login node, or take --executor submitit"
        )
    config.jobs = config.jobs or QUEUED
    cluster = None if config.executor == "submitit" else config.executor
    return ClusterExecutor(config.out / ".sweep" / "submitit", cluster, options, config.ranks)


def _option(word: str) -> tuple[str, Any]:
    """NAME=VALUE with the value as a number where it is one."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"--cluster {word}: is no NAME=VALUE; write such as --cluster slurm_partition=gpu")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(text)
    return name, text


def ranked(command: Sequence[str], ranks: int, nodes: Sequence[str] = (), node: int = 0, job: str = "0") -> list[str]:
    """The command, a search or training by `ranks` processes on each of the nodes, the others as they are.

    `nodes`: names of a cluster's nodes, none for this machine alone; `node`: which of them this one is; `job`: the
    cluster's number of the job, from which the port of their meeting follows.
    """
    words = python_command(command)
    alone = len(nodes) < 2
    if (alone and ranks == 1) or len(words) < 2 or _TRAINS.fullmatch(Path(words[1]).name) is None:
        return words
    where = ["--standalone"]
    if not alone:
        port = 20000 + int(re.sub(r"\D", "", job) or 0) % 10000
        where = [f"--nnodes={len(nodes)}", f"--node_rank={node}", "--rdzv_backend=c10d"]
        where += [f"--rdzv_endpoint={nodes[0]}:{port}", f"--rdzv_id={job}"]
    return [words[0], "-m", "torch.distributed.run", *where, f"--nproc_per_node={ranks}", *words[1:]]


class ClusterJob:
    """What submitit carries to a node and calls there."""

    def __init__(self, command: Sequence[str], log: Path, ranks: int) -> None:
        self.command, self.log, self.ranks = tuple(command), log, ranks
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command to its end, its output appended to the log; note and give its exit code."""
        from submitit import JobEnvironment

        here = JobEnvironment()
        nodes = here.hostnames if here.num_nodes > 1 else ()
        words = ranked(self.command, self.ranks, nodes, here.node, here.job_id)
        with self.log.open("ab") as out:
            if here.node == 0:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(out, fcntl.LOCK_EX)
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**TORCHRUN, **os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            code = self._wait()
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            # The scheduler takes the node away, or the job was cancelled: that end is not the job's own.
            time.sleep(KILL_SECONDS)
        if here.node == 0:
            write_json(_note(self.log, "code"), {"job": here.job_id, "code": code})
        return code

    def checkpoint(self) -> Any:
        """submitit's hook, called in a signal's handler: let the command save and end, then queue again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGUSR2)
            # Not Popen.wait, whose lock the interrupted code may hold; the process stays to be waited for.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(ClusterJob(self.command, self.log, self.ranks))

    def _wait(self) -> int:
        assert self.process is not None
        try:
            while (code := self.process.poll()) is None:
                time.sleep(0.1)
        except KeyboardInterrupt:  # a local cluster's way to cancel
            os.killpg(self.process.pid, signal.SIGINT)
            raise
        return code


@dataclass
class Submitted:
    """A handle: submitit's job, the log beside which its exit code will stand, and when that was looked at."""

    job: Any
    log: Path
    seen: float = 0.0
    code: int | None = None


class ClusterExecutor:
    """Jobs of a cluster, through submitit. `cluster`: its name for submitit, None for what it finds itself.

    Raises ValueError for a parameter that submitit does not know.
    """

    def __init__(self, folder: Path, cluster: str | None, options: Mapping[str, Any], ranks: int = 1) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError("--executor: needs submitit; bash scripts/setup.sh cluster installs it") from None
        # Nodes find the project wherever they start; schedulers hand the environment on.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.ranks = ranks
        try:
            self.executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=MAX_REQUEUES)
            self.executor.update_parameters(**{**DEFAULTS, "name": folder.parents[1].name, **options})
        except (NameError, AssertionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--cluster: {error}") from None
        self.slurm_job = submitit.SlurmJob

    def submit(self, command: Sequence[str], log: Path) -> Submitted | None:
        """See Executor; a job that an earlier sweep submitted and whose end nobody has seen is taken up again.

        Raises OSError with the scheduler's own words when it refuses.
        """
        log = log.resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as lock:
            earlier = self._earlier(log)
            if earlier is not None:
                return earlier
            with suppress(OSError):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return None
            try:
                job = self.executor.submit(ClusterJob(command, log, self.ranks))
            except (RuntimeError, subprocess.CalledProcessError) as error:  # submitit's kinds
                raise OSError(f"the cluster refused a job ({log.stem}): {error}") from None
            write_json(_note(log, "job"), {"job": job.job_id, "cluster": self.executor.cluster})
        return Submitted(job, log)

    def poll(self, handle: Submitted) -> int | None:
        """See Executor."""
        if handle.code is None and time.monotonic() - handle.seen > POLL_SECONDS:
            handle.seen = time.monotonic()
            over = handle.job.done()  # before the note is looked for: it is written first
            handle.code = _code(handle.log, handle.job.job_id)
            if handle.code is None and over:
                handle.code = LOST
            if handle.code is not None:
                _note(handle.log, "job").unlink(missing_ok=True)
        return handle.code

    def cancel(self, handle: Submitted, *, kill: bool = False) -> None:
        """See Executor: Slurm's scancel, which is SIGTERM and half a minute later SIGKILL."""
        if handle.code is None:
            handle.job.cancel(check=False)

    def _earlier(self, log: Path) -> Submitted | None:
        """The job that the note beside the log names, unless its end was seen or it ended without a word."""
        note = _read(_note(log, "job"))
        if "job" not in note or note.get("cluster") != self.executor.cluster:
            return None
        ended = _code(log, note["job"]) is not None
        if self.executor.cluster == "local":
            # its process is no child of ours: while it runs, the log's lock says so
            return Submitted(_Ended(note["job"]), log) if ended else None
        job = self.slurm_job(self.executor.folder, note["job"])
        return Submitted(job, log) if ended or not job.done(force_check=True) else None


@dataclass(frozen=True)
class _Ended:
    """A job of submitit's local cluster that has noted its exit code."""

    job_id: str

    def done(self) -> bool:
        return True

    def cancel(self, check: bool = True) -> None:
        pass


def _note(log: Path, kind: str) -> Path:
    return log.with_suffix(f".{kind}.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _code(log: Path, job: str) -> int | None:
    """The exit code that this very submission noted."""
    note = _read(_note(log, "code"))
    return int(note["code"]) if note.get("job") == job else None
