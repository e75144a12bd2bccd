# SPDX-License-Identifier: Apache-2.0
"""Non-finite values: noticed on the device, the update masked there, read by the host at log points only.

How an update is masked. Multiplying gradients by zero is not enough (0 x NaN is NaN, and momentum and weight decay move
the parameters all the same); copying parameters before each step costs their memory and a pass over it. torch's fused
SGD and Adam kernels have the right switch built in, the one that mixed precision uses: with `found_inf` set they leave
parameter, momentum, moments and step count untouched, bit for bit, without the host ever looking. So every optimiser
that this project steps is made with fused=True (also the fastest of torch's implementations), and is stepped by
`FiniteGuard.step`.

The forward pass of a bad step has changed more than parameters: batch-norm statistics and quantiser ranges. They are
small and are copied back (`protected`).

Once a step was bad every later one is masked too, so what the run stops with is the state before the first bad step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FiniteGuard:
    """Watches losses and gradients of a loop, and keeps the first bad step's number on the device.

    `protected`: tensors that a forward changes (buffers); `settle` puts them back after a bad step. In a loop:

        ok = guard.check(loss, gradients, step=step)    # gradients, or their norm when it is computed anyway
        guard.step(optimizer)                           # does nothing once a step was bad
        guard.settle()                                  # at the end of the step
        ...
        bad = guard.first_bad()                         # at log points: the only wait for the device
    """

    def __init__(self, device: torch.device | str, *, protected: Iterable[Tensor] = ()) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._found = torch.zeros((), dtype=torch.float32, device=device)  # the kernels' found_inf: 1.0 = leave alone
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in protected:
            if tensor.numel():
                groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        self._groups = [(tensors, _flat(tensors)) for tensors in groups.values()]

    @torch.no_grad()
    def check(self, loss: Tensor, gradients: Tensor | Iterable[Tensor | None], *, step: int | Tensor) -> Tensor:
        """True (on the device, no sync) while this and every earlier step had finite values.

        `gradients`: the tensors (None among them is skipped), or one tensor that is finite exactly when all are, such
        as the norm that `clip_grad_norm_` returns. Call it before anything is stepped with them.
        """
        if isinstance(gradients, Tensor):
            norm = gradients
        else:
            present = [gradient for gradient in gradients if gradient is not None]
            # The largest magnitude: unlike a sum of squares it is finite whenever all entries are.
            norm = torch.nn.utils.get_total_norm(present, norm_type=float("inf")) if present else loss.new_zeros(())
        ok = torch.isfinite(loss.detach()).all() & torch.isfinite(norm.detach()).all().to(loss.device)
        self._first.copy_(torch.where(ok | (self._first >= 0), self._first, step))
        ok = self._first < 0
        self._found.copy_(~ok)
        return ok

    def step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Step the optimisers, unless a value was bad: then parameters and optimiser states stay bit for bit."""
        for optimizer in optimizers:
            guarded_step(optimizer, self._found)

    @torch.no_grad()
    def settle(self) -> None:
        """End a step: keep the protected tensors' new values, or put back the ones before the first bad step."""
        ok = self._first < 0
        for tensors, saved in self._groups:
            saved.copy_(torch.where(ok, _flat(tensors), saved))
            pieces = saved.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [piece.view_as(one) for piece, one in zip(pieces, tensors, strict=True)])

    @torch.no_grad()
    def remember(self) -> None:
        """Take the protected tensors' present values as the last good ones (after a checkpoint was loaded)."""
        for tensors, saved in self._groups:
            saved.copy_(_flat(tensors))

    def first_bad(self) -> int | None:
        """The first bad step, or None. Waits for the device: for log points and checkpoints, not for steps."""
        step = int(self._first)
        return None if step < 0 else step


def guarded_step(optimizer: torch.optim.Optimizer, found: Tensor) -> None:
    """One step of a fused SGD or Adam, or none at all where `found` (a float32 scalar on the device) is 1.

    Raises ValueError for an optimiser without the switch.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} must be made with fused=True: only fused kernels can be masked")
    if isinstance(optimizer, torch.optim.SGD):
        _fill_momentum(optimizer)
    # The attributes by which torch.amp.GradScaler speaks to fused optimisers.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = found  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Zero momentum where there is none yet: the same first step (m = 0.9 x 0 + g), but maskable.

    The fused kernel would start from uninitialised memory, which a masked first step would then leave in the state;
    and it takes no mixture of old and new parameters, as when gammas join after the warm-up.
    """
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
