# SPDX-License-Identifier: Apache-2.0
"""The controller: an LSTM that writes both cells of an architecture, block by block (Pham et al., ICML 2018).

Many architectures are written in one batched run. What decides is given from outside, as numbers in [0, 1): a sample is
a function of the controller's weights and those numbers, so it can be drawn again anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.nets.enas_space import IDENTITY, MicroCells

OPERATIONS = IDENTITY + 1
_START_BIAS = (10.0, 10.0, 0.0, 0.0, 0.0)  # of the operations' logits: favours convolutions
_NORMAL_BIAS = (0.25, 0.25, -0.25, -0.25, -0.25)  # added in the normal cell, never trained
_INIT = 0.1

Choose = Callable[[Tensor, int], Tensor]
"""(logits [n, options], number of the decision) -> chosen options [n]."""


@dataclass(frozen=True)
class ControllerSettings:
    """How logits become a distribution: l / temperature, then tanh_constant x tanh(l) (for operations the constant is
    divided by `op_tanh_reduce`); None leaves a step out.
    """

    blocks: int = 5
    hidden: int = 64
    tanh_constant: float | None = 1.1
    op_tanh_reduce: float = 2.5
    temperature: float | None = None


@dataclass(frozen=True)
class Sample:
    """n architectures: cells as integers [n, 4 B] on the controller's device, -log p and entropy [n] with gradient.

    The entropy is that of all decisions given the ones before, and carries no gradient.
    """

    normal: Tensor
    reduce: Tensor
    neg_log_prob: Tensor
    entropy: Tensor

    def cells(self) -> list[MicroCells]:
        """The architectures; reads the device once."""
        rows = torch.cat([self.normal, self.reduce], 1).tolist()
        half = self.normal.shape[1]
        return [MicroCells(tuple(row[:half]), tuple(row[half:])) for row in rows]


def inverse_cdf(uniform: Tensor) -> Choose:
    """Choose by numbers [n, decisions] in [0, 1): the first option whose cumulated probability exceeds the number."""

    def choose(logits: Tensor, decision: int) -> Tensor:
        cumulated = logits.softmax(1).cumsum(1)
        chosen = (uniform[:, decision : decision + 1].to(cumulated) >= cumulated).sum(1)
        return chosen.clamp_max(logits.shape[1] - 1)  # a sum of probabilities may end just below 1

    return choose


def greedy(logits: Tensor, decision: int) -> Tensor:
    """Choose the likeliest option; ties go to the lower index."""
    return logits.argmax(1)


def given(cells: list[MicroCells], device: torch.device | str = "cpu") -> Choose:
    """Choose what makes these architectures, one a row, for their probabilities."""
    rows = []
    for one in cells:
        blocks = [*one.cell(False), *one.cell(True)]
        rows.append([value for x, x_op, y, y_op in blocks for value in (x, y, x_op, y_op)])
    wanted = torch.tensor(rows, device=device)
    return lambda logits, decision: wanted[:, decision]


def max_entropy(blocks: int) -> float:
    """Entropy in nats of uniform decisions, both cells."""
    return 2 * sum(2 * math.log(block + 2) + 2 * math.log(OPERATIONS) for block in range(blocks))


class Controller(nn.Module):
    """The LSTM with its attention over earlier nodes and its embeddings of operations."""

    def __init__(self, settings: ControllerSettings) -> None:
        super().__init__()
        self.settings = settings
        h = settings.hidden
        self.lstm = _uniform(2 * h, 4 * h)  # [x, h] to the gates i, f, o, g
        self.start = _uniform(1, h)
        self.embedding = _uniform(OPERATIONS, h)
        self.op_weight, self.op_bias = _uniform(h, OPERATIONS), nn.Parameter(torch.tensor([_START_BIAS]))
        self.key, self.query, self.score = _uniform(h, h), _uniform(h, h), _uniform(h, 1)
        self.register_buffer("normal_bias", torch.tensor(_NORMAL_BIAS), persistent=False)

    @property
    def decisions(self) -> int:
        """Decisions of one architecture: four for each block of both cells."""
        return 8 * self.settings.blocks

    def forward(self, n: int, choose: Choose) -> Sample:
        """Write n architectures, each decision by `choose`."""
        zeros = self.start.new_zeros(n, self.settings.hidden)
        writing = _Writing(self, choose, n, zeros, zeros)
        normal = writing.cell(self.normal_bias)
        reduce = writing.cell(None)  # goes on from the state that the normal cell left
        return Sample(normal, reduce, torch.stack(writing.costs).sum(0), torch.stack(writing.entropies).sum(0))

    @torch.no_grad()
    def draw(self, uniform: Tensor) -> list[MicroCells]:
        """Architectures by numbers [n, decisions] in [0, 1), without gradients."""
        return self(len(uniform), inverse_cdf(uniform.to(self.start.device))).cells()


class _Writing:
    """One run of the controller: the LSTM's state, and what the decisions cost so far."""

    def __init__(self, controller: Controller, choose: Choose, n: int, c: Tensor, h: Tensor) -> None:
        self.controller, self.choose, self.n, self.c, self.h = controller, choose, n, c, h
        self.costs: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def cell(self, bias: Tensor | None) -> Tensor:
        """The integers of one cell, [n, 4 B]; `bias` is added to the operations' logits."""
        controller = self.controller
        start = controller.start.expand(self.n, -1)
        anchors, keys = [], []
        for _ in range(2):
            anchors.append(torch.zeros_like(self.step(start)))
            keys.append(self.h @ controller.key)
        blocks = []
        for _ in range(controller.settings.blocks):
            x = start
            nodes = []
            for _ in range(2):
                node = self.decide(self.index_logits(self.step(x), keys))
                x = torch.stack(anchors, 1)[torch.arange(self.n, device=node.device), node]
                nodes.append(node)
            operations = []
            for _ in range(2):
                operation = self.decide(self.operation_logits(self.step(x), bias))
                x = controller.embedding[operation]
                operations.append(operation)
            anchors.append(self.step(x))
            keys.append(self.h @ controller.key)
            blocks += [nodes[0], operations[0], nodes[1], operations[1]]
        return torch.stack(blocks, 1)

    def step(self, x: Tensor) -> Tensor:
        """One step of the LSTM on x [n, h]; its new output."""
        i, f, o, g = (torch.cat([x, self.h], 1) @ self.controller.lstm).chunk(4, 1)
        self.c = i.sigmoid() * g.tanh() + f.sigmoid() * self.c
        self.h = o.sigmoid() * self.c.tanh()
        return self.h

    def index_logits(self, h: Tensor, keys: list[Tensor]) -> Tensor:
        """Logits [n, nodes so far] by attention."""
        settings, controller = self.controller.settings, self.controller
        logits = ((torch.stack(keys, 1) + (h @ controller.query).unsqueeze(1)).tanh() @ controller.score).squeeze(2)
        return _shaped(logits, settings.temperature, settings.tanh_constant)

    def operation_logits(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [n, operations]."""
        settings, controller = self.controller.settings, self.controller
        logits = h @ controller.op_weight + controller.op_bias
        reduced = None if settings.tanh_constant is None else settings.tanh_constant / settings.op_tanh_reduce
        logits = _shaped(logits, settings.temperature, reduced)
        return logits if bias is None else logits + bias

    def decide(self, logits: Tensor) -> Tensor:
        """Choose an option of each row, and note -log p and the entropy."""
        chosen = self.choose(logits.detach(), len(self.costs))
        logs = logits.log_softmax(1)
        self.costs.append(-logs.gather(1, chosen[:, None]).squeeze(1))
        with torch.no_grad():
            self.entropies.append(-(logs.exp() * logs).sum(1))
        return chosen


def _shaped(logits: Tensor, temperature: float | None, tanh_constant: float | None) -> Tensor:
    logits = logits if temperature is None else logits / temperature
    return logits if tanh_constant is None else tanh_constant * logits.tanh()


def _uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-_INIT, _INIT))
