# SPDX-License-Identifier: Apache-2.0
"""sweep.py: plans become commands, commands run once and in order, and nothing that stops a sweep costs more than time.

The jobs are small programs that note what they were given; the slow test runs the real table.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sweep
from common.engine.jobs import Job, JobStore, run_jobs
from common.engine.plans import grid_plan, read_plan, select
from common.nets import Architecture
from common.recipes.contents import CONTENTS
from genotypes import lookup

ROOT = Path(__file__).resolve().parents[1]
PLANS = sorted((ROOT / "scripts" / "plans").glob("*.json"))

# python job.py NAME [DIR] [CODE]: notes NAME, its start, end and threads; makes DIR; ends with CODE.
# A file hold-NAME makes it wait for an interrupt, once; fail-NAME makes it fail, once.
JOB = """
import os, sys, time
from pathlib import Path
name, folder, code = (*sys.argv[1:], "", "0")[:3] if len(sys.argv) > 2 else (sys.argv[1], "", "0")
here = Path(__file__).parent
def note(text):
    with (here / "notes").open("a") as file: file.write(f"{name} {text}\\n")
note(f"start {os.environ.get('OMP_NUM_THREADS', '-')}")
print("printed by", name, flush=True)
if folder: Path(folder).mkdir(parents=True, exist_ok=True)
if (here / f"hold-{name}").exists():
    (here / f"hold-{name}").unlink()
    (here / f"pid-{name}").write_text(str(os.getpid()))
    note("holds")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
if (here / f"slow-{name}").exists(): time.sleep(0.7)
if (here / f"fail-{name}").exists():
    (here / f"fail-{name}").unlink()
    sys.exit(7)
note("end")
sys.exit(int(code or 0))
"""


class Sandbox:
    """A folder with the program, and plans over it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.plan = folder, folder / "out", folder / "plan.json"
        self.program = folder / "job.py"
        self.program.write_text(JOB)

    def write(self, *jobs: dict[str, Any], **more: Any) -> None:
        """A plan of jobs given by name, `after` and `code` (its exit code); each makes its folder."""
        entries = []
        for job in jobs:
            job = {"method": "m", **job}
            code = job.pop("code", 0)
            job.setdefault("command", ["python", str(self.program), job["name"], "{dir}", str(code)])
            entries.append(job)
        self.plan.write_text(json.dumps({"jobs": entries, **more}))

    def command(self, *flags: str) -> list[str]:
        return [sys.executable, str(ROOT / "sweep.py"), str(self.plan), "--out", str(self.out), *flags]

    def run(self, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        return subprocess.run(
            self.command(*flags), capture_output=True, text=True, timeout=60, env={**kept, **environment}
        )

    def start(self, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def mark(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def notes(self) -> list[str]:
        """`NAME WHAT` of everything that the jobs noted."""
        path = self.folder / "notes"
        return [" ".join(line.split()[:2]) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, note: str) -> None:
        deadline = time.monotonic() + 30
        while note not in self.notes():
            assert time.monotonic() < deadline, self.notes()
            time.sleep(0.02)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    (tmp_path / "a place").mkdir()
    return Sandbox(tmp_path / "a place")  # a space in the path on purpose


def commands(plan: Path, size: str | None = None, settings: Sequence[str] = (), seed: int = 0) -> dict[str, str]:
    """name -> command, with OUT for the folder of the runs."""
    read = read_plan(plan)
    return {job.name: " ".join(job.command) for job in read.jobs([seed], read.values(size, settings, Path("OUT")))}


# --------------------------------------------------------------------------------------------------------------- plans

PLAN = {
    "variables": {"preset": "", "recipe": [], "samples": ["1", "2"], "word": "w"},
    "sizes": {"big": {"recipe": ["--a", "--b"]}, "tiny": {"preset": "p", "samples": ["7"]}},
    "jobs": [
        {
            "name": "first/search",
            "method": "One",
            "setting": "{2,4} of {word}",
            "command": "run [--preset {preset}] -s {seed} --save {dir}",
        },
        {"name": "first/train", "method": "one", "command": ["run", "{dir:first/search}", "{recipe}", "x={recipe}"]},
        {"name": "k-{k}", "method": "two", "grid": {"k": "{samples}"}, "command": "run {k} --save {dir}"},
        {"name": "all", "method": "two", "command": "rank {dir:k-*} to {out}/{size}/s{seed}", "after": ["first/*"]},
    ],
    "report": ["table {rows} --out {out}/t.md"],
}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN))
    return path


def test_placeholders_are_filled(plan: Path) -> None:
    assert commands(plan, seed=3) == {
        "first/search": "run -s 3 --save OUT/s3/first/search",
        "first/train": "run OUT/s3/first/search --a --b x=--a --b",
        "k-1": "run 1 --save OUT/s3/k-1",
        "k-2": "run 2 --save OUT/s3/k-2",
        "all": "rank OUT/s3/k-1 OUT/s3/k-2 to OUT/big/s3",
    }
    tiny = commands(plan, "tiny", ["preset=a b", "recipe=--c 'd e'"])
    assert tiny["first/search"] == "run --preset a b -s 0 --save OUT/s0/first/search"
    assert tiny["first/train"] == "run OUT/s0/first/search --c d e x=--c d e"
    assert [name for name in tiny if name.startswith("k-")] == ["k-7"]


def test_words_stay_words_and_jobs_know_what_they_wait_for(plan: Path) -> None:
    read = read_plan(plan)
    jobs = read.jobs([0, 1], read.values("tiny", ["preset=a b"], Path("O U T")))
    assert jobs[0].command == ("run", "--preset", "a b", "-s", "0", "--save", "O U T/s0/first/search")
    assert (jobs[0].setting, jobs[0].method) == ("{2,4} of w", "One")
    assert [job.key for job in jobs[:4]] == ["s0/first/search", "s0/first/train", "s0/k-7", "s0/all"]
    assert jobs[1].after == ("s0/first/search",)
    assert jobs[7].after == ("s1/first/search", "s1/first/train", "s1/k-7")
    rows = [Path("O U T/s0/k-7"), Path("O U T/s1/k-7")]
    expected = ["table", "O U T/s0/k-7", "O U T/s1/k-7", "--out", "O U T/t.md"]
    assert read.reports(rows, read.values(None, [], Path("O U T"))) == [expected]


def test_the_id_is_the_digest_of_the_command() -> None:
    job = Job("n", "m", "s", 0, ("python", "x.py", "--save", "a"), Path("a"))
    # printf '["python", "x.py", "--save", "a"]' | sha256sum
    text = subprocess.run(["sha256sum"], input=b'["python", "x.py", "--save", "a"]', capture_output=True).stdout
    assert job.id == text.decode()[:12]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["ONE"], ["first/search", "first/train"]),
        (["first/train"], ["first/search", "first/train"]),
        (["first"], ["first/search", "first/train"]),
        (["k-2"], ["k-2"]),
        (["k-*", "first/search"], ["first/search", "k-1", "k-2"]),
        (["all"], ["first/search", "first/train", "k-1", "k-2", "all"]),
        ([], ["first/search", "first/train", "k-1", "k-2", "all"]),
    ],
)
def test_only_takes_along_what_is_waited_for(plan: Path, only: list[str], names: list[str]) -> None:
    read = read_plan(plan)
    assert [job.name for job in select(read.jobs([0], read.values(None, [], Path("o"))), only)] == names


def change(path: Sequence[Any], value: Any) -> dict[str, Any]:
    """PLAN with one entry replaced."""
    data = json.loads(json.dumps(PLAN))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["jobs"], [], "jobs"),
        (["job"], [], "did you mean jobs?"),
        (["seeds"], ["x"], "seeds"),
        (["variables", "seed"], "1", "seed has a meaning of its own"),
        (["variables", "a b"], "1", "a b"),
        (["variables", "x"], {"a": 1}, "x: give"),
        (["sizes", "big"], {"preest": "1"}, "did you mean preset?"),
        (["jobs", 0, "name"], "", "job 1: needs the texts name and method"),
        (["jobs", 0, "rows"], True, "did you mean row?"),
        (["jobs", 0, "command"], "run 'open", "No closing quotation"),
        (["jobs", 0, "command"], [], "the command is empty"),
        (["jobs", 0, "command"], "run {presets} {dir}", "did you mean preset?"),
        (["jobs", 0, "command"], "run {preset} {dir}", "{preset} is empty"),
        (["jobs", 0, "command"], "run [--a {preset} {dir}", "without its ]"),
        (["jobs", 0, "command"], "run {dir:first/train}", "waits for first/train, but no job before it"),
        (["jobs", 0, "after"], ["all"], "waits for all"),
        (["jobs", 1, "name"], "first/search", "is there twice"),
        (["jobs", 2, "name"], "k", "is there twice"),
        (["jobs", 2, "grid"], {"seed": [1, 2]}, "grid: seed has a meaning of its own; use --seeds 0 1 2"),
        (["jobs", 1, "command"], "run -s 0 --save OUT/s0/first/search", "have the same command"),
        (["report"], ["table {row}"], "did you mean rows?"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place(
    path: list[Any], value: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(change(path, value)))
    with pytest.raises(ValueError, match="plan.json") as caught:
        read = read_plan(file)
        values = read.values(None, [], Path("OUT"))
        read.jobs([0], values)
        read.reports([Path("r")], values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "tinny"], "did you mean tiny?"),
        (["--set", "preste=1"], "did you mean preset?"),
        (["--set", "preset"], "NAME=VALUE"),
        (["--only", "fist/train"], "did you mean first/train?"),
        (["--grid", "a=1"], "drop the plan"),
        (["--", "echo"], "drop the plan"),
        (["--jobs", "0"], "--jobs"),
        ([], "there is no program run"),
    ],
)
def test_wrong_flags_start_nothing(
    plan: Path, flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main([str(plan), "--out", str(tmp_path / "out"), *flags])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- grids


def test_grid_of_flags_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--grid", "lr=.1,.2", "--grid=--epochs=3", "--seeds", "0", "5", "--out", "o", "--dry-run"]
    assert sweep.main([*flags, "--", "python", "darts/train.py", "--arch", "PC_DARTS"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [
        ["darts", "lr=.1 epochs=3", "0"],
        ["darts", "lr=.2 epochs=3", "0"],
        ["darts", "lr=.1 epochs=3", "5"],
        ["darts", "lr=.2 epochs=3", "5"],
    ]
    assert lines[3][3] == (
        "python darts/train.py --arch PC_DARTS --lr .2 --epochs 3 --seed 5 --save o/s5/lr-.2_epochs-3 --resume auto"
    )


@pytest.mark.parametrize("entry", ["seed=0,1,2", "--seed=0,1,2"])
def test_a_grid_of_seeds_is_refused_with_the_cure(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main([f"--grid={entry}", "--dry-run", "--", "python", "qdarts/train.py"])
    assert end.value.code == 2
    assert "--grid: seed has a meaning of its own; use --seeds 0 1 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "lr=.1", "--seeds", "0", "1", "0"], "--seeds: 0 is given twice"),
        (["--grid", "lr=.1,.2,.1"], "--grid lr=.1,.2,.1: names .1 twice"),
        (["--grid", "lr=.1", "epochs=3"], "epochs=3: is no plan; for more flags of a grid write --grid epochs=3, too"),
    ],
)
def test_what_is_given_twice_or_to_no_flag_is_refused_by_name(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        sweep.main([*flags, "--dry-run", "--", "python", "qdarts/train.py"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_what_an_id_does_not_see_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    for text in (capsys.readouterr().out, (root / "docs" / "sweep.md").read_text()):
        text = " ".join(text.split())
        assert "an edited preset" in text and "not noticed" in text and "--out" in text


def test_grid_of_any_command() -> None:
    plan = grid_plan(["prog", "{x}", "[--not-a-group]", "--into={dir}", "{seed}"], {"x": ["1", "2"]}, [0])
    jobs = plan.jobs([4], plan.values(None, [], Path("o")))
    assert [" ".join(job.command) for job in jobs] == [
        "prog 1 --not-a-group --into=o/s4/x-1 4",
        "prog 2 --not-a-group --into=o/s4/x-2 4",
    ]


def test_grid_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"command": "python qdarts/train.py", "grid": {"epochs": [1, 2]}, "seeds": [0, 1]}))
    assert sweep.main([str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "--epochs 2 --seed 1 --save runs/grid/s1/epochs-2 --resume auto" in lines[3]


# ------------------------------------------------------------------------------------------------------------- running


def test_jobs_run_once_in_order_and_dry_run_runs_nothing(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b", "after": ["a"]}, seeds=[0, 1])
    dry = sandbox.run("--dry-run")
    assert dry.returncode == 0 and len(dry.stdout.splitlines()) == 4 and not sandbox.out.exists()
    assert all(line.startswith("m\t\t") and "\tpython " in line for line in dry.stdout.splitlines())
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    once = ["a start", "a end", "b start", "b end"]
    assert sandbox.notes() == once * 2
    assert sandbox.run().returncode == 0
    assert sandbox.notes() == once * 2, "a second sweep finds everything done"
    sandbox.run("--seeds", "1", "2", "--only", "a")
    assert sandbox.notes() == [*once * 2, "a start", "a end"]
    (sandbox.out / "s0" / "a").rmdir()
    sandbox.run("--seeds", "0")
    assert sandbox.notes()[10:] == once, "its folder was gone; what rests on it is done again too"


def test_state_on_disk(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b", "code": 3})
    sandbox.run()
    states = [json.loads(path.read_text()) for path in (sandbox.out / ".sweep").glob("*.json")]
    found = {state["name"]: (state["state"], state["attempts"], state["seed"]) for state in states}
    assert found == {"a": ("done", 1, 0), "b": ("failed", 2, 0)}
    assert all(state["seconds"] > 0 and "printed by" in Path(state["log"]).read_text() for state in states)


def test_failure_is_retried_once_reported_and_blocks_only_what_waits(sandbox: Sandbox) -> None:
    sandbox.write(
        {"name": "bad", "code": 3}, {"name": "after-bad", "after": ["bad"]}, {"name": "flaky"}, {"name": "good"}
    )
    sandbox.mark("fail-flaky")
    done = sandbox.run()
    assert done.returncode == 1
    starts = [note for note in sandbox.notes() if note.endswith("start")]
    assert starts == ["bad start", "bad start", "flaky start", "flaky start", "good start"]
    assert "2 of 4 jobs done" in done.stdout
    assert "failed: s0/bad (exit code 3;" in done.stdout and "printed by bad" in done.stdout
    assert "blocked: s0/after-bad" in done.stdout
    sandbox.write(
        {"name": "bad", "code": 0}, {"name": "after-bad", "after": ["bad"]}, {"name": "flaky"}, {"name": "good"}
    )
    assert sandbox.run().returncode == 0, "another command is another job"
    assert sandbox.notes()[-4:] == ["bad start", "bad end", "after-bad start", "after-bad end"]


def test_a_usage_error_is_reported_at_once(sandbox: Sandbox) -> None:
    """What refuses its flags refuses them the second time too."""
    sandbox.write({"name": "bad", "code": 2}, {"name": "good"})
    done = sandbox.run()
    assert done.returncode == 1 and "once more" not in done.stdout
    assert [note for note in sandbox.notes() if note.endswith("start")] == ["bad start", "good start"]
    assert "failed: s0/bad (exit code 2;" in done.stdout


def test_interrupt_stops_the_jobs_and_the_same_command_goes_on(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b"}, {"name": "c"})
    sandbox.mark("hold-b")
    process = sandbox.start()
    sandbox.wait_for("b holds")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
    assert sandbox.notes()[-1] == "b interrupted", "the job got its Ctrl-C and had its time"
    assert sandbox.run().returncode == 0
    assert sandbox.notes()[5:] == ["b start", "b end", "c start", "c end"]


def test_a_job_that_a_killed_sweep_left_is_not_started_twice(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b", "after": ["a"]})
    sandbox.mark("hold-a")
    process = sandbox.start()
    sandbox.wait_for("a holds")
    process.kill()
    process.communicate()
    second = sandbox.start()
    time.sleep(1.5)
    assert sandbox.notes() == ["a start", "a holds"]
    os.kill(int((sandbox.folder / "pid-a").read_text()), signal.SIGINT)
    said, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert "an earlier sweep's process still runs it" in said
    assert sandbox.notes()[2:] == ["a interrupted", "a start", "a end", "b start", "b end"]


def test_jobs_share_the_machine(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b"}, {"name": "c", "after": ["a", "b"]})
    sandbox.mark("slow-a", "slow-b")
    assert sandbox.run("--jobs", "2").returncode == 0
    notes = sandbox.notes()
    assert set(notes[:2]) == {"a start", "b start"} and notes[4:] == ["c start", "c end"]
    share = max(1, (os.cpu_count() or 1) // 2)
    assert (sandbox.folder / "notes").read_text().splitlines()[0].endswith(f"start {share}")
    sandbox.run("--jobs", "2", "--seeds", "1", OMP_NUM_THREADS="5")
    assert (sandbox.folder / "notes").read_text().splitlines()[-1 - 1].endswith("start 5"), "the user's own stands"


def test_tables_are_written_after_every_row_and_lose_none(sandbox: Sandbox) -> None:
    table = sandbox.folder / "table.py"
    table.write_text("import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '\\n')")
    report = [["python", str(table), "{out}/tables", "{rows}"], ["python", "-c", "raise SystemExit('no table')"]]
    jobs = [{"name": "search"}, *({"name": name, "row": True} for name in "abc")]
    jobs[2]["code"] = 3
    sandbox.write(*jobs, report=report)
    done = sandbox.run()
    assert done.returncode == 1 and "no table" in done.stderr
    a, c = (str(sandbox.out / "s0" / name) for name in "ac")
    assert (sandbox.out / "tables").read_text().splitlines() == [a, f"{a} {c}"]
    sandbox.run("--seeds", "1", "--only", "a")
    last = (sandbox.out / "tables").read_text().splitlines()[-1]
    assert last == f"{a} {c} {sandbox.out / 's1' / 'a'}", "rows of earlier sweeps stay in the table"


def test_follow_shows_what_the_jobs_print(sandbox: Sandbox) -> None:
    sandbox.write({"name": "a"}, {"name": "b"})
    sandbox.mark("fail-b")
    out = sandbox.run("--follow").stdout
    assert out.count("printed by a") == 1 and out.count("printed by b") == 2
    assert out.index("$ python") < out.index("printed by a") < out.index("[1/2] m , seed 0: done")
    assert "printed" not in sandbox.run("--follow").stdout, "logs of earlier sweeps are not shown again"


class Imagined:
    """An executor without processes: each job takes two polls; `codes` are consumed in order of submission."""

    def __init__(self, codes: Sequence[int]) -> None:
        self.codes = list(codes)
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.polls: dict[str, int] = {}

    def submit(self, command: Sequence[str], log: Path) -> str | None:
        self.submitted.append(command[0])
        self.polls[command[0]] = 0
        return command[0]

    def poll(self, handle: str) -> int | None:
        self.polls[handle] += 1
        return self.codes.pop(0) if self.polls[handle] == 2 else 0 if handle in self.cancelled else None

    def cancel(self, handle: str, *, kill: bool = False) -> None:
        if not kill:
            self.cancelled.append(handle)


def test_any_executor_with_the_three_verbs_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engine.jobs.POLL_SECONDS", 0)
    jobs = [Job(name, "m", "", 0, (name,), tmp_path) for name in "abc"]
    executor = Imagined([0, 5, 0, 0])
    events = [(event.kind, event.job.name) for event in run_jobs(jobs, JobStore(tmp_path), executor) if event.job]
    b = [("start", "b"), ("retry", "b"), ("done", "b")]
    assert events == [("start", "a"), ("done", "a"), *b, ("start", "c"), ("done", "c")]
    assert executor.submitted == ["a", "b", "b", "c"]
    closed = Imagined([])
    generator = run_jobs([Job("d", "m", "", 0, ("d",), tmp_path)], JobStore(tmp_path), closed)
    assert next(generator).kind == "start"
    generator.close()
    assert closed.cancelled == ["d"], "who stops reading stops the jobs"


# ------------------------------------------------------------------------------------------------- the plans of scripts


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_are_sound_at_every_size(path: Path) -> None:
    plan = read_plan(path)
    for size in plan.sizes or [None]:
        values = plan.values(size, [f"{name}=1" for name in ("target",) if name in plan.variables], Path("o"))
        jobs = plan.jobs([0, 1], values)
        plan.reports([Path("o/s0/x")], values)
        assert any(job.row for job in jobs)
        for job in jobs:
            assert job.command[0] == "python" and job.method and job.setting, job.key
            assert job.command[1] == "-m" or (ROOT / job.command[1]).is_file(), f"{job.key}: {job.command[1]}"
            assert str(job.folder) in job.command or not job.row, f"{job.key} does not save into its folder"


def test_lists_of_a_script_are_words_or_one_text(tmp_path: Path) -> None:
    """--only and --seeds take all words until the next flag; quoted or with commas they mean the same."""
    script = ["bash", str(ROOT / "scripts" / "table1_cifar10.sh"), "--size", "smoke"]
    planned = set()
    for only, seeds in ((["darts", "ptq"], ["0", "4"]), (["darts ptq"], ["0 4"]), (["darts,ptq"], ["0,4"])):
        dry = subprocess.run(
            [*script, "--only", *only, "--dry-run", "--seeds", *seeds], capture_output=True, text=True, cwd=tmp_path
        )
        assert dry.returncode == 0, dry.stderr
        planned.add(dry.stdout)
    (text,) = planned
    lines = [line.split("\t") for line in text.splitlines()]
    assert {line[0] for line in lines} == {"darts", "ptq"} and {line[2] for line in lines} == {"0", "4"}
    wrong = subprocess.run([*script, "--jobs", "2", "ptq"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "unknown argument 'ptq'" in wrong.stderr


def test_the_table_has_the_rows_of_the_paper(tmp_path: Path) -> None:
    dry = subprocess.run(
        ["bash", str(ROOT / "scripts" / "table1_cifar10.sh"), "--size", "small", "--dry-run", "--data", "D"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert dry.returncode == 0, dry.stderr
    lines = [line.split("\t") for line in dry.stdout.splitlines()]
    assert len(lines) == 3 * 18 and {line[2] for line in lines} == {"0", "1", "2"}
    of_seed = [(method, setting) for method, setting, seed, _ in lines if seed == "1"]
    assert [setting for method, setting in of_seed if method == "ptq"] == ["2 bits", "4 bits", "8 bits"]
    assert len([1 for method, _ in of_seed if method == "fbqat"]) == 4
    assert [setting for method, setting in of_seed if method == "qdarts" and "search" not in setting] == [
        "{2,4}",
        "{2,4,8}",
        "{2,4}, larger capacity",
    ]
    by_words = {tuple(line[:3]): line[3] for line in lines}
    assert by_words["qdarts", "{2,4}, search", "2"] == (
        f"python qdarts/search.py --preset small --seed 2 --data {tmp_path}/D --bits 2 4 --target-bitops 187275674 "
        "--save runs/table1-small/s2/qdarts-2-4/search --resume auto"
    )
    assert by_words["qdarts", "{2,4,8}", "0"] == (
        f"python qdarts/train.py --preset small --seed 0 --data {tmp_path}/D "
        "--arch runs/table1-small/s0/qdarts-2-4-8/search "
        "--save runs/table1-small/s0/qdarts-2-4-8/train --resume auto"
    )


def test_the_imagenet_table_has_the_rows_of_the_paper(tmp_path: Path) -> None:
    """Every method, both sets of bits, on one search; ImageNet in its .ffcv files or as a folder, or digits."""
    script = ["bash", str(ROOT / "scripts" / "table2_imagenet.sh"), "--dry-run"]

    def planned(*flags: str) -> list[list[str]]:
        dry = subprocess.run([*script, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert dry.returncode == 0, dry.stderr
        return [line.split("\t") for line in dry.stdout.splitlines()]

    lines = planned("--trainfile", "a b.ffcv", "--valfile", "v.ffcv")
    assert len(lines) == 3 * 17 and {line[2] for line in lines} == {"0", "1", "2"}
    rows = {(method, setting) for method, setting, _, _ in lines if "search" not in setting}
    lsq_hwgq = {("fbqat", f"{bits} bits, {name}") for bits in "24" for name in ("HWGQ", "LSQ")}
    both = {(method, bits) for method in ("qsubnet", "qdarts") for bits in ("{2,4}", "{2,4,8}")}
    assert rows == {("darts", "fp32")} | {("ptq", f"{bits} bits") for bits in "248"} | lsq_hwgq | both
    files = f"--dataset imagenet --trainfile '{tmp_path}/a b.ffcv' --valfile {tmp_path}/v.ffcv"
    assert all((files in line[3]) == (line[0] != "ptq") for line in lines), "ptq takes them from the run"
    folder = planned("--data", "D", "--size", "small", "--seeds", "0")
    assert all(f"--data {tmp_path}/D" in line[3] for line in folder)
    assert not any("imagenet --" in line[3] for line in planned("--size", "smoke")), "needs no file"


def test_darts_on_imagenet_is_a_row_when_asked_for(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "scripts" / "table_darts.sh"), "--dry-run", "--seeds", "0"]
    for flags, last in (
        ([], "--arch PC_DARTS --seed 0"),
        (["--imagenet", "D"], f"--arch DARTS_V2 --dataset imagenet --data {tmp_path}/D --seed 0"),
        (["--trainfile", "T", "--valfile", "V"], f"imagenet --trainfile {tmp_path}/T --valfile {tmp_path}/V --seed 0"),
        (["--size", "smoke"], "--arch DARTS_V2 --preset smoke --image-size 24 --seed 0"),
    ):
        dry = subprocess.run([*script, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert dry.returncode == 0, dry.stderr
        assert last in dry.stdout.splitlines()[-1]


# What the rows of a table are there to differ in, and where they go.
VARIED = {"arch", "save", "wbits", "abits", "weight_quantizer", "activation_quantizer", "match_bitops"}
VARIED |= {"match_reference", *CONTENTS}


@pytest.mark.parametrize("size", ["paper", "small", "quickstart", "smoke"])
@pytest.mark.parametrize("name, count", [("table1_cifar10", 10), ("table2_imagenet", 9), ("ablations", 10)])
def test_one_recipe_for_every_training_of_a_table(
    name: str, count: int, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program resolves its planned command, presets and defaults of its method included; nothing is trained."""
    plan = read_plan(ROOT / "scripts" / "plans" / f"{name}.json")
    jobs = plan.jobs([0], plan.values(size, [f"data={tmp_path}"] if "data" in plan.variables else [], tmp_path))
    # what a search of partial channels leaves behind, the cells; and one of bits
    cells = Architecture(lookup("PC_DARTS")[1], search={"supernet": "pc-darts"})
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        found = cells.with_uniform_bits(2, 2) if job.command[1] == "qsubnet/search.py" else cells
        found.save(job.folder / "architecture.json")
    resolved: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if not job.command[1].endswith("/train.py"):
            continue
        configs: list[Any] = []
        monkeypatch.setattr("common.recipes.train.run_training", lambda config, seen=configs, **_: seen.append(config))
        main = importlib.import_module(job.command[1].removesuffix(".py").replace("/", ".")).main
        # files of draws are made by jobs of their own
        words = [str(job.folder) if word.endswith(".json") else word for word in job.command[2:]]
        assert main(words) == 0
        resolved[job.name] = {key: value for key, value in configs[0].as_dict().items() if key not in VARIED}
    assert len(resolved) >= count
    first, recipe = next(iter(resolved.items()))
    for other, values in resolved.items():
        assert values == recipe, f"{other} differs from {first}"


TARGETS = {
    # size: (data set, image size, init channels, layers)
    "smoke": ("digits", 16, 4, 3),
    "quickstart": ("digits", 16, 8, 5),
    "small": ("cifar10", 16, 8, 5),
}


@pytest.mark.parametrize("size", TARGETS)
def test_targets_are_what_the_plan_says(size: str) -> None:
    """Ends in full precision plus the quantised layers of fp32 PC_DARTS / 160 and / 64, counted anew."""
    from common.cost import network_cost
    from common.nets import build_network
    from genotypes import lookup

    dataset, image_size, channels, layers = TARGETS[size]
    network = build_network(
        lookup("PC_DARTS")[1],
        num_classes=10,
        in_channels=1 if dataset == "digits" else 3,
        init_channels=channels,
        layers=layers,
    )
    cost = network_cost(network, image_size).to_json()
    ends = cost["bitops"] - cost["bitops_quantized"]
    plan = read_plan(ROOT / "scripts" / "plans" / "table1_cifar10.json")
    values = plan.values(size, [], Path("o"))
    assert int(values["target-2-4"]) == round(ends + cost["bitops_quantized"] / 160)
    assert int(values["target-2-4-8"]) == round(ends + cost["bitops_quantized"] / 64)


# ------------------------------------------------------------------------------------------------------- the real table


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_table_interrupted_and_resumed_equals_the_one_in_one_go(tmp_path: Path) -> None:
    """Real jobs of every method at smoke size, with a Ctrl-C in the middle of the second and a kill in the fourth."""
    flags = ["--size", "smoke", "--seeds", "0"]

    def command(name: str) -> list[str]:
        out = str(tmp_path / name)
        plan = str(ROOT / "scripts" / "plans" / "table1_cifar10.json")
        return [sys.executable, str(ROOT / "sweep.py"), plan, *flags, "--out", out, "--set", f"results={out}"]

    def rows(name: str) -> list[tuple[str, ...]]:
        with (tmp_path / name / "table1_smoke.csv").open(newline="") as file:
            found = csv.DictReader(file)
            columns = ("method", "architecture", "bits", "n", "accuracy", "test_loss", "bitops", "weight_bytes")
            return [tuple(row[column] for column in columns) for row in found]

    environment = dict(os.environ, OMP_NUM_THREADS="1")
    for job, number in (("pcdarts/train", signal.SIGINT), ("fbqat-2-hwgq", signal.SIGKILL)):
        process = subprocess.Popen(command("broken"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 900
        while not list((tmp_path / "broken" / "s0" / job).glob("checkpoints/step-*/meta.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    for name in ("broken", "whole"):
        done = subprocess.run(command(name), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert rows("broken") == rows("whole")
    assert len(rows("whole")) == 13
    for name in ("table.md", "pareto.svg"):
        assert (tmp_path / "broken" / name).stat().st_size > 1000
