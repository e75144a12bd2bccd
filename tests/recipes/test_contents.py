# SPDX-License-Identifier: Apache-2.0
"""What files and runs hold belongs to a run's configuration: another content at the same path is another run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from common.engine import read_json
from common.recipes.contents import CONTENTS, architecture_digest, derive_contents, weights_digest
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from genotypes import lookup
from qdarts.search import main as search
from qdarts.train import main as train
from qsubnet.search import main as search_bits
from tests.helpers.fake_runs import architecture_json

FEW = ["--preset", "smoke", "--epochs", "1", "--steps-per-epoch", "1", "--device", "cpu", "--no-tensorboard"]


def cells(name: str) -> dict[str, object]:
    return {**architecture_json(), "genotype": {key: list(value) for key, value in lookup(name)[1]._asdict().items()}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two trainings and two searches that differ by their seeds"""
    place = tmp_path_factory.mktemp("sources")
    for seed in ("1", "2"):
        assert train([*FEW, "--arch", "PC_DARTS", "--seed", seed, "--save", str(place / f"train-{seed}")]) == 0
        flags = ["--warmup-epochs", "0", "--seed", seed, "--save", str(place / f"search-{seed}")]
        assert search([*FEW, *flags]) == 0
    return place


def test_another_architecture_in_the_same_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(cells("PC_DARTS")))
    flags = [*FEW, "--arch", str(file), "--save", str(tmp_path / "run")]
    assert train(flags) == 0
    capsys.readouterr()
    # the same cells from elsewhere, in other spacing
    file.write_text(json.dumps({**cells("PC_DARTS"), "name": "other", "search": {"seed": 9}}, indent=3))
    assert train([*flags, "--resume", "auto"]) == 0
    assert "already finished" in capsys.readouterr().out
    file.write_text(json.dumps(cells("DARTS_V2")))
    assert train([*flags, "--resume", "auto"]) == 2
    said = capsys.readouterr().err
    assert f"--arch {file}: the file or run there has changed since" in said and "another --save" in said
    file.write_text(json.dumps({**cells("PC_DARTS"), "bits": {"kind": "uniform", "uniform": [2, 4]}}))
    assert train([*flags, "--resume", "auto"]) == 2, "bits count too"


@pytest.mark.parametrize(
    "program, flag, kind",
    [(train, "--init-from", "train"), (train, "--teacher", "train"), (search, "--init-from", "search"),
     (search_bits, "--init-from", "train")],
    ids=["train from", "teacher", "search from", "bits from"],
)  # fmt: skip
def test_another_run_at_the_same_place_is_refused(
    program: object, flag: str, kind: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "source"
    shutil.copytree(sources / f"{kind}-1", run)
    more = ["--warmup-epochs", "0"] if program is search else ["--arch", "PC_DARTS"]
    flags = [*FEW, *more, flag, str(run), "--save", str(tmp_path / "run")]
    assert program(flags) == 0
    assert program([*flags, "--resume", "auto"]) == 0
    assert "already finished" in capsys.readouterr().out
    shutil.rmtree(run)
    shutil.copytree(sources / f"{kind}-2", run)
    assert program([*flags, "--resume", "auto"]) == 2
    assert f"{flag} {run}: the file or run there has changed since" in capsys.readouterr().err


def test_the_digest_of_a_run_is_that_of_its_newest_valid_state(sources: Path, tmp_path: Path) -> None:
    run = tmp_path / "source"
    shutil.copytree(sources / "train-1", run)
    newest = max((run / "checkpoints").glob("step-*"))
    found = hashlib.sha256((newest / "state.pt").read_bytes()).hexdigest()
    assert weights_digest(run) == found
    (newest / "state.pt").write_bytes(b"broken")
    assert weights_digest(run) != found
    assert weights_digest(tmp_path) is None


def test_every_flag_that_points_somewhere_is_covered(sources: Path) -> None:
    """Derived, not volatile; names have the digest of their cells; what is not given has none."""
    run = str(sources / "train-1")
    flags = [*FEW, "--arch", "PC_DARTS", "--init-from", run, "--teacher", run]
    config = resolve_training(training_parser("train.py", ""), flags)
    assert config.arch_digest == architecture_digest("PC_DARTS") != architecture_digest("DARTS_V1")
    assert config.init_from_digest == config.teacher_digest == weights_digest(Path(run)) is not None
    assert config.sources["arch_digest"] == "derived"
    assert not set(CONTENTS) & set(read_json(sources / "train-1" / "config.json")["volatile"])
    assert derive_contents(resolve_search(search_parser("search.py", ""), FEW)) == {}
