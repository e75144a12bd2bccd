# SPDX-License-Identifier: Apache-2.0
"""Flags: spellings, precedence, sources, config files, every error at once, and round trips."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import cli
from common.engine.cli import Config, Parser, resolve
from common.recipes.flags import search_parser, training_parser
from common.recipes.presets import PRESETS, presets_for


def search(*argv: str, **kwargs: Any) -> Config:
    kwargs.setdefault("derive", [cli.derive_search])
    kwargs.setdefault("validate", [cli.check_search])
    return resolve(search_parser("search.py", "test"), argv, presets=presets_for("search"), **kwargs)


def training(*argv: str) -> Config:
    parser = training_parser("train.py", "test")
    return resolve(parser, argv, presets=presets_for("train"), derive=[cli.derive_train], validate=[cli.check_train])


def refused(capsys: pytest.CaptureFixture[str], run: Any, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_cells_of_fewer_nodes_hand_on_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert [search("--nodes", str(nodes)).multiplier for nodes in (2, 4, 6)] == [2, 4, 4]
    assert "--multiplier: 2 nodes cannot hand on 3" in refused(capsys, search, "--nodes", "2", "--multiplier", "3")


@pytest.mark.parametrize(
    ("argv", "dest", "value"),
    [
        ("--batch_size 12", "batch_size", 12),
        ("--batch-size=12", "batch_size", 12),
        ("-b 12", "batch_size", 12),
        ("--cd 1e-5", "complexity_decay", 1e-5),
        ("--complexity-decay 1e-5", "complexity_decay", 1e-5),
        ("--lr .2", "learning_rate", 0.2),
        ("--learning_rate .2", "learning_rate", 0.2),
        ("--allow8bit", "bits", [2, 4, 8]),
        ("--allow8bit=False", "bits", [2, 4]),
        ("--bits 2,4,8", "bits", [2, 4, 8]),
        ("--bits 1 3", "bits", [1, 3]),
        ("--unrolled", "unrolled", True),
        ("--unrolled=True", "unrolled", True),
        ("--unrolled False", "unrolled", False),
        ("--no-unrolled", "unrolled", False),
        ("--method PC-DARTS", "method", "pc-darts"),
        ("--method DARTS", "method", "darts"),
        ("--method pc_darts", "method", "pc-darts"),
        ("--use_multiprocess=False", "workers", 0),
        ("--use_multiprocess=True", "workers", 2),
        ("--set cifar100", "dataset", "cifar100"),
        ("--q_lr .5", "gamma_learning_rate", 0.5),
        ("--gamma-learning-rate .5", "gamma_learning_rate", 0.5),
        ("--q_wd .5", "gamma_weight_decay", 0.5),
        ("--epochs_no_archopt 3", "warmup_epochs", 3),
        ("--begin 3", "warmup_epochs", 3),
        ("--warmup-epochs 3", "warmup_epochs", 3),
        ("--report_freq 7", "log_every", 7),
        ("--target-bitops 2.2e9", "target_bitops", 2.2e9),
        ("--target-bitops 2.2G", "target_bitops", 2.2e9),
        ("--target-bitops 350m", "target_bitops", 350e6),
        ("--resume", "resume", "auto"),
        ("--resume runs/x", "resume", "runs/x"),
        ("-batch_size 12", "batch_size", 12),
        ("--no-tensorboard", "tensorboard", False),
    ],
)
def test_spellings_of_a_search(argv: str, dest: str, value: Any) -> None:
    config = search(*argv.split())
    assert getattr(config, dest) == value
    if dest != "workers":
        assert config.sources[dest] == "flag"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--fixed_bit 2", {"wbits": 2, "abits": 2}),
        ("--wbits 8 --abits 32", {"wbits": 8, "abits": 32}),
        ("--arch ./runs/x", {"arch": "./runs/x"}),
        ("--auxiliary --auxiliary_weight .3", {"auxiliary": True, "auxiliary_weight": 0.3}),
        ("--cutout --cutout_length 8", {"cutout": True, "cutout_length": 8}),
        ("--select val", {"select": "val", "val_fraction": 0.1}),
        ("", {"select": "last", "val_fraction": 0.0, "epochs": 600, "batch_size": 96, "learning_rate": 0.025}),
    ],
)
def test_spellings_of_a_training(argv: str, expected: dict[str, Any]) -> None:
    config = training(*argv.split())
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_papers_defaults_of_the_search() -> None:
    """reference.md 1.3, QDARTS/train_search.py."""
    config = search()
    paper = {
        "batch_size": 256,
        "learning_rate": 0.1,
        "learning_rate_min": 0.0,
        "momentum": 0.9,
        "weight_decay": 3e-4,
        "epochs": 50,
        "init_channels": 16,
        "layers": 8,
        "cutout": False,
        "cutout_length": 16,
        "seed": 2,
        "grad_clip": 5.0,
        "train_portion": 0.5,
        "unrolled": False,
        "arch_learning_rate": 6e-4,
        "arch_weight_decay": 1e-3,
        "complexity_decay": 1e-4,
        "arch_complexity_decay": 1e-5,
        "gamma_learning_rate": 0.01,
        "gamma_weight_decay": 1e-3,
        "bits": [2, 4],
        "workers": 2,
        "warmup_epochs": 15,
        "dataset": "cifar10",
    }
    assert {key: getattr(config, key) for key in paper} == paper


def test_ignored_flags_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    search("--gpu", "0", "--use_gpu=True", "--model_path", "x", "--drop_path_prob", ".3")
    err = capsys.readouterr().err
    for name in ("--gpu", "--use_gpu", "--model_path", "--drop_path_prob"):
        assert f"{name} is accepted and ignored" in err


def test_all_errors_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--batchsize 3 --cd=-1 --bits 2 5 --method foo --epochs 3 --init-channels 6 --seed stray"
    err = refused(capsys, search, *line.split())
    wanted = (
        "--batchsize: there is no such flag; did you mean --batch-size?",
        "--cd: -1.0 is out of range",
        "--bits: '5' is not offered; give one of 1, 2, 3, 4, 8, 32",
        "--method: 'foo' is not one of darts, pc-darts",
        "--warmup-epochs: 15 leaves none of the 3 epochs",
        "--init-channels: 6 is no multiple of --partial 4",
        "--seed: 'stray' is not a whole number",
    )
    for text in wanted:
        assert text in err
    assert f"{len(wanted)} errors" in err


@pytest.mark.parametrize(
    ("argv", "errors"),
    [
        ("--wbits 6 --abits 2", ["--wbits"]),
        ("--wbit 2 --abits 2", ["--wbit"]),  # perhaps --wbits was meant
        ("--wbits 6 --abits 2 --select val --val-fraction 0", ["--wbits", "--val-fraction"]),
        ("--teacher-weight 7", ["--teacher-weight"]),
        ("--abits 2 --select val --val-fraction 0", ["--abits", "--val-fraction"]),
    ],
)
def test_rules_across_flags_say_nothing_about_a_refused_flag(
    capsys: pytest.CaptureFixture[str], argv: str, errors: list[str]
) -> None:
    said = refused(capsys, training, *argv.split())
    assert [line.split(":")[0].strip() for line in said.splitlines()[1:-1]] == errors


def test_nor_about_one_that_a_config_file_gets_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"wbits": 6, "abits": 2}')
    assert "1 error," in refused(capsys, training, "--config", str(file))


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--epochs 0", "--epochs"),
        ("--epochs nan", "--epochs"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        ("--bat 3", "--bat"),
        ("--batch-size", "--batch-size"),
        ("--train_portion 1", "--train_portion"),
        ("--target-bitops 2Q", "--target-bitops"),
        ("--target-bitops -2G", "--target-bitops"),
        ("--second-order exact", "--second-order"),
        ("--bits 2 2", "--bits"),
        ("--weight-quantizer lsq", "--weight-quantizer"),
        ("--multiplier 5", "--multiplier"),
        ("--cost-weighting uniform --arch-complexity-decay 1e-5", "--arch-complexity-decay"),
        ("--target-bitops 1G --cd 0", "--target-bitops"),
        ("--preset smok", "--preset"),
        ("--unrolled=maybe", "--unrolled"),
        ("--config /nowhere.json", "--config"),
        ("--data-module file.py", "--data-module"),
        ("--learning-rate-min 1", "--learning-rate-min"),
    ],
)
def test_bad_search_flags_are_named(capsys: pytest.CaptureFixture[str], argv: str, flag: str) -> None:
    assert f"  {flag}: " in refused(capsys, search, *argv.split())


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--wbits 2", "--wbits"),
        ("--abits 2", "--abits"),
        ("--wbits 5 --abits 4", "--wbits"),
        ("--weight-quantizer lsq --wbits 1 --abits 2", "--weight-quantizer"),
        ("--init-from /nowhere", "--init-from"),
        ("--teacher /nowhere", "--teacher"),
        ("--teacher-weight .2", "--teacher-weight"),
        ("--weights_path /nowhere", "--weights-path"),
        ("--drop_path_prob 1", "--drop_path_prob"),
        ("--select best", "--select"),
        ("--select val --val-fraction 0", "--val-fraction"),
        ("--lr-warmup-epochs 5 --epochs 5", "--lr-warmup-epochs"),
    ],
)
def test_bad_training_flags_are_named(capsys: pytest.CaptureFixture[str], argv: str, flag: str) -> None:
    assert f"  {flag}: " in refused(capsys, training, *argv.split())


def test_precedence_and_sources(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"epochs": 4, "batch-size": 24, "unrolled": True, "allow8bit": True}))
    config = search("--preset", "smoke", "--config", str(file), "--batch_size", "48")
    assert (config.epochs, config.batch_size, config.init_channels, config.bits) == (4, 48, 8, [2, 4, 8])
    assert config.sources["init_channels"] == "preset smoke"
    assert config.sources["epochs"] == f"config {file}"
    assert config.sources["batch_size"] == "flag"
    assert config.sources["momentum"] == "default"
    assert config.sources["arch_complexity_decay"] == "derived"


def test_what_a_program_fixes_is_no_flag_and_no_preset_moves_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--a", type=int, default=1)
    parser.add_argument("--preset")
    parser.fix(b=2)
    config = resolve(parser, ["--preset", "x"], presets={"x": {"about": "", "a": 3, "b": 4}})
    assert (config.a, config.b, config.sources["b"]) == (3, 2, "fixed")
    assert config.open_among({"a": 5, "b": 5, "c": 5}) == {"c": 5}
    assert "--b: there is no such flag" in refused(capsys, lambda *argv: resolve(parser, argv), "--b", "1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"epoch": 3}', ("'epoch'", "epochs")),
        ('{"epochs": "3"}', ("'epochs'", "a number")),
        ('{"epochs": 3.5}', ("'epochs'", "whole number")),
        ('{"epochs": null}', ("'epochs'", "null")),
        ('{"unrolled": 1}', ("'unrolled'", "true or false")),
        ('{"bits": 2}', ("'bits'", "list")),
        ('{"epochs": [2]}', ("'epochs'", "list")),
        ('{"method": true}', ("'method'", "text")),
        ("[1]", ("object",)),
        ("{", ("not valid JSON",)),
    ],
)
def test_bad_config_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, words: Any) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    err = refused(capsys, search, "--config", str(file))
    assert str(file) in err
    for word in words:
        assert word in err


def test_print_config_shows_value_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        search("--print-config", "--preset", "smoke", "--lr", ".3")
    assert stop.value.code == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["learning_rate"].split(None, 1) == ["0.3", "flag"]
    assert lines["dataset"].split(None, 1) == ['"digits"', "preset smoke"]
    assert lines["seed"].split(None, 1) == ["2", "default"]


def test_list_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        search("--list-presets")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in PRESETS:
        assert f"{name}: " in out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name: str) -> None:
    assert search("--preset", name).preset == name
    assert training("--preset", name).preset == name


def test_positional_run_and_its_alias() -> None:
    parser = Parser(prog="tool.py")
    cli.add_run_argument(parser)
    assert parser.parse_args(["a/b"]).run == Path("a/b") == parser.parse_args(["--run", "a/b"]).run
    assert parser.parse_args([]).run is None


numbers = st.floats(0, 1e6, allow_nan=False)
values = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63),
        "epochs": st.integers(16, 10**6),
        "batch_size": st.integers(1, 10**6),
        "learning_rate": st.floats(1e-9, 1e6),
        "complexity_decay": st.floats(1e-12, 1e3),
        "arch_complexity_decay": numbers,
        "target_bitops": st.floats(1e-3, 1e15),
        "bits": st.lists(st.sampled_from(cli.FIXED_BITS), min_size=1, unique=True),
        "unrolled": st.booleans(),
        "method": st.sampled_from(["darts", "pc-darts"]),
        "data": st.text("abc/ _.é", min_size=1, max_size=9).map(Path),
        "deterministic": st.booleans(),
    },
)


def words(dest: str, value: Any, underscore: bool) -> list[str]:
    name = "--" + (dest if underscore else dest.replace("_", "-"))
    if isinstance(value, bool):
        return [f"{name}={value}"]
    return [name, *map(str, value)] if isinstance(value, list) else [name, str(value)]


@settings(max_examples=60, deadline=None)
@given(values, st.booleans())
def test_flags_and_config_files_round_trip(wanted: dict[str, Any], underscore: bool) -> None:
    argv = [word for dest, value in wanted.items() for word in words(dest, value, underscore)]
    by_flags = search(*argv)
    assert {dest: getattr(by_flags, dest) for dest in wanted} == wanted
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.json"
        file.write_text(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in wanted.items()}))
        by_file = search("--config", str(file))
    assert {dest: getattr(by_file, dest) for dest in wanted} == wanted
    json.dumps(by_flags.as_dict())


def test_help_is_quick_and_works_anywhere(tmp_path: Path, root: Path) -> None:
    script = str(root / "qdarts" / "train.py")
    code = (
        f"import runpy, sys\nsys.argv = [{script!r}, '--help']\n"
        f"try:\n    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules, 'help must not wait for torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--arch NAME|FILE|RUN" in done.stdout


def test_what_this_machine_cannot_compute_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ("--compile", "--unrolled", "--second-order", "exact")
    assert "--compile: compiled code is not differentiated twice" in refused(capsys, search, *exact)
    assert search("--compile", "--unrolled", "--second-order", "finite-difference").compile
    monkeypatch.setenv("CXX", "no-such-compiler")
    for run in (search, training):
        said = refused(capsys, run, "--compile", "--device", "cpu")
        assert "--compile: needs a C++ compiler on the CPU, and there is no no-such-compiler" in said
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "--precision: this GPU has no bf16" in refused(capsys, training, "--precision", "bf16")
    assert training("--precision", "bf16", "--device", "cpu").precision == "bf16"


def test_a_program_may_refuse_flags_of_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.Parser(prog="p")
    parser.refuse("nothing is compiled here; leave it out", "--compile")
    with pytest.raises(SystemExit) as caught:
        cli.resolve(parser, ["--compile"])
    assert caught.value.code == 2
    assert "--compile: nothing is compiled here; leave it out" in capsys.readouterr().err
