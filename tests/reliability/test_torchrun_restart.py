# SPDX-License-Identifier: Apache-2.0
"""Two ranks under torchrun, one of which is killed again and again: torchrun starts both anew, and nothing shows.

Both ranks end with the same state, and with that of two ranks that were never killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.engine import distributed
from tests.helpers.ends import assert_same, assert_same_end

# A rank that the seed chooses dies in every attempt but the last: before a step, within one (while the ranks exchange
# gradients) or within a save. Each rank keeps the model that it ended with.
PROGRAM = """
import importlib, os, random, signal, sys

name, kills, here, *argv = sys.argv[1:]
sys.path.insert(0, here)
import torch
from common.engine import distributed, search_loop, train_loop

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
draw = random.Random(f"1 {name} {attempt}")
victim, moment, left = draw.randrange(2), draw.choice(("step", "reduction", "save")), draw.randint(1, 3)
loop = search_loop.SearchLoop if "search" in name else train_loop._Training
owner, method = {"step": (loop, "one_step"), "reduction": (distributed, "average_"), "save": (os, "fsync")}[moment]
if moment == "save" and victim == 1:  # only rank 0 writes
    owner, method = loop, "one_step"
plain = getattr(owner, method)


def dying(*arguments, **more):
    global left
    left -= 1
    if not left:
        print(f"rank {rank} dies, attempt {attempt}, {method}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **more)


if attempt < int(kills) and rank == victim:
    setattr(owner, method, dying)

plain_init = loop.__init__
made = []


def init(self, *arguments, **more):
    made.append(self)
    plain_init(self, *arguments, **more)


loop.__init__ = init
code = importlib.import_module(name).main(argv)
if code:
    sys.exit(code)
model = getattr(made[-1], "model", None) or made[-1].network
torch.save(dict(model.state_dict()), f"{name}-rank-{rank}-of-{kills}.pt")
sys.exit(code)
"""
COMMON = ["--preset", "smoke", "--device", "cpu", "--threads", "1", "--no-tensorboard", "--checkpoint-minutes", "1e-9"]
SEARCH = [*COMMON, "--nodes", "2", "--multiplier", "2", "--epochs", "3", "--steps-per-epoch", "4", "--bits", "2", "8"]
TRAIN = [*COMMON, "--arch", "PC_DARTS", "--epochs", "3", "--steps-per-epoch", "4", "--drop-path-prob", "0.3"]


def torchrun(*words: str | Path, cwd: Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_of(launcher: subprocess.Popen[str], seconds: float = 400) -> tuple[str, str]:
    """What torchrun said, on stdout and stderr, once it has ended; nothing of it outlives the test."""
    try:
        return launcher.communicate(timeout=seconds)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def joined(rank: int, attempt: int, port: int) -> int:
    """A process that meets the other one as torchrun's workers do, and ends; its process id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the test's own handler waits for Python, which may wait for ever
    signal.alarm(20)
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    os.environ.update(places | ranks)
    code = 1
    try:
        distributed.join("cpu")
        code = 0 if distributed.sum_(torch.ones(()))[()] == 2 else 2
    finally:
        os._exit(code)


def test_a_restart_does_not_wait_for_the_dead() -> None:
    """The launcher's store still has the addresses of the attempt before when the first of two processes comes back."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for attempt in (0, 1, 2):
        first = joined(attempt % 2, attempt, store.port)
        time.sleep(1.0 if attempt else 0.0)  # alone for a while, in which it may take up what it finds
        second = joined(1 - attempt % 2, attempt, store.port)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second)] == [0, 0], attempt


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags", "kills"), [("qdarts.search", SEARCH, 4), ("darts.train", TRAIN, 3)])
def test_a_rank_killed_again_and_again(root: Path, tmp_path: Path, name: str, flags: list[str], kills: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for many in (kills, 0):
        words = ["program.py", name, str(many), root, *flags, "--save", f"run-{many}"]
        done = torchrun(*words, cwd=tmp_path, restarts=many)
        said, errors = end_of(done)
        assert done.returncode == 0, errors
        died = re.findall(r"rank (\d) dies, attempt (\d), (\w+)", errors)
        assert [int(attempt) for _, attempt, _ in died] == list(range(many)), "one kill in every attempt but the last"
        assert "not as before" not in said
        if many:
            where = ", ".join(f"rank {rank} in {method}" for rank, _, method in died)
            print(f"{name}: {many} kills ({where}), {said.count('going on in')} resumes")
    assert_same_end(tmp_path / "run-0", tmp_path / f"run-{kills}")
    found = [
        torch.load(tmp_path / f"{name}-rank-{rank}-of-{many}.pt", weights_only=True)
        for many in (kills, 0)
        for rank in (0, 1)
    ]
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_both_ranks_at_one_step(root: Path, tmp_path: Path) -> None:
    """The launcher hands it on; what follows equals two ranks that were never stopped."""
    flags = [*TRAIN[:-6], "--epochs", "1", "--steps-per-epoch", "40", "--log-every", "1"]
    flags = [flag if flag != "1e-9" else "10" for flag in flags]
    program = [root / "darts/train.py", *flags, "--resume", "auto", "--save"]
    first = torchrun(*program, "stopped", cwd=tmp_path)
    rows = tmp_path / "stopped" / "metrics.csv"
    give_up = time.monotonic() + 300
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert first.poll() is None and time.monotonic() < give_up, "no step was made"
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = end_of(first, 120)
    assert first.returncode != 0
    stopped = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", errors)
    assert len(stopped) == 2 and len(set(stopped)) == 1 and int(stopped[0]) % 10 == 0, errors
    for name in ("stopped", "whole"):
        done = torchrun(*program, name, cwd=tmp_path)
        said, errors = end_of(done)
        assert done.returncode == 0, errors
        assert (f"going on in stopped after step {stopped[0]}\n" in said) == (name == "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
