# SPDX-License-Identifier: Apache-2.0
"""A user's folder of images: found, decoded, cropped; every flaw refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import folder as folder_module
from common.data import load


def write(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, PNG and JPEG, grey and colour, three sizes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                shape = [(12, 20, 3), (16, 16, 3), (30, 14)][i]
                suffix = "png" if i != 1 else "jpg"
                write(tmp_path / part / name / f"{i}.{suffix}", random.integers(0, 256, shape, dtype=np.uint8))
    return tmp_path


def quiet(_: str) -> None:
    pass


def test_what_is_found(images: Path) -> None:
    said: list[str] = []
    data = load("folder", root=images, say=said.append)
    assert data.info.classes == ("ant", "bee") and data.info.num_classes == 2
    assert data.info.image_size == 12 and any("12 pixels" in text for text in said)
    assert data.train.images.shape == (6, 3, 12, 12) and data.test.images.shape == (4, 3, 12, 12)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.info.flip and data.info.pad == 4 and data.info.mean == (0.485, 0.456, 0.406)


def test_pixels_are_those_of_the_centre_square(images: Path) -> None:
    from PIL import Image

    data = load("folder", root=images, say=quiet)
    original = np.asarray(Image.open(images / "train" / "ant" / "0.png"))
    assert np.array_equal(data.train.images[0].numpy(), original[:, 4:16].transpose(2, 0, 1))
    grey = data.train.images[2]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_image_size_scales_the_whole_square(images: Path) -> None:
    from torchvision.transforms.v2 import functional

    data = load("folder", root=images, image_size=8, say=quiet)
    whole = load("folder", root=images, say=quiet)
    expected = functional.resize(whole.train.images[0], [8, 8], antialias=True)
    assert (data.train.images[0].int() - expected.int()).abs().max() <= 1


def test_test_is_taken_where_there_is_no_val(images: Path) -> None:
    (images / "val").rename(images / "test")
    assert len(load("folder", root=images, say=quiet).test) == 4


def test_an_unreadable_image_is_named(images: Path) -> None:
    path = images / "train" / "bee" / "1.jpg"
    whole = path.read_bytes()
    for broken in (b"not an image", whole[: len(whole) // 2], b""):
        path.write_bytes(broken)
        for size in (None, 8):
            with pytest.raises(ValueError, match=r"bee.1\.jpg: cannot be read as an image"):
                load("folder", root=images, image_size=size, say=quiet)


def test_an_empty_class_is_named(images: Path) -> None:
    (images / "train" / "cat").mkdir()
    (images / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="train: no images in class folder cat"):
        load("folder", root=images, say=quiet)


def test_differing_classes_are_listed(images: Path) -> None:
    (images / "val" / "bee").rename(images / "val" / "wasp")
    with pytest.raises(ValueError, match=r"only in .*train: bee; only in .*val: wasp"):
        load("folder", root=images, say=quiet)


def test_missing_parts_are_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data ROOT"):
        load("folder")
    with pytest.raises(ValueError, match="no such folder"):
        load("folder", root=tmp_path / "nowhere")
    (images / "val").rename(images / "elsewhere")
    with pytest.raises(ValueError, match=r"expected .*train and .*val"):
        load("folder", root=images)
    (images / "val").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"):
        load("folder", root=images)


def test_a_set_that_memory_cannot_hold_is_refused_with_what_fits(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "available_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"10 images at 32 pixels.*--image-size \(at most 16 fits\)"):
        load("folder", root=images, image_size=32)
    load("folder", root=images, image_size=16, say=quiet)


def test_available_memory_is_plausible() -> None:
    free = folder_module.available_memory()
    assert free is None or 0 < free < 2**50
