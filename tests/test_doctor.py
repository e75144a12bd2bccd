# SPDX-License-Identifier: Apache-2.0
"""doctor.py: what it finds, what it says where something is missing, and that it runs without any package."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import doctor

ROOT = Path(__file__).resolve().parents[1]


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_report_of_a_working_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for word in (
        "torch",
        importlib.metadata.version("torch"),
        "usable cores",
        "GiB free",
        "dot",
        "git",
        "digits",
        *("onnx", "onnxruntime", "onnxscript", "qonnx", "safetensors"),
    ):
        assert word in out
    assert out.splitlines()[-1].startswith("The core works")


def test_json_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--data", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1 and told["core_works"] is True
    assert {row["group"] for row in told["findings"]} == {"versions", "devices", "room", "programs", "data", "features"}
    for row in told["findings"]:
        assert (row["cure"] == "") == (row["status"] == "ok"), "each lack has its cure, and nothing else has one"
        assert "\n" not in row["cure"] + row["value"]


def test_runs_without_any_package() -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-S", "-E", str(ROOT / "doctor.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "torch         not installed" in done.stdout and "cure: bash scripts/setup.sh" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "does not work yet" in last and "torch" in last and "digits" in last


def test_torch_too_old_or_broken_fails_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.10.1" if name == "torch" else real(name))
    torch = by_name(doctor.check_versions(ROOT))["torch"]
    assert torch.status == "missing" and "2.10.1 is older than 2.11" in torch.value and torch.cure
    broken = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "import_error", lambda module: broken if module == "torchvision" else None)
    torchvision = by_name(doctor.check_versions(ROOT))["torchvision"]
    assert torchvision.status == "missing" and "nms" in torchvision.value


def test_data_is_found_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    (tmp_path / "cifar-100-python").mkdir()
    found = by_name(doctor.check_data(tmp_path))
    assert found["digits"].status == "ok"
    assert found["cifar10"].status == "ok" and str(tmp_path) in found["cifar10"].value
    assert found["cifar100"].status == "optional", "an empty folder is no data"
    assert "MNIST/raw" in found["mnist"].cure


def test_missing_and_broken_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(doctor.check_programs(ROOT))
    assert found["dot"].status == "optional" and found["dot"].cure.endswith("apt-get install graphviz")
    assert "does not run" in found["git"].value


def test_little_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK", 2**70)
    monkeypatch.setattr(doctor, "available_memory", lambda: 2**29)
    found = by_name(doctor.check_room(ROOT))
    assert found["disk"].status == "optional" and "--save" in found["disk"].cure
    assert found["memory"].value == "0.5 GiB available" and "--batch-size" in found["memory"].cure


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.11.0rc1", (2, 11, 0)), ("2.15.0a0+git123", (2, 15, 0)), ("main", ())],
)
def test_version_tuple(text: str, expected: tuple[int, ...]) -> None:
    assert doctor.version_tuple(text) == expected


def test_unknown_flag_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--dat", "x"])
    assert caught.value.code == 2
