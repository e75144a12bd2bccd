# SPDX-License-Identifier: Apache-2.0
"""Damaged files of real runs, whoever reads them: found out, said, and the checkpoint before is used.

`tests/engine/test_checkpoint.py` damages checkpoints one by one for the store; here programs read runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import evaluate
from common.engine import load_state, read_json
from common.recipes.searched import load_searched
from common.recipes.trained import load_trained
from tests.helpers.ends import assert_same_end
from tests.helpers.mangled import clean, refusal, seal, sign, snapshot
from tests.helpers.smoke_runs import SMOKE, call

TRAIN = [*SMOKE, "--arch", "PC_DARTS", "--wbits", "2", "--abits", "2", "--epochs", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two trainings that differ by their seed: two checkpoints each."""
    root = tmp_path_factory.mktemp("runs")
    for name, program, flags in (
        ("train", "qdarts/train.py", TRAIN),
        ("twin", "qdarts/train.py", [*TRAIN, "--seed", "5"]),
    ):
        code, said = call(program, [*flags, "--save", str(root / name)])
        assert code == 0, said
    return {name: root / name for name in ("train", "twin")}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the training, to be damaged."""
    shutil.copytree(runs["train"], tmp_path / "run")
    return tmp_path / "run"


def checkpoints(run: Path) -> tuple[Path, Path]:
    """(older, newer)."""
    older, newer = sorted((run / "checkpoints").glob("step-*"))
    return older, newer


def flip(path: Path, share: float) -> None:
    """Turn one bit of the byte at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 0x10
    path.write_bytes(bytes(data))


def _epoch_raised(new: Path) -> None:
    meta = json.loads((new / "meta.json").read_text())
    (new / "meta.json").write_text(json.dumps({**meta, "epoch": 99}))


def _step_of_another(new: Path) -> None:
    """Somebody renamed an older checkpoint, and made its digests fit."""
    meta = json.loads((new / "meta.json").read_text())
    seal(new / "meta.json", {**meta, "step": 10**6})


DAMAGE: dict[str, Callable[[Path, Path, Path], object]] = {
    **{
        f"{name} bit at {share:.0%}": lambda new, old, twin, name=name, share=share: flip(new / name, share)
        for name in ("state.pt", "meta.json")
        for share in (0.0, 0.31, 0.77, 1.0)
        if (name, share) != ("meta.json", 1.0)  # the last byte is the end of the line
    },
    "truncated": lambda new, old, twin: os.truncate(new / "state.pt", 40_000),
    "one byte short": lambda new, old, twin: os.truncate(new / "state.pt", (new / "state.pt").stat().st_size - 1),
    "zero tail": lambda new, old, twin: (new / "state.pt").write_bytes(
        (new / "state.pt").read_bytes()[:60_000].ljust((new / "state.pt").stat().st_size, b"\0")
    ),
    "empty": lambda new, old, twin: os.truncate(new / "state.pt", 0),
    "longer": lambda new, old, twin: (new / "state.pt").write_bytes((new / "state.pt").read_bytes() + b"\0"),
    "no meta": lambda new, old, twin: (new / "meta.json").unlink(),
    "meta edited": lambda new, old, twin: _epoch_raised(new),
    "step edited": lambda new, old, twin: _step_of_another(new),
    "state of the step before": lambda new, old, twin: shutil.copy(old / "state.pt", new / "state.pt"),
    "folder of the step before": lambda new, old, twin: shutil.copytree(old, new, dirs_exist_ok=True),
    "state of another run": lambda new, old, twin: shutil.copy(twin / "state.pt", new / "state.pt"),
    "folder of another run": lambda new, old, twin: shutil.copytree(twin, new, dirs_exist_ok=True),
    "a folder in the file's place": lambda new, old, twin: ((new / "state.pt").unlink(), (new / "state.pt").mkdir()),
    "a pipe in the file's place": lambda new, old, twin: ((new / "state.pt").unlink(), os.mkfifo(new / "state.pt")),
    "a device in the file's place": lambda new, old, twin: (
        (new / "meta.json").unlink(),
        (new / "meta.json").symlink_to("/dev/zero"),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_readers_use_the_checkpoint_before(
    kind: str, run: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What evaluate, --init-from and --teacher load is the older checkpoint, and they say why."""
    older, newer = checkpoints(run)
    expected, meta = load_state(older)
    DAMAGE[kind](newer, older, checkpoints(runs["twin"])[1])
    before = [path.name for path in (run / "checkpoints").iterdir()]
    network, _, info = load_trained(run)
    assert Path(info["checkpoint"]).name == older.name and info["epoch"] == meta["epoch"]
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in network.state_dict().items())
    said = capsys.readouterr().err
    assert said.count("checkpoint skipped: ") == 1 and newer.name in said
    assert refusal(lambda: load_state(newer)) is not None or "another run" in kind
    with pytest.raises(ValueError, match=newer.name):
        load_trained(run, newer)
    assert [path.name for path in (run / "checkpoints").iterdir()] == before


@pytest.mark.parametrize("kind", ["state.pt bit at 77%", pytest.param("folder of another run", marks=pytest.mark.slow)])
def test_a_training_goes_on_from_the_checkpoint_before(kind: str, run: Path, runs: dict[str, Path]) -> None:
    """And ends as it would have: the epoch that was lost is made again, and the damaged folder is set aside."""
    (run / "result.json").unlink()
    older, newer = checkpoints(run)
    DAMAGE[kind](newer, older, checkpoints(runs["twin"])[1])
    code, said = call("qdarts/train.py", [*TRAIN, "--save", str(run), "--resume", "auto"])
    assert code == 0 and "checkpoint skipped" in said and f"after step {int(older.name[5:])}" in said
    assert_same_end(run, runs["train"])


def test_nothing_valid_is_a_refusal_and_nothing_is_touched(run: Path) -> None:
    (run / "result.json").unlink()
    for folder in checkpoints(run):
        flip(folder / "state.pt", 0.5)
    before = snapshot(run)
    for main, argv in (
        ("qdarts/train.py", [*TRAIN, "--save", str(run), "--resume", "auto"]),
        ("qdarts/train.py", [*TRAIN, "--dry-run", "--init-from", str(run)]),
        ("qdarts/train.py", [*TRAIN, "--dry-run", "--teacher", str(run)]),
        ("evaluate.py", [str(run), "--device", "cpu"]),
        ("ptq/quantize.py", [str(run), "--device", "cpu"]),
    ):
        code, said = call(main, argv)
        assert code == 2 and "valid" in said, (main, said)
    assert snapshot(run) == before


@pytest.mark.slow
def test_a_searchs_readers_use_the_checkpoint_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "search"
    code, said = call("qdarts/search.py", [*SMOKE, "--save", str(run)])
    assert code == 0, said
    older, newer = checkpoints(run)
    flip(newer / "state.pt", 0.6)
    expected = load_state(older)[0]["model"]
    found = load_searched(run).supernet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    code, said = call("qdarts/search.py", [*SMOKE, "--dry-run", "--init-from", str(run)])
    assert code == 0 and f"after epoch {load_state(older)[1]['epoch']}" in said
    assert newer.name in capsys.readouterr().err + said


def test_evaluate_takes_no_checkpoint_of_another_run(runs: dict[str, Path]) -> None:
    newer = checkpoints(runs["twin"])[1]
    code, said = clean(lambda: evaluate.main([str(runs["train"]), "--checkpoint", str(newer), "--device", "cpu"]))
    assert code == 2 and "--checkpoint" in said and "another run" in said


TEXTS = {
    "config.json": ("evaluate.py", "qdarts/train.py --resume"),
    "architecture.json": ("qdarts/train.py --arch", "visualize.py"),
    "result.json": ("report.py",),
}


@pytest.mark.parametrize("damage", ["truncated", "empty", "binary", "twice"])
@pytest.mark.parametrize("name", TEXTS)
def test_damaged_json_is_refused_by_name(name: str, damage: str, run: Path, tmp_path: Path) -> None:
    path = run / name
    text = path.read_text()
    path.write_bytes(
        {
            "truncated": text[: len(text) // 2].encode(),
            "empty": b"",
            "binary": b"\x80\x00" + text.encode(),
            "twice": (text[:2] + '"schema": 1,' + text[2:]).encode(),
        }[damage]
    )
    argv = {
        "evaluate.py": [str(run), "--device", "cpu"],
        "qdarts/train.py --resume": [*TRAIN, "--save", str(run), "--resume", "auto"],
        "qdarts/train.py --arch": [*SMOKE, "--arch", str(run), "--dry-run"],
        "visualize.py": [str(run), "--out", str(tmp_path / "x.svg")],
        "report.py": [str(run)],
    }
    before = snapshot(run)
    for reader in TEXTS[name]:
        code, said = clean(lambda reader=reader: _main(reader.split()[0])(argv[reader]))
        assert code in (1, 2) and name in said, (reader, code, said)
    assert snapshot(run) == before


def _main(program: str) -> Callable[[list[str]], int]:
    from importlib import import_module

    return import_module(program.removesuffix(".py").replace("/", ".")).main


@pytest.mark.parametrize("noted", [True, False], ids=["now", "before digests of rows were noted"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.csv", b"\xff\xfe"),
        ("metrics.csv", b"epoch\n0\n"),
        ("history.jsonl", b"{\n"),
        ("history.jsonl", b"[1]\n"),
        ("history.jsonl", b'{"epoch": null}\n'),
    ],
)
def test_damaged_rows_are_said_on_resume(name: str, damage: bytes, noted: bool, run: Path) -> None:
    """Rows cannot follow damaged ones: the file is named, and nothing has changed."""
    (run / "result.json").unlink()
    newer = checkpoints(run)[1]
    meta = read_json(newer / "meta.json")
    length = meta["extra"]["files"][name]
    if not noted:
        seal(newer / "meta.json", {**meta, "extra": {key: meta["extra"][key] for key in ("seconds", "files")}})
    (run / name).write_bytes((b"\n" * length + damage)[-length:])
    before = snapshot(run)
    code, said = clean(lambda: _main("qdarts/train.py")([*TRAIN, "--save", str(run), "--resume", "auto"]))
    assert code == 2 and f"{run / name}: " in said and "delete it" in said, said
    if noted:
        assert snapshot(run) == before
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in checkpoints(run)}


@pytest.mark.parametrize("name", ["metrics.csv", "history.jsonl"])
def test_one_bit_of_the_rows(name: str, run: Path, runs: dict[str, Path]) -> None:
    """A digit of a figure, changed: no reader could know, but the checkpoint has the rows' digest; deleted: goes on."""
    (run / "result.json").unlink()
    data = bytearray((run / name).read_bytes())
    at = next(index for index, byte in enumerate(data) if byte in b"135")
    data[at] ^= 2
    (run / name).write_bytes(data)
    argv = [*TRAIN, "--save", str(run), "--resume", "auto"]
    code, said = call("qdarts/train.py", argv)
    assert code == 2 and str(run / name) in said
    (run / name).unlink()
    code, said = call("qdarts/train.py", argv)
    assert code == 0 and f"{name} is not there any more" in said
    figures = [read_json(folder / "result.json")["metrics"] for folder in (run, runs["train"])]
    assert figures[0]["test_loss"] == figures[1]["test_loss"]


MADE: dict[str, dict[str, object]] = {
    "nothing": {},
    "no architecture": {"architecture": None},
    "an architecture that is no JSON": {"architecture": "{"},
    "a network of a billion cells": {"build": {"layers": 10**9}},
    "a network of a billion channels": {"build": {"init_channels": 10**9}},
    "an unknown argument": {"build": {"command": "x"}},
    "a tensor for a number": {"build": {"num_classes": torch.zeros(3)}},
    "no number": {"build": {"layers": None}},
    "an image of a million pixels a side": {"data": {"image_size": 10**6}},
    "weights of another shape": {"model": {"classifier.weight": torch.zeros(2, 2)}},
    "sparse weights": {"model": {"classifier.weight": torch.zeros(10, 32).to_sparse()}},
    "weights that are text": {"model": {"classifier.weight": "x"}},
    "a list of weights": {"model": [1, 2]},
    "post_training": {"post_training": []},
}
"""What somebody may write into a checkpoint on purpose; the fuzz found a traceback for most of them."""


@pytest.mark.parametrize("kind", MADE)
def test_checkpoints_made_on_purpose(kind: str, run: Path) -> None:
    """Digests that fit, and a content that describes no network: one line, from every reader."""
    for folder in checkpoints(run):
        state = torch.load(folder / "state.pt", weights_only=True)
        for key, value in MADE[kind].items():
            old = state.get(key)
            state[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        torch.save(state if MADE[kind] else {}, folder / "state.pt")
        sign(folder)
    before = snapshot(run)
    code, said = clean(lambda: evaluate.main([str(run), "--device", "cpu"]))
    assert code == 2 and f"RUN {run}" in said, said
    for flag in ("--init-from", "--teacher"):
        assert (refusal(lambda flag=flag: load_trained(run, flag=flag)) or "").startswith(f"{flag} {run}: ")
    assert snapshot(run) == before


@pytest.mark.parametrize("key", ["model", "optimizer", "rng", "best"])
def test_a_resume_from_a_state_that_lacks_something(key: str, run: Path) -> None:
    """As of a version that wrote other states, or made on purpose."""
    (run / "result.json").unlink()
    newer = checkpoints(run)[1]
    state = torch.load(newer / "state.pt", weights_only=True)
    del state[key]
    torch.save(state, newer / "state.pt")
    sign(newer)
    code, said = clean(lambda: _main("qdarts/train.py")([*TRAIN, "--save", str(run), "--resume", "auto"]))
    assert code == 2 and "--resume: the checkpoint does not hold what is looked for" in said, said


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", []),
        ("config.json", {"config": None}),
        ("result.json", {"network": {"layers": 10**9}}),
        ("result.json", {"network": {"layers": None, "init_channels": "x"}}),
        ("result.json", {"network": {}}),
        ("result.json", {"dataset": 3}),
    ],
)
def test_costs_of_a_run_whose_files_say_nonsense(file: str, change: object, run: Path) -> None:
    """Found by the fuzz: a traceback, or a network of a billion cells."""
    from common.cost.__main__ import main

    old = read_json(run / file)
    (run / file).write_text(json.dumps({**old, **change} if isinstance(change, dict) else change))
    code, said = clean(lambda: main([str(run)]))
    assert code == 2 and f"TARGET {run}: " in said and len(said.splitlines()) == 1, said
