# SPDX-License-Identifier: Apache-2.0
"""report.py --watch: what it says of a run at every stage, that it ends with the run, and how it is left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import report
from tests.helpers.fake_runs import architecture_json, search_result, train_result, write_run

pytest.importorskip("rich")
HEAD = "step,epoch,train_loss,train_top1,valid_top1,expected_bitops,exact_bitops,seconds\n"
ROWS = ["10,0,2.5,.1,.15,5e7,4e7,30", "20,1,1.25,.4,.55,4.5e7,4.2e7,20", "30,2,1.5,.5,.45,4.4e7,4.1e7,20"]
LOG = "2026-01-01T00:00:0{}Z {}\n"


def going(folder: Path, epochs: int = 3, *, stage: str = "search", log: tuple[str, ...] = ()) -> Path:
    """A run of ten epochs that has done some."""
    write_run(folder, config={"epochs": 10})
    identity = {"method": "qdarts", "stage": stage, "dataset": "digits", "seed": 3}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | identity))
    (folder / "metrics.csv").write_text(HEAD + "".join(row + "\n" for row in ROWS[:epochs]))
    (folder / "log.txt").write_text("".join(LOG.format(k, line) for k, line in enumerate(log)))
    genotype = architecture_json()["genotype"]
    lines = [json.dumps({"epoch": epoch, "genotype": genotype, "bits": None}) for epoch in range(epochs)]
    (folder / "history.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def shown(folder: Path, width: int = 100) -> str:
    """The view without its frame, in one piece."""
    from rich.console import Console

    from common.recipes.watch import read_state, view

    console = Console(file=io.StringIO(), width=width)
    console.print(view(read_state(folder)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return text


def line_of(text: str, start: str) -> list[str]:
    return next(line.strip("│ ").split() for line in text.splitlines() if line.strip("│ ").startswith(start))


def test_progress_time_figures_cells_and_cost_of_a_search(tmp_path: Path) -> None:
    folder = going(tmp_path / "run", log=("epoch 4/10 step 5/10: loss 1.2",))
    os.utime(folder / "metrics.csv")
    text = shown(folder)
    assert "search by qdarts, digits, seed 3" in text
    assert "3 of 10 epochs, 35%, 20 s an epoch, 2 min left" in text  # seven of 20 s, and 3.5 of 10 done
    assert line_of(text, "loss: training")[-3:] == ["1.5", "1.25", "2"]
    assert line_of(text, "accuracy, %: validation")[-3:] == ["45", "55", "2"]
    assert line_of(text, "cost, M BitOps: expected")[-1] == "44"
    assert "cells of epoch 3" in text and "sep_conv_3x3(c_{k-1}) + skip_connect(c_{k-2})" in text
    assert "epoch 4/10 step 5/10: loss 1.2" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_every_width_shows_every_operation(tmp_path: Path, width: int) -> None:
    text = shown(going(tmp_path / "run"), width)
    genotype = architecture_json()["genotype"]
    names = ["c_{k-2}", "c_{k-1}", "0", "1", "2", "3"]
    for operation, state in genotype["normal"] + genotype["reduce"]:
        assert f"{operation}({names[state]})" in text
    assert "normal" in text and "reduction" in text


def test_before_the_first_epoch_and_after_the_last(tmp_path: Path) -> None:
    text = shown(going(tmp_path / "new", 0))
    assert "0 of 10 epochs, 0%" in text and "left" not in text
    write_run(tmp_path / "old", search_result(), architecture=architecture_json())
    text = shown(tmp_path / "old")
    assert "100%" in text and "finished after 2 min" in text and "left" not in text
    write_run(tmp_path / "odd", search_result(seconds=1e300))
    assert "finished" in shown(tmp_path / "odd")


def test_rows_within_an_epoch_end_none(tmp_path: Path) -> None:
    folder = going(tmp_path / "run", 2, log=("epoch 3/10 step 5/10  loss 1.0",))
    within = ROWS[0].split(",")
    columns = HEAD.strip().split(",")
    values = dict(zip(columns, within, strict=True)) | {"step": "999", "epoch": "2", "seconds": "0.001"}
    with (folder / "metrics.csv").open("a") as file:
        file.write(",".join(values[column] for column in columns) + "\n")
    text = shown(folder)
    assert "2 of 10 epochs, 25%" in text  # and half of the third
    before = next(line for line in shown(going(tmp_path / "before", 2)).splitlines() if "an epoch" in line)
    assert before.split("20%, ")[1].split(" an epoch")[0] in text  # the third's first milliseconds are no epoch's time


def test_names_are_no_markup(tmp_path: Path) -> None:
    folder = going(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text()) | {"dataset": "[/red] my[bold]set"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "[/red] my[bold]set" in shown(folder)


def test_a_training_shows_its_network_and_cells(tmp_path: Path) -> None:
    folder = going(tmp_path / "run", stage="train", log=("network: 0.061 M parameters, 41 M BitOps", "epoch 1/10 done"))
    (folder / "history.jsonl").unlink()
    (folder / "architecture.json").write_text(json.dumps(architecture_json()))
    text = shown(folder)
    assert "0.061 M parameters, 41 M BitOps" in text and "sep_conv_3x3(c_{k-2})" in text


def test_sampled_architectures_show_their_best(tmp_path: Path) -> None:
    folder = going(tmp_path / "run")
    cells = "0 {0} 0 {0} 1 0 1 0\n0 {0} 0 {0} 1 0 1 0"
    one, other = cells.format(2), cells.format(3)
    row = {"epoch": 0, "architectures": [{"cells": one, "top1": 0.2}, {"cells": other, "top1": 0.9}]}
    (folder / "history.jsonl").write_text(json.dumps(row) + "\n")
    text = shown(folder)
    assert "the best of 2 samples" in text and "max_pool_3x3(c_{k-2})" in text and "avg_pool" not in text


def test_cells_that_cannot_be_read_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(architecture_json()).replace("sep_conv_3x3", "my_operation")
    folder = going(tmp_path / "run")
    (folder / "architecture.json").write_text(text)
    assert report.main([str(folder), "--watch", "--once"]) == 0
    said = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    assert "no cells:" in said and "my_operation" in said and "--search-space FILE.py" in said
    with pytest.raises(SystemExit):
        report.main([str(folder), "--watch", "--once", "--search-space", str(tmp_path / "none.py")])
    assert "--search-space" in capsys.readouterr().err


def test_files_cut_anywhere_can_be_watched(tmp_path: Path) -> None:
    folder = going(tmp_path / "run", log=("epoch 4/10 step 5/10: loss 1.2",))
    whole = {name: (folder / name).read_bytes() for name in ("metrics.csv", "history.jsonl", "log.txt")}
    for name, data in whole.items():
        for length in range(0, len(data), max(1, len(data) // 25)):
            (folder / name).write_bytes(data[:length])
            assert "of 10 epochs" in shown(folder)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere", "--watch"], "nowhere: no such folder"),
        (["one", "two", "--watch"], "--watch: follows one run, and there are 2"),
        (["one", "--once"], "--once: goes with --watch"),
    ],
)
def test_what_cannot_be_watched_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    going(tmp_path / "one")
    going(tmp_path / "two")
    with pytest.raises(SystemExit) as end:
        report.main(argv)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_it_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.recipes import watch

    folder, looks = going(tmp_path / "run", 1), 0

    def next_look(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            with open(folder / "metrics.csv", "a") as file:
                file.write(ROWS[1] + "\n")
            with open(folder / "history.jsonl", "a") as file:
                file.write(json.dumps({"epoch": 1, "genotype": architecture_json()["genotype"], "bits": None}) + "\n")
        else:
            (folder / "result.json").write_text(json.dumps(train_result()))

    monkeypatch.setattr(watch.time, "sleep", next_look)
    assert report.main([str(folder), "--watch"]) == 0
    said = capsys.readouterr().out
    at = [said.index(words) for words in ("1 of 10", "2 of 10", "finished after")]
    assert at == sorted(at)
    assert looks == 2 and said.count("search by") == 3


def test_a_run_that_nobody_works_on_ends_it_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = going(tmp_path / "run")
    (folder / ".lock").write_text("process 1 on nowhere\n")  # held by nobody
    assert report.main([str(folder), "--watch"]) == 1
    said = capsys.readouterr()
    assert "stopped" in said.out and "--resume auto" in said.err


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_held_run_is_followed_until_ctrl_c(tmp_path: Path, root: Path) -> None:
    folder = going(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdout=subprocess.PIPE, text=True)
    watcher = None
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        command: list[Any] = [sys.executable, root / "report.py", folder, "--watch"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # a job in the background ignores SIGINT, and so would what it starts
        heeds = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        watcher = subprocess.Popen(command, env=environment, preexec_fn=heeds, **pipes)
        assert watcher.stdout is not None and "search by qdarts" in watcher.stdout.readline()  # it looks
        time.sleep(0.2)
        watcher.send_signal(signal.SIGINT)
        _, said = watcher.communicate(timeout=60)
        assert watcher.returncode == 130 and "the run goes on" in said and "Traceback" not in said
    finally:
        for process in (holder, *([watcher] if watcher else [])):
            process.kill()
            process.communicate()
