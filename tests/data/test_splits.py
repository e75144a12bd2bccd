# SPDX-License-Identifier: Apache-2.0
"""Splits are disjoint, exhaustive, stratified, and a function of labels and seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import hold_out, split_search
from common.data.splits import stratified


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.randint(7, (503,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("portion", [0.5, 0.9, 0.013])
def test_search_split(labels: torch.Tensor, portion: float) -> None:
    train, valid = split_search(labels, portion, 1)
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(503))
    assert len(train) == int(503 * portion)
    share = torch.bincount(labels[train], minlength=7) - torch.bincount(labels) * portion
    assert share.abs().max() < 1
    again, _ = split_search(labels, portion, 1)
    assert torch.equal(train, again)
    assert not torch.equal(train, split_search(labels, portion, 2)[0])


def test_a_subset_is_cut_as_the_whole_is(labels: torch.Tensor) -> None:
    train, valid = split_search(labels, 0.5, 1, subset=0.5)
    seen = torch.cat([train, valid])
    assert len(seen) == len(seen.unique()) == 252 and len(train) == 126
    for part, share in ((seen, 0.5), (train, 0.25), (valid, 0.25)):
        assert (torch.bincount(labels[part], minlength=7) - torch.bincount(labels) * share).abs().max() <= 1
    assert not torch.equal(seen, torch.cat(split_search(labels, 0.5, 2, subset=0.5)))
    assert torch.equal(torch.cat(split_search(labels, 0.5, 1, subset=1.0)), torch.cat(split_search(labels, 0.5, 1)))


def test_held_out_part_is_the_smaller_one(labels: torch.Tensor) -> None:
    kept, held = hold_out(labels, 0.1, 0)
    assert (len(kept), len(held)) == (453, 50)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(503))


@pytest.mark.parametrize("portion", [0.0, 1.0, -0.5, 1.5, 0.001, float("nan")])
def test_an_empty_part_is_refused(labels: torch.Tensor, portion: float) -> None:
    with pytest.raises(ValueError, match="--train-portion"):
        split_search(labels, portion, 0)
    if portion != 0.001:
        with pytest.raises(ValueError, match="--val-fraction"):
            hold_out(labels, portion, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_quotas_add_up_and_stay_within_one(values: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(values)
    count = data.draw(st.integers(0, len(values)))
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    chosen = stratified(labels, count, order)
    assert int(chosen.sum()) == count
    for label in set(values):
        size, got = values.count(label), int(chosen[labels == label].sum())
        assert abs(got - size * count / len(values)) < 1
        # the first of the class, in the given order
        ranked = [i for i in order.tolist() if values[i] == label]
        assert all(bool(chosen[i]) == (rank < got) for rank, i in enumerate(ranked))
