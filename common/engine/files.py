# SPDX-License-Identifier: Apache-2.0
"""Small files that a crash cannot tear: written aside, synced, renamed; and JSON read as data with limits."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from common.strict_json import parse_json

TEMPORARY = ".tmp-"  # the prefix of everything unfinished; nobody reads such a name
MAX_JSON_BYTES = 16 * 2**20


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a new file) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it. Not atomic: for files inside a folder that is renamed later."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def unwritten(path: Path, error: OSError) -> OSError:
    """The same error with the file in its message: the system does not name what it could not write."""
    return OSError(error.errno, f"cannot write {path}: {error.strerror or error}")


def write_bytes(path: Path, data: bytes) -> Path:
    """Replace `path` by `data` atomically: readers see the old file or the new one, also after a power cut.

    Raises OSError, with the path in its message, when the disk refuses; the old file is whole and no debris stays.
    """
    path = Path(path)
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        aside.unlink(missing_ok=True)
        write_synced(aside, data)
        os.replace(aside, path)
        fsync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise unwritten(path, error) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def plain(value: Any, name: str = "value") -> Any:
    """The same value in JSON's types: tuples become lists, paths strings, non-finite floats None.

    Raises ValueError that names the entry when something else is found (a tensor, an object).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN; strict readers would refuse the file
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise ValueError(f"{name}: {type(value).__name__} cannot be written as JSON; give numbers, strings, lists, dicts")


def write_json(path: Path, value: Any) -> Path:
    """Write `value` (through `plain`) as indented JSON, atomically. Raises OSError, ValueError."""
    text = json.dumps(plain(value, Path(path).name), indent=1, allow_nan=False)
    return write_bytes(path, text.encode() + b"\n")


def read_regular(path: Path, limit: int, what: str = "content") -> bytes:
    """All bytes of a regular file. Raises ValueError naming the file: missing, a folder, a device or pipe (which may
    never end), or more than `limit` bytes of `what`.
    """
    path = Path(path)
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{path}: cannot be read (Is a directory)")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: cannot be read (a device or a pipe, not a file)")
        if found.st_size > limit:
            raise ValueError(f"{path}: {found.st_size:,} bytes of {what}; at most {limit:,} are read")
        with open(path, "rb") as file:
            # No more than its size said, or a little where that says 0 (the system's own files): never all that flows.
            data = file.read(min(limit, max(found.st_size, 2**16)) + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes of {what}, which are not read")
    return data


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file as data. Raises ValueError naming the file: missing, too large, too deep or not JSON.

    What counts as JSON: see `parse_json`.
    """
    data = read_regular(path, limit, "JSON")
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def check_schema(data: Any, schema: int, where: str, what: str) -> dict[str, Any]:
    """The object `data` itself when it is of this schema. Raises ValueError that begins with `where` and names the
    schema that it is of: a file of a later version is not guessed at.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise ValueError(f"{where}: not {what} (no schema)")
    if data["schema"] is True or data["schema"] != schema:
        raise ValueError(
            f"{where}: {what} of schema {data['schema']!r}, and this version reads schema {schema}; use the version "
            "that wrote it"
        )
    return data
