# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere are data: what would run code is refused by name, what is too large or no JSON by its file."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
import report
import sweep
import visualize
from common.engine import load_state, read_json
from common.engine.safe_load import load_plain, named_globals
from common.nets import load_architecture
from common.recipes.gammas import NAMES, read_gammas
from common.strict_json import MAX_DEPTH, parse_json
from tests.helpers.mangled import Payload, clean, sign, snapshot
from tests.helpers.smoke_runs import SMOKE, call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of smoke size."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    code, said = call("qdarts/train.py", [*SMOKE, "--arch", "PC_DARTS", "--epochs", "1", "--save", str(folder)])
    assert code == 0, said
    return folder


# ------------------------------------------------------------------------------------------------ pickles


def archive(content: bytes) -> bytes:
    """What torch.save writes today, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def saved(value: Any, *, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


class Asks:
    """A pickle that asks for any function and arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.asked = (function, arguments)

    def __reduce__(self) -> Any:
        return self.asked


def malicious(canary: Path) -> dict[str, tuple[bytes, str]]:
    """kind -> (file, the global that must be named). Each makes the folder `canary` when it is followed."""
    make = f"__import__('os').mkdir({str(canary)!r})"
    found: dict[str, tuple[bytes, str]] = {}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps({"model": Payload(canary)}, protocol=protocol)
        found[f"protocol {protocol}"] = (content, "posix.mkdir")
        found[f"protocol {protocol} in an archive"] = (archive(content), "posix.mkdir")
    for legacy in (False, True):
        found[f"torch.save, legacy={legacy}"] = (saved({"model": [Payload(canary)]}, legacy=legacy), "posix.mkdir")
    found["eval"] = (saved({"a": Asks(eval, make)}, legacy=False), "eval")
    found["exec after tensors"] = (saved({"model": torch.zeros(9), "a": Asks(exec, make)}, legacy=False), "exec")
    nested = pickle.dumps(Payload(canary))
    found["a pickle in a pickle"] = (saved({"a": Asks(pickle.loads, nested)}, legacy=False), "pickle.loads")
    found["torch's own loader"] = (saved({"a": Asks(torch.load, "x", None)}, legacy=False), "torch.serialization.load")
    text = str(canary).encode()
    found["by hand, INST"] = (archive(b"(S'" + text + b"'\nios\nmkdir\n."), "os.mkdir")
    found["by hand, names from the memo"] = (
        archive(
            pickle.PROTO
            + b"\x04\x8c\x05posix\x94\x8c\x05mkdir\x94h\x00h\x01\x93\x8c"
            + bytes([len(text)])
            + text
            + b"\x85R."
        ),
        "posix.mkdir",
    )
    return found


KINDS = tuple(malicious(Path("canary")))


@pytest.mark.parametrize("kind", KINDS)
def test_code_is_refused_by_its_name(kind: str, tmp_path: Path, trained: Path) -> None:
    canary = tmp_path / "canary"
    data, name = malicious(canary)[kind]
    if "protocol" in kind and "archive" not in kind:  # else nobody could say that the file is malicious at all
        pickle.loads(data)
        assert canary.is_dir()
        canary.rmdir()
    gammas = tmp_path / "gamma_checkpoint.t7"
    gammas.write_bytes(data)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = max((run / "checkpoints").iterdir())
    (newest / "state.pt").write_bytes(data)
    sign(newest)
    readers: dict[str, Callable[[], Any]] = {
        "state.pt": lambda: load_state(newest),
        "gamma_checkpoint.t7": lambda: read_gammas(gammas),
        "x": lambda: load_plain(data, "x"),
    }
    for file, read in readers.items():
        with pytest.raises(ValueError, match=rf"{file}: refused or unreadable: .*{name}") as caught:
            read()
        assert not re.search("weights_only=False|safe_globals|can still be loaded|trust", str(caught.value))
    assert not canary.exists()
    assert any(name in found for found in named_globals(data))


@pytest.mark.parametrize("program", ["evaluate", "resume", "init-from", "teacher", "weights-path"])
def test_programs_refuse_it_in_one_line(program: str, tmp_path: Path, trained: Path) -> None:
    canary, run = tmp_path / "canary", tmp_path / "run"
    data, name = malicious(canary)["torch.save, legacy=False"]
    shutil.copytree(trained, run)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "state.pt").write_bytes(data)
        sign(checkpoint)
    (tmp_path / "g.t7").write_bytes(data)
    train = [*SMOKE, "--arch", "PC_DARTS"]
    (run / "result.json").unlink()
    before = snapshot(run)
    main, argv = {
        "evaluate": ("evaluate.py", [str(run), "--device", "cpu"]),
        "resume": ("qdarts/train.py", [*train, "--epochs", "1", "--save", str(run), "--resume", "auto"]),
        "init-from": ("qdarts/train.py", [*train, "--dry-run", "--init-from", str(run)]),
        "teacher": ("qdarts/train.py", [*train, "--dry-run", "--teacher", str(run)]),
        "weights-path": ("qdarts/train.py", [*train, "--dry-run", "--weights-path", str(tmp_path / "g.t7")]),
    }[program]
    code, said = call(main, argv) if program == "weights-path" else _with_stderr(main, argv)
    assert code == 2 and name in said and "Traceback" not in said, said
    assert not canary.exists() and snapshot(run) == before


def _with_stderr(program: str, argv: list[str]) -> tuple[int, str]:
    from importlib import import_module

    return clean(lambda: import_module(program.removesuffix(".py").replace("/", ".")).main(argv))


def test_what_is_harmless_still_loads() -> None:
    value = {"a": torch.arange(3), "b": [1, 2.5, None, "x", b"y"], "c": (torch.float32, torch.Size([1]))}
    for legacy in (False, True):
        found = load_plain(saved(value, legacy=legacy), "x")
        assert torch.equal(found.pop("a"), torch.arange(3)) and found == {key: value[key] for key in ("b", "c")}


@pytest.mark.parametrize(
    "shape", [(10**9, 2), (0, 2), (1, 3), (2,)], ids=["a billion cells", "no cell", "other bits", "flat"]
)
def test_gammas_of_a_shape_that_no_search_has(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A few bytes can claim any size: strides of zero."""
    first = torch.zeros(1).expand(shape)
    rest = {name: torch.zeros(1, 2) if "preprocess" in name else torch.zeros(1, 14, 6, 2) for name in NAMES}
    torch.save({**rest, NAMES[0]: first}, tmp_path / "g.t7")
    assert (tmp_path / "g.t7").stat().st_size < 20_000
    with pytest.raises(ValueError, match="--weights-path .*g.t7: "):
        read_gammas(tmp_path / "g.t7")


# ------------------------------------------------------------------------------------------------ JSON

BAD_JSON: dict[str, tuple[bytes, str]] = {
    "huge": (b'{"a": "' + b"x" * (17 * 2**20) + b'"}', "bytes"),
    "deep": (b'{"seed": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a little deep": (b'{"seed": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "nested too deeply"),
    "NaN": (b'{"seed": NaN}', "NaN"),
    "infinity": (b'{"seed": -Infinity}', "-Infinity"),
    "beyond a float": (b'{"seed": 1e999}', "1e999"),
    "endless number": (b'{"seed": ' + b"9" * 5000 + b"}", "5,000 digits"),
    "key twice": (b'{"seed": 1, "seed": 2}', "'seed' is there twice"),
    "half a letter": (b'{"seed": "\\ud800"}', "UTF-8"),
    "no UTF-8": (b'{"seed": "\xff"}', "UTF-8"),
    "torn": (b'{"seed": 1', "JSON"),
    "nothing": (b"", "JSON"),
    "no object": (b"[1]", "object"),
}
READERS = {
    "--config": ("c.json", lambda path: _with_stderr("qdarts/train.py", ["--config", str(path)])),
    "--arch": ("a.json", lambda path: _with_stderr("qdarts/train.py", ["--arch", str(path)])),
    "--arch RUN": ("architecture.json", lambda path: _with_stderr("qdarts/train.py", ["--arch", str(path.parent)])),
    "visualize": ("a.json", lambda path: clean(lambda: visualize.main([str(path), "--out", str(path) + ".svg"]))),
    "plan": ("p.json", lambda path: clean(lambda: sweep.main([str(path), "--dry-run"]))),
    "report": ("result.json", lambda path: clean(lambda: report.main([str(path.parent)]))),
    "evaluate": ("config.json", lambda path: clean(lambda: evaluate.main([str(path.parent)]))),
}


@pytest.mark.parametrize("kind", BAD_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_is_refused(reader: str, kind: str, tmp_path: Path) -> None:
    """By every program that reads JSON of others, with the file and the reason."""
    content, reason = BAD_JSON[kind]
    name, read = READERS[reader]
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path.write_bytes(content)
    code, said = read(path)
    assert code in (1, 2) and str(path.parent) in said, said[:500]
    if reader != "evaluate" or kind != "no object":  # which says whose it is not
        assert reason.lower() in said.lower(), said[:500]
    assert len(said) < 3000 and [entry.name for entry in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("value", [None, [], "x", {}, 1.5, True, {"seed": {}}])
def test_wrong_types_of_flags(value: Any, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"epochs": value}))
    code, said = _with_stderr("qdarts/train.py", ["--config", str(tmp_path / "c.json")])
    assert code == 2 and "'epochs'" in said


def test_strict_json_reads_what_json_is() -> None:
    values = [None, True, 0, -1, 10**299, 1e308, 5e-324, "\u00e9\u2028\U0001f600", [[]], {"a": {"a": 1}}, 0.1 + 0.2]
    for value in values:
        assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value, ensure_ascii=False).encode())
    deepest = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert json.dumps(parse_json(deepest)).replace(" ", "") == deepest


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """A pipe without a writer would wait for ever, a device never ends."""
    import os

    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="a device or a pipe"):
            read_json(path)
        with pytest.raises(ValueError):
            load_architecture(path)
        code, said = _with_stderr("qdarts/train.py", ["--config", str(path)])
        assert code == 2 and "a device or a pipe" in said


# ------------------------------------------------------------------------------------------------ names and strings


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("a" * 256, "no name"),
        ("a" * 1_000_000, "no name"),
        ("/".join(["a" * 200] * 30), "no name"),
        ("PC_DARTS\0", "no name"),
        ("\udcff\ud800", "no name"),
        ("0 1 " * 1_000_000, "4,000,000 letters"),
        ("0 " + "9" * 90_000 + " 1 1", "no integer"),
        ("0 1 2 3 " * 9 + "\u0663", "do not make|no integer|may be"),
        ("[" * 100_000, "0 numbers"),
        ("0 1 2 3 " * 300, "1200 numbers"),
        ("__import__('os').mkdir('canary')", "not specified"),
        ("GENOTYPES", "not specified"),
        ("genotypes.PC_DARTS", "not specified"),
        ("../../PC_DARTS", "no such file"),
    ],
)
def test_architectures_of_absurd_names(arch: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        load_architecture(arch)
    assert len(str(caught.value)) < 1500
    if "\0" not in arch and "\ud800" not in arch:
        code, said = _with_stderr("enas/train.py", ["--preset", "smoke", "--fixed-arc", arch])
        assert code == 2 and len(said) < 6000
    assert not list(tmp_path.iterdir())
