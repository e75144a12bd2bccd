# SPDX-License-Identifier: Apache-2.0
"""From a run to exported files: the network and its images, every format written aside, checked, then renamed."""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data import ImageData, evaluation_batches
from common.engine import read_json, write_json
from common.engine.environment import describe
from common.engine.files import TEMPORARY, check_schema, fsync_folder
from common.export.formats import FORMATS, Format, Source
from common.recipes.setup import data_flags, load_data
from common.recipes.trained import EVALUATION_BATCH, load_trained

MANIFEST = "export.json"
MANIFEST_SCHEMA = 1
_CALIBRATION_BATCH = 64

Say = Callable[[str], None]


def source_of(
    run: Path,
    checkpoint: Path | None = None,
    *,
    data: Path | None = None,
    data_module: str | None = None,
    images: int | None = None,
    say: Say = print,
) -> tuple[Source, dict[str, Any]]:
    """(the trained network of a run with its own images, `load_trained`'s info). `images`: no more of the test set.

    Raises ValueError naming the flag or folder, reason and cure.
    """
    network, flags, info = load_trained(run, checkpoint)
    network.auxiliary_head = None  # only a training has a use for it
    found = data_flags(flags, f"RUN {run}", data_module=data_module) | {"image_size": info["data"]["image_size"]}
    if data is not None:
        found |= {"data": data, "trainfile": None, "valfile": None}
    loaded = load_data(Namespace(**found), say)
    if (loaded.info.num_classes, loaded.info.channels) != (info["data"]["num_classes"], info["data"]["channels"]):
        raise ValueError(
            f"--data {found['data']}: other classes or channels than {run} was trained on; give its own data"
        )
    about = info["data"] | {"mean": list(loaded.info.mean), "std": list(loaded.info.std)}
    source = Source(
        network=network.float(),
        architecture=info["architecture"],
        build=info["build"],
        folded=info["folded"],
        data=about,
        test=lambda: _test_batches(loaded, images),
        training=lambda count: _training_batches(loaded, count, info["seed"] or 0),
        say=say,
    )
    return source, info


def _test_batches(data: ImageData, images: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    left = len(data.test) if images is None else images
    for x, y in evaluation_batches(data.test, data.info, EVALUATION_BATCH, "cpu"):
        yield x[:left], y[:left]
        left -= len(x)
        if left <= 0:
            return


def _training_batches(data: ImageData, count: int, seed: int) -> Iterable[Tensor]:
    """So many training images, drawn by the seed, prepared as test images are."""
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    return (x for x, _ in evaluation_batches(data.train, data.info, _CALIBRATION_BATCH, "cpu", indices=drawn))


def export_run(
    run: Path, formats: Sequence[str], out: Path | None = None, *, say: Say = print, **where: Any
) -> dict[str, Any]:
    """Export a run in formats of FORMATS (`all`: every one) into `out` (default: `export` in the run's folder).

    A file appears there under its own name once its proof holds. Of `all` a format that cannot hold the network is
    noted with the reason, and its file of an earlier export removed; of formats that were named it is an error, and
    such a file stays. `where`: as `source_of` takes it. Returns the manifest, which lies beside the files. Raises
    ValueError.
    """
    wanted = list(FORMATS) if "all" in formats else list(dict.fromkeys(formats))
    source, info = source_of(run, say=say, **where)
    folder = Path(out) if out is not None else Path(run) / "export"
    manifest = _manifest(folder, run, info, source)
    if not manifest["finished"]:
        say(f"RUN {run}: its training is not finished; exported as it stands after epoch {info['epoch']}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}; give another folder") from error
    _sweep(folder)
    refused = {}
    for name in wanted:
        try:
            entry = _export_one(FORMATS[name], source, folder, say)
        except ValueError as error:
            if "all" not in formats:
                raise ValueError(f"--format {name}: {error}") from error
            refused[name] = str(error)
            say(f"{name}: not written: {error}")
            _withdraw(name, str(error), manifest, folder, say)
            continue
        manifest["files"][name] = entry
        manifest["refused"].pop(name, None)
        write_json(folder / MANIFEST, manifest)
    if len(refused) == len(wanted):
        raise ValueError("--format all: no format holds this network; the reasons are above")
    manifest["refused"] |= refused
    write_json(folder / MANIFEST, manifest)
    return read_json(folder / MANIFEST)


def _manifest(folder: Path, run: Path, info: dict[str, Any], source: Source) -> dict[str, Any]:
    """What is known of the folder, or a new manifest. Raises ValueError where another network's files lie there."""
    new = {
        "schema": MANIFEST_SCHEMA,
        "run": str(run),
        **{key: info[key] for key in ("method", "dataset", "seed", "epoch", "checkpoint", "state_digest")},
        "finished": (Path(run) / "result.json").is_file(),
        "images": source.data,  # what every format takes: so many pixels, less this mean, divided by this deviation
        "environment": describe("cpu"),
        "files": {},
        "refused": {},
    }
    path = folder / MANIFEST
    if folder.is_file():
        raise ValueError(f"--out: {folder} is a file; give a folder")
    if not path.exists():
        return new
    found = check_schema(read_json(path), MANIFEST_SCHEMA, str(path), "the record of an export")
    if found.get("state_digest") != info["state_digest"]:
        raise ValueError(f"--out {folder}: holds the export of another network; give another folder")
    return new | {key: found[key] if isinstance(found.get(key), dict) else {} for key in ("files", "refused")}


def _withdraw(name: str, reason: str, manifest: dict[str, Any], folder: Path, say: Say) -> None:
    """Remove a format's entry and file of an earlier export: a format is written or refused, never both."""
    if manifest["files"].pop(name, None) is None:
        return
    manifest["refused"][name] = reason
    write_json(folder / MANIFEST, manifest)
    (folder / FORMATS[name].file).unlink(missing_ok=True)
    say(f"{name}: the file of an earlier export is removed")


def _sweep(folder: Path) -> None:
    """Remove what exports that were killed left half-written; those of processes that live go on."""
    ours = {MANIFEST, *(form.file for form in FORMATS.values())}
    for path in folder.glob(f"{TEMPORARY}*"):
        owner, _, name = path.name.removeprefix(TEMPORARY).partition("-")
        name = name.removeprefix(f"{TEMPORARY}{owner}-")  # `write_bytes` writes aside what is aside already
        if name in ours and owner.isascii() and owner.isdigit() and not _others(int(owner)):
            path.unlink(missing_ok=True)


def _others(process: int) -> bool:
    """Whether another process of this number lives."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def _export_one(form: Format, source: Source, folder: Path, say: Say) -> dict[str, Any]:
    """Write one file aside, check it and rename it; its entry of the manifest."""
    path = folder / form.file
    aside = folder / f"{TEMPORARY}{os.getpid()}-{form.file}"
    try:
        form.write(source, aside)
        say(f"{form.name}: {aside.stat().st_size:,} bytes written; checking them on images")
        figures = form.check(source, aside)
        digest = hashlib.sha256(aside.read_bytes()).hexdigest()
        os.replace(aside, path)
        fsync_folder(folder)
    except ValueError as error:
        raise ValueError(str(error).replace(str(aside), str(path))) from error
    finally:
        aside.unlink(missing_ok=True)
    say(f"{form.name}: {path}")
    return {"file": form.file, "bytes": path.stat().st_size, "sha256": digest, "figures": figures}
