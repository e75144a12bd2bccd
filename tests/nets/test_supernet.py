# SPDX-License-Identifier: Apache-2.0
"""The production supernet against the oracles and against the plain edge-by-edge one, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.engine.bilevel import InnerGroup, architecture_gradients
from common.nets import Supernet, build_network, build_supernet
from tests.helpers.fill import fill, fill_logits, oracle_batch, waves
from tests.helpers.plain_supernet import (
    REFERENCE_SLOTS,
    PlainSupernet,
    copy_into,
    fill_reference_gammas,
    paired_convolutions,
    reference_gamma_name,
)

LABELS = {"cos": torch.tensor([3, 7, 1, 9]), "sin": torch.tensor([0, 2, 4, 6])}
SMALL = {"num_classes": 10, "init_channels": 8, "layers": 3}


def close(actual: Tensor, expected: Any, atol: float = 1e-8) -> None:
    """Equality with an oracle's list."""
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def oracle_net(method: str, bits: tuple[int, ...] | None = None) -> Supernet:
    """The oracles' small supernet, filled."""
    scheme = "default" if bits is None else "reference"
    return fill_logits(fill(build_supernet(method=method, bits=bits, scheme=scheme, **SMALL)))


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_full_precision_equals_the_oracle(oracle: Any, method: str) -> None:
    truth = oracle(f"super_{method.replace('-', '')}_forward")["results"]
    net = oracle_net(method)
    assert sum(p.numel() for p in net.weight_parameters()) == truth["params"]
    net.eval()
    close(net(oracle_batch()), truth["eval_logits_fresh_running_stats"])
    net.train()
    logits = net(oracle_batch())
    close(logits, truth["train_logits"])
    loss = F.cross_entropy(logits, LABELS["cos"])
    assert loss.item() == pytest.approx(truth["loss"], abs=1e-8)
    loss.backward()
    for parameter, gradient in zip(net.arch_parameters(), truth["arch_grads"], strict=True):
        close(parameter.grad, gradient)
    norm = torch.stack([p.grad.norm() for p in net.weight_parameters()]).norm()
    assert norm.item() == pytest.approx(truth["weight_grad_global_norm"], abs=1e-8)


class Objective(torch.nn.Module):
    """Cross entropy of a supernet."""

    def __init__(self, net: Supernet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def bilevel(net: Supernet, order: str, inner: list[InnerGroup] | None) -> Tensor:
    """Write the architecture gradients of the oracles' two batches; returns the validation loss."""
    objective = Objective(net)
    batches = [(oracle_batch(kind), LABELS[kind]) for kind in ("cos", "sin")]
    return architecture_gradients(
        arch=net.arch_parameters(),
        train_objective=objective,
        valid_objective=objective,
        train_batch=batches[0],
        valid_batch=batches[1],
        inner=inner,
        order=order,
        side_pass=net.side_pass,
    )


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_first_order_equals_the_oracle(oracle: Any, method: str) -> None:
    truth = oracle(f"super_{method.replace('-', '')}_forward")["results"]
    net = oracle_net(method)
    loss = bilevel(net, "first", None)
    assert loss.item() == pytest.approx(truth["val_loss"], abs=1e-8)
    for parameter, gradient in zip(net.arch_parameters(), truth["first_order_arch_grads"], strict=True):
        close(parameter.grad, gradient)
    assert all(p.grad is None for p in net.weight_parameters())


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
@pytest.mark.parametrize("case", ["second_order_momentum0", "second_order_momentum_buf"])
def test_second_order_and_adam_equal_the_oracle(oracle: Any, method: str, case: str) -> None:
    results = oracle(f"super_{method.replace('-', '')}_forward")["results"]
    truth = results[case]
    net = oracle_net(method)
    weights = net.weight_parameters()
    buffers = [0.01 * waves(p.shape, "cos") for p in weights] if case.endswith("buf") else []
    before = [p.detach().clone() for p in weights]
    loss = bilevel(net, "finite-difference", [InnerGroup(weights, 0.025, 0.9, 3e-4, buffers)])
    assert loss.item() == pytest.approx(truth["unrolled_val_loss"], abs=1e-8)
    assert all(torch.equal(p, q) for p, q in zip(weights, before, strict=True))
    for parameter, gradient in zip(net.arch_parameters(), truth["final"], strict=True):
        close(parameter.grad, gradient)
    adam = torch.optim.Adam(net.arch_parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    adam.step()
    after = results["alphas_after_one_adam_step_lr3e-4_wd1e-3_betas.5_.999"][case]
    for parameter, values in zip(net.arch_parameters(), after, strict=True):
        close(parameter, values)


def test_quantised_equals_the_oracle(oracle: Any) -> None:
    truth = oracle("qdarts")["forward"]["results"]["allow8bit_False"]
    net = fill_reference_gammas(oracle_net("pc-darts", (2, 4)))
    assert sum(p.numel() for p in net.weight_parameters()) == truth["params"]
    logits = net(oracle_batch())
    close(logits, truth["train_logits"])
    loss = F.cross_entropy(logits, LABELS["cos"])
    assert loss.item() == pytest.approx(truth["ce"], abs=1e-8)
    loss.backward()
    for parameter, gradient in zip(net.arch_parameters(), truth["arch_grads"], strict=True):
        close(parameter.grad, gradient)


@pytest.mark.parametrize("allow8bit, bits", [(False, (2, 4)), (True, (2, 4, 8))])
def test_gamma_shapes_are_the_oracle_ones_without_the_dead_slots(
    oracle: Any, allow8bit: bool, bits: tuple[int, ...]
) -> None:
    truth = oracle("qdarts")[f"C16_L8_cifar10_allow8bit_{allow8bit}"]
    net = build_supernet(method="pc-darts", bits=bits, num_classes=10, init_channels=16, layers=8)
    assert sum(p.numel() for p in net.weight_parameters()) == truth["params"]
    assert [list(p.shape) for p in net.arch_parameters()] == truth["arch_shapes"]
    assert len(net.gammas) == len(net.gamma_parameters()) == truth["n_gamma_tensors"]
    for key, gamma in net.gammas.items():
        shape = list(truth["gamma_shapes"][reference_gamma_name(key)])
        if "preprocess" not in key:
            kind = key.split("_")[0]
            shape[2] = len(REFERENCE_SLOTS[kind])
            assert net.rows[kind] == ("skip_connect",) * (kind == "reduce") + (
                "sep_conv_3x3",
                "sep_conv_5x5",
                "dil_conv_3x3",
                "dil_conv_5x5",
            )
        assert list(gamma.shape) == shape, key
    convolutions = sum(len(c.convolutions()) for cell in net.cells for edge in cell.operations for c in edge.values())
    convolutions += sum(len(p.convolutions()) for cell in net.cells for p in (cell.preprocess0, cell.preprocess1))
    assert convolutions == truth["n_mixed_convs"]


@pytest.mark.parametrize("method", ["darts", "pc-darts"])
def test_parameter_counts(oracle: Any, method: str) -> None:
    truth = oracle(f"super_{method.replace('-', '')}_params_genotypes")["results"]
    cases = [("search_C16_L8_cifar10", {"num_classes": 10}), ("search_C16_L8_cifar100", {"num_classes": 100})]
    if method == "pc-darts":
        cases.append(("search_imagenet_C16_L8", {"num_classes": 1000, "stem": "imagenet", "partial": 2}))
    for key, options in cases:
        net = build_supernet(method=method, init_channels=16, layers=8, **options)
        assert sum(p.numel() for p in net.weight_parameters()) == truth[key]["params"]
        if "arch_shapes" in truth[key]:
            assert [list(p.shape) for p in net.arch_parameters()] == truth[key]["arch_shapes"]


@pytest.mark.parametrize("method, bits", [("darts", None), ("pc-darts", None), ("pc-darts", (2, 4)), ("darts", (2, 8))])
def test_parameter_groups_are_disjoint_and_complete(method: str, bits: tuple[int, ...] | None) -> None:
    net = build_supernet(method=method, bits=bits, **SMALL)
    groups = [net.weight_parameters(), net.gamma_parameters(), net.arch_parameters()]
    listed = [id(p) for group in groups for p in group]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in net.parameters()}
    assert len(groups[2]) == (2 if method == "darts" else 4)
    assert bool(groups[1]) == (bits is not None)
    state = net.state_dict()  # logits travel with the weights
    assert {"alphas_normal", "alphas_reduce"} <= set(state)
    assert all(f"gammas.{key}" in state for key in net.gammas)


VARIANTS = {
    "darts": {"method": "darts"},
    "pc k=4": {"method": "pc-darts"},
    "pc k=2": {"method": "pc-darts", "partial": 2},
    "pc 2,4": {"method": "pc-darts", "bits": (2, 4)},
    "pc 2,4 reference": {"method": "pc-darts", "bits": (2, 4), "scheme": "reference"},
    "pc 2,4,8": {"method": "pc-darts", "bits": (2, 4, 8)},
    "pc 2,4,8 reference": {"method": "pc-darts", "bits": (2, 4, 8), "scheme": "reference"},
    "pc 1-4": {"method": "pc-darts", "bits": (1, 2, 3, 4)},
    "pc k=2 2,4": {"method": "pc-darts", "partial": 2, "bits": (2, 4)},
    "pc k=2 2,4,8": {"method": "pc-darts", "partial": 2, "bits": (2, 4, 8)},
    "pc k=2 1-4": {"method": "pc-darts", "partial": 2, "bits": (1, 2, 3, 4)},
    "pc k=2 4,32": {"method": "pc-darts", "partial": 2, "bits": (4, 32)},
    "pc all bits": {"method": "pc-darts", "bits": (1, 2, 3, 4, 8, 32)},
    "darts 2,4": {"method": "darts", "bits": (2, 4)},
    "darts 2,4,8": {"method": "darts", "bits": (2, 4, 8)},
    "darts 1-4": {"method": "darts", "bits": (1, 2, 3, 4)},
    "darts 2,8": {"method": "darts", "bits": (2, 8)},
    "3 nodes, 2 out": {"method": "pc-darts", "bits": (2, 4), "nodes": 3, "multiplier": 2},
    "6 cells": {"method": "pc-darts", "bits": (2, 8), "layers": 6},
    "imagenet": {"method": "pc-darts", "partial": 2, "bits": (2, 4), "stem": "imagenet"},
    "one channel": {"method": "pc-darts", "in_channels": 1, "num_classes": 3},
}


def pair(variant: str, seed: int = 0) -> tuple[PlainSupernet, Supernet, Tensor, Tensor]:
    """The two supernets with the same random weights and strong random logits, and a batch."""
    options = SMALL | VARIANTS[variant]
    torch.manual_seed(seed)
    plain = PlainSupernet(**options).double()
    with torch.no_grad():
        for p in plain.arch_parameters() + plain.gamma_parameters():
            p.normal_()
        for p in plain.weight_parameters():
            if p.dim() == 4:  # as in a trained net; the first layers' fan-in would leave some below every grid
                p.normal_(std=(p[0].numel()) ** -0.5)
    fused = build_supernet(**options).double()
    copy_into(plain, fused)
    size = 64 if options.get("stem") == "imagenet" else 8  # maps of 1x1 would make channels constant: all is ties
    x = torch.randn(3, options.get("in_channels", 3), size, size, dtype=torch.float64)
    return plain, fused, x, torch.tensor([0, 2, 1])


def assert_same_gradients(plain: PlainSupernet, fused: Supernet, atol: float = 1e-10) -> None:
    """Gradients of every parameter of the two agree; one that is never used may be None or zero."""
    pairs = [(a.weight, b.weight) for a, b in paired_convolutions(plain, fused)]
    pairs += [(plain.gammas[key], fused.gammas[key]) for key in plain.gammas]
    pairs += list(zip(plain.arch_parameters(), fused.arch_parameters(), strict=True))
    pairs += list(zip(plain.classifier.parameters(), fused.classifier.parameters(), strict=True))
    for name in ("stem", "stem0", "stem1"):
        if hasattr(plain, name):
            pairs += list(zip(getattr(plain, name).parameters(), getattr(fused, name).parameters(), strict=True))
    assert len({id(b) for _, b in pairs}) == len(list(fused.parameters()))
    for a, b in pairs:
        mine, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b))
        torch.testing.assert_close(theirs, mine, atol=atol, rtol=1e-8)


def paired_statistics(plain: PlainSupernet, fused: Supernet) -> Iterator[tuple[nn.BatchNorm2d, Tensor, Tensor]]:
    """Every batch norm of the plain network with mean and variance of the same channels in the production one.

    There, candidates of all edges that leave a state lie side by side; a pooling is normalised once for all of them.
    """
    for name in ("stem", "stem0", "stem1"):
        for mine, theirs in zip(getattr(plain, name, ()), getattr(fused, name, ()), strict=True):
            if isinstance(mine, nn.BatchNorm2d):
                yield mine, theirs.running_mean, theirs.running_var
    for mine, theirs in zip(plain.cells, fused.cells, strict=True):
        for name in ("preprocess0", "preprocess1"):
            norm = getattr(theirs, name).bn
            yield getattr(mine, name).bn, norm.running_mean, norm.running_var
        for state in theirs.states:
            together = [p for p in fused.primitives if p.startswith(("sep", "dil"))]
            stacks = dict(zip(together, state.stacked.separable, strict=True))
            pools = dict(zip(state.stacked.poolings, state.stacked.norms, strict=True))
            for position, edge in enumerate(state.edges):
                for name, branch in mine.edges[edge].candidates.items():
                    norms = [module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)]
                    if name in pools:
                        found = [pools[name]]
                    else:
                        found = list(stacks[name].norms) if name in stacks else [state.halving_norm] if norms else []
                    for own, norm in zip(norms, found, strict=True):
                        parts = [t.view(-1, state.channels) for t in (norm.running_mean, norm.running_var)]
                        yield own, *(t[0 if name in pools else position] for t in parts)


def assert_same_statistics(plain: PlainSupernet, fused: Supernet) -> None:
    """Running means and variances of every batch norm of the two agree."""
    count = 0
    for norm, mean, variance in paired_statistics(plain, fused):
        torch.testing.assert_close(mean, norm.running_mean, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(variance, norm.running_var, atol=1e-9, rtol=1e-9)
        count += 1
    assert count == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())


SLOW = {"pc all bits", "pc k=2 4,32", "darts 2,4", "6 cells", "imagenet", "one channel"}
SLOW |= {"pc k=2 2,4", "pc k=2 2,4,8", "pc k=2 1-4", "darts 2,4,8", "darts 1-4"}


def marked(names: Iterable[str], slow: set[str]) -> list[Any]:
    """Parameters, those of `slow` with the marker."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def assert_same_step(plain: PlainSupernet, fused: Supernet, x: Tensor, y: Tensor) -> None:
    """Logits, loss and every gradient of one batch."""
    found = []
    for net in (plain, fused):
        net.zero_grad()
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        found.append((logits.detach(), loss.item()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-9, rtol=0)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-9)
    assert_same_gradients(plain, fused)


def mean_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks halve what passes by the operations with means in place of maxima, from here on.

    Discrete weights on discrete activations make pixels that are equal but for rounding, and each network rounds in its
    own order: where two of them are the maximum, the gradient goes to one or to the other, and both are right.
    """
    largest = F.max_pool2d

    def pool(x: Tensor, kernel: int, *rest: Any, **more: Any) -> Tensor:
        return F.avg_pool2d(x, 2, 2) if kernel == 2 else largest(x, kernel, *rest, **more)

    monkeypatch.setattr(F, "max_pool2d", pool)


TIED = {"3 nodes, 2 out"}  # with this seed, in evaluation


@pytest.mark.parametrize("variant", marked(VARIANTS, SLOW))
def test_fused_equals_plain(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two training steps (running ranges and statistics move), then evaluation: logits, loss and every gradient."""
    plain, fused, first, y = pair(variant)
    second = 2 * torch.randn_like(first)
    for x in (first, second):
        assert_same_step(plain, fused, x, y)
        assert_same_statistics(plain, fused)
    if variant in TIED:
        mean_bypass(monkeypatch)
    # Evaluation on the statistics of this very batch: those of two steps are so far off that activations saturate,
    # which makes ties of maxima, and channels that are dead.
    for net in (plain, fused):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            net(first)
        net.eval()
    assert_same_statistics(plain, fused)
    assert_same_step(plain, fused, first, y)
    assert_same_statistics(plain, fused)


SECOND_ORDER = {
    "2,4": {"bits": (2, 4)},
    "2,4,8": {"bits": (2, 4, 8)},
    "full precision": {},
    "k=2 2,4": {"bits": (2, 4), "partial": 2},
    "k=2 2,4,8": {"bits": (2, 4, 8), "partial": 2},
    "k=2 full precision": {"partial": 2},
    "darts 2,4": {"bits": (2, 4), "method": "darts"},
    "darts 2,4,8": {"bits": (2, 4, 8), "method": "darts"},
    "darts full precision": {"method": "darts"},
}


@pytest.mark.parametrize("variant", marked(SECOND_ORDER, SECOND_ORDER.keys() - {"2,4"}))
def test_exact_second_order_equals_the_plain_double_backward(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused functions can be differentiated twice: alphas, betas through one step of weights and gammas."""
    if variant == "k=2 2,4":  # tied maxima with this seed
        mean_bypass(monkeypatch)
    options = SMALL | {"method": "pc-darts", "nodes": 2, "multiplier": 2} | SECOND_ORDER[variant]
    torch.manual_seed(0)
    plain = PlainSupernet(**options).double()
    with torch.no_grad():
        for p in plain.arch_parameters() + plain.gamma_parameters():
            p.normal_()
    fused = build_supernet(**options).double()
    copy_into(plain, fused)
    batches = [(torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([k, 3, 5])) for k in (0, 1)]
    values = []
    for net in (plain, fused):
        objective = Objective(net)
        inner = [InnerGroup(net.weight_parameters(), 0.1, 0.9, 3e-4)]
        if fused.bits is not None:
            inner.append(InnerGroup(net.gamma_parameters(), 0.05, 0.0, 1e-3))
        loss = architecture_gradients(
            arch=net.arch_parameters(),
            train_objective=objective,
            valid_objective=objective,
            train_batch=batches[0],
            valid_batch=batches[1],
            inner=inner,
            order="exact",
            side_pass=net.side_pass,
        )
        values.append([loss, *(p.grad for p in net.arch_parameters())])
    for mine, theirs in zip(*values, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-9, rtol=1e-8)


def test_gradients_follow_the_loss_numerically() -> None:
    """Full precision is smooth in alphas and betas: a finite difference of the loss gives the gradient."""
    _, net, x, y = pair("pc k=2")
    F.cross_entropy(net(x), y).backward()
    generator = torch.Generator().manual_seed(1)
    for p in net.arch_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-6)
                values.append(F.cross_entropy(net(x), y).item())
                p.sub_(direction, alpha=sign * 1e-6)
        numeric = (values[0] - values[1]) / 2e-6
        assert numeric == pytest.approx((p.grad * direction).sum().item(), rel=1e-4, abs=1e-7)


def test_side_pass_leaves_ranges_alone() -> None:
    _, net, x, _ = pair("pc 2,4,8")
    net(x)
    ranges = {n: b.clone() for n, b in net.named_buffers() if n.endswith("maximum")}
    assert ranges
    with net.side_pass():
        net(10 * x)
    assert all(torch.equal(dict(net.named_buffers())[n], b) for n, b in ranges.items())
    net.eval()
    net(10 * x)
    assert all(torch.equal(dict(net.named_buffers())[n], b) for n, b in ranges.items())
    net.train()
    net(10 * x)
    assert any(not torch.equal(dict(net.named_buffers())[n], b) for n, b in ranges.items())


def test_state_dict_round_trip_with_ranges() -> None:
    _, net, x, _ = pair("pc 2,4,8")
    net(x)
    other = build_supernet(**(SMALL | VARIANTS["pc 2,4,8"])).double()
    other.load_state_dict(net.state_dict())
    net.eval(), other.eval()
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("variant", ["darts", "pc 2,4,8", "3 nodes, 2 out", "6 cells"])
def test_architecture_takes_the_most_probable_bits(variant: str) -> None:
    plain, fused, _, _ = pair(variant)
    architecture = fused.architecture({"method": "test"})
    genotype = fused.genotype()
    assert architecture.genotype == genotype and dict(architecture.search) == {"method": "test"}
    if fused.bits is None:
        assert architecture.bits is None
        return
    plain.bind_gammas()
    assert len(architecture.bits.cells) == len(plain.cells)
    best = lambda logits: fused.bits[logits.argmax().item()]  # noqa: E731
    for cell, chosen in zip(plain.cells, architecture.bits.cells, strict=True):
        assert chosen.reduction == cell.reduction
        for which in (0, 1):
            activation, weight = getattr(cell, f"preprocess{which}").convolutions[0].logits
            assert getattr(chosen, f"preprocess{which}") == (best(weight), best(activation))
        pairs = genotype.reduce if cell.reduction else genotype.normal
        for position, ((primitive, state), bits) in enumerate(zip(pairs, chosen.operations, strict=True)):
            node = position // 2
            edge = sum(2 + n for n in range(node)) + state
            convolutions = cell.edges[edge].candidates[primitive].convolutions
            if not convolutions:
                assert bits is None
            else:
                assert bits == (best(convolutions[0].logits[1]), best(convolutions[0].logits[0]))


def test_found_architecture_builds_and_trains() -> None:
    _, fused, x, _ = pair("pc 2,4,8")
    network = build_network(fused.architecture(), num_classes=10, init_channels=8, layers=5).double()
    network(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "enas"}, "method.*enas"),
        ({"bits": (2, 5)}, "bits.*5"),
        ({"bits": (2, 2)}, "bits.*2"),
        ({"bits": ()}, "bits"),
        ({"stem": "mnist"}, "mnist"),
        ({"scheme": "magic"}, "magic"),
        ({"layers": 2}, "layers.*2"),
        ({"init_channels": 10, "partial": 4}, "init-channels 10"),
        ({"init_channels": 4, "partial": 4}, "init-channels 4"),
        ({"nodes": 2, "multiplier": 3}, "multiplier.*3"),
        ({"nodes": 0, "multiplier": 0}, "multiplier|nodes"),
        ({"primitives": ("none", "magic")}, "magic"),
        ({"num_classes": 0}, "class"),
        ({"in_channels": 0}, "channels"),
        ({"init_channels": 0, "method": "darts"}, "init-channels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_supernet(**(SMALL | {"method": "pc-darts"} | options))
