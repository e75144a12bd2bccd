# SPDX-License-Identifier: Apache-2.0
"""Every search and training takes the flags of docs/speed.md, and does what they say, or refuses them with the reason.

What a run does is seen from outside, by hooks on the modules that its steps call.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

METHODS = ("qdarts", "darts", "ptq", "fbqat", "qsubnet")
ENTRY_POINTS = [(method, stage) for method in METHODS for stage in ("search", "train")]
# Beside the preset: the network where there is none to search, bits where the method wants them.
NEEDED = {
    "train": ["--arch", "PC_DARTS"],
    "qsubnet search": ["--arch", "PC_DARTS"],
    "fbqat train": ["--arch", "PC_DARTS", "--fixed_bit", "4"],
    "qdarts train": ["--arch", "PC_DARTS", "--wbits", "2", "--abits", "4"],
    "qsubnet train": ["--arch", "PC_DARTS", "--wbits", "2", "--abits", "4"],
}


# Coloured, for images of one channel lie the same both ways.
IMAGES = """
import torch

def noise():
    images = torch.randint(256, (96, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images[:80], torch.arange(80) % 4, images[80:], torch.arange(16) % 4
"""


def start(method: str, stage: str, *flags: str) -> int:
    """Run the entry point in this process; its exit code."""
    needed = NEEDED.get(f"{method} {stage}", NEEDED.get(stage, []))
    main = importlib.import_module(f"{method}.{stage}").main
    return main(["--preset", "smoke", "--device", "cpu", *needed, *flags])


class Seen:
    """What the steps of a run did: calls of networks and of their cells, layouts and types of images on the way."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.layouts: set[str] = set()
        self.types: set[torch.dtype] = set()
        self.cells: set[nn.Module] = set()
        self.first: nn.Module | None = None

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Hook before every forward of a training step (costs are counted in evaluation mode)."""
        if not module.training:
            return
        if hasattr(module, "checkpoint_cells"):
            self.first = module.cells[0]
            self.cells.update(module.cells)
            self.calls["cells to come"] += len(module.cells)
        elif module in self.cells:
            self.calls["cells"] += 1
            image: Tensor = inputs[0]
            if module is self.first:  # from there on a layer that computes along channels alone leaves them so
                self.layouts.add("rows" if image.is_contiguous() else "channels")

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Hook after every forward of a training step."""
        if module.training and isinstance(module, nn.Conv2d):
            self.types.add(output.dtype)


@contextmanager
def watched() -> Iterator[Seen]:
    """Within it, every module's forward is seen."""
    seen = Seen()
    hooks = [
        torch_module.register_module_forward_pre_hook(seen.before),
        torch_module.register_module_forward_hook(seen.after),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("flags", [(), ("--checkpoint-cells",), ("--no-channels-last",), ("--precision", "bf16")])
@pytest.mark.parametrize("method, stage", ENTRY_POINTS)
def test_taken_and_done(method: str, stage: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Each flag does its own thing in the steps of a dry run, and what the others do does not happen."""
    (tmp_path / "images.py").write_text(IMAGES)
    with watched() as seen:
        assert start(method, stage, "--dry-run", "--data-module", f"{tmp_path / 'images.py'}:noise", *flags) == 0
    assert seen.calls["cells to come"] >= 6  # two steps of three cells
    times = 2 if "--checkpoint-cells" in flags else 1  # the backward pass computes every cell once more
    assert seen.calls["cells"] == times * seen.calls["cells to come"]
    assert seen.layouts == {"rows" if "--no-channels-last" in flags else "channels"}
    assert seen.types == {torch.bfloat16 if "bf16" in flags else torch.float32}


@pytest.mark.parametrize("method, stage", ENTRY_POINTS)
def test_compile_is_taken_where_it_can_work(
    method: str, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its resolution alone: nothing is compiled here. Any program may stand for the compiler, as it is not run."""
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _ended(method, stage, "--compile", "--print-config") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["compile"]]
    assert line.split()[1:] == ["true", "flag"]
    refused = {
        ("--compile", "--checkpoint-cells"): "--checkpoint-cells: with --compile the compiler chooses what is kept",
        ("--precision", "fp16"): "--precision: 'fp16'",
    }
    if stage == "search":
        refused["--compile", "--cuda-graph", "on"] = "--cuda-graph on: there is no GPU"
    if stage == "search" and method != "qsubnet":
        exact = ("--unrolled", "--second-order", "exact")
        refused["--compile", *exact] = "--compile: compiled code is not differentiated twice"
        refused["--checkpoint-cells", *exact] = "--checkpoint-cells: the exact second order changes the weights"
    if (method, stage) == ("darts", "search"):
        refused["--compile", "--track-eigenvalue"] = "--track-eigenvalue: compiled code is not differentiated twice"
    for flags, reason in refused.items():
        assert _ended(method, stage, *flags) == 2
        assert reason in capsys.readouterr().err, flags
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert _ended(method, stage, "--compile") == 2
    assert "--compile: needs a C++ compiler on the CPU" in capsys.readouterr().err


def _ended(method: str, stage: str, *flags: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        start(method, stage, *flags)
    return stop.value.code
