# SPDX-License-Identifier: Apache-2.0
"""The step that a CUDA graph captures computes on fixed memory what the loop computes; no GPU is needed to see that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.engine.guard import prepare_sgd
from common.engine.optimizers import SGD
from common.engine.search_loop import SearchLoop, SearchSettings
from common.engine.static_step import StaticStep, load_plain_state, obstacle, plain_state, set_rate


class Toy(nn.Module):
    """One mixed layer with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 3))
        self.alpha, self.gamma = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y, a, g = self.norm(x @ self.weight), self.alpha.softmax(0), self.gamma.softmax(0)
        return (a[0] * y.relu() + a[1] * y.tanh()) * (g[0] + 2 * g[1]) @ self.head

    def weight_parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.head]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def gamma_parameters(self) -> list[nn.Parameter]:
        return [self.gamma]

    def genotype(self) -> int:
        return int(self.alpha.argmax())


class Stream:
    steps_per_epoch = 4

    def __init__(self, name: int) -> None:
        self.name = name

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.name + 10 * epoch + step)
        y = torch.randint(0, 3, (16,), generator=generator)
        return F.one_hot(y, 6).float() + torch.randn(16, 6, generator=generator), y


def make_loop(model: nn.Module, **changes: Any) -> SearchLoop:
    settings = SearchSettings(**{"epochs": 4, "arch_begin_epoch": 1, "arch_every": 2, "log_every": 9, **changes})
    streams = {"train_stream": Stream(1), "valid_stream": Stream(2)}
    return SearchLoop(model, **streams, settings=settings, criterion=F.cross_entropy)


def test_a_search_on_fixed_memory_is_the_search() -> None:
    torch.manual_seed(0)
    plain, static = make_loop(Toy()), None
    static = make_loop(copy.deepcopy(plain.model))
    static.static = StaticStep(static._compute, capture=False)
    outcomes = [loop.run() for loop in (plain, static)]
    assert outcomes[0].genotype == outcomes[1].genotype
    # the rate is a float32 tensor there, as a captured SGD takes it
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(static.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    states = [loop.state_dict()["optimizers"] for loop in (plain, static)]
    assert states[0]["weights"]["param_groups"][0].keys() == states[1]["weights"]["param_groups"][0].keys()
    assert isinstance(states[1]["weights"]["param_groups"][0]["lr"], float)


def test_within_a_step_every_update_is_made_in_place() -> None:
    """What a graph reads and writes must lie where it lay: parameters, buffers, moments, sums, the guard's copies."""
    loop = make_loop(Toy(), arch_begin_epoch=0)
    loop.start_epoch()
    loop.model.train()

    def places() -> list[int]:
        optimizers = [v for o in loop.optimizers.values() for s in o.state.values() for v in s.values()]
        tensors = [*loop.model.state_dict().values(), *optimizers, loop.totals]
        tensors += [loop.guard.halted, loop.guard.good_steps, *loop.guard._copies.values()]
        return [t.data_ptr() for t in tensors if isinstance(t, Tensor)]

    loop.one_step()
    before = places()
    for _ in range(3):
        loop.one_step()
    assert places() == before and len(before) > 12


def test_steps_of_one_variant_do_the_same() -> None:
    """A graph is kept for each variant, so steps with and without a move of the architecture must not share one."""
    loop, seen = make_loop(Toy(), arch_begin_epoch=0, arch_every=2), {}
    plain = loop._compute

    def recording(variant: Any, *tensors: Tensor) -> None:
        before = loop.model.alpha.detach().clone()
        plain(variant, *tensors)
        done = (len(tensors), not torch.equal(before, loop.model.alpha))
        assert seen.setdefault(variant, done) == done

    loop.static = StaticStep(recording, capture=False)
    loop.run()
    assert {moved for _, moved in seen.values()} == {True, False}


def test_batches_are_copied_into_the_same_memory_and_the_body_runs_once_a_call() -> None:
    seen: list[tuple[Any, int, float]] = []
    step = StaticStep(lambda variant, x: seen.append((variant, x.data_ptr(), float(x.sum()))), capture=False)
    for value in (1.0, 2.0, 3.0):
        step("a", torch.full((2, 2), value))
    step("b", torch.zeros(2, 2))
    assert [(variant, total) for variant, _, total in seen] == [("a", 4.0), ("a", 8.0), ("a", 12.0), ("b", 0.0)]
    assert len({place for _, place, _ in seen}) == 1
    with pytest.raises(AssertionError, match="one shape"):
        step("a", torch.zeros(3, 2))


def test_a_rate_in_a_tensor_keeps_its_place() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    group = optimizer.param_groups[0]
    set_rate(group, 0.25, captured=True, device=weight.device)
    place = group["lr"].data_ptr()
    set_rate(group, 0.125, captured=True, device=weight.device)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert group["lr"].data_ptr() == place and weight.tolist() == [0.875] * 3
    assert plain_state(optimizer)["param_groups"][0]["lr"] == 0.125
    set_rate(group, 0.5, captured=False, device=weight.device)
    assert group["lr"] == 0.5


@pytest.mark.parametrize("captured", [True, False])
def test_a_run_goes_on_as_its_own_device_wants_it(captured: bool) -> None:
    """What a capture needs of Adam comes from the machine that goes on, not from the one that saved, old or new."""
    torch.manual_seed(0)
    saved, resumed = (make_loop(Toy(), arch_begin_epoch=0) for _ in range(2))
    saved.start_epoch()
    saved.one_step()
    for loop, capturable in ((saved, not captured), (resumed, captured)):
        for group in loop.optimizers["arch"].param_groups:
            group["capturable"] = capturable  # as SearchLoop does where it captures
    state = saved.state_dict()
    older = copy.deepcopy(state)  # of a release that saved the flag
    older["optimizers"]["arch"]["param_groups"][0]["capturable"] = not captured
    for found in (state, older):
        assert found is older or "capturable" not in found["optimizers"]["arch"]["param_groups"][0]
        resumed.load_state_dict(copy.deepcopy(found))
        assert [group["capturable"] for group in resumed.optimizers["arch"].param_groups] == [captured]
        mine, theirs = (loop.optimizers["arch"].state_dict()["state"][0] for loop in (saved, resumed))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    free = {"device": "cuda", "order": "first", "compiled": False, "ranks": 1}
    assert obstacle(**free) is None
    for change, words in (
        ({"device": "cpu"}, "no GPU"),
        ({"order": "exact"}, "first order"),
        ({"order": "finite-difference"}, "first order"),
        ({"compiled": True}, "--compile"),
        ({"ranks": 2}, "one process"),
    ):
        assert words in str(obstacle(**{**free, **change}))
    with pytest.raises(ValueError, match="--cuda-graph on: there is no GPU"):
        make_loop(Toy(), cuda_graph="on")
    assert make_loop(Toy(), cuda_graph="auto").static is None
    with pytest.raises(ValueError, match="cuda_graph 'always'"):
        SearchSettings(epochs=1, cuda_graph="always")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_search_is_the_search() -> None:
    torch.manual_seed(0)
    plain = make_loop(Toy().cuda())
    captured = make_loop(copy.deepcopy(plain.model), cuda_graph="on")
    for loop in (plain, captured):
        for stream in (loop.train_stream, loop.valid_stream):
            drawn = stream.batch
            stream.batch = lambda epoch, step, drawn=drawn: tuple(t.cuda() for t in drawn(epoch, step))
        loop.run()
    assert captured.static is not None and captured.static._graphs
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(captured.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_momentum_that_a_saved_state_did_not_have_begins_at_zero() -> None:
    """Otherwise a first step that is masked (found_inf) leaves a buffer of uninitialised memory."""
    weight = nn.Parameter(torch.ones(1000))
    without = prepare_sgd(SGD([weight], lr=0.1, fused=True))
    weight.grad = torch.ones(1000)
    without.step()
    optimizer = prepare_sgd(SGD([weight], lr=0.1, momentum=0.9, fused=True))
    load_plain_state(optimizer, plain_state(without))
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(1000))
    assert optimizer.param_groups[0]["momentum"] == 0.9
