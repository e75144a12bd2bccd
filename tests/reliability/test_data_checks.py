# SPDX-License-Identifier: Apache-2.0
"""What is wrong with data is found before a run folder is made, each with an error of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import DatasetInfo, ImageData, Split, hold_out, load, sample_parts, split_search, take_subset
from common.data.images import check_own
from common.data.splits import check_disjoint
from common.engine.cli import Config
from common.recipes.parts import search_parts

OWN = """
import numpy as np

def images():
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    train, test = draw(60), draw(20)
    labels, test_labels = np.arange(60) % 3, np.arange(20) % 3
    {damage}
    return train, labels, test, test_labels
"""


def own_module(folder: Path, damage: str) -> str:
    """--data-module of three classes of 20 images each with one thing wrong (`damage`, a line of Python)."""
    (folder / "own.py").write_text(OWN.format(damage=damage or "pass"))
    return f"{folder / 'own.py'}:images"


def refused(capsys: pytest.CaptureFixture[str], save: Path, *flags: str, program: str = "qdarts.train") -> str:
    """What a program says of data that it refuses: exit code 2, one line, no traceback, no run folder."""
    main = importlib.import_module(program).main
    code = main(["--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--save", str(save), *flags])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1 and "Traceback" not in captured.err, captured.err
    assert not save.exists()
    return lines[0]


# ---- labels, classes and overlap of one's own data, by whole programs


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("labels[5] = -1", "train_labels hold -1; expected 0..K-1"),
        ("test_labels[5] = 3", "test labels run from 0 to 3; expected 0..2"),
        ("labels[labels == 1] = 0", "no training image has label 1"),
        ("labels = labels[:-1]", "60 train images but 59 train labels"),
        ("test[:] = train[:20]", "20 of 20 test images are training images too (first: test image 0)"),
        ("test[7:9] = train[50:52]", "2 of 20 test images are training images too (first: test image 7)"),
        ("test, test_labels = test[:0], test_labels[:0]", "the test split is empty"),
    ],
)
@pytest.mark.parametrize("program", ["qdarts.train", "darts.search"])
def test_own_data_are_checked_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, said: str, program: str
) -> None:
    line = refused(capsys, tmp_path / "run", "--data-module", own_module(tmp_path, damage), program=program)
    assert said in line and "--data-module" in line


def test_a_few_shared_images_are_told_and_none_are_not(tmp_path: Path) -> None:
    said: list[str] = []
    load("own", data_module=own_module(tmp_path, "test[11] = train[3]"), say=said.append)
    assert said == ["1 of 20 test images are training images too (first: test image 11)"]
    said.clear()
    load("own", data_module=own_module(tmp_path, ""), say=said.append)
    assert not said


# ---- what a user's own ImageData may have wrong


def image_data(**changes: Any) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(30) % 3
    info = DatasetInfo("own", 3, 1, 8, ("a", "b", "c"), (0.5,), (0.2,), flip=False, pad=1)
    parts = {"train": Split(images[:30], labels), "test": Split(images[30:], torch.arange(10) % 3)}
    return ImageData(info, **(parts | changes))


def test_an_empty_class_is_named_wherever_the_data_come_from() -> None:
    data = image_data()
    assert check_own(data, "x", print) is data
    two = Split(data.train.images, torch.arange(30) % 2)
    with pytest.raises(ValueError, match=r"--dataset x: no training image has label 2 \(1 of 3 classes are empty\)"):
        check_own(image_data(train=two), "--dataset x", print)


def test_one_pixel_makes_another_image() -> None:
    data = image_data()
    images = data.train.images[:10].clone()
    images[:, 0, 0, 0] ^= 1
    assert check_own(image_data(test=Split(images, data.test.labels)), "x", lambda text: pytest.fail(text))
    with pytest.raises(ValueError, match="10 of 10 test images"):
        check_own(image_data(test=Split(data.train.images[:10], data.test.labels)), "x", print)


# ---- folders of image files


def make_folder(root: Path, count: int = 3) -> Path:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def unreadable(root: Path) -> None:
    (root / "train" / "dog" / "1.png").write_bytes(b"<html>not found</html>")


def emptied(root: Path) -> None:
    for path in (root / "val" / "cat").iterdir():
        path.unlink()


def copied(root: Path) -> None:
    (root / "val" / "cat" / "0.png").write_bytes((root / "train" / "dog" / "2.png").read_bytes())


def linked(root: Path) -> None:
    (root / "val").rename(root.parent / "elsewhere")
    (root / "val").symlink_to(root / "train")


@pytest.mark.parametrize(
    ("dataset", "damage", "said"),
    [
        ("folder", unreadable, "dog/1.png: cannot be read as an image"),
        ("imagenet", unreadable, "dog/1.png (image 4): cannot be read as an image"),
        ("folder", emptied, "no images in class folder cat"),
        ("imagenet", emptied, "no images in class folder cat"),
        ("folder", copied, "1 of 6 test images are training images too"),
        ("folder", linked, "are one and the same folder; training and test must not overlap"),
        ("imagenet", linked, "are one and the same folder; training and test must not overlap"),
    ],
)
def test_folders_are_checked_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, damage: Callable[[Path], None], said: str
) -> None:
    root = make_folder(tmp_path / "images")
    damage(root)
    flags = ("--dataset", dataset, "--data", str(root), "--image-size", "16", "--batch-size", "2")
    assert said in refused(capsys, tmp_path / "run", *flags)


def test_every_image_of_a_folder_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet is too large for a look at all of it before every run, so that is a command."""
    main = importlib.import_module("common.data.__main__").main
    root = make_folder(tmp_path / "images", count=40)
    assert main([str(root / "train"), "--check"]) == 0
    assert "80 images of 2 classes, all readable" in capsys.readouterr().out
    (root / "train" / "dog" / "37.png").write_bytes(b"")
    assert main([str(root / "train"), "--check"]) == 2
    assert "dog/37.png" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ffcv"))


def test_the_same_ffcv_file_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.ffcv"
    file.write_bytes(b"")
    (tmp_path / "b.ffcv").symlink_to(file)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("qdarts.search").main(["--trainfile", str(file), "--valfile", str(tmp_path / "b.ffcv")])
    assert ended.value.code == 2
    assert "--valfile" in (err := capsys.readouterr().err) and "must not overlap" in err


# ---- published sets


def test_a_flipped_bit_in_a_published_set_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of the right form, whose checksum was right until one bit turned over."""
    import hashlib

    from common.data import published

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sums, random = {}, np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 50)):
        head = b"".join(number.to_bytes(4, "big") for number in (2051, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            head + random.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        )
        labels = bytes(number % 10 for number in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels)
    for path in raw.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(published, "_MNIST_FILES", sums)
    assert len(load("mnist", root=tmp_path, download=False).train) == 200
    victim = raw / "t10k-images-idx3-ubyte"
    content = bytearray(victim.read_bytes())
    content[20_000] ^= 4
    victim.write_bytes(content)
    line = refused(capsys, tmp_path / "run", "--dataset", "mnist", "--data", str(tmp_path), "--image-size", "16")
    assert "t10k-images-idx3-ubyte is missing or not the published file (its checksum differs)" in line


# ---- the parts of a training set


def parts_of(labels: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every cut that a program makes."""
    config = Config(search_fraction=None, train_portion=0.5, subset=0.7, seed=seed, sources={})
    return [
        split_search(labels, 0.5, seed),
        split_search(labels, 0.3, seed, subset=0.5),
        sample_parts(labels, (0.2, 0.1), seed),
        sample_parts(labels, (0.7, 0.3), seed),
        hold_out(labels, 0.1, seed),
        search_parts(config, labels),
        (take_subset(labels, 0.5, seed), torch.empty(0, dtype=torch.int64)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_no_image_is_in_both_parts(seed: int) -> None:
    labels = torch.randint(0, 7, (311,), generator=torch.Generator().manual_seed(seed))
    for one, other in parts_of(labels, seed):
        mine, theirs = set(one.tolist()), set(other.tolist())
        assert not mine & theirs and len(mine) == len(one) and len(theirs) == len(other)
        assert mine | theirs <= set(range(311))


def test_parts_that_overlap_are_refused() -> None:
    one, other = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 4])
    with pytest.raises(ValueError, match="overlap: 2 of 5 images are in both"):
        check_disjoint(one, other, 5)
    with pytest.raises(ValueError, match="overlap"):
        check_disjoint(torch.tensor([0, 0]), torch.tensor([1]), 5)
    assert check_disjoint(one, torch.tensor([1, 3]), 5)[0] is one


def test_every_cut_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the cutting itself must not pass."""
    from common.data import splits

    monkeypatch.setattr(splits, "check_disjoint", lambda *_: (_ for _ in ()).throw(ValueError("asked")))
    labels = torch.arange(60) % 3
    for cut in (
        lambda: split_search(labels, 0.5, 0),
        lambda: sample_parts(labels, (0.2, 0.1), 0),
        lambda: hold_out(labels, 0.1, 0),
        lambda: take_subset(labels, 0.5, 0),
    ):
        with pytest.raises(ValueError, match="asked"):
            cut()
