# SPDX-License-Identifier: Apache-2.0
"""A training step on fixed memory: captured once as a CUDA graph, then started by a single launch.

A search iteration is thousands of small kernels, and a GPU waits for Python between them. Captured, they run in a row.
What a capture needs the loops give: no step waits for the device, every update is made in place, batches have one
shape, and what changes from step to step lies in tensors (rates, masks, multipliers). A step is captured once for each
variant (with an architecture step, without one). On a CPU the same function runs on the same fixed memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from common.engine.progress import say

MODES = ("off", "auto", "on")
_EAGER_STEPS = 3  # before a capture: kernels are chosen and compiled, and memory is found


def obstacle(*, device: str, order: str, compiled: bool, ranks: int) -> str | None:
    """Why a search's step cannot be captured; None where it can."""
    if device != "cuda":
        return "there is no GPU to launch anything on"
    if order != "first":
        return "a second-order step reads its rates on the host; search at first order"
    if compiled:
        return "with --compile the compiler arranges the kernels; drop one of the two"
    if ranks > 1:
        return "ranks meet in the middle of a step; start one process"
    return None


class StaticStep:
    """Calls `body(variant, *batches)` on batches that always lie in the same memory.

    `capture`: as a CUDA graph of each variant, after some calls without. The calls before it are steps like any other,
    and the capture itself computes nothing, so that each call is one step whichever way it runs. `required`: a capture
    that fails raises; otherwise that is said once, and steps go on without.
    """

    def __init__(self, body: Callable[..., None], *, capture: bool, required: bool = False) -> None:
        self.body, self.capture, self.required = body, capture, required
        self._inputs: dict[int, Tensor] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, variant: Hashable, *batches: Tensor) -> None:
        """One step."""
        inputs = [self._keep(position, batch) for position, batch in enumerate(batches)]
        self._calls[variant] += 1
        if not self.capture:
            self.body(variant, *inputs)
        elif variant in self._graphs or self._calls[variant] > _EAGER_STEPS:
            self._replay(variant, inputs)
        else:
            self._aside(variant, inputs)

    def forget(self) -> None:
        """Capture anew: something that the graphs hold as a constant has changed."""
        self._graphs.clear()

    def _keep(self, position: int, batch: Tensor) -> Tensor:
        kept = self._inputs.get(position)
        if kept is None:
            kept = self._inputs[position] = torch.empty_like(batch)
        assert kept.shape == batch.shape, "a captured step takes batches of one shape"
        return kept.copy_(batch)

    def _aside(self, variant: Hashable, inputs: list[Tensor]) -> None:
        """On a stream of its own, as a capture wants the memory of the steps before it to be."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self.body(variant, *inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _replay(self, variant: Hashable, inputs: list[Tensor]) -> None:
        if variant not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.body(variant, *inputs)
            except RuntimeError as error:
                if self.required:
                    raise
                reason = str(error).strip().splitlines()[0]
                say(f"--cuda-graph auto: this step cannot be captured, searching without (slower): {reason}")
                self.capture = False
                self.body(variant, *inputs)
                return
            self._graphs[variant] = graph
        self._graphs[variant].replay()


def set_rate(group: dict[str, object], rate: float, *, captured: bool, device: torch.device) -> None:
    """Set an optimiser group's learning rate; `captured`: in a tensor that keeps its place, which graphs read."""
    present = group["lr"]
    if not captured:
        group["lr"] = rate
    elif isinstance(present, Tensor):
        present.fill_(rate)
    else:
        group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device)


def plain_state(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The optimiser's state with rates as numbers, the same whether its steps were captured or not."""
    state = optimizer.state_dict()
    groups = [
        {**{name: value for name, value in group.items() if name != "capturable"}, "lr": float(group["lr"])}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_plain_state(optimizer: torch.optim.Optimizer, state: dict[str, object]) -> None:
    """Go to a saved state; what the groups are set to stays as this process set it, and is not taken from the state.

    A run may go on on another kind of device (a step captured with another `capturable` is refused), or with another
    rate, decay or momentum (--allow-config-change), which the saved groups would silently undo.
    """
    present = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, present, strict=True):
        group.update(own)
        for parameter in group["params"] if group.get("momentum") else ():
            # saved without momentum: a first step that is masked would leave the buffer uninitialised
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
