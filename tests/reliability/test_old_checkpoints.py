# SPDX-License-Identifier: Apache-2.0
"""What earlier versions left still loads and goes on (tests/oracles/old_runs); what a later one leaves is refused.

A flag with a new default that is not None belongs to a run's identity: it makes the runs below another configuration,
and this file fails. Give such a flag the default None, or a value that keeps what runs were before.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import CheckpointStore, read_json
from common.engine.changes import owner_of
from common.engine.checkpoint import META, load_state
from common.nets import load_architecture
from common.recipes.records import read_run
from common.recipes.trained import load_trained
from tests.reliability.write_old_runs import FLAGS, FOLDER, STOPPED, Stop, start

SCHEMAS = sorted(FOLDER.glob("schema-*.tar.xz"))
UNFINISHED = [(path, name) for path in SCHEMAS for name in STOPPED]


def ids(value: Any) -> str:
    return value.name.removesuffix(".tar.xz") if isinstance(value, Path) else str(value)


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs of one schema in a folder of their own, which is the working folder: their paths count from there."""
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def newest(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = CheckpointStore(run / "checkpoints", config_digest=owner_of(read_json(run / "config.json"))).latest()
    assert found is not None
    return found


def test_there_are_old_runs() -> None:
    assert SCHEMAS and set(FLAGS) == {*STOPPED, "trained", "quantized"}


@pytest.mark.parametrize(("old", "name"), UNFINISHED, indirect=["old"], ids=ids)
def test_an_old_run_goes_on_where_it_stopped(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = newest(old / name)[1]["step"]
    assert step == STOPPED[name]
    seen: list[int] = []

    def on_step(done: int) -> None:
        seen.append(done)
        raise Stop

    with pytest.raises(Stop):
        start(name, "--resume", "auto", on_step=on_step)
    assert seen == [step + 1] and "going on in" in capsys.readouterr().out
    with open(old / name / "metrics.csv") as rows:
        steps = [int(line.split(",")[0]) for line in rows.readlines()[1:]]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize(("old", "name"), UNFINISHED, indirect=["old"], ids=ids)
def test_an_old_run_finishes(old: Path, name: str) -> None:
    start(name, "--resume", "auto")
    assert read_json(old / name / "result.json")["finished"] is True


@pytest.mark.parametrize("old", SCHEMAS, indirect=True, ids=ids)
def test_old_trained_networks_give_their_figures(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As result.json had them then; other libraries may round otherwise."""
    evaluate = importlib.import_module("evaluate")
    for name in ("trained", "quantized"):
        then = read_json(old / name / "result.json")["metrics"]
        capsys.readouterr()
        assert evaluate.main([name, "--json", "--device", "cpu"]) == 0
        now = json.loads(capsys.readouterr().out)
        assert (
            now["loss"] == pytest.approx(then["test_loss"], rel=1e-3) and abs(now["correct"] - then["test_correct"]) < 4
        )
        assert read_run(old / name).finished


@pytest.mark.parametrize("old", SCHEMAS, indirect=True, ids=ids)
def test_old_checkpoints_give_every_tensor(old: Path) -> None:
    """Counted and summed by hand from the file, past the project's own reader."""
    for path in sorted(old.glob("*/checkpoints/step-*")):
        state, meta = load_state(path)
        plain = torch.load(path / "state.pt", weights_only=True)
        assert hashlib.sha256((path / "state.pt").read_bytes()).hexdigest() == meta["files"]["state.pt"]["sha256"]
        assert state.keys() == plain.keys() and len(plain["model"]) > 10
        assert all(torch.equal(tensor, state["model"][name]) for name, tensor in plain["model"].items())
    assert len(sorted(old.glob("*/checkpoints/step-*"))) == len(FLAGS)


@pytest.mark.parametrize("old", SCHEMAS, indirect=True, ids=ids)
def test_old_architectures_load_and_old_runs_lead_to_new_ones(old: Path) -> None:
    found = {name: load_architecture(str(old / name)) for name in ("trained", "quantized", "train", "enas-train")}
    assert found["trained"].bits is None or found["trained"].bits.uniform == (32, 32)
    assert found["enas-train"].space == "enas-micro" and found["quantized"].bits is not None
    network, config, info = load_trained(old / "trained")
    assert info["epoch"] == 1 and config["epochs"] == 1 and sum(p.numel() for p in network.parameters()) > 1000


# ---- later schemas


@pytest.mark.parametrize("old", SCHEMAS[-1:], indirect=True, ids=ids)
def test_a_later_schema_is_refused_by_its_number(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = old / "trained"
    later = {"config.json": "2", "result.json": "2", "architecture.json": "2"}
    for file in later:
        copy = Path(shutil.copytree(run, old / f"later-{file}"))
        content = read_json(copy / file)
        content["schema"] = 2
        (copy / file).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"schema:? 2") as caught:
            {
                "config.json": load_trained,
                "result.json": read_run,
                "architecture.json": lambda folder: load_architecture(str(folder)),
            }[file](copy)
        assert file in str(caught.value)
    qdarts = importlib.import_module("ptq.train")
    assert qdarts.main([*FLAGS["trained"], "--save", "later-config.json", "--resume", "auto"]) == 2
    assert "config.json: a run's configuration of schema 2, and this version reads schema 1" in capsys.readouterr().err


@pytest.mark.parametrize("old", SCHEMAS[-1:], indirect=True, ids=ids)
def test_a_later_checkpoint_is_refused_by_its_number_and_left_alone(old: Path) -> None:
    """Whole, with its digest right: a resume by an older version must neither guess nor drop it."""
    path = next((old / "train" / "checkpoints").iterdir())
    meta = read_json(path / META)
    meta["schema"] = 7
    body = {key: value for key, value in meta.items() if key != "meta_sha256"}
    meta["meta_sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / META).write_text(json.dumps(meta))
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match="a checkpoint's meta of schema 7, and this version reads schema 1"):
        load_state(path)
    with pytest.raises(ValueError, match="none of the checkpoints"):
        start("train", "--resume", "auto")
    assert {file: file.read_bytes() for file in path.iterdir()} == before
