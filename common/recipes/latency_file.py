# SPDX-License-Identifier: Apache-2.0
"""A table of latencies, from its file."""

from __future__ import annotations

from pathlib import Path

from common.cost.latency import LatencyTable, read_table
from common.engine.files import read_regular

_MAX_BYTES = 20_000_000


def load_table(path: Path, flag: str = "--lut") -> LatencyTable:
    """The table in a file. Raises ValueError naming the flag, the file and the line."""
    where = f"{flag} {path}"
    if not Path(path).is_file():
        raise ValueError(
            f"{where}: there is no such file; python -m common.cost latency measure --out {path} writes one"
        )
    try:
        return read_table(read_regular(Path(path), _MAX_BYTES).decode(), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no table of latencies: no text of UTF-8") from error
