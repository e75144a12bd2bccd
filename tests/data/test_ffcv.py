# SPDX-License-Identifier: Apache-2.0
"""FFCV files: the same images as the files they were written from, and a cure for each of ffcv's traps.

Most tests run ffcv's Python uncompiled, which is quick; `compiled` ones do what a user does.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.data import ImageData, StreamedBatches, evaluation_batches, load, open_stream
from common.data import ffcv as room
from common.data.__main__ import main, take
from common.data.folder import scan
from tests.helpers.photographs import CLASSES, make_folder

REASON = room.why_missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"ffcv: {REASON}; bash scripts/install_ffcv.sh")
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
TRAIN, VAL = 5, 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder, and a pair of files of raw pixels, as the tool writes them."""
    root = make_folder(tmp_path_factory.mktemp("ffcv"), TRAIN, VAL)
    files = {part: root / f"{part}.ffcv" for part in ("train", "val")}
    for part, out in files.items():
        assert main([str(root / part), "--out", str(out), "--compress-probability", "0", "-j", "2"]) == 0
    return SimpleNamespace(root=root, **files)


@pytest.fixture(autouse=True)
def _uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    compiler = room._library().Compiler
    compiler.set_enabled("compiled" in request.node.name)
    yield
    compiler.set_enabled(True)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon or type(thread).__name__ == "Epoch":
            while not thread.is_alive() and thread in threading.enumerate():
                time.sleep(0.01)  # its `start` was called, on a thread that was not run since
            thread.join(60)
            assert not thread.is_alive(), thread


def opened(written: SimpleNamespace, **more: object) -> ImageData:
    settings = {"image_size": 32, "workers": 1, "say": lambda _: None, **more}
    return load("imagenet", trainfile=written.train, valfile=written.val, **settings)


def stream(data: ImageData, batch_size: int = 4, augment: bool = True, **more: object) -> StreamedBatches:
    made = open_stream(data.train, data.info, batch_size=batch_size, seed=0, name="train", augment=augment, **more)
    assert isinstance(made, StreamedBatches)
    return made


def levels(a: Tensor, b: Tensor) -> Tensor:
    """Differences of two normalised batches, in 0..255."""
    return ((a - b) * STD * 255).abs()


# ------------------------------------------------------------------------------------------- the same as the other path


def test_both_paths_give_the_same_images_labels_and_names(written: SimpleNamespace) -> None:
    files = opened(written, image_size=64)
    folder = load("imagenet", root=written.root, image_size=64, say=lambda _: None)
    assert files.info == folder.info and files.info.classes == CLASSES
    for ours, theirs in ((files.train, folder.train), (files.test, folder.test)):
        (x, y), (u, v) = (next(iter(evaluation_batches(s, files.info, 15, "cpu"))) for s in (ours, theirs))
        assert torch.equal(y, v) and len(y) == len(ours) == len(theirs)
        assert levels(x, u).mean() <= 3  # two rules of resizing


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory, written: SimpleNamespace) -> Path:
    """JPEGs of 64 x 64, whose centre of 56 x 56 is a test crop without resizing."""
    root = tmp_path_factory.mktemp("squares")
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for path in (written.root / "train" / "n02").glob("[1-3].JPEG"):
                with Image.open(path) as image:
                    image.convert("RGB").resize((64, 64)).save(root / part / name / path.name, "JPEG", quality=95)
    return root


def pair_of(root: Path, **settings: object) -> SimpleNamespace:
    """Both parts of a folder written with these settings."""
    for part in ("train", "val"):
        classes, samples = scan(root / part)
        room.write_ffcv(samples, root / f"{part}.ffcv", classes=classes, **settings)
    return SimpleNamespace(train=root / "train.ffcv", val=root / "val.ffcv")


def test_crops_without_resizing_are_equal(squares: Path) -> None:
    files = opened(pair_of(squares, compress_probability=0.0), image_size=56)
    folder = load("imagenet", root=squares, image_size=56, say=lambda _: None)
    (x, _), (u, _) = (next(iter(evaluation_batches(d.test, d.info, 9, "cpu"))) for d in (files, folder))
    assert levels(x, u).max() <= 2


def test_jpegs_in_the_file_decode_as_pil_decodes_them(squares: Path) -> None:
    import cv2

    data = opened(pair_of(squares, jpeg_quality=80), image_size=56)
    x, _ = next(iter(evaluation_batches(data.test, data.info, 9, "cpu")))
    for index, (path, _) in enumerate(scan(squares / "val")[1]):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        stored = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
        decoded = np.asarray(Image.open(io.BytesIO(stored.tobytes())))[4:60, 4:60].transpose(2, 0, 1)
        found = (x[index] * STD[0] + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) * 255
        difference = (found - torch.from_numpy(decoded.copy())).abs()
        assert difference.max() <= 6 and difference.mean() <= 1.5, path  # ffcv's decoder takes the fast transform


def test_the_order_is_exact_resumable_and_shared_by_ranks(written: SimpleNamespace) -> None:
    files, folder = opened(written), load("imagenet", root=written.root, image_size=32, say=lambda _: None)
    alone = stream(files, augment=False)
    other = open_stream(folder.train, folder.info, batch_size=4, seed=0, name="train", augment=False)
    for address in ((0, 0), (0, 1), (0, 2), (1, 0), (3, 1)):  # the last restarts, as a resume does
        (x, y), (u, v) = alone.batch(*address), other.batch(*address)
        assert torch.equal(y, v) and levels(x, u).mean() <= 6  # small images: two rules of resizing
    parts = [stream(files, 2, augment=False, rank=rank, ranks=2).batch(3, 1) for rank in range(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), alone.batch(3, 1)[0])
    for rank in range(2):
        whole = torch.cat([y for _, y in evaluation_batches(files.test, files.info, 2, "cpu", rank=rank, ranks=2)])
        assert torch.equal(whole, torch.cat(files.test.labels.split(2)[rank::2]))
    few = opened(written, classes=2)
    assert few.train.labels.tolist() == [0] * TRAIN + [1] * TRAIN
    assert torch.equal(stream(few, 10, augment=False).batch(0, 0)[1].sort().values, few.train.labels)


def test_that_crops_are_not_reproducible_is_said(written: SimpleNamespace) -> None:
    data = opened(written)
    assert any("differ from run to run, also after a resume; --data DIR is bit-exact" in n for n in stream(data).notes)
    assert not stream(data, augment=False).notes


# ------------------------------------------------------------------------------------------- the traps


def test_a_batch_is_no_buffer_that_comes_round_again(written: SimpleNamespace) -> None:
    data = opened(written)
    kept = list(evaluation_batches(data.train, data.info, 2, "cpu"))
    again = [(x.clone(), y.clone()) for x, y in evaluation_batches(data.train, data.info, 2, "cpu")]
    assert len(kept) == 8 and all(torch.equal(a, b) for (a, _), (b, _) in zip(kept, again, strict=True))
    taken = stream(data)
    x, _ = taken.batch(0, 0)
    before = x.clone()
    for number in range(1, 12):
        taken.batch(*divmod(number, taken.steps_per_epoch))
    assert torch.equal(x, before)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_leaving_an_epoch_half_way_leaves_no_thread(written: SimpleNamespace, batches: int) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        data = opened(written)
        epoch = iter(evaluation_batches(data.train, data.info, 2, "cpu"))
        for _ in range(batches):
            next(epoch)
        epoch.close()
        taken = stream(data)
        taken.batch(0, 0)
        taken.close()
    assert set(threading.enumerate()) <= before


def test_a_closed_epoch_is_not_read_to_its_end(
    written: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, samples = scan(written.root / "train")
    many = tmp_path / "many.ffcv"
    room.write_ffcv(samples * 8, many, classes=classes, workers=1)
    plain, runs = room._library().Epoch.run_pipeline, []

    def counted(*arguments: object) -> object:
        runs.append(1)
        return plain(*arguments)

    monkeypatch.setattr(room._library().Epoch, "run_pipeline", counted)
    data = load("imagenet", trainfile=many, valfile=written.val, image_size=32, workers=1, say=lambda _: None)
    taken = stream(data, batch_size=1)
    taken.batch(0, 0)
    taken.close()
    assert len(samples) == 15 and len(runs) < 40  # of 120: what was read ahead, and the last one asked for


def test_an_error_in_the_thread_is_raised(written: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    library = room._library()

    def fails(*arguments: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(library.Epoch, "run_pipeline", fails)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        stream(opened(written)).batch(0, 0)


def test_workers_are_clamped_and_torch_keeps_its_threads(written: SimpleNamespace) -> None:
    assert room.clamp_workers(0) == 1 and room.clamp_workers(10_000) <= room._library().numba.config.NUMBA_NUM_THREADS
    torch.set_num_threads(3)
    data = opened(written, workers=10_000)
    stream(data).batch(0, 0)
    list(evaluation_batches(data.test, data.info, 2, "cpu"))
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3]  # also of threads that begin later


def test_loaders_are_built_once(written: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    data, built = opened(written), []
    original = data.train._build
    monkeypatch.setattr(data.train, "_build", lambda *a: built.append(a) or original(*a))
    first, second = stream(data), stream(data, indices=torch.arange(5))
    for epoch in range(2):
        first.batch(epoch, 0), second.batch(epoch, 0)
    assert built == [(True, 32, 4)]


def test_nothing_compiled_comes_after_tensors(written: SimpleNamespace) -> None:
    for augment in (True, False):
        nodes = opened(written).train._build(augment, 32, 2).loader.graph.nodes
        compiled = [node.is_jitted for node in nodes]
        assert compiled == sorted(compiled, reverse=True)


_COMPILED = """
import sys, torch
from pathlib import Path
from common.data import evaluation_batches, load, open_stream
data = load("imagenet", trainfile=Path(sys.argv[1]), valfile=Path(sys.argv[2]), image_size=32, workers=2)
training = open_stream(data.train, data.info, batch_size=4, seed=0, name="train", augment=True)
other = open_stream(data.train, data.info, batch_size=4, seed=1, name="valid", augment=True)
for number in range(6):
    x, y = training.batch(*divmod(number, training.steps_per_epoch))
    u, v = other.batch(*divmod(number, other.steps_per_epoch))
    assert x.shape == u.shape == (4, 3, 32, 32) and x.isfinite().all()
print(sum(len(y) for _, y in evaluation_batches(data.test, data.info, 4, "cpu")))
"""


@pytest.mark.slow
def test_compiled_as_a_user_runs_it_and_without_an_endless_loop(written: SimpleNamespace, root: Path) -> None:
    command = [sys.executable, "-c", _COMPILED, str(written.train), str(written.val)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "9" and "Exception ignored" not in done.stderr, done.stderr


@pytest.mark.slow
def test_compiled_crops_are_like_torchvisions(written: SimpleNamespace) -> None:
    files, folder = opened(written), load("imagenet", root=written.root, image_size=32, say=lambda _: None)
    for data in (files, folder):
        data.train.labels  # noqa: B018
    ours = torch.cat([stream(files, 15).batch(epoch, 0)[0] for epoch in range(8)])
    theirs = torch.cat([stream(folder, 15).batch(epoch, 0)[0] for epoch in range(8)])
    assert (ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))).abs().max() < 0.15
    assert (ours.std((0, 2, 3)) - theirs.std((0, 2, 3))).abs().max() < 0.15


# ------------------------------------------------------------------------------------------- damage


def test_a_file_cut_short_is_refused_with_the_first_image_that_is_not_whole(
    written: SimpleNamespace, tmp_path: Path
) -> None:
    content = written.train.read_bytes()
    rows = room._library().FileReader(str(written.train)).metadata["f0"]
    cut = tmp_path / "cut.ffcv"
    for index in (0, 4):  # the table at the end is lost with any image
        cut.write_bytes(content[: int(rows["data_ptr"][index])])
        with pytest.raises(ValueError, match=r"--trainfile .*cut\.ffcv: is cut short: image \d+ of 15 is not whole"):
            room.load_ffcv(_request(cut, written.val))
    for size in (0, 100, 5000):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"--trainfile .*cut\.ffcv: is (cut short|no \.ffcv file)"):
            room.load_ffcv(_request(cut, written.val))
    cut.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"cut\.ffcv: is cut short"):
        room.load_ffcv(_request(cut, written.val))


def test_a_damaged_jpeg_in_a_file_is_named_with_its_index(written: SimpleNamespace, tmp_path: Path) -> None:
    classes, samples = scan(written.root / "val")
    for part in ("train", "val"):
        room.write_ffcv(samples, tmp_path / f"{part}.ffcv", classes=classes)
    path = tmp_path / "val.ffcv"
    content = bytearray(path.read_bytes())
    start = int(room._library().FileReader(str(path)).metadata["f0"]["data_ptr"][5])
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    data = opened(SimpleNamespace(train=tmp_path / "train.ffcv", val=path))
    with pytest.raises(ValueError, match=r"val\.ffcv \(image 5\): its JPEG is damaged"):
        list(evaluation_batches(data.test, data.info, 4, "cpu"))


def _request(train: Path | None, val: Path | None) -> room.Request:
    return room.Request(None, 32, False, lambda _: None, 1, train, val)


def test_what_is_wrong_with_a_pair_is_said(written: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--valfile: is missing"):
        room.load_ffcv(_request(written.train, None))
    with pytest.raises(ValueError, match="--trainfile .*none.ffcv: no such file"):
        room.load_ffcv(_request(tmp_path / "none.ffcv", written.val))
    text = tmp_path / "text.ffcv"
    text.write_text("no images at all, but some text that is long enough to be read as a header" * 20)
    with pytest.raises(ValueError, match=r"--trainfile .*text\.ffcv: is no \.ffcv file"):
        room.load_ffcv(_request(text, written.val))
    other = tmp_path / "other.ffcv"
    other.write_bytes(written.val.read_bytes())
    (tmp_path / "other.ffcv.json").write_text(json.dumps({"classes": ["x", "y", "z"]}))
    with pytest.raises(ValueError, match="has other classes than"):
        room.load_ffcv(_request(written.train, other))
    less = tmp_path / "less.ffcv"
    less.write_bytes(written.train.read_bytes())
    for file in (less, other):
        file.with_name(file.name + ".json").write_text(json.dumps({"classes": ["x", "y"]}))
    with pytest.raises(ValueError, match=r"--trainfile .*less.ffcv: has class 2, .*less.ffcv.json names 2"):
        room.load_ffcv(_request(less, other))
    with pytest.raises(ValueError, match="--data names another copy"):
        load("imagenet", root=tmp_path, trainfile=written.train, valfile=written.val)


def test_without_ffcv_the_way_to_it_is_told(written: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "why_missing", lambda: "No module named 'ffcv'")
    with pytest.raises(ValueError, match=r"--trainfile: ffcv cannot be used here .*install_ffcv\.sh"):
        room.load_ffcv(_request(written.train, written.val))


# ------------------------------------------------------------------------------------------- writing


def test_a_file_holds_what_was_asked_for(written: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "some.ffcv"
    flags = ["--max-resolution", "60", "--compress-probability", "0.5", "--jpeg-quality", "70", "--subset", "7"]
    assert main([str(written.root / "train"), "--out", str(out), *flags]) == 0
    rows = room._library().FileReader(str(out)).metadata
    assert len(rows) == 7 and rows["f1"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert max(rows["f0"]["width"].max(), rows["f0"]["height"].max()) <= 60
    assert json.loads((tmp_path / "some.ffcv.json").read_text())["classes"] == list(CLASSES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.ffcv", "some.ffcv.json"]
    assert take([("a", 0), ("b", 0), ("c", 1)], 2) == [("a", 0), ("c", 1)]


def test_an_unreadable_image_stops_the_writing_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "images", 2, 1)
    (root / "train" / "n03" / "1.JPEG").write_bytes(b"\xff\xd8\xff rest")
    out = tmp_path / "out" / "x.ffcv"
    assert main([str(root / "train"), "--out", str(out)]) == 2
    assert "n03/1.JPEG (image 5): cannot be read as an image" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])  # SIG_IGN: `command &` in a script
def test_a_writing_process_that_dies_ends_the_writing(
    written: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    import os

    before = signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(room._Samples, "__getitem__", lambda self, index: os._exit(9))
    classes, samples = scan(written.root / "val")
    with pytest.raises(ValueError, match="a writing process died; is the disk full"):
        room.write_ffcv(samples, tmp_path / "x.ffcv", classes=classes, workers=2)
    assert not list(tmp_path.iterdir())
    assert signal.signal(signal.SIGINT, before) is handler
