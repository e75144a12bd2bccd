# SPDX-License-Identifier: Apache-2.0
"""MNIST and CIFAR from folders and archives made here, in the published formats; names, messages, checksums."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import pickle
import socket
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data import canonical_name, cifar_files, dataset_names, load, locate, published


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder: Path) -> dict[str, np.ndarray]:
    """Batches of 4 images in CIFAR-10's format; returns what was written."""
    folder.mkdir(parents=True)
    random, written = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        written[name] = data
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, 9]}))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return written


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A synthetic CIFAR-10 whose checksums the reader and torchvision are told to expect, and what is in it."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "root" / "cifar-10-batches-py"
    written = write_cifar(folder)
    monkeypatch.chdir(tmp_path)
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [[file, md5(folder / file)] for file, _ in getattr(CIFAR10, name)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    about = published._CIFARS["cifar10"]
    sums = {kind: {file: md5(folder / file) for file in getattr(about, kind)} for kind in ("train", "test", "meta")}
    monkeypatch.setitem(published._CIFARS, "cifar10", dataclasses.replace(about, **sums))
    return folder, written


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("direct", [False, True])
def test_cifar_from_its_root_and_from_the_folder_itself(cifar: Any, direct: bool) -> None:
    folder, written = cifar
    if direct:
        folder = folder.rename(folder.parent / "renamed by its user")
    data = load("CIFAR-10", root=folder if direct else folder.parent, download=False)
    assert data.train.images.shape == (20, 3, 32, 32) and data.test.images.shape == (4, 3, 32, 32)
    assert np.array_equal(data.train.images[4:8].numpy(), written["data_batch_2"].reshape(4, 3, 32, 32))
    assert data.test.labels.tolist() == [0, 1, 2, 9] and data.info.classes[9] == "class 9"
    assert data.info.flip and data.info.pad == 4
    assert data.info.mean == (0.49139968, 0.48215827, 0.44653124)
    assert data.info.std == (0.24703233, 0.24348505, 0.26158768)


def test_checksums_and_keys_are_torchvisions() -> None:
    from torchvision import datasets

    for about in published._CIFARS.values():
        theirs = getattr(datasets, about.reader)
        assert [list(item) for item in about.train.items()] == theirs.train_list
        assert [list(item) for item in about.test.items()] == theirs.test_list
        assert about.meta == {theirs.meta["filename"]: theirs.meta["md5"]}
        assert about.labels[:-1] + "_names" == theirs.meta["key"]


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_a_batch_is_read_in_every_form_of_its_format_without_running_it(tmp_path: Path, protocol: int) -> None:
    random = np.random.default_rng(protocol)
    data, labels = random.integers(0, 256, (1100, 3072), dtype=np.uint8), random.integers(0, 100, 1100).tolist()
    names = ["first", "second"]
    for name, key in (("a", "labels"), ("b", "fine_labels")):
        content = {"filenames": ["x.png"] * 3, "batch_label": "1 of 5", key: labels, "coarse_labels": [7], "data": data}
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
        images, found = cifar_files.read_batch(tmp_path / name, key)
        assert np.array_equal(images.numpy(), data.reshape(-1, 3, 32, 32)) and found.tolist() == labels
    (tmp_path / "meta").write_bytes(pickle.dumps({"num": 3, "label_names": names, "other": ["third"]}, protocol))
    assert cifar_files.read_names(tmp_path / "meta", "label_names", 2) == ("first", "second")
    (tmp_path / "empty").write_bytes(pickle.dumps({"labels": [1, 2], "data": b"short"}, protocol))
    with pytest.raises(ValueError, match="no batch of CIFAR"):
        cifar_files.read_batch(tmp_path / "empty", "labels")


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.xz"])
def test_cifar_from_an_archive_is_unpacked_once_and_said(cifar: Any, tmp_path: Path, suffix: str) -> None:
    folder, _ = cifar
    root = tmp_path / "archives"
    root.mkdir()
    with tarfile.open(root / f"cifar-10-python.{suffix}", f"w:{suffix[-2:]}") as tar:
        tar.add(folder, "cifar-10-batches-py")
    said: list[str] = []
    assert locate("cifar10", root) == root / f"cifar-10-python.{suffix}"
    first = load("cifar10", root=root, download=False, say=said.append)
    assert len(said) == 1 and "unpacking" in said[0] and suffix in said[0]
    assert (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").is_file()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]  # no debris
    second = load("cifar10", root=root, download=False, say=said.append)
    assert len(said) == 1 and torch.equal(first.train.images, second.train.images)
    load("cifar10", root=root / f"cifar-10-python.{suffix}", download=False)


def test_a_truncated_archive_is_named_and_leaves_nothing(cifar: Any, tmp_path: Path) -> None:
    folder, _ = cifar
    archive = tmp_path / "archives" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    archive.write_bytes(archive.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz: damaged"):
        load("cifar10", root=archive.parent, download=False, say=lambda _: None)
    assert not (tmp_path / "data").exists()


def test_an_unwritable_cache_falls_back_to_the_archives_folder(cifar: Any, tmp_path: Path) -> None:
    folder, _ = cifar
    (tmp_path / "data").write_text("a file where the cache would be")
    root = tmp_path / "archives"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    load("cifar10", root=root, download=False, say=lambda _: None)
    assert (root / "cifar-10-batches-py" / "data_batch_1").is_file()


def test_a_flipped_bit_is_found_and_its_file_named(cifar: Any) -> None:
    folder, _ = cifar
    content = bytearray((folder / "data_batch_3").read_bytes())
    content[-40] ^= 1
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_3 is missing or not the published file \(its checksum"):
        load("cifar10", root=folder.parent)


def test_a_made_up_cifar_fails_the_published_checksums(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match="data_batch_1 is missing or not the published file"):
        load("cifar10", root=tmp_path)


def test_images_are_resized_on_request(cifar: Any) -> None:
    data = load("cifar10", root=cifar[0].parent, image_size=16)
    assert data.train.images.shape == (20, 3, 16, 16) and data.train.images.dtype == torch.uint8
    assert data.info.image_size == 16 and data.info.pad == 2
    whole = load("cifar10", root=cifar[0].parent).train.images.float()
    assert (data.train.images.float().mean((2, 3)) - whole.mean((2, 3))).abs().max() < 1.5


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_from_its_files_and_from_their_gz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / ("mnist" if packed else "MNIST/raw")
    folder.mkdir(parents=True)
    random, sums, images = np.random.default_rng(0), {}, {}
    for part, count in (("train", 12), ("t10k", 5)):
        images[part] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + images[part].tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count)),
        }
        for name, content in contents.items():
            sums[name] = hashlib.md5(content).hexdigest()
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match="ubyte is missing or not the published file"):
        load("mnist", root=tmp_path / "root", download=False, say=lambda _: None)
    monkeypatch.setattr(published, "_MNIST_FILES", sums)
    for root in (tmp_path / "root", folder):
        data = load("mnist", root=root, download=False)
        assert np.array_equal(data.train.images[:, 0].numpy(), images["train"])
        assert np.array_equal(data.test.images[:, 0].numpy(), images["t10k"])
        assert data.train.labels.tolist() == [i % 10 for i in range(12)]
    assert not data.info.flip and data.info.pad == 2 and data.info.image_size == 28
    assert (tmp_path / "data" / "MNIST" / "raw").is_dir() == packed


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("download", [True, False])
def test_without_files_and_network_every_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, download: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    before = socket.getdefaulttimeout()
    with refused_downloads(monkeypatch), pytest.raises(ValueError) as caught:
        load(name, root=tmp_path / "nothing", download=download, say=lambda _: None)
    folder = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    for word in (f"--dataset {name}", "--data ROOT", folder, "download", str(tmp_path / "nothing")):
        assert word in str(caught.value)
    assert ("no network here" in str(caught.value)) == download
    assert socket.getdefaulttimeout() == before
    assert list(tmp_path.iterdir()) == []  # no debris


@contextlib.contextmanager
def refused_downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import urllib.error

    from torchvision.datasets import utils

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network here")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_urlretrieve", refuse)
        patch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
        yield


def test_a_download_arrives_whole_in_data(cifar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def deliver(self: Any) -> None:
        write_cifar(Path(self.root) / "cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", deliver)
    said: list[str] = []
    data = load("cifar10", root=tmp_path / "new", say=said.append)
    assert len(data.train) == 20 and "downloading cifar10" in said[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-10-batches-py"]
    assert locate("cifar10", tmp_path / "new") == tmp_path / "new" / "cifar-10-batches-py"


def test_names() -> None:
    assert dataset_names()[:4] == ("digits", "mnist", "cifar10", "cifar100") and "folder" in dataset_names()
    assert canonical_name("CIFAR_100") == "cifar100"
    with pytest.raises(ValueError, match=r"--dataset cifra10: unknown \(nearest: cifar10"):
        load("cifra10")
    with pytest.raises(ValueError, match="--image-size 2"):
        load("digits", image_size=2)
    with pytest.raises(ValueError, match="--image-size 5000"):
        load("digits", image_size=5000)


def test_nothing_heavy_is_imported_before_it_is_needed(root: Path) -> None:
    import subprocess
    import sys

    code = "import sys, common.data; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
