# SPDX-License-Identifier: Apache-2.0
"""One door to the networks of every search space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.nets.architecture import DARTS, Architecture
from common.nets.enas_space import SPACE, MicroNetwork, build_micro_network
from common.nets.network import Network, build_network

EvaluationNetwork = Network | MicroNetwork
"""A network of chosen cells, of any space: logits and auxiliary logits, `check_input`, `auxiliary_parameters`."""


def _build_micro(architecture: Architecture, **build: Any) -> MicroNetwork:
    return build_micro_network(architecture.genotype, **build)


NETWORKS: dict[str, Callable[..., EvaluationNetwork]] = {DARTS: build_network, SPACE: _build_micro}
"""Space -> what builds a network from one of its architectures."""


def network_of(architecture: Architecture, **build: Any) -> EvaluationNetwork:
    """The network of an architecture; `build` are the arguments that its space's own builder takes."""
    return NETWORKS[architecture.space](architecture, **build)
