# SPDX-License-Identifier: Apache-2.0
"""Streams: every batch a function of its address, each image in its turn, augmented as the set's info says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import DatasetInfo, Split, Stream, evaluation_batches

ROOT = Path(__file__).resolve().parents[2]


def numbered(count: int, *, flip: bool = False, pad: int = 1, size: int = 8) -> tuple[Split, DatasetInfo]:
    """Images that can be told apart, and labels that number them."""
    images = torch.randint(
        1, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    names = tuple(str(i) for i in range(count))
    return Split(images, torch.arange(count)), DatasetInfo("n", count, 3, size, names, mean, std, flip, pad)


def stream(count: int = 50, **changes: Any) -> Stream:
    split, info = numbered(count, flip=changes.pop("flip", True), pad=changes.pop("pad", 1))
    return Stream(split, info, **{"batch_size": 8, "seed": 3, "name": "train", "augment": True, "cutout": 4, **changes})


def epoch_of(source: Stream, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (source.batch(epoch, step) for step in range(source.steps_per_epoch))


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_batch_depends_only_on_its_address() -> None:
    straight = [stream().batch(epoch, step) for epoch in range(3) for step in range(6)]
    one = stream()
    backwards = [one.batch(epoch, step) for epoch in reversed(range(3)) for step in reversed(range(6))]
    torch.manual_seed(99)  # the global generator takes no part
    again = [one.batch(epoch, step) for epoch in range(3) for step in range(6)]
    assert all(same(a, b) for a, b in zip(straight, reversed(backwards), strict=True))
    assert all(same(a, b) for a, b in zip(straight, again, strict=True))


def test_a_batch_is_the_same_in_another_process_with_other_threads() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(2)\n"
        "from tests.data.test_streams import stream\n"
        "x, y = stream().batch(2, 3); print(y.tolist(), x.double().sum().item().hex(), x.abs().max().item().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    x, y = stream().batch(2, 3)
    assert done.stdout.strip() == f"{y.tolist()} {x.double().sum().item().hex()} {x.abs().max().item().hex()}"


@pytest.mark.parametrize("change", [{"seed": 4}, {"name": "valid"}])
def test_seed_name_and_epoch_each_change_the_order(change: dict[str, Any]) -> None:
    base = torch.cat([y for _, y in epoch_of(stream(), 0)])
    assert not torch.equal(base, torch.cat([y for _, y in epoch_of(stream(**change), 0)]))
    assert not torch.equal(base, torch.cat([y for _, y in epoch_of(stream(), 1)]))


def test_cutout_and_augmentation_leave_the_order_alone() -> None:
    orders = [
        torch.cat([y for _, y in epoch_of(stream(augment=augment, cutout=cutout), 5)])
        for augment, cutout in ((True, 4), (False, 4), (True, None), (False, 0))
    ]
    assert all(torch.equal(orders[0], order) for order in orders[1:])


@pytest.mark.parametrize(("drop_last", "steps", "seen"), [(True, 6, 48), (False, 7, 50)])
def test_an_epoch_holds_each_image_at_most_once(drop_last: bool, steps: int, seen: int) -> None:
    source = stream(drop_last=drop_last)
    assert source.steps_per_epoch == steps and source.notes == ()
    labels = torch.cat([y for _, y in epoch_of(source, 1)])
    assert len(labels) == seen == len(labels.unique())


def test_a_filled_last_batch_begins_a_second_order() -> None:
    source = stream(fill_last=True)
    assert source.steps_per_epoch == 7 and source.notes == ()
    batches = list(epoch_of(source, 1))
    assert {len(y) for _, y in batches} == {8}
    counts = torch.bincount(torch.cat([y for _, y in batches]), minlength=50)
    assert counts.sum() == 56 and counts.min() == 1 and counts.max() == 2
    dropped = epoch_of(stream(), 1)  # the order before it is what it is without
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(batches, dropped, strict=False))


def test_indices_choose_the_part() -> None:
    part = torch.arange(1, 50, 2)
    source = stream(indices=part, drop_last=False)
    assert torch.equal(torch.cat([y for _, y in epoch_of(source, 0)]).sort().values, part)


def test_fewer_images_than_a_batch_wrap_around_and_say_so() -> None:
    source = stream(3)
    assert source.steps_per_epoch == 1
    assert "3 images" in source.notes[0] and "wraps" in source.notes[0]
    x, y = source.batch(0, 0)
    assert len(x) == 8 and sorted(torch.bincount(y).tolist()) == [2, 3, 3]
    whole = stream(3, drop_last=False)
    assert len(whole.batch(0, 0)[0]) == 3 and whole.notes == ()


def test_a_cutout_as_large_as_the_images_is_said() -> None:
    assert "--cutout-length 8" in stream(cutout=8).notes[0] and stream(cutout=7).notes == ()


def test_without_augmentation_a_stream_only_normalises() -> None:
    split, info = numbered(50)
    source = stream(augment=False, cutout=None)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    for x, y in epoch_of(source, 0):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        torch.testing.assert_close(x, (split.images[y] / 255 - mean) / std)


@pytest.mark.parametrize("flip", [True, False])
def test_every_crop_and_mirror_is_reached_and_no_other(flip: bool) -> None:
    split, info = numbered(50, flip=flip)
    source = stream(cutout=None, flip=flip)
    black = -torch.tensor(info.mean) / torch.tensor(info.std)
    padded = torch.nn.functional.pad(split.images, (1, 1, 1, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    views = {}
    for top in range(3):
        for left in range(3):
            view = (padded[:, :, top : top + 8, left : left + 8] / 255 - mean) / std
            views[top, left, False], views[top, left, True] = view, view.flip(3)
    seen: dict[tuple[int, int, bool], int] = {}
    for epoch in range(8):
        for x, y in epoch_of(source, epoch):
            for image, label in zip(x, y.tolist(), strict=True):
                hits = [key for key, view in views.items() if torch.allclose(image, view[label], atol=1e-5)]
                assert len(hits) == 1
                seen[hits[0]] = seen.get(hits[0], 0) + 1
    assert len(seen) == (18 if flip else 9) and min(seen.values()) >= 5
    assert torch.allclose(source.batch(0, 0)[0].amin(dim=(0, 2, 3)), black, atol=1e-5)


def test_cutout_comes_after_normalisation_with_centres_anywhere() -> None:
    source = stream(augment=False, cutout=4)
    sizes = [int((image == 0).all(0).sum()) for epoch in range(20) for x, _ in epoch_of(source, epoch) for image in x]
    # 4 x 4 inside; the smallest hole is left by a centre in the upper left corner (2 x 2)
    assert min(sizes) == 4 and max(sizes) == 16
    x, _ = source.batch(0, 0)
    assert bool((x == 0).any())


def test_evaluation_goes_through_all_in_order_and_keeps_the_rest() -> None:
    split, info = numbered(21)
    batches = list(evaluation_batches(split, info, 8, "cpu"))
    assert [len(y) for _, y in batches] == [8, 8, 5]
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), (split.images / 255 - mean) / std)
    part = torch.tensor([20, 3, 5])
    assert torch.cat([y for _, y in evaluation_batches(split, info, 2, "cpu", indices=part)]).tolist() == [20, 3, 5]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="--batch-size 0"):
        stream(batch_size=0)
    with pytest.raises(ValueError, match="--cutout-length -1"):
        stream(cutout=-1)
    with pytest.raises(ValueError, match="no images"):
        stream(indices=torch.empty(0, dtype=torch.int64))
    with pytest.raises(IndexError, match="step 6"):
        stream().batch(0, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_picks_and_augments_the_same_images() -> None:
    for cpu, gpu in zip(epoch_of(stream(), 1), epoch_of(stream(device="cuda"), 1), strict=True):
        assert torch.equal(cpu[1], gpu[1].cpu())
        torch.testing.assert_close(cpu[0], gpu[0].cpu(), atol=1e-6, rtol=1e-6)
