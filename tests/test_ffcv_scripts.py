# SPDX-License-Identifier: Apache-2.0
"""Installing ffcv and writing ImageNet's files: plans, refusals, and the conda way."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.photographs import make_folder

FFCV = importlib.util.find_spec("ffcv") is not None  # imported only where it is needed: that takes seconds


def bash(root: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("IMAGENET_DIR", "WRITE_DIR")}
    command = ["bash", str(root / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, timeout=300, check=False)


@pytest.mark.parametrize("state, code", [("installed", 0), ("missing", 1)])
def test_the_plan_of_an_installation(root: Path, tmp_path: Path, state: str, code: int) -> None:
    python = tmp_path / "python"  # in place of one that imports ffcv, or cannot
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    done = bash(root, "install_ffcv.sh", "--print-plan", PYTHON=str(python))
    plan = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    packages = "build-essential pkg-config libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev"
    assert done.returncode == 0 and plan["python"] == str(python)
    assert (plan["ffcv"], plan["packages"]) == (state, packages)
    assert plan["missing-packages"] == "-" or set(plan["missing-packages"].split()) <= set(packages.split())


def test_an_installation_where_it_cannot_be_says_why(root: Path, tmp_path: Path) -> None:
    """Neither apt-get nor a working ffcv: exit code 3, and the conda way."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "id", "cat", "sed", "mktemp", "rm"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (tools / name).symlink_to(found.stdout.strip())
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python").chmod(0o755)
    done = bash(root, "install_ffcv.sh", PYTHON=str(tools / "python"), PATH=str(tools))
    assert done.returncode == 3 and "conda env create -f environment.yml" in done.stderr


def test_what_the_writing_needs_is_said(root: Path, tmp_path: Path) -> None:
    for arguments, environment, message in (
        ((), {}, "three values are needed"),
        (("500", "0.50", "90"), {}, "IMAGENET_DIR is not set"),
        (("500", "0.50", "90"), {"IMAGENET_DIR": str(tmp_path)}, "WRITE_DIR is not set"),
    ):
        done = bash(root, "write_imagenet.sh", *arguments, **environment)
        assert done.returncode == 2 and message in done.stderr
    assert bash(root, "install_ffcv.sh", "--what").returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(not FFCV, reason="ffcv is not installed: bash scripts/install_ffcv.sh")
def test_both_files_are_written_under_the_published_names(root: Path, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", 3, 2)
    places = {"IMAGENET_DIR": str(images), "WRITE_DIR": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = bash(root, "write_imagenet.sh", "500", "0.50", "90", **places)
    assert done.returncode == 0, done.stderr
    names = {"train_500_0.50_90.ffcv", "val_500_0.50_90.ffcv"}
    assert {path.name for path in (tmp_path / "out").glob("*.ffcv")} == names
    assert "is there already" in bash(root, "write_imagenet.sh", "500", "0.50", "90", **places).stdout


def test_the_conda_environment_has_the_papers_name_and_every_requirement(root: Path) -> None:
    text = (root / "environment.yml").read_text()
    assert "name: qdarts_ffcv_env\n" in text and "ffcv==1.0.2" in text
    renamed = {"torch": "pytorch", "opencv-python-headless": "opencv"}
    for file in ("requirements.txt", "requirements-ffcv.txt"):
        for line in (root / file).read_text().splitlines():
            if name := re.match(r"[A-Za-z][\w-]*", line):
                assert re.search(rf"- {renamed.get(name[0], name[0])}\b", text), name[0]
