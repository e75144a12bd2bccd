# SPDX-License-Identifier: Apache-2.0
"""Several processes: the order of the data between them, whole programs under torchrun, and what happens when one dies.

That the ranks compute what one process computes is in test_shared_batch.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import Stream, load
from common.engine import load_state
from common.engine.accumulation import accumulated
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.search import run_search
from common.recipes.setup import images_at_once
from common.recipes.train import run_training
from common.recipes.trained import evaluate_split, load_trained
from tests.helpers.ranks import on_ranks

# One rank kills itself in the second epoch, on the first attempt only.
PROGRAM = """
import os, signal, sys

sys.path.insert(0, sys.argv.pop())
from common.engine import distributed
from common.recipes.flags import resolve_search, search_parser
from common.recipes.search import run_search


def die(step):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


config = resolve_search(search_parser("program", ""), sys.argv[1:])
run_search(config, method="qdarts", on_step=die)
distributed.leave()
"""
SMALL = ["--preset", "smoke", "--no-tensorboard", "--device", "cpu", "--threads", "1"]


def torchrun(*words: str | Path, cwd: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """What the wrapper .venv/bin/torchrun runs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [*command, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )


def search(*flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    return run_search(resolve_search(search_parser("program", ""), [*SMALL, *flags]), method="qdarts", on_step=on_step)


def train(*flags: str) -> dict[str, Any]:
    return run_training(resolve_training(training_parser("program", ""), [*SMALL, *flags]), method="qdarts")


def end_of(run: Path) -> tuple[str, dict[str, Any]]:
    """What a run has written of its epochs, and its last state."""
    newest = max((run / "checkpoints").glob("step-*"))
    return (run / "history.jsonl").read_text(), load_state(newest)[0]


@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (3, 1), (2, 2)])
def test_the_ranks_together_see_what_one_process_sees(ranks: int, parts: int) -> None:
    data = load("digits")
    common = {"seed": 3, "name": "train", "augment": True, "cutout": 4}
    alone = Stream(data.train, data.info, batch_size=16 * ranks * parts, **common)
    shares = [
        accumulated(Stream(data.train, data.info, batch_size=16, rank=r, ranks=ranks, **common), parts)
        for r in range(ranks)
    ]
    assert {share.steps_per_epoch for share in shares} == {alone.steps_per_epoch}
    for step in (0, alone.steps_per_epoch - 1):  # the last as a resume asks for it: first
        x, y = alone.batch(1, step)
        found = [share.batches(1, step) if parts > 1 else [share.batch(1, step)] for share in shares]
        together = [share[part] for part in range(parts) for share in found]
        assert torch.equal(torch.cat([one[0] for one in together]), x)
        assert torch.equal(torch.cat([one[1] for one in together]), y)


def test_a_batch_that_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    parser = training_parser("program", "")
    with pytest.raises(SystemExit):
        resolve_training(parser, ["--batch-size", "64", "--grad-accumulation", "2"])
    assert (
        "64 images cannot be shared out equally among 3 processes of 2 parts each; give 60" in capsys.readouterr().err
    )
    config = resolve_training(parser, ["--batch-size", "64", "--batch-per-rank", "--grad-accumulation", "2"])
    assert images_at_once(config) == 32


def test_evaluation_is_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    train("--save", str(tmp_path / "run"), "--epochs", "1")
    network, _, _ = load_trained(tmp_path / "run")
    data = load("digits")
    whole = evaluate_split(network, data.test, data.info)
    assert whole["n"] == len(data.test)
    for ranks in (2, 3):  # 3: the last rank has no batch
        assert on_ranks(ranks, lambda: evaluate_split(network, data.test, data.info)) == [whole] * ranks


def test_a_killed_rank_is_started_again_and_nothing_shows(root: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "2", "--steps-per-epoch", "3"]
    (tmp_path / "program.py").write_text(PROGRAM)
    every_step = ["--checkpoint-minutes", "1e-6"]  # so that it goes on within the epoch
    words = ["--max-restarts=2", "program.py", *SMALL, *flags, *every_step, "--save", "killed", root]
    done = torchrun(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"going on in killed after step [45]\n", done.stdout)) == 1
    on_ranks(2, lambda: search(*flags, "--save", str(tmp_path / "clean")) and None)
    killed, clean = end_of(tmp_path / "killed"), end_of(tmp_path / "clean")
    assert killed[0] == clean[0]
    for name, tensor in clean[1]["model"].items():
        assert torch.equal(killed[1]["model"][name], tensor), name
    assert json.loads((tmp_path / "killed" / "result.json").read_text())["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("sync", [[], ["--sync-bn"]])
def test_every_rank_ends_with_the_same_state(tmp_path: Path, sync: list[str]) -> None:
    """Buffers too: any rank's checkpoint would do, and evaluation by parts is that of one network."""

    def work() -> dict[str, Any]:
        torch.manual_seed(0)
        from common.nets import build_supernet

        built = []
        config = resolve_search(
            search_parser("program", ""), [*SMALL, "--bits", "2", "8", *sync, "--save", str(tmp_path / "run")]
        )
        run_search(config, method="qdarts", supernet=lambda **k: built.append(build_supernet(**k)) or built[0])
        return dict(built[0].state_dict())

    one, two = on_ranks(2, work)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2])
def test_going_on_with_another_number_of_processes(tmp_path: Path, before: int) -> None:
    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 4:
            raise Stop

    def first() -> None:
        with pytest.raises(Stop):
            search("--epochs", "2", "--steps-per-epoch", "3", "--save", str(tmp_path / "run"), on_step=stop)

    on_ranks(before, first)
    flags = ["--epochs", "2", "--steps-per-epoch", "3", "--save", str(tmp_path / "run"), "--resume", "auto"]
    on_ranks(3 - before, lambda: search(*flags) and None)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"not as before, so not bit-exact: processes {before} -> {3 - before}" in log
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_shown(root: Path, tmp_path: Path) -> None:
    program = PROGRAM.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('this rank has no luck')")
    program = program.replace("run_search(config", "sys.exit(run_program(lambda: run_search(config").replace(
        "=die)", '=die), "program"))'
    )
    program = program.replace("import resolve_search", "import run_program, resolve_search")
    (tmp_path / "program.py").write_text(program)
    done = torchrun(
        "program.py", *SMALL, "--epochs", "2", "--steps-per-epoch", "3", "--save", "run", root, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "[rank 1] program: this rank has no luck" in done.stderr
    assert "ValueError: this rank has no luck" in done.stderr.split("[rank 1]")[1]  # torchrun's summary
    assert not (tmp_path / "run" / "result.json").exists()


TINY = ["--preset", "smoke", "--no-tensorboard", "--epochs", "2", "--steps-per-epoch", "1"]
PROGRAMS = {
    "qdarts": [
        ["qdarts/search.py", *TINY, "--bits", "2", "8", "--sync-bn", "--unrolled", "--grad-accumulation", "2"],
        ["qdarts/train.py", *TINY, "--arch", "0", "--sync-bn", "--grad-accumulation", "2"],
    ],
    "darts": [["darts/search.py", *TINY, "--track-eigenvalue"], ["darts/train.py", *TINY, "--arch", "0"]],
    "fbqat": [["fbqat/search.py", *TINY], ["fbqat/train.py", *TINY, "--arch", "0", "--fixed-bit", "4"]],
    "ptq": [
        ["ptq/search.py", *TINY],
        ["ptq/train.py", *TINY, "--arch", "0"],
        ["ptq/quantize.py", "1", "--n-sample", "1", "--batch-size", "8"],
    ],
    "qsubnet": [["qsubnet/search.py", *TINY, "--batch-per-rank"], ["qsubnet/train.py", *TINY, "--arch", "0"]],
    "enas": [["enas/search.py", *TINY, "--sync-bn"], ["enas/train.py", *TINY, "--arch", "0"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PROGRAMS)
def test_every_program_runs_under_torchrun(root: Path, tmp_path: Path, method: str) -> None:
    for number, (program, *flags) in enumerate(PROGRAMS[method]):
        run = tmp_path / str(number)
        done = torchrun(root / program, *flags, "--device", "cpu", "--save", run.name, cwd=tmp_path)
        assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.count("run folder:") == 1
        assert json.loads((run / "result.json").read_text())["finished"], program
        assert (run / "architecture.json").is_file() and not list(run.rglob(".tmp-*"))
    if method == "enas":  # a run of another recipe
        return
    trained = tmp_path / ("2" if method == "ptq" else "1")
    done = torchrun(root / "evaluate.py", trained.name, "--device", "cpu", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)  # printed once
    wanted = json.loads((trained / "result.json").read_text())["metrics"]
    assert (found["correct"], found["loss"]) == (wanted["test_correct"], wanted["test_loss"])


def test_the_wrapper_that_setup_writes(root: Path, tmp_path: Path) -> None:
    """Where .venv reuses another Python's torch, that one's torchrun would start the other Python."""
    text = (root / "scripts" / "setup.sh").read_text()
    block = re.search(r'if \[ ! -e "\$VENV/bin/torchrun" \]; then\n.*?\nfi\n', text, re.DOTALL)
    assert block is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    subprocess.run(["bash", "-ec", block[0]], env={**os.environ, "VENV": str(tmp_path)}, check=True)
    words = ["--nproc_per_node=2", "a program.py", "--save", "run"]
    found = subprocess.run([tmp_path / "bin" / "torchrun", *words], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["-m", "torch.distributed.run", *words]
    assert len((tmp_path / "bin" / "torchrun").read_text().splitlines()) == 2
