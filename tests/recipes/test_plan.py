# SPDX-License-Identifier: Apache-2.0
"""--plan: what it says of a step's messages is what two real ranks hand to gloo; the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from common.data.stand_in import stand_in
from common.engine import distributed
from common.engine.search_loop import SearchLoop
from common.engine.train_loop import train
from common.recipes import plan as planning
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.plan import Plan, StepPlan, modelled, pretended, silent_run
from common.recipes.search import run_search
from common.recipes.search_setup import prepare_search
from common.recipes.train import loop_of, prepare, run_training
from tests.helpers.programs import python
from tests.helpers.ranks import on_ranks

SMALL = ["--preset", "smoke", "--no-tensorboard", "--device", "cpu", "--batch-size", "8"]


class Sent:
    """Every all-reduce that is handed to torch: [messages, bytes]."""

    def __init__(self) -> None:
        self.total = [0, 0]
        self._patch = patch.object(torch.distributed, "all_reduce", self._noted(torch.distributed.all_reduce))

    def _noted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            self.total[0] += 1
            self.total[1] += tensor.numel() * tensor.element_size()
            return original(tensor, *args, **more)

        return all_reduce

    def __enter__(self) -> Sent:
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


def searching(*flags: str) -> Any:
    return resolve_search(search_parser("search.py", ""), [*SMALL, *flags])


def training(*flags: str) -> Any:
    return resolve_training(training_parser("train.py", ""), [*SMALL, "--arch", "PC_DARTS", *flags])


def planned(*flags: str) -> list[str]:
    return ["--plan", "--world-size", "2", *flags]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--sync-bn", "--bits", "2", "8", "--grad-accumulation", "2"], marks=pytest.mark.slow),
        pytest.param(["--unrolled", "--second-order", "finite-difference"], marks=pytest.mark.slow),
        pytest.param(["--unrolled", "--sync-bn"], marks=pytest.mark.slow),
        pytest.param(["--bits", "none", "--batch-per-rank"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_search_sends_what_its_plan_says(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run_search(searching(*planned(*flags)), method="qdarts")

    def work() -> list[int]:
        prepared = prepare_search(searching(*flags))
        loop = SearchLoop(prepared.supernet, **prepared.loop)
        loop.model.train()
        loop.start_epoch()
        loop.one_step()  # a first step may set ranges
        with Sent() as sent:
            loop.one_step()
        return sent.total

    expected = [found["weight"][name] + found["arch"][name] for name in ("messages", "bytes")]
    assert on_ranks(2, work) == [expected, expected]
    assert found["weight"]["bytes"] > 4 * 10_000 and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "flags",
    [
        ["--wbits", "4", "--abits", "8"],
        pytest.param(["--sync-bn", "--grad-accumulation", "2"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_training_sends_what_its_plan_says(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run_training(training(*planned(*flags)), method="qdarts")

    def work() -> list[int]:
        network, _, stream, settings, arguments = loop_of(prepare(training(*flags)))
        seen = [[]]
        with Sent() as sent:
            note = lambda step: seen.append(list(sent.total))  # noqa: E731
            train(network, stream=stream, settings=settings, run=silent_run(), on_step=note, **arguments)
        # the second step: with the first, ranges are set and signals asked about
        return [after - before for before, after in zip(seen[1], seen[2], strict=True)]

    expected = [found["weight"]["messages"], found["weight"]["bytes"]]
    assert on_ranks(2, work) == [expected, expected]


def test_the_batch_is_shared_out_and_memory_grows_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    few = run_training(training("--plan", "--world-size", "4", "--batch-size", "16"), method="qdarts")
    many = run_training(training("--plan", "--world-size", "2", "--batch-size", "32"), method="qdarts")
    assert (few["at_once"], many["at_once"]) == (4, 16)
    assert few["weight"] == many["weight"], "what is sent depends on neither"
    assert many["saved"] == 4 * few["saved"] > 0
    assert many["memory"] - few["memory"] == many["saved"] - few["saved"]
    parameters = sum(p.numel() for p in prepare(training()).network.parameters())
    assert few["weight"]["bytes"] >= 4 * parameters, "every gradient travels"
    assert few["static"] >= 3 * 4 * parameters, "weights, gradients, momentum"
    assert "4 a rank" in capsys.readouterr().out


def test_saved_bytes_are_those_of_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    """A convolution keeps its input: 8 x 8 floats an image."""
    layer = nn.Conv2d(1, 3, 3, padding=1, bias=False)
    x = torch.randn(planning.PLANNED_IMAGES, 1, 8, 8)
    step = planning._second(layer, lambda: layer(x).sum().backward())
    assert step == StepPlan(0, 0, 4 * 64)


def a_plan(**more: Any) -> Plan:
    same = {"batch": 1024, "at_once": 8, "parts": 2, "steps_per_epoch": 10, "static": 7}
    steps = {"weight": StepPlan(1, 4_000_000, 5), "weight_steps": 20, "arch": StepPlan(1, 1_000, 9), "arch_steps": 5}
    return Plan(**{"ranks": 64, "per_node": 8, **same, **steps, **more})


def test_the_model_of_the_time() -> None:
    """By hand: 2 x 63/64 x 32 Mbit at 100 Gbit/s is 0.63 ms after two parts of a tenth of a second each."""
    plan = a_plan()
    assert (plan.nodes, plan.saved, plan.bucket, plan.memory) == (8, 72, 4_000_000, 4_000_079)
    config = searching(*planned("--link-gbps", "100", "--step-seconds", ".1", ".2"))
    found = modelled(plan, config)
    assert found is not None
    assert found["weight_step"] == pytest.approx(0.2 + 0.00063)
    assert found["architecture_step"] == pytest.approx(0.4 + 2 * 63 / 64 * 8e3 / 1e11)
    whole = 20 * found["weight_step"] + 5 * found["architecture_step"]
    assert found["run"] == pytest.approx(whole) and found["efficiency"] == pytest.approx((20 * 0.2 + 5 * 0.4) / whole)
    alone = a_plan(ranks=1, per_node=1)
    assert modelled(alone, config)["efficiency"] == 1
    assert modelled(plan, searching(*planned("--link-gbps", "100"))) is None, "no time without a measured step"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--plan"], "--plan: for how many ranks?"),
        (["--world-size", "4"], "--world-size: only has a meaning with --plan"),
        (planned("--dry-run"), "--dry-run"),
        (["--plan", "--world-size", "5"], "cannot be shared out equally among 5"),
        (planned("--step-seconds", "1", "2", "3"), "--step-seconds"),
        (planned("--link-gbps", "0"), "--link-gbps"),
        (planned("--resume", "auto"), "--resume: --plan starts no run"),
        (planned("--save", "x"), "--save: --plan starts no run"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        searching(*flags)
    assert words in capsys.readouterr().err


def test_published_sizes_stand_in_for_images() -> None:
    data = stand_in("imagenet", image_size=64, classes=100)
    assert data is not None and data.train.images.shape[1:] == (3, 64, 64) and data.info.num_classes == 100
    assert len(data.train) == 128_117 and data.train.images.untyped_storage().nbytes() == 3 * 64 * 64
    assert len(stand_in("cifar10").train) == 50_000
    assert stand_in("digits") is None, "which needs no file"
    with pytest.raises(ValueError, match="--classes 11"):
        stand_in("mnist", classes=11)


def test_pretended_ranks_are_gone_afterwards() -> None:
    with pytest.raises(KeyError), pretended(64):
        assert (distributed.rank(), distributed.world_size()) == (0, 64)
        raise KeyError
    assert distributed.world_size() == 1


@pytest.mark.slow
def test_imagenet_on_64_gpus_is_planned_without_a_file(root: Path, tmp_path: Path) -> None:
    """Weights of the ImageNet supernet: tests/oracles; a gradient, a loss and what batch normalisation saw travel."""
    flags = ["--plan", "--world-size", "64", "--gpus-per-node", "8", "--dataset", "imagenet"]
    said = python(root, root / "darts/search.py", "--method", "PC-DARTS", *flags, cwd=tmp_path)
    assert "64 ranks, 8 on each of 8 nodes" in said and "batch: 1024 images a step, 16 a rank" in said
    assert "time: none without --link-gbps" in said and not list(tmp_path.iterdir())
