# SPDX-License-Identifier: Apache-2.0
"""One seed, one result, bit for bit: in another process, from another folder, with any number of readers of the data.

That batches depend on neither processes, threads nor workers: tests/data/test_streams.py and test_imagenet.py;
what ranks see: test_loader_state.py and tests/recipes/test_distributed.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ends import assert_same, assert_same_end, end_of
from tests.helpers.photographs import make_folder
from tests.helpers.smoke_runs import TRAINED, argv_of, call


def ended(name: str, *more: str, save: Path, trained: Path | None = None) -> Path:
    """A run in this process, to its end."""
    program, argv = argv_of(name, *more, "--save", str(save), trained=trained)
    code, said = call(program, argv)
    assert code == 0, said
    return save


def elsewhere(root: Path, name: str, *more: str, save: Path, trained: Path | None = None) -> Path:
    """The same command as a user types it: a Python of its own with other salt for its hashes, in another folder."""
    program, argv = argv_of(name, *more, "--save", str(save), trained=trained)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, str(root / program), *argv]
    done = subprocess.run(command, cwd=save.parent, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return save


def test_another_process_and_another_seed(root: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "1")
    here = ended("darts search", *flags, save=tmp_path / "here")
    assert_same_end(here, elsewhere(root, "darts search", *flags, save=tmp_path / "there"))
    other, this = (end_of(ended("darts search", *flags, "--seed", "9", save=tmp_path / "9")), end_of(here))
    for key in ("history", "metrics"):
        assert this[key] != other[key], key
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same(this["state"]["model"], other["state"]["model"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdarts search", "qdarts train", "ptq quantize", "qsubnet search", "enas search"])
def test_another_process(name: str, root: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    if name in ("ptq quantize", "qsubnet search"):
        assert call(TRAINED[0], [*TRAINED[1:], "--save", str(trained)])[0] == 0
    here = ended(name, save=tmp_path / "here", trained=trained)
    assert_same_end(here, elsewhere(root, name, save=tmp_path / "there", trained=trained))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdarts search", "fbqat train"])
def test_other_seeds_differ_in_all(name: str, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    assert call(TRAINED[0], [*TRAINED[1:], "--save", str(trained)])[0] == 0
    ends = [end_of(ended(name, "--seed", seed, save=tmp_path / seed, trained=trained)) for seed in ("1", "2")]
    for key in ("history", "metrics", "result"):
        assert ends[0][key] != ends[1][key], key
    for tensor in ("stem.0.weight", "classifier.weight"):
        assert not ends[0]["state"]["model"][tensor].equal(ends[1]["state"]["model"][tensor]), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdarts train", "darts search"])
def test_any_number_of_readers(name: str, tmp_path: Path) -> None:
    photographs = make_folder(tmp_path / "photographs", train=12, val=4)
    flags = ["--dataset", "imagenet", "--data", str(photographs), "--image-size", "32", "--batch-size", "4"]
    runs = [ended(name, *flags, "--workers", workers, save=tmp_path / workers) for workers in ("0", "3")]
    assert_same_end(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdarts search", "enas train"])
def test_deterministic_computes_the_same_on_a_cpu(name: str, tmp_path: Path) -> None:
    plain, strict = (ended(name, *more, save=tmp_path / str(len(more))) for more in ((), ("--deterministic",)))
    for key in ("state", "history", "metrics"):
        assert_same(end_of(plain)[key], end_of(strict)[key], key)
