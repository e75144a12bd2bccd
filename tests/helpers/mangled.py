# SPDX-License-Identifier: Apache-2.0
"""Bad files and bad flags, drawn at random, and what a program must make of them: a clean message or a right result."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

SECONDS = 120  # a case that takes longer hangs; the slowest takes a few seconds on a busy machine
# what readers stumble over: each a value that JSON can say, or nearly can
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 32, 10**9, 2**63, 10**30, -(10**30), 10**308, 0.5, -0.0, 1e308, 5e-324),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        " ",
        "x",
        "none",
        "../..",
        "/",
        ".",
        "~",
        "runs",
        "0 1 2",
        "[",
        "{",
        "%s",
        "-1",
    ),
    *("a" * 300, "9" * 400, "\u00b2", "\u2028", "\ud800", "a\0b", "\x1b[2J", "__class__", "os.system", "1e999", "NaN"),
    *([], {}, [[]], [None], [1, 2], ["a"], {"a": 1}, {"": {}}, [[1, 1], [2, 2]], ["sep_conv_3x3", 0], ["zero", -1]),
    *([0] * 64, [[2, 2]] * 40, {"schema": 1}, {"schema": 2}, {"kind": "uniform", "uniform": [2, 2]}),
)
DEEP = "[" * 5000 + "]" * 5000


def many(cases: int) -> settings:
    """The same cases on every run and machine."""
    return settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # a failing case is printed as it is: shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """A case took too long; no handler of the program catches it."""


@contextlib.contextmanager
def within(seconds: int = SECONDS) -> Iterator[None]:
    """Raise Hang in the code below when it takes longer."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s")

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below, with the digest of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clean(program: Callable[[], Any], *, codes: tuple[int, ...] = (0, 1, 2)) -> tuple[int, str]:
    """Run a program's `main` in this process: (exit code, what it printed).

    Any exception but SystemExit comes through, and so fails the test with its traceback. A refusal (code 2) must say
    something.
    """
    out, err = io.StringIO(), io.StringIO()
    with within(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program()
        except SystemExit as stop:
            code = stop.code
    text = out.getvalue() + err.getvalue()
    assert code in codes, (code, text)
    assert "Traceback" not in text, text
    out.getvalue().encode()  # what a terminal could not take; stderr writes such letters as codes
    if code == 2:
        lines = [line for line in text.splitlines() if line.strip()]
        assert lines and all(len(line) < 4000 for line in lines[:1]), text[:4000]
    return code, text


def refusal(action: Callable[[], Any]) -> str | None:
    """The message of the ValueError that `action` raises, None where it succeeds; every other exception comes through.

    A message names something and is no endless one.
    """
    with within():
        try:
            action()
        except ValueError as error:
            message = str(error)
            assert message and len(message) < 20_000, message[:2000]
            return message
    return None


# ------------------------------------------------------------------------------------------------ strategies


def nasty() -> st.SearchStrategy[Any]:
    """One value that a reader may stumble over."""
    small = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=8,
    )
    return st.sampled_from(NASTY).map(copy.deepcopy) | small


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:12]):
            yield from _places(item, (*path, index))


@st.composite
def edited(draw: st.DrawFn, value: Any, edits: int = 2) -> Any:
    """A JSON value with one or a few places replaced, removed, doubled or added."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, edits))):
        places = list(_places(found))
        if not places:
            return draw(nasty())
        *way, last = draw(st.sampled_from(places))
        at = found
        for key in way:
            at = at[key]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "whole")))
        if kind == "whole":
            return draw(nasty())
        if kind == "remove":
            del at[last]
        elif kind == "add" and isinstance(at, list):
            at.append(draw(nasty()))
        elif kind == "add":
            at[draw(st.text(max_size=8))] = draw(nasty())
        else:
            at[last] = draw(nasty())
    return found


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The same bytes with a bit flipped, cut off, zeroed, emptied, grown or replaced."""

    @st.composite
    def drawn(draw: st.DrawFn) -> bytes:
        kind = draw(st.sampled_from(("flip", "flip", "flip", "cut", "zero tail", "empty", "grow", "other", "hole")))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "flip" and data:
            return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        if kind == "cut":
            return data[:at]
        if kind == "zero tail":
            return data[:at] + bytes(len(data) - at)
        if kind == "grow":
            return data + draw(st.binary(min_size=1, max_size=64))
        if kind == "other":
            return draw(st.binary(max_size=200))
        if kind == "hole":
            return data[:at] + data[at + draw(st.integers(1, 64)) :]
        return b""

    return drawn()


def json_text(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that was edited, damaged, or written by somebody with other ideas."""
    text = json.dumps(value, indent=1).encode()
    special = [DEEP.encode(), b"", b"[", b"\xff\xfe{}", b'{"a": 1, "a": 2}', b"9" * 5000, b" " * 3_000_000 + b"{}"]
    some = edited(value).map(lambda found: json.dumps(found).encode())
    return st.one_of(some, some, some, damaged(text), st.sampled_from(special))


def sign(folder: Path) -> None:
    """Give an edited checkpoint digests that fit: what somebody who made the file on purpose would do."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    data = (folder / "state.pt").read_bytes()
    meta["files"]["state.pt"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    seal(path, meta)


def seal(path: Path, meta: dict[str, Any]) -> None:
    """Write a meta.json with the digest of its own content."""
    body = {key: value for key, value in meta.items() if key != "meta_sha256"}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "meta_sha256": own}))


class Payload:
    """What a malicious pickle asks for: a file appears when anybody follows it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))
