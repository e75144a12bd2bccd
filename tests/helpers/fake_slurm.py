# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Slurm on one machine: sbatch, srun, scancel, scontrol, sacct as far as the project asks for them.

`install(folder)` writes them into folder/bin. Every job is a process; what happened stands in folder/ID.* files.
sbatch reads the script's #SBATCH lines and its own flags for --output, --array and --signal; `signal(folder, ID)` does
what Slurm does before a job's time is over: the signal goes to the batch script (B:), or to srun's tasks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal as signals
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sacct")


def install(folder: Path) -> dict[str, str]:
    """The environment in which these commands are found."""
    place = folder / "bin"
    place.mkdir(parents=True)
    for name in COMMANDS:
        program = place / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        program.chmod(0o755)
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SUBMITIT"))}
    return {**cleared, "PATH": f"{place}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def signal(folder: Path, job: str) -> None:
    """The job's own --signal, as at the end of its time."""
    name = re.fullmatch(r"(B:)?(\w+)@\d+", options(folder, job)["signal"])
    kind = "batch" if name[1] else "task"
    os.kill(int((folder / f"{job}.{kind}").read_text()), getattr(signals, f"SIG{name[2]}"))


def options(folder: Path, job: str) -> dict[str, str]:
    """What the job was submitted with."""
    return json.loads((folder / f"{job}.options").read_text())


def state(folder: Path, job: str) -> str:
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED."""
    path = folder / f"{job}.state"
    return path.read_text() if path.exists() else "PENDING"


def wait_for(folder: Path, job: str, *, count: int = 1, seconds: float = 60) -> str:
    """The state after the job has ended `count` times (a requeue is an end)."""
    deadline = time.monotonic() + seconds
    while len((folder / f"{job}.ends").read_text().split() if (folder / f"{job}.ends").exists() else []) < count:
        assert time.monotonic() < deadline, sorted(path.name for path in folder.iterdir())
        time.sleep(0.05)
    return state(folder, job)


# ------------------------------------------------------------------------------------------------------ the commands


def sbatch(folder: Path, words: list[str]) -> int:
    """Start the script's job, or one for each element of its array."""
    at = next(number for number, word in enumerate(words) if Path(word).is_file())
    text = Path(words[at]).read_text()
    asked = [word for line in re.findall(r"^#SBATCH (.*)$", text, re.M) for word in shlex.split(line)] + words[:at]
    found = dict(re.fullmatch(r"--([\w-]+)(?:=(.*))?", word).groups() for word in asked)
    number = str(1000 + sum(1 for _ in folder.glob("*.options")))
    first, _, last = found.get("array", "").partition("-")
    for element in range(int(first), int(last) + 1) if first else [None]:
        job = number if element is None else f"{int(number) + element}"
        (folder / f"{job}.options").write_text(json.dumps(found))
        names = {"SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NAME": found.get("job-name", "x")}
        names |= {
            "SLURM_JOB_NUM_NODES": found.get("nodes", "1"),
            "SLURM_NTASKS": "1",
            "SLURM_JOB_NODELIST": "localhost",
        }
        names |= {} if element is None else {"SLURM_ARRAY_TASK_ID": str(element)}
        command = [sys.executable, __file__, "batch", job, *words[at:]]
        subprocess.Popen(
            command, env={**os.environ, **names}, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {number}")
    return 0


def batch(folder: Path, words: list[str]) -> int:
    """Run a job's script, again as long as it asks to be queued again."""
    job, script, *arguments = words
    copy = folder / f"{job}.script"  # Slurm runs a copy, too
    copy.write_text(Path(script).read_text())
    output = options(folder, job).get("output", str(folder / f"{job}.out")).replace("%j", job).replace("%x", "x")
    for restart in range(100):
        (folder / f"{job}.again").unlink(missing_ok=True)
        with open(output, "ab") as out:
            environment = {**os.environ, "SLURM_RESTART_COUNT": str(restart)}
            process = subprocess.Popen(["bash", str(copy), *arguments], stdout=out, stderr=out, env=environment)
            (folder / f"{job}.batch").write_text(str(process.pid))
            (folder / f"{job}.state").write_text("RUNNING")
            code = process.wait()
        again = (folder / f"{job}.again").exists()
        (folder / f"{job}.state").write_text("PENDING" if again else "FAILED" if code else "COMPLETED")
        with (folder / f"{job}.ends").open("a") as ends:
            ends.write(f"{code}\n")
        if not again:
            return code
    return 1


def srun(folder: Path, words: list[str]) -> int:
    """Run the command as the one task of the one node; a signal to srun goes to the task."""
    takes_value = ("--output", "--error")
    while words[0].startswith("-"):
        words = words[2:] if words[0] in takes_value else words[1:]
    job = os.environ["SLURM_JOB_ID"]
    names = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    process = subprocess.Popen(words, env={**os.environ, **names}, start_new_session=True)
    (folder / f"{job}.task").write_text(str(process.pid))
    for number in (signals.SIGUSR1, signals.SIGUSR2, signals.SIGTERM):
        signals.signal(number, lambda which, frame: process.send_signal(which))
    code = process.wait()
    return code if code >= 0 else 128 - code


def scancel(folder: Path, words: list[str]) -> int:
    """End the job's task and its script."""
    for job in words:
        (folder / f"{job}.state").write_text("CANCELLED")
        for kind in ("task", "batch"):
            path = folder / f"{job}.{kind}"
            if path.exists():
                subprocess.run(["pkill", "-TERM", "-s", path.read_text()], check=False)
                subprocess.run(["kill", "-TERM", path.read_text()], check=False, stderr=subprocess.DEVNULL)
    return 0


def scontrol(folder: Path, words: list[str]) -> int:
    """requeue ID; show hostnames."""
    if words[0] == "requeue":
        (folder / f"{words[1]}.again").touch()
    else:
        print("localhost")
    return 0


def sacct(folder: Path, words: list[str]) -> int:
    """JobID|State|NodeList of the jobs asked for."""
    print("JobID|State|NodeList")
    for job in (words[number + 1] for number, word in enumerate(words) if word == "-j"):
        print(f"{job}|{state(folder, job)}|localhost")
    return 0


if __name__ == "__main__":
    sys.exit({**{name: globals()[name] for name in COMMANDS}, "batch": batch}[sys.argv[1]](
        Path(os.environ["FAKE_SLURM"]), sys.argv[2:]
    ))  # fmt: skip
