# SPDX-License-Identifier: Apache-2.0
"""ImageNet in FFCV's files: reading and writing them. All that this project knows of ffcv 1.0.2 stands in this file.

What ffcv does that a caller must guard against, and the cure here:

* On the CPU a compiled operation after one of torch's makes `Loader` loop for ever: ours normalises outside of it.
* An error in its thread leaves the main thread waiting for ever: `Epoch` hands it on.
* Leaving an epoch half way leaks its thread: `Epoch.stop` ends it.
* A batch is a view of a buffer that comes round again: batches are copied before they are handed out.
* More workers than cores is an error: they are clamped.
* Its import and its loaders set torch's number of threads: it is put back.
* Its random orders know no resume, and not all of them know ranks: the order is `order.Order`'s, for any ranks.
* Its first batch compiles for seconds: a loader is built once and kept.
* It changes a type of numba's, which then complains on stderr: it is kept from that.
* A damaged JPEG or a file cut short is read as whatever lies in memory: both are refused, with file and index.
* A writer's process that dies leaves the writer waiting for ever: it is watched.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.imagenet import decode, imagenet_info
from common.data.images import DatasetInfo, ImageData
from common.data.order import Order
from common.data.request import Request
from common.data.streamed import CENTRE, PREPARED, RATIO, SCALE, Batch, Reader, StreamedSplit
from common.strict_json import parse_json

INSTALL = "bash scripts/install_ffcv.sh (Debian, Ubuntu), or environment.yml; --data DIR needs no ffcv"
_JPEG_MODE = 0  # of an image's row: its bytes are a JPEG; otherwise they are pixels
HEADER = 24  # bytes; a table that "begins" within them was never written
_BUILDING = threading.Lock()  # two loaders must not be compiled at once: ffcv keeps its settings in class attributes


# ------------------------------------------------------------------------------------------------------ the library


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch the number of threads back that it had before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def why_missing() -> str | None:
    """Why ffcv cannot be used here; None where it can."""
    try:
        _library()
    except ImportError as error:
        return str(error)
    return None


@cache
def _library() -> SimpleNamespace:
    """ffcv's parts, and our two subclasses of them. Raises ImportError where it is not installed or broken."""
    with torch_threads_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports distutils
        import numba
        from ffcv import fields, libffcv, loader, reader, transforms, writer
        from ffcv.fields import rgb_image
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler

    # Two streams compute side by side, which the layer that numba falls back on does not survive.
    numba.config.THREADING_LAYER = os.environ.get("NUMBA_THREADING_LAYER", "threadsafe")
    parts = SimpleNamespace(
        numba=numba,
        fields=fields,
        libffcv=libffcv,
        loader=loader,
        FileReader=_careful_reader(reader.Reader),
        transforms=transforms,
        DatasetWriter=writer.DatasetWriter,
        EpochIterator=EpochIterator,
        AllocationQuery=AllocationQuery,
        Compiler=Compiler,
    )
    # Compiled once for all loaders.
    kept: dict[tuple[Any, bool], Any] = {}

    def compiled(function: Any) -> Any:
        key = (function, Compiler.is_enabled)
        return kept[key] if key in kept else kept.setdefault(key, Compiler.compile(function))

    parts.compiled = compiled
    loader.loader.OSCacheManager = _memory_class(parts, loader.loader.OSCacheManager)
    parts.RandomCrop = _checked(parts, rgb_image.RandomResizedCropRGBImageDecoder)
    parts.CentreCrop = _checked(parts, rgb_image.CenterCropRGBImageDecoder)
    parts.Epoch = _epoch_class(parts)
    return parts


def _memory_class(parts: SimpleNamespace, base: type) -> type:
    class Memory(base):  # type: ignore[misc,valid-type]
        """ffcv's view of a file, without its change to numba's own type of arrays, which numba then no longer finds."""

        def compile_reader(self) -> Any:
            types = parts.numba.types
            stored, table = types.Array(types.uint8, 1, "C", readonly=True), types.uint64[::1]

            def read(address: Any, state: Any) -> Any:
                size = state[2][np.searchsorted(state[1], address)]
                return state[0][address : address + size]

            return parts.Compiler.compile(read, stored(types.uint64, types.Tuple([stored, table, table])))

    return Memory


def _careful_reader(base: type) -> type:
    class FileReader(base):  # type: ignore[misc,valid-type]
        """A file's tables; its last one is empty where the file ends before it."""

        def read_allocation_table(self) -> None:
            there = HEADER < self.header["alloc_table_ptr"] <= Path(self.file_name).stat().st_size
            self.alloc_table = np.empty(0, [("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
            if there:
                super().read_allocation_table()

    return FileReader


def _checked(parts: SimpleNamespace, base: type) -> type:
    """ffcv's decoder with one more buffer: what its JPEG decoder said of each image, which ffcv does not look at."""

    class Checked(base):  # type: ignore[misc,valid-type]
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            state, memory = super().declare_state_and_memory(previous_state)
            return state, (*memory, parts.AllocationQuery((1,), np.dtype("<i8")))

        def generate_code(self) -> Callable[..., Any]:
            each, read = parts.Compiler.get_iterator(), self.memory_read
            called = (parts.libffcv.imdecode, parts.libffcv.resize_crop, self.get_crop_generator)
            jpeg, cut, choose = map(parts.compiled, called)
            scale = np.array(self.scale if self.scale is not None else (1.0, 1.0))
            ratio = np.array(self.ratio) if isinstance(self.ratio, tuple) else self.ratio

            # Compiled by numba, which does not read the annotations.
            def decode(batch_indices: Any, buffers: Any, metadata: Any, storage_state: Any) -> Any:
                images, room, answers = buffers
                nil, one, no = np.uint32(0), np.uint32(1), np.bool_(False)  # literals would be types of their own
                for k in each(len(batch_indices)):
                    row = metadata[batch_indices[k]]
                    stored = read(row["data_ptr"], storage_state)
                    height, width = np.uint32(row["height"]), np.uint32(row["width"])
                    answers[k, 0] = 0
                    pixels = room[k]
                    if row["mode"] == _JPEG_MODE:
                        answers[k, 0] = jpeg(stored, pixels, height, width, height, width, nil, nil, one, one, no, no)
                    else:
                        pixels = stored
                    whole = pixels[: 3 * height * width].reshape(height, width, 3)
                    top, left, h, w = choose(height, width, scale, ratio)
                    cut(whole, top, top + h, left, left + w, images[k])
                return images[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return Checked


def _epoch_class(parts: SimpleNamespace) -> type:
    class Epoch(parts.EpochIterator):  # type: ignore[misc,name-defined]
        """Batches of uint8 [B, 3, S, S] in the given order, each valid until the next but one is asked for."""

        def __init__(self, loader: Any, order: np.ndarray, decoder: Any, path: Path) -> None:
            self.failure: BaseException | None = None
            self._path, self._threads = path, torch.get_num_threads()
            nodes = loader.graph.nodes
            self._node = next(n.id for n in nodes if getattr(n, "decoder", None) is decoder)
            super().__init__(loader, order)  # starts the thread

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:  # handed to whoever asks for the batch
                self.failure = error
                while not self.terminate_event.is_set():
                    try:
                        self.output_queue.put(None, timeout=0.2)
                        return
                    except queue.Full:
                        continue

        def run_pipeline(self, b_ix: int, batch_indices: np.ndarray, batch_slot: int, cuda_event: Any) -> Any:
            if self.terminate_event.is_set():
                raise StopIteration  # ffcv's thread looks for itself only where its queue is full
            if b_ix == 0:
                torch.set_num_threads(self._threads)
            result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
            answers = self.memory_allocations["operation"][self._node][2][batch_slot][: len(batch_indices), 0]
            if answers.any():
                index = int(batch_indices[int(answers.nonzero()[0][0])])
                raise ValueError(f"{self._path} (image {index}): its JPEG is damaged; write the file again")
            return result

        def __next__(self) -> Any:
            try:
                return super().__next__()
            except StopIteration:
                if self.failure is not None:
                    raise self.failure from None
                raise

        def stop(self) -> None:
            """End the thread, wherever it is."""
            self.terminate_event.set()
            while self.is_alive():
                try:
                    self.output_queue.get(timeout=0.05)
                except queue.Empty:
                    continue
            self.join()
            self.close()

    return Epoch


# ------------------------------------------------------------------------------------------------------ reading


def load_ffcv(request: Request) -> ImageData:
    """--trainfile and --valfile, nothing decoded yet. Raises ValueError naming the flag, the file and the cure."""
    files = {"--trainfile": request.trainfile, "--valfile": request.valfile}
    for flag, path in files.items():
        if path is None:
            raise ValueError(f"{flag}: is missing; .ffcv files come in pairs, --trainfile X.ffcv --valfile Y.ffcv")
        if not path.is_file():
            raise ValueError(f"{flag} {path}: no such file; bash scripts/write_imagenet.sh writes it")
    if (reason := why_missing()) is not None:
        raise ValueError(f"--trainfile: ffcv cannot be used here ({reason}); install it: {INSTALL}")
    found = {flag: read_labels(path, flag) for flag, path in files.items() if path is not None}
    names = {flag: _class_names(path) for flag, path in files.items() if path is not None}
    (train, test), (train_names, test_names) = found.values(), names.values()
    if None not in (train_names, test_names) and train_names != test_names:
        raise ValueError(f"--valfile {request.valfile}: has other classes than {request.trainfile}; write both again")
    classes = train_names or test_names or [str(number) for number in range(int(train.max()) + 1)]
    count = len(classes)
    for flag, labels in found.items():
        if int(labels.max()) >= count:
            named = f"{files[flag]}.json names" if train_names or test_names else f"{request.trainfile} has"
            raise ValueError(f"{flag} {files[flag]}: has class {int(labels.max())}, {named} {count}; write both again")
    request.say(f"{len(train):,} + {len(test):,} images of {count} classes in {request.trainfile}, {request.valfile}")
    info = imagenet_info(classes, request.image_size)
    splits = (
        FfcvSplit(path, labels, request.workers) for path, labels in zip(files.values(), found.values(), strict=True)
    )
    return ImageData(info, *splits)


def read_labels(path: Path, flag: str) -> Tensor:
    """The labels (int64 [N]) of a file, after everything in it was found to lie inside of it.

    Raises ValueError naming flag and file, and the first image that is not whole where the file was cut short.
    """
    size = path.stat().st_size
    try:
        with np.errstate(all="ignore"):
            reader = _library().FileReader(str(path))
    except (AssertionError, IndexError, ValueError, KeyError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: is no .ffcv file ({error}); write it again") from error
    if not reader.handlers:
        raise ValueError(f"{flag} {path}: is cut short within its first lines ({size:,} bytes); write it again")
    if [type(field).__name__ for field in reader.handlers.values()] != ["RGBImageField", "IntField"]:
        raise ValueError(f"{flag} {path}: holds {', '.join(reader.handlers)}; expected an RGB image and an int label")
    rows, table, wanted = reader.metadata, reader.alloc_table, int(reader.num_samples)
    if not wanted:
        raise ValueError(f"{flag} {path}: holds no images, or its writing was interrupted; write it again")
    starts = rows["f0"]["data_ptr"].astype(np.int64)
    broken = starts >= size
    if len(table) < wanted:  # the table is the last thing in a file
        broken[np.argmax(starts)] = True
    else:
        broken[table["sample_id"][(table["ptr"] + table["size"]).astype(np.int64) > size].astype(np.int64)] = True
    if len(rows) < wanted or broken.any():
        first = int(broken.argmax()) if broken.any() else len(rows)
        raise ValueError(
            f"{flag} {path}: is cut short: image {first} of {wanted:,} is not whole ({size:,} bytes); write it again"
        )
    labels = torch.from_numpy(rows["f1"].astype(np.int64))
    if int(labels.min()) < 0:
        raise ValueError(f"{flag} {path}: image {int(labels.argmin())} has label {int(labels.min())}; expected 0..K-1")
    return labels


def _class_names(path: Path) -> list[str] | None:
    """The class names that our writer left beside the file."""
    beside = path.with_name(path.name + ".json")
    if not beside.is_file():
        return None
    try:
        return [str(name) for name in parse_json(beside.read_bytes())["classes"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{beside}: cannot be read ({error}); remove it (classes are then numbered)") from error


def clamp_workers(workers: int) -> int:
    """As many as numba can start here, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(workers, cores, _library().numba.config.NUMBA_NUM_THREADS))


@dataclass
class _Built:
    """A loader and the decoder within it."""

    loader: Any
    decoder: Any


class FfcvSplit(StreamedSplit):
    """Images of a .ffcv file (or some of its rows). The order is exact; random crops and flips differ by run."""

    reproducible = False
    reuses_buffers = True

    def __init__(self, path: Path, labels: Tensor, workers: int, rows: Tensor | None = None) -> None:
        """rows: int64, where in the file the images are (None: all of it); labels: theirs."""
        self.path, self.labels, self.rows = path, labels, torch.arange(len(labels)) if rows is None else rows
        self._workers = clamp_workers(workers)
        self._built: dict[tuple[bool, int, int], _Built] = {}

    def select(self, keep: Tensor) -> FfcvSplit:
        """The images at these indices."""
        return FfcvSplit(self.path, self.labels[keep], self._workers, self.rows[keep])

    def training(self, order: Order, info: DatasetInfo, augment: bool) -> Reader:
        """Random crops and flips, or the centre."""

        def read(epoch: int, step: int) -> Iterator[Batch]:
            while True:
                whole = order.epoch(epoch)
                picked = torch.cat([whole[order.positions(number)] for number in range(step, order.steps)])
                yield from self._read(picked, info.image_size, order.batch_size, augment)
                epoch, step = epoch + 1, 0

        return read

    def testing(self, indices: Tensor, info: DatasetInfo, batch_size: int) -> Iterator[Batch]:
        """The centre of each image once."""
        return self._read(indices, info.image_size, batch_size, False)

    def _read(self, indices: Tensor, size: int, batch_size: int, augment: bool) -> Iterator[Batch]:
        """One pass over these images; what is yielded is overwritten later."""
        if not len(indices):
            return
        built = self._loader(augment, size, batch_size)
        rows = self.rows[indices].numpy().astype(np.uint64)
        epoch = _library().Epoch(built.loader, rows, built.decoder, self.path)
        at = 0
        try:
            for (images,) in epoch:
                yield images, self.labels[indices[at : at + len(images)]]
                at += len(images)
        finally:
            epoch.stop()

    def _loader(self, augment: bool, size: int, batch_size: int) -> _Built:
        """Built once: its first batch takes seconds to compile."""
        with _BUILDING:
            found = self._built.get((augment, size, batch_size))
            if found is None:
                found = self._built[augment, size, batch_size] = self._build(augment, size, batch_size)
        return found

    def _build(self, augment: bool, size: int, batch_size: int) -> _Built:
        ffcv, tensors = _library(), _library().transforms
        if augment:
            decoder = ffcv.RandomCrop((size, size), scale=SCALE, ratio=RATIO)
            steps = [decoder, tensors.RandomHorizontalFlip()]
        else:
            decoder = ffcv.CentreCrop((size, size), ratio=CENTRE)
            steps = [decoder]
        with torch_threads_kept():
            loader = ffcv.loader.Loader(
                str(self.path),
                batch_size=batch_size,
                num_workers=self._workers,
                order=ffcv.loader.OrderOption.SEQUENTIAL,  # not used: each epoch is given its own
                os_cache=True,
                drop_last=False,
                seed=0,
                batches_ahead=PREPARED,
                # Nothing compiled may follow torch's ToTensor on a CPU. Labels are in memory already.
                pipelines={
                    "image": [*steps, ffcv.transforms.ToTensor(), ffcv.transforms.ToTorchImage()],
                    "label": None,
                },
            )
        return _Built(loader, decoder)


# ------------------------------------------------------------------------------------------------------ writing


class _Samples:
    """What ffcv's writer asks for. It never raises: an error in a writing process would never be heard of."""

    def __init__(self, samples: list[tuple[str, int]], errors: Path) -> None:
        self._samples, self._errors = samples, errors

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path, label = self._samples[index]
        if not self._errors.exists():
            try:
                return np.ascontiguousarray(decode(path).permute(1, 2, 0).numpy()), label
            except Exception as error:  # told by the process that waits for this one
                self._errors.write_text(f"{path} (image {index}): cannot be read as an image ({error})")
        return np.zeros((1, 1, 3), np.uint8), label


def write_ffcv(
    samples: list[tuple[str, int]],
    out: Path,
    *,
    classes: list[str],
    max_resolution: int | None = None,
    compress_probability: float = 1.0,
    jpeg_quality: int = 90,
    workers: int = 1,
) -> None:
    """Write (path, class index) pairs as a .ffcv file, in this order, and the class names beside it.

    max_resolution: the longest side in pixels (None: as they are). compress_probability: the share that is stored as
    JPEG of `jpeg_quality`; the rest is stored as pixels, larger and quicker to read. The file appears when it is whole.
    Raises ValueError naming the image or file.
    """
    ffcv = _library()
    aside, errors = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("part", "errors"))
    mode = {0.0: "raw", 1.0: "jpg"}.get(compress_probability, "proportion")
    image = ffcv.fields.RGBImageField(
        write_mode=mode,
        max_resolution=max_resolution,
        compress_probability=compress_probability,
        jpeg_quality=jpeg_quality,
    )
    writer = ffcv.DatasetWriter(
        str(aside),
        {"image": image, "label": ffcv.fields.IntField()},
        _page(samples, max_resolution, mode),
        max(1, workers),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _watched_processes(out):
            writer.from_indexed_dataset(
                _Samples(samples, errors), chunksize=min(100, -(-len(samples) // writer.num_workers))
            )
        if errors.exists():
            raise ValueError(f"{errors.read_text()}; replace or remove this file")
        beside = {
            "classes": classes,
            "images": len(samples),
            "max_resolution": max_resolution,
            "compress_probability": compress_probability,
            "jpeg_quality": jpeg_quality,
        }
        out.with_name(out.name + ".json").write_text(json.dumps(beside, indent=1) + "\n")
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)


def _page(samples: list[tuple[str, int]], max_resolution: int | None, mode: str) -> int:
    """Bytes of a page: a power of two, at least ffcv's own 8 MiB, that holds the largest image."""
    from PIL import Image

    largest = 0
    if mode != "jpg" and max_resolution is not None:
        largest = 3 * max_resolution**2
    elif mode != "jpg":
        for path, _ in samples:
            try:
                with Image.open(path) as image:
                    largest = max(largest, 3 * image.width * image.height)
            except OSError:
                continue  # whoever decodes it says what is wrong
    return 1 << max(23, largest.bit_length())


@contextmanager
def _watched_processes(out: Path) -> Iterator[None]:
    """ffcv waits for ever for a writing process that has died (no room on the disk, no memory): end that."""
    import _thread

    import ffcv.writer

    started: list[multiprocessing.Process] = []
    over, died = threading.Event(), threading.Event()

    def start(**settings: Any) -> multiprocessing.Process:
        # multiprocessing's own list forgets one that has died, maybe before it is looked at for the first time
        started.append(multiprocessing.Process(**settings))
        return started[-1]

    def watch() -> None:
        while not over.wait(0.2):
            if any(child.exitcode not in (None, 0) for child in started):
                died.set()
                _thread.interrupt_main()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    # A script's background job ignores the signal that the watcher sends.
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler) if ours else None
    process, ffcv.writer.Process = ffcv.writer.Process, start
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        for child in started:
            if child.is_alive():
                child.terminate()
        if not died.is_set():
            raise
        raise ValueError(f"--out {out}: a writing process died; is the disk full, or memory short?") from None
    finally:
        ffcv.writer.Process = process
        over.set()
        watcher.join()
        if ours:
            signal.signal(signal.SIGINT, handler)
