# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: CPU time, peak memory, counts of operations, saved bytes, and where figures were taken."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any, Self
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.engine.memory import SavedBytes
from common.quant.kernels import native

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20

# Operators whose result the host waits for on a GPU; tolist and numpy go past the dispatcher and are counted apart.
_READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")


class OperationCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd while it is entered, in forward and backward.

    `leaves`: operators that compute (no views), and every call of a compiled kernel of our own, which goes past the
    dispatcher ("native ..."); `views`; `syncs`: operators that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.leaves: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self._patches: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not str(func).startswith("profiler."):
            (self.views if func.is_view else self.leaves)[name] += 1
        if name in _READS:
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        for name in ("tolist", "numpy"):
            counting = self.counting(self.syncs, name, getattr(Tensor, name))
            self._patches.append(patch.object(Tensor, name, counting))
        library = native.library()
        if library is not None:
            self._patches.append(patch.object(native, "library", lambda: _Library(library, self)))
        for change in self._patches:
            change.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        while self._patches:
            self._patches.pop().stop()

    @staticmethod
    def counting(counts: Counter[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original`, every call of which adds one to its name in `counts`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return counted


class _Library:
    """The compiled kernels, every call of which is a leaf of the counter."""

    def __init__(self, library: Any, counter: OperationCounter) -> None:
        self._library, self._counter = library, counter

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._counter.counting(self._counter.leaves, f"native {name}", getattr(self._library, name))


def count_nodes(value: Tensor) -> int:
    """Nodes of the autograd graph behind a tensor."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


@contextmanager
def counting_nodes() -> Iterator[list[int]]:
    """Nodes of every graph that is differentiated within it, in order (`backward` and `autograd.grad`)."""
    counts: list[int] = []
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def note(outputs: Tensor | Sequence[Tensor]) -> None:
        first = outputs if isinstance(outputs, Tensor) else next(iter(outputs))
        counts.append(count_nodes(first))

    def counted_grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        note(outputs)
        return grad(outputs, *args, **kwargs)

    def counted_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        note(tensors)
        return backward(tensors, *args, **kwargs)

    with patch.object(torch.autograd, "grad", counted_grad), patch.object(torch.autograd, "backward", counted_backward):
        yield counts


def cpu_seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all its threads, in `work`."""
    return clocks_of(work)["cpu"]


def clocks_of(work: Callable[[], object]) -> dict[str, float]:
    """CPU seconds ("cpu": all threads of this process) and wall seconds ("wall") of `work`."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def peak_mebibytes_of(work: Callable[[], object]) -> float:
    """Peak resident memory of `work` over what was resident before it, in MiB (0 where the kernel does not tell).

    Memory that an earlier step freed may still be resident: measure a process's first large step.
    """
    gc.collect()
    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the high-water mark
        base = _resident("VmRSS")
        work()
        return (_resident("VmHWM") - base) / 1024
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


class Worker:
    """One side of a comparison in a process of its own, which answers one JSON line for every request.

    Two sides are alternated while neither sees the other's memory, allocator or caches.
    """

    def __init__(self, script: str | Path, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: str) -> Any:
        """The worker's answer; RuntimeError when it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the measuring process ended at {request!r} (code {self.process.wait()}); see above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(build: Callable[[], dict[str, Callable[[], Any]]]) -> None:
    """The worker's end: answer each request line from what `build()` gives; whatever is printed goes to stderr."""
    out: IO[str] = sys.stdout
    sys.stdout = sys.stderr
    known = build()
    for line in sys.stdin:
        out.write(json.dumps(known[line.strip()]()) + "\n")
        out.flush()


def answers(side: Any, steps: Sequence[str], full: Any, small: Any) -> dict[str, Callable[[], Any]]:
    """What a worker is asked for. `side` has a `model`, `take(batches)` and the methods `steps`.

    "memory": peak MiB of the first full round of all steps; "time": CPU seconds of each step; "clocks": CPU and wall
    seconds of a round; "saved": MiB that autograd holds at most in each step; "count": operations of each, on `small`.
    """

    def whole() -> None:
        for step in steps:
            getattr(side, step)()

    side.take(small)
    whole()  # libraries, kernels and optimiser states are there before memory is measured
    side.take(full)
    return {
        "memory": lambda: peak_mebibytes_of(whole),
        "time": lambda: {step: cpu_seconds_of(getattr(side, step)) for step in steps},
        "clocks": lambda: clocks_of(whole),
        "saved": lambda: {step: _saved(side, step) for step in steps},
        "count": lambda: _counted(side, steps, full, small),
    }


def _saved(side: Any, step: str) -> float:
    with SavedBytes(side.model).counting() as held:
        getattr(side, step)()
    return held.peak / MIB


def _counted(side: Any, steps: Sequence[str], full: Any, small: Any) -> dict[str, Any]:
    side.take(small)
    counts = {}
    for step in steps:
        with counting_nodes() as nodes, OperationCounter() as counter:
            getattr(side, step)()
        counts[step] = {
            "leaf_ops": counter.leaves.total(),
            "allocations": sum(n for name, n in counter.leaves.items() if "empty" in name),
            "views": counter.views.total(),
            "nodes": sum(nodes),
            "syncs": counter.syncs.total(),
            "most": dict(counter.leaves.most_common(12)),
        }
    side.take(full)
    return counts


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every column."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def machine() -> dict[str, Any]:
    """Where figures were taken: processor, cores, memory, load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores, load = os.cpu_count(), round(os.getloadavg()[0], 2)
    return {"cpu": cpu_name(), "cores": cores, "memory_gib": round(memory, 1), "load": load}


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def versions(*modules: str) -> dict[str, str]:
    """Python, torch, and further modules by name."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: importlib.import_module(name).__version__ for name in modules}


def deliver(result: dict[str, Any], table: str, destination: str | None) -> None:
    """`destination` None: the table; "-": the JSON object alone on stdout; else a file for it, and the table."""
    text = json.dumps(result, indent=1)
    if destination == "-":
        print(text)
        return
    print(table)
    if destination is not None:
        path = Path(destination)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
