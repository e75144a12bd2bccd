# SPDX-License-Identifier: Apache-2.0
"""Search and training: flags, log lines, resuming bit by bit, what stops a run, and what is learned."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.data import Stream
from common.engine import CheckpointStore, read_json
from common.engine.guard import NonFiniteError
from common.engine.seeding import derive
from common.nets import parse_cells
from common.nets.enas_layers import types_fit
from common.nets.enas_space import build_micro_network
from enas.flags import CIFAR_ARC, MNIST_ARC, make_parser, resolve
from enas.loop import ChildLoop, ChildSettings
from enas.recipe import evaluation_size, run_search, run_training, train_command
from tests.helpers.enas_fill import README_ARC

TINY = ["--preset", "smoke", "--blocks", "2", "--no-tensorboard", "--device", "cpu"]
QUIET = [*TINY, "--no-epoch-test"]
ARC = "0 2 1 4 1 0 2 1  1 3 1 4 0 1 1 1"


def config(stage: str, *flags: str) -> Any:
    """Resolved flags."""
    return resolve(make_parser(f"enas/{stage}.py", "", stage), list(flags), stage)


def state_of(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's state."""
    found = CheckpointStore(folder / "checkpoints", config_digest=read_json(folder / "config.json")["digest"]).latest()
    assert found is not None
    return found[0]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Bit-equal states."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("stage", "dataset", "expected"),
    [
        ("search", "cifar10", {"epochs": 150, "layers": 3, "blocks": 5, "out_filters": 20, "learning_rate_min": 5e-4}),
        ("search", "mnist", {"epochs": 300, "layers": 2, "grad_clip": 5.0, "controller_lr": 0.0035, "log_every": 25}),
        ("train", "cifar10", {"epochs": 5, "layers": 15, "learning_rate_min": 1e-4, "arch": CIFAR_ARC}),
        ("train", "mnist", {"epochs": 300, "layers": 6, "learning_rate_min": 1e-5, "grad_clip": None, "log_every": 50}),
    ],
)
def test_defaults_of_the_sources_scripts(stage: str, dataset: str, expected: dict[str, Any]) -> None:
    found = config(stage, "--dataset", dataset)
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.batch_size, found.learning_rate, found.lr_period, found.lr_period_factor) == (128, 0.05, 10, 2)
    assert found.image_size == 32 and found.auxiliary and not found.augment and not found.cutout
    assert found.val_fraction == pytest.approx(
        {"search": 5000 / {"cifar10": 50000, "mnist": 60000}[dataset]}.get(stage, 0)
    )


@pytest.mark.parametrize("flag", ["-fixed_arc", "--fixed_arc", "--child_fixed_arc", "--arch", "-child_fixed_arc"])
def test_both_spellings_of_the_architecture(flag: str) -> None:
    assert config("train", "--dataset", "mnist", flag, README_ARC).arch == README_ARC
    assert config("train", "--dataset", "mnist").arch == MNIST_ARC


def test_the_sources_spellings() -> None:
    text = "--child_num_layers 2 --child_num_cells 3 --child_out_filters 8 --child_lr_max .1 --child_lr_min .01 "
    text += "--child_lr_T_0 5 --child_lr_T_mul 3 --child_lr_cosine True --child_use_aux_heads=False --num_epochs 7 "
    text += "--controller_lr .001 --controller_tanh_constant None --controller_temperature 5 --controller_bl_dec .9 "
    text += "--controller_train_steps 4 --controller_num_aggregate 2 --controller_entropy_weight .1 --output_dir x "
    found = config("search", "--dataset", "mnist", *text.split())
    assert (found.layers, found.blocks, found.out_filters, found.epochs, found.auxiliary) == (2, 3, 8, 7, False)
    assert (found.learning_rate, found.learning_rate_min, found.lr_period, found.lr_period_factor) == (0.1, 0.01, 5, 3)
    assert (found.controller_tanh_constant, found.controller_temperature, found.controller_bl_dec) == (None, 5.0, 0.9)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("train", ["--fixed_arc", "0 1 0 1 0 1 0"], "7 numbers do not make"),
        ("train", ["--fixed_arc", "0 1 2 1 0 1 0 1"], "input 2 does not exist"),
        ("train", ["--fixed_arc", "0 1 0 7 0 1 0 1"], "operation 7 is unknown"),
        ("train", ["--fixed_arc", "PC_DARTS"], "space darts"),
        ("train", ["--layer-bits", "ternary", "binary"], "--layer-bits: 2 types"),
        ("search", ["--image-size", "20"], "--image-size: 20"),
        ("search", ["--reward", "accuracy-bitops"], "add --target-bitops"),
        ("search", ["--target-bitops", "1G"], "--reward accuracy-bitops"),
        ("search", ["--val-fraction", "0"], "--val-fraction: the controller's rewards need"),
        ("search", ["--compile"], "--compile: architectures change"),
        ("search", ["--controller-lrr", "1"], "did you mean --controller-lr"),
    ],
)
def test_refused_before_any_work(
    stage: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        config(stage, "--dataset", "cifar10", *flags)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_flags_of_the_other_program_are_accepted() -> None:
    """specs of the source list them for both of its programs."""
    text = "--controller_lr .001 --controller_tanh_constant 1.5 --controller_training False --controller_train_steps 50"
    assert config("train", "--dataset", "mnist", *text.split(), "--child_num_cells", "5").layers == 6
    text = "--child_drop_path_keep_prob 1.0 --child_fixed_arc None --n_aug_img 1"
    assert config("search", "--dataset", "mnist", *text.split()).layers == 2


# ------------------------------------------------------------------------------------------------------ the log


def test_lines_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_search(config("search", *TINY, "--save", str(tmp_path / "run")))
    lines = capsys.readouterr().out.splitlines()
    child = [line for line in lines if line.startswith("epoch = ")]
    # two steps an epoch; as in the source a line names the epoch that its step count has reached
    assert [line[: line.index("loss")] for line in child] == [
        "epoch = 0     ch_step = 1      ",
        "epoch = 1     ch_step = 2      ",
        "epoch = 1     ch_step = 3      ",
        "epoch = 2     ch_step = 4      ",
    ]
    assert all(line.endswith(" " * (10 - len(line.split()[-1]))) for line in child)  # mins is padded to ten
    controller = [line for line in lines if line.startswith("ctrl_step = ")]
    # updates of three samples; an update counts when its last sample is there
    assert [int(line.split()[2]) for line in controller] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    for line in controller:
        found = re.fullmatch(
            r"ctrl_step = (.{6}) loss = (.{7,}) ent = (.{5})   lr = 0\.0035   \|g\| = (.{8,}) acc = (.{6})   "
            r"bl = (.{5})  mins = (.+)",
            line,
        )
        assert found, line
    ten = [k for k, line in enumerate(lines) if line == "Here are 10 architectures"]
    assert len(ten) == 2
    for start in ten:
        for k in range(10):
            normal, reduce, accuracy, rule = lines[start + 1 + 4 * k : start + 5 + 4 * k]
            for row in (normal, reduce):
                assert re.fullmatch(r"\[\d( \d){7}\]", row), row
            assert re.fullmatch(r"val_acc = \d\.\d{4}", accuracy) and rule == "-" * 80
    at = lines.index("Epoch 1: Eval")
    assert lines[at - 1] == "-" * 80  # after the ten architectures
    assert lines[at + 1 : at + 7 : 3] == ["Eval at 2"] * 2
    assert lines[at + 2] == "Valid Num examples:  144" and lines[at + 5] == "Test Num examples:  360"
    assert re.fullmatch(r"valid_accuracy: \d\.\d{4}", lines[at + 3])
    assert re.fullmatch(r"test_accuracy: \d\.\d{4}", lines[at + 6])
    assert lines.index("Epoch 1: Training controller") < lines.index("Here are 10 architectures") < at
    flag = next(line for line in lines if line.startswith("blocks."))
    assert len(flag) == 80 and flag.endswith(".2")
    model = state_of(tmp_path / "run")["model"]
    trunk = sum(value.numel() for name, value in model.items() if not name.startswith("auxiliary_head."))
    assert len(model) > 0 and f"Model has {trunk} params" in lines  # as in the source, without the auxiliary head


# ------------------------------------------------------------------------------------------------------ resuming


class Stopped(Exception):
    """Stands for a killed process."""


def stop_at(step: int) -> Any:
    """A callback that stops a run after so many steps of either kind."""

    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    return on_step


@pytest.mark.parametrize("step", [5, 7])  # in the child's steps and in the controller's, of the second epoch
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    flags = [*QUIET, "--layer-bits", "stochastic", "--checkpoint-minutes", "1e-9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_search(config("search", *flags, "--save", str(whole)))
    with pytest.raises(Stopped):
        run_search(config("search", *flags, "--save", str(cut)), on_step=stop_at(step))
    run_search(config("search", *flags, "--save", str(cut), "--resume", "auto"))
    assert_same(state_of(whole), state_of(cut))
    for name in ("history.jsonl", "architecture.json"):
        assert (whole / name).read_text() == (cut / name).read_text(), name
    rows = [read_json(folder / "result.json")["finalists"] for folder in (whole, cut)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    flags = [*TINY[:2], *TINY[4:], "--fixed_arc", ARC, "--drop-path-keep-prob", "0.7", "--keep-prob", "0.8", "--cutout"]
    flags += ["--cutout-length", "3"]
    flags += ["--checkpoint-minutes", "1e-9", "--augment"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(config("train", *flags, "--save", str(whole)))
    with pytest.raises(Stopped):
        run_training(config("train", *flags, "--save", str(cut)), on_step=stop_at(step))
    run_training(config("train", *flags, "--save", str(cut), "--resume", "auto"))
    assert_same(state_of(whole), state_of(cut))
    figures = [
        {k: v for k, v in read_json(f / "result.json").items() if k in ("metrics", "cost")} for f in (whole, cut)
    ]
    assert figures[0] == figures[1]


def test_a_controller_that_is_trained_now_and_then(tmp_path: Path) -> None:
    flags = [*QUIET, "--epochs", "3", "--controller_train_every", "2", "--checkpoint-minutes", "1e-9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_search(config("search", *flags, "--save", str(whole)))
    with pytest.raises(Stopped):
        run_search(
            config("search", *flags, "--save", str(cut)), on_step=stop_at(5)
        )  # its first update, of the second epoch
    run_search(config("search", *flags, "--save", str(cut), "--resume", "auto"))
    assert_same(state_of(whole), state_of(cut))
    assert state_of(whole)["updates"] == 2
    newest = max(int(path.name[5:]) for path in (whole / "checkpoints").iterdir())
    assert newest == 3 * 2 + 2, "steps of either kind: the last checkpoint has the highest number"
    with (cut / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["entropy"] != "" for row in rows] == [False, True, False]
    assert all(float(row["images_per_second"] or 0) >= 0 for row in rows)


@pytest.mark.parametrize(("step", "types"), [(3, ["ternary"]), (2, ["stochastic"])])
def test_a_step_that_is_not_finite_stops_the_run(
    tmp_path: Path, step: int, types: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state that is saved is the one before that step; a healthy machine goes on from it as if nothing was."""
    flags = [*QUIET, "--log-every", "100", "--layer-bits", *types, "--save"]
    run_search(config("search", *flags, str(tmp_path / "whole")))
    plain = Stream.batch

    def broken(stream: Stream, epoch: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = plain(stream, epoch, number)
        bad = stream._order.name == "train" and 2 * epoch + number == step
        return (x * float("nan") if bad else x), y

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "batch", broken)
        with pytest.raises(NonFiniteError, match=f"step {step % 2 + 1} of epoch {step // 2 + 1}"):
            run_search(config("search", *flags, str(tmp_path / "cut")))
    saved = state_of(tmp_path / "cut")
    assert (saved["epoch"], saved["position"]) == divmod(step, 2)
    run_search(config("search", *flags, str(tmp_path / "cut"), "--resume", "auto"))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_seeds_decide(tmp_path: Path) -> None:
    results = []
    for k, seed in enumerate((1, 2)):
        run_search(config("search", *QUIET, "--epochs", "1", "--seed", str(seed), "--save", str(tmp_path / str(k))))
        results.append((tmp_path / str(k) / "history.jsonl").read_text())
    assert results[0] != results[1]


def test_types_of_layers_pass_on_where_they_fit() -> None:
    four = ["--layer-bits", "4", "ternary", "binary", "8"]
    assert types_fit(["binary"], 9) and types_fit(four[1:], 3) and not types_fit(four[1:], 4)
    for layers, expected in (("1", four[1:]), ("2", None)):
        found = config("search", *TINY, *four, "--eval-layers", layers)
        data = SimpleNamespace(info=SimpleNamespace(channels=1, num_classes=10, image_size=8))
        assert evaluation_size(found, data).layer_bits == expected
        words = shlex.split(train_command(found, SimpleNamespace(folder=Path("a folder"))))
        assert words[words.index("--arch") + 1] == "a folder"
        assert (words[words.index("--layer-bits") + 1 :] if expected else None) == expected


# ------------------------------------------------------------------------------------------------------ what is learned


def test_a_step_is_what_the_formulas_say() -> None:
    """Loss with auxiliary head and squares, clipping by the norm, Adam, bounds: against each written out in float64."""
    torch.manual_seed(0)
    cells = parse_cells(ARC)
    network = build_micro_network(
        cells, in_channels=1, out_filters=2, layers=1, image_size=8, layer_bits=["float"], auxiliary=True
    ).double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    one = SimpleNamespace(steps_per_epoch=4, batch=lambda epoch, step: (x, y))
    settings = ChildSettings(epochs=2, rate_max=0.1, grad_bound=0.3, l2=0.01, drop_path=0.4, loss="squared-hinge")
    loop = ChildLoop(network, stream=one, settings=settings, num_classes=10, evaluations=[], run=SimpleNamespace())
    loop.protect()
    network.train()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loop.forward = lambda x, cells: network(x)  # in float64
    loop.epoch, loop.position = 1, 2
    loop.one_step()
    after = {name: p.detach().clone() for name, p in network.named_parameters()}
    assert network.drop_path_probability == pytest.approx(0.4 * 7 / 8)  # the seventh of eight steps

    network.load_state_dict(before, strict=False)
    network.zero_grad()
    torch.manual_seed(derive(0, "enas", "step", 1, 2, 0))
    targets = 2.0 * torch.nn.functional.one_hot(y, 10) - 1
    main, side = ((1 - targets * logits).clamp_min(0).square().mean() for logits in network(x))
    (main + 0.4 * side + 0.01 * sum((p**2).sum() for p in network.parameters())).backward()
    norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    assert norm > 0.3
    for name, p in network.named_parameters():
        gradient = p.grad * 0.3 / (norm + 1e-6)
        rate = 0.1 * 0.001**0.5
        expected = before[name] - rate * gradient / ((0.001 * gradient**2).sqrt() + 1e-3)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-9)


def test_latent_weights_stay_in_their_range(tmp_path: Path) -> None:
    outside = []
    for k, flags in enumerate(([], ["--no-clip-weights"])):
        run_training(
            config(
                "train",
                *TINY[:2],
                *TINY[4:],
                "--fixed_arc",
                ARC,
                "--lr",
                "0.9",
                *flags,
                "--save",
                str(tmp_path / str(k)),
            )
        )
        model = state_of(tmp_path / str(k))["model"]
        weights = [v for name, v in model.items() if v.dim() == 4 and "auxiliary" not in name]
        outside.append(max(float(w.abs().max()) for w in weights) > 1)
    assert outside == [False, True]


def test_compat_keeps_the_sources_accidents(tmp_path: Path) -> None:
    flags = [*TINY[:2], *TINY[4:], "--fixed_arc", ARC, "--dataset", "digits", "--lr", "0.9", "--compat"]
    found = config("train", *flags)
    assert found.grad_clip is None and not found.clip_weights
    start = tmp_path / "start"
    with pytest.raises(Stopped):
        first = [*flags, "--checkpoint-minutes", "1e-9", "--save", str(start)]
        run_training(config("train", *first), on_step=stop_at(1))
    run_training(config("train", *flags, "--save", str(tmp_path / "run")))
    states = [state_of(folder)["model"] for folder in (start, tmp_path / "run")]
    head = [name for name in states[0] if name.startswith("auxiliary_head.") and "running" not in name]
    head = [name for name in head if "num_batches" not in name]
    assert head and all(torch.equal(states[0][name], states[1][name]) for name in head)  # the head is not trained
    assert float(states[1]["stem.0.weight"].abs().max()) > 1  # latent weights leave [-1, 1]


def test_a_rewarded_cost_makes_cheaper_networks_win(tmp_path: Path) -> None:
    flags = [*QUIET, "--reward", "accuracy-bitops", "--target-bitops", "1k", "--cost-weight", "1"]
    run_search(config("search", *flags, "--save", str(tmp_path / "run")))
    rows = read_json(tmp_path / "run" / "result.json")["finalists"]
    # far above the target the cost is nearly all that counts
    assert [row["bitops"] for row in rows] == sorted(row["bitops"] for row in rows)
    assert rows[0]["gain"] == pytest.approx(rows[0]["top1"] - (rows[0]["bitops"] / 1000 - 1))


def test_without_a_controller_it_stands_still(tmp_path: Path) -> None:
    run_search(config("search", *QUIET, "--controller_training", "False", "--save", str(tmp_path / "run")))
    state = state_of(tmp_path / "run")
    assert state["updates"] == 0 and state["baseline"] == 0.0
    assert read_json(tmp_path / "run" / "result.json")["finalists"]


def test_dry_runs_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_search(config("search", *TINY, "--dry-run"))
    assert found["step_seconds"]["child"] > 0 and found["step_seconds"]["controller"] > 0
    run_training(config("train", *TINY[:2], *TINY[4:], "--fixed_arc", ARC, "--dry-run"))
    assert not list(tmp_path.iterdir())
