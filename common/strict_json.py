# SPDX-License-Identifier: Apache-2.0
"""JSON from elsewhere, read as data: what a program could stumble over later is refused here.

It lies below all wings, since data, nets and engine read JSON and do not know each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

MAX_DEPTH = 64
MAX_DIGITS = 300  # of a whole number: more do not fit a float


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError that says what is wrong.

    Stricter than Python's own reader: no NaN and no infinity, no number beyond a float, no key twice in an object, no
    text that UTF-8 cannot write, at most MAX_DEPTH lists and objects within each other.
    """
    try:
        value = json.loads(
            data, parse_constant=_refuse, parse_float=_finite, parse_int=_whole, object_pairs_hook=_each_once
        )
        _check_depth_and_text(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"no text of UTF-8: {error.reason}") from error
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond what a float holds")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text):,} digits")
    return int(text)


def _each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} is there twice")
        found[key] = value
    return found


def _check_depth_and_text(value: Any) -> None:
    """Raise RecursionError beyond MAX_DEPTH, ValueError for text that UTF-8 cannot write."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                item.encode()
        if not below:
            return
        level = below
    raise RecursionError
