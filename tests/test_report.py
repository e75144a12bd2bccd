# SPDX-License-Identifier: Apache-2.0
"""report.py on run folders written by hand: what stands in a row, what is never mixed, what is said of broken ones."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import report
from tests.helpers.fake_runs import COST, architecture_json, search_result, train_result, write_run

TWO_BITS = {"kind": "uniform", "uniform": [2, 2]}
FOUND = {"method": "qdarts", "dataset": "digits", "seed": 0}


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `report.py ARGV`."""
    try:
        code = report.main([str(word) for word in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def objects(capsys: pytest.CaptureFixture[str], *argv: Any) -> list[dict[str, Any]]:
    code, out, err = run(capsys, *argv, "--format", "json")
    assert code == 0, err
    return json.loads(out)


def cells(markdown: str) -> list[dict[str, str]]:
    """The rows of all tables as dicts by their headers."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in markdown.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        parts = [part.strip() for part in line.strip("|").split(" | ")]
        if not header:
            header = parts
        elif set("".join(parts)) - set("-: |"):
            rows.append(dict(zip(header, parts, strict=True)))
    return rows


def uniform(folder: Path, correct: int, seed: int = 0, **changes: Any) -> Path:
    return write_run(
        folder,
        train_result(correct, seed, **changes),
        config={"wbits": 2},
        architecture=architecture_json("PC_DARTS_cifar", bits=TWO_BITS),
    )


def test_one_run_a_row_with_its_wilson_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = uniform(tmp_path / "a", 343)
    (row,) = objects(capsys, folder)
    wanted = stats.binomtest(343, 360).proportion_ci(0.95, method="wilson")
    assert row["accuracy"] == 343 / 360 and row["interval"] == "wilson"
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((wanted.low, wanted.high))
    assert {key: row[key] for key in ("parameters", "macs", "bitops", "bitops_quantized", "bitops_paper")} == {
        key: COST[key] for key in ("parameters", "macs", "bitops", "bitops_quantized", "bitops_paper")
    }
    assert (row["weight_bytes"], row["weight_bytes_fp32"]) == (20_480, 244_000)
    assert (row["weight_bits"], row["activation_bits"], row["n"], row["seeds"]) == (2, 2, 1, [0])
    assert (row["train_seconds"], row["search_seconds"], row["device"]) == (61.5, None, "Test CPU, 2 cores")
    code, out, _ = run(capsys, folder)
    (shown,) = cells(out)
    assert code == 0
    assert shown == {
        "architecture": "PC_DARTS_cifar",
        "w/a": "2/2",
        "accuracy %": "95.3 [92.6-97.0]",
        "params M": "0.061",
        "MACs M": "2.35",
        "BitOps M": "41.2/35.1/39.0",
        "memory kB": "20.5 (8%)",
        "time s": "62",
        "n": "1",
    }
    assert "digits, 16x16, 360 test images" in out and "seed 0" in out and "Test CPU" in out


def test_table_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "two", 343)
    fp32 = dict(COST, bitops=2_401_280_000, bitops_quantized=0, bitops_paper=2_301_280_000)
    write_run(
        tmp_path / "fp", train_result(cost=fp32, bits_mean=None), architecture=architecture_json("PC_DARTS_cifar")
    )
    write_run(
        tmp_path / "found",
        train_result(bits_mean={"weight": 2.31, "activation": 2.9}, search_seconds=131.0, architecture="runs/x"),
        architecture=architecture_json(None, bits={"kind": "cells"}, search=FOUND),
    )
    _, out, _ = run(capsys, tmp_path / "found", tmp_path / "fp", tmp_path / "two")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 118
    found, fp, two = cells(out)  # in the order in which they were named
    assert (found["architecture"], found["w/a"], found["time s"]) == ("found", "2.3/2.9", "131+62")
    assert (fp["w/a"], fp["BitOps M"]) == ("fp32", "2401/0/2301")
    assert two["w/a"] == "2/2"


def test_seeds_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    correct = [340, 343, 352]
    for seed, number in enumerate(correct):
        uniform(tmp_path / f"s{seed}", number, seed, seconds=60.0 + seed)
    (row,) = objects(capsys, tmp_path)
    values = [number / 360 for number in correct]
    wanted = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert (row["n"], row["seeds"], row["interval"], row["train_seconds"]) == (3, [0, 1, 2], "student", 61)
    assert row["accuracy"] == pytest.approx(sum(values) / 3)
    assert row["accuracy_std"] == pytest.approx(stats.tstd(values))
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(wanted)
    _, out, _ = run(capsys, tmp_path)
    low, high = (100 * end for end in wanted)
    text = f"{100 * sum(values) / 3:.2f} ± {100 * stats.tstd(values):.2f} [{low:.1f}-{min(high, 100):.1f}]"
    assert cells(out)[0]["accuracy %"] == text
    _, out, _ = run(capsys, tmp_path, "--group-by", "run")
    assert [row["seed"] for row in cells(out)] == ["0", "1", "2"]


def test_found_architectures_of_several_seeds_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, bits in enumerate((2.2, 2.6)):
        write_run(
            tmp_path / f"s{seed}",
            train_result(345, seed, bits_mean={"weight": bits, "activation": 3.0}, search_seconds=100.0 + 10 * seed),
            config={"arch": f"runs/search-{seed}", "teacher": f"runs/fp-{seed}"},
            architecture=architecture_json(None, bits={"kind": "cells"}, search=FOUND | {"seed": seed}),
        )
    (row,) = objects(capsys, tmp_path)
    assert row["n"] == 2 and row["weight_bits"] == pytest.approx(2.4) and row["search_seconds"] == 105


def test_a_row_of_full_precision_and_low_bits_has_neithers_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = uniform(tmp_path / "low", 300)
    full = write_run(
        tmp_path / "full", train_result(340, 1, bits_mean=None), architecture=architecture_json("PC_DARTS_cifar")
    )
    (row,) = objects(capsys, low, full, "--group-by", "dataset")
    assert (row["weight_bits"], row["activation_bits"], row["bits"]) == (17, 17, "17/17")  # means, as its BitOps are
    (row,) = objects(capsys, full, "--group-by", "dataset")
    assert (row["weight_bits"], row["bits"]) == (None, "fp32")


def test_data_sets_and_sizes_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = train_result()["network"]
    changes: list[dict[str, Any]] = [
        {},
        {"dataset": "mnist"},
        {"network": network | {"image_size": 8}},
        {"network": network | {"init_channels": 16}},
        {"epochs": 40},
        {"n_train": 700},
    ]
    for k, change in enumerate(changes):
        uniform(tmp_path / f"r{k}", 340 + k, k, **change)
    for arguments in ((), ("--group-by", "method", "dataset", "size"), ("--group-by", "size,dataset,bits")):
        rows = objects(capsys, tmp_path, *arguments)
        assert [row["n"] for row in rows] == [1] * len(changes)
    for first, second, words in (
        ("r0", "r1", ("data set digits", "data set mnist", "add dataset to --group-by")),
        ("r0", "r2", ("image_size 16", "image_size 8", "add size to --group-by")),
        ("r3", "r0", ("init_channels 16", "init_channels 8", "add size to --group-by")),
        ("r4", "r5", ("epochs 40, n_train 1437", "epochs 20, n_train 700", "add size to --group-by")),
    ):
        for by in ("method", "method,bits", "method bits"):
            code, out, err = run(capsys, tmp_path / first, tmp_path / second, "--group-by", *by.split(" "))
            assert code == 2 and not out
            assert all(word in err for word in (*words, str(tmp_path / first), str(tmp_path / second)))
    _, out, _ = run(capsys, tmp_path)
    assert out.count("### ") == 4  # two data sets, and digits in two image sizes and with fewer images
    wide = [row["architecture"] for row in cells(out) if "init_channels" in row["architecture"]]
    assert any("init_channels=16" in text for text in wide)


def test_other_settings_are_told_apart_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", train_result(340, seed), config={"drop_path": 0.0, "save": f"x{seed}"})
        write_run(tmp_path / f"b{seed}", train_result(341, seed), config={"drop_path": 0.2, "save": f"y{seed}"})
    first, second = objects(capsys, tmp_path)
    assert (first["n"], first["differs"]) == (2, "drop_path=0.0")
    assert (second["n"], second["differs"]) == (2, "drop_path=0.2")
    assert len(objects(capsys, tmp_path, "--group-by", "method", "bits")) == 1


def test_what_most_rows_have_and_what_follows_goes_without_saying(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in (
        ("a", {}),
        ("b", {"decay": 0.1, "tenth": 0.01}),
        ("c", {"decay": 0.0, "tenth": 0.0}),
        ("d", {"order": 2}),
        ("e", {"exact": True}),
    ):
        usual = {"decay": 1.0, "tenth": 0.1, "order": 1, "exact": False}
        folder = write_run(tmp_path / name, train_result(340), config=usual | flags)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sources": {"tenth": "derived"}}))
    found = [row["differs"] for row in objects(capsys, tmp_path)]
    assert found == ["", "decay=0.1", "decay=0.0", "order=2", "exact"]


def test_search_has_a_row_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "search", search_result(3))
    code, out, _ = run(capsys, folder)
    (row,) = cells(out)
    assert code == 0 and "digits: searches" in out
    assert (row["run"], row["seed"], row["validation %"], row["BitOps M"]) == ("search", "3", "95.1", "40.0")
    assert (row["target"], row["reached"], row["free ops"], row["search s"]) == ("41.2", "yes", "25%", "122")
    missed = write_run(tmp_path / "missed", search_result(target_reached=False, exact_bitops=90_000_000))
    plain = write_run(tmp_path / "plain", search_result(target_bitops=None, target_reached=None))
    _, out, _ = run(capsys, missed, plain)
    assert [row["reached"] for row in cells(out)] == ["no", "-"]


def test_a_target_stands_in_the_unit_of_its_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = search_result(target_bitops=None, target_reached=True)
    folders = [
        write_run(tmp_path / name, other, config={"cost": name, "target": target})
        for name, target in (("latency", 4.5), ("memory", 9000), ("macs", None), ("bitops", None))
    ]
    found = {row["run"]: row["target"] for row in cells(run(capsys, *folders)[1])}
    assert found == {"latency": "4.5 ms", "memory": "9000 bytes", "macs": "-", "bitops": "-"}


def test_flags_changed_on_the_way_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = uniform(tmp_path / "run", 343)
    config = json.loads((folder / "config.json").read_text())
    changes = [{"flag": "learning_rate", "before": 0.1, "after": 0.05, "no_longer_exact": "rates"}]
    config["sessions"] = [{"resumed_step": None}, {"resumed_step": 54, "changes": changes}]
    (folder / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, folder)
    assert code == 0 and f"{folder}: flags changed on its way: --learning-rate 0.1 -> 0.05." in out


def test_a_run_that_a_process_holds_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "going", None, config={"method": "qdarts", "stage": "train", "epochs": 20})
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\ninput()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        _, out, _ = run(capsys, folder)
        assert f"running: {folder} (0 of 20 epochs done)." in out and "--resume" not in out
        holder.communicate("\n")
    assert "--resume auto` goes on" in run(capsys, folder)[1]


def test_unfinished_runs_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "done", 343)
    identity = {"method": "qdarts", "stage": "train", "dataset": "digits", "arch": "PC_DARTS", "epochs": 20}
    begun = write_run(tmp_path / "begun", None, config=identity)
    (begun / "metrics.csv").write_text("step,epoch,train_loss\n22,0,1.2\n44,1,0.9\n50,")
    (begun / "history.jsonl").write_text('{"epoch": 0}\n{"epo')  # a row within the second epoch ends none
    write_run(tmp_path / "new", None, config=identity | {"stage": "search"})
    write_run(tmp_path / "said", train_result(finished=False), config=identity)
    code, out, err = run(capsys, tmp_path)
    assert code == 0 and not err
    marked = [row for row in cells(out) if "not finished" in row.values()]
    assert len(marked) == 3
    assert "begun (1 of 20 epochs done)" in out and "new (0 of 20 epochs done)" in out
    rows = objects(capsys, tmp_path)
    assert [row["finished"] for row in rows].count(False) == 3


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ('{"schema": 1, "method', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        (train_result(schema=2), "schema 2"),
        (train_result(stage="dance"), "stage"),
        (train_result(metrics={"test_top1": 0.9}), "metrics.test_correct"),
        (train_result(seconds="long"), "seconds"),
        (train_result(361), "361 correct"),
        (train_result(n_test=None), "n_test"),
        (train_result(cost={"bitops": "many"}), "cost.bitops"),
        (train_result(dataset=None), "dataset"),
    ],
)
def test_broken_runs_have_one_line_and_the_others_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], result: Any, words: str
) -> None:
    good = uniform(tmp_path / "good", 343)
    bad = write_run(tmp_path / "bad", result)
    code, out, err = run(capsys, bad, good, tmp_path / "nowhere")
    assert code == 1 and len(cells(out)) == 1
    lines = err.splitlines()
    assert len(lines) == 2 and "nowhere: no such folder" in err
    (line,) = [line for line in lines if str(bad) in line]
    assert words in line


def test_broken_side_files_are_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = uniform(tmp_path / "a", 343)
    (folder / "architecture.json").write_text("{")
    assert "architecture.json" in run(capsys, folder)[2]
    (folder / "architecture.json").unlink()
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json" in run(capsys, folder)[2]
    (folder / "config.json").unlink()
    assert run(capsys, folder)[0] == 0  # a result alone is enough
    (tmp_path / "nothing").mkdir()
    code, out, err = run(capsys, tmp_path / "nothing")
    assert code == 1 and not out and "holds no run" in err


def test_folders_above_runs_and_repeated_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = uniform(tmp_path / "runs" / "qdarts-train" / "a", 343)
    uniform(tmp_path / "runs" / ".hidden" / "b", 343)
    rows = objects(capsys, tmp_path / "runs", folder, "--run", folder)
    assert len(rows) == 1 and rows[0]["runs"] == [str(folder)]


def found_run(root: Path, name: str, correct: int, seed: int, search: str, **flags: Any) -> Path:
    """A training of what the search ROOT/SEARCH found (made where it is not there; its flags start with search_)."""
    digest = f"digest of {search}"
    if not (root / search).exists():
        known = {key.removeprefix("search_"): value for key, value in flags.items() if key.startswith("search_")}
        folder = write_run(root / search, search_result(seed), config={"bits": [2, 4], **known})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"digest": digest}))
    method = flags.pop("method", "qdarts")
    result = train_result(correct, seed, bits_mean={"weight": 2.3, "activation": 2.9}, method=method)
    return write_run(
        root / name,
        result | flags.pop("result", {}),
        # as the command was typed: from above the runs
        config={"arch": f"{root.name}/{search}"} | {k: v for k, v in flags.items() if not k.startswith("search_")},
        architecture=architecture_json(
            None, bits={"kind": "cells"}, search={"method": "qdarts", "seed": seed, "flags_digest": digest}
        ),
    )


def test_searched_sets_are_named_and_settings_of_the_search_tell_rows_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        for decay in (0.001, 0.0001):
            name = f"{decay}-{seed}"
            found_run(tmp_path, f"t{name}", 340 + seed, seed, f"s{name}", search_complexity_decay=decay)
        found_run(tmp_path, f"t8-{seed}", 350, seed, f"s8-{seed}", search_bits=[2, 4, 8])
        found_run(tmp_path, f"other-{seed}", 351, seed, f"s8-{seed}", method="another")
    rows = {(row["method"], row["bits"], row["differs"]): row["n"] for row in objects(capsys, tmp_path) if row["bits"]}
    assert rows == {
        ("qdarts", "{2,4}", "search.complexity_decay=0.001"): 2,
        ("qdarts", "{2,4}", "search.complexity_decay=0.0001"): 2,
        ("qdarts", "{2,4,8}", ""): 2,
        ("another", "{2,4,8}", ""): 2,
    }
    shown = cells(run(capsys, tmp_path / "t8-0", tmp_path / "other-0")[1])
    assert {(row["method"], row["architecture"], row["w/a"]) for row in shown} == {
        ("qdarts", "found", "{2,4,8} 2.3/2.9"),
        ("another", "found by qdarts", "{2,4,8} 2.3/2.9"),
    }


def test_a_flag_that_an_older_version_lacks_does_not_tell_while_it_has_its_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed, flags, source in (
        ("old", 0, {}, {}),
        ("new", 1, {"subset": 1.0}, {"subset": "default"}),
        ("set", 2, {"subset": 0.5}, {"subset": "flag"}),
    ):
        folder = write_run(tmp_path / name, train_result(340, seed), config=flags)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sources": source}))
    rows = objects(capsys, tmp_path)
    assert [(row["n"], row["differs"]) for row in rows] == [(2, "subset=1"), (1, "subset=0.5")]


def test_searches_and_trainings_vary_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    correct = {"a": [340, 343, 352], "b": [350, 356, 355]}
    for search, values in correct.items():
        for seed, number in enumerate(values):
            found_run(tmp_path, f"{search}-train-{seed}", number, seed, search)
    (row,) = [row for row in objects(capsys, tmp_path) if row["stage"] == "train"]
    groups = [[number / 360 for number in values] for values in correct.values()]
    within = sum(stats.tvar(group) for group in groups) / 2
    between = stats.tvar([sum(group) / 3 for group in groups]) - within / 3
    assert row["n"] == 6 and row["accuracy_std"] == pytest.approx(stats.tstd(groups[0] + groups[1]))
    assert row["accuracy_std_searches"] == pytest.approx(between**0.5)
    assert row["accuracy_std_trainings"] == pytest.approx(within**0.5)
    shown = [row for row in cells(run(capsys, tmp_path)[1]) if "accuracy %" in row]
    assert shown[0]["std s/t"] == f"{100 * between**0.5:.2f}/{100 * within**0.5:.2f}"
    # one training a search: the two cannot be told apart, and the column says nothing
    rows = objects(capsys, tmp_path / "a-train-0", tmp_path / "b-train-1")
    assert (rows[0]["n"], rows[0]["accuracy_std_searches"], rows[0]["accuracy_std_trainings"]) == (2, None, None)
    assert "std s/t" not in run(capsys, tmp_path / "a-train-0", tmp_path / "b-train-1")[1]


def test_what_was_quantised_after_its_training_is_a_row_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        source = write_run(tmp_path / f"fp{seed}", train_result(350, seed, bits_mean=None, method="darts"))
        result = train_result(340, seed, method="ptq", stage="quantize", seconds=4.0, source_seconds=60.0)
        flags = {"run": str(source), "source_digest": f"{seed}", "param_bits": 2}
        write_run(tmp_path / f"q{seed}", result, config=flags, architecture=architecture_json(bits=TWO_BITS))
    rows = objects(capsys, tmp_path)
    assert [(row["method"], row["bits"], row["n"], row["train_seconds"]) for row in rows] == [
        ("darts", "fp32", 2, 61.5),
        ("ptq", "2/2", 2, 64),
    ]


def test_larger_capacity_is_another_row_of_the_same_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = train_result()["network"]
    for seed in range(2):
        found_run(tmp_path, f"t{seed}", 340, seed, f"s{seed}", init_channels=8, match_reference="PC_DARTS")
        wide = {"network": network | {"init_channels": 12 + seed}}
        flags = {"match_bitops": 18.0, "match_reference": f"runs/fp{seed}", "init_channels": 12 + seed}
        found_run(tmp_path, f"large{seed}", 350, seed, f"s{seed}", result=wide, **flags)
    code, out, _ = run(capsys, tmp_path)
    shown = [row for row in cells(out) if "accuracy %" in row]
    assert code == 0 and out.count("test images") == 1
    assert [(row["architecture"], row["n"]) for row in shown] == [
        ("found match_bitops=18 (12-13 channels)", "2"),
        ("found", "2"),
    ]
    assert "(12 channels)" in run(capsys, tmp_path / "large0")[1]
    code, _, err = run(capsys, tmp_path, "--group-by", "method,bits")
    assert code == 2 and "match_bitops 18" in err and "init_channels 8" in err


def test_sizes_that_differ_are_told_in_every_row_that_is_not_like_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever method, architecture and bits a row has."""
    network = train_result()["network"]
    for name, method, changes, flags in (
        ("a", "one", {}, {}),
        ("b", "two", {}, {}),
        ("c", "three", {}, {}),
        ("d", "four", {"epochs": 40}, {}),
        ("e", "five", {"network": network | {"init_channels": 16, "layers": 8}}, {}),
        ("f", "six", {}, {"steps_per_epoch": 10}),
    ):
        result = train_result(340, method=method, **changes)
        write_run(tmp_path / name, result, config=flags, architecture=architecture_json("PC_DARTS"))
    _, out, _ = run(capsys, tmp_path)
    shown = [row["architecture"].removeprefix("PC_DARTS").strip() for row in cells(out)]
    assert shown == ["", "", "", "epochs=40", "layers=8 init_channels=16", "steps_per_epoch=10"]
    assert [row["differs"] for row in objects(capsys, tmp_path)] == shown
    assert "8 channels unless said, 5 layers unless said, 20 epochs unless said" in out
    # where no value is that of most rows, all say theirs; where all agree, the heading does
    _, out, _ = run(capsys, tmp_path / "a", tmp_path / "d", tmp_path / "f")
    assert [row["architecture"] for row in cells(out)][1:] == ["PC_DARTS epochs=40", "PC_DARTS steps_per_epoch=10"]
    _, out, _ = run(capsys, tmp_path / "a", tmp_path / "d")
    assert [row["architecture"] for row in cells(out)] == ["PC_DARTS epochs=20", "PC_DARTS epochs=40"]
    assert "8 channels, 5 layers, 1437 to learn from" in out
    _, out, _ = run(capsys, tmp_path / "a", tmp_path / "f")
    assert [row["architecture"] for row in cells(out)] == [
        "PC_DARTS steps_per_epoch=all",
        "PC_DARTS steps_per_epoch=10",
    ]


def test_searches_say_their_epochs_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, epochs in enumerate((16, 16, 50)):
        write_run(tmp_path / f"s{seed}", search_result(seed, epochs=epochs))
    _, out, _ = run(capsys, tmp_path)
    assert [row["size"] for row in cells(out)] == ["", "", "epochs=50"] and "16 epochs unless said" in out
    _, out, _ = run(capsys, tmp_path / "s0", tmp_path / "s1")
    assert "size" not in cells(out)[0] and "16 epochs, " in out


def test_rows_trained_for_unequal_epochs_are_never_ranked_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = train_result()["network"]
    for name, correct, changes, flags in (
        ("a", 300, {}, {}),
        ("b", 355, {"epochs": 40}, {}),
        ("c", 200, {"epochs": 40}, {}),
        ("d", 350, {"network": network | {"init_channels": 16}}, {}),  # an alternative, as --match-bitops is
        ("e", 100, {}, {"steps_per_epoch": 10}),
    ):
        write_run(tmp_path / name, train_result(correct, method=name, **changes), config=flags)
    _, out, _ = run(capsys, tmp_path)
    assert [row["rank"] for row in cells(out)] == ["2", "1", "2", "1", "1"]
    assert "trained for unequal numbers of epochs or steps are ranked apart" in out
    _, out, _ = run(capsys, tmp_path / "a", tmp_path / "d")
    assert [row["rank"] for row in cells(out)] == ["2", "1"] and "unequal" not in out


@pytest.mark.parametrize("said", [True, False], ids=["said", "older"])
def test_what_was_quantised_was_trained_as_long_as_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: bool
) -> None:
    flags = {"steps_per_epoch": 10}
    source = write_run(tmp_path / "fp", train_result(350, bits_mean=None, method="darts"), config=flags)
    result = train_result(200, method="ptq", stage="quantize", source_seconds=60.0, **(flags if said else {}))
    write_run(tmp_path / "q", result, config={"run": f"{tmp_path.name}/fp" if said else str(source)})
    shown = cells(run(capsys, tmp_path)[1])
    assert [(row["architecture"], row["rank"]) for row in shown] == [("PC_DARTS_cifar", "1"), ("PC_DARTS_cifar", "2")]
    assert "10 steps an epoch" in run(capsys, tmp_path)[1]


def test_times_count_all_that_a_run_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):  # 100 s of searches and 40 s of trainings stand before the bit search of 30 s
        before = {"search_seconds": 30.0, "before_seconds": 140.0 + 2 * seed, "before_search_seconds": 100.0}
        write_run(tmp_path / f"bits{seed}", train_result(350, seed, method="bits", seconds=60.0, **before))
        fine = {"before_seconds": 40.0, "before_search_seconds": 0.0}
        write_run(tmp_path / f"fine{seed}", train_result(349, seed, method="fine", seconds=60.0, **fine))
    found = {"before_seconds": 140.0, "before_search_seconds": 100.0}
    write_run(tmp_path / "search", search_result(seconds=30.0, **found))
    _, out, _ = run(capsys, tmp_path)
    shown = cells(out)
    assert [row["time s"] for row in shown if "time s" in row] == ["130+101", "100"]
    assert [row["search s"] for row in shown if "search s" in row] == ["30 (+140)"]
    assert "time: search + training, with all that they started from" in out and "do not say" not in out
    bits, fine, search = objects(capsys, tmp_path)
    parts = ("search_seconds", "train_seconds", "before_seconds", "before_search_seconds")
    assert [[row[part] for part in parts] for row in (bits, fine, search)] == [
        [30, 60, 141, 100],
        [None, 60, 40, 0],
        [30, None, 140, 100],
    ]
    write_run(tmp_path / "older", train_result(300, method="older", search_seconds=30.0))
    _, out, _ = run(capsys, tmp_path)
    assert [row["time s"] for row in cells(out) if "time s" in row][-1] == "30+62"
    assert "Runs that do not say what that took count without it: 1." in out


def test_devices_stand_in_the_rows_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"cpu": "Test CPU", "cores": 2, "threads": 2, "cuda": ["Test GPU"]}
    write_run(tmp_path / "a", train_result(method="one"))
    write_run(tmp_path / "b", train_result(method="two", device=gpu))
    write_run(tmp_path / "s", search_result())
    write_run(tmp_path / "t", search_result(1, device=gpu))
    _, out, _ = run(capsys, tmp_path)
    assert [row["device"] for row in cells(out)] == ["Test CPU, 2 cores", "Test GPU"] * 2
    assert all("Test" not in line for line in out.splitlines() if not line.startswith("|"))
    _, out, _ = run(capsys, tmp_path / "a", tmp_path / "s")
    assert all("device" not in row for row in cells(out)) and out.count("Test CPU, 2 cores") == 2


def test_a_spread_that_was_not_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for search in "ab":
        for seed in range(2):
            found_run(tmp_path, f"{search}{seed}", 340 + seed, seed, f"search-{search}")
    words = "No row has several trainings of one search or architecture: the spread between trainings is not measured."
    assert words in run(capsys, tmp_path / "a0", tmp_path / "b0")[1]
    assert words in run(capsys, tmp_path / "a0")[1]
    assert words not in run(capsys, tmp_path)[1]
    assert words not in run(capsys, tmp_path / "a0", tmp_path / "a1")[1]


def test_ranks_stand_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, correct, bits in (("a", 200, 2), ("b", 350, 3), ("c", 349, 4), ("d", 100, 8)):
        policy = architecture_json("PC_DARTS", bits={"kind": "uniform", "uniform": [bits, bits]})
        write_run(
            tmp_path / name,
            train_result(correct, bits_mean={"weight": bits, "activation": bits}),
            architecture=policy,
        )
    write_run(tmp_path / "e", None, config={"method": "qdarts", "stage": "train", "dataset": "digits"})
    _, out, _ = run(capsys, tmp_path)
    assert [row["rank"] for row in cells(out)] == ["3", "=1", "=1", "4", "-"]
    assert [row["rank"] for row in objects(capsys, tmp_path)] == ["3", "=1", "=1", "4", None]


def test_latex_has_the_shape_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        found_run(tmp_path, f"t_{seed}", 340 + seed, seed, f"s_{seed}")
    write_run(tmp_path / "fp", train_result(350, bits_mean=None, method="a_b&c"), config={"x": 1})
    code, out, _ = run(capsys, tmp_path, "--format", "latex")
    assert code == 0
    for block in out.split(r"\begin{table}")[1:]:
        shape, body = re.search(r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", block, re.DOTALL).groups()
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert body.splitlines()[0] == r"\toprule" and body.splitlines()[-1] == r"\bottomrule"
        # unescaped separators: as many as columns but one in every line
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(shape) - 1}
        assert block.count("{") - block.count(r"\{") == block.count("}") - block.count(r"\}")
        assert not re.search(r"(?<!\\)[%#_^~±]", block) and "`" not in block
    assert r"a\_b\&c" in out and r"\{2,4\} 2.3/2.9" in out and r"$\pm$" in out
    run(capsys, tmp_path, "--out", tmp_path / "table.tex")
    assert (tmp_path / "table.tex").read_text() == out


def test_csv_goes_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        found_run(tmp_path, f"t{seed}", 340 + seed, seed, f"s{seed}")
    uniform(tmp_path / "u", 343, architecture='an "odd", name')
    wanted = objects(capsys, tmp_path)
    read = list(csv.DictReader(io.StringIO(run(capsys, tmp_path, "--format", "csv")[1])))
    for row, entry in zip(read, wanted, strict=True):
        assert row.keys() >= entry.keys()
        for key, value in entry.items():
            if isinstance(value, list):
                assert row[key].split() == [str(item) for item in value if item is not None]
            elif isinstance(value, float):
                assert float(row[key]) == value
            else:
                assert row[key] == ("" if value is None else str(value))


def test_the_same_configuration_and_seed_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = uniform(tmp_path / "a", 343)
    for name in ("again", "copy"):  # the second has the first one's digest, and a flag that its own version lacked
        shutil.copytree(first, tmp_path / name)
    for name, flags in (("a", {}), ("copy", {"of_another_version": 1})):
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"digest": "d0", "config": config["config"] | flags}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    other = uniform(tmp_path / "other", 345)
    (row,) = objects(capsys, tmp_path)
    repeats = [str(tmp_path / name) for name in ("again", "copy", "other")]
    assert (row["n"], row["interval"], row["test_correct"]) == (1, "wilson", [343])
    assert (row["runs"], row["not_counted"]) == ([str(first)], repeats)
    _, out, err = run(capsys, tmp_path)
    for name in repeats[:2]:
        assert f"{name}: the same configuration and seed as {first}, not counted.\n" in out
    assert f"{other}: the same configuration and seed as {first}, not counted, though 345 correct, not 343." in out
    assert not err and "not counted" in run(capsys, tmp_path, "--format", "csv")[2]
    # another seed counts, and so does each run for who asks for a row each
    uniform(tmp_path / "z", 350, seed=1)
    assert [row["n"] for row in objects(capsys, tmp_path)] == [2]
    assert len(objects(capsys, tmp_path, "--group-by", "run")) == 5


def test_other_cells_images_or_sources_make_no_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(name: str, flags: dict[str, Any], nodes: int = 4) -> Path:
        cells = architecture_json("PC_DARTS_cifar", bits=TWO_BITS)
        cells["genotype"]["normal_concat"] = list(range(2, 2 + nodes))
        return write_run(tmp_path / name, train_result(340), config=flags, architecture=cells)

    def counted(*folders: Path) -> int:
        return sum(row["n"] for row in objects(capsys, *folders))

    plain = trained("plain", {"arch": "a.json"})
    assert counted(plain, trained("cells", {"arch": "a.json"}, nodes=3)) == 2
    assert counted(plain, trained("moved", {"arch": "elsewhere/a.json"})) == 1
    teachers = [trained(f"t{seed}", {"teacher": f"runs/t{seed}", "teacher_digest": f"{seed}"}) for seed in range(2)]
    assert counted(*teachers) == 2
    assert counted(teachers[0], trained("t0-moved", {"teacher": "old/t0", "teacher_digest": "0"})) == 1
    images = [trained(f"i{name}", {"dataset": "folder", "data": name}) for name in "ab"]
    assert counted(*images) == 2


def test_a_repeat_of_what_a_run_started_from_makes_a_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":  # the same training twice, their files not alike bit by bit, and both quantised
        source = write_run(tmp_path / f"fp-{name}", train_result(350, bits_mean=None, method="one"))
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"digest": "of the training"}))
        flags = {"run": str(source), "source_digest": f"state {name}"}
        quantised = train_result(340, method="two", stage="quantize", seconds=4.0, source_seconds=60.0)
        write_run(tmp_path / f"q-{name}", quantised, config=flags, architecture=architecture_json(bits=TWO_BITS))
    assert [(row["method"], row["n"]) for row in objects(capsys, tmp_path)] == [("one", 1), ("two", 1)]


def test_the_time_of_what_was_quantised_is_explained_where_there_is_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uniform(tmp_path / "a", 343)
    words = "Of what was quantised after its training: that training and the quantising."
    assert words not in run(capsys, tmp_path)[1]
    quantised = train_result(340, method="two", stage="quantize", seconds=4.0, source_seconds=60.0)
    write_run(tmp_path / "q", quantised, architecture=architecture_json(bits=TWO_BITS))
    _, out, _ = run(capsys, tmp_path)
    assert [row["time s"] for row in cells(out)] == ["62", "64"]
    assert words in out


def test_rows_that_read_the_same_name_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("x/s0/train", 0), ("x/s1/train", 1), ("x/s1/more", 2)):
        uniform(tmp_path / name, 340 + seed, seed)
    write_run(tmp_path / "x" / "fp", train_result(350, bits_mean=None))
    _, out, _ = run(capsys, tmp_path, "--group-by", "run")
    assert sorted(row["architecture"] for row in cells(out)) == [
        "PC_DARTS_cifar",  # full precision: the only one
        *("PC_DARTS_cifar s0/train", "PC_DARTS_cifar s1/more", "PC_DARTS_cifar s1/train"),
    ]
    assert {row["architecture"] for row in cells(run(capsys, tmp_path)[1])} == {"PC_DARTS_cifar"}
    # settings that follow from others differ and say nothing
    for name, seed, value in (("y/a", 0, 1), ("y/b", 0, 2), ("y/c", 1, 2)):
        folder = uniform(tmp_path / name, 345 + seed, seed)
        config = json.loads((folder / "config.json").read_text())
        config |= {"config": config["config"] | {"follows": value}, "sources": {"follows": "derived"}}
        (folder / "config.json").write_text(json.dumps(config))
    shown = [row["architecture"] for row in cells(run(capsys, tmp_path / "y")[1])]
    assert shown == ["PC_DARTS_cifar a", "PC_DARTS_cifar b +1"]
    for name in ("z/s0/search", "z/s1/search", "z/other"):
        write_run(tmp_path / name, search_result())
    assert [row["run"] for row in cells(run(capsys, tmp_path / "z")[1])] == ["other", "s0/search", "s1/search"]


def test_csv_has_the_same_columns_whatever_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "train", 343)
    write_run(tmp_path / "search", search_result())
    write_run(tmp_path / "wide", train_result(345), config={"match_bitops": 18.0, "match_reference": "r"})
    write_run(tmp_path / "new", None, config={"method": "qdarts", "stage": "train", "dataset": "digits"})
    names = ["train", "search", "wide", "new"]
    sets = [[name] for name in names] + [names, names[::-1]]
    heads = set()
    for chosen in sets:
        heads.add(run(capsys, *(tmp_path / name for name in chosen), "--format", "csv")[1].splitlines()[0])
    (head,) = heads
    columns = head.split(",")
    assert len(set(columns)) == len(columns) and columns[:3] == ["stage", "dataset", "method"]
    assert {"n_train", "steps_per_epoch", "match_bitops", "runs"} <= set(columns)


def test_pareto_writes_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "runs" / "a", 343)
    write_run(tmp_path / "runs" / "fp", train_result(350, bits_mean=None))
    write_run(tmp_path / "runs" / "new", None, config={"method": "qdarts", "stage": "train", "dataset": "digits"})
    picture = tmp_path / "deep" / "pareto.svg"
    code, out, err = run(capsys, tmp_path / "runs", "--pareto", picture, "--pareto-x", "weight_bytes")
    assert code == 0 and len(cells(out)) == 3
    assert f"wrote {picture}" in err and f"leaves out {tmp_path / 'runs' / 'new'}: not finished" in err
    text = picture.read_text()
    assert "qdarts 2/2" in text and "qdarts fp32" in text and "memory of the weights" in text
    for argv, words in (
        ((tmp_path / "runs", "--pareto", "pareto.gif"), ".svg, .png, .pdf"),
        ((tmp_path / "runs", "--pareto", picture, "--pareto-x", "macs"), "--pareto-x"),
        ((tmp_path / "runs" / "new", "--pareto", picture), "no finished training"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and words in err and not out


def test_csv_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "runs" / "a", 343)
    write_run(tmp_path / "runs" / "s", search_result())
    _, out, _ = run(capsys, tmp_path / "runs", "--format", "csv")
    train, search = csv.DictReader(io.StringIO(out))
    assert (train["stage"], train["bitops"], train["test_correct"]) == ("train", "41230000", "343")
    assert (search["stage"], search["exact_bitops"], search["bitops"]) == ("search", "40000000", "")
    target = tmp_path / "deep" / "table.csv"
    code, said, _ = run(capsys, tmp_path / "runs", "--out", target)
    assert code == 0 and said == f"wrote {target}\n" and target.read_text() == out
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]


def test_wrong_flags_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uniform(tmp_path / "a", 343)
    for argv, words in (
        ((), "RUN"),
        ((tmp_path, "--group-by", "method,bit"), "'bit'"),
        ((tmp_path, "--format", "xml"), "xml"),
        ((tmp_path, "--fromat", "md"), "did you mean --format"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and words in err and not out


def test_help_as_a_program_is_quick_and_imports_no_torch(root: Path) -> None:
    code = "import sys, report\ntry: report.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--group-by" in done.stdout, done.stderr
