# SPDX-License-Identifier: Apache-2.0
"""Changed flags at a resume: refused with the difference; with --allow-config-change taken up where a state permits.

What tests/engine/test_run.py proves of the refusal itself is not repeated here.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import CheckpointStore, read_json
from common.engine.changes import CHANGEABLE, owner_of
from common.engine.run import Run
from common.recipes.flags import resolve_search, resolve_training, search_parser, training_parser
from common.recipes.records import read_run
from common.recipes.rows import group
from common.recipes.search import run_search
from common.recipes.train import run_training
from common.recipes.trained import load_trained
from enas.flags import CHANGEABLE as ENAS_CHANGEABLE
from enas.flags import make_parser

SMOKE = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard", "--checkpoint-minutes", "1e-9"]
PROGRAMS = [
    *(
        f"{method}.{stage}"
        for method in ("qdarts", "darts", "ptq", "fbqat", "qsubnet", "enas")
        for stage in ("search", "train")
    ),
]


class Stop(Exception):
    """Stands for a crash."""


def stop_at(last: int) -> Callable[[int], None]:
    def on_step(step: int) -> None:
        if step == last:
            raise Stop

    return on_step


def train(save: Path, *flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    config = resolve_training(training_parser("train.py", ""), [*SMOKE, "--save", str(save), *flags])
    return run_training(config, method="qdarts", on_step=on_step)


def search(save: Path, *flags: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    small = ["--nodes", "2", "--multiplier", "2", "--layers", "3", "--steps-per-epoch", "2"]
    config = resolve_search(search_parser("search.py", ""), [*SMOKE, *small, "--save", str(save), *flags])
    return run_search(config, method="qdarts", on_step=on_step)


def state_of(folder: Path) -> dict[str, Any]:
    owner = owner_of(read_json(folder / "config.json"))
    found = CheckpointStore(folder / "checkpoints", config_digest=owner).latest()
    assert found is not None
    return found[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stopped after 2 of its 6 steps, in the first of two epochs."""
    folder = tmp_path_factory.mktemp("gate") / "run"
    with pytest.raises(Stop):
        train(folder, on_step=stop_at(3))
    return folder


@pytest.fixture
def torn(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(scope="module")
def unchanged(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training, gone on with the same flags."""
    folder = Path(shutil.copytree(stopped, tmp_path_factory.mktemp("unchanged") / "run"))
    train(folder, "--resume", "auto")
    return folder


# ---- programs


def test_a_program_refuses_changed_flags_with_the_difference(torn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(torn)
    main = importlib.import_module("qdarts.train").main
    assert main([*SMOKE, "--save", str(torn), "--resume", "auto", "--learning-rate", ".1", "--seed", "7"]) == 2
    text = capsys.readouterr().err
    assert "learning_rate: 0.025 -> 0.1" in text and "seed: 0 -> 7" in text and "--allow-config-change" in text
    assert "Traceback" not in text and files(torn) == before


def test_a_program_goes_on_with_a_changed_flag_and_says_what_is_inexact(
    torn: Path, unchanged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(torn, "--resume", "auto", "--allow-config-change", "--learning-rate", ".1", "--momentum", "0")
    out = capsys.readouterr().out
    for text in (out, (torn / "log.txt").read_text()):
        assert "--learning-rate 0.025 -> 0.1: the epochs that are done had the rates of the old schedule" in text
        assert "--momentum 0.9 -> 0.0: " in text and "neither bit for bit" in text
    record = read_json(torn / "config.json")
    assert "changes" not in record["sessions"][0]
    noted = record["sessions"][1]["changes"]
    assert [(one["flag"], one["before"], one["after"]) for one in noted] == [
        ("learning_rate", 0.025, 0.1),
        ("momentum", 0.9, 0.0),
    ]
    assert all(one["no_longer_exact"] for one in noted)
    assert record["config"]["learning_rate"] == 0.1 and found["steps"] == 6
    before = read_json(unchanged / "config.json")
    assert record["digest"] != before["digest"] == record["owner"] and found["config_digest"] == record["digest"]
    # cosine over two epochs: 0.1 in the first, half of it in the second
    rows = [json.loads(line) for line in (torn / "history.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.1, 0.05])
    assert load_trained(torn)[2]["epoch"] == 2, "its checkpoints are still found by who reads the run"


@pytest.mark.parametrize("flags", [("--momentum", ".1"), ("--weight-decay", ".2")])
def test_a_changed_training_flag_is_really_used(torn: Path, unchanged: Path, flags: tuple[str, str]) -> None:
    """The saved optimiser holds the old values, which would silently win."""
    train(torn, "--resume", "auto", "--allow-config-change", *flags)
    mine, theirs = state_of(torn), state_of(unchanged)
    assert any(not torch.equal(tensor, theirs["model"][name]) for name, tensor in mine["model"].items())
    name = flags[0][2:].replace("-", "_")
    assert mine["optimizer"]["param_groups"][0][name] == float(flags[1])


def test_allowed_and_nothing_changed_is_bit_equal(torn: Path, unchanged: Path) -> None:
    train(torn, "--resume", "auto", "--allow-config-change")
    mine, theirs = state_of(torn), state_of(unchanged)
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in mine["model"].items())
    assert (torn / "history.jsonl").read_bytes() == (unchanged / "history.jsonl").read_bytes()
    record = read_json(torn / "config.json")
    assert record["digest"] == read_json(unchanged / "config.json")["digest"] and "owner" not in record


def test_later_resumes_know_the_changed_run(torn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ("--weight-decay", ".01")
    with pytest.raises(Stop):
        train(torn, "--resume", "auto", "--allow-config-change", *new, on_step=stop_at(5))
    digest = read_json(torn / "config.json")["digest"]
    with pytest.raises(ValueError, match=r"weight_decay: 0\.01 -> 0\.0003"):
        train(torn, "--resume", "auto")
    capsys.readouterr()
    found = train(torn, "--resume", "auto", *new)
    assert "going on in" in capsys.readouterr().out and found["steps"] == 6
    record = read_json(torn / "config.json")
    assert record["digest"] == digest == found["config_digest"] and len(record["sessions"]) == 3
    steps = [row.split(",")[0] for row in (torn / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(1, 7)]
    assert train(torn, "--resume", "auto", *new)["steps"] == 6, "and that it is finished"
    # its weights can be taken by others, by the digest of what lies there
    taken = resolve_training(training_parser("train.py", ""), [*SMOKE, "--init-from", str(torn)])
    assert len(taken.init_from_digest) == 64


def test_a_table_never_takes_a_changed_run_for_a_repeat(torn: Path, tmp_path: Path) -> None:
    """Not of one that had the new flags from its start, and whose settings are the same by the end."""
    train(torn, "--resume", "auto", "--allow-config-change", "--grad-clip", "4.5")
    train(tmp_path / "clean", "--grad-clip", "4.5")
    again = Path(shutil.copytree(tmp_path / "clean", tmp_path / "again"))
    rows = group([read_run(folder) for folder in (tmp_path / "clean", again, torn)])
    assert [len(row.records) for row in rows] == [1, 1]
    assert [repeat.folder for row in rows for repeat, _ in row.repeats] == [again]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch-size", "32"), "batch_size: 16 -> 32 (it sets how many steps an epoch has)"),
        (("--init-channels", "8"), "(the saved state has the shapes that it gives)"),
        (("--arch", "DARTS_V2"), "(the saved state has the shapes that it gives)"),
        (("--seed", "3"), "(it says which images there are, and which are whose)"),
        (("--select", "val"), "(what was saved was made with it)"),
    ],
)
def test_what_cannot_change_is_refused_by_name(torn: Path, flags: tuple[str, str], said: str) -> None:
    before = files(torn)
    with pytest.raises(ValueError) as caught:
        train(torn, "--resume", "auto", "--allow-config-change", "--learning-rate", ".1", *flags)
    message = str(caught.value)
    assert said in message and "cannot change" in message and "learning_rate" not in message
    assert files(torn) == before


def test_epochs_change_while_both_numbers_lie_ahead(torn: Path) -> None:
    with pytest.raises(Stop):  # after the first epoch
        train(torn, "--resume", "auto", on_step=stop_at(5))
    with pytest.raises(ValueError, match="1 of 2 epochs are done, so --epochs cannot become 1; give more than 1"):
        train(torn, "--resume", "auto", "--allow-config-change", "--epochs", "1")
    found = train(torn, "--resume", "auto", "--allow-config-change", "--epochs", "3")
    assert (found["epochs"], found["steps"]) == (3, 9)


def test_a_finished_run_does_not_change(unchanged: Path) -> None:
    before = files(unchanged)
    with pytest.raises(ValueError, match=r"and it is finished:\n  epochs: 2 -> 3"):
        train(unchanged, "--resume", "auto", "--allow-config-change", "--epochs", "3")
    assert files(unchanged) == before


def test_a_search_takes_up_rates_of_the_architecture(tmp_path: Path) -> None:
    """The alphas' Adam has its rate set once, where it is made: the one of the checkpoint must not win."""
    with pytest.raises(Stop):
        search(tmp_path / "a", on_step=stop_at(3))
    rates = {}
    for name, flags in (("same", ()), ("other", ("--arch-learning-rate", ".3", "--allow-config-change"))):
        folder = Path(shutil.copytree(tmp_path / "a", tmp_path / name))
        search(folder, "--resume", "auto", *flags)
        rates[name] = state_of(folder)
    alphas = [name for name in rates["same"]["model"] if "alpha" in name]
    assert alphas and any(not torch.equal(rates["same"]["model"][n], rates["other"]["model"][n]) for n in alphas)
    assert rates["other"]["optimizers"]["arch"]["param_groups"][0]["lr"] == 0.3


def test_a_methods_own_flag_can_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And one that numbers the steps cannot."""
    recipe = importlib.import_module("enas.recipe")
    flags = importlib.import_module("enas.flags")
    same = [
        "--preset",
        "smoke",
        "--blocks",
        "2",
        "--no-tensorboard",
        "--device",
        "cpu",
        "--save",
        str(tmp_path / "run"),
    ]
    same += ["--checkpoint-minutes", "1e-9", "--no-epoch-test", "--controller-num-aggregate", "2", "--no-auxiliary"]

    def run(*more: str, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        config = flags.resolve(make_parser("enas/search.py", "", "search"), [*same, *more], "search")
        return recipe.run_search(config, on_step=on_step)

    with pytest.raises(Stop):
        run(on_step=stop_at(3))
    resume = ("--resume", "auto", "--allow-config-change")
    with pytest.raises(ValueError, match=r"controller_train_steps: 2 -> 5"):
        run(*resume, "--controller-train-steps", "5")
    run(*resume, "--controller-lr", ".5")
    assert "--controller-lr 0.0035 -> 0.5: the controller's updates that are done" in capsys.readouterr().out
    assert state_of(tmp_path / "run")["optimizers"]["controller"]["param_groups"][0]["lr"] == 0.5


# ---- runs


def open_run(folder: Path, **changes: Any) -> Run:
    known = {"changeable": CHANGEABLE, "resume": "auto", "save": folder}
    options = {key: changes.pop(key) for key in tuple(changes) if key in known or key == "root"}
    same = {"method": "m", "stage": "train", "dataset": "d", "seed": 0, "sources": {}, "argv": [], "quiet": True}
    config = {"learning_rate": 0.1, "layers": 2, "arch": "a.json", "arch_digest": "11", **changes}
    more = {"contents": {"arch_digest": "arch"}, "tensorboard": False}
    return Run.open(**same, config=config, **more, **(known | options))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with open_run(tmp_path / "run") as opened:
        opened.checkpoints.save({"a": 1}, step=4, epoch=1)
        opened.checkpoints.save({"a": 2}, step=6, epoch=1)
    yield opened.folder


def test_checkpoints_from_before_the_change_stay_a_way_back(run: Path) -> None:
    """The newest one after the change turns out broken: those before it still belong to the run."""
    with open_run(run, learning_rate=0.2) as opened:
        assert opened.resumed_step == 6
        opened.checkpoints.save({"a": 3}, step=8, epoch=2)
    (run / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"")
    with open_run(run, learning_rate=0.2, changeable=None) as opened:
        assert opened.resumed_step == 6 and opened.resume_state()[0] == {"a": 2}


def test_every_change_gives_another_digest(run: Path) -> None:
    digests = []
    for rate in (0.2, 0.3, 0.1):
        with open_run(run, learning_rate=rate) as opened:
            digests.append(opened.digest)
        record = read_json(run / "config.json")
        assert record["digest"] == opened.digest and owner_of(record) == record["owner"]
    assert len({*digests, record["owner"]}) == 4, "going back to the first flags does not make it the first run"


def test_another_file_at_the_same_place_is_no_change_of_flags(run: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot change\n  --arch a\.json: the file or run there has changed since"):
        open_run(run, arch_digest="22")


def test_without_a_checkpoint_the_run_starts_with_the_new_flags(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as first:
        pass
    with open_run(tmp_path / "run", layers=5) as opened:  # nothing has the shape of the old ones
        assert opened.resumed_step is None and opened.digest != first.digest
    record = read_json(tmp_path / "run" / "config.json")
    assert record["config"]["layers"] == 5 and "owner" not in record and len(record["sessions"]) == 1
    with pytest.raises(ValueError, match=r"layers: 5 -> 2"):
        open_run(tmp_path / "run", changeable=None)


def test_a_change_needs_a_run_that_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="no run has these flags, and none is named"):
        open_run(run, save=None, root=run.parent / "runs", learning_rate=0.2)
    with open_run(run, save=None, resume=run / "checkpoints" / "step-00000004", learning_rate=0.2) as opened:
        assert opened.resumed_step == 4


# ---- the flag itself


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_with_resume_has_the_flag(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(program).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--resume" in text and "--allow-config-change" in text
    with pytest.raises(SystemExit) as ended:
        main(["--allow-config-change"])
    assert ended.value.code == 2 and "only has a meaning with --resume" in capsys.readouterr().err


def test_a_quantisation_has_nothing_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("ptq.quantize").main(["RUN", "--resume", "--allow-config-change"])
    assert ended.value.code == 2 and "a quantisation starts over" in capsys.readouterr().err


def test_the_list_of_changeable_flags_names_flags() -> None:
    """A flag that is renamed must not fall out of the list unseen."""
    shared = {*training_parser("train.py", "").dests(), *search_parser("search.py", "").dests()}
    assert set(CHANGEABLE) <= shared
    own = {dest for stage in ("search", "train") for dest in make_parser("enas", "", stage).dests()}
    assert set(ENAS_CHANGEABLE) <= shared | own
