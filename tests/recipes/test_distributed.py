# SPDX-License-Identifier: Apache-2.0
"""Several processes: one order of the data between them, and the same weights and choices on each after a search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.data import Stream, load

_PROGRAM = """
import hashlib, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv.pop())
from common.engine import distributed
from common.nets import build_supernet
from common.recipes.flags import resolve_search, search_parser
from common.recipes.search import run_search

built = []


def build(**keywords):
    built.append(build_supernet(**keywords))
    return built[0]


config = resolve_search(search_parser("program", ""), sys.argv[1:])
run_search(config, method="qdarts", supernet=build)
everything = {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in built[0].named_parameters()}
Path(f"rank-{distributed.rank()}.json").write_text(json.dumps(everything))
distributed.leave()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_together_see_what_one_process_sees(ranks: int) -> None:
    data = load("digits")
    common = {"seed": 3, "name": "train", "augment": True, "cutout": 4}
    alone = Stream(data.train, data.info, batch_size=16 * ranks, **common)
    parts = [Stream(data.train, data.info, batch_size=16, rank=r, ranks=ranks, **common) for r in range(ranks)]
    assert {part.steps_per_epoch for part in parts} == {alone.steps_per_epoch}
    for step in (0, alone.steps_per_epoch - 1):
        x, y = alone.batch(1, step)
        images, labels = zip(*(part.batch(1, step) for part in parts), strict=True)
        assert torch.equal(torch.cat(images), x) and torch.equal(torch.cat(labels), y)


def test_two_processes_end_with_the_same_weights_and_one_run_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM)
    flags = ["--preset", "smoke", "--epochs", "1", "--no-tensorboard", "--device", "cpu", "--save", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags, str(root)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two and any("alphas" in name for name in one)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"]
