# SPDX-License-Identifier: Apache-2.0
"""The quick count of an architecture's BitOps against the count of the network itself."""

from __future__ import annotations

import pytest
import torch

from common.cost import architecture_cost
from common.nets import Architecture
from common.nets.enas_space import SPACE, random_cells
from enas.cost import NetworkSize, cells_bitops


@pytest.mark.parametrize("layer_bits", [None, ["binary"], ["float"], ["4", "ternary", "binary", "8", "float"]])
def test_equals_the_network(layer_bits: list[str] | None) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        cells = random_cells(4, generator)
        size = NetworkSize(3, 10, 4, 2, 16, layer_bits)
        truth = architecture_cost(
            Architecture(cells, space=SPACE),
            16,
            in_channels=3,
            num_classes=10,
            out_filters=4,
            layers=2,
            image_size=16,
            layer_bits=layer_bits,
        )
        assert cells_bitops(cells, size) == truth.bitops
