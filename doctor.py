# SPDX-License-Identifier: Apache-2.0
"""What this machine has and lacks for each feature, with the cure of every lack.

    python doctor.py [--data DIR] [--json]

Exit code 0 when the core works (a search and a training can run), 1 otherwise. Needs nothing but the standard library,
so that it can say what to do where torch itself is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SETUP = "bash scripts/setup.sh"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)
GIB = 2**30
# A CIFAR-10 search keeps a few checkpoints of some 100 MB each.
MIN_DISK = MIN_MEMORY = 2 * GIB

# Data set -> what stands for it below the data folder (torchvision's own layout).
DATA_FILES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw"}
OPTIONAL = {  # module -> (what it is for, cure)
    "ffcv": ("the fast ImageNet loader", "bash scripts/install_ffcv.sh, or conda: environment.yml"),
    "onnx": ("export to ONNX", f"{SETUP} export"),
    "onnxruntime": ("the check of an exported file", f"{SETUP} export"),
    "onnxscript": ("export to ONNX, by torch's own exporter", f"{SETUP} export"),
    "qonnx": ("export to QONNX", f"{SETUP} export"),
    "safetensors": ("export to packed integers", f"{SETUP} export"),
    "submitit": ("sweeps on a Slurm cluster", f"{SETUP} cluster"),
}
PROGRAMS = {  # -> (argument that makes it say its version, what it is for)
    "dot": ("-V", "draws the cells; without it matplotlib does"),
    "ffmpeg": ("-version", "films of a search; GIFs do not need it"),
    "git": ("--version", "notes the commit in every run"),
    "c++": ("--version", "builds the native CPU kernels, without which searches are slower"),
}
PACKAGES = {"dot": "graphviz", "c++": "g++"}  # Debian's, where it has another name


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status`: ok, missing (the core needs it) or optional (a feature is off)."""

    group: str
    name: str
    status: str
    value: str
    cure: str = ""


def judge(group: str, name: str, good: bool, value: str, cure: str, lack: str = "optional") -> Finding:
    """A finding that carries its cure only where something is wrong; `lack` is the status it then has."""
    return Finding(group, name, "ok", value) if good else Finding(group, name, lack, value, cure)


def version_tuple(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0rc1+cpu" -> (2, 13, 0)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in leading.group().split(".")) if leading else ()


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_error(module: str) -> str | None:
    """Why `module` does not import, on one line; None when it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a binary that does not fit raises RuntimeError, OSError, AttributeError, ...
        return (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]
    return None


def core_requirements() -> list[str]:
    """Distribution names of requirements.txt, in its order."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [found.group() for line in lines if (found := re.match(r"[A-Za-z0-9._-]+", line))]


def check_versions(_: Path) -> list[Finding]:
    """Python and every distribution of the runtime core, each imported once."""
    good = sys.version_info >= MIN_PYTHON
    cure = f"install Python 3.11 or newer, then: PYTHON=/path/to/python3 {SETUP}"
    findings = [judge("versions", "python", good, platform.python_version(), cure, "missing")]
    modules = {"scikit-learn": "sklearn", "pillow": "PIL"}
    for name in core_requirements():
        version, error = installed_version(name), import_error(modules.get(name, name))
        value, cure = version or "installed", f"{SETUP}, then start this by .venv/bin/python"
        if error is not None:
            value = f"{version} does not import ({error})" if version else "not installed"
        elif name == "torch" and version and version_tuple(version) < MIN_TORCH:
            error, value = "old", f"{version} is older than {'.'.join(map(str, MIN_TORCH))}"
        findings.append(judge("versions", name, error is None, value, cure, "missing"))
    return findings


def check_devices(_: Path) -> list[Finding]:
    """CPU cores that this process may use, and the CUDA devices that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [Finding("devices", "cpu", "ok", f"{cores} usable cores of {os.cpu_count()} ({platform.machine()})")]
    if import_error("torch") is not None:
        return findings
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        findings.append(Finding("devices", f"cuda:{index}", "ok", value))
    if len(findings) == 1:
        built = torch.version.cuda is not None
        value = "no GPU is visible" if built else "this torch is built for the CPU only"
        cure = "update its driver, until nvidia-smi lists it" if built else "name a CUDA build of torch: TORCH_SPEC"
        findings.append(Finding("devices", "cuda", "optional", value, f"only where there is a GPU: {cure}"))
    return findings


def available_memory() -> int | None:
    """Bytes that a new process may use: /proc's estimate, cut by a container's limit. None where neither is known."""
    limits = []
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        limits += [int(found.group(1)) * 1024] if found else []
    except OSError:
        pass  # not Linux
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or no limit in it ("max")
    return min(limits, default=None)


def check_room(_: Path) -> list[Finding]:
    """Free disk in the working folder, where runs are written, and free memory."""
    free = shutil.disk_usage(Path.cwd()).free
    value, cure = f"{free / GIB:.1f} GiB free in the working folder", "free some, or write runs elsewhere: --save DIR"
    findings = [judge("room", "disk", free >= MIN_DISK, value, cure)]
    memory = available_memory()
    if memory is not None:
        value, cure = f"{memory / GIB:.1f} GiB available", "close other programs, or take a smaller --batch-size"
        findings.append(judge("room", "memory", memory >= MIN_MEMORY, value, cure))
    return findings


def check_programs(_: Path) -> list[Finding]:
    """Programs outside Python, each asked for its version."""
    findings = []
    for name, (argument, purpose) in PROGRAMS.items():
        cure = f"as root: apt-get install {PACKAGES.get(name, name)}"
        value, good = f"not found; {purpose}", False
        if shutil.which(name) is not None:
            try:
                done = subprocess.run([name, argument], capture_output=True, text=True, timeout=20, check=True)
                value, good = ((done.stdout or done.stderr).splitlines() or ["found"])[0], True
            except (OSError, subprocess.SubprocessError) as error:
                value = f"found but does not run ({error}); {purpose}"
        findings.append(judge("programs", name, good, value, cure))
    return findings


def check_data(folder: Path) -> list[Finding]:
    """Which data sets lie under `folder`; digits come with scikit-learn."""
    good = importlib.util.find_spec("sklearn") is not None
    value = "bundled with scikit-learn, 1797 images" if good else "scikit-learn, which has them, is not installed"
    findings = [judge("data", "digits", good, value, SETUP, "missing")]
    for name, entry in DATA_FILES.items():
        path = _located(name, folder, folder / entry)
        good = path is not None
        cure = f"--data DIR, the folder with {entry} in it; else it is downloaded at its first use"
        findings.append(judge("data", name, good, str(path) if good else f"not under {folder}", cure))
    return findings


def _located(name: str, folder: Path, usual: Path) -> Path | None:
    """What the loader would read: unpacked files or an archive. Without torch: the usual folder."""
    try:
        from common.data import locate
    except ImportError:
        return usual if usual.is_dir() and any(usual.iterdir()) else None
    return locate(name, folder)


def check_features(_: Path) -> list[Finding]:
    """Optional Python packages, looked up without importing them (some start threads or compile)."""
    findings = []
    for module, (purpose, cure) in OPTIONAL.items():
        good = importlib.util.find_spec(module) is not None
        value = (installed_version(module) or "installed") if good else f"not installed; {purpose}"
        findings.append(judge("features", module, good, value, cure))
    return findings


CHECKS: tuple[Callable[[Path], list[Finding]], ...] = (
    *(check_versions, check_devices, check_room),
    *(check_programs, check_data, check_features),
)


def print_report(findings: Sequence[Finding]) -> None:
    """The findings in groups, each lack (or run of lacks) followed by its cure, and the verdict as the last line."""
    marks = {"ok": "ok", "missing": "NO", "optional": "-"}
    for index, finding in enumerate(findings):
        if index == 0 or findings[index - 1].group != finding.group:
            print(finding.group)
        print(f"  {marks[finding.status]:<3} {finding.name:<13} {finding.value}")
        following = findings[index + 1].cure if index + 1 < len(findings) else ""
        if finding.cure and finding.cure != following:
            print(f"{'':<20}cure: {finding.cure}")
    missing = [finding.name for finding in findings if finding.status == "missing"]
    verdict = f"does not work yet; missing: {', '.join(missing)}" if missing else "works: search and training can run"
    print(f"The core {verdict}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 when nothing that the core needs is missing."""
    parser = argparse.ArgumentParser(prog="doctor.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="where data sets lie (./data)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    arguments = parser.parse_args(argv)
    findings = [finding for check in CHECKS for finding in check(arguments.data)]
    works = all(finding.status != "missing" for finding in findings)
    if arguments.json:
        print(json.dumps({"schema": 1, "core_works": works, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        print_report(findings)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
