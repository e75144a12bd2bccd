# SPDX-License-Identifier: Apache-2.0
"""One network in every backend that can run it: accuracy, speed, memory and size, each backend in its own process.

A process of its own makes peak memory the backend's, and keeps one's threads and kernels from the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data import ImageData, evaluation_batches
from common.engine import ClassificationMeter, read_json
from common.engine.environment import device_names, versions
from common.engine.files import check_schema
from common.export.formats import FORMATS
from common.export.runtimes import load_runner
from common.nets import EvaluationNetwork
from common.recipes.timing import CLOCKS, percentile
from common.recipes.trained import EVALUATION_BATCH, load_trained
from common.strict_json import parse_json

ROOT = Path(__file__).resolve().parents[2]
FP32, FAKE = "fp32", "fake-quantised"
FILES = ("packed", "onnx-fp32", "onnx", "onnx-int8", "torch")
"""Formats that are timed; qonnx's executor is there to check files, not to run them."""
REFERENCE = {FAKE: FP32, "packed": FP32, "torch": FP32, "onnx": "onnx-fp32", "onnx-int8": "onnx-fp32"}
"""Backend -> full precision in the same runtime: what its speed is compared with."""
BATCHES = (1, 64)
_LEAST_SAMPLES, _MOST_SAMPLES = 10, 200


@dataclass(frozen=True)
class Task:
    """What a process is to measure. `path`: a run for FP32 and FAKE, else an exported file.

    `data`: flags of the images as `load_data` reads them, with image_size; `images`: test on no more of them; `seconds`
    of timing for each batch size.
    """

    backend: str
    path: str
    data: dict[str, Any]
    checkpoint: str | None = None
    search_space: str | None = None
    threads: int | None = None
    images: int | None = None
    seconds: float = 10.0
    clock: str = "wall"


@dataclass(frozen=True)
class Plan:
    """The tasks of a target, and the formats that are left out, each with its reason."""

    tasks: list[Task]
    left_out: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- within a process


def perform(task: Task) -> dict[str, Any]:
    """Measure one backend in this process. Raises ValueError for what cannot be loaded or does not fit."""
    if task.search_space is not None:
        from common.recipes.own_space import load_search_space

        load_search_space(Path(task.search_space))
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    data = _images(task.data)
    x = _first_images(data, max(BATCHES))
    before = _restart_peak()
    run, arithmetic, size = _load(task)
    found: dict[str, Any] = {"backend": task.backend, "arithmetic": arithmetic, "bytes": size}
    found["threads"] = torch.get_num_threads() if task.threads is None else task.threads
    for batch in BATCHES:
        found[f"batch_{batch}"] = _timed(run, x, batch, task.seconds, CLOCKS[task.clock])
    found["peak_mb"] = _peak_mb() - before
    return found | _accuracy(run, data, task.images)


def _images(flags: Mapping[str, Any]) -> ImageData:
    from common.recipes.setup import load_data

    paths = {name: None if flags[name] is None else Path(flags[name]) for name in ("data", "trainfile", "valfile")}
    return load_data(Namespace(**{**flags, **paths}), lambda text: print(text, file=sys.stderr))


def _first_images(data: ImageData, count: int) -> Tensor:
    """The first test images, normalised [count, C, H, W]; again from the start where there are fewer."""
    x = next(iter(evaluation_batches(data.test, data.info, min(count, len(data.test)), "cpu")))[0]
    return x.repeat(-(-count // len(x)), 1, 1, 1)[:count].contiguous()


def _load(task: Task) -> tuple[Callable[[Tensor], Tensor], str, int]:
    """(images -> logits, what it computes with, bytes of its weights or of its file)."""
    if task.backend not in (FP32, FAKE):
        runner = load_runner(Path(task.path), task.threads)
        return runner, runner.arithmetic, Path(task.path).stat().st_size
    checkpoint = None if task.checkpoint is None else Path(task.checkpoint)
    network, _, _ = load_trained(Path(task.path), checkpoint)
    network.auxiliary_head = None
    if task.backend == FP32:
        from common.export.onnx_formats import unquantized

        network, text = unquantized(network), "float32 of torch, nothing quantised"
    else:
        text = f"float32 of torch, emulating {_bits_text(network)}"
    network = network.eval()

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return network(x)[0]

    return run, text, sum(4 * p.numel() for p in network.parameters())


def _bits_text(network: EvaluationNetwork) -> str:
    """The bits of the layers, weights/activations."""
    found = {
        (layer.weight_bits, layer.activation_bits)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "weight_bits", 32) < 32
    }
    return ", ".join(f"{w}/{a}" for w, a in sorted(found)) + " bits" if found else "no bits"


def _timed(
    run: Callable[[Tensor], Tensor], x: Tensor, batch: int, seconds: float, now: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds an image: median and 95th percentile of single forwards of `batch` images, each of other images."""
    parts = x.split(batch)
    run(parts[0])
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < _LEAST_SAMPLES or (len(samples) < _MOST_SAMPLES and time.perf_counter() < end):
        part = parts[len(samples) % len(parts)]
        started = now()
        run(part)
        samples.append(1e3 * (now() - started) / batch)
    return {"median_ms": percentile(samples, 0.5), "p95_ms": percentile(samples, 0.95), "n": len(samples)}


def _accuracy(run: Callable[[Tensor], Tensor], data: ImageData, images: int | None) -> dict[str, Any]:
    """top1 (fraction) and n, of the first `images` test images (None: all)."""
    meter, left = ClassificationMeter(data.info.num_classes, torch.device("cpu")), images or len(data.test)
    for x, y in evaluation_batches(data.test, data.info, EVALUATION_BATCH, "cpu"):
        x, y = x[:left], y[:left]
        logits = run(x).float()
        meter.update(logits, y, nn.functional.cross_entropy(logits, y, reduction="sum"))
        left -= len(x)
        if left <= 0:
            break
    found = meter.result()
    return {"top1": found["top1"], "n": found["n"]}


def _restart_peak() -> float:
    """Begin anew with the peak of this process's memory, where the system lets one; the present size in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(_status("VmRSS")) * 1.024e-3
    except (OSError, ValueError):
        return 0.0  # the peak is then that of the whole process


def _peak_mb() -> float:
    """Largest resident memory since `_restart_peak`, in MB."""
    try:
        return int(_status("VmHWM")) * 1.024e-3
    except (OSError, ValueError):
        from common.engine.environment import peak_memory_mb

        return peak_memory_mb(torch.device("cpu"))


def _status(key: str) -> str:
    """Kilobytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return line.split()[1]
    raise ValueError(f"/proc/self/status: has no {key}")


# ----------------------------------------------------------------------------------------------- the whole of a target


def measure_in_process(task: Task) -> dict[str, Any]:
    """`perform` in a process of its own. Raises ValueError with the reason that it gave."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
    if task.threads is not None:
        environment |= {"OMP_NUM_THREADS": str(task.threads)}
    command = [sys.executable, "-m", "common.recipes.backends"]
    done = subprocess.run(
        command, input=json.dumps(asdict(task)), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0 or not done.stdout.strip():
        said = done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"]
        raise ValueError(said[-1])
    found = parse_json(done.stdout.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def compare(plan: Plan, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows of all tasks with their ratios against full precision, and what was left out.

    Raises ValueError where no backend could be measured.
    """
    rows, left_out = [], dict(plan.left_out)
    for number, task in enumerate(plan.tasks):
        say(f"{task.backend} ({number + 1} of {len(plan.tasks)})")
        try:
            rows.append(measure_in_process(task))
        except ValueError as error:
            left_out[task.backend] = str(error)
    if not rows:
        raise ValueError(f"TARGET: no backend could be measured; {'; '.join(f'{k}: {v}' for k, v in left_out.items())}")
    by_name = {row["backend"]: row for row in rows}
    for row in rows:
        _add_ratios(row, by_name)
    about = {"device": device_names("cpu")["cpu"], "versions": _versions(), "threads": rows[0]["threads"]}
    about["clock"] = plan.tasks[0].clock
    return {**about, "rows": rows, "left_out": left_out}


def _add_ratios(row: dict[str, Any], by_name: Mapping[str, dict[str, Any]]) -> None:
    """How many times faster and smaller than full precision: the same runtime's in time, the network's in bytes."""
    for batch in BATCHES:
        row[f"batch_{batch}"]["images_per_second"] = 1e3 / row[f"batch_{batch}"]["median_ms"]
    reference = by_name.get(REFERENCE.get(row["backend"], ""))
    if reference is not None:
        row["reference"] = reference["backend"]
        for batch in BATCHES:
            key = f"batch_{batch}"
            row[key]["speedup"] = reference[key]["median_ms"] / row[key]["median_ms"]
    if FP32 in by_name:
        row["smaller"] = by_name[FP32]["bytes"] / row["bytes"]


def _versions() -> dict[str, Any]:
    from importlib import metadata

    found: dict[str, Any] = {key: versions()[key] for key in ("python", "torch")}
    for package in ("onnx", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def plan_of_folder(folder: Path, names: Sequence[str], **same: Any) -> Plan:
    """The exported files that lie in a folder, by their manifest or by their names. `same`: the fields of each task.

    Raises ValueError for a file that is not what the manifest says.
    """
    files = {name: folder / FORMATS[name].file for name in FILES if name in FORMATS and name in names}
    files = {name: path for name, path in files.items() if path.is_file()}
    for path in files.values():
        check_unchanged(path)
    tasks = [Task(name, str(path), **same) for name, path in files.items()]
    refused = manifest_of(folder).get("refused", {})
    left_out = {name: str(reason) for name, reason in refused.items() if name in names}
    for name, form in FORMATS.items():
        if name not in FILES and (folder / form.file).is_file():
            left_out[name] = f"takes seconds a batch; name {form.file} itself to measure it"
    return Plan(tasks, left_out)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The record of an export, {} where the folder has none. Raises ValueError where it is damaged."""
    from common.recipes.exporting import MANIFEST, MANIFEST_SCHEMA

    path = folder / MANIFEST
    if not path.is_file():
        return {}
    found = check_schema(read_json(path), MANIFEST_SCHEMA, str(path), "the record of an export")
    for key in ("files", "refused"):
        if not isinstance(found.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be an object")
    return found


def check_unchanged(path: Path) -> None:
    """Raise ValueError where the record beside an exported file gives it another size or sha256; none, no question."""
    for entry in manifest_of(path.parent).get("files", {}).values():
        if not isinstance(entry, dict) or entry.get("file") != path.name:
            continue
        if entry.get("bytes") != path.stat().st_size or entry.get("sha256") != sha256_of(path):
            raise ValueError(f"{path}: was changed since export.json was written; export the run again")


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_files(run: Path, folder: Path, names: Sequence[str], **source: Any) -> dict[str, str]:
    """Write a run's files of these formats, to be measured and thrown away: export.py is what proves files.

    Returns the formats that cannot hold the network, each with the reason. `source`: as `source_of` takes it.
    """
    from common.recipes.exporting import source_of

    found, _ = source_of(run, **source)
    refused = {}
    for name in names:
        try:
            FORMATS[name].write(found, folder / FORMATS[name].file)
        except ValueError as error:
            refused[name] = str(error)
    return refused


def as_text(found: Mapping[str, Any]) -> str:
    """The comparison as a table of Markdown, and what each backend computes with."""
    head = [
        "backend",
        "top-1",
        "images/s",
        "ms/image, batch 1",
        "batch 64",
        "speed, 1 / 64",
        "peak MB",
        "MB",
        "smaller",
    ]
    lines = ["| " + " | ".join(head) + " |", "| :-- |" + " --: |" * (len(head) - 1)]
    for row in found["rows"]:
        one, many = (row[f"batch_{batch}"] for batch in BATCHES)
        cells = [
            row["backend"],
            f"{row['top1']:.2%}",
            f"{many['images_per_second']:,.1f}",
            *(f"{each['median_ms']:.2f} ({each['p95_ms']:.2f})" for each in (one, many)),
            f"{one['speedup']:.2f} / {many['speedup']:.2f}" if "speedup" in one else "",
            f"{row['peak_mb']:,.0f}",
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['smaller']:.2f}x" if "smaller" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    n = max(row["n"] for row in found["rows"])
    lines += [
        "",
        f"{n:,} test images; {threads} of {found['device']}, {found['clock']} time; {packages}. Milliseconds are "
        "medians (95th percentile); images/s of batch 64; speed is against full precision in the same runtime (above "
        "1: faster); peak MB is what the process took beyond torch and the images.",
    ]
    top1 = {row["backend"]: row["top1"] for row in found["rows"]}
    if FP32 in top1 and FAKE in top1 and top1[FP32] != top1[FAKE]:
        lines.append(
            "fp32 and onnx-fp32 are this network's weights without its quantisers, for speed and size: they were not "
            "trained in full precision, and their top-1 says nothing of one that was."
        )
    lines += [f"{row['backend']}: {row['arithmetic']}" for row in found["rows"]]
    lines += [f"{name}: left out: {reason}" for name, reason in found["left_out"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure the task on stdin; the exit code. One line of JSON on stdout, or the reason on stderr."""
    try:
        found = perform(Task(**parse_json(sys.stdin.read())))
    except (ValueError, OSError, RuntimeError) as error:
        print(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
