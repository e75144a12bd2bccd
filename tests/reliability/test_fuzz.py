# SPDX-License-Identifier: Apache-2.0
"""Thousands of bad flags and bad files: a clean message or a right result; no traceback, no hang, no lost file.

The quick cases run with every test, the rest with `--full`; they are the same on every run (derandomized).
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import report
import sweep
import visualize
from common.engine import CheckpointStore, read_json
from common.nets import load_architecture, network_of
from tests.helpers.mangled import clean, damaged, edited, json_text, many, nasty, refusal, seal, sign, snapshot

PROGRAMS = (
    *(
        f"{method}.{stage}"
        for method in ("qdarts", "darts", "fbqat", "ptq", "qsubnet", "enas")
        for stage in ("search", "train")
    ),
    *("ptq.quantize", "evaluate", "report", "visualize", "sweep", "doctor"),
    *("common.data.__main__", "common.cost.__main__", "common.recipes.__main__"),
)
WORDS = {"common.recipes.__main__": ["random", "rank", "", "x"]}


def sizes(quick: int, full: int) -> Any:
    """A test with `quick` cases, and again with `full` under --full."""
    return pytest.mark.parametrize(
        "cases", [pytest.param(quick, id="quick"), pytest.param(full, id="full", marks=pytest.mark.slow)]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished search and a finished training of smoke size, of two bits and in full precision, and one of ENAS."""
    from enas import train as enas_train
    from qdarts import search, train

    root = tmp_path_factory.mktemp("runs")
    same = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard"]
    found = {name: root / name for name in ("search", "train", "enas")}
    for name, main, more in (
        ("search", search.main, ["--epochs", "1"]),
        ("train", train.main, ["--arch", str(root / "search"), "--epochs", "2"]),
        ("enas", enas_train.main, ["--epochs", "1"]),
    ):
        argv = [*same, *more, "--save", str(root / name)]
        code, text = clean(lambda main=main, argv=argv: main(argv))
        assert code == 0, text
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that whatever a program writes by default lands in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


# ------------------------------------------------------------------------------------------------ flags


def _main(program: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[list[str]], int], list[str]]:
    """A program's main, which stops once its flags are accepted, and the names of its flags."""
    module = importlib.import_module(program)
    if hasattr(module, "run_program"):
        monkeypatch.setattr(module, "run_program", lambda *_, **__: 0)
    if program == "report":
        monkeypatch.setattr(module, "_write", lambda *_: None)
    if program == "doctor":
        monkeypatch.setattr(module, "CHECKS", ())
    if program == "visualize":
        monkeypatch.setattr("common.recipes.pictures.draw_cells", lambda *_, **__: [])
    help_text = clean(lambda: module.main([*WORDS.get(program, [])[:1], "--help"]))[1]
    names = sorted({word.strip(",[]=") for word in help_text.split() if word.startswith("--")})
    return module.main, [name for name in names if name not in ("--help", "--")]


@sizes(5, 50)
@pytest.mark.parametrize("program", PROGRAMS)
def test_flag_lists(
    program: str, cases: int, here: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, names = _main(program, monkeypatch)
    before = snapshot(runs["train"].parent)
    places = [str(path) for run in runs.values() for path in (run, run / "config.json", run / "architecture.json")]
    values = [
        *places,
        "missing",
        "PC_DARTS",
        "digits",
        "cpu",
        "smoke",
        "1",
        "2",
        "4",
        "0.5",
        "auto",
        "2,4",
        "x=1",
        "svg",
    ]
    odd = [
        "",
        "-1",
        "nan",
        "inf",
        "1e400",
        "9" * 400,
        "\u00b2",
        "\udcff",
        "a" * 5000,
        "../..",
        "--",
        "[",
        "1 2",
        "=",
        "no",
    ]
    value = st.sampled_from(values) | st.sampled_from(odd) | st.text(max_size=8) | st.integers().map(str)
    flag = st.tuples(
        st.sampled_from(names) | st.sampled_from(["--unknown", "-x", "--Epochs", "--no-save"]),
        st.lists(value, max_size=2),
    )
    joined = st.tuples(st.sampled_from(names), value).map(lambda pair: [f"{pair[0]}={pair[1]}"])
    some = st.lists(flag.map(lambda pair: [pair[0], *pair[1]]) | joined | value.map(lambda one: [one]), max_size=5)
    stop = ["--dry-run"] if program == "sweep" else []

    @many(cases)
    @given(some)
    def one(words: list[list[str]]) -> None:
        first = WORDS.get(program, [])[:1]
        argv = [*first, *stop, *(word for part in words for word in part)]
        if program == "sweep" and "--" in argv:
            argv = argv[: argv.index("--")]
        clean(lambda: main(argv))

    one()
    assert snapshot(runs["train"].parent) == before
    assert not list(here.iterdir())


FLAGS_BY_KEY = {"seed": 1, "epochs": 2, "bits": [2, 4], "dataset": "digits", "arch": "PC_DARTS", "method": "pc-darts"}


@sizes(15, 120)
@pytest.mark.parametrize("program", ["qdarts.search", "qdarts.train", "enas.train", "ptq.quantize"])
def test_config_files(
    program: str, cases: int, here: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    main, names = _main(program, monkeypatch)
    recorded = read_json(runs["train" if program.endswith("train") else "search"] / "config.json")["config"]
    keys = st.sampled_from([name.lstrip("-") for name in names]) | st.text(max_size=6)
    files = st.one_of(
        json_text(FLAGS_BY_KEY),
        json_text(recorded),
        st.dictionaries(keys, nasty(), max_size=6).map(lambda found: json.dumps(found).encode()),
    )
    file = here / "flags.json"

    @many(cases)
    @given(files)
    def one(content: bytes) -> None:
        file.write_bytes(content)
        clean(
            lambda: main(
                ["--preset", "smoke", "--config", str(file)] if program != "ptq.quantize" else ["--config", str(file)]
            )
        )
        assert file.read_bytes() == content

    one()
    assert [path.name for path in here.iterdir()] == ["flags.json"]


# ------------------------------------------------------------------------------------------------ architectures


def _architectures(runs: dict[str, Path]) -> list[Any]:
    from tests.helpers.fake_runs import architecture_json

    uniform = architecture_json(bits={"kind": "uniform", "uniform": [2, 4]})
    layers = architecture_json(bits={"kind": "layers", "layers": {"cells.0.preprocess0.op.1": [2, 2]}})
    return [*(read_json(runs[name] / "architecture.json") for name in ("search", "enas")), uniform, layers]


@sizes(60, 500)
def test_architecture_files(cases: int, here: Path, runs: dict[str, Path]) -> None:
    file = here / "a.json"
    small = {
        "darts": {"in_channels": 1, "num_classes": 3, "init_channels": 4, "layers": 3, "stem": "cifar"},
        "enas-micro": {"in_channels": 1, "num_classes": 3, "out_filters": 2, "layers": 1, "image_size": 16},
    }

    def use(built: list[int]) -> None:
        architecture = load_architecture(file)
        json.dumps(architecture.to_json(), allow_nan=False)
        if len(built) < 40:  # a right one can also be built, or is refused by name
            built.append(1)
            network_of(architecture, **small[architecture.space])

    built: list[int] = []

    @many(cases)
    @given(st.sampled_from(_architectures(runs)).flatmap(json_text))
    def one(content: bytes) -> None:
        file.write_bytes(content)
        refusal(lambda: use(built))

    one()
    file.write_text(json.dumps(_architectures(runs)[0]))
    assert refusal(lambda: use([])) is None


@sizes(80, 600)
def test_enas_strings_and_names(cases: int, here: Path) -> None:
    number = st.integers(-3, 12).map(str) | st.sampled_from(["1e3", "0x1", "\u0663", "9" * 400, "-", "+1", "1_0"])
    text = (
        st.lists(number, max_size=90).map(" ".join)
        | st.text(max_size=30)
        | st.sampled_from(
            [
                "[" * 5000,
                "0 1 " * 100_000,
                "0 1 2 3 # " + "x" * 100_000,
                "PC_DARTS\0",
                "a" * 100_000,
                "__import__('os')",
                "pc-darts/../x",
            ]
        )
    )

    @many(cases)
    @given(text)
    def one(arch: str) -> None:
        message = refusal(lambda: load_architecture(arch))
        assert message is None or len(message) < 2000, message[:300]

    one()
    assert not list(here.iterdir())


# ------------------------------------------------------------------------------------------------ plans


PLAN = {
    "seeds": [0, 1],
    "variables": {"data": "D", "samples": [1, 2]},
    "sizes": {"smoke": {"data": "E"}, "full": {}},
    "jobs": [
        {
            "name": "a/search",
            "method": "A",
            "command": ["python", "qdarts/search.py", "--save", "{dir}", "--data", "{data}"],
        },
        {
            "name": "a/train-{n}",
            "method": "A",
            "setting": "{n}",
            "command": "python qdarts/train.py --arch {dir:a/search} --save {dir} [--n {n}]",
            "after": ["a/search"],
            "row": True,
            "grid": {"n": "{samples}"},
        },
    ],
    "report": [["python", "report.py", "{rows}"]],
}
GRID_PLAN = {
    "command": "python qdarts/train.py --arch PC_DARTS",
    "grid": {"lr": [0.1, 0.2], "wbits": [2]},
    "seeds": [0],
}


@sizes(40, 400)
def test_plan_files(cases: int, here: Path) -> None:
    file = here / "plan.json"

    @many(cases)
    @given(
        st.sampled_from([PLAN, GRID_PLAN]).flatmap(json_text),
        st.sampled_from([[], ["--size", "smoke"], ["--set", "data=x"]]),
    )
    def one(content: bytes, more: list[str]) -> None:
        file.write_bytes(content)
        clean(lambda: sweep.main([str(file), "--dry-run", *more]))

    one()
    assert [path.name for path in here.iterdir()] == ["plan.json"]


# ------------------------------------------------------------------------------------------------ checkpoints


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


@sizes(30, 400)
def test_checkpoint_folders(cases: int, here: Path, runs: dict[str, Path]) -> None:
    """Whatever happens to the files, what is loaded is one of the checkpoints that were saved, or nothing is."""
    import torch

    source = runs["train"] / "checkpoints"
    owner = read_json(runs["train"] / "config.json")["digest"]
    names = sorted(path.name for path in source.iterdir())
    assert len(names) == 2
    saved = {name: torch.load(source / name / "state.pt", weights_only=True) for name in names}
    files = [f"{name}/{file}" for name in names for file in ("state.pt", "meta.json")]
    contents = {name: (source / name).read_bytes() for name in files}
    damage = st.sampled_from(files).flatmap(lambda name: st.tuples(st.just(name), damaged(contents[name])))
    swap = st.tuples(st.sampled_from(files), st.sampled_from(files).map(contents.get))
    edit = st.sampled_from(files[1::2]).flatmap(
        lambda name: st.tuples(
            st.just(name), edited(json.loads(contents[name])).map(lambda found: json.dumps(found).encode())
        )
    )
    gone = st.tuples(st.sampled_from(files), st.none())

    @many(cases)
    @given(st.lists(st.one_of(damage, damage, swap, edit, gone), min_size=1, max_size=3))
    def one(changes: list[tuple[str, bytes | None]]) -> None:
        folder = here / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        for name, content in changes:
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        before = snapshot(folder)
        told: list[str] = []
        found: list[Any] = []
        store = CheckpointStore(folder, config_digest=owner, on_message=told.append)
        assert refusal(lambda: found.append(store.latest())) is None
        last = dict(changes)
        touched = {name.split("/")[0] for name in last if not _same(name, last[name], contents[name])}
        whole = [name for name in names if name not in touched]
        if found[0] is None:
            assert not whole and len(told) == 2
        else:
            name = Path(found[0][1]["path"]).name
            assert name == max(whole)
            assert _equal(found[0][0], saved[name])
            assert len(told) == sum(other > name for other in names)
        assert snapshot(folder) == before

    one()


def _same(name: str, content: bytes | None, before: bytes) -> bool:
    """Whether a file says what it said: the digest of a meta.json is that of its values, not of its blanks."""
    if content is None or name.endswith(".pt"):
        return content == before
    try:
        return bool(json.loads(content) == json.loads(before))
    except ValueError:
        return False


def _equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


# ------------------------------------------------------------------------------------------------ run folders


def _readers(run: Path, here: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a finished run, by name; each gives an exit code or raises ValueError."""
    from common.cost.__main__ import main as cost
    from common.recipes.__main__ import main as recipes
    from ptq.quantize import main as quantize
    from qdarts.train import main as train

    smoke = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard"]
    return {
        "evaluate": lambda: evaluate.main([str(run), "--device", "cpu"]),
        "report": lambda: report.main([str(run), "--format", "json"]),
        "curves": lambda: report.main([str(run), "--plots", "--out", str(here / "t.md")]),
        "visualize": lambda: visualize.main([str(run), "--format", "svg", "--out", str(here / "cells")]),
        "cost": lambda: cost([str(run)]),
        "random": lambda: recipes(["random", "--like", str(run), "--bits", "2", "4", "--out", str(here / "r.json")]),
        "init-from": lambda: train([*smoke, "--arch", str(run), "--init-from", str(run), "--dry-run"]),
        "teacher": lambda: train([*smoke, "--arch", "PC_DARTS", "--teacher", str(run), "--dry-run"]),
        "quantize": lambda: quantize([str(run), "--device", "cpu", "--n-sample", "1", "--save", str(here / "q")]),
        "resume": lambda: train([*smoke, "--arch", str(run), "--epochs", "2", "--save", str(run), "--resume", "auto"]),
    }


READERS = ("evaluate", "report", "curves", "visualize", "cost", "random", "init-from", "teacher", "quantize", "resume")


@sizes(2, 40)
@pytest.mark.parametrize("reader", READERS)
def test_run_folders(reader: str, cases: int, here: Path, runs: dict[str, Path]) -> None:
    """JSON files, histories and metrics of a run edited or damaged: its checkpoints stay as they were."""
    run = here / "run"
    files = [path for path in runs["train"].iterdir() if path.is_file() and path.suffix in (".json", ".jsonl", ".csv")]
    assert {path.name for path in files} >= {"config.json", "result.json", "metrics.csv", "history.jsonl"}

    def bad(path: Path) -> st.SearchStrategy[tuple[str, bytes]]:
        content = path.read_bytes()
        kind = json_text(json.loads(content)) if path.suffix == ".json" else damaged(content)
        return st.tuples(st.just(path.name), kind)

    @many(cases)
    @given(st.lists(st.sampled_from(sorted(files)).flatmap(bad), min_size=1, max_size=2))
    def one(changes: list[tuple[str, bytes]]) -> None:
        for place in (run, here / "q"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(runs["train"], run)
        if reader == "resume":
            (run / "result.json").unlink()
        for name, content in changes:
            (run / name).write_bytes(content)
        before = snapshot(run)
        clean(_readers(run, here)[reader])
        after = snapshot(run)
        if reader == "resume":
            assert {name for name in before if "checkpoints" in name} <= after.keys()
        else:
            after.pop("curves.svg", None)
            assert after == before

    one()


@sizes(3, 50)
@pytest.mark.parametrize("reader", ["evaluate", "init-from", "random", "resume"])
def test_checkpoints_with_fitting_digests(reader: str, cases: int, here: Path, runs: dict[str, Path]) -> None:
    """Checkpoints that somebody made on purpose: other values at the right places, and digests that fit."""
    import torch

    run, source = here / "run", runs["train"]
    state = torch.load(_newest(source) / "state.pt", weights_only=True)
    meta = json.loads((_newest(source) / "meta.json").read_text())
    shapes = st.sampled_from([(), (0,), (1,), (3, 3), (4, 1, 3, 3)])
    tensor = shapes.map(torch.zeros)
    other = st.one_of(
        nasty(), tensor, shapes.map(lambda shape: torch.zeros(shape).to_sparse()), tensor.map(lambda t: t.int())
    )

    @st.composite
    def changed(draw: st.DrawFn) -> dict[Any, Any]:
        found = {**state}
        for _ in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from(list(state)))
            inner = found.get(key)
            if isinstance(inner, dict) and inner and draw(st.booleans()):
                found[key] = {**inner, draw(st.sampled_from(list(inner))): draw(other)}
            elif draw(st.booleans()):
                found.pop(key, None)
            else:
                found[key] = draw(other)
        return found

    @many(cases)
    @given(st.tuples(changed(), st.none()) | st.tuples(st.none(), edited(meta)))
    def one(change: tuple[Any, Any]) -> None:
        for place in (run, here / "q"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, run)
        if reader == "resume":
            (run / "result.json").unlink()
        newest = _newest(run)
        if change[1] is None:
            torch.save(change[0], newest / "state.pt")
            sign(newest)
        elif isinstance(change[1], dict):
            seal(newest / "meta.json", change[1])
        clean(_readers(run, here)[reader])

    one()
