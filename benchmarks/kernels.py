# SPDX-License-Identifier: Apache-2.0
"""What each native kernel pays against its PyTorch twin: forward and backward, in training.

`edges`: all candidates on the edges that leave a state (common/nets/fused.py); `node`: the sum of a node's edges;
`input` and `depthwise`: a quantised dense and depthwise convolution with the ReLU before it (common/quant/coded.py).
Sizes are those of the first and of the last cells of a search at 16 channels. Both sides run in one process,
alternated; figures are medians of n, in CPU seconds, and saved bytes are what autograd keeps.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import measuring
from common.nets import build_supernet
from common.nets.fused import fused_node
from common.quant.coded import coded_convolution
from common.quant.kernels import disabled, native

PLACES = {"first cell": (0, 16, 32), "last cell": (7, 64, 8)}  # cell, channels, pixels
SMOKE = {"batch_size": 2, "repeats": 1}
Work = Callable[[], Tensor]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="n, timed runs of each side")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: proves the path, not the figure")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="to FILE, or alone on stdout")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def works(batch: int, cell: int, channels: int, pixels: int) -> dict[str, Work]:
    """One forward pass of each kernel, by name."""
    torch.manual_seed(0)
    net = build_supernet(method="pc-darts", bits=(2, 4), num_classes=10, init_channels=16, layers=8)
    bank, width = net._bank(), channels // 4
    # leaves of their own: what makes the weights is no part of the kernel
    bank.weights = [w.detach().requires_grad_() for w in bank.weights]
    assert bank.activation is not None
    bank.activation = bank.activation.detach().requires_grad_()
    image = lambda c: _image(batch, c, pixels)  # noqa: E731
    state = net.cells[cell].states[1]
    x, strengths = image(width), torch.rand(len(state.edges), len(net.primitives), requires_grad=True)
    heads, rests = [image(width) for _ in range(5)], [image(channels - width) for _ in range(5)]
    betas = torch.rand(5, requires_grad=True)
    wide, dense = image(4 * channels), torch.randn(channels, 4 * channels, 1, 1, requires_grad=True)
    thin, taps = image(channels), torch.randn(channels, 1, 3, 3, requires_grad=True)
    return {
        "edges": lambda: state(x, strengths, bank),
        "node": lambda: fused_node(heads, rests, betas),
        "input": lambda: coded_convolution(wide, dense, bits=(4,), relu=True),
        "depthwise": lambda: coded_convolution(thin, taps, bits=(4,), relu=True, padding=1, groups=channels),
    }


def _image(batch: int, channels: int, pixels: int) -> Tensor:
    made = torch.randn(batch, channels, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return made.requires_grad_()


def seconds(work: Work, twin: bool) -> float:
    """Forward and backward."""

    def both() -> None:
        out = work()
        out.backward(torch.ones_like(out))

    with disabled() if twin else nullcontext():
        return measuring.cpu_seconds_of(both)


def saved_mebibytes(work: Work, twin: bool) -> float:
    """Distinct storages that autograd keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), disabled() if twin else nullcontext():
        out = work()
    found = sum(kept.values()) / 2**20
    del out
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and deliver."""
    args = parse(argv)
    if native.library() is None:
        raise ValueError("without a C++ compiler there is nothing to compare; install g++")
    torch.set_num_threads(args.threads)
    where, kernels = measuring.machine(), {}
    for place, size in PLACES.items():
        for name, work in works(args.batch_size, *size).items():
            rows: list[tuple[float, float]] = []
            for repeat in range(args.repeats + 1):  # the first is a warm-up
                order = (False, True) if repeat % 2 == 0 else (True, False)
                one = {twin: seconds(work, twin) for twin in order}
                rows.append((one[False], one[True]))
            timed = rows[1:]
            kernels[f"{name}, {place}"] = {
                "kernel": median(a for a, _ in timed),
                "twin": median(b for _, b in timed),
                "ratio": round(median(b / a for a, b in timed), 3),
                "saved_mib": saved_mebibytes(work, False),
                "twin_saved_mib": saved_mebibytes(work, True),
            }
    result = {
        "schema": 1,
        "benchmark": "kernels",
        "batch_size": args.batch_size,
        "threads": args.threads,
        "n": args.repeats,
        "kernels": kernels,
        "machine": where,
        "versions": measuring.versions(),
    }
    measuring.deliver(result, table(result), args.json)
    return 0


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [
        f"Batch {result['batch_size']}, bits {{2, 4}} (edges) and 4; {result['threads']} thread(s), n = {result['n']}",
        "",
        "| kernel | CPU ms | twin, CPU ms | twin / kernel | saved, MiB | twin, saved MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in result["kernels"].items():
        times = f"{1e3 * found['kernel']:.2f} | {1e3 * found['twin']:.2f} | {found['ratio']:.2f}"
        rows.append(f"| {name} | {times} | {found['saved_mib']:.1f} | {found['twin_saved_mib']:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
