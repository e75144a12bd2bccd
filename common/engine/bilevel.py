# SPDX-License-Identifier: Apache-2.0
"""Gradients of the architecture parameters in a bilevel search.

The upper level asks for d/d(alpha) of L_valid(w*(alpha), alpha). Three answers:

* ``first``: w* is taken as the present w (DARTS, first order);
* ``finite-difference``: w* is one momentum-SGD step ahead and the second-order term is a central difference of
  L_train's alpha gradient with R = .01 / |u| (DARTS, equations 7 and 8);
* ``exact``: the same step ahead, the second-order term by double backward. Across rounding a finite difference is
  noise, so this is the form for quantised supernets, where it differentiates the straight-through surrogate.

"Inner" variables are whatever the training step moves: weights, and gammas where they are trained with them. Each
group keeps its own learning rate, momentum and weight decay.

Nothing here knows a network: the two objectives are modules whose ``forward(x, y)`` is a scalar loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.engine import distributed
from common.engine.accumulation import Batch, add, as_list, divide

ORDERS = ("first", "finite-difference", "exact")

SidePass = Callable[[], AbstractContextManager[object]]


@dataclass
class InnerGroup:
    """Parameters that one training step moves together, and how it moves them.

    A step is ``w - learning_rate * (momentum * buffer + gradient + weight_decay * w)``; a buffer of None counts as
    zero. ``learning_rate`` is the one that the coming training step really uses.
    """

    parameters: list[nn.Parameter]
    learning_rate: float
    momentum: float
    weight_decay: float
    buffers: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.buffers:
            self.buffers = [None] * len(self.parameters)
        assert len(self.buffers) == len(self.parameters), "one momentum buffer (or None) per parameter"


def inner_groups(*optimizers: torch.optim.SGD) -> list[InnerGroup]:
    """Read the inner groups off the optimisers that train them: present rates, and their momentum buffers (shared)."""
    groups = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters = list(group["params"])
            buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in parameters]
            settings = (float(group[key]) for key in ("lr", "momentum", "weight_decay"))
            groups.append(InnerGroup(parameters, *settings, buffers))
    return groups


def architecture_gradients(
    *,
    arch: list[nn.Parameter],
    train_objective: nn.Module,
    valid_objective: nn.Module,
    train_batch: Batch | Sequence[Batch],
    valid_batch: Batch | Sequence[Batch],
    inner: list[InnerGroup] | None,
    order: str,
    side_pass: SidePass,
) -> Tensor:
    """Write ``.grad`` of the architecture parameters, and of nothing else.

    Args:
        arch: the upper-level parameters; one that the loss does not reach gets ``grad = None``.
        train_objective, valid_objective: ``forward(x, y) -> scalar loss``, each with the model as a submodule.
        train_batch, valid_batch: ``(x, y)``, or several whose gradients are averaged; the training batch is not read
            at first order.
        inner: what the training step moves (:func:`inner_groups`); not read at first order.
        order: one of :data:`ORDERS`.
        side_pass: context in which the model leaves its running quantiser ranges alone.

    Returns:
        The validation loss at the weights that were differentiated (a step ahead at second order), detached.

    Raises:
        ValueError: an unknown order, or a second order without inner groups.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r} of the architecture step: choose one of {', '.join(ORDERS)}")
    if order != "first" and not inner:
        raise ValueError(f"order {order!r} needs the inner groups (what the training step moves)")
    train, valid = as_list(train_batch), as_list(valid_batch)
    with side_pass():
        if order == "first":
            loss, gradients = _first_order(arch, valid_objective, valid)
        else:
            step = _InnerStep(inner, train_objective, valid_objective)
            second_order = _finite_difference if order == "finite-difference" else _exact
            loss, gradients = second_order(arch, step, train, valid)
    for parameter, gradient in zip(arch, gradients, strict=True):
        parameter.grad = gradient
    return loss


def _first_order(
    arch: list[nn.Parameter], objective: nn.Module, batches: list[Batch]
) -> tuple[Tensor, list[Tensor | None]]:
    with _without_gradient(objective, keep=arch):
        loss, gradients = _gradients(objective, batches, arch)
    _average([*gradients, loss])
    return loss, gradients


def _gradients(
    objective: Callable[..., Tensor], batches: list[Batch], wanted: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean over the batches of the loss (detached) and of its gradients."""
    losses, total = [], None
    for batch in batches:
        loss = objective(*batch)
        total = add(total, torch.autograd.grad(loss, wanted, allow_unused=True))
        losses.append(loss.detach().clone())
    assert total is not None
    return sum(losses[1:], start=losses[0]) / len(losses), divide(total, len(losses))


class _InnerStep:
    """One training step as a function of the inner variables, without touching them for good."""

    def __init__(self, groups: Sequence[InnerGroup], train_objective: nn.Module, valid_objective: nn.Module) -> None:
        self.groups = groups
        self.train_objective = train_objective
        self.valid_objective = valid_objective
        self.parameters = [p for group in groups for p in group.parameters]
        self.rates = [group.learning_rate for group in groups for _ in group.parameters]
        self.rate0 = self.rates[0] or max(self.rates)  # 0: the step goes nowhere, and the first order is left

    @torch.no_grad()
    def ahead(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The inner variables after the step. One without a gradient stays, as in the optimiser."""
        moved, position = [], 0
        for group in self.groups:
            for parameter, buffer in zip(group.parameters, group.buffers, strict=True):
                gradient = gradients[position]
                position += 1
                if gradient is None:
                    moved.append(parameter.detach().clone())
                    continue
                direction = gradient.add(parameter, alpha=group.weight_decay)
                if buffer is not None:
                    direction.add_(buffer, alpha=group.momentum)
                moved.append(parameter.detach().sub(direction, alpha=group.learning_rate))
        return moved

    def differentiable_gradients(self, batch: Batch) -> list[Tensor | None]:
        """Gradients of the training loss in the inner variables, with their graph."""
        loss = self.train_objective(*batch)
        return list(torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True))

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Run with the inner variables at ``values``; the saved copies come back bit for bit."""
        saved = [p.detach().clone() for p in self.parameters]
        data = [p.detach() for p in self.parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(data, list(values))
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(data, saved)


def _finite_difference(
    arch: list[nn.Parameter], step: _InnerStep, train: list[Batch], valid: list[Batch]
) -> tuple[Tensor, list[Tensor | None]]:
    """DARTS: two more alpha gradients of the training loss at w +- R u, u = the scaled validation gradient."""
    _, gradients = _gradients(step.train_objective, train, step.parameters)
    _average(gradients)
    with step.at(step.ahead(gradients)):
        loss, d_arch, v = _both(step.valid_objective, valid, arch, step.parameters)
    if not step.rate0:
        return loss, d_arch

    # u folds unequal learning rates into one direction, so that one R and one factor rate0 serve all groups.
    moving = [i for i, g in enumerate(v) if g is not None]
    u = torch._foreach_mul([v[i] for i in moving], [step.rates[i] / step.rate0 for i in moving])
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(u)))
    # R = .01 / |u|; a zero direction gives a zero difference, hence no division by zero below either.
    radius = 0.01 / norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.5)

    sides = []
    for sign in (1.0, -1.0):
        shifted = [p.detach() for p in step.parameters]
        for i, direction in zip(moving, u, strict=True):
            shifted[i] = shifted[i] + direction * (sign * radius).to(direction.dtype)
        with step.at(shifted), _without_gradient(step.train_objective, keep=arch):
            _, side = _gradients(step.train_objective, train, arch)
        _average(side)
        sides.append(side)

    gradients = []
    for upper, plus, minus in zip(d_arch, *sides, strict=True):
        implicit = None if plus is None or minus is None else (plus - minus) / (2 * radius).to(plus.dtype)
        gradients.append(_minus(upper, implicit, step.rate0))
    return loss, gradients


def _exact(
    arch: list[nn.Parameter], step: _InnerStep, train: list[Batch], valid: list[Batch]
) -> tuple[Tensor, list[Tensor | None]]:
    """Double backward: d/d(alpha) of the inner step, contracted with the validation gradient after it.

    Written as a vector-Jacobian product of the training gradient, so that each rank differentiates its own
    gradient and only first-order quantities are averaged. The graph of a single batch's gradient is kept for it; those
    of several would take as many times the memory, so they are computed again one by one.
    """
    own = step.differentiable_gradients(train[0]) if len(train) == 1 else None
    if own is not None:
        averaged = [None if g is None else g.detach().clone() for g in own]
    else:
        _, averaged = _gradients(step.train_objective, train, step.parameters)
    _average(averaged)

    # The graph above holds w itself, so w cannot move in place: the validation pass reads its substitutes.
    moved = [value.requires_grad_() for value in step.ahead(averaged)]
    substitutes = _by_name(step.valid_objective, step.parameters, moved)
    after = lambda *batch: functional_call(step.valid_objective, substitutes, batch)  # noqa: E731
    loss, d_arch, v = _both(after, valid, arch, moved)
    vectors = [None if vector is None else vector * rate for vector, rate in zip(v, step.rates, strict=True)]

    total: list[Tensor | None] | None = None
    for batch in train:
        gradients = own if own is not None else step.differentiable_gradients(batch)
        total = add(total, _contracted(gradients, vectors, arch))
    assert total is not None
    implicit = divide(total, len(train))
    _average(implicit)
    return loss, [_minus(upper, lower, 1.0) for upper, lower in zip(d_arch, implicit, strict=True)]


def _contracted(
    gradients: Sequence[Tensor | None], vectors: Sequence[Tensor | None], arch: list[nn.Parameter]
) -> list[Tensor | None]:
    """d/d(alpha) of the sum of gradients times vectors."""
    pairs = [
        (g, vector)
        for g, vector in zip(gradients, vectors, strict=True)
        if g is not None and vector is not None and g.requires_grad
    ]
    if not pairs:
        return [None] * len(arch)
    outputs, along = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, arch, grad_outputs=along, allow_unused=True))


def _both(
    objective: Callable[..., Tensor], batches: list[Batch], arch: list[nn.Parameter], inner: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Gradients of one loss with respect to both levels, averaged over the ranks."""
    loss, gradients = _gradients(objective, batches, [*arch, *inner])
    _average([*gradients, loss])
    return loss, gradients[: len(arch)], gradients[len(arch) :]


def _minus(upper: Tensor | None, implicit: Tensor | None, factor: float) -> Tensor | None:
    if implicit is None:
        return upper
    scaled = implicit.detach() * -factor
    return scaled if upper is None else upper + scaled


def _average(gradients: Iterable[Tensor | None]) -> None:
    distributed.average_(g for g in gradients if g is not None)


def _by_name(module: nn.Module, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Substitutes for functional_call, under every name that a parameter has in the module."""
    value_of = {id(p): value for p, value in zip(parameters, values, strict=True)}
    named = module.named_parameters(remove_duplicate=False)
    return {name: value_of[id(p)] for name, p in named if id(p) in value_of}


@contextmanager
def _without_gradient(module: nn.Module, keep: Sequence[nn.Parameter]) -> Iterator[None]:
    """Ask the module for no gradient but those of ``keep``: a third of the work and of the memory goes."""
    kept = {id(p) for p in keep}
    paused = [p for p in module.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in paused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in paused:
            parameter.requires_grad_(True)
