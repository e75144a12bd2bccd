# SPDX-License-Identifier: Apache-2.0
"""Stop before a non-finite update, without reading the device in the step.

A sticky flag on the device is handed to the optimisers as ``found_inf``, the one input that makes a fused optimiser
skip its update by itself. What a step changes before its loss is known (batch norm statistics, ...) is kept in a copy
that follows only while the flag is down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss or a gradient was NaN or infinite; the message names the step and the cure."""


class FiniteGuard:
    """The flag, the count of good steps, and the copy of the last good state.

    ``base`` is the number of the step after which counting began; a loop that resumes sets it by :meth:`restart`.
    A loop whose steps draw from torch's global generators says where each begins (:meth:`start_of_step`).
    """

    def __init__(self, device: torch.device) -> None:
        self.halted = torch.zeros((), dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.base = 0
        self._tensors: Callable[[], list[Tensor]] = list
        self._copies: dict[torch.dtype, Tensor] = {}
        self._drawn: list[tuple[Tensor, Tensor | None]] = []  # the generators' states before each unchecked step
        self._checked = 0  # the number of the first of these

    def protect(self, tensors: Callable[[], list[Tensor]], *optimizers: torch.optim.Optimizer, base: int = 0) -> None:
        """Mask these (fused) optimisers, and keep a last good copy of what ``tensors()`` gives (always the same)."""
        for optimizer in optimizers:
            assert optimizer.param_groups[0].get("fused"), "only a fused optimiser can skip its update on the device"
            optimizer.found_inf = self.halted  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        self._tensors = tensors
        self.restart(base)

    def restart(self, base: int = 0) -> None:
        """Count from ``base`` steps, and take the present state as good."""
        self.halted.zero_()
        self.good_steps.zero_()
        self.base = self._checked = base
        self._drawn = []
        self._copies = {dtype: _flat(group) for dtype, group in self._grouped().items()}

    def start_of_step(self) -> None:
        """Note the generators' states: what a bad step has drawn is to be drawn again. They live on the host."""
        device = self.halted.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._drawn.append((torch.get_rng_state(), cuda))

    @torch.no_grad()
    def check(self, *values: Tensor) -> None:
        """Raise the flag, on the device, when one of these scalars is not finite."""
        for value in values:
            self.halted.copy_(torch.maximum(self.halted, (~torch.isfinite(value)).to(self.halted.dtype)))

    @torch.no_grad()
    def end_of_step(self, *, count: bool = True) -> None:
        """Take the state as good, and count the step, unless the flag is up."""
        up = self.halted > 0
        if count:
            self.good_steps += (~up).to(self.good_steps.dtype)
        for dtype, group in self._grouped().items():
            # in place: a captured step writes where it reads
            copy = self._copies[dtype]
            torch.where(up, copy, _flat(group), out=copy)

    def first_bad_step(self) -> int | None:
        """Number of the first bad step (``base`` included), None when all were good. Reads the device: log points."""
        if float(self.halted):
            return self.base + int(self.good_steps)
        self._checked += len(self._drawn)
        self._drawn = []
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Put the last good copy and the generators' states of then back, and lower the flag."""
        for dtype, group in self._grouped().items():
            pieces = self._copies[dtype].split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view_as(tensor) for p, tensor in zip(pieces, group, strict=True)])
        self._restore_generators()
        self.halted.zero_()

    def _restore_generators(self) -> None:
        before = self.base + int(self.good_steps) - self._checked
        if not before < len(self._drawn):
            return  # a loop whose steps draw nothing, or by their address
        here, cuda = self._drawn[before]
        torch.set_rng_state(here)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.halted.device)

    def _grouped(self) -> dict[torch.dtype, list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in self._tensors():
            groups.setdefault(tensor.dtype, []).append(tensor)
        return groups


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def prepare_sgd(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Give every momentum buffer its zeros: a first step that is masked would leave it uninitialised memory.

    The first update is the same: momentum * 0 + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def prepare_adam(optimizer: torch.optim.Adam) -> torch.optim.Adam:
    """Give every parameter its state now, so that the set of state tensors never changes in a run."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
