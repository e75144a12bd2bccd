# SPDX-License-Identifier: Apache-2.0
"""export.py on runs of every method: files, their record, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import export
from common.data import evaluation_batches, load
from common.export.formats import FORMATS, Format, Source
from common.export.runtimes import load_runner
from common.recipes.trained import evaluate_network, load_trained
from tests.helpers import smoke_runs

SMALL = ("--threads", "1")
IMAGES = 60


def make(name: str, folder: Path, *more: str, trained: Path | None = None) -> Path:
    """One of the smoke runs, in `folder`."""
    program, argv = smoke_runs.argv_of(name, "--save", str(folder), *more, trained=trained)
    code, said = smoke_runs.call(program, argv)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    """A training at mixed bits with 8-bit ends."""
    ends = ("--stem-bits", "8", "--classifier-bits", "8")
    return make("qsubnet train", runs / "qsubnet", "--wbits", "2", "--abits", "4", "--epochs", "1", *ends)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def prove(run: Path, out: Path) -> dict[str, Any]:
    """Export a run and check it on IMAGES; its figures, checked against an evaluation of our own."""
    assert export.main([str(run), "--format", "packed", "--out", str(out), "--images", str(IMAGES), *SMALL]) == 0
    entry = record(out)["files"]["packed"]
    path = out / entry["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    figures = entry["figures"]
    assert figures["float64"]["flipped"] == 0 and figures["float64"]["largest_logit_difference"] <= 1e-9
    assert figures["layers"]["different"] == 0 and figures["size"]["within"]
    network, _, info = load_trained(run)
    data = load(info["data"]["name"], image_size=info["data"]["image_size"])
    first, runner = next(iter(evaluation_batches(data.test, data.info, IMAGES, "cpu"))), load_runner(path)
    found = evaluate_network(network, [first], data.info.num_classes)
    assert figures["float32"]["images"] == found["n"] == IMAGES
    assert figures["float32"]["top1"] == found["top1"]
    assert figures["float32"]["top1_packed"] == float((runner(first[0]).argmax(1) == first[1]).double().mean())
    assert not list(out.glob(".tmp-*"))
    return figures


def test_all_test_images_where_no_number_is_given(run: Path, tmp_path: Path) -> None:
    assert export.main([str(run), "--format", "packed", "--out", str(tmp_path), *SMALL]) == 0
    figures = record(tmp_path)["files"]["packed"]["figures"]
    whole = json.loads((run / "result.json").read_text())
    assert (
        figures["float32"]["images"] == whole["n_test"] and figures["float32"]["top1"] == whole["metrics"]["test_top1"]
    )


def test_a_run_is_exported_and_proved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prove(run, tmp_path / "out")
    assert "packed.safetensors" in capsys.readouterr().out
    manifest = record(tmp_path / "out")
    assert (manifest["method"], manifest["run"], manifest["refused"]) == ("qsubnet", str(run), {})
    info = load("digits").info
    assert manifest["finished"] and manifest["images"]["mean"] == list(info.mean)
    assert manifest["images"]["std"] == list(info.std) and manifest["images"]["image_size"] == info.image_size


def test_an_unfinished_training_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "result.json").unlink()
    flags = ["--format", "packed", "--out", str(tmp_path / "out"), "--images", "5", *SMALL]
    assert export.main([str(copy), *flags]) == 0
    assert "its training is not finished" in capsys.readouterr().out
    assert record(tmp_path / "out")["finished"] is False


def test_into_the_runs_own_folder_and_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        capsys.readouterr()
        assert export.main([str(run), "--format", "packed", "--images", "5", "--json", *SMALL]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown == record(run / "export")
        assert shown["files"]["packed"]["figures"]["float32"]["images"] == 5
    assert load_trained(run)  # the run is what it was


def test_networks_of_the_micro_space_and_post_training(runs: Path, tmp_path: Path) -> None:
    prove(make("enas train", runs / "enas"), tmp_path / "enas")
    trained = make("ptq train", runs / "fp32", "--epochs", "1")
    flags = ("--quant-method", "minmax", "--param-bits", "3", "--fwd-bits", "4")
    prove(make("ptq quantize", runs / "minmax", *flags, trained=trained), tmp_path / "minmax")
    tanh = make("ptq quantize", runs / "tanh", "--quant-method", "tanh", trained=trained)
    assert export.main([str(tanh), "--format", "packed", "--out", str(tmp_path / "tanh")]) == 2
    assert not list((tmp_path / "tanh").glob("*packed*"))


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert export.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_what_is_refused_says_why(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN: is missing" in refused(capsys)
    assert "--format: is missing; give one or more of packed" in refused(capsys, run)
    assert "--format: 'packd' is unknown" in refused(capsys, run, "--format", "packd")
    assert "no run lies there" in refused(capsys, tmp_path, "--format", "packed")
    file = tmp_path / "file"
    file.write_text("")
    assert "--out" in refused(capsys, run, "--format", "packed", "--out", file)
    (tmp_path / "other").mkdir()
    other = {**record_of_another_run(), "schema": 1}
    (tmp_path / "other" / "export.json").write_text(json.dumps(other))
    said = refused(capsys, run, "--format", "packed", "--out", tmp_path / "other")
    assert "holds the export of another network" in said
    (tmp_path / "other" / "export.json").write_text(json.dumps({**other, "schema": 9}))
    assert "schema 9" in refused(capsys, run, "--format", "packed", "--out", tmp_path / "other")


def record_of_another_run() -> dict[str, Any]:
    return {"state_digest": "0" * 64, "files": {}, "refused": {}}


def test_all_notes_what_no_format_holds_and_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two formats alone: one that cannot hold the network, one that can."""

    def cannot(*_: object) -> None:
        raise ValueError("stem.0: this format has no stems")

    monkeypatch.setattr("common.export.proof.refuse_everything", cannot, raising=False)
    names = ("poor", "poor.safetensors", "common.export.proof", "refuse_everything", "check_packed", "for tests")
    for name in set(FORMATS) - {"packed"}:
        monkeypatch.delitem(FORMATS, name)
    monkeypatch.setitem(FORMATS, "poor", Format(*names))
    command = (run, "--out", tmp_path, "--images", 2, *SMALL, "--format")
    assert "--format poor: stem.0: this format has no stems" in refused(capsys, *command, "poor")
    assert export.main([str(word) for word in (*command, "all")]) == 0
    assert "poor        not written: stem.0: this format has no stems" in capsys.readouterr().out
    found = record(tmp_path)
    assert list(found["files"]) == ["packed"] and found["refused"] == {"poor": "stem.0: this format has no stems"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "packed.safetensors"]
    monkeypatch.delitem(FORMATS, "packed")
    assert "no format holds this network" in refused(capsys, *command, "all")


def test_a_failed_proof_leaves_no_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> dict[str, Any]:
        raise ValueError(f"{tmp_path}: 3 codes differ")

    monkeypatch.setattr("common.export.proof.exact_figures", wrong)
    assert "3 codes differ" in refused(capsys, run, "--format", "packed", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_when_the_new_one_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(run), "--format", "packed", "--out", str(tmp_path), "--images", "3", *SMALL]
    assert export.main(command) == 0
    before = (tmp_path / "packed.safetensors").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("common.export.proof.layer_figures", interrupted)
    assert export.main(command) == 130
    assert (tmp_path / "packed.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_format_is_written_or_refused_never_both(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written once, refused in a later export of all: its old file goes, and its entry."""
    works = {"first": True, "second": True}

    def write(source: Source, path: Path) -> None:
        if not works[path.name.partition("-")[2].partition("-")[2]]:
            raise ValueError("3 codes differ")
        path.write_bytes(b"network")

    monkeypatch.setattr("common.export.proof.write_it", write, raising=False)
    monkeypatch.setattr("common.export.proof.check_it", lambda source, path: {}, raising=False)
    for name in list(FORMATS):
        monkeypatch.delitem(FORMATS, name)
    for name in works:
        form = Format(name, name, "common.export.proof", "write_it", "check_it", "for tests")
        monkeypatch.setitem(FORMATS, name, form)
    command = [str(run), "--out", str(tmp_path), *SMALL, "--format"]
    assert export.main([*command, "all"]) == 0
    assert list(record(tmp_path)["files"]) == ["first", "second"]
    works["second"] = False
    assert export.main([*command, "second"]) == 2, "named, it is an error, and nothing is lost"
    assert list(record(tmp_path)["files"]) == ["first", "second"] and record(tmp_path)["refused"] == {}
    capsys.readouterr()
    assert export.main([*command, "all"]) == 0
    assert "second: the file of an earlier export is removed" in capsys.readouterr().out
    found = record(tmp_path)
    assert list(found["files"]) == ["first"] and found["refused"] == {"second": "3 codes differ"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "first"]
    works["second"] = True
    assert export.main([*command, "second"]) == 0
    assert list(record(tmp_path)["files"]) == ["first", "second"] and record(tmp_path)["refused"] == {}


def test_what_a_killed_export_left_is_swept(run: Path, tmp_path: Path) -> None:
    """Killed in the midst of a check; the next export removes what it left, and no living process's."""
    code = (
        "import os, signal, sys, export\n"
        "import common.export.proof as proof\n"
        "proof.layer_figures = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.main(sys.argv[1:])"
    )
    command = [str(run), "--format", "packed", "--out", str(tmp_path), "--images", "2", *SMALL]
    root = Path(export.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=root, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-*-packed.safetensors"))) == 1
    living, foreign = tmp_path / f".tmp-{os.getppid()}-packed.safetensors", tmp_path / ".tmp-1-notes.txt"
    living.write_text("")
    foreign.write_text("")
    assert export.main(command) == 0
    assert set(tmp_path.glob(".tmp-*")) == {living, foreign}


@pytest.mark.slow
def test_a_network_without_integers_is_exported_in_floats(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Levels of a logarithm are no integers times a scale: formats of codes say so, the fp32 one has none."""
    trained = make("ptq train", runs / "fp32-for-log", "--epochs", "1")
    logarithms = make("ptq quantize", runs / "log", "--quant-method", "log", trained=trained)
    assert export.main([str(logarithms), "--format", "all", "--out", str(tmp_path), "--images", "4", *SMALL]) == 0
    found = record(tmp_path)
    assert list(found["files"]) == ["onnx-fp32"] and set(found["refused"]) == set(FORMATS) - {"onnx-fp32"}
    for name, reason in found["refused"].items():
        assert "(weights)" in reason and "log" in reason, name
    assert found["files"]["onnx-fp32"]["figures"]["whole"]["top1_agreement"] == 1
    assert load_runner(tmp_path / "network-fp32.onnx").name == "onnx-fp32"


def test_help_needs_no_torch(root: Path) -> None:
    code = "import sys, export\ntry:\n    export.main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "--format" in done.stdout, done.stderr


@pytest.mark.slow
def test_every_method_and_width(tmp_path: Path) -> None:
    search = make("qdarts search", tmp_path / "search")
    prove(make("qdarts train", tmp_path / "qdarts", "--arch", str(search)), tmp_path / "a")
    trained = make("ptq train", tmp_path / "fp32", "--epochs", "1")
    prove(trained, tmp_path / "fp32-out")
    subnet = make("qsubnet search", tmp_path / "subnet", trained=trained)
    prove(make("qsubnet train", tmp_path / "qsubnet", "--arch", str(subnet)), tmp_path / "b")
    prove(make("fbqat train", tmp_path / "lsq", trained=trained), tmp_path / "c")
    for bits in (1, 2, 3, 4, 8):
        widths = ("--wbits", str(bits), "--abits", str(bits))
        ends = ("--stem-bits", str(max(bits, 2)), "--classifier-bits", str(max(bits, 2)))
        prove(make("qdarts train", tmp_path / f"w{bits}", *widths, *ends), tmp_path / f"w{bits}-out")
    prove(make("qdarts train", tmp_path / "s8", "--wbits", "8", "--abits", "8", "--signed-activations"), tmp_path / "d")
    for method in ("mse", "percentile", "minmax", "linear"):
        for bits in ("2", "3", "4", "8"):
            widths = ("--quant-method", method, "--param-bits", bits, "--fwd-bits", bits)
            folder = tmp_path / f"{method}{bits}"
            prove(make("ptq quantize", folder, *widths, trained=trained), tmp_path / f"{folder.name}-out")
    unfolded = make("ptq quantize", tmp_path / "unfolded", "--bn-bits", "8", trained=trained)
    prove(unfolded, tmp_path / "unfolded-out")
    for kind in ("binary", "stochastic", "ternary", "float", *(f"kbit{bits}" for bits in range(1, 9))):
        prove(make("enas train", tmp_path / kind, "--layer-bits", kind), tmp_path / f"{kind}-out")
