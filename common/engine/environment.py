# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: versions, git commit, device. Recorded well enough to repeat it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def started_as(argv: Sequence[str], method: str, stage: str) -> dict[str, Any]:
    """{"program", "cwd", "processes"}: what was started, where, and by how many processes of torchrun.

    A program of this project is named from the project's root, and METHOD/STAGE.py where another one called it.
    """
    typed = Path(argv[0]).resolve() if argv else ROOT
    usual = ROOT / method / f"{stage}.py"
    program = usual if usual.is_file() and typed.name != usual.name else typed
    inside = program.is_relative_to(ROOT)
    return {
        "program": program.relative_to(ROOT).as_posix() if inside else str(program),
        "cwd": os.getcwd(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def describe(device: str | None = None) -> dict[str, Any]:
    """{"git", "versions", "device"} of this process; `device` is the run's flag (auto, cpu, cuda, ...)."""
    return {"git": git(), "versions": versions(), "device": device_names(device)}


@functools.cache
def git() -> dict[str, Any] | None:
    """{"commit", "dirty"} of the project's own repository, None where there is none."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def versions() -> dict[str, str | None]:
    """Versions of python, this project and the libraries whose numbers a run depends on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "project": _own_version()}
    for package in ("torch", "torchvision", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_names(device: str | None) -> dict[str, Any]:
    """{"cpu", "cores", "threads", "cuda": [names]}; CUDA is asked only when the run may use it."""
    import torch

    use_cuda = device != "cpu" and torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if use_cuda else [],
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository: the field is null
    return done.stdout.strip()


def _own_version() -> str | None:
    try:
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def peak_memory_mb(device: Any) -> float:
    """Largest memory so far, in MB (1e6 bytes): torch's on a GPU, the process's resident set elsewhere."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1024e-6)  # bytes on macOS, kilobytes on Linux
