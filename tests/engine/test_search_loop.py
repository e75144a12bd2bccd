# SPDX-License-Identifier: Apache-2.0
"""The loop on a two-node toy of the test's own: order of steps, rates, resume, non-finite values."""

from __future__ import annotations

import copy
import io
import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.engine.bilevel import ORDERS
from common.engine.guard import NonFiniteError
from common.engine.search_loop import SearchLoop, SearchOutcome, SearchSettings, search


class Toy(nn.Module):
    """Two nodes, each a mixture of relu and tanh; gammas scale the nodes; batch norm and dropout hold hidden state."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(*shape, generator=generator))

        self.first, self.second, self.head = draw(6, 8), draw(8, 8), draw(8, 3)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.alphas, self.gammas = draw(2, 2), draw(2, 2)
        self.passes: list[str] = []
        self.aside = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes.append("side" if self.aside else "weight")
        for node, w in enumerate((self.first, self.second)):
            y = self.norm(x @ w)
            a, g = self.alphas[node].softmax(0), self.gammas[node].softmax(0)
            x = (a[0] * y.relu() + a[1] * y.tanh()) * (g[0] + 2 * g[1])
        return F.dropout(x, 0.1, self.training) @ self.head

    def weight_parameters(self) -> list[nn.Parameter]:
        return [self.first, self.second, self.head]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alphas]

    def gamma_parameters(self) -> list[nn.Parameter]:
        return [self.gammas]

    def genotype(self) -> list[str]:
        return [("relu", "tanh")[i] for i in self.alphas.argmax(1).tolist()]

    @contextmanager
    def side_pass(self):
        self.aside = True
        yield
        self.aside = False


class PlainToy(nn.Module):
    """The least that a model must offer: no gammas, no side passes."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.alpha = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        a = self.alpha.softmax(0)
        return a[0] * (x @ self.w) + a[1] * (x @ self.w).sin()

    def weight_parameters(self) -> list[nn.Parameter]:
        return [self.w]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def genotype(self) -> int:
        return int(self.alpha.argmax())


class ToyStream:
    """Noisy classes; a batch is a function of its position. `poison` turns one position into NaN."""

    def __init__(self, name: int, steps: int, poison: tuple[int, int] | None = None) -> None:
        self.name, self.steps_per_epoch, self.poison = name, steps, poison
        self.taken: list[tuple[int, int]] = []

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        self.taken.append((epoch, step))
        generator = torch.Generator().manual_seed(self.name * 100_000 + epoch * 1000 + step)
        y = torch.randint(0, 3, (16,), generator=generator)
        x = F.one_hot(y, 6).float() + 0.5 * torch.randn(16, 6, generator=generator)
        return (x * float("nan") if self.poison == (epoch, step) else x), y


class Memory:
    """Checkpoints as bytes, loaded as the store loads them."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int, bytes]] = []
        self.lines: list[str] = []
        self.checkpoints = self

    def save(self, state: dict[str, Any], *, step: int, epoch: int, note: str = "") -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved.append((step, epoch, buffer.getvalue()))

    def log(self, text: str) -> None:
        self.lines.append(text)

    def resume_state(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        if not self.saved:
            return None
        step, epoch, data = self.saved[-1]
        return torch.load(io.BytesIO(data), weights_only=True), {"step": step, "epoch": epoch}


def settings(**changes: Any) -> SearchSettings:
    return SearchSettings(**{"epochs": 4, "arch_begin_epoch": 1, "learning_rate": 0.1, "log_every": 2} | changes)


def run_toy(
    model: nn.Module | None = None, memory: Memory | None = None, **changes: Any
) -> tuple[nn.Module, SearchOutcome]:
    callbacks = {
        key: changes.pop(key)
        for key in ("on_epoch", "on_step", "evaluate", "weight_term", "arch_term", "controller")
        if key in changes
    }
    streams = changes.pop("streams", None) or (ToyStream(1, 5), ToyStream(2, 4))
    model = model or Toy()
    torch.manual_seed(7)
    outcome = search(
        model,
        train_stream=streams[0],
        valid_stream=streams[1],
        settings=settings(**changes),
        criterion=F.cross_entropy,
        run=memory,
        **callbacks,
    )
    return model, outcome


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_learns_the_toy() -> None:
    model, outcome = run_toy(epochs=10)
    assert outcome.summary["train_top1"] > 0.6 and outcome.steps == 50
    assert outcome.genotype == model.genotype()


def test_any_module_with_three_methods() -> None:
    _, outcome = run_toy(PlainToy())
    assert outcome.genotype in (0, 1)


def test_nothing_is_left_after_an_early_stop() -> None:
    memory = Memory()
    _, outcome = run_toy(memory=memory, on_epoch=lambda epoch, _: epoch == 1)
    assert outcome.stopped_early and outcome.epochs == 2
    (last,) = [line for line in memory.lines if line.startswith("epoch 2/4 done")]
    assert last.endswith(", 0.0 s left") and memory.lines[-1] == last


def test_order_of_the_steps_and_of_the_batches() -> None:
    train, valid = ToyStream(1, 5), ToyStream(2, 4)
    model, _ = run_toy(epochs=3, streams=(train, valid))
    assert model.passes == ["weight"] * 5 + ["side", "weight"] * 10
    assert train.taken == [(e, s) for e in range(3) for s in range(5)]
    # From the sixth step on, walking the validation half at its own length: every batch a fresh one.
    assert valid.taken == [divmod(i, 4) for i in range(5, 15)]


@pytest.mark.parametrize("every", [2, 3])
def test_fewer_architecture_steps(every: int) -> None:
    """They fall on every N-th step of the whole search, and still walk the validation half batch by batch."""
    train, valid = ToyStream(1, 5), ToyStream(2, 4)
    model, outcome = run_toy(epochs=3, arch_every=every, streams=(train, valid))
    moves = [step >= 5 and step % every == 0 for step in range(15)]
    assert model.passes == [kind for move in moves for kind in (["side", "weight"] if move else ["weight"])]
    assert valid.taken == [divmod(step // every, 4) for step, move in enumerate(moves) if move]
    assert outcome.steps == 15


def test_architecture_rests_until_its_epoch() -> None:
    seen = []
    model = Toy()
    start = model.alphas.detach().clone()
    run_toy(model, arch_begin_epoch=2, on_epoch=lambda e, _: seen.append(torch.equal(model.alphas, start)))
    assert seen == [True, True, False, False]


def test_one_step_equals_the_formulas() -> None:
    """Architecture step by Adam on the validation loss, then weights and gammas by SGDs on the training loss."""
    model = Toy()
    model.eval()  # no dropout and fixed statistics, so that the comparison below needs neither
    expected = copy.deepcopy(model)
    loop = SearchLoop(
        model,
        train_stream=ToyStream(1, 5),
        valid_stream=ToyStream(2, 4),
        settings=settings(arch_begin_epoch=0, grad_clip=0.05),
        criterion=F.cross_entropy,
        weight_term=lambda m: 0.3 * m.gammas.softmax(1)[:, 1].sum(),
        arch_term=lambda m: 0.2 * m.alphas.softmax(1)[:, 0].sum(),
    )
    loop.start_epoch()
    loop.one_step()

    x, y = ToyStream(2, 4).batch(0, 0)
    (F.cross_entropy(expected(x), y) + 0.2 * expected.alphas.softmax(1)[:, 0].sum()).backward()
    torch.optim.Adam([expected.alphas], lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3).step()
    expected.zero_grad()
    x, y = ToyStream(1, 5).batch(0, 0)
    (F.cross_entropy(expected(x), y) + 0.3 * expected.gammas.softmax(1)[:, 1].sum()).backward()
    weights = expected.weight_parameters()
    norm = torch.cat([p.grad.flatten() for p in weights]).norm()
    assert norm > 0.05
    with torch.no_grad():
        for p in weights:
            p -= 0.1 * (p.grad * 0.05 / norm + 3e-4 * p)
        expected.gammas -= 0.01 * (expected.gammas.grad + 1e-3 * expected.gammas)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None for p in model.parameters())


def test_gamma_levels() -> None:
    start = Toy().gammas
    for level, arch_rate, moves in (("lower", 0.0, True), ("upper", 0.0, False), ("upper", 0.1, True)):
        model, _ = run_toy(gamma_level=level, arch_learning_rate=arch_rate)
        assert (not torch.equal(model.gammas, start)) == moves, (level, arch_rate)


def test_learning_rates_used() -> None:
    rates: list[tuple[float, float]] = []
    model = Toy()
    loop = SearchLoop(
        model,
        train_stream=ToyStream(1, 5),
        valid_stream=ToyStream(2, 4),
        settings=settings(epochs=6, learning_rate_min=0.01, warmup_epochs=2),
        criterion=F.cross_entropy,
    )
    loop.run(
        on_step=lambda _: rates.append(tuple(loop.optimizers[n].param_groups[0]["lr"] for n in ("weights", "gammas")))
    )
    cosine = [0.5 * (1 + math.cos(math.pi * e / 6)) for e in range(6)]
    fall = [0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(4)]
    expected = [0.1 / 3, 0.2 / 3, *(0.01 + 0.09 * c for c in fall)]
    assert [r[0] for r in rates[::5]] == pytest.approx(expected)
    assert [r[1] for r in rates[::5]] == pytest.approx([0.01 * c for c in cosine])
    assert min(r[1] for r in rates) > 0


def test_constant_gamma_rate() -> None:
    loop = SearchLoop(
        Toy(),
        train_stream=ToyStream(1, 5),
        valid_stream=ToyStream(2, 4),
        settings=settings(gamma_annealed=False),
        criterion=F.cross_entropy,
    )
    loop.run()
    assert loop.optimizers["gammas"].param_groups[0]["lr"] == 0.01


def test_figures_of_an_epoch() -> None:
    rows: list[dict[str, float]] = []
    evaluated: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(model.training)
        return {"valid_top1": 0.5}

    run_toy(evaluate=evaluate, on_epoch=lambda _, row: rows.append(row))
    assert evaluated == [False] * 4
    assert {"train_loss", "train_top1", "valid_top1", "learning_rate", "seconds", "images_per_second"} <= set(rows[0])
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("order, every", [*((order, 1) for order in ORDERS), ("first", 2)])
@pytest.mark.parametrize("stop", [3, 5, 9, 10, 20])
def test_resume_is_bit_exact(order: str, every: int, stop: int) -> None:
    """Stopped in the middle of an epoch and at its end, with every order; 20 is after the last step."""
    straight_rows, rows = [], []
    changes = {"order": order, "arch_every": every, "checkpoint_steps": 3}
    straight, outcome = run_toy(memory=Memory(), on_epoch=lambda e, row: straight_rows.append((e, row)), **changes)

    def stop_there(step: int) -> None:
        if step == stop:
            raise Stop

    memory = Memory()
    with pytest.raises(Stop):
        run_toy(memory=memory, on_step=stop_there, on_epoch=lambda e, row: rows.append((e, row)), **changes)
    rows = [row for row in rows if row[0] < memory.saved[-1][1]] if memory.saved else []
    torch.manual_seed(99)
    torch.rand(5)
    resumed, again = run_toy(Toy(seed=5), memory=memory, on_epoch=lambda e, row: rows.append((e, row)), **changes)
    assert same(straight, resumed)
    assert outcome.genotype == again.genotype and outcome.steps == again.steps

    def timeless(table: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
        return [(e, {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}) for e, row in table]

    assert timeless(rows) == timeless(straight_rows)


def test_every_optimiser_is_resumed() -> None:
    memory = Memory()
    run_toy(memory=memory)
    state = memory.resume_state()[0]
    assert set(state["optimizers"]) == {"weights", "gammas", "arch"}
    assert all(s["momentum_buffer"].abs().sum() > 0 for s in state["optimizers"]["weights"]["state"].values())
    assert state["optimizers"]["arch"]["state"][0]["step"] == 15
    assert (state["epoch"], state["step"]) == (4, 0)


def test_finished_search_gives_the_same_outcome_again() -> None:
    memory = Memory()
    _, first = run_toy(memory=memory)
    _, again = run_toy(Toy(seed=3), memory=memory, on_step=lambda _: pytest.fail("a step was taken"))
    assert again == first


def test_two_runs_are_bit_equal_and_seeds_differ() -> None:
    assert same(run_toy()[0], run_toy()[0])
    assert not same(run_toy()[0], run_toy(Toy(seed=1))[0])


def test_resume_with_other_data_is_refused() -> None:
    memory = Memory()
    run_toy(memory=memory)
    with pytest.raises(ValueError, match="5 steps an epoch and these data give 6"):
        run_toy(memory=memory, streams=(ToyStream(1, 6), ToyStream(2, 4)))


@pytest.mark.parametrize("which, position", [("weights", (1, 2)), ("weights", (0, 0)), ("arch", (1, 2))])
def test_non_finite_values_stop_before_the_update(which: str, position: tuple[int, int]) -> None:
    """The saved state is bit for bit that of a run that ended before the bad step; log points come later than it."""
    flat = position[0] * 5 + position[1]
    poison = position if which == "weights" else divmod(flat, 4)
    streams = {
        "weights": (ToyStream(1, 5, poison), ToyStream(2, 4)),
        "arch": (ToyStream(1, 5), ToyStream(2, 4, poison)),
    }[which]
    memory = Memory()
    with pytest.raises(NonFiniteError, match=f"step {flat} "):
        run_toy(memory=memory, streams=streams, log_every=50)
    state = memory.resume_state()[0]
    assert (state["epoch"], state["step"]) == position

    reference = Memory()

    def stop_there(step: int) -> None:
        if step == flat:
            raise Stop

    if flat:
        with pytest.raises(Stop):
            run_toy(memory=reference, on_step=stop_there, checkpoint_steps=1)
        expected = reference.resume_state()[0]
    else:
        loop = SearchLoop(
            Toy(), train_stream=streams[0], valid_stream=streams[1], settings=settings(), criterion=F.cross_entropy
        )
        expected = loop.state_dict()
    for name, value in expected["model"].items():
        assert torch.equal(value, state["model"][name]), name
    for name, optimizer in expected["optimizers"].items():
        for index, entries in optimizer["state"].items():
            for key, value in entries.items():
                assert torch.equal(value, state["optimizers"][name]["state"][index][key]), (name, key)
    assert torch.equal(expected["totals"], state["totals"])


def test_bad_settings_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"epochs 0.*order 'third'.*gamma level 'middle'.*arch_weight_decay -1"):
        SearchSettings(epochs=0, order="third", gamma_level="middle", arch_weight_decay=-1.0)
    with pytest.raises(ValueError, match="arch_every 0"):
        settings(arch_every=0)
    with pytest.raises(ValueError, match="--batch-size"):
        run_toy(streams=(ToyStream(1, 0), ToyStream(2, 4)))


def test_term_and_controller() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("moving", torch.zeros(()))

        def update(self, model: nn.Module, moving: bool) -> None:
            self.count += 1
            self.moving += moving

    controller, memory = Counter(), Memory()
    run_toy(memory=memory, controller=controller)
    assert controller.count == 20 and controller.moving == 15
    assert memory.resume_state()[0]["controller"]["count"] == 20


class BitsAlone(Toy):
    """The cells are fixed: what were alphas is a weight."""

    def weight_parameters(self) -> list[nn.Parameter]:
        return [*super().weight_parameters(), self.alphas]

    def arch_parameters(self) -> list[nn.Parameter]:
        return []


def test_without_architecture_parameters_there_is_one_level() -> None:
    """One stream and one loss: the weights' and gammas' steps are those of two plain SGDs on it."""
    model, twin = BitsAlone(), BitsAlone()
    changes = {"epochs": 3, "arch_begin_epoch": 0, "gamma_learning_rate": 0.05, "grad_clip": 1e9}
    fall = {"schedule": "step", "step_epochs": 2, "step_factor": 0.1}
    outcome = run_toy(model, streams=(ToyStream(1, 5), None), **changes, **fall)[1]
    assert outcome.steps == 15 and "side" not in model.passes

    torch.manual_seed(7)
    stream, rates = ToyStream(1, 5), {"momentum": 0.9}
    weights = torch.optim.SGD(twin.weight_parameters(), lr=0.1, weight_decay=3e-4, **rates)
    gammas = torch.optim.SGD(twin.gamma_parameters(), lr=0.05, weight_decay=1e-3, **rates)
    for epoch in range(3):
        weights.param_groups[0]["lr"], gammas.param_groups[0]["lr"] = (0.01, 0.005) if epoch == 2 else (0.1, 0.05)
        for step in range(5):
            x, y = stream.batch(epoch, step)
            weights.zero_grad()
            gammas.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            weights.step()
            gammas.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
