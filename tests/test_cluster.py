# SPDX-License-Identifier: Apache-2.0
"""Jobs on a cluster: submitit's local cluster, and a stand-in for Slurm; the batch scripts of scripts/slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sweep
from common.engine.cluster import ranked
from common.engine.jobs import JobStore
from common.engine.plans import read_plan
from tests.helpers import fake_slurm
from tests.test_sweep import Sandbox

ROOT = Path(__file__).resolve().parents[1]
NEEDS_SUBMITIT = "submitit is not installed: bash scripts/setup.sh cluster"


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    (tmp_path / "a place").mkdir()
    return Sandbox(tmp_path / "a place")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in's folder; its commands are on PATH. Nothing that was started outlives the test."""
    folder = tmp_path / "slurm"
    for key, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(key, value)
    yield folder
    for path in folder.glob("*.options"):
        if fake_slurm.state(folder, path.stem) in ("RUNNING", "PENDING"):
            fake_slurm.scancel(folder, [path.stem])


def code(sandbox: Sandbox, name: str) -> dict:
    store, read = JobStore(sandbox.out), read_plan(sandbox.plan)
    (job,) = (job for job in read.jobs([0], read.values(None, [], sandbox.out)) if job.name == name)
    return dict(store.read(job))


# ------------------------------------------------------------------------------------------------- words of a command


def test_searches_and_trainings_are_started_by_torchrun() -> None:
    train = ["python", "qdarts/train.py", "--arch", "X"]
    assert ranked(train, 1) == [sys.executable, "qdarts/train.py", "--arch", "X"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert ranked(train, 4) == [*launcher, *train[1:]]
    for other in (["python", "report.py", "x"], ["python", "-m", "common.recipes"], ["sort"]):
        assert ranked(other, 4)[-1] == other[-1] and "torch.distributed.run" not in ranked(other, 4)
    words = ranked(train, 8, ["a", "b"], node=1, job="31007_2")
    assert words[3:10] == [
        "--nnodes=2",
        "--node_rank=1",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=a:20072",
        "--rdzv_id=31007_2",
        "--nproc_per_node=8",
        "qdarts/train.py",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cluster", "nodes=1"], "only has a meaning with --executor"),
        (["--executor", "slurm"], "there is no sbatch here"),
        (["--executor", "submitit", "--cluster", "nodes"], "is no NAME=VALUE"),
        (["--executor", "submitit", "--cluster", "timeout=5"], "timeout"),
        (["--executor", "cloud"], "local, slurm"),
    ],
)
def test_wrong_flags_submit_nothing(
    flags: list[str], words: str, sandbox: Sandbox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "submitit" in flags:
        pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    sandbox.write({"name": "a"})
    with pytest.raises(SystemExit) as end:
        sweep.main([str(sandbox.plan), "--out", str(sandbox.out), *flags])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(sandbox.out.rglob("*.json"))


# -------------------------------------------------------------------------------------------- submitit's local cluster


def test_a_failing_a_finished_and_a_new_job(sandbox: Sandbox) -> None:
    """The same ids, states, logs, retries and skips as with local processes."""
    pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    sandbox.write({"name": "finished"})
    assert sandbox.run().returncode == 0
    ids = {path.name for path in (sandbox.out / ".sweep").glob("*.json")}
    jobs = [{"name": "finished"}, {"name": "failing", "code": 3}, {"name": "new"}, {"name": "later", "after": ["new"]}]
    sandbox.write(*jobs)
    done = sandbox.run("--executor", "submitit", "--jobs", "2")
    assert done.returncode == 1, done.stderr
    assert "seed 0: done before" in done.stdout and "3 of 4 jobs done" in done.stdout
    assert "failed: s0/failing (exit code 3;" in done.stdout and "printed by failing" in done.stdout
    notes = sandbox.notes()
    assert notes.count("finished start") == 1 and notes.count("failing start") == 2
    assert notes.index("new end") < notes.index("later start") < notes.index("later end")
    assert ids <= {path.name for path in (sandbox.out / ".sweep").glob("*.json")}
    assert (code(sandbox, "failing")["state"], code(sandbox, "failing")["attempts"]) == ("failed", 2)
    assert code(sandbox, "new")["state"] == "done"
    before = len(notes)
    sandbox.write(*(job for job in jobs if job["name"] != "failing"))
    assert sandbox.run().returncode == 0
    assert len(sandbox.notes()) == before, "whichever executor ran a job, it is done"


@pytest.mark.slow
def test_ctrl_c_reaches_a_job_of_the_cluster(sandbox: Sandbox) -> None:
    pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    sandbox.write({"name": "a"})
    sandbox.mark("hold-a")
    process = sandbox.start("--executor", "submitit")
    sandbox.wait_for("a holds")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    sandbox.wait_for("a interrupted")
    assert sandbox.run("--executor", "submitit").returncode == 0
    assert sandbox.notes()[-2:] == ["a start", "a end"]


# --------------------------------------------------------------------------------------------------- the Slurm executor


def test_slurm_jobs_outlive_the_sweep_and_are_taken_up(sandbox: Sandbox, slurm: Path) -> None:
    """A sweep is killed; its job runs on. The next sweep waits for it, and counts one that ended meanwhile."""
    pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    sandbox.write({"name": "a"}, {"name": "b"})
    sandbox.mark("slow-a", "slow-b")
    flags = ["--executor", "slurm", "--cluster", "timeout_min=7", "slurm_partition=night", "--jobs", "1"]
    first = sandbox.start(*flags)
    sandbox.wait_for("a start")
    first.kill()
    first.communicate()
    assert fake_slurm.wait_for(slurm, "1000") == "COMPLETED"
    assert sandbox.notes() == ["a start", "a end"]
    second = sandbox.start(*flags)
    sandbox.wait_for("b start")
    second.kill()
    second.communicate()
    third = sandbox.run(*flags)
    assert third.returncode == 0, third.stdout + third.stderr
    assert sandbox.notes() == ["a start", "a end", "b start", "b end"]
    assert "2 of 2 jobs done" in third.stdout
    asked = fake_slurm.options(slurm, "1001")
    assert (asked["time"], asked["partition"], asked["signal"]) == ("7", "night", "USR2@180")


@pytest.mark.slow
def test_a_scheduler_that_refuses_a_job_is_quoted(sandbox: Sandbox, slurm: Path) -> None:
    pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: night' >&2\nexit 1\n")
    sandbox.write({"name": "a"})
    done = sandbox.run("--executor", "slurm", "--cluster", "slurm_partition=night")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the cluster refused a job" in done.stderr and "invalid partition: night" in done.stderr
    assert not sandbox.notes()


@pytest.mark.slow
def test_slurm_job_saves_before_its_time_is_over_and_queues_again(sandbox: Sandbox, slurm: Path) -> None:
    """The signal reaches the job, which ends; submitit queues it again; the sweep sees one job that is done."""
    pytest.importorskip("submitit", reason=NEEDS_SUBMITIT)
    program = sandbox.folder / "long.py"
    program.write_text(
        "import signal, sys, time\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        "def stop(number, frame):\n    (here / 'saved').touch(); sys.exit(128 + number)\n"
        "signal.signal(signal.SIGUSR2, stop)\nprint('went on' if (here / 'saved').exists() else 'began', flush=True)\n"
        "while not (here / 'saved').exists(): time.sleep(.05)\n"
    )
    sandbox.write({"name": "a", "command": ["python", str(program)]})
    process = sandbox.start("--executor", "slurm")
    deadline = time.monotonic() + 60
    while not any("began" in path.read_text() for path in (sandbox.out / ".sweep").glob("*.log")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    fake_slurm.signal(slurm, "1000")
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 0, said + errors
    (log,) = (sandbox.out / ".sweep").glob("*.log")
    assert log.read_text().split("\n")[:-1] == ["began", "went on"]
    assert fake_slurm.wait_for(slurm, "1000", count=2) == "COMPLETED"  # the sweep may hear of it first
    assert (slurm / "1000.ends").read_text().split()[-1] == "0" and code(sandbox, "a")["attempts"] == 1


# ---------------------------------------------------------------------------------------------------- the batch scripts

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
with (here / "seen").open("a") as file:
    print(os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:], file=file)
def stop(number, frame):
    (here / f"saved-{os.environ['RANK']}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGUSR2, stop)
if not (here / f"saved-{os.environ['RANK']}").exists():
    (here / f"waits-{os.environ['RANK']}").touch()
    time.sleep(60)
"""


def tree(tmp_path: Path, slurm: Path) -> Path:
    """A project that has the scripts, and this Python as its own."""
    project = tmp_path / "project"
    (project / "scripts" / "slurm").mkdir(parents=True)
    (project / "scripts" / "setup.sh").touch()
    for path in (ROOT / "scripts" / "slurm").iterdir():
        (project / "scripts" / "slurm" / path.name).write_text(path.read_text())
    (slurm / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (slurm / "bin" / "python").chmod(0o755)
    return project


def wait_until(path: Path, *paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(one.exists() for one in (path, *paths)):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["search", "train"])
def test_batch_script_saves_and_queues_again(script: str, tmp_path: Path, slurm: Path) -> None:
    project = tree(tmp_path, slurm)
    (project / "program.py").write_text(PROGRAM)
    command = ["sbatch", "--output=log", f"scripts/slurm/{script}.sh", "program.py", "--epochs", "3"]
    environment = dict(os.environ, RANKS_PER_NODE="2", OMP_NUM_THREADS="1")
    subprocess.run(command, cwd=project, check=True, env=environment, capture_output=True)
    wait_until(project / "waits-0", project / "waits-1")
    fake_slurm.signal(slurm, "1000")
    assert fake_slurm.wait_for(slurm, "1000", count=2) == "COMPLETED"
    words = "--epochs 3 --save runs/slurm-1000 --resume auto"
    assert sorted((project / "seen").read_text().splitlines()) == sorted(2 * [f"0 2 {words}", f"1 2 {words}"])
    assert "queued again" in (project / "log").read_text()
    asked = fake_slurm.options(slurm, "1000")
    assert asked["signal"] == "B:USR2@180" and "requeue" in asked and asked["open-mode"] == "append"


@pytest.mark.slow
def test_batch_script_ends_as_its_program_does(tmp_path: Path, slurm: Path) -> None:
    project = tree(tmp_path, slurm)
    (project / "program.py").write_text("import sys\nsys.exit('a reason')")
    environment = dict(os.environ, MAX_RESTARTS="0")
    command = ["sbatch", "--output=log", "scripts/slurm/train.sh", "program.py", "--save", "here", "--resume", "auto"]
    subprocess.run(command, cwd=project, check=True, env=environment, capture_output=True)
    assert fake_slurm.wait_for(slurm, "1000") == "FAILED"
    log = (project / "log").read_text()
    assert "a reason" in log and "queued again" not in log and "program.py --save here --resume auto" in log


@pytest.mark.parametrize("script", ["search", "train", "table"])
def test_batch_scripts_are_for_slurm(script: str) -> None:
    path = ROOT / "scripts" / "slurm" / f"{script}.sh"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    helped = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, env=environment)
    assert helped.returncode == 0 and "sbatch" in helped.stdout and "#" not in helped.stdout
    alone = subprocess.run(["bash", str(path), "x.py"], capture_output=True, text=True, env=environment)
    assert alone.returncode == 2 and f"sbatch [options] scripts/slurm/{script}.sh" in alone.stderr


def test_an_array_shares_one_plan(sandbox: Sandbox, tmp_path: Path, slurm: Path) -> None:
    """Two workers, four jobs: each job runs once, a worker whose time is over goes on after it was queued again."""
    project = tree(tmp_path, slurm)
    names = ["a", "b", "c"]
    sandbox.write(*({"name": name} for name in names), {"name": "d", "after": names})
    sandbox.mark("hold-a", "slow-b", "slow-c")
    # run_plan.sh's place: the same words to the same program, without the environment that it makes
    stand_in = f'exec "{sys.executable}" "{ROOT}/sweep.py" "$@" --out "{sandbox.out}"\n'
    (project / "scripts" / "run_plan.sh").write_text(stand_in)
    command = ["sbatch", "--array=0-1", "--output=log-%j", "scripts/slurm/table.sh", str(sandbox.plan)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    sandbox.wait_for("a holds")
    holder = (sandbox.folder / "pid-a").read_text()
    workers = {
        job: (slurm / f"{job}.batch").read_text() for job in ("1000", "1001") if (slurm / f"{job}.batch").exists()
    }
    (mine,) = (job for job, pid in workers.items() if _is_below(int(holder), int(pid)))
    fake_slurm.signal(slurm, mine)
    for job in ("1000", "1001"):
        fake_slurm.wait_for(slurm, job, count=1 + (job == mine), seconds=100)
        assert fake_slurm.state(slurm, job) == "COMPLETED"
    notes = sandbox.notes()
    assert notes.count("a interrupted") == 1, "stopped once, by its worker's signal"
    # between the end of a process and the note of it lies a moment in which another worker may start the job again
    assert {f"{name} end" for name in "abcd"} <= set(notes) and len(notes) <= 13
    last = len(notes) - 1 - notes[::-1].index("d start")
    assert last > notes.index("a end")


def _is_below(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


def test_the_exit_code_belongs_to_one_submission(tmp_path: Path) -> None:
    """A note that an earlier submission left does not end a later one."""
    from common.engine import cluster

    log = tmp_path / "x.log"
    cluster.write_json(cluster._note(log, "code"), {"job": "1", "code": 0})
    assert cluster._code(log, "1") == 0 and cluster._code(log, "2") is None
    assert json.loads((tmp_path / "x.code.json").read_text())["job"] == "1"
