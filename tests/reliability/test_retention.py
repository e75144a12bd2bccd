# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay: the newest valid ones, by number, whatever else lies there; no valid one is lost to others.

`tests/engine/test_checkpoint.py` has the order beyond eight digits and one broken checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine.checkpoint import CheckpointStore, load_state
from tests.helpers.mangled import snapshot
from tests.helpers.smoke_runs import SMOKE, call


def make(folder: Path, keep: int = 2) -> tuple[CheckpointStore, list[str]]:
    told: list[str] = []
    return CheckpointStore(folder, config_digest="d", keep=keep, on_message=told.append), told


def save(store: CheckpointStore, step: int) -> Path:
    return store.save({"w": torch.full((50,), float(step)), "step": step}, step=step, epoch=0)


def spoil(path: Path, way: str) -> None:
    file = path / "state.pt"
    if way == "bit":
        data = bytearray(file.read_bytes())
        data[data.index(b"step")] ^= 4  # in the pickle, where a reader without digests stumbles too
        file.write_bytes(data)
    elif way == "cut":
        os.truncate(file, 10)
    else:
        (path / "meta.json").unlink()


def whole(path: Path) -> bool:
    """By torch's own reading, and the step that it holds: no code of the store."""
    try:
        step = torch.load(path / "state.pt", weights_only=True)["step"]
    except Exception:
        return False
    return (path / "meta.json").is_file() and step == int(path.name[5:])


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_newest_stay_by_number(keep: int, tmp_path: Path) -> None:
    """1, 2, 9, 10, 11, 99, 100 ...: neither as words nor by the time of their files."""
    store, _ = make(tmp_path, keep)
    saved = [1, 2, 9, 10, 11, 99, 100, 101, 1000]
    for done, step in enumerate(saved, 1):
        path = save(store, step)
        os.utime(path, (0, 0))
        assert steps(tmp_path) == saved[:done][-keep:]
        assert store.latest()[0]["step"] == step


@pytest.mark.parametrize("seed", range(8))
def test_any_history_of_saves_and_damage(seed: int, tmp_path: Path) -> None:
    """Against a model of the rule: after a save all but the `keep` newest valid ones may go, and only what is older."""
    dice = random.Random(seed)
    keep = dice.randint(1, 3)
    store, _ = make(tmp_path, keep)
    valid: set[int] = set()
    step = 0
    for _ in range(12):
        step += dice.choice((1, 5, 90))
        save(store, step)
        valid = set(sorted(valid | {step})[-keep:])
        assert {int(path.name[5:]) for path in tmp_path.glob("step-*") if whole(path)} == valid
        assert all(load_state(tmp_path / f"step-{other:08d}")[0]["step"] == other for other in valid)
        assert store.latest()[0]["step"] == max(valid)
        if dice.random() < 0.5:
            victim = dice.choice(sorted(valid))
            spoil(tmp_path / f"step-{victim:08d}", dice.choice(("bit", "cut", "meta")))
            valid.discard(victim)
        found = store.latest()
        assert (found[0]["step"] if found else None) == max(valid, default=None)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_only_valid_one_outlives_any_number_of_broken_saves(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back something else than it was given: every save fails, the last valid one stays."""
    store, _ = make(tmp_path, keep)
    save(store, 1)
    before = snapshot(tmp_path)
    from common.engine import checkpoint as module

    write = module.write_synced

    def lossy(path: Path, data: bytes) -> None:
        write(path, bytes(data)[:-1] + b"?")

    monkeypatch.setattr(module, "write_synced", lossy)
    for step in range(2, 8):
        with pytest.raises(OSError, match=f"step {step} could not be saved"):
            save(store, step)
    assert snapshot(tmp_path) == before and store.latest()[0]["step"] == 1


def test_broken_ones_count_for_nothing(tmp_path: Path) -> None:
    """Five broken ones in a row, newer than the last valid one: it stays, and goes when two valid ones are newer."""
    store, told = make(tmp_path)
    save(store, 1)
    for step in range(2, 7):
        spoil(save(store, step), "bit")
        assert store.latest()[0]["step"] == 1
    assert len(told) == sum(range(1, 6))
    save(store, 7)
    assert 1 in steps(tmp_path) and store.latest()[0]["step"] == 7
    save(store, 8)
    assert steps(tmp_path) == [7, 8]


def test_what_is_no_checkpoint_is_neither_read_nor_removed(tmp_path: Path) -> None:
    """Half-written ones of a dead process go; a user's own files and copies stay."""
    store, _ = make(tmp_path)
    first = save(store, 5)
    own = [
        "step-5",
        "step-00000099.bak",
        "step-x",
        "best",
        "notes.txt",
        "latest",
        "step--0000001",
        "step-1234567890123456789",
    ]
    for name in own:
        if name in ("step-5",):  # the same step under another spelling: valid, and a checkpoint
            continue
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("mine")
    shutil.copytree(first, tmp_path / "copy")
    for name in (".tmp-1-step-00000006", ".tmp-77-old-step-00000004"):
        shutil.copytree(first, tmp_path / name)
    (tmp_path / "step-00000007").write_text("a file")
    assert store.latest()[0]["step"] == 5
    for step in (8, 9, 10):
        save(store, step)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*own[1:], "copy", "step-00000007", "step-00000009", "step-00000010"}
    assert load_state(tmp_path / "copy")[0]["step"] == 5  # under a name of the user's it can still be named


def test_a_damaged_digest_of_the_configuration_protects_nothing(tmp_path: Path) -> None:
    """Checkpoints of another configuration in the same folder: not taken, and none of ours goes for them."""
    other = CheckpointStore(tmp_path, config_digest="other")
    for step in (50, 60):
        save(other, step)
    store, told = make(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    assert store.latest()[0]["step"] == 3 and len(told) == 2
    assert {2, 3, 50, 60} <= set(steps(tmp_path))


@pytest.mark.slow
def test_a_training_keeps_two_and_the_selected_weights(tmp_path: Path) -> None:
    """--select val: the best epoch's weights live in every checkpoint, so that no pruning can lose them."""
    flags = [*SMOKE, "--arch", "PC_DARTS", "--epochs", "5", "--val-fraction", "0.3", "--select", "val"]
    code, said = call("ptq/train.py", [*flags, "--save", str(tmp_path / "run")])
    assert code == 0, said
    folder = tmp_path / "run" / "checkpoints"
    assert steps(folder) == [12, 15]
    best: list[Any] = [load_state(folder / f"step-{step:08d}")[0].get("best") for step in (12, 15)]
    assert all(entry is not None for entry in best)
