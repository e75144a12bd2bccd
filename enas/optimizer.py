# SPDX-License-Identifier: Apache-2.0
"""Adam as the source's framework writes it: beta1 = 0, and epsilon beside sqrt(v) before the bias correction.

    v <- b2 v + (1 - b2) g^2;   p <- p - lr sqrt(1 - b2^t) g / (sqrt(v) + eps)

PyTorch's Adam adds epsilon after the correction, which is another rule at eps = 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.engine.optimizers import Quick


class HatAdam(Quick):
    """The rule above. A parameter without gradient counts as one of gradient zero: its v decays, it stays.

    `found_inf` (common.engine.guard) keeps every state as it is, on the device, while it is not zero.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, *, beta2: float = 0.999, eps: float = 1e-3
    ) -> None:
        # fused: the guard's word for an optimiser that can skip an update on the device
        super().__init__(list(parameters), {"lr": lr, "beta2": beta2, "eps": eps, "fused": True})
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["square"] = torch.zeros_like(parameter)
            first = group["params"][0]
            # one count a group, kept with its first parameter as every state is (float32: torch loads it as that)
            self.state[first]["step"] = torch.zeros((), dtype=torch.float32, device=first.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        assert closure is None
        for group in self.param_groups:
            self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        parameters: list[nn.Parameter] = group["params"]
        used = [p for p in parameters if p.grad is not None]
        step: Tensor = self.state[parameters[0]]["step"]
        halted = step.new_zeros(()) if self.found_inf is None else self.found_inf.to(step.dtype)
        good = halted == 0
        step += good
        squares = [self.state[p]["square"] for p in parameters]
        decay = torch.where(good, group["beta2"], 1.0).to(squares[0].dtype)
        torch._foreach_mul_(squares, decay)
        if not used:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in used])  # type: ignore[union-attr]
        flat = torch.where(good, flat, 0.0)
        gradients = [g.view_as(p) for g, p in zip(flat.split([p.numel() for p in used]), used, strict=True)]
        squares = [self.state[p]["square"] for p in used]
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["beta2"])
        scale = group["lr"] * (1 - group["beta2"] ** step.double().clamp_min(1)).sqrt()
        torch._foreach_mul_(gradients, scale.to(flat.dtype))
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(used, gradients, denominators, value=-1.0)
