# SPDX-License-Identifier: Apache-2.0
"""Two samples of a training set (--search-fraction): shares of every class, disjoint, by seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import sample_parts


def counts(labels: torch.Tensor, part: torch.Tensor, classes: int) -> list[int]:
    return torch.bincount(labels[part], minlength=classes).tolist()


def test_shares_of_every_class_as_pc_darts_takes_them() -> None:
    labels = torch.arange(1000).repeat(120)  # 120 images of each of 1000 classes, in turn
    train, valid = sample_parts(labels, (0.1, 0.025), 2)
    assert counts(labels, train, 1000) == [12] * 1000 and counts(labels, valid, 1000) == [3] * 1000
    assert not set(train.tolist()) & set(valid.tolist())
    assert train.equal(train.sort().values) and train.dtype == torch.int64
    again = sample_parts(labels, (0.1, 0.025), 2)
    assert train.equal(again[0]) and valid.equal(again[1])
    assert not train.equal(sample_parts(labels, (0.1, 0.025), 3)[0])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    shares=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).filter(lambda s: sum(s) <= 1),
    seed=st.integers(0, 5),
)
def test_every_class_is_in_both_parts(sizes: list[int], shares: tuple[float, float], seed: int) -> None:
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    train, valid = sample_parts(labels, shares, seed)
    assert not set(train.tolist()) & set(valid.tolist())
    for size, one, other in zip(sizes, counts(labels, train, 6), counts(labels, valid, 6), strict=False):
        assert one >= 1 and other >= 1 and one + other <= size
        assert abs(one - shares[0] * size) <= 1 and abs(other - shares[1] * size) <= 1


@pytest.mark.parametrize("shares", [(0.6, 0.5), (0.0, 0.5), (0.5, 0.0)])
def test_shares_that_cannot_be(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="--search-fraction"):
        sample_parts(torch.arange(4).repeat(5), shares, 0)


def test_a_class_of_one_image_is_named() -> None:
    with pytest.raises(ValueError, match="class 2 has a single image"):
        sample_parts(torch.tensor([0, 0, 1, 1, 2]), (0.5, 0.5), 0)
