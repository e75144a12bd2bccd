# SPDX-License-Identifier: Apache-2.0
"""Python files that a run's record names: one from elsewhere runs no code, the present command's flags do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.engine.changes import flag
from common.engine.repeat import OWN_CODE


def own_code(name: str, flags: Mapping[str, Any], given: Any, where: str) -> Any:
    """What the present command's flag says (`given`) in place of `flags[name]` of a run's record; None for neither.

    Raises ValueError, beginning with `where` (flag and folder of the run), when only the record names a file.
    """
    if given is not None or flags.get(name) is None:
        return given
    raise ValueError(
        f"{where}: was made with {flag(name)} {str(flags[name])[:200]!r}; a Python file is not executed because a run "
        f"names it: read it, then give {flag(name)} {OWN_CODE[name]} yourself"
    )


def same_function(given: str, recorded: Any) -> bool:
    """Whether FILE.py:FUNCTION is what a record names, wherever the file lies by now."""
    mine, theirs = (str(spec).rpartition(":") for spec in (given, recorded))
    return Path(mine[0]).name == Path(theirs[0]).name and mine[2] == theirs[2]
