# SPDX-License-Identifier: Apache-2.0
"""ImageNet training batches per second: PIL and DataLoader, decode_jpeg, and FFCV's three kinds of file.

All sides cut a random area (.08 to 1), resize it to --size, mirror it and normalise it to float32 on the CPU, with
--workers processes (DataLoader) or threads (the others). FFCV is measured twice for each kind of file: as its Loader
gives batches, and as our stream does. The sides take turns, one round of each that does not count comes first (it
compiles), and medians of n are given. Images per CPU second (all processes) are given beside images per second: they
depend less on what else the machine does.

    python benchmarks/loaders.py --data DIR [--output benchmarks/results/loaders.json]

DIR holds train/CLASS/* and val/CLASS/*, photographs as ImageNet's. Without it: pieces of scikit-learn's two.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import measuring
from common.data import ImageData, load, open_stream
from common.data import ffcv as room
from common.data.augment import Normalizer
from common.data.folder import scan
from common.data.streamed import IMAGENET_MEAN, IMAGENET_STD, PREPARED, RATIO, SCALE

KINDS = {"jpg": 1.0, "proportion": 0.5, "raw": 0.0}
GOALS = {f"ffcv {kind} / plain": 0.97 for kind in KINDS}
GOALS |= {"ffcv proportion / PIL": 1.5, "ffcv raw / PIL": 1.5, "decode_jpeg / PIL": 1.5}  # images per second
Rounds = Callable[[], Iterator[int]]
"""Gives the number of images of each batch of some epochs."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write JSON where asked; exit code 1 when a goal is missed (never under --smoke)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of photographs (default: pieces of two)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side of a crop")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=3000, help="images a measurement takes, rounded up to epochs")
    parser.add_argument("--repeats", type=int, default=5, help="n, measurements of each side")
    parser.add_argument("--max-resolution", type=int, default=500, help="of the FFCV files")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--smoke", action="store_true", help="for tests: proves the path, not the figure")
    args = parser.parse_args(argv)
    if args.smoke:
        args.size, args.batch_size, args.images, args.repeats, args.workers = 32, 4, 8, 1, 1
    where = measuring.machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data, source = _photographs(args.data, Path(scratch))
        sides, missing = _sides(args, data, Path(scratch))
        figures = _measure(sides, args.repeats)
    result = {
        "schema": 1,
        "benchmark": "loaders",
        "images": source,
        **{name: getattr(args, name) for name in ("size", "batch_size", "workers", "max_resolution")},
        "images_a_measurement": args.images,
        "n": args.repeats,
        "sides": figures,
        "ratios": _ratios(figures),
        "ffcv_missing": missing,
        "machine": where,
        "versions": measuring.versions("torchvision", "PIL", *([] if missing else ["numba"])),
    }
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(not args.smoke and any(ratio["value"] < ratio["goal"] for ratio in result["ratios"].values()))


def _photographs(root: Path | None, scratch: Path) -> tuple[Path, str]:
    if root is None:
        from tests.helpers.photographs import make_folder

        return make_folder(scratch / "photographs", 8, 2), "pieces of scikit-learn's two photographs"
    count = len(scan(root / "train")[1])
    return root, f"{root.resolve().name}, {count} training photographs"


def _sides(args: argparse.Namespace, root: Path, scratch: Path) -> tuple[dict[str, Rounds], str | None]:
    """Every side by name, and why FFCV's are not among them."""
    classes, samples = scan(root / "train")
    epochs = -(-args.images // len(samples))
    settings = {"image_size": args.size, "workers": args.workers, "say": lambda text: None}
    sides = {"PIL": _pil(args, root / "train", epochs)}
    sides["decode_jpeg"] = _Ours(args, load("imagenet", root=root, **settings), epochs)
    missing = room.why_missing()
    if missing is not None:
        return sides, missing
    for kind, share in KINDS.items():
        out = scratch / f"{kind}.ffcv"
        with contextlib.redirect_stderr(io.StringIO()):  # ffcv's own progress bar
            room.write_ffcv(
                samples, out, classes=classes, max_resolution=args.max_resolution, compress_probability=share
            )
        sides[f"ffcv {kind}, plain"] = _plain(args, out, epochs)
        sides[f"ffcv {kind}"] = _Ours(args, load("imagenet", trainfile=out, valfile=out, **settings), epochs)
    return sides, None


def _pil(args: argparse.Namespace, folder: Path, epochs: int) -> Rounds:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.RandomResizedCrop(args.size, SCALE, RATIO), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))

    def rounds() -> Iterator[int]:
        loader = torch.utils.data.DataLoader(
            dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True, persistent_workers=True
        )
        for _ in range(epochs):
            yield from (len(labels) for _, labels in loader)

    return rounds


class _Ours:
    """Our stream in the middle of its work: what it has ready at the start is taken out before the clock runs."""

    def __init__(self, args: argparse.Namespace, data: ImageData, epochs: int) -> None:
        self._args, self._data, self._epochs, self._names = args, data, epochs, itertools.count()

    def warm(self) -> None:
        """Open a stream, and empty the queues that filled while it started."""
        settings = {"batch_size": self._args.batch_size, "seed": 0, "name": f"round {next(self._names)}"}
        self._stream = open_stream(self._data.train, self._data.info, augment=True, **settings)
        self._number = 0
        for _ in range(2 * PREPARED + 1):
            self._take()

    def _take(self) -> int:
        count = len(self._stream.batch(*divmod(self._number, self._stream.steps_per_epoch))[1])
        self._number += 1
        return count

    def __call__(self) -> Iterator[int]:
        return (self._take() for _ in range(self._epochs * self._stream.steps_per_epoch))

    def done(self) -> None:
        """End the stream's threads."""
        self._stream.close()


def _plain(args: argparse.Namespace, file: Path, epochs: int) -> Rounds:
    """ffcv's Loader with its own decoder, order and queue, and the same normalisation by torch."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    with room.torch_threads_kept():
        decoder = RandomResizedCropRGBImageDecoder((args.size, args.size), SCALE, RATIO)
        loader = Loader(
            str(file),
            batch_size=args.batch_size,
            num_workers=room.clamp_workers(args.workers),
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            seed=0,
            pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "label": None},
        )
    normalize = Normalizer(IMAGENET_MEAN, IMAGENET_STD, "cpu")

    def rounds() -> Iterator[int]:
        with room.torch_threads_kept():
            for _ in range(epochs):
                for (images,) in loader:
                    yield len(normalize(images))

    return rounds


def _measure(sides: dict[str, Rounds], repeats: int) -> dict[str, dict[str, Any]]:
    """All sides in turn; the first round does not count."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, rounds in sides.items():
            runs[name].append(_once(rounds))
    figures = {}
    for name, all_of_them in runs.items():
        counted = all_of_them[1:]
        figures[name] = {
            "images_per_second": round(median(run[0] for run in counted), 1),
            "images_per_cpu_second": round(median(run[1] for run in counted), 1),
            "runs": [[round(value, 1) for value in run] for run in counted],
        }
    return figures


def _once(rounds: Rounds) -> tuple[float, float]:
    """Images per second once the first batch is there, and per CPU second from before it."""
    if isinstance(rounds, _Ours):
        rounds.warm()
    cpu, batches = _cpu_seconds(), rounds()
    first = next(batches)
    start = time.perf_counter()
    count = sum(batches)
    seconds = time.perf_counter() - start
    del batches  # ends the workers: their CPU time is known from then on
    used = _cpu_seconds() - cpu
    if isinstance(rounds, _Ours):
        rounds.done()
    return count / seconds, (first + count) / max(used, 1e-9)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _ratios(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds' own ratios, of images per second and per CPU second, and the goals for the first."""
    found = {}
    for name, goal in GOALS.items():
        ours, other = name.split(" / ")
        if ours not in figures:
            continue
        theirs = f"{ours}, plain" if other == "plain" else other
        rounds = list(zip(figures[ours]["runs"], figures[theirs]["runs"], strict=True))
        values = (round(median(a[i] / b[i] for a, b in rounds), 3) for i in (0, 1))
        found[name] = dict(zip(("value", "per_cpu_second", "goal"), (*values, goal), strict=True))
    return found


def table(result: dict[str, Any]) -> str:
    """The figures as tables."""
    rows = [
        f"{result['images']}; crops of {result['size']} pixels, batches of {result['batch_size']}, "
        f"{result['workers']} workers, medians of n = {result['n']}",
        "",
        "| side | images/s | images per CPU second |",
        "| --- | ---: | ---: |",
    ]
    for name, side in result["sides"].items():
        rows.append(f"| {name} | {side['images_per_second']:,.0f} | {side['images_per_cpu_second']:,.0f} |")
    rows += ["", "| ratio | images/s | per CPU second | goal |", "| --- | ---: | ---: | ---: |"]
    for name, ratio in result["ratios"].items():
        rows.append(f"| {name} | {ratio['value']:.2f} | {ratio['per_cpu_second']:.2f} | {ratio['goal']:.2f} |")
    if result["ffcv_missing"]:
        rows.append(f"\nffcv is not measured: {result['ffcv_missing']}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
