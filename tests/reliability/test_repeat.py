# SPDX-License-Identifier: Apache-2.0
"""`python -m common.engine repeat RUN`: the same bits again from config.json alone, from any folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import read_json
from common.engine.__main__ import main
from common.engine.changes import owner_of
from common.engine.checkpoint import CheckpointStore
from common.engine.environment import ROOT
from common.engine.repeat import check_flags, compare, free_folder, read_repeat
from common.engine.repeat import start as start_again
from common.recipes.flags import resolve_training, training_parser
from tests.helpers.smoke_runs import RUNS, argv_of, call

QUICK = (
    "fbqat/train.py",
    "--preset",
    "smoke",
    "--epochs",
    "1",
    "--fixed_bit",
    "4",
    "--device",
    "cpu",
    "--threads",
    "1",
)


def start(folder: Path, name: str | None = None, trained: Path | None = None) -> Path:
    """A finished run of QUICK, or of one of RUNS."""
    program, argv = (QUICK[0], list(QUICK[1:])) if name is None else argv_of(name, trained=trained)
    code, said = call(program, [*argv, "--save", str(folder)])
    assert code == 0, said
    return folder


def newest(folder: Path) -> dict[str, Any]:
    owner = owner_of(read_json(folder / "config.json"))
    found = CheckpointStore(folder / "checkpoints", config_digest=owner).latest()
    assert found is not None
    return found[0]


def assert_equal_runs(first: Path, second: Path) -> None:
    """Told from the files themselves: history, figures and every tensor of the weights."""
    history = [folder / "history.jsonl" for folder in (first, second)]
    assert [path.is_file() for path in history] in ([True, True], [False, False])
    if history[0].is_file():
        assert history[0].read_bytes() == history[1].read_bytes()
    assert read_json(first / "result.json")["metrics"] == read_json(second / "result.json")["metrics"]
    mine, theirs = newest(first)["model"], newest(second)["model"]
    assert mine.keys() == theirs.keys() and len(mine) > 10
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("repeat") / "run")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def rewrite(folder: Path, **changes: Any) -> None:
    record = read_json(folder / "config.json")
    record["config"] |= changes.pop("config", {})
    record["sources"] |= changes.pop("sources", {})
    (folder / "config.json").write_text(json.dumps(record | changes))


# ---- the same again


def test_a_repeat_is_bit_equal_from_another_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["repeat", str(made), "--save", "again"]) == 0
    out = capfd.readouterr().out
    again = tmp_path / "again"
    assert_equal_runs(made, again)
    assert "all as then" in out and "flags: equal" in out and "history: equal, 1 epochs" in out
    assert "weights: bit for bit equal after step 3" in out
    first, second = (read_json(folder / "config.json") for folder in (made, again))
    assert first["digest"] == second["digest"] and second["cwd"] == first["cwd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_program_can_be_repeated(name: str, tmp_path: Path, trained: Path) -> None:
    run = start(tmp_path / "run", name, trained)
    assert main(["repeat", str(run)]) == 0
    assert_equal_runs(run, tmp_path / "run-repeat")


@pytest.mark.slow
def test_two_ranks_are_repeated_by_two_ranks(tmp_path: Path) -> None:
    from tests.helpers.programs import python

    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / QUICK[0]), *QUICK[1:]]
    python(ROOT, *words, "--save", tmp_path / "run", cwd=tmp_path)
    assert read_json(tmp_path / "run" / "config.json")["processes"] == 2
    assert main(["repeat", str(tmp_path / "run")]) == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "run-repeat")


# ---- the command


def test_the_command_holds_what_was_given_and_no_more(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repeat", str(made), "--print-command"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["cd", str(Path.cwd())] and words[4] == str(ROOT / "fbqat" / "train.py")
    given = {"--preset=smoke", "--epochs=1", "--wbits=4", "--abits=4", "--device=cpu", "--threads=1"}
    assert set(words[5:-2]) == given and words[-2:] == ["--save", f"{made.resolve()}-repeat"]


@pytest.mark.parametrize("name", RUNS)
def test_every_flag_can_be_given_again_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that config.json has for a value must be one that the program's command line takes."""
    from common.engine import parsing

    seen: list[parsing.Parser] = []

    def catch(parser: parsing.Parser, argv: object) -> None:
        seen.append(parser)
        raise SystemExit(0)

    program = RUNS[name][0]
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(parsing.Parser, "print_help", lambda parser: seen.append(parser))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    parser = seen[0]
    for dest in parser.dests():
        action = parser.find("--" + dest.replace("_", "-"))
        assert action is not None and action.dest == dest, dest


def test_values_come_back_as_they_were(made: Path) -> None:
    """Every kind of value, through config.json and the words of the command, to the parser again."""
    argv = ["--preset", "smoke", "--learning-rate", "0.1234567890123456789", "--no-cutout", "--arch", "DARTS_V2"]
    argv += ["--match-bitops", "3", "--init-channels", "5", "--data", "a folder/with ' quote", "--stem-bits", "8"]
    config = resolve_training(training_parser("train.py", ""), argv)
    config.given, config.init_channels = {"init_channels": 5}, 2  # as the matching leaves it
    config.sources["init_channels"] = "derived"
    record = {"schema": 1, "method": "qdarts", "stage": "train", "config": config.as_dict(), "sources": config.sources}
    folder = made.with_name("values")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    again = resolve_training(training_parser("train.py", ""), list(read_repeat(folder, folder=folder).flags))
    same = {key: value for key, value in config.as_dict().items() if key not in ("given", "init_channels")}
    assert {key: again.as_dict()[key] for key in same} == same and again.init_channels == 5


def test_a_switch_that_was_turned_off_and_a_list_come_back(copy: Path) -> None:
    rewrite(
        copy,
        config={"channels_last": False, "bits": [2, 4, 8], "grad_clip": None, "workers": 0},
        sources={"channels_last": "flag", "bits": "config my.json", "grad_clip": "flag", "workers": "flag"},
    )
    words = " ".join(read_repeat(copy).flags)
    assert "--channels-last=false" in words and "--bits 2 4 8" in words and "--grad-clip=none" in words


def test_a_run_from_before_commands_were_noted(copy: Path) -> None:
    record = read_json(copy / "config.json")
    for key in ("program", "cwd", "processes"):
        del record[key]
    (copy / "config.json").write_text(json.dumps(record))
    repeat = read_repeat(copy)
    assert repeat.program == ROOT / "fbqat" / "train.py" and repeat.folder == Path.cwd() and repeat.processes == 1


def test_the_repeats_folder_is_a_free_one(tmp_path: Path) -> None:
    (tmp_path / "run-repeat").mkdir()
    assert free_folder(tmp_path / "run").name == "run-repeat-2"


# ---- what is not as then


def test_changed_defaults_are_refused_before_anything_starts(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, config={"momentum": 0.8})  # as if the default had been another
    assert main(["repeat", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "--momentum: 0.8 -> 0.9" in err and "check out its version" in err
    assert not copy.with_name("run-repeat").exists()


def test_another_version_is_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.engine import repeat

    monkeypatch.setattr(repeat, "start", lambda *_: 7)
    record = read_json(copy / "config.json")
    rewrite(copy, versions=record["versions"] | {"torch": "1.0"}, git={"commit": "0" * 40, "dirty": False})
    rewrite(copy, sessions=[{"changes": [{"flag": "grad_clip", "before": 5.0, "after": 4.0}]}])
    assert main(["repeat", str(copy)]) == 7, "the program's own exit code"
    out = capsys.readouterr().out
    assert "not as then" in out and "versions: " in out and "git: " in out
    assert "--grad-clip: changed on the way from 5.0 to 4.0" in out


def test_what_came_out_otherwise_is_told(made: Path, copy: Path) -> None:
    assert compare(made, copy)[1:] == ["history: equal, 1 epochs", compare(made, made)[2]]
    (copy / "history.jsonl").write_text('{"epoch": 0, "train_loss": 1.0}\n')
    rewrite(copy, config={"momentum": 0.8})
    shutil.rmtree(copy / "checkpoints")
    flags, history, weights = compare(made, copy)
    assert flags == "flags: differ: --momentum: 0.9 -> 0.8"
    assert history == "history: differs from epoch 1 on" and "has none" in weights


# ---- a config.json from elsewhere is data


@pytest.mark.parametrize(
    "program",
    ["../evil/train.py", "/bin/sh", "scripts/setup.sh", "tests/reliability/train.py", "fbqat/../../evil/train.py"],
)
def test_only_the_projects_own_programs_are_started(
    copy: Path, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = copy.parent / "evil"
    evil.mkdir()
    canary = copy.parent / "canary"
    (evil / "train.py").write_text(f"open({str(canary)!r}, 'w')")
    for named in (program, str(evil / "train.py")):
        rewrite(copy, program=named)
        assert main(["repeat", str(copy)]) == 2
        assert "no program of this project" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize(("dest", "value"), [("data_module", "{}:load"), ("search_space", "{}")])
def test_python_that_a_config_names_is_not_executed_unasked(
    copy: Path, dest: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = copy.parent / "canary"
    (copy / "own.py").write_text(f"open({str(canary)!r}, 'w')\ndef load(): return 1\n")
    rewrite(copy, config={dest: value.format(copy / "own.py")}, sources={dest: "flag"})
    assert main(["repeat", str(copy)]) == 2
    assert "--own-code" in capsys.readouterr().err and not canary.exists()
    assert f"--{dest.replace('_', '-')}=" in " ".join(read_repeat(copy, own_code=True).flags)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"given": {"data_module": "{}:load"}}, "--own-code"),
        ({"data-module": "{}:load"}, "'data-module' is no flag's key"),
        ({"data_module": None, "given": {"data-module": "{}:load"}}, "'data-module' is no flag's key"),
        ({"bits": ["2", "--data-module={}:load"]}, "begins as a flag does"),
        ({"bits": ["2", "-data_module", "{}:load"]}, "begins as a flag does"),
        ({"arch": "--data-module={}:load"}, "begins as a flag does"),
    ],
)
def test_python_is_not_executed_by_a_flag_in_disguise(
    copy: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`given`, other spellings of a key, and values that the program would read as a flag of their own."""
    canary, evil = copy.parent / "canary", copy.parent / "evil.py"
    evil.write_text(f"open({str(canary)!r}, 'w')\ndef load(): return 1\n")
    rewrite(
        copy,
        config=json.loads(json.dumps(changes).replace("{}", str(evil))),
        sources=dict.fromkeys(changes, "flag"),
    )
    assert main(["repeat", str(copy)]) == 2
    err = capsys.readouterr().err
    assert said in err and str(copy / "config.json") in err and not canary.exists()


def test_numbers_below_zero_are_no_flags(copy: Path) -> None:
    rewrite(
        copy,
        config={"seed": -1, "bits": [-2, -1e-05]},
        sources={"seed": "flag", "bits": "flag"},
    )
    words = " ".join(read_repeat(copy).flags)
    assert "--seed=-1" in words and "--bits -2 -1e-05" in words


@pytest.mark.parametrize("processes", [1, 2])
def test_a_module_in_the_folder_that_a_config_names_is_not_imported(
    copy: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-m` and `-c` put the working folder first on sys.path, as does a relative entry of PYTHONPATH."""
    place, canary = copy.parent / "place", copy.parent / "canary"
    place.mkdir()
    for name in ("torch", "runpy", "json", "common"):
        (place / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\nraise SystemExit(9)\n")
    program = copy.parent / "program.py"
    child = "subprocess.run([sys.executable, '-c', 'import json'], check=True)"
    program.write_text(f"import json, subprocess, sys\nif '--child' in sys.argv:\n    {child}\n")
    rewrite(copy, cwd=str(place), processes=processes)
    repeat = replace(read_repeat(copy), program=program)
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(repeat.command(), cwd=place, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not canary.exists(), f"the printed command: {done.stderr}"
    repeat = replace(repeat, flags=("--child",))
    monkeypatch.chdir(ROOT)
    for path in (".", os.pathsep + str(ROOT))[: 3 - processes]:
        monkeypatch.setenv("PYTHONPATH", path)
        check_flags(repeat)
        assert start_again(repeat, copy.parent / "again") == 0 and not canary.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a run's configuration (no schema)"),
        ('{"schema": 2}', "of schema 2, and this version reads schema 1"),
        ('{"schema": 1, "config": []}', "config is missing or of the wrong type"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["repeat", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "config.json" in err and said in err and "Traceback" not in err


@pytest.mark.parametrize("changes", [{"cwd": "/no/such/folder"}, {"processes": 0}, {"processes": "2"}])
def test_where_and_by_how_many_is_checked(
    copy: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(copy, **changes)
    assert main(["repeat", str(copy)]) == 2
    assert next(iter(changes)) in capsys.readouterr().err


def test_wrong_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repeta"]) == 2 and main([]) == 2 and main(["repeat"]) == 2
    assert "RUN: is missing" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "repeat RUN" in capsys.readouterr().out
