# SPDX-License-Identifier: Apache-2.0
"""ImageNet from image files: pixels against PIL, order and crops as functions of the address, errors, threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop as Published

from common.data import ImageData, StreamedBatches, evaluation_batches, load, open_stream
from common.data.imagenet import decode, random_box
from common.data.order import Order
from tests.helpers.photographs import CLASSES, make_folder

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    left = [thread for thread in threading.enumerate() if thread.name.startswith(("batches-ahead", "decode"))]
    for thread in left:
        thread.join(2)
    assert not [thread for thread in left if thread.is_alive()]


def opened(folder: Path, workers: int = 2, **more: object) -> ImageData:
    return load("imagenet", root=folder, workers=workers, say=lambda _: None, **{"image_size": 32, **more})


def stream(data: ImageData, batch_size: int = 4, seed: int = 0, **more: object) -> StreamedBatches:
    made = open_stream(data.train, data.info, batch_size=batch_size, seed=seed, name="train", augment=True, **more)
    assert isinstance(made, StreamedBatches)
    return made


def pixels(x: Tensor) -> Tensor:
    """What a normalised batch was in 0..255."""
    return (x * STD.view(1, 3, 1, 1) + MEAN.view(1, 3, 1, 1)) * 255


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_what_is_known_before_anything_is_decoded(folder: Path) -> None:
    data = load("ImageNet", root=folder, say=lambda _: None)
    info = data.info
    assert (info.name, info.num_classes, info.classes, info.image_size) == ("imagenet", 3, CLASSES, 224)
    assert (len(data.train), len(data.test)) == (15, 9)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.to("meta").train is data.train


def test_every_kind_of_file_decodes_as_pil_does(folder: Path) -> None:
    kinds = set()
    for name in CLASSES:
        for i in range(2):
            path = folder / "train" / name / f"{i}.JPEG"
            with Image.open(path) as image:
                kinds.add((image.format, image.mode))
                wanted = np.asarray(image.convert("RGB")).astype(int)
            found = decode(path).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(found - wanted).max() <= 2
    assert kinds == {("JPEG", "L"), ("JPEG", "CMYK"), ("JPEG", "RGB"), ("PNG", "RGB")}


def test_evaluation_shows_the_centre(folder: Path) -> None:
    data = opened(folder)
    x = pixels(torch.cat([x for x, _ in evaluation_batches(data.test, data.info, 4, "cpu")]))
    assert x.shape == (9, 3, 32, 32)
    for index, path in enumerate(sorted((folder / "val").rglob("*.JPEG"))):
        with Image.open(path) as image:
            side = int(min(image.size) * 224 / 256)
            left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            wanted = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        difference = (x[index] - torch.from_numpy(wanted.copy())).abs()
        assert difference.max() <= 3 and difference.mean() < 0.5, path


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_takes_every_image_once_whatever_the_ranks(folder: Path, ranks: int) -> None:
    data = opened(folder, workers=1)
    whole = next(iter(evaluation_batches(data.test, data.info, 9, "cpu")))
    for rank in range(ranks):
        parts = list(evaluation_batches(data.test, data.info, 2, "cpu", rank=rank, ranks=ranks))
        for (x, y), images, labels in zip(
            parts, whole[0].split(2)[rank::ranks], whole[1].split(2)[rank::ranks], strict=True
        ):
            assert torch.equal(x, images) and torch.equal(y, labels)


def test_a_rank_without_images_has_no_batch(folder: Path) -> None:
    """Of fewer batches than ranks, some ranks have none: not an empty one, which no network takes."""
    data = opened(folder)
    assert not list(evaluation_batches(data.test, data.info, 64, "cpu", rank=1, ranks=2))


def test_batches_do_not_depend_on_the_workers_nor_on_what_was_asked_before(folder: Path) -> None:
    data = opened(folder, workers=0)
    first = stream(data)
    addresses = [(epoch, step) for epoch in (0, 1) for step in range(first.steps_per_epoch)]
    wanted = [first.batch(*address) for address in addresses]
    for workers in (1, 3):
        other = stream(opened(folder, workers=workers))
        assert all(same(other.batch(*at), batch) for at, batch in zip(addresses, wanted, strict=True))
    for address in ((1, 1), (0, 2), (1, 0)):  # backwards, as a resume may ask
        assert same(first.batch(*address), wanted[addresses.index(address)])
    assert not same(stream(data, seed=1).batch(0, 0), wanted[0])
    with pytest.raises(IndexError, match="step 3"):
        first.batch(0, 3)


def test_an_epoch_has_every_image_once_whatever_the_ranks(folder: Path) -> None:
    data = opened(folder, workers=1, image_size=8)
    alone = stream(data, batch_size=4)
    together = [stream(data, batch_size=2, rank=rank, ranks=2) for rank in range(2)]
    assert alone.steps_per_epoch == together[0].steps_per_epoch == 3
    for step in range(3):
        parts = [part.batch(5, step) for part in together]
        assert same(alone.batch(5, step), (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])))
    exact = open_stream(data.train, data.info, batch_size=5, seed=0, name="t", augment=False)
    seen = torch.cat([exact.batch(0, step)[0] for step in range(3)])
    every = torch.cat([x for x, _ in evaluation_batches(data.train, data.info, 15, "cpu")])
    distance = torch.cdist(seen.flatten(1), every.flatten(1))
    assert sorted(distance.argmin(1).tolist()) == list(range(15)) and distance.min(1).values.max() == 0


def test_a_shortened_epoch_goes_on_with_the_next(folder: Path) -> None:
    data = opened(folder, image_size=8)
    whole, short = stream(data), stream(data).shorten(2)
    assert short.steps_per_epoch == 2
    for address in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert same(short.batch(*address), whole.batch(*address))


def test_a_stream_of_fewer_images_than_a_batch_wraps_around_and_says_so(folder: Path) -> None:
    data = opened(folder, image_size=8)
    small = stream(data, batch_size=8, indices=torch.tensor([1, 7, 12]))
    _, labels = small.batch(0, 0)
    assert torch.bincount(labels).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert small.notes == ("the train stream has 3 images, fewer than one batch of 8: it wraps around",)


def test_random_boxes_follow_the_published_rule() -> None:
    order = Order(torch.arange(2000), batch_size=1, seed=3, name="boxes")
    height, width = 300, 400
    areas, shapes, flips = [], [], 0
    for position in range(2000):
        (top, left, h, w), flip = random_box(order, 0, position, height, width)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        areas.append(h * w / (height * width))
        shapes.append(math.log(w / h))
        flips += flip
    published = [Published.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        wanted_area = np.quantile([h * w / (height * width) for _, _, h, w in published], share)
        assert np.quantile(areas, share) == pytest.approx(wanted_area, abs=0.04)
        wanted_shape = np.quantile([math.log(w / h) for _, _, h, w in published], share)
        assert np.quantile(shapes, share) == pytest.approx(wanted_shape, abs=0.04)
    assert flips == pytest.approx(1000, abs=100)
    for height, width, wanted in ((400, 20, (186, 0, 27, 20)), (20, 400, (0, 186, 20, 27))):
        # No crop of a permitted shape fits: the middle, as wide or as high as is permitted.
        boxes = {random_box(order, 1, position, height, width)[0] for position in range(200)}
        assert wanted in boxes


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_with_its_index(
    tmp_path: Path, damage: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the look at the start did not meet."""
    monkeypatch.setattr("common.data.imagenet.LOOKED_AT", 0)
    root = make_folder(tmp_path, train=4, val=1)
    path = root / "train" / "n02" / "2.JPEG"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[damage])
    data = opened(root, workers=workers)
    with pytest.raises(ValueError, match=r"n02/2\.JPEG \(image 6\): cannot be read as an image"):
        for step in range(3):
            stream(data, batch_size=4).batch(0, step)


def test_only_the_first_classes(folder: Path) -> None:
    data = opened(folder, classes=2)
    assert (data.info.num_classes, data.info.classes, len(data.train), len(data.test)) == (2, CLASSES[:2], 10, 6)
    whole = opened(folder)
    few, all_of_it = (next(iter(evaluation_batches(d.test, d.info, 6, "cpu"))) for d in (data, whole))
    assert same(few, all_of_it)
    with pytest.raises(ValueError, match="--classes 4: imagenet has 3"):
        opened(folder, classes=4)


def test_cutout_blanks_a_square(folder: Path) -> None:
    data = opened(folder)
    plain, cut = stream(data).batch(0, 1)[0], stream(data, cutout=8).batch(0, 1)[0]
    blank = cut == 0
    assert blank.any(dim=(1, 2, 3)).all() and blank.sum() <= 4 * 3 * 64 and torch.equal(cut[~blank], plain[~blank])


def test_a_stream_that_nobody_holds_ends_its_threads(folder: Path) -> None:
    held = stream(opened(folder))
    held.batch(0, 0)
    assert any(thread.name == "batches-ahead" for thread in threading.enumerate())
    del held  # the fixture waits for the threads


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=r"--dataset imagenet: give --data DIR.*or --trainfile"):
        load("imagenet")
    with pytest.raises(ValueError, match="--trainfile: .ffcv files are read as --dataset imagenet, not cifar10"):
        load("cifar10", trainfile=Path("a"), valfile=Path("b"))
