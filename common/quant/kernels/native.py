# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels: built from C++ on first use, kept for later processes, called through a plain C interface.

Without a compiler, or where the build fails, everything is computed by the PyTorch twins, only slower; that is said
once. The sources include no header of torch, so a build takes seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_SOURCES = ("separable.cpp", "pooling.cpp")
_HEADERS = ("kernels.h", "depthwise.h", "normalisation.h", "pointwise.h")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-w"]
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

_enabled: ContextVar[bool] = ContextVar("native kernels", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Within it the PyTorch twins compute everything."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def enabled() -> bool:
    """Whether kernels may compute here at all (see `disabled`)."""
    return _enabled.get()


def usable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these tensors: on the CPU, all float32 or all float64, outside autocast and compile."""
    if any(other is not None and (other.dtype, other.device) != (x.dtype, x.device) for other in others):
        return False
    if not enabled() or x.device.type != "cpu" or x.dtype not in _SUFFIX or not x.numel():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return library() is not None


def function(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:
    """An entry of the library for tensors of `dtype`."""
    found = library()
    assert found is not None
    return getattr(found, f"{name}_{_SUFFIX[dtype]}")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Its address; the caller keeps the tensor."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had (said once)."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"native kernels: not available, computing without them (slower): {reason}", file=sys.stderr)
        return None


def _built() -> Path:
    """The library's file, compiled when no process did so before for these sources, this torch and this processor."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    digest.update(" ".join([*_FLAGS, torch.__version__, platform.machine(), _processor()]).encode())
    name = f"nablaqdarts_kernels_{digest.hexdigest()[:16]}"
    kept = _cache() / f"{name}.so"
    if not kept.exists():
        _compile(name, kept)
    return kept


def _cache() -> Path:
    """Where torch keeps what it builds."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(base) / "torch_extensions"
    return Path(root) / "nablaqdarts"


def _compile(name: str, kept: Path) -> None:
    """Compile into a folder of this process's own and move the result: no lock, no half-written file is ever loaded."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise RuntimeError("no C++ compiler was found; install g++")
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a machine without CUDA is no news here
    from torch.utils.cpp_extension import load

    logger.setLevel(level)

    kept.parent.mkdir(parents=True, exist_ok=True)
    print("native kernels: compiling them, once for this machine (some seconds) ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="build-") as folder, _programs_of_this_python():
        load(
            name,
            [str(_FOLDER / source) for source in _SOURCES],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f"{name}.so", kept)


@contextmanager
def _programs_of_this_python() -> Iterator[None]:
    """An environment's programs (ninja) are found although it is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
