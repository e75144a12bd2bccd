# SPDX-License-Identifier: Apache-2.0
"""The quick optimisers are torch's, bit for bit, and a start with them never imports torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine.optimizers import SGD, Adam

START = """
import sys
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.search import run_search
from common.recipes.train import run_training

class Stop(BaseException):
    pass

def stop(step):
    raise Stop

flags = ["--preset", "smoke", "--log-every", "50", "--runs", sys.argv[1]]
for run, config in (
    (run_search, resolve_search(search_parser("search", ""), flags)),
    (run_training, resolve_training(training_parser("train", ""), flags)),
):
    try:
        run(config, method="any", on_step=stop)
    except Stop:
        pass
slow = ("torch._dynamo", "sympy", "sklearn", "scipy", "torchvision", "tensorboard", "matplotlib", "PIL", "triton")
print([name for name in slow if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [(SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}), (Adam, torch.optim.Adam, {"weight_decay": 0.1})],
)
def test_updates_and_states_are_torchs(ours: Any, theirs: Any, settings: dict[str, Any]) -> None:
    sides = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        first, second = (torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2))
        optimizer = kind([first], lr=0.1, fused=True, **settings)
        optimizer.add_param_group({"params": [second], "lr": 0.01})
        seen: list[int] = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        for _ in range(3):
            ((first * second).sin().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        again = kind([{"params": [first]}, {"params": [second]}], lr=0.1, fused=True, **settings)
        again.load_state_dict(optimizer.state_dict())
        (first * second).sum().backward()
        again.step()
        assert len(seen) == 3
        sides.append((first.detach(), second.detach(), optimizer.state_dict()))
    assert torch.equal(sides[0][0], sides[1][0]) and torch.equal(sides[0][1], sides[1][1])
    assert sides[0][2].keys() == sides[1][2].keys()


def test_the_first_steps_import_nothing_slow(root: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", START, tmp_path], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout[-500:]
