# SPDX-License-Identifier: Apache-2.0
"""torch's SGD and Adam, quick to start.

torch keeps its compiler away from its optimisers by importing it in their first call, which takes more than a second
of every start. Nothing here compiles an optimiser, so these two classes call what lies under those wrappers; the
updates are torch's own, and where a release wraps nothing the classes change nothing.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer


class Quick(Optimizer):
    """The base of optimisers that do not go through those wrappers."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class SGD(Quick, torch.optim.SGD):
    """torch.optim.SGD."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Adam(Quick, torch.optim.Adam):
    """torch.optim.Adam."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
