# SPDX-License-Identifier: Apache-2.0
"""What a reader of the registry is asked for, and the messages all readers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("data")
"""Where sets are looked for without --data, and where archives are unpacked to: `data/` in the working folder."""


@dataclass(frozen=True)
class Request:
    """One call of `load`: what was given (None: not given), and how to tell the user what happens."""

    root: Path | None
    image_size: int | None
    download: bool
    say: Callable[[str], None]
    workers: int = 0
    """Threads that decode images, for sets that are read while they are used."""
    trainfile: Path | None = None
    valfile: Path | None = None


def missing(name: str, root: Path, expected: str, reason: str = "") -> ValueError:
    """The error for a set that is neither there nor can be fetched; it names every way out."""
    because = f" ({reason})" if reason else ""
    return ValueError(
        f"--dataset {name}: not found in {root} and not downloaded{because}. Ways out: --data ROOT with a folder that "
        f"holds {expected}; or run once on a machine with a network (the download goes to --data) and copy that "
        "folder; or --dataset digits, which needs no file"
    )


def damaged(name: str, path: Path, folder: Path) -> ValueError:
    """The error for a file that is there and is not the published one."""
    return ValueError(
        f"--dataset {name}: {path} is missing or not the published file (its checksum differs). "
        f"Remove {folder} and load again, or point --data at a whole copy"
    )
