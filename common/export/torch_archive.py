# SPDX-License-Identifier: Apache-2.0
"""What a program of torch.export may hold, checked before torch reads it.

torch's own loader runs code that a file brings along: pickled objects (where its strict reader refuses one it falls
back to the one that runs everything), compiled libraries, sizes given as text that is evaluated, operators named by any
path below `torch`, names that become lines of Python. So the file is read here first. It may hold what export.py writes
and nothing else: raw tensors, no pickle, a graph of operators of `torch.ops.aten` and of arithmetic, plain names.
torch is then given an archive made anew of what was checked, so that no other reading of the file counts.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.engine.files import read_regular
from common.strict_json import parse_json

_LIMIT = 2**32  # bytes of a file
_CURE = "give a file that export.py wrote"
_ROOT = "archive"
_EXAMPLES = "data/sample_inputs/model.pt"
_PAYLOADS = {
    "data/weights/model_weights_config.json": ("data/weights/", "weight_"),
    "data/constants/model_constants_config.json": ("data/constants/", "tensor_"),
}
_GRAPH = "models/model.json"
_NEEDED = {*_PAYLOADS, _GRAPH, _EXAMPLES, "archive_format", "archive_version"}
_MEMBERS = _NEEDED | {".data/version", ".data/serialization_id", "byteorder"}
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,9}")

_NAME = re.compile(r"-?[\w.]*", re.ASCII)
_WORDS = (
    *("Symbol", "Integer", "Rational", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv"),
    *("positive", "nonnegative", "negative", "integer", "True", "False"),
)
_SIZE = re.compile(
    rf"(?:\b(?:{'|'.join(_WORDS)})\b|'[a-z]\w*'|\b[a-z][0-9]{{1,9}}\b|\b[0-9]{{1,18}}\b|[-+/(),= ]|\*(?!\*))*"
)
_TREE = re.compile(
    r'(?:[][{}:, 1]|null|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")*', re.ASCII
)
_TEXTS = {
    "expr_str": _SIZE,
    "in_spec": _TREE,
    "out_spec": _TREE,
    "as_string": re.compile(r"[\w., >-]*", re.ASCII),
    "nn_module_stack": re.compile(r"[\w.,;@<> \[\]'()-]*", re.ASCII),
    "torch_version": re.compile(r"[\w.+-]*", re.ASCII),
}
"""What the texts below a key may be; every other text, and every key, is a `_NAME`."""
_ARITHMETIC = re.compile(r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)")
_SYMBOLIC = re.compile(r"torch\.sym_(int|float|max|min|sum|not|ite)")
_WITH_FILES = ("from_file",)  # of the operators of aten, what touches more than its tensors
_LONGEST = 10_000  # characters of one text


def checked_program(path: Path) -> io.BytesIO:
    """The archive at `path`, made anew of what was checked. Raises ValueError naming the file, the reason and the cure
    for anything that export.py does not write.
    """
    try:
        members = _members(read_regular(path, _LIMIT))
        _check_members(members)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{path}: is no program of torch.export, or damaged ({error}); export the run again"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(str(path)) else f"{path}: {reason}; {_CURE}") from error
    fresh = io.BytesIO()
    with zipfile.ZipFile(fresh, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), data)
    fresh.seek(0)
    return fresh


def _members(data: bytes) -> dict[str, bytes]:
    """The members by name, without the folder that all of them lie in."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            if name not in _MEMBERS and not _TENSOR.fullmatch(name):
                raise ValueError(f"holds {entry.filename[:80]!r}, which no exported network has")
            if name in found or entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"holds {name!r} twice, or compressed")
            found[name] = archive.read(entry)
    return found


def _check_members(members: dict[str, bytes]) -> None:
    if missing := sorted(_NEEDED - members.keys()):
        raise ValueError(f"lacks {missing[0]}")
    if members["archive_format"] != b"pt2":
        raise ValueError("is an archive of another kind")
    if members[_EXAMPLES]:
        raise ValueError(f"holds pickled objects ({_EXAMPLES})")
    for name, (folder, prefix) in _PAYLOADS.items():
        for tensor, entry in _json(members[name], name)["config"].items():
            _check_payload(tensor, entry, prefix, members[folder + entry["path_name"]])
    program = _json(members[_GRAPH], _GRAPH)
    if program["guards_code"] or program["graph_module"]["treespec_namedtuple_fields"]:
        raise ValueError("holds conditions or types as text")
    _check_operators(program)


def _json(data: bytes, name: str) -> Any:
    try:
        value = parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error})") from error
    _check_texts(value, "")
    return value


def _check_texts(value: Any, key: str) -> None:
    """Raise ValueError for a text that could be more than a name, a number or arithmetic. `key`: what it is below."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_texts(name, "")
            _check_texts(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_texts(part, key)
    elif isinstance(value, str) and (len(value) > _LONGEST or not _TEXTS.get(key, _NAME).fullmatch(value)):
        raise ValueError(f"holds the text {value[:60]!r}{f' as {key}' if key else ''}, which no exported network has")


def _check_payload(tensor: str, entry: dict[str, Any], prefix: str, stored: bytes) -> None:
    """One tensor of a table: raw bytes, and no more made of them than there are."""
    if entry["use_pickle"] is not False:
        raise ValueError(f"holds pickled objects ({tensor})")
    if not entry["path_name"].startswith(prefix) or entry["tensor_meta"]["device"]["type"] != "cpu":
        raise ValueError(f"{tensor}: is stored as no exported network's tensor is")
    if not stored and math.prod(size["as_int"] for size in entry["tensor_meta"]["sizes"]):
        raise ValueError(f"{tensor}: has no content")


def _check_operators(value: Any) -> None:
    """Raise ValueError for an operator that could be more than a computation, anywhere in a program's JSON."""
    if isinstance(value, list):
        for part in value:
            _check_operators(part)
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        if key in ("target", "as_operator") and isinstance(part, str) and not _is_computation(part):
            raise ValueError(f"calls {part[:80]!r}, which is no operator of torch.ops.aten")
        if key == "metadata" and isinstance(part, dict) and not part.keys() <= {"nn_module_stack"}:
            raise ValueError(f"notes {sorted(part.keys() - {'nn_module_stack'})[0][:60]!r} of a step")
        _check_operators(part)


def _is_computation(target: str) -> bool:
    if _ARITHMETIC.fullmatch(target) or _SYMBOLIC.fullmatch(target):
        return True
    parts = target.split(".")
    if parts[:3] != ["torch", "ops", "aten"] or len(parts) != 5 or parts[3] in _WITH_FILES:
        return False
    packet = getattr(torch.ops.aten, parts[3], None)
    return isinstance(packet, torch._ops.OpOverloadPacket) and parts[4] in packet.overloads()
