# SPDX-License-Identifier: Apache-2.0
"""Signals: a run saves at the next step boundary, ends with a documented code, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.engine import preemption

# Two gloo ranks; only rank 1 hears the signal, and both must stop at one and the same step.
RANKS = """
import os, signal, sys
import torch.distributed as dist
from common.engine import preemption
dist.init_process_group("gloo")
rank, saved = dist.get_rank(), []
try:
    with preemption.listening():
        for step in range(1000):
            preemption.give_way(step, lambda: saved.append(step))
            if rank == 1 and step == 13:
                signal.raise_signal(signal.SIGUSR1)
except preemption.Stopped as stop:
    os.write(1, f"rank {rank} saved {saved} code {stop.code}\\n".encode())
dist.destroy_process_group()
"""


def test_the_first_signal_saves_at_the_next_boundary() -> None:
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    saved: list[int] = []
    with pytest.raises(preemption.Stopped, match="SIGUSR2 after step 3") as stop, preemption.listening():
        for step in range(10):
            preemption.give_way(step, lambda now=step: saved.append(now))
            if step == 2:
                signal.raise_signal(signal.SIGUSR2)
                signal.raise_signal(signal.SIGUSR2)  # handed on twice, by a launcher too
    assert saved == [3]
    assert stop.value.code == 128 + signal.SIGUSR2
    assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == before


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "REPEATED_SECONDS", -1.0)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), preemption.listening():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


def test_outside_of_a_loop_nothing_is_asked() -> None:
    preemption.give_way(0, lambda: pytest.fail("saved"))


def test_ranks_agree_on_the_step(root: Path, tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(program)],
        capture_output=True,
        text=True,
        timeout=100,
        env=dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1"),
    )
    code = 128 + signal.SIGUSR1
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} saved [20] code {code}" for rank in (0, 1)], done.stderr


def start(root: Path, save: Path, program: str, *flags: str, steps: str = "30") -> subprocess.Popen[str]:
    small = ["--preset", "smoke", "--epochs", "1", "--steps-per-epoch", steps, "--no-tensorboard"]
    return subprocess.Popen(
        [sys.executable, str(root / program), *small, *flags, "--save", str(save), "--resume", "auto"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "flags", "number"),
    [
        ("qdarts/search.py", [], signal.SIGTERM),
        ("qdarts/train.py", ["--arch", "PC_DARTS"], signal.SIGUSR1),
        ("enas/search.py", [], signal.SIGINT),
    ],
)
def test_a_stopped_program_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, program: str, flags: list[str], number: signal.Signals
) -> None:
    """The checkpoint that the signal makes lies within the epoch; the end equals that of a run in one go."""
    first = start(root, tmp_path / "stopped", program, *flags)
    for line in first.stdout:
        if "step 3/" in line or "ch_step" in line or line.lstrip().startswith("epoch  "):
            break
    time.sleep(0.3)
    first.send_signal(number)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 128 + number, said
    assert "--resume auto goes on" in said and "Traceback" not in said
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name[5:]) < 30
    for name in ("stopped", "whole"):
        done = start(root, tmp_path / name, program, *flags)
        _, said = done.communicate(timeout=120)
        assert done.returncode == 0, said
    ends = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("stopped", "whole")]
    assert ends[0]["metrics"] == ends[1]["metrics"]
    history = [(tmp_path / name / "history.jsonl").read_text() for name in ("stopped", "whole")]
    assert history[0] == history[1]
