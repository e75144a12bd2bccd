#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Many runs from one command: a plan of jobs that wait for each other, or a grid of flags and seeds.

    python sweep.py scripts/plans/table1_cifar10.json --size smoke --seeds 0 1 --jobs 2
    python sweep.py --grid learning-rate=.05,.1 --seeds 0 1 2 -- python qdarts/train.py --arch PC_DARTS

A job's id is the digest of its command, and of nothing else: an edited preset or another version of a program is not
noticed; give another --out, or delete the run's folder. Finished jobs are skipped, interrupted ones go on, failed ones
are tried once more (not after exit code 2, a usage error) and named at the end. Ctrl-C stops everything in good order;
the same command goes on. Exit code: 0 all done, 1 some failed, 2 the plan or a flag is wrong, 130 interrupted.
docs/sweep.md has the format of a plan.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from common.engine.cluster import add_executor_flags, make_executor
from common.engine.jobs import Event, Executor, Job, JobStore, run_jobs
from common.engine.parsing import Config, Parser, integer
from common.engine.plans import Plan, Value, grid_plan, read_plan, select
from common.engine.progress import duration

PROG = "sweep.py"
REPORT_SECONDS = 120


def parser() -> Parser:
    """The flags; the command of a grid is cut off before."""
    usage = "python sweep.py PLAN.json [flags]  |  python sweep.py --grid FLAG=V1,V2 ... [flags] -- COMMAND"
    parser = Parser(prog=PROG, usage=usage, description=__doc__)
    add = parser.add_argument
    add("plan", nargs="?", type=Path, metavar="PLAN.json", help="jobs, or a command with a grid (docs/sweep.md)")
    add("--grid", action="append", default=[], metavar="FLAG=V1,V2", help="values for a flag of COMMAND; repeatable")
    add("--seeds", nargs="+", type=integer(0), metavar="N", help="default: the plan's own, else 0")
    add("--size", metavar="NAME", help="one of the plan's sizes (default: its first)")
    add("--set", nargs="+", action="append", default=[], metavar="NAME=VALUE", help="variables of the plan")
    add("--only", nargs="+", default=[], metavar="NAME", help="methods or jobs, with what they wait for")
    add("--out", type=Path, metavar="DIR", help="where the runs go (default: runs/PLAN-SIZE)")
    add_executor_flags(parser)
    add("--follow", action="store_true", help="show what the jobs print, as it comes")
    add("--dry-run", action="store_true", help="one line a job: method, setting, seed, command, with tabs; and stop")
    return parser


def make_plan(config: Config, command: Sequence[str] | None) -> Plan:
    """The plan that the flags mean. Raises ValueError for flags that do not fit together."""
    if config.plan is not None:
        if config.grid or command is not None:
            if config.grid and "=" in str(config.plan):
                raise ValueError(f"{config.plan}: is no plan; for more flags of a grid write --grid {config.plan}, too")
            raise ValueError("PLAN.json: has commands of its own; drop the plan, or --grid and COMMAND")
        return read_plan(config.plan)
    if not command:
        raise ValueError("COMMAND: is missing; name a plan, or write -- and a command behind the flags")
    grid = {}
    for entry in config.grid:
        name, equals, values = entry.lstrip("-").partition("=")
        if not equals or not all(values.split(",")):
            raise ValueError(f"--grid {entry}: is no FLAG=V1,V2; write such as --grid learning-rate=.05,.1")
        grid[name] = values.split(",")
        if repeated := _repeated(grid[name]):
            raise ValueError(f"--grid {entry}: names {repeated} twice; give each value once")
    return grid_plan(command, grid, [0])


def _repeated(values: Sequence[str]) -> str | None:
    """The first value that comes again; None where each is there once."""
    return next((value for place, value in enumerate(values) if value in values[:place]), None)


def check_programs(jobs: Sequence[Job]) -> None:
    """Every command's program, and its Python file, exists. Raises ValueError before anything has started."""
    for job in jobs:
        if job.command[0] != "python" and shutil.which(job.command[0]) is None:
            raise ValueError(f"job {job.name}: there is no program {job.command[0]}; install it, or change the command")
        for program in job.command[1:2] if job.command[0] == "python" else ():
            if program.endswith(".py") and not Path(program).is_file():
                raise ValueError(f"job {job.name}: there is no {program} here; start in the project's root")


class Screen:
    """Lines for people: what started and ended, how long it took, how long the rest may take."""

    def __init__(self, jobs: Sequence[Job], store: JobStore, slots: int, follow: bool) -> None:
        self.jobs, self.store, self.slots, self.follow = jobs, store, slots, follow
        self.begin = time.monotonic()
        self.open = {job.key for job in jobs}
        self.took: dict[str, list[float]] = {}
        self.failed: list[tuple[Job, int]] = []
        self.blocked: list[Job] = []
        # how far each log has been shown; what earlier sweeps wrote is not shown again
        logs = [store.log(job) for job in jobs]
        self.shown = {log: log.stat().st_size if log.exists() else 0 for log in logs} if follow else {}

    def show(self, event: Event) -> None:
        """Say what happened."""
        if event.job is None or event.kind in ("done", "failed", "retry"):
            self._copy_logs()
        if (job := event.job) is None:
            return
        head = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.method} {job.setting}, seed {job.seed}"
        words = {
            "start": f"   ({duration(time.monotonic() - self.begin)} since the start)",
            "retry": f": failed (exit code {event.code}), once more",
            "busy": ": an earlier sweep's process still runs it; waiting for its end",
            "skip": ": done before",
            "done": f": done in {duration(event.seconds)}",
            "failed": f": failed (exit code {event.code})",
            "blocked": ": blocked",
        }
        if event.kind in ("start", "retry", "busy"):
            print("\n" * (event.kind == "start") + head + words[event.kind])
            print(
                f"$ {shlex.join(job.command)}" + ("" if self.follow else f"\n  log: {self.store.log(job)}"), flush=True
            )
            return
        self.open.discard(job.key)
        if event.kind in ("skip", "done"):
            self.took.setdefault(job.name, []).append(event.seconds)
        elif event.kind == "failed":
            self.failed.append((job, event.code or 0))
        else:
            self.blocked.append(job)
        print(f"{head}{words[event.kind]}{self._left() if event.kind == 'done' else ''}", flush=True)

    def summary(self) -> int:
        """What failed and why, and the exit code."""
        done = len(self.jobs) - len(self.failed) - len(self.blocked)
        print(f"\n{done} of {len(self.jobs)} jobs done in {duration(time.monotonic() - self.begin)}")
        for job, code in self.failed:
            log = self.store.log(job)
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
            print(f"failed: {job.key} (exit code {code}; {log})" + "".join(f"\n    {line}" for line in last))
        for job in self.blocked:
            print(f"blocked: {job.key} waits for a job that failed")
        return 1 if self.failed or self.blocked else 0

    def _left(self) -> str:
        """Estimate from jobs of the same name under other seeds, else from the mean of all."""
        every = [seconds for found in self.took.values() for seconds in found]
        rest = [job for job in self.jobs if job.key in self.open]
        if not every or not rest:
            return ""
        means = {name: sum(found) / len(found) for name, found in self.took.items()}
        left = sum(means.get(job.name, sum(every) / len(every)) for job in rest)
        return f"   ({len(rest)} to go, about {duration(left / self.slots)})"

    def _copy_logs(self) -> None:
        for log, position in self.shown.items():
            if log.exists() and log.stat().st_size > position:
                with log.open("rb") as file:
                    file.seek(position)
                    text = file.read()
                self.shown[log] = position + len(text)
                print(text.decode(errors="replace"), end="", flush=True)


class Tables:
    """The plan's report commands, over every finished row in OUT, whichever sweep ran it."""

    def __init__(self, plan: Plan, values: Mapping[str, Value], store: JobStore) -> None:
        self.plan, self.values, self.store = plan, values, store
        self.said: list[str] | None = None
        """What the commands printed the last time; None: they have not run yet."""

    def write(self) -> None:
        """Run them; one that fails is said, and the others still write theirs."""
        self.said = []
        seeds = sorted(int(path.name[1:]) for path in self.store.out.glob("s*") if path.name[1:].isdigit())
        jobs = self.plan.jobs(seeds, self.values)
        rows = [job.folder for job in jobs if job.row and self.store.is_done(job)]
        for command in self.plan.reports(rows, self.values) if rows else []:
            words = [sys.executable, *command[1:]] if command[0] == "python" else command
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=REPORT_SECONDS)
                problem = done.stderr.strip()[-500:] if done.returncode else ""
                self.said.append(done.stdout)
            except subprocess.TimeoutExpired:
                problem = f"took more than {REPORT_SECONDS} s"
            if problem:
                print(f"{PROG}: {shlex.join(command)[:100]} ...: {problem}", file=sys.stderr)


def sweep(plan: Plan, values: Mapping[str, Value], jobs: Sequence[Job], executor: Executor, config: Config) -> int:
    """Run the jobs; the exit code."""
    store = JobStore(config.out)
    screen, tables = Screen(jobs, store, config.jobs, config.follow), Tables(plan, values, store)
    with closing(run_jobs(jobs, store, executor, config.jobs)) as events:
        for event in events:
            screen.show(event)
            if event.kind == "done" and event.job.row:
                tables.write()
    if tables.said is None:
        tables.write()
    print("\n" + "".join(tables.said), end="")
    return screen.summary()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    flags = parser()
    config = flags.parse_args(words[:cut])
    try:
        plan = make_plan(config, words[cut + 1 :] if cut < len(words) else None)
        if config.out is None:
            name = config.plan.stem if config.plan else "sweep"
            config.out = Path("runs", "-".join(filter(None, (name, config.size or next(iter(plan.sizes), "")))))
        if repeated := _repeated([str(seed) for seed in config.seeds or ()]):
            raise ValueError(f"--seeds: {repeated} is given twice; give each seed once")
        values = plan.values(config.size, [pair for pairs in config.set for pair in pairs], config.out)
        jobs = select(plan.jobs(config.seeds or plan.seeds, values), config.only)
        if config.dry_run:
            for job in jobs:
                print(job.method, job.setting, job.seed, shlex.join(job.command), sep="\t")
            return 0
        check_programs(jobs)
        executor = make_executor(config)
    except ValueError as error:
        flags.fail([str(error)])
    # also where a shell started us with SIGINT ignored; and a scheduler's signal is a Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler)
    try:
        return sweep(plan, values, jobs, executor, config)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
