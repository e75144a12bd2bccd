# SPDX-License-Identifier: Apache-2.0
"""What torch saved, read as data and never as code: tensors and plain values, or a refusal that names the culprit."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from common.engine.shortage import has_room, is_shortage

# torch's text goes on with how to load the file all the same
_ADVICE = re.compile(r"Please (use|file)|Check the documentation|To execute|This is an internal")
_TRUST = ("Weights only load failed", "weights_only", "Re-running", "trust")
_USUAL = ("torch", "collections")


def load_plain(data: bytes, where: str) -> Any:
    """The tensors (on the CPU) and plain values in `data`, which torch.save wrote.

    Raises ValueError that begins with `where` for anything else; what would have run code is told by the name of the
    refused global, and nothing of it is imported or called.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on how else such a file could be loaded
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # made-up bytes make the reader fail in any way there is; it fails here, by name
        if is_shortage(error) and not has_room(len(data)):
            raise  # a good file must not be passed over because memory is full just now
        raise ValueError(f"{where}: refused or unreadable: {_reason(error, data)}") from error


def _reason(error: Exception, data: bytes) -> str:
    """torch's cause without its advice to load with full trust, and the globals where it did not name one."""
    lines = [_ADVICE.split(line)[0].strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not any(word in line for word in _TRUST)]
    cause = " ".join(kept)[:300] or type(error).__name__
    strange = [name for name in named_globals(data) if name.split(".")[0] not in _USUAL and name not in cause]
    return f"it asks for {', '.join(strange[:5])[:300]} ({cause})" if strange else cause


def named_globals(data: bytes) -> list[str]:
    """The dotted names of everything that a pickle (or torch's archive of one) would import, each once, in order.

    The pickle's codes are listed, not followed; what is cut off or no pickle names what came before.
    """
    found: dict[str, None] = {}
    texts: list[str] = []
    memo: dict[int, str] = {}
    stream = io.BytesIO(_pickle_of(data))
    try:
        for code, argument in _codes(stream):
            if code.name in ("GLOBAL", "INST"):
                found[str(argument).replace(" ", ".")] = None
            elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                found[".".join(texts[-2:])] = None
            elif code.name == "MEMOIZE":
                memo[len(memo)] = texts[-1] if texts else ""
            elif code.name in ("BINGET", "LONG_BINGET", "GET"):
                texts.append(memo.get(int(argument), "?"))
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # the end of what is a pickle; pickletools raises whatever the bytes make it raise
        return list(found)
    return list(found)


def _codes(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """(code, argument) of all pickles in a row: torch's older files hold several."""
    while stream.tell() < len(stream.getbuffer()):
        for code, argument, _ in pickletools.genops(stream):
            yield code, argument


def _pickle_of(data: bytes) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), "")
        return archive.read(name) if name else b""
