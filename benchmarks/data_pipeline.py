# SPDX-License-Identifier: Apache-2.0
"""Training batches per second: resident uint8 tensors (common.data) against torchvision's CIFAR10 + DataLoader.

Both sides crop (pad 4), mirror, convert and normalise the same CIFAR-10 images on the same CPU: torchvision with two
worker processes, ours on one thread of one process. The sides alternate and medians of n are given; the wall
time of starting workers is not counted. Images per CPU second (all processes) are given beside images per second,
since they hardly depend on what else the machine does.

    python benchmarks/data_pipeline.py [--data ROOT] [--output benchmarks/results/data_pipeline.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import measuring
from common.data import DatasetInfo, Split, Stream, load, locate

MEAN, STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
GOAL = 10.0


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON where asked; exit code 1 when the goal is missed (never under --smoke)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or archive of CIFAR-10 (default: random images of its size)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=10240, help="images a measurement takes from torchvision")
    parser.add_argument("--repeats", type=int, default=5, help="n, measurements of each side")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    args = parser.parse_args(argv)
    if args.smoke:
        args.batch_size, args.images, args.repeats = 32, 256, 1
    where = measuring.machine()  # before the workers make a load of their own
    with tempfile.TemporaryDirectory() as scratch:
        dataset, source = _dataset(args.data, Path(scratch), 512 if args.smoke else 50_000)
    figures = _measure(dataset, args.batch_size, args.images, args.repeats)
    result = {
        "schema": 1,
        "benchmark": "data_pipeline",
        "images": source,
        "batch_size": args.batch_size,
        "n": args.repeats,
        **figures,
        "goal": GOAL,
        "machine": where,
        "versions": measuring.versions("torchvision"),
    }
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(not args.smoke and figures["ratio"] < GOAL)


def _dataset(root: Path | None, scratch: Path, count: int) -> tuple[Any, str]:
    """torchvision's CIFAR10 training set, of the real images where --data holds them, and what it is made of."""
    from torchvision.datasets import CIFAR10

    if root is not None:
        found = locate("cifar10", root)
        if found is not None and found.is_file():
            load("cifar10", root=root, download=False)  # unpacks it
            found = locate("cifar10")
        if found is None or found.name != CIFAR10.base_folder:
            raise ValueError(f"--data {root}: holds no {CIFAR10.base_folder} and no archive of it")
        return CIFAR10(found.parent, train=True), "CIFAR-10 training set"
    folder = scratch / CIFAR10.base_folder
    folder.mkdir()
    names, random = ["data_batch_1", "test_batch"], np.random.default_rng(0)
    for name in names:
        size = count if name == "data_batch_1" else 1
        pixels = random.integers(0, 256, (size, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": random.integers(0, 10, size).tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in (*names, "batches.meta")}
    lists = {"train_list": [[names[0], md5[names[0]]]], "test_list": [[names[1], md5[names[1]]]]}
    # Only while it is read: the checksums are those of the published files otherwise.
    with patch.multiple(CIFAR10, **lists, meta={**CIFAR10.meta, "md5": md5["batches.meta"]}):
        return CIFAR10(scratch, train=True), f"{count} random images"


def _measure(dataset: Any, batch_size: int, images: int, repeats: int) -> dict[str, Any]:
    """Both sides alternated `repeats` times; rates in images per second and per CPU second, and their ratio."""
    torch.set_num_threads(1)
    stream = _resident(dataset, batch_size)
    theirs = [_torchvision_run(dataset, batch_size, images)]  # one of each that does not count
    ours = [_resident_run(stream, 0)]
    for epoch in range(1, repeats + 1):
        theirs.append(_torchvision_run(dataset, batch_size, images))
        ours.append(_resident_run(stream, epoch))
    sides = {}
    for name, runs in (("torchvision", theirs[1:]), ("resident", ours[1:])):
        sides[name] = {
            "images_per_second": round(median(run[0] for run in runs), 1),
            "images_per_cpu_second": round(median(run[1] for run in runs), 1),
            "runs": [round(run[0], 1) for run in runs],
        }
    pairs = list(zip(ours[1:], theirs[1:], strict=True))
    return {
        **sides,
        "ratio": round(median(a[0] / b[0] for a, b in pairs), 1),
        "ratio_per_cpu_second": round(median(a[1] / b[1] for a, b in pairs), 1),
    }


def _torchvision_run(dataset: Any, batch_size: int, images: int) -> tuple[float, float]:
    from torchvision import transforms

    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset.transform = transforms.Compose(steps)
    chosen = torch.randperm(len(dataset))[:images].tolist()
    subset = torch.utils.data.Subset(dataset, chosen)
    cpu = _cpu_seconds()
    batches = iter(torch.utils.data.DataLoader(subset, batch_size, shuffle=True, num_workers=2, drop_last=True))
    next(batches)  # the workers are up; what they have already prepared is in their favour
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    seconds = time.perf_counter() - start
    del batches  # ends the workers: their CPU time is known from then on
    return count / seconds, images / (_cpu_seconds() - cpu)


def _resident(dataset: Any, batch_size: int) -> Stream:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    info = DatasetInfo("cifar10", 10, 3, 32, tuple(dataset.classes), MEAN, STD, flip=True, pad=4)
    split = Split(images, torch.tensor(dataset.targets))
    return Stream(split, info, batch_size=batch_size, seed=0, name="train", augment=True)


def _resident_run(stream: Stream, epoch: int) -> tuple[float, float]:
    cpu, start = _cpu_seconds(), time.perf_counter()
    count = sum(len(stream.batch(epoch, step)[1]) for step in range(stream.steps_per_epoch))
    return count / (time.perf_counter() - start), count / (_cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [f"{result['images']}, batches of {result['batch_size']}, medians of n = {result['n']}", ""]
    rows += ["| side | images/s | images per CPU second |", "| --- | ---: | ---: |"]
    labels = {"torchvision": "torchvision CIFAR10 + DataLoader, 2 workers", "resident": "common.data, 1 thread"}
    for name, label in labels.items():
        side = result[name]
        rows.append(f"| {label} | {side['images_per_second']:,.0f} | {side['images_per_cpu_second']:,.0f} |")
    rows.append(f"| ratio (goal {result['goal']:.0f}) | {result['ratio']:.1f} | {result['ratio_per_cpu_second']:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
