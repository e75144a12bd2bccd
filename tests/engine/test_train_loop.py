# SPDX-License-Identifier: Apache-2.0
"""The training loop on a toy of this file's own: schedules, losses, resume from anywhere, non-finite steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine.checkpoint import CheckpointStore
from common.engine.guard import NonFiniteError
from common.engine.train_loop import TrainSettings, distillation, learning_rate_at, make_optimizer, train


class Toy(nn.Module):
    """Batch norm (a buffer), dropout (a generator), two linear layers, an auxiliary answer."""

    def __init__(self, auxiliary: bool = False) -> None:
        super().__init__()
        self.norm, self.hidden, self.out = nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.auxiliary = nn.Linear(8, 3) if auxiliary else None
        self.drop_path_probability = 0.0
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.seen.append(self.drop_path_probability)
        hidden = F.dropout(torch.relu(self.hidden(self.norm(x))), 0.3, self.training)
        aux = self.auxiliary(hidden) if self.auxiliary is not None and self.training else None
        return self.out(hidden), aux


class Noise:
    """Batches that are a function of (epoch, step)."""

    steps_per_epoch = 4

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.bad = bad

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(100 * epoch + step)
        x = torch.randn(5, 6, generator=source)
        y = torch.randint(3, (5,), generator=source)
        return (x * math.nan if (epoch, step) == self.bad else x), y


class Folder:
    """The least of a run: checkpoints and rows."""

    def __init__(self, path: Path) -> None:
        self.checkpoints = CheckpointStore(path, config_digest="d")
        self.rows: dict[int, dict[str, Any]] = {}
        self.epochs: dict[int, dict[str, Any]] = {}

    def log(self, text: str) -> None:
        pass

    def metrics(self, row: dict[str, Any], *, step: int) -> None:
        self.rows[step] = row

    def history(self, row: dict[str, Any], *, epoch: int) -> None:
        self.epochs[epoch] = row

    def resume_state(self) -> Any:
        return self.checkpoints.latest()


class Stop(Exception):
    """Stands for a crash."""


def held_out(network: nn.Module) -> dict[str, Any]:
    with torch.inference_mode():
        x, y = Noise().batch(77, 0)
        logits = network(x)[0]
        return {"loss": F.cross_entropy(logits, y).item(), "top1": (logits.argmax(1) == y).float().mean().item()}


def make(seed: int = 0, **kwargs: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs)


def go(network: Toy, folder: Folder | None = None, **kwargs: Any) -> Any:
    settings = kwargs.pop("settings", TrainSettings(epochs=3, learning_rate=0.1, log_every=2, select="val"))
    kwargs.setdefault("stream", Noise())
    if settings.select == "val":
        kwargs.setdefault("evaluate", held_out)
    return train(network, settings=settings, criterion=F.cross_entropy, num_classes=3, run=folder, **kwargs)


def test_cosine_has_no_epoch_at_zero() -> None:
    settings = TrainSettings(epochs=4, learning_rate=1.0)
    rates = [learning_rate_at(epoch, settings) for epoch in range(4)]
    assert rates == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_linear_step_and_warmup() -> None:
    linear = TrainSettings(epochs=5, learning_rate=1.0, schedule="linear", warmup_epochs=1, learning_rate_min=0.2)
    assert [learning_rate_at(e, linear) for e in range(5)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4])
    steps = TrainSettings(epochs=5, learning_rate=1.0, schedule="step", step_epochs=2, step_factor=0.1)
    assert [learning_rate_at(e, steps) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_one_step_is_sgd_with_clipping_written_out() -> None:
    network = make()
    network.eval()  # the reference below needs no dropout; train() turns it on again
    settings = TrainSettings(epochs=1, learning_rate=0.3, weight_decay=0.01, grad_clip=0.05, momentum=0.9)
    torch.manual_seed(5)
    mine = copy.deepcopy(network).train()
    x, y = Noise().batch(0, 0)
    loss = F.cross_entropy(mine(x)[0], y)
    parameters = list(mine.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    assert norm > 0.05
    expected = [p - 0.3 * (g * 0.05 / (norm + 1e-6) + 0.01 * p) for p, g in zip(parameters, gradients, strict=True)]

    torch.manual_seed(5)
    stream = Noise()
    stream.steps_per_epoch = 1  # type: ignore[misc]
    go(network, settings=settings, stream=stream)
    for found, want in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_drop_path_grows_linearly() -> None:
    network = make()
    go(network, settings=TrainSettings(epochs=3, drop_path_prob=0.6))
    assert network.seen == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4)


def test_auxiliary_and_teacher_enter_the_loss() -> None:
    teacher = make(9).eval()
    plain, both = make(1, auxiliary=True), make(1, auxiliary=True)
    go(plain, settings=TrainSettings(epochs=1, auxiliary_weight=0.0))
    go(both, settings=TrainSettings(epochs=1, auxiliary_weight=0.4), teacher=teacher)
    start = make(1, auxiliary=True)
    assert not torch.equal(both.auxiliary.weight, start.auxiliary.weight)
    assert not torch.equal(both.out.weight, plain.out.weight)


def test_distillation_is_the_kl_divergence() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation(student, teacher, 2.0), expected)
    assert distillation(student, student, 3.0).abs() < 1e-6


def test_learned_steps_have_no_decay() -> None:
    network = make()
    network.no_decay_parameters = lambda: [network.out.bias]  # type: ignore[attr-defined]
    groups = make_optimizer(network, TrainSettings(epochs=1)).param_groups
    assert groups[1]["weight_decay"] == 0 and groups[1]["params"][0] is network.out.bias
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6, 8, 11])
def test_a_stopped_and_resumed_training_is_bit_equal(tmp_path: Path, stop_after: int) -> None:
    settings = TrainSettings(epochs=3, learning_rate=0.1, log_every=2, select="val", checkpoint_minutes=1e-9)
    whole, torn = Folder(tmp_path / "whole"), Folder(tmp_path / "torn")
    network = make()
    torch.manual_seed(3)
    outcome = go(network, whole, settings=settings)

    def stop(step: int) -> None:
        if step == stop_after:
            raise Stop

    first = make()
    torch.manual_seed(3)
    with pytest.raises(Stop):
        go(first, torn, settings=settings, on_step=stop)
    second = make(8)
    torch.manual_seed(99)
    resumed = go(second, torn, settings=settings)

    assert resumed == outcome
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert whole.epochs == torn.epochs
    left, right = whole.checkpoints.latest(), torn.checkpoints.latest()
    assert left is not None and right is not None
    assert_same(left[0], right[0])


def assert_same(left: Any, right: Any, where: str = "state") -> None:
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


def test_select_val_keeps_the_first_best_epoch(tmp_path: Path) -> None:
    answers = iter([0.5, 0.9, 0.9])
    kept: list[dict[str, Tensor]] = []

    def evaluate(network: nn.Module) -> dict[str, Any]:
        kept.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"loss": 1.0, "top1": next(answers)}

    folder, network = Folder(tmp_path), make()
    outcome = go(network, folder, evaluate=evaluate)
    assert outcome.selected_epoch == 2
    found = folder.checkpoints.latest()
    assert found is not None
    for name, tensor in kept[1].items():
        assert torch.equal(network.state_dict()[name], tensor)
        assert torch.equal(found[0]["model"][name], tensor)


def test_a_bad_step_changes_nothing_and_stops(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, learning_rate=0.1, log_every=3)
    good: dict[str, Tensor] = {}
    watched = make()

    def watch(step: int) -> None:
        if step == 6:
            good.update({name: tensor.clone() for name, tensor in watched.state_dict().items()})

    torch.manual_seed(1)
    go(watched, settings=settings, on_step=watch)
    folder, network = Folder(tmp_path), make()
    torch.manual_seed(1)
    with pytest.raises(NonFiniteError, match="step 6 "):
        go(network, folder, settings=settings, stream=Noise(bad=(1, 2)))
    found = folder.checkpoints.latest()
    assert found is not None and (found[0]["epoch"], found[0]["step"]) == (1, 2)
    for name, tensor in good.items():
        assert torch.equal(found[0]["model"][name], tensor), name


def test_a_bad_first_step_of_an_epoch_after_a_resume(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=3, learning_rate=0.1, log_every=3)
    folder = Folder(tmp_path)

    def stop(step: int) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        go(make(), folder, settings=settings, on_step=stop)
    with pytest.raises(NonFiniteError, match=r"step 8 \(epoch 3, step 1 of 4\)"):
        go(make(), folder, settings=settings, stream=Noise(bad=(2, 0)))
    found = folder.checkpoints.latest()
    assert found is not None and (found[0]["epoch"], found[0]["step"], found[1]["step"]) == (2, 0, 8)
    assert int(found[0]["meter"]["count"].sum()) == 0


def test_other_data_are_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    go(make(), folder)
    longer = Noise()
    longer.steps_per_epoch = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="steps an epoch"):
        go(make(), folder, stream=longer)
