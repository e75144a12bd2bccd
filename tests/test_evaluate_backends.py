# SPDX-License-Identifier: Apache-2.0
"""evaluate.py's table of backends: what it measures is the trained network, and what it cannot measure is said.

No figure of a clock is asserted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import read_json
from common.recipes import backends
from common.recipes.backends import FAKE, FP32, Plan, Task, as_text, compare, measure_in_process, perform
from common.recipes.exporting import export_run, source_of
from evaluate import BACKENDS
from evaluate import main as evaluate
from qdarts.train import main as train

SMOKE = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--no-plots", "--arch", "PC_DARTS"]
DIGITS = {
    **dict.fromkeys(("data", "trainfile", "valfile", "data_module", "classes")),
    **{"dataset": "digits", "image_size": None, "workers": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "train"
    assert train([*SMOKE, "--wbits", "2", "--abits", "4", "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed file, in a folder of its own."""
    folder = tmp_path_factory.mktemp("exported")
    export_run(run, ["packed"], folder, say=lambda text: None, images=20)
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of a command without a process for each: that one starts and reports is another test's."""
    monkeypatch.setattr(backends, "measure_in_process", lambda task: json.loads(json.dumps(perform(task))))


def task(backend: str, path: Path, **more: Any) -> Task:
    return Task(backend, str(path), DIGITS, threads=1, seconds=0.01, **more)


def test_the_trained_network_in_a_process_of_its_own(run: Path) -> None:
    """Accuracy on all test images is that of the training's own last line."""
    found = measure_in_process(task(FAKE, run))
    result = read_json(run / "result.json")
    assert (found["top1"], found["n"]) == (pytest.approx(result["metrics"]["test_top1"]), 360)
    assert found["bytes"] == result["cost"]["weight_bytes_fp32"]
    assert "emulating 2/4 bits" in found["arithmetic"] and found["threads"] == 1
    assert found["peak_mb"] > 0
    for batch in (1, 64):
        assert 0 < found[f"batch_{batch}"]["median_ms"] <= found[f"batch_{batch}"]["p95_ms"]
        assert found[f"batch_{batch}"]["n"] >= 10


def test_the_packed_file_classifies_as_the_network(run: Path, exported: Path) -> None:
    """Against the network itself, image by image, through the process's own loading."""
    found = perform(task("packed", exported / "packed.safetensors", images=64))
    source, _ = source_of(run, say=lambda text: None)
    x, y = next(iter(source.test()))
    with torch.inference_mode():
        right = (source.network(x)[0].argmax(1) == y)[:64]
    assert found["n"] == 64 and found["top1"] == pytest.approx(right.float().mean().item(), abs=1 / 64)
    assert found["bytes"] == (exported / "packed.safetensors").stat().st_size


def test_full_precision_is_the_network_without_quantisers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda task: seen.setdefault(task.backend, load(task)))
    rows = {name: perform(task(name, run, images=1)) for name in (FP32, FAKE)}
    x = torch.randn(3, 1, 16, 16)
    logits = {name: seen[name][0](x) for name in rows}
    assert not torch.allclose(logits[FP32], logits[FAKE]), "quantised is not full precision"
    network = source_of(run, say=lambda text: None)[0].network
    with torch.inference_mode():
        assert torch.equal(logits[FAKE], network(x)[0])
        for module in network.modules():
            if hasattr(module, "quantize_weight"):
                module.quantize_weight = module.quantize_activation = torch.nn.Identity()
        torch.testing.assert_close(logits[FP32], network(x)[0], rtol=1e-4, atol=1e-5)


def test_flags_name_what_there_is() -> None:
    """The flags list names without importing torch; they are those of the code that does the work."""
    from common.recipes import latency, latency_commands

    assert (FP32, FAKE, *backends.FILES) == BACKENDS
    assert tuple(latency.BACKENDS) == latency_commands.BACKENDS


def row(backend: str, one: float, many: float, size: int) -> dict[str, Any]:
    timing = {"p95_ms": 9.0, "n": 10}
    figures = {"backend": backend, "arithmetic": f"of {backend}", "bytes": size, "threads": 2, "peak_mb": 5.0}
    return figures | {
        **{"batch_1": {"median_ms": one, **timing}, "batch_64": {"median_ms": many, **timing}},
        **{"top1": 0.5, "n": 100},
    }


def test_ratios_are_against_full_precision_in_the_same_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        FP32: row(FP32, 8.0, 4.0, 1000),
        "packed": row("packed", 16.0, 2.0, 125),
        "onnx-fp32": row("onnx-fp32", 2.0, 1.0, 1100),
        "onnx": row("onnx", 4.0, 1.0, 250),
    }

    def measured(task: Task) -> dict[str, Any]:
        if task.backend not in made:
            raise ValueError("it cannot")
        return made[task.backend]

    monkeypatch.setattr(backends, "measure_in_process", measured)
    tasks = [Task(name, "x", {}) for name in (*made, "torch")]
    found = compare(Plan(tasks, {"onnx-int8": "depthwise"}))
    rows = {each["backend"]: each for each in found["rows"]}
    assert found["left_out"] == {"onnx-int8": "depthwise", "torch": "it cannot"}
    assert (rows["packed"]["batch_1"]["speedup"], rows["packed"]["batch_64"]["speedup"]) == (0.5, 2.0)
    assert (rows["onnx"]["batch_1"]["speedup"], rows["onnx"]["reference"]) == (0.5, "onnx-fp32")
    assert "speedup" not in rows[FP32]["batch_1"] and rows["packed"]["smaller"] == 8.0
    assert rows["packed"]["batch_64"]["images_per_second"] == 500.0
    shown = as_text(found)
    assert "| packed | 50.00% | 500.0 | 16.00 (9.00) | 2.00 (9.00) | 0.50 / 2.00 |" in shown
    assert "2 threads" in shown and "torch: left out: it cannot" in shown and "onnx: of onnx" in shown
    monkeypatch.setattr(backends, "measure_in_process", lambda task: measured(Task("none", "x", {})))
    with pytest.raises(ValueError, match="no backend could be measured; fp32: it cannot"):
        compare(Plan(tasks[:1]))


@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_exported_for_the_occasion(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    flags = ["--backends", "packed", "--images", "8", "--seconds", "0.01", "--threads", "1", "--json"]
    assert evaluate([str(run), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["backend"], each["n"]) for each in found["rows"]] == [("packed", 8)]
    assert sorted(run.rglob("*")) == before, "nothing is left in the run"


@pytest.mark.usefixtures("in_this_process")
def test_a_file_away_from_its_run_needs_its_images_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "packed.safetensors"
    shutil.copy(exported / "packed.safetensors", alone)
    quick = ["--images", "8", "--seconds", "0.01", "--threads", "1"]
    assert evaluate([str(alone), *quick]) == 2
    assert "name its images by --dataset" in capsys.readouterr().err
    assert evaluate([str(alone), "--dataset", "digits", *quick]) == 0
    assert "| packed |" in capsys.readouterr().out
    data = bytearray(alone.read_bytes())
    data[-5] ^= 1
    alone.write_bytes(data)
    assert evaluate([str(alone), "--dataset", "digits", *quick]) == 2
    assert str(alone) in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_folder_of_an_export_with_its_run(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record names the run, so that full precision stands beside the files."""
    flags = ["--backends", "fp32", "packed", "--images", "4", "--seconds", "0.01", "--threads", "1", "--json"]
    assert evaluate([str(exported), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["backend"] for each in found["rows"]] == [FP32, "packed"] and found["run"] == str(run)
    assert found["rows"][1]["smaller"] == found["rows"][0]["bytes"] / found["rows"][1]["bytes"]


def test_a_changed_byte_is_refused_by_the_files_name(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX has no checksum of its own: a weight that changed would run, and only the record knows."""
    folder = shutil.copytree(exported, tmp_path / "export")
    path, data = folder / "network.onnx", bytearray(b"weights")
    path.write_bytes(data)
    about = read_json(folder / "export.json")
    entry = {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert about["files"]["packed"].keys() > entry.keys()
    about["files"]["onnx"] = entry
    (folder / "export.json").write_text(json.dumps(about))
    plan = backends.plan_of_folder(folder, ["onnx", "packed"], data=DIGITS)
    assert [task.path for task in plan.tasks] == [str(folder / "packed.safetensors"), str(path)]
    data[3] ^= 1
    for changed in (data, data + b"!"):
        path.write_bytes(changed)
        for target in (path, folder):
            assert evaluate([str(target), "--images", "4", "--seconds", "0.01", "--threads", "1"]) == 2
            assert f"{path}: was changed since export.json was written; export the run" in capsys.readouterr().err


def test_what_a_runtime_raises_names_the_file(tmp_path: Path) -> None:
    """A graph that cannot be loaded, one that cannot be run, and what qonnx does not know."""
    import numpy as np
    import onnx
    from onnx import helper

    from common.export.onnx_runtime import OnnxRunner

    wrong_sum = (helper.make_node("Add", ["images", "other"], ["logits"]), np.zeros((1, 1, 7, 16), np.float32))
    wrong_shape = (helper.make_node("Reshape", ["images", "other"], ["logits"]), np.array([3, 7]))
    unknown = (helper.make_node("Nothing", ["images", "other"], ["logits"], domain="none"), np.zeros(1, np.float32))
    cases = [("onnx", wrong_sum, "load"), ("onnx", wrong_shape, "run"), ("qonnx", unknown, "execute")]
    for number, (form, (node, value), verb) in enumerate(cases):
        images = helper.make_tensor_value_info("images", 1, ["batch", 1, 16, 16])
        logits, constant = (
            helper.make_tensor_value_info("logits", 1, None),
            onnx.numpy_helper.from_array(value, "other"),
        )
        graph = helper.make_graph([node], "graph", [images], [logits], [constant])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("none", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        helper.set_model_props(model, {"format": form, "arithmetic": "float32"})
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=f"^{path}: {form}.* cannot {verb} it "):
            OnnxRunner(path, 1)(torch.zeros(2, 1, 16, 16))


def test_a_process_keeps_the_path_that_python_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def started(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.update(env)
        return subprocess.CompletedProcess([], 0, stdout="{}", stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    measure_in_process(task(FP32, Path("x")))
    assert seen["PYTHONPATH"].split(os.pathsep) == [str(backends.ROOT), "/some/where"]
    monkeypatch.delenv("PYTHONPATH")
    measure_in_process(task(FP32, Path("x")))
    assert seen["PYTHONPATH"] == str(backends.ROOT)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "3"], "--images: only has a meaning with --backends"),
        (["--backends", "--split", "val"], "--split val: backends are compared on test images"),
        (["--backends", "--clock", "cpu"], "--clock cpu: adds up all threads"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate([str(run), *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(tmp_path), "--dataset", "digits"]) == 2
    assert "holds neither a run nor an exported file" in capsys.readouterr().err
    for flags in (["--backends", "--dataset", "digits"], ["--images", "3"]):
        assert evaluate([str(tmp_path / "no"), *flags]) == 2
        assert "is not there" in capsys.readouterr().err


def test_a_file_that_cannot_run_is_an_error_before_anything_is_timed(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "export.json").unlink()
    path = folder / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    monkeypatch.setattr(backends, "measure_in_process", lambda task: pytest.fail("it was timed"))
    assert evaluate([str(path), "--dataset", "digits"]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_format_that_is_too_slow_for_the_table_is_said(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "network-qonnx.onnx").write_bytes(b"")
    plan = backends.plan_of_folder(folder, ["packed"], data=DIGITS)
    assert [task.backend for task in plan.tasks] == ["packed"]
    assert "name network-qonnx.onnx itself" in plan.left_out["qonnx"]
