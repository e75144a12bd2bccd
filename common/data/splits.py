# SPDX-License-Identifier: Apache-2.0
"""Cutting a training set in two: disjoint, exhaustive, every class in its share, a function of labels and seed."""

from __future__ import annotations

import torch
from torch import Tensor

from common.data._seeds import generator


def split_search(labels: Tensor, portion: float, seed: int, subset: float = 1.0) -> tuple[Tensor, Tensor]:
    """(train indices, validation indices) of a search: floor(portion x N) images train weights, the rest alphas.

    labels: int64 [N]. Both results are sorted int64 tensors on the CPU. DARTS (arXiv 1806.09055) cuts a training set
    in halves the same way; here each class is cut by the same share. `subset`: the share of all images, of each class
    alike, that is looked at in the first place. Raises ValueError (--train-portion) when a part would be empty.
    """
    if subset < 1:
        kept = take_subset(labels, subset, seed)
        train, valid = split_search(labels.cpu()[kept], portion, seed)
        return kept[train], kept[valid]
    count = int(portion * len(labels) + 1e-9) if 0 < portion < 1 else 0
    if not 0 < count < len(labels):
        raise ValueError(
            f"--train-portion {portion}: must leave images on both sides of the split of {len(labels)}; "
            "give a share between 0 and 1, such as 0.5"
        )
    return _cut(labels, count, seed, "search")


def sample_parts(labels: Tensor, fractions: tuple[float, float], seed: int) -> tuple[Tensor, Tensor]:
    """(train indices, validation indices) of a search on two samples: these shares of every class, one image at least.

    labels: int64 [N]. Both results are sorted int64 tensors on the CPU, disjoint, and the rest is left out. PC-DARTS
    (arXiv 1907.05737, section 4.4) takes 10% and 2.5% of ImageNet. Raises ValueError (--search-fraction) when the
    shares add up to more than all, or a class has a single image.
    """
    train, valid = fractions
    if not (train > 0 and valid > 0 and train + valid <= 1 + 1e-9):
        raise ValueError(f"--search-fraction {train} {valid}: give two shares above 0 that add up to at most 1")
    labels = labels.cpu()
    sizes = torch.bincount(labels)
    small = ((sizes > 0) & (sizes < 2)).nonzero().flatten().tolist()
    if small:
        raise ValueError(f"--search-fraction: class {small[0]} has a single image; both parts need one of every class")
    first = (sizes * train).round().long().clamp_(min=1)
    second = (sizes * valid).round().long().clamp_(min=1)
    # Where rounding asks for more than there is, the larger share gives way.
    first, second = torch.minimum(first, sizes - 1), torch.minimum(second, sizes - torch.minimum(first, sizes - 1))
    ranks = _ranks(labels, torch.randperm(len(labels), generator=generator(seed, "split", "search parts")))
    first, second = first[labels], second[labels]
    parts = (ranks < first).nonzero().flatten(), ((ranks >= first) & (ranks < first + second)).nonzero().flatten()
    return check_disjoint(*parts, len(labels))


def take_subset(labels: Tensor, share: float, seed: int) -> Tensor:
    """Sorted int64 indices of round(share x N) images, the same share of each class, of labels int64 [N]."""
    return _cut(labels, round(share * len(labels)), seed, "subset")[0]


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(kept indices, held-out indices): round(fraction x N) images, the same share of each class, are held out.

    labels: int64 [N]. Both results are sorted int64 tensors on the CPU. Raises ValueError
    (--val-fraction) when a part would be empty.
    """
    count = round(fraction * len(labels)) if 0 < fraction < 1 else 0
    if not 0 < count < len(labels):
        raise ValueError(
            f"--val-fraction {fraction}: must leave images on both sides of the split of "
            f"{len(labels)}; give a share between 0 and 1, such as 0.1"
        )
    held, kept = _cut(labels, count, seed, "hold-out")
    return kept, held


def stratified(labels: Tensor, count: int, order: Tensor) -> Tensor:
    """A boolean mask [N] of `count` chosen images, each class in proportion, the first of each class in `order`.

    Quotas are rounded by largest remainder (ties: the lower class first), so that they add up to `count` exactly.
    """
    sizes = torch.bincount(labels)
    total = len(labels)
    quotas = [size * count // total for size in sizes.tolist()]
    remainders = sorted(range(len(sizes)), key=lambda c: (-(int(sizes[c]) * count % total), c))
    for label in remainders[: count - sum(quotas)]:
        quotas[label] += 1
    return _ranks(labels, order) < torch.tensor(quotas)[labels]


def _ranks(labels: Tensor, order: Tensor) -> Tensor:
    """int64 [N]: how many images of its own class come before each image in `order`."""
    sizes = torch.bincount(labels)
    # A stable sort by class keeps `order` within each class; an image's rank is its distance from the class's start.
    by_class = order[torch.argsort(labels[order], stable=True)]
    starts = torch.cumsum(sizes, 0) - sizes
    ranks = torch.empty_like(by_class)
    ranks[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return ranks


def _cut(labels: Tensor, count: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator(seed, "split", purpose))
    chosen = stratified(labels, count, order)
    return check_disjoint(chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1), len(labels))


def check_disjoint(one: Tensor, other: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both parts (int64 indices of `count` images) themselves, when no image is in both, or twice in one.

    A search whose architecture is trained on images that train its weights would still look like one, so this is
    checked, although both parts are cut from one order. Raises ValueError with the number of shared images.
    """
    seen = torch.bincount(torch.cat([one, other]), minlength=count)
    if len(seen) > count or int(seen.max()) > 1:
        raise ValueError(
            f"two parts of the training set overlap: {int((seen > 1).sum())} of {count} images are in both; this is a "
            "defect of the split, please report it with the data set, the seed and the flags"
        )
    return one, other
