# SPDX-License-Identifier: Apache-2.0
"""Run folders: never overwritten, the resume rules of design.md 5, and rows that survive crashes once each."""

from __future__ import annotations

import csv
import errno
import gc
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common import engine
from common.engine import distributed, folders
from common.engine.run import Run

CONFIG = {"lr": 0.1, "epochs": 3, "bits": (2, 4), "device": "cpu", "save": None}


def open_run(root: Path, **changes: Any) -> Run:
    config = {**CONFIG, **changes.pop("config", {})}
    options: dict[str, Any] = {
        "method": "qdarts",
        "stage": "search",
        "dataset": "digits",
        "seed": 2,
        "config": config,
        "sources": {"lr": "flag", "epochs": "default"},
        "argv": ["search.py", "--lr", "0.1"],
        "root": root,
        "quiet": True,
        "tensorboard": False,
    }
    return Run.open(**{**options, **changes})


def read_csv(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- a whole run


def test_a_run_from_start_to_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(tmp_path, quiet=False)
    assert re.fullmatch(r"digits-s2-\d{8}T\d{6}", run.folder.name) and run.folder.parent.name == "qdarts-search"
    assert not run.already_finished and run.resume_state() is None and run.resumed_step is None
    run.log("hello\nworld")
    run.metrics({"epoch": 0, "train_loss": 0.1, "word": "a,b"}, step=10)
    run.metrics({"epoch": 1, "train_loss": float("nan")}, step=20)
    run.history({"genotype": {"normal": [("skip_connect", 0)]}, "x": 1.5}, epoch=0)
    run.write_json("architecture.json", {"schema": 1})
    (run.folder / "cells.svg").write_text("<svg/>")
    run.artefact("picture", run.folder / "cells.svg")
    run.checkpoints.save({"a": 1}, step=20, epoch=2)
    path = run.finish({"metrics": {"valid_top1": 0.5}, "seed": 99})
    result = json.loads(path.read_text())
    assert (result["schema"], result["method"], result["stage"], result["dataset"]) == (1, "qdarts", "search", "digits")
    assert result["seed"] == 2 and result["finished"] is True and result["metrics"] == {"valid_top1": 0.5}
    assert 0 < result["seconds"] < 60 and result["versions"]["torch"] and result["device"]["cpu"]
    assert result["artefacts"] == {
        "architecture": "architecture.json",
        "picture": "cells.svg",
        "checkpoints": "checkpoints",
        "config": "config.json",
        "history": "history.jsonl",
        "log": "log.txt",
        "metrics": "metrics.csv",
        "result": "result.json",
    }
    assert all((run.folder / relative).exists() for relative in result["artefacts"].values())
    rows = read_csv(run.folder)
    assert [row["step"] for row in rows] == ["10", "20"] and list(rows[0]) == ["step", "epoch", "train_loss", "word"]
    assert rows[0]["word"] == "a,b" and float(rows[0]["train_loss"]) == 0.1 and math.isnan(float(rows[1]["train_loss"]))
    assert read_history(run.folder) == [{"epoch": 0, "genotype": {"normal": [["skip_connect", 0]]}, "x": 1.5}]
    captured = capsys.readouterr()
    assert captured.err == "" and "hello\nworld\n" in captured.out
    log = (run.folder / "log.txt").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ world$", log, re.M) and "finished" in log
    config = json.loads((run.folder / "config.json").read_text())
    assert config["config"]["bits"] == [2, 4] and config["sources"]["lr"] == "flag"
    assert config["argv"] == ["search.py", "--lr", "0.1"] and len(config["sessions"]) == 1
    assert set(config["versions"]) == {"python", "project", "torch", "torchvision", "numpy"} and "git" in config
    assert not [name for name in snapshot(run.folder) if ".tmp-" in name]


def test_rows_have_fixed_columns_and_growing_steps(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.metrics({"a": 1, "b": 2}, step=1)
        with pytest.raises(ValueError, match="no column c"):
            run.metrics({"a": 1, "c": 2}, step=2)
        with pytest.raises(ValueError, match="step 1"):
            run.metrics({"a": 1}, step=1)
        run.history({"x": float("inf")}, epoch=0)
        with pytest.raises(ValueError, match="epoch 0"):
            run.history({}, epoch=0)
        run.metrics({"a": 3}, step=5)
    assert read_csv(run.folder)[-1] == {"step": "5", "a": "3", "b": ""}
    assert read_history(run.folder) == [{"epoch": 0, "x": None}]


@pytest.mark.parametrize("name", ["../out.json", "/tmp/out-of-run.json", "", ".", "config.json", "result.json"])
def test_names_never_lead_out_of_the_folder_or_onto_the_runs_own_files(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path) as run:
        before = snapshot(tmp_path)
        with pytest.raises(ValueError):
            run.write_json(name, {})
        with pytest.raises(ValueError):
            run.artefact("x", tmp_path / "elsewhere.svg")
        (run.folder / "link").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="not inside"):
            run.write_json("link/x.json", {})
        assert snapshot(tmp_path) == before


def test_names_of_data_sets_are_made_safe(tmp_path: Path) -> None:
    with open_run(tmp_path, dataset="../../etc/my set") as run:
        assert run.folder.resolve().is_relative_to(tmp_path.resolve() / "qdarts-search")


# ---- without --resume: nothing is overwritten


def test_two_runs_at_once_get_two_folders(tmp_path: Path) -> None:
    runs = [open_run(tmp_path) for _ in range(4)]
    assert len({run.folder for run in runs}) == 4


def test_save_takes_a_missing_or_empty_folder_only(tmp_path: Path) -> None:
    open_run(tmp_path, save=tmp_path / "new" / "deep").close()
    (tmp_path / "empty").mkdir()
    open_run(tmp_path, save=tmp_path / "empty").close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    for name in ("empty", "full", "file", "new/deep"):
        with pytest.raises(ValueError, match=rf"--save .*{name}"):
            open_run(tmp_path, save=tmp_path / name)
    with pytest.raises(ValueError, match="no run lies there"):
        open_run(tmp_path, save=tmp_path / "full", resume="auto")
    assert snapshot(tmp_path) == before


# ---- --resume auto with --save (design.md 5)


def begin(folder: Path, **changes: Any) -> Run:
    return open_run(folder.parent, save=folder, resume="auto", **changes)


def work(run: Run, first: int, last: int, save_at: tuple[int, ...]) -> None:
    """Steps first+1..last: a row each, history every second, checkpoints after the rows."""
    for step in range(first + 1, last + 1):
        run.metrics({"loss": 1 / step}, step=step)
        if step % 2 == 0:
            run.history({"loss": 1 / step}, epoch=step // 2 - 1)
        if step in save_at:
            run.checkpoints.save({"step": step}, step=step, epoch=step // 2)


def test_auto_starts_in_a_missing_or_empty_folder(tmp_path: Path) -> None:
    for name in ("missing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with begin(tmp_path / name) as run:
            assert run.resume_state() is None and not run.already_finished


def test_auto_starts_anew_where_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 5, ())
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / ".tmp-1-step-00000003").mkdir()
    (tmp_path / "run" / ".tmp-1-config.json").write_text("{")
    with begin(tmp_path / "run") as run:
        assert run.resume_state() is None
        work(run, 0, 4, (4,))
    assert [row["step"] for row in read_csv(run.folder)] == ["1", "2", "3", "4"]
    assert [row["epoch"] for row in read_history(run.folder)] == [0, 1]
    assert len(json.loads((run.folder / "config.json").read_text())["sessions"]) == 1
    assert not list(run.folder.rglob(".tmp-*"))


def test_auto_goes_on_and_cuts_rows_back(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 7, (3, 5))
    with open(run.folder / "metrics.csv", "a") as file:
        file.write("8,0.1")  # killed in the middle of a row
    with begin(tmp_path / "run", config={"save": "elsewhere"}) as run:  # save never matters
        found = run.resume_state()
        assert found is not None and found[0] == {"step": 5} and run.resumed_step == 5
        work(run, 5, 9, ())
    assert [int(row["step"]) for row in read_csv(run.folder)] == list(range(1, 10))
    assert [row["epoch"] for row in read_history(run.folder)] == [0, 1, 2, 3]
    sessions = json.loads((run.folder / "config.json").read_text())["sessions"]
    assert [session["resumed_step"] for session in sessions] == [None, 5]


@pytest.mark.parametrize("name", ["metrics.csv", "history.jsonl"])
def test_rows_that_were_cut_short_are_refused_and_deleted_ones_are_not(tmp_path: Path, name: str) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 5, (2, 5))
    whole = (run.folder / name).read_bytes()
    (run.folder / name).write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"{name}: was cut short since the checkpoint of step 5; .* delete it"):
        begin(tmp_path / "run")
    assert (run.folder / name).read_bytes() == whole[:-4]
    (run.folder / name).unlink()
    with begin(tmp_path / "run") as run:
        work(run, 5, 7, ())
    assert [int(row["step"]) for row in read_csv(run.folder)][-2:] == [6, 7]


def test_killed_while_it_goes_back_to_an_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes next, the rows belong to the checkpoint that is gone on from."""
    with begin(tmp_path / "run") as run:
        work(run, 0, 6, (2, 5))
    earlier = run.folder / "checkpoints" / "step-00000002"

    def killed(path: Path, length: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path, save=tmp_path / "run", resume=earlier)
    gc.collect()  # lets go of the folder, as the end of a process does
    with begin(tmp_path / "run") as run:
        assert run.resumed_step == 2
        work(run, 2, 7, ())
    assert [int(row["step"]) for row in read_csv(run.folder)] == list(range(1, 8))


def test_a_disk_that_refuses_the_log_of_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 6, (2, 5))

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    plain_open = open

    def refusing(path: Any, mode: str = "r", **more: Any) -> Any:
        return Full() if Path(path).name == "log.txt" and mode == "a" else plain_open(path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing)
        with pytest.raises(OSError, match=r"log\.txt.*No space left"):
            begin(tmp_path / "run")
    with begin(tmp_path / "run") as run:
        assert run.resumed_step == 5


def test_auto_uses_the_one_before_a_broken_checkpoint(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 6, (2, 5))
    (run.folder / "checkpoints" / "step-00000005" / "state.pt").write_bytes(b"")
    with begin(tmp_path / "run") as run:
        assert run.resumed_step == 2
        work(run, 2, 6, (5,))
    assert "checkpoint skipped" in (run.folder / "log.txt").read_text()
    assert [int(row["step"]) for row in read_csv(run.folder)] == list(range(1, 7))
    with begin(tmp_path / "run") as run:
        assert run.resumed_step == 5


def test_auto_refuses_when_every_checkpoint_is_broken(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 2, (2,))
    (run.folder / "checkpoints" / "step-00000002" / "meta.json").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints"):
        begin(tmp_path / "run")


def test_auto_says_that_a_finished_run_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 2, (2,))
        run.finish({})
    before = snapshot(tmp_path / "run")
    run = begin(tmp_path / "run", quiet=False)
    assert run.already_finished and run.resume_state() is None
    run.close()
    assert "already finished" in capsys.readouterr().out
    assert snapshot(tmp_path / "run") == before


def test_auto_refuses_another_configuration_with_the_difference(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        work(run, 0, 2, (2,))
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError) as caught:
        begin(tmp_path / "run", config={"lr": 0.2, "extra": "x", "bits": (2, 4)}, seed=3)
    message = str(caught.value)
    assert "lr: 0.1 -> 0.2" in message and 'extra: (not there) -> "x"' in message and "seed: 2 -> 3" in message
    assert "bits" not in message and "epochs" not in message
    assert snapshot(tmp_path / "run") == before
    with begin(tmp_path / "run", config={"a_later_flag": None}) as run:  # which is not used
        assert run.resumed_step == 2
    with begin(tmp_path / "run", config={"extra": "x"}, volatile={"extra"}) as run:
        assert run.resumed_step == 2


# ---- --resume auto without --save, and --resume PATH


CONTENTS = {"arch_digest": "arch"}


def test_another_content_at_the_same_place_is_refused_and_named(tmp_path: Path) -> None:
    flags = {"save": tmp_path / "run", "contents": CONTENTS}
    open_run(tmp_path, config={"arch": "a.json", "arch_digest": "11"}, **flags).finish({})
    with pytest.raises(ValueError, match=r"--arch a\.json: the file or run there has changed since") as refused:
        open_run(tmp_path, config={"arch": "a.json", "arch_digest": "22"}, resume="auto", **flags)
    assert '"11" -> "22"' in str(refused.value)
    with pytest.raises(ValueError, match=r'arch: "a\.json" -> "b\.json"') as refused:
        open_run(tmp_path, config={"arch": "b.json", "arch_digest": "22"}, resume="auto", **flags)
    assert "changed" not in str(refused.value), "another place needs no word about its content"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_from_before_contents_were_noted_goes_on(tmp_path: Path, finished: bool) -> None:
    """Finished, or from its checkpoint, under the digest that it has; from then on the content is noted."""
    run = open_run(tmp_path, save=tmp_path / "run", config={"arch": "a.json"})
    run.checkpoints.save({"a": 1}, step=10, epoch=1)
    run.finish({}) if finished else run.close()
    known = {"arch": "a.json", "arch_digest": "11"}
    again = open_run(tmp_path, save=tmp_path / "run", contents=CONTENTS, config=known, resume="auto")
    again.close()
    assert again.already_finished == finished and again.digest == run.digest
    if not finished:
        assert again.resumed_step == 10 and again.resume_state()[0] == {"a": 1}
        with pytest.raises(ValueError, match="--arch a.json"):
            open_run(
                tmp_path, save=tmp_path / "run", contents=CONTENTS, config=known | {"arch_digest": "2"}, resume="auto"
            )


def test_auto_without_save_takes_the_newest_of_the_same_configuration(tmp_path: Path) -> None:
    folders = {}
    for number, (name, lr) in enumerate([("a", 0.1), ("b", 0.1), ("c", 0.3)]):
        with open_run(tmp_path, config={"lr": lr}) as run:
            run.checkpoints.save({"name": name}, step=number + 1, epoch=0)
            folders[name] = run.folder
    with open_run(tmp_path, resume="auto") as run:
        assert run.folder == folders["b"] and run.resumed_step == 2
    (tmp_path / "qdarts-search" / "junk-s2-20260101T000000").mkdir()
    (tmp_path / "qdarts-search" / "junk-s2-20260101T000000" / "config.json").write_text("[]")
    with open_run(tmp_path, resume="auto", config={"lr": 0.7}) as run:
        assert run.resume_state() is None and run.folder not in folders.values()


def test_ten_runs_of_one_second_are_ordered_by_number(tmp_path: Path) -> None:
    made = []
    for _ in range(11):
        with open_run(tmp_path) as run:
            made.append(run.folder)
    stamps = {re.sub(r"(T\d{6})-\d+$", r"\1", folder.name) for folder in made}
    with open_run(tmp_path, resume="auto") as run:
        assert run.folder == made[-1] or len(stamps) > 1


def test_a_restart_by_torchrun_implies_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with open_run(tmp_path) as run:
        run.checkpoints.save({}, step=4, epoch=0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with open_run(tmp_path) as again:
        assert again.folder == run.folder and again.resumed_step == 4


def test_resume_path_names_a_run_or_one_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path, keep=3) as run:
        work(run, 0, 6, (2, 4, 6))
    checkpoints = run.folder / "checkpoints"
    for path in (run.folder, checkpoints, checkpoints / "step-00000006"):
        with open_run(tmp_path, resume=path) as again:
            assert again.folder.samefile(run.folder) and again.resumed_step == 6
    with open_run(tmp_path, resume=checkpoints / "step-00000002", keep=3) as again:
        assert again.resumed_step == 2
        work(again, 2, 3, (3,))
    assert [int(row["step"]) for row in read_csv(run.folder)] == [1, 2, 3]
    with open_run(tmp_path, resume="auto") as again:  # not the future that was turned away from
        assert again.resumed_step == 3
    with pytest.raises(ValueError, match=r"--resume .*nowhere"):
        open_run(tmp_path, resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a run"):
        open_run(tmp_path, resume=tmp_path)
    with pytest.raises(ValueError, match="two folders"):
        open_run(tmp_path, resume=run.folder, save=tmp_path / "other")
    with pytest.raises(ValueError, match=r"lr: 0\.1 -> 9"):
        open_run(tmp_path, resume=run.folder, config={"lr": 9})


# ---- time, TensorBoard, the lock, other ranks, kill -9


def test_seconds_carry_over_sessions(tmp_path: Path) -> None:
    with begin(tmp_path / "run") as run:
        run._started -= 1000  # a thousand seconds ago
        run.checkpoints.save({}, step=1, epoch=0)
        run._started -= 500  # lost with the crash: nothing of these seconds is in the state
    with begin(tmp_path / "run") as run:
        assert 1000 <= run.seconds < 1060
        run._started -= 10
        result = json.loads(run.finish({"seconds": 3}).read_text())
    assert 1010 <= result["seconds"] < 1070


def test_tensorboard_has_every_step_once_after_a_crash(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = begin(tmp_path / "run", tensorboard=True)
    work(run, 0, 7, (4,))
    assert run._board is not None
    run._board._writer.flush()
    run._board = None  # a killed process closes nothing
    run.close()
    with begin(tmp_path / "run", tensorboard=True) as run:
        work(run, 4, 6, (6,))
        run.finish({})
    events = event_accumulator.EventAccumulator(str(run.folder / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(s, 1 / s) for s in range(1, 7)]


def in_child(action: Callable[[], object]) -> int:
    """The process number of a forked child that runs `action` (quick: everything is imported already)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def adding_up(save: Path, die: int) -> None:
    """A loop of 12 steps that kills itself after the row of step `die`."""
    with begin(save) as run:
        found = run.resume_state()
        total, step = (found[0]["total"], found[0]["step"]) if found else (0, 0)
        while step < 12:
            step += 1
            total += step * step
            run.metrics({"total": total}, step=step)
            if step % 4 == 0:
                run.history({"total": total}, epoch=step // 4 - 1)
            if step == die:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % 3 == 0:
                run.checkpoints.save({"total": total, "step": step}, step=step, epoch=step // 4)
        run.finish({"total": total})


def test_killed_runs_end_like_an_uninterrupted_one(tmp_path: Path) -> None:
    save = tmp_path / "run"
    for die in (2, 1, 8, 7, 9, 12):
        assert end_of(in_child(lambda die=die: adding_up(save, die))) == -signal.SIGKILL
    assert end_of(in_child(lambda: adding_up(save, 0))) == 0
    totals = [sum(i * i for i in range(1, step + 1)) for step in range(1, 13)]
    assert [(int(row["step"]), int(row["total"])) for row in read_csv(save)] == list(enumerate(totals, 1))
    assert read_history(save) == [{"epoch": e, "total": totals[4 * e + 3]} for e in range(3)]
    assert json.loads((save / "result.json").read_text())["total"] == totals[-1]
    assert not list(save.rglob(".tmp-*"))


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_LOCK_PATIENCE", 0.0)
    save = tmp_path / "run"

    def hold() -> None:
        begin(save).log("holding")
        time.sleep(60)

    holder = in_child(hold)
    try:
        while not (save / "log.txt").exists() or "holding" not in (save / "log.txt").read_text():
            time.sleep(0.01)
        with pytest.raises(ValueError, match=rf"process {holder} on"):
            begin(save)
    finally:
        os.kill(holder, signal.SIGKILL)
        assert end_of(holder) == -signal.SIGKILL
    begin(save).close()


def one_rank(rank: int, folder: Path) -> None:
    """What each of two ranks does; it leaves what it saw in rank<rank>.json."""
    store = dist.FileStore(str(folder / "meet"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    gradients = [torch.full((2, 3), float(rank)), torch.arange(4.0).double() * (rank + 1)]
    distributed.average_(gradients)
    assert torch.equal(gradients[0], torch.full((2, 3), 0.5))
    assert torch.equal(gradients[1], torch.arange(4.0).double() * 1.5)
    with open_run(folder) as run:
        run.log("said once")
        run.metrics({"a": 1}, step=1)
        run.history({}, epoch=0)
        run.write_json("architecture.json", {"rank": rank})
        if distributed.is_main():
            run.checkpoints.save({"x": 5}, step=1, epoch=0)
        distributed.barrier()
    with open_run(folder, resume="auto") as again:
        found = again.resume_state()
        assert again.folder == run.folder and found is not None and found[0] == {"x": 5} and again.resumed_step == 1
    with pytest.raises(ValueError, match=r"lr: 0\.1 -> 3"):  # on every rank, or the others would wait for ever
        open_run(folder, resume=run.folder, config={"lr": 3})
    seen = [str(run.folder), distributed.rank(), distributed.world_size()]
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def test_two_ranks_share_one_folder_and_average(tmp_path: Path) -> None:
    children = [in_child(lambda rank=rank: one_rank(rank, tmp_path)) for rank in (0, 1)]
    assert [end_of(child) for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    folder = Path(first[0])
    assert first == [str(folder), 0, 2] and second == [str(folder), 1, 2]
    assert (folder / "log.txt").read_text().count("said once") == 1
    assert list((tmp_path / "qdarts-search").iterdir()) == [folder]
    assert [row["step"] for row in read_csv(folder)] == ["1"]
    assert json.loads((folder / "architecture.json").read_text()) == {"rank": 0}


def test_the_package_waits_with_torch_until_a_name_is_used(root: Path) -> None:
    code = "import sys, common.engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense
