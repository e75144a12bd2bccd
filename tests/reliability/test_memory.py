# SPDX-License-Identifier: Apache-2.0
"""Memory that does not suffice ends a program with one line that says what to lower, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import CheckpointStore, safe_load
from common.engine.cli import Config
from common.engine.shortage import has_room, is_shortage, shortage_text
from common.recipes.flags import resolve_search, resolve_training, run_program, search_parser, training_parser
from enas.flags import make_parser
from enas.flags import resolve as resolve_enas

ROOT = Path(__file__).resolve().parents[2]
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.04 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:131] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)

# The limit is set when everything is imported, a little above what the process has then.
LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from qdarts import train
import common.recipes.train, common.quant.kernels
def limit():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
torch.zeros(8).sum()
limit()
sys.exit(train.main(sys.argv[1:]))
"""


def limited(*flags: str, room: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A training on digits in a process that can get `room` more bytes."""
    code = LIMITED.format(root=str(ROOT), room=room)
    words = ["--dataset", "digits", "--device", "cpu", "--threads", "1", "--no-tensorboard", "--epochs", "1", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_training_that_the_machine_cannot_hold(tmp_path: Path) -> None:
    """Really without memory: a limit on the process's address space."""
    done = limited("--batch-size", "1024", "--init-channels", "64", "--save", "run", room=600 * 2**20, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("qdarts/train.py: memory does not suffice on this machine")
    for flag in ("--batch-size (now 1024)", "--init-channels (now 64)", "--grad-accumulation (now 1)"):
        assert flag in lines[0]
    assert "--checkpoint-cells" in lines[0]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["batch_size"] == 1024 and not (tmp_path / "run" / "result.json").exists()


# ---- which errors are meant


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "on this machine; "),
        (torch.OutOfMemoryError(GPU), "on the GPU (2.50 GiB more were asked for); "),
        (RuntimeError(CPU), "on this machine (4e+03 GB more were asked for); "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "on the GPU; "),
        (RuntimeError("std::bad_alloc"), "on this machine; "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "on this machine; "),
    ],
)
def test_every_way_of_saying_it_gives_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve_training(training_parser("train.py", ""), ["--preset", "smoke"])

    def fail() -> None:
        raise error

    assert is_shortage(error) and run_program(fail, "train.py", config) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("train.py: memory does not suffice ") and said in err
    assert "--batch-size (now 16)" in err and ("--precision bf16" in err) == ("GPU" in said)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(errno.ENOSPC, "No space left"), KeyError()],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_shortage(error)


def test_a_real_allocation_that_torch_refuses() -> None:
    """The text that torch itself writes, whatever its version."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float32)
    assert is_shortage(caught.value) and "were asked for" in shortage_text(caught.value)


def test_an_error_of_another_kind_keeps_its_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_program(fail, "train.py", Config(sources={}))


# ---- what to lower


def search_config() -> Any:
    return resolve_search(search_parser("search.py", ""), ["--preset", "smoke", "--checkpoint-cells"])


def enas_config() -> Any:
    return resolve_enas(make_parser("enas/search.py", "", "search"), ["--preset", "smoke"], "search")


def test_only_flags_that_the_program_has_are_named() -> None:
    found = shortage_text(MemoryError(), search_config())
    assert "add --checkpoint-cells" not in found and "--init-channels (now " in found
    found = shortage_text(MemoryError(), enas_config())
    assert "--out-filters (now 2)" in found and "--init-channels" not in found and "--image-size (now 8)" in found
    import importlib

    quantize = importlib.import_module("ptq.quantize").resolved(["RUN", "--n-sample", "7"])
    found = shortage_text(MemoryError(), quantize)
    assert "--n-sample (now 7)" in found and "--grad-accumulation" not in found and "--resume" not in found
    assert "no flag" in shortage_text(MemoryError(), None) == shortage_text(MemoryError(), Config(sources={}))


def test_what_is_already_least_is_not_named() -> None:
    config = resolve_training(training_parser("train.py", ""), ["--preset", "smoke", "--batch-size", "1"])
    assert "--batch-size" not in shortage_text(MemoryError(), config)


def test_what_helps_a_run_that_goes_on_may_really_change() -> None:
    text = shortage_text(MemoryError(), search_config())
    assert "--grad-accumulation and --checkpoint-cells also for a run that goes on" in text
    from common.engine.changes import CHANGEABLE

    assert {"grad_accumulation", "checkpoint_cells"} <= set(CHANGEABLE) and "batch_size" not in CHANGEABLE


# ---- nothing is lost


def test_a_good_checkpoint_is_not_passed_over_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume from the one before would throw work away that is whole on the disk."""
    store = CheckpointStore(tmp_path, config_digest="d")
    for step in (1, 2):
        store.save({"a": torch.zeros(4)}, step=step, epoch=0)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(CPU)

    monkeypatch.setattr(safe_load.torch, "load", refuse)
    monkeypatch.setattr(safe_load, "has_room", lambda count: False)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        store.latest()
    # a file that asks for more than it holds is a bad file, and the one before it is taken
    monkeypatch.setattr(safe_load, "has_room", has_room)
    assert store.latest() is None


def test_a_failed_save_leaves_the_checkpoints_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, config_digest="d")
    store.save({"a": 1}, step=1, epoch=0)

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("common.engine.checkpoint.write_synced", refuse)
    with pytest.raises(MemoryError):
        store.save({"a": 2}, step=2, epoch=0)
    assert store.latest()[0] == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_own_data_that_do_not_fit_are_not_called_a_failed_function(tmp_path: Path) -> None:
    from common.data import load

    (tmp_path / "own.py").write_text("def load():\n    raise MemoryError\n")
    with pytest.raises(MemoryError):
        load("own", data_module=f"{tmp_path / 'own.py'}:load")


def test_room() -> None:
    assert has_room(1000) and not has_room(2**60)
