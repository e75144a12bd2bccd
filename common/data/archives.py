# SPDX-License-Identifier: Apache-2.0
"""Unpacking of archives into a cache, whole or not at all, also when several processes do it at once."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.data.request import DEFAULT_ROOT

_DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile)


def unpack_tar(archive: Path, folder: str, say: Callable[[str], None]) -> Path:
    """Unpack `folder` of a .tar.gz or .tar.xz into the cache; returns the unpacked folder, at once if it is there.

    Raises ValueError naming the archive when it is damaged, or the cache when it cannot be written.
    """

    def fill(aside: Path) -> None:
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if Path(member.name).parts[:1] == (folder,)]
            tar.extractall(aside, members, filter="data")

    return _unpack([archive], Path(folder), fill, say)


def unpack_gzips(archives: Sequence[Path], folder: Path, say: Callable[[str], None]) -> Path:
    """Unpack single .gz files into `folder` of the cache, each without its suffix; otherwise as `unpack_tar`."""

    def fill(aside: Path) -> None:
        (aside / folder).mkdir(parents=True)
        for archive in archives:
            with gzip.open(archive) as source, (aside / folder / archive.stem).open("wb") as target:
                shutil.copyfileobj(source, target)

    return _unpack(archives, folder, fill, say)


def _unpack(archives: Sequence[Path], folder: Path, fill: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    first = archives[0]
    caches = (DEFAULT_ROOT, first.parent)
    for cache in caches:
        if (cache / folder).is_dir():
            return cache / folder
    with aside_in(caches) as aside:
        target = aside.parent / folder
        say(f"unpacking {first if len(archives) == 1 else f'{first.parent} (*.gz)'} to {target} (once)")
        try:
            fill(aside)
        except _DAMAGED as error:
            raise ValueError(f"{first}: damaged or incomplete ({error}); fetch it again") from error
        except OSError as error:
            raise ValueError(f"{first}: cannot be unpacked to {target} ({error})") from error
        if not (aside / folder).is_dir():
            raise ValueError(f"{first}: holds no folder {folder}; this is another archive")
        move_in(aside / folder, target)
    return target


@contextmanager
def aside_in(places: Sequence[Path]) -> Iterator[Path]:
    """A new empty folder inside the first of `places` that can be written; removed at the end.

    Raises ValueError naming the places when none can be.
    """
    for place in places:
        new = not place.exists()
        try:
            place.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place))
        except OSError:
            continue
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if new and not any(place.iterdir()):
                place.rmdir()
        return
    names = " nor ".join(str(place) for place in dict.fromkeys(places))
    raise ValueError(f"--data: cannot write to {names}; give a folder that holds the unpacked files")


def move_in(source: Path, target: Path) -> None:
    """Rename `source` to `target`; where another process was first, its copy is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
