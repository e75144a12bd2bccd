# SPDX-License-Identifier: Apache-2.0
"""A save that fails is loud, leaves what was there whole and nothing of its own; a training on a full disk can go on.

`tests/engine/test_checkpoint.py` has a crash at every call of a save, and a full disk for one checkpoint.
"""

from __future__ import annotations

import builtins
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import Run, files, write_json
from common.engine.checkpoint import CheckpointStore, load_state
from common.nets import load_architecture
from tests.helpers.ends import assert_same_end
from tests.helpers.forked import end_of, start
from tests.helpers.mangled import snapshot

CALLS = ("mkdir", "rename", "replace", "fsync")
REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Disk:
    """Stands between the program and the file system, and refuses the n-th call that changes something.

    `lasting`: and every later one too (a full disk stays full; what was written may still be removed and renamed).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.refused = -1, 0
        self.error: Callable[[], BaseException] = lambda: OSError(errno.EIO, os.strerror(errno.EIO))
        self.lasting = False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name), name == "rename"))
        opener = builtins.open

        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "r" in mode:
                return opener(path, mode, *arguments, **options)
            self.step(False)
            file = opener(path, mode, *arguments, **options)
            write = file.write
            guarded = self._guarded(write, False)
            return _File(file, guarded)

        monkeypatch.setattr(files, "open", opened, raising=False)
        monkeypatch.setattr("common.nets.architecture.open", opened, raising=False)

    def fail(self, call: int, error: Callable[[], BaseException], *, lasting: bool = False) -> None:
        self.left, self.error, self.lasting, self.refused = call, error, lasting, 0

    def heal(self) -> None:
        self.left = -1

    def step(self, harmless: bool) -> None:
        if self.left < 0:
            return
        if self.left > 0:
            self.left -= 1
        elif self.lasting and harmless and self.refused:
            return
        else:
            self.refused += 1
            if not self.lasting:
                self.left = -1
            raise self.error()

    def _guarded(self, function: Callable[..., Any], harmless: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.step(harmless)
            return function(*arguments, **options)

        return call


class _File:
    def __init__(self, file: Any, write: Callable[..., Any]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *about: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def refusal(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, os.strerror(number))


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((64,), float(number)), "step": number}


def debris(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
def test_a_disk_that_refuses_any_call_of_a_save(
    tmp_path: Path, disk: Disk, number: int, lasting: bool, again: bool
) -> None:
    """Either the save fails loudly and the former checkpoints are as they were, or it is done and says what stayed."""
    saved, call, failures = (2 if again else 3), 0, 0
    while True:
        folder = tmp_path / str(call)
        told: list[str] = []
        store = CheckpointStore(folder, config_digest="d", on_message=told.append)
        for step in (1, 2):
            store.save(state(step), step=step, epoch=0)
        before = snapshot(folder)
        disk.fail(call, refusal(number), lasting=lasting)
        failed = False
        try:
            store.save({**state(saved), "new": True}, step=saved, epoch=0)
        except OSError as error:
            failed = True
            assert error.errno == number and f"the checkpoint of step {saved} could not be saved in" in str(error)
            assert os.strerror(number) in str(error)
        refused = disk.refused
        disk.heal()
        failures += failed
        found = store.latest()
        assert found is not None
        if failed:
            # The rename was done when its sync was refused: then the new one is there, whole, and nothing is lost.
            assert snapshot(folder).items() >= before.items() or "new" in found[0]
            assert found[0]["step"] in (2, saved)
        else:
            assert "new" in found[0] and (told or not refused or not call)  # call 0 makes a folder that is there
        assert all(load_state(path)[0] for path in folder.iterdir() if path.name.startswith("step-"))
        if failed:
            assert not debris(folder)
        store.save(state(9), step=9, epoch=0)
        assert not debris(folder) and len(store.steps()) <= 2 and store.latest()[0]["step"] == 9
        if not refused:
            break
        call += 1
    assert failures >= 7  # two files, each opened, written and synced, and the folder's rename


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_save_that_is_broken_off_leaves_nothing(tmp_path: Path, disk: Disk, error: type[BaseException]) -> None:
    for call in range(9):
        folder = tmp_path / str(call)
        store = CheckpointStore(folder, config_digest="d")
        store.save(state(1), step=1, epoch=0)
        before = snapshot(folder)
        disk.fail(call, error)
        with pytest.raises(error):
            store.save(state(2), step=2, epoch=0)
        disk.heal()
        assert not debris(folder) and snapshot(folder).items() >= before.items()
        assert store.latest() is not None


def test_an_error_while_the_state_is_pickled_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, config_digest="d")
    store.save(state(1), step=1, epoch=0)
    before = snapshot(tmp_path)

    def half(value: Any, buffer: Any) -> None:
        buffer.write(b"PK half of it")
        raise RuntimeError("a tensor could not be written")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RuntimeError, match="could not be written"):
        store.save(state(2), step=2, epoch=0)
    assert snapshot(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_every_small_file_is_old_or_new(tmp_path: Path, disk: Disk) -> None:
    """JSON files and architectures: each call of their writing refused in turn."""
    architecture = load_architecture("PC_DARTS")
    for name, write in (
        ("x.json", lambda path: write_json(path, {"new": 1})),
        ("architecture.json", lambda path: architecture.save(path)),
    ):
        path, failures = tmp_path / name, 0
        for call in range(20):
            path.write_text("old")
            disk.fail(call, refusal(errno.ENOSPC))
            try:
                write(path)
            except OSError as error:
                failures += 1
                assert f"cannot write {path}: No space left on device" in str(error)
                assert path.read_text() == "old" or call >= 3  # the folder's sync comes after the rename
            finally:
                refused = disk.refused
                disk.heal()
            assert sorted(other.name for other in tmp_path.iterdir()) == sorted({"x.json", name})
            if not refused:
                break
        assert failures >= 3 and not refused
        assert path.read_text() != "old"


def test_a_folder_that_cannot_be_written() -> None:
    """Another user's folder. Root may write everywhere, so the child gives that up (pytest's folders are closed)."""
    home = Path(tempfile.mkdtemp())
    try:
        home.chmod(0o755)
        folder = home / "c"
        CheckpointStore(folder, config_digest="d").save(state(1), step=1, epoch=0)
        before = snapshot(folder)
        folder.chmod(0o555)
        child = os.fork()
        if not child:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                CheckpointStore(folder, config_digest="d").save(state(2), step=2, epoch=0)
            except OSError as error:
                os._exit(0 if "step 2 could not be saved" in str(error) and "Permission denied" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        folder.chmod(0o755)
        assert snapshot(folder) == before and not debris(folder)
    finally:
        shutil.rmtree(home)


def test_rows_and_results_of_a_run_on_a_full_disk(tmp_path: Path) -> None:
    """What a run writes between checkpoints: the error names the file."""
    options = {"method": "m", "stage": "train", "dataset": "d", "seed": 0, "config": {}, "sources": {}, "argv": []}
    run = Run.open(**options, save=tmp_path / "run", quiet=True, tensorboard=False)
    run.metrics({"a": 1.0}, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for name, write in (
            ("metrics.csv", lambda step: run.metrics({"a": 1.0}, step=step)),
            ("history.jsonl", lambda step: run.history({"a": "x" * 50}, epoch=step)),
            ("log.txt", lambda step: run.log("x" * 100)),
        ):
            with pytest.raises(OSError, match=rf"cannot write .*{name}: File too large"):
                for step in range(2, 2000):
                    write(step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        run.close()


# ------------------------------------------------------------------------------------------------ whole programs

TRAIN = ["--preset", "smoke", "--device", "cpu", "--threads", "1", "--arch", "PC_DARTS", "--wbits", "2", "--abits", "2"]


@contextmanager
def running(program: str, argv: list[str], said: Path, first: Callable[[], None] | None = None) -> Iterator[int]:
    yield end_of(start(program, argv, said, first))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with running("qdarts/train.py", [*TRAIN, "--save", str(folder / "run")], folder / "said") as code:
        assert code == 0, (folder / "said").read_text()
    return folder / "run"


def one_line(text: str) -> str:
    """What stderr holds beside progress bars and notes: one line."""
    assert "Traceback" not in text and "Exception" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("qdarts/train.py:")]
    assert len(lines) == 1, text
    return lines[0]


# A checkpoint of this size takes 110 kB: the first fails; rows and log, of which some kB are written, fail.
@pytest.mark.parametrize("limit", [60_000, pytest.param(1_500, marks=pytest.mark.slow)])
def test_a_training_whose_disk_fills(limit: int, whole: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    shutil.copytree(whole, tmp_path / "other")
    before = snapshot(tmp_path / "other")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    argv = [*TRAIN, "--save", str(run), "--resume", "auto"]
    with running("qdarts/train.py", argv, said, full) as code:
        assert code == 1, said.read_text()
    assert "File too large" in one_line(said.read_text())
    assert not debris(run) and not (run / "result.json").exists()
    assert snapshot(tmp_path / "other") == before
    with running("qdarts/train.py", argv, said) as code:
        assert code == 0, said.read_text()
    assert_same_end(run, whole)


TMPFS = """
set -e
mount -t tmpfs -o size={size} none {place}
code=0; {command} >{said} 2>&1 || code=$?
[ "$code" = 1 ] || {{ echo "exit $code"; cat {said}; exit 1; }}
if [ -n "$(find {place} -name '.?*' ! -name .lock)" ]; then find {place}; exit 1; fi
mount -o remount,size=64m {place}
{command} >{said}2 2>&1
cp -r {place}/run {out}
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "24k", "330k"])
def test_a_training_on_a_small_disk(size: str, whole: Path, tmp_path: Path, root: Path) -> None:
    """A file system of a few kilobytes fills at other places: configuration, log, events of TensorBoard, checkpoint."""
    place, said = tmp_path / "place", tmp_path / "said"
    place.mkdir()
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, in which a small tmpfs could be mounted")
    words = [
        sys.executable,
        str(root / "qdarts" / "train.py"),
        *TRAIN,
        "--save",
        str(place / "run"),
        "--resume",
        "auto",
    ]
    script = TMPFS.format(size=size, place=place, said=said, out=tmp_path / "run", command=" ".join(words))
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in one_line(said.read_text().replace(str(root) + os.sep, ""))
    assert_same_end(tmp_path / "run", whole)
