# SPDX-License-Identifier: Apache-2.0
"""Discretisation against the oracle (ties and a dominant `none` too), image sizes, the place of reductions."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from common.nets import darts_space
from genotypes import PRIMITIVES

CASES = ["seed0_scale1", "seed0_scale0.001", "seed1_scale1", "seed1_scale0.001", "all_zero_ties", "none_dominant_seed7"]


def oracle_logits(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alphas_normal, alphas_reduce, betas_normal, betas_reduce of a parse oracle (float32, drawn as its note says)."""
    if case == "all_zero_ties":
        return torch.zeros(14, 8), torch.zeros(14, 8), torch.zeros(14), torch.zeros(14)
    if case == "none_dominant_seed7":
        values = numpy.random.RandomState(7).randn(14, 8)
        values[:, 0] += 10
        alphas = torch.tensor(values, dtype=torch.float32)
        return alphas, alphas.clone(), torch.zeros(14), torch.zeros(14)
    seed, scale = case.removeprefix("seed").split("_scale")
    state = numpy.random.RandomState(int(seed))
    draws = [state.randn(14, 8), state.randn(14, 8), state.randn(14), state.randn(14)]
    return tuple(torch.tensor(float(scale) * d, dtype=torch.float32) for d in draws)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["darts", "pcdarts"])
def test_parse_equals_the_oracle(oracle: Any, method: str, case: str) -> None:
    truth = oracle(f"super_{method}_params_genotypes")["results"]["genotype_parse"][case]
    alphas_normal, alphas_reduce, betas_normal, betas_reduce = oracle_logits(case)
    betas = (betas_normal, betas_reduce) if method == "pcdarts" else (None, None)
    found = darts_space.read_genotype(alphas_normal, alphas_reduce, *betas)
    assert [list(pair) for pair in found.normal] == truth["normal"]
    assert [list(pair) for pair in found.reduce] == truth["reduce"]
    assert list(found.normal_concat) == list(found.reduce_concat) == truth["concat"]


def test_none_is_never_chosen_and_every_node_reads_two_states() -> None:
    generator = torch.Generator().manual_seed(0)
    for nodes, multiplier in ((1, 1), (2, 1), (3, 3), (4, 4), (5, 2)):
        edges = sum(2 + n for n in range(nodes))
        alphas = [torch.randn(edges, 8, generator=generator) for _ in range(2)]
        alphas[0][:, 0] += 100
        found = darts_space.read_genotype(*alphas, nodes=nodes, multiplier=multiplier)
        for pairs, concat in ((found.normal, found.normal_concat), (found.reduce, found.reduce_concat)):
            assert len(pairs) == 2 * nodes and len(concat) == multiplier and max(concat) == nodes + 1
            for node in range(nodes):
                first, second = pairs[2 * node : 2 * node + 2]
                assert first[1] != second[1] and max(first[1], second[1]) < node + 2
            assert all(name in PRIMITIVES and name != "none" for name, _ in pairs)


@pytest.mark.parametrize("layers, places", [(3, (1, 2)), (8, (2, 5)), (14, (4, 9)), (20, (6, 13)), (6, (2, 4))])
def test_reductions_stand_at_thirds(layers: int, places: tuple[int, ...]) -> None:
    plans = darts_space.plan_cells(layers, 16, "cifar")
    assert tuple(p.index for p in plans if p.reduction) == places
    assert [p.channels for p in plans] == [16 * 2 ** sum(p.index >= place for place in places) for p in plans]


@pytest.mark.parametrize(
    "stem, size", [("cifar", 30), ("cifar", 33), ("cifar", 4), ("imagenet", 112), ("imagenet", 225)]
)
def test_sizes_that_do_not_fit_are_refused(stem: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"image-size.*{size}"):
        darts_space.check_image_size(size, stem)


@pytest.mark.parametrize(
    "stem, size", [("cifar", 8), ("cifar", 28), ("cifar", 32), ("imagenet", 224), ("imagenet", 96)]
)
def test_sizes_that_fit(stem: str, size: int) -> None:
    darts_space.check_image_size(size, stem)
