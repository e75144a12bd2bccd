# SPDX-License-Identifier: Apache-2.0
"""Names and links that lead out of a folder do nothing: whoever follows one writes, cuts or runs what is not a run's.

Names handed to `Run.write_json` and `Run.artefact`, and those of data sets: tests/engine/test_run.py.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.data import load
from common.data.archives import unpack_tar
from common.engine.plans import read_plan
from common.engine.run import Run
from common.nets.architecture import Architecture
from tests.helpers.fake_runs import architecture_json, train_result, write_run


def open_run(folder: Path, **more: Any) -> Run:
    same = {"method": "m", "stage": "train", "dataset": "d", "seed": 0, "config": {}, "sources": {}, "argv": []}
    return Run.open(**same, quiet=True, **({"save": folder, "tensorboard": False} | more))


def files(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for f in folders for path in sorted(f.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with open_run(tmp_path / "runs" / "mine") as opened:
        opened.metrics({"loss": 1.0}, step=1)
        opened.history({"loss": 1.0}, epoch=0)
        opened.checkpoints.save({"a": 1}, step=1, epoch=1)
        opened.metrics({"loss": 2.0}, step=2)
    (opened.folder / "tensorboard").mkdir()
    return opened.folder


# ---- links out of a run folder


@pytest.mark.parametrize(
    "name", ["config.json", "log.txt", "metrics.csv", "history.jsonl", ".lock", "checkpoints", "tensorboard"]
)
def test_a_resume_writes_and_cuts_nothing_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    """metrics.csv is cut back to its checkpoint, log.txt grows, .lock is emptied, checkpoints are dropped."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).rename(outside / name)
    if (outside / name).is_file():
        (outside / name).write_bytes((outside / name).read_bytes() + b"a thesis\n" * 100 * (name != "config.json"))
    (run / name).symlink_to(outside / name)
    before = files(run, outside)
    for resume in ("auto", run):
        with pytest.raises(ValueError, match="link") as caught:
            open_run(run, resume=resume)
        assert name in str(caught.value)
    assert files(run, outside) == before


def test_a_fresh_run_does_not_empty_what_a_lock_points_to(tmp_path: Path) -> None:
    """A folder with nothing but a lock counts as empty."""
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match=r"\.lock: a link, through which nothing is written"):
        open_run(tmp_path / "run")
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_links_within_the_folder_and_to_it_are_fine(run: Path, tmp_path: Path) -> None:
    """Runs on a large disk, reached by a link; and what a user links for herself beside the run's own files."""
    (tmp_path / "short").symlink_to(run)
    (run / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    (run / "metrics.csv").rename(run / "rows.csv")
    (run / "metrics.csv").symlink_to("rows.csv")
    with open_run(tmp_path / "short", resume="auto") as opened:
        assert opened.resumed_step == 1
        opened.metrics({"loss": 3.0}, step=2)
    assert (run / "rows.csv").read_text() == "step,loss\n1,1.0\n2,3.0\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_artefacts_replace_a_link_and_never_what_it_points_to(run: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("years") if kind == "file" else outside.mkdir()
    (run / "found.json").symlink_to(outside)
    with open_run(run, resume="auto") as opened, pytest.raises(ValueError, match="not inside"):
        opened.write_json("found.json", {})
    (run / "architecture.json").symlink_to(outside)
    Architecture.from_json(architecture_json(), "here").save(run / "architecture.json")
    assert not (run / "architecture.json").is_symlink()
    assert outside.is_dir() if kind == "folder" else outside.read_text() == "years"


def test_pictures_replace_a_link_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "architecture.json").write_text(json.dumps(architecture_json(name="../../up <script>&\"'")))
    (tmp_path / "thesis.tex").write_text("years")
    (folder / "cells.svg").symlink_to(tmp_path / "thesis.tex")
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module("visualize").main([str(folder), "--format", "svg"]) == 0
    assert (tmp_path / "thesis.tex").read_text() == "years" and not (folder / "cells.svg").is_symlink()
    root = ET.fromstring((folder / "cells.svg").read_text())
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "thesis.tex"], "the name is a title, no path"


# ---- names


@pytest.mark.parametrize(
    "name", ["../up", "a/../../up", "/tmp/away", "a//b", ".", "..", "a/./b", "", "../{rate}", "{rate}", "a\0b"]
)
def test_a_plans_job_never_leaves_the_folder_of_the_sweep(tmp_path: Path, name: str) -> None:
    plan = {
        "variables": {"rate": "../../x"},
        "jobs": [{"name": name, "method": "m", "command": ["python", "x.py", "--save", "{dir}"]}],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError) as caught:
        read = read_plan(tmp_path / "plan.json")
        read.jobs([0], read.values(None, [], tmp_path / "out"))
    assert "plan.json" in str(caught.value) and "name" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_a_plans_job_may_have_parts(tmp_path: Path) -> None:
    job = {"name": "pc-darts/train 2..4", "method": "m", "command": ["python", "x.py", "{dir}"]}
    (tmp_path / "plan.json").write_text(json.dumps({"jobs": [job]}))
    plan = read_plan(tmp_path / "plan.json")
    (found,) = plan.jobs([0], plan.values(None, [], tmp_path / "out"))
    assert found.folder == tmp_path / "out" / "s0" / "pc-darts" / "train 2..4"


@pytest.mark.parametrize("field", ["method", "dataset", "architecture", "artefacts"])
def test_a_result_from_elsewhere_names_nothing_that_is_followed(
    tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """report.py shows what a result says; it opens only what lies in the run's folder by a name that it knows."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "in here"}')
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    value: Any = (
        {"history": str(secret), "config": "../../secret.json"} if field == "artefacts" else "../../secret.json"
    )
    (folder / "result.json").write_text(json.dumps(train_result(**{field: value})))
    before = files(tmp_path)
    code = importlib.import_module("report").main([str(tmp_path / "runs")])
    captured = capsys.readouterr()
    assert code == 0 and "password" not in captured.out + captured.err and "Traceback" not in captured.err
    assert files(tmp_path) == before


# ---- archives


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_an_archive_writes_nothing_outside_its_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        name = {"up": "set/../../up.txt", "absolute": str(tmp_path / "absolute.txt"), "link": "set/link/in.txt"}[kind]
        if kind == "link":
            link = tarfile.TarInfo("set/link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path.parent)
            tar.addfile(link)
        entry = tarfile.TarInfo(name)
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"evil"))
        good = tarfile.TarInfo("set/data")
        tar.addfile(good, io.BytesIO(b""))
    outside = {path for path in tmp_path.parent.iterdir()}
    try:
        unpack_tar(tmp_path / "set.tar.gz", "set", lambda text: None)
    except ValueError as error:
        assert "set.tar.gz" in str(error)
    assert {path for path in tmp_path.parent.iterdir()} == outside
    found = [path for path in tmp_path.rglob("*.txt") if path.is_file()]
    assert not found, "the entry must not have been written anywhere"


# ---- Python files that come with a run


@pytest.mark.parametrize("place", ["own.py", "checkpoints/deep/own.py"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_python_file_in_a_runs_folder_is_never_executed(run: Path, tmp_path: Path, place: str, linked: bool) -> None:
    """A run's config.json may name any file as its --data-module, and evaluate.py reads data as the run did."""
    canary = tmp_path / "canary"
    path = run / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(canary)!r}, 'w')\ndef make(): return 1\n")
    if linked:
        (tmp_path / "innocent.py").symlink_to(path)
        path = tmp_path / "innocent.py"
    with pytest.raises(ValueError, match="lies in the folder of a run .* never executed"):
        load("own", data_module=f"{path}:make")
    from common.recipes.own_space import load_search_space

    with pytest.raises(ValueError, match="never executed"):
        load_search_space(path)
    assert not canary.exists()


def test_evaluate_does_not_run_what_a_run_brings_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Callable[[], Path]
) -> None:
    folder, canary = finished(), tmp_path / "canary"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\ndef make(): return 1\n")
    record = json.loads((folder / "config.json").read_text())
    record["config"]["data_module"] = f"{folder / 'own.py'}:make"
    (folder / "config.json").write_text(json.dumps(record))
    assert main_of("evaluate")([str(folder), "--data-module", f"{folder / 'own.py'}:make"]) == 2
    assert "never executed" in capsys.readouterr().err and not canary.exists()


def test_evaluate_runs_the_file_of_its_own_flag_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Callable[[], Path]
) -> None:
    """Outside of the run's folder a file is executed when the command names it, never because config.json does."""
    from common.recipes.setup import data_flags

    folder, evil = finished(), named_by_the_record(tmp_path)
    note(folder, data_module=f"{evil}:make", val_fraction=0.25)
    for flags in ([], ["--data", str(tmp_path)], ["--split", "val"]):
        assert main_of("evaluate")([str(folder), *flags]) == 2
        error = capsys.readouterr().err
        assert f"RUN {folder}" in error and str(evil) in error and "give --data-module FILE.py:FUNCTION" in error
    with pytest.raises(ValueError, match="^here: .*--data-module"):
        data_flags({"data_module": f"{evil}:make"}, "here")
    assert main_of("evaluate")([str(folder), "--dataset", "digits", "--json"]) == 0, "other data than the run's"
    mine = tmp_path / "moved" / "beside.py"
    mine.parent.mkdir()
    mine.write_text(DIGITS)
    for split in ("test", "val"):
        capsys.readouterr()
        flags = ["--data-module", f"{mine}:make", "--split", split, "--json"]
        assert main_of("evaluate")([str(folder), *flags]) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["split"] == split
    assert not (tmp_path / "canary").exists()


def test_quantising_runs_the_file_of_its_own_flag_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Callable[[], Path]
) -> None:
    folder, evil = finished("ptq/train.py", "--arch", "PC_DARTS"), named_by_the_record(tmp_path)
    note(folder, data_module=f"{evil}:make")
    flags = [str(folder), "--save", str(tmp_path / "low"), "--n-sample", "1", "--device", "cpu"]
    assert main_of("ptq.quantize")(flags) == 2
    error = capsys.readouterr().err
    assert f"RUN {folder}" in error and str(evil) in error and "give --data-module FILE.py:FUNCTION" in error
    (tmp_path / "mine.py").write_text(DIGITS)
    assert main_of("ptq.quantize")([*flags, "--data-module", f"{tmp_path / 'mine.py'}:make"]) == 0
    assert main_of("evaluate")([str(tmp_path / "low")]) == 2, "its record holds the training's"
    assert str(evil) in capsys.readouterr().err and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(("key", "form"), [("data_module", "FILE.py:FUNCTION"), ("search_space", "FILE.py")])
def test_a_search_opened_again_runs_no_file_of_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, form: str, search: Path
) -> None:
    folder, evil = Path(shutil.copytree(search, tmp_path / "from-elsewhere")), named_by_the_record(tmp_path)
    note(folder, **{key: f"{evil}:make" if key == "data_module" else str(evil)})
    flag, out = "--" + key.replace("_", "-"), tmp_path / "drawn.json"
    trained = []
    for name in ("one", "two"):
        trained.append(str(write_run(tmp_path / name, train_result())))
    draw = ["random", "--like", str(folder), "--out", str(out)]
    for words, where in ((draw, f"--like {folder}"), (["rank", str(folder), *trained], f"SEARCH_RUN {folder}")):
        assert main_of("common.recipes.__main__")(words) == 2
        error = capsys.readouterr().err
        assert where in error and str(evil) in error and f"give {flag} {form}" in error
    assert not (tmp_path / "canary").exists() and not out.exists()
    (tmp_path / "mine.py").write_text(DIGITS if key == "data_module" else "PRIMITIVES = ('none', 'sep_conv_3x3')\n")
    value = str(tmp_path / "mine.py") + (":make" if key == "data_module" else "")
    assert main_of("common.recipes.__main__")([*draw, flag, value]) == 0, capsys.readouterr().err
    assert out.is_file() and not (tmp_path / "canary").exists()


DIGITS = "from common.data import load\ndef make(): return load('digits')\n"


def named_by_the_record(tmp_path: Path) -> Path:
    """A file beside the run that leaves a canary when it is executed, and would do as data or as a search space."""
    path = tmp_path / "beside.py"
    canary = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    path.write_text(canary + DIGITS + "PRIMITIVES = ('none', 'sep_conv_3x3', 'skip_connect')\n")
    return path


def note(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["config"] |= changes
    (folder / "config.json").write_text(json.dumps(record))


def main_of(module: str) -> Callable[[list[str]], int]:
    return importlib.import_module(module).main


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of one step."""
    from tests.helpers.smoke_runs import CELLS, SMOKE, call

    folder = tmp_path_factory.mktemp("search") / "run"
    argv = [*SMOKE, *CELLS, "--bits", "2", "4", "--epochs", "1", "--steps-per-epoch", "1", "--save", str(folder)]
    code, said = call("qdarts/search.py", argv)
    assert code == 0, said
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Path]:
    from tests.helpers.smoke_runs import SMOKE, call

    def make(program: str = "qdarts/train.py", *more: str) -> Path:
        argv = [*SMOKE, *more, "--epochs", "1", "--steps-per-epoch", "1", "--save", str(tmp_path / "runs" / "trained")]
        code, said = call(program, argv)
        assert code == 0, said
        return Path(shutil.copytree(tmp_path / "runs" / "trained", tmp_path / "from-elsewhere"))

    return make
