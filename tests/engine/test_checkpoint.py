# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent after a crash at any moment, damage found out, the last valid one kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.engine import checkpoint as module
from common.engine.checkpoint import CheckpointStore, load_state


def make(folder: Path, **options: Any) -> tuple[CheckpointStore, list[str]]:
    told: list[str] = []
    return CheckpointStore(folder, config_digest="d", on_message=told.append, **options), told


def state(number: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((64,), float(number))}, "step": number}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(store: CheckpointStore) -> int | None:
    found = store.latest()
    return None if found is None else found[0]["step"]


def test_round_trip_of_everything_a_run_keeps(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True)
    adam = torch.optim.Adam(net.parameters(), 0.1)
    net(torch.randn(5, 3)).sum().backward()
    sgd.step()
    adam.step()
    full = {
        "model": net.state_dict(),
        "sgd": sgd.state_dict(),
        "adam": adam.state_dict(),
        "rng": {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": []},
        "ordered": OrderedDict(a=1),
        "bf16": torch.randn(3, dtype=torch.bfloat16),
        "none": None,
    }
    store, _ = make(tmp_path / "c", extra=lambda: {"seconds": 1.5})
    path = store.save(full, step=7, epoch=1, note="epoch end")
    assert path.name == "step-00000007"
    loaded, meta = load_state(path)
    assert (meta["step"], meta["epoch"], meta["note"], meta["extra"]) == (7, 1, "epoch end", {"seconds": 1.5})
    assert loaded["rng"]["python"] == full["rng"]["python"]
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)
    sgd.load_state_dict(loaded["sgd"])
    adam.load_state_dict(loaded["adam"])
    # The digest in meta.json is that of the file, by an independent reading.
    assert meta["files"]["state.pt"]["sha256"] == hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()


def test_order_is_by_number_and_the_newest_stay(tmp_path: Path) -> None:
    store, _ = make(tmp_path, keep=2)
    for step in (9, 10, 99_999_999, 100_000_000):  # the last two sort the other way as words
        store.save(state(step), step=step, epoch=0)
    assert store.steps() == [99_999_999, 100_000_000]
    assert newest(store) == 100_000_000
    assert names(tmp_path) == ["step-100000000", "step-99999999"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _payload(path: Path) -> int:
    """A byte inside the tensor's data, where torch.load alone notices nothing."""
    return path.read_bytes().index(torch.full((4,), 2.0).numpy().tobytes()) + 8


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "payload bit": lambda new, old: flip(new / "state.pt", _payload(new / "state.pt")),
    "truncated": lambda new, old: os.truncate(new / "state.pt", 200),
    "empty": lambda new, old: os.truncate(new / "state.pt", 0),
    "state gone": lambda new, old: (new / "state.pt").unlink(),
    "meta gone": lambda new, old: (new / "meta.json").unlink(),
    "meta truncated": lambda new, old: os.truncate(new / "meta.json", 30),
    "meta of older": lambda new, old: shutil.copy(old / "meta.json", new / "meta.json"),
    "state of older": lambda new, old: shutil.copy(old / "state.pt", new / "state.pt"),
    "both of older": lambda new, old: shutil.copytree(old, new, dirs_exist_ok=True),
    "deep json": lambda new, old: (new / "meta.json").write_text("[" * 100_000),
    "huge json": lambda new, old: (new / "meta.json").write_text(" " * 5_000_000),
    "epoch changed": lambda new, old: (new / "meta.json").write_text(
        (new / "meta.json").read_text().replace('"epoch": 2', '"epoch": 1')
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_said_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    store, told = make(tmp_path)
    old = store.save(state(1), step=1, epoch=1)
    new = store.save(state(2), step=2, epoch=2)
    DAMAGE[kind](new, old)
    assert newest(store) == 1
    assert len(told) == 1 and "step-00000002" in told[0]
    with pytest.raises(ValueError, match="step-00000002"):
        load_state(new)
    # With the newer one broken, the older is the last valid one: it outlives further saves until two are valid.
    store.save(state(3), step=3, epoch=3)
    assert (tmp_path / "step-00000001").is_dir() and newest(store) == 3
    store.save(state(4), step=4, epoch=4)
    assert store.steps() == [3, 4]


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    path = store.save(state(1), step=1, epoch=0)
    for name in ("state.pt", "meta.json"):
        size = (path / name).stat().st_size
        for at in range(0, size, max(1, size // 60)):
            flip(path / name, at)
            with pytest.raises(ValueError):
                load_state(path)
            flip(path / name, at)
    load_state(path)


def test_another_configuration_is_skipped(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, config_digest="other").save(state(5), step=5, epoch=0)
    store, told = make(tmp_path)
    assert store.latest() is None and "another configuration" in told[0]


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/never-made-by-a-checkpoint",))


def test_code_in_a_checkpoint_is_refused_by_name_with_a_fitting_digest(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    path = store.save(state(1), step=1, epoch=0)
    buffer = io.BytesIO()
    torch.save({"x": _Payload()}, buffer)
    data = buffer.getvalue()
    (path / "state.pt").write_bytes(data)
    meta = json.loads((path / "meta.json").read_text())
    meta["files"]["state.pt"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    meta["meta_sha256"] = module._own_digest(meta)
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"posix\.mkdir") as caught:
        load_state(path)
    assert "weights_only" not in str(caught.value).replace("Weights only", "")  # no advice to trust it
    assert store.latest() is None
    assert not Path("/tmp/never-made-by-a-checkpoint").exists()


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("value", [np.float64(1), Pair(1, 2), Path("x"), range(3), object(), np.zeros(2)])
def test_what_could_not_be_loaded_again_is_refused_when_saving(tmp_path: Path, value: Any) -> None:
    store, _ = make(tmp_path / "c")
    with pytest.raises(ValueError, match=r"state\['best'\]\[1\]"):
        store.save({"best": [1, value]}, step=1, epoch=0)
    assert not (tmp_path / "c").exists()


def test_full_disk_is_loud_and_leaves_no_debris(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    store.save(state(1), step=1, epoch=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"step 2 could not be saved in .*: File too large"):
            store.save({"big": torch.zeros(10_000)}, step=2, epoch=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"] and newest(store) == 1


def test_a_file_in_the_folders_place_is_loud(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(OSError, match="could not be saved"):
        make(tmp_path / "c")[0].save(state(1), step=1, epoch=0)


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make(tmp_path)
    store.save(state(1), step=1, epoch=0)
    write = module.write_synced

    def lossy(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == "state.pt":
            flip(path, 100)

    monkeypatch.setattr(module, "write_synced", lossy)
    with pytest.raises(OSError, match="step 2 could not be saved"):
        store.save(state(2), step=2, epoch=0)
    assert names(tmp_path) == ["step-00000001"] and newest(store) == 1


def _crash_in(operations: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, without any clean-up, at its n-th call to the file system; True if it died."""
    child = os.fork()
    if child == 0:
        left = operations

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        for name in ("rename", "fsync", "mkdir", "rmdir", "unlink", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_crash_at_any_moment_of_a_save_loses_nothing(tmp_path: Path, again: bool) -> None:
    saved = 2 if again else 3
    died, moment = True, 0
    while died:
        folder = tmp_path / str(moment)
        store, _ = make(folder)
        store.save(state(1), step=1, epoch=0)
        store.save(state(2), step=2, epoch=0)
        died = _crash_in(moment, lambda store=store: store.save({**state(saved), "new": True}, step=saved, epoch=0))
        found = store.latest()
        assert found is not None
        assert found[0]["step"] == saved if "new" in found[0] else found[0]["step"] == 2
        assert died or "new" in found[0]
        store.save(state(9), step=9, epoch=0)  # the next save clears what the dead one left
        assert not [name for name in names(folder) if not name.startswith("step-")]
        assert newest(store) == 9
        moment += 1
    assert moment > 5


def test_the_last_valid_one_survives_a_crash_that_replaces_it(tmp_path: Path) -> None:
    """One checkpoint only, saved again at its own step: at no moment is there none."""
    moment, died = 0, True
    while died:
        store, _ = make(tmp_path / str(moment), keep=1)
        store.save(state(1), step=1, epoch=0)
        died = _crash_in(moment, lambda store=store: store.save(state(1), step=1, epoch=0))
        assert newest(store) == 1
        moment += 1


def test_newer_ones_are_set_aside_not_deleted(tmp_path: Path) -> None:
    store, _ = make(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(state(step), step=step, epoch=0)
    moved = store.abandon_newer(1)
    assert newest(store) == 1 and len(moved) == 2
    assert sorted(load_state(path)[0]["step"] for path in moved) == [2, 3]
    store.save(state(2), step=2, epoch=0)
    assert newest(store) == 2
