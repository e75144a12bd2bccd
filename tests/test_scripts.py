# SPDX-License-Identifier: Apache-2.0
"""Scripts and packaging, without a network: decisions are read from --print-plan, and stand-ins replace Python."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])
REQUIREMENT_FILES = sorted(ROOT.glob("requirements*.txt"))
# What .venv's Python answers when setup.sh asks for its state: version, new enough, has torch, has pip.
HEALTHY = "3.11.7 1 1 1"


def read_requirements(path: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


class Tree:
    """A copy of what the scripts read, with stand-ins where they would run something heavy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / ".venv"
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        shutil.copy(ROOT / "pyproject.toml", folder)
        for path in REQUIREMENT_FILES:
            shutil.copy(path, folder)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts; variables that would change its decisions are cleared first."""
        cleared = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "TORCH_SPEC")}
        return subprocess.run(
            ["bash", str(self.folder / "scripts" / script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**cleared, **environment},
        )

    def plan(self, *arguments: str, **environment: str) -> dict[str, str]:
        done = self.run("setup.sh", "--print-plan", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return dict(line.split(": ", 1) for line in done.stdout.splitlines())

    def make_venv(self, *extras: str, state: str = HEALTHY, otherwise: str = "exit 0") -> None:
        """A .venv that setup.sh takes for finished: a stand-in for its Python, and the digests of now."""
        write_program(
            self.venv / "bin" / "python", f'if [[ $2 == *find_spec* ]]; then echo "{state}"; exit; fi\n{otherwise}'
        )
        for key, value in self.plan(*extras).items():
            if key.startswith("digest-"):
                (self.venv / f".{key}").write_text(value + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "a tree")  # a space in the path on purpose


# ------------------------------------------------------------------------------------------------------- every script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_sound(script: Path) -> None:
    text = script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text, "an error in the middle must stop the script"
    assert script.stat().st_mode & stat.S_IXUSR, "not executable"
    assert "sudo " not in text, "works as root or not, asks for no password"


def test_continuous_integration_runs_the_tests() -> None:
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "script",
    [
        "setup.sh",
        "test.sh",
        "quickstart.sh",
        "digits_study.sh",
        "run_plan.sh",
        "table1_cifar10.sh",
        "table2_imagenet.sh",
        "table_darts.sh",
        "table_enas.sh",
        "ablations.sh",
        "slurm/search.sh",
        "slurm/train.sh",
        "slurm/table.sh",
    ],
)
def test_help_needs_no_environment(script: str, tree: Tree) -> None:
    done = tree.run(script, "--help")
    assert done.returncode == 0
    assert f"scripts/{script}" in done.stdout and "set -euo" not in done.stdout and "#" not in done.stdout
    assert not tree.venv.exists()


# -------------------------------------------------------------------------------------------------- setup.sh: the plan


def test_plan_without_an_environment(tree: Tree) -> None:
    plan = tree.plan("dev")
    assert plan["action"] == "make"
    assert re.fullmatch(r"3\.\d+\.\d+", plan["version"])
    assert not tree.venv.exists(), "--print-plan changes nothing"


def test_finished_environment_is_left_alone_and_fast(tree: Tree) -> None:
    tree.make_venv("dev")
    assert tree.plan("dev")["action"] == "ready"
    start = time.perf_counter()
    done = tree.run("setup.sh", "dev")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.perf_counter() - start < 2


def test_changed_requirements_are_brought_up_to_date(tree: Tree) -> None:
    tree.make_venv("dev")
    with (tree.folder / "requirements-dev.txt").open("a") as file:
        file.write("another-package>=1\n")
    assert tree.plan()["action"] == "ready", "the core has not changed"
    plan = tree.plan("dev")
    assert (plan["action"], plan["why"]) == ("update", "the requirements (dev) have changed")
    with (tree.folder / "requirements.txt").open("a") as file:
        file.write("one-more>=1\n")
    assert tree.plan()["why"] == "the requirements (core) have changed"


def test_an_extra_that_is_missing_is_added(tree: Tree) -> None:
    tree.make_venv()
    plan = tree.plan("dev")
    assert (plan["action"], plan["why"]) == ("update", "dev is not installed yet")


@pytest.mark.parametrize(
    ("state", "action", "why"),
    [
        ("3.10.2 0 1 1", "remake", "older than 3.11"),
        ("3.11.7 1 0 1", "update", "torch is missing"),
        ("3.11.7 1 1 0", "remake", "half made"),
        ("3.12.1 1 1 1", "update", "have changed"),
    ],
)
def test_state_of_the_environments_python(tree: Tree, state: str, action: str, why: str) -> None:
    tree.make_venv()
    write_program(tree.venv / "bin" / "python", f'echo "{state}"')
    plan = tree.plan()
    assert plan["action"] == action
    assert why in plan["why"]


def test_broken_interpreter_is_replaced(tree: Tree) -> None:
    tree.make_venv()
    (tree.venv / "bin" / "python").unlink()
    (tree.venv / "bin" / "python").symlink_to(tree.folder / "gone")
    assert tree.plan()["action"] == "remake"


def test_moved_or_unusable_environment_is_replaced(tree: Tree) -> None:
    tree.make_venv()
    (tree.venv / ".root").write_text("/elsewhere\n")
    assert "moved" in tree.plan()["why"]
    (tree.venv / ".root").write_text(f"{tree.folder}\n")
    assert tree.plan()["action"] == "ready"
    (tree.venv / ".unusable").touch()
    assert tree.plan()["action"] == "remake"


def test_torch_spec_counts_and_is_remembered(tree: Tree) -> None:
    tree.make_venv()
    without = tree.plan()
    given = tree.plan(TORCH_SPEC="torch==2.13.0 torchvision==0.28.0")
    assert given["action"] == "update"
    assert given["digest-core"] != without["digest-core"]
    (tree.venv / ".torch-spec").write_text("torch==2.13.0 torchvision==0.28.0\n")
    assert tree.plan()["digest-core"] == given["digest-core"], "a later start without the variable keeps it"


def test_another_python_is_another_environment(tree: Tree) -> None:
    tree.make_venv()
    other = write_program(
        tree.folder / "bin" / "python3.12",
        'if [[ $2 == *ensurepip* ]]; then echo "3.12.1 yes yes - -"; else echo 3.12; fi',
    )
    plan = tree.plan(PYTHON=str(other))
    assert (plan["action"], plan["version"]) == ("remake", "3.12.1")


def candidates(tree: Tree, **answers: str) -> str:
    """A PATH on which only these Pythons exist; underscores stand for dots."""
    for name in ("python3", "python", "python3.13", "python3.12", "python3.11"):
        answer = answers.get(name.replace(".", "_"))
        write_program(tree.folder / "bin" / name, f'echo "{answer}"' if answer else "exit 127")
    return f"{tree.folder / 'bin'}:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("answers", "chosen", "torch"),
    [
        ({"python3": "3.11.2 yes yes - -", "python3_13": "3.13.0 yes yes - -"}, "python3", "-"),
        ({"python3": "3.9.2 old - - -", "python3_12": "3.12.1 yes yes - -"}, "python3.12", "-"),
        ({"python3": "3.11.2 yes yes - -", "python3_12": "3.12.1 yes yes 2.13.0 -"}, "python3.12", "2.13.0"),
        ({"python3": "3.11.2 no no - -", "python3_12": "3.12.1 yes yes - -"}, "python3.12", "-"),
        ({"python": "3.12.1 no yes 2.13.0 -", "python3_13": "3.13.0 yes yes - -"}, "python", "2.13.0"),
    ],
)
def test_choice_of_python(tree: Tree, answers: dict[str, str], chosen: str, torch: str) -> None:
    plan = tree.plan(PATH=candidates(tree, **answers))
    assert Path(plan["python"]).name == chosen
    assert plan["reuse-torch"] == torch


def test_no_python_says_what_to_do(tree: Tree) -> None:
    done = tree.run("setup.sh", PATH=candidates(tree, python3="3.9.2 old - - -"))
    assert done.returncode == 1
    assert "python3: 3.9.2" in done.stderr and "3.11" in done.stderr and "apt-get install" in done.stderr
    assert not tree.venv.exists()


def test_fitting_torch_is_reused_and_another_is_not(tree: Tree) -> None:
    import torch
    import torchvision  # noqa: F401

    assert tree.plan(PYTHON=sys.executable)["reuse-torch"] == torch.__version__
    assert tree.plan(PYTHON=sys.executable, TORCH_SPEC="torch==1.0.0 torchvision")["reuse-torch"] == "-"


def test_unknown_extra_is_refused(tree: Tree) -> None:
    done = tree.run("setup.sh", "devel")
    assert done.returncode == 1
    assert "devel" in done.stderr and "dev" in done.stderr.split("there are:")[1].split()


# ----------------------------------------------------------------------------------------------- test.sh, quickstart.sh


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "-m pytest -m not slow"),
        (["--full"], "-m pytest"),
        (["-x", "tests/quant", "--full"], "-m pytest -x tests/quant"),
        (["-k", "resume"], "-m pytest -m not slow -k resume"),
    ],
)
def test_test_script_hands_over_to_pytest(tree: Tree, arguments: list[str], expected: str) -> None:
    tree.make_venv("dev", "export", otherwise='echo "$*"; echo "3 passed, threads $OMP_NUM_THREADS"; exit 5')
    done = tree.run("test.sh", *arguments)
    assert done.returncode == 5, "the exit code is pytest's"
    processes = f"-m pytest -n {min(4, len(os.sched_getaffinity(0)))} --dist loadfile"
    assert done.stdout.splitlines()[-2:] == [expected.replace("-m pytest", processes, 1), "3 passed, threads 1"]


# sweep.py itself is the real one; what it calls python is the stand-in again
SWEEP = f"""import runpy, sys
sys.executable, *sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "sweep.py")!r}, run_name="__main__")
"""
QUICKSTART_STAND_IN = f"""
case "$*" in
    *--print-config*) printf 'epochs  20  flag\\ninit_channels  8  preset x\\nlayers  5  preset x\\n' ;;
    *common.cost*) echo "$*" >>commands; echo '{{"bitops": 123456, "macs": 7}}' ;;
    -c*json*) exec "{sys.executable}" "$@" ;;
    sweep.py*) exec "{sys.executable}" -c '{SWEEP.replace("'", '"')}' "$0" "$@" ;;
    report.py*) echo "$*" >>commands; echo '| a table |' ;;
    *) echo "$*" >>commands; echo "epoch 1, 3 s left" ;;
esac
"""


def test_quickstart_runs_the_recipe(tree: Tree) -> None:
    tree.make_venv("export", otherwise=QUICKSTART_STAND_IN)
    for script in ("qdarts/search.py", "qdarts/train.py"):
        write_program(tree.folder / script, "")
    done = tree.run("quickstart.sh", "--seed", "3")
    assert done.returncode == 0, done.stderr
    cost, search, *trainings, picture, table, export, backends = (tree.folder / "commands").read_text().splitlines()
    assert "PC_DARTS" in cost and "--init-channels 8 --layers 5 --wbits 2 --abits 2" in cost
    assert "--target-bitops 123456" in search
    assert [line.split("--arch ")[1].split(" --save")[0] for line in trainings] == [
        "runs/quickstart/s3/search",
        "PC_DARTS",
        "PC_DARTS --wbits 2 --abits 2",
        "PC_DARTS --wbits 4 --abits 4",
    ]
    for line in (search, *trainings):
        assert "--preset quickstart --seed 3" in line and line.endswith("--resume auto")
        assert f"$ python {line}" in done.stdout
    assert export == "export.py runs/quickstart/s3/found --format packed onnx onnx-fp32"
    assert backends == "evaluate.py runs/quickstart/s3/found/export --seconds 2"
    assert picture == "visualize.py runs/quickstart/s3/search"
    assert all(line.split("--save ")[1].split()[0] in table.split() for line in trainings)
    assert (tree.folder / "runs/quickstart/s3/table.md").read_text() == "| a table |\n"
    assert [f"[{number}/5]" in done.stdout for number in range(1, 6)] == [True] * 5
    assert "Table and drawing" in done.stdout and "to go, about" in done.stdout
    assert done.stdout.count("epoch 1, 3 s left") == 8, "what the steps, the drawing and the export print is shown"


def test_quickstart_stops_at_the_first_failure(tree: Tree) -> None:
    tree.make_venv(
        "export",
        otherwise=QUICKSTART_STAND_IN.replace(
            "report.py*)", 'qdarts/search.py*) echo "$*" >>commands; exit 3 ;;\n    report.py*)'
        ),
    )
    for script in ("qdarts/search.py", "qdarts/train.py"):
        write_program(tree.folder / script, "")
    done = tree.run("quickstart.sh", "--size", "smoke", "--out", str(tree.folder / "else where"))
    assert done.returncode == 1
    _, *commands = (tree.folder / "commands").read_text().splitlines()
    assert len(commands) == 2 and commands[0] == commands[1], "the search, once more, and nothing after it"
    assert "failed: s0/search (exit code 3;" in done.stdout and "Table and drawing" not in done.stdout
    assert (tree.folder / "else where" / "s0").is_dir()


TABLES = ["table1_cifar10.sh", "table2_imagenet.sh", "table_darts.sh", "table_enas.sh", "ablations.sh"]


@pytest.mark.parametrize("script", TABLES)
def test_a_table_makes_its_environment_and_hands_everything_to_the_sweep(script: str, tree: Tree) -> None:
    tree.make_venv(otherwise='printf "%s\\n" "$@" >words; echo "$PWD" >place; exit 7')
    flags = ["--size", "smoke", "--seeds", "0", "3", "--only", "qdarts,ptq", "--jobs", "2", "--out", "some where"]
    done = tree.run(script, *flags)
    assert done.returncode == 7, "sweep.py's own exit code"
    words = (tree.folder / "words").read_text().splitlines()
    assert words[:2] == ["sweep.py", f"scripts/plans/{Path(script).stem}.json"]
    given = " ".join(words[2:])
    for wanted in ("--size smoke", "--seeds 0 3", "--only qdarts ptq", "--jobs 2"):
        assert wanted in given, given
    assert words[words.index("--out") + 1] == f"{os.getcwd()}/some where"
    assert "--dry-run" not in words and (tree.folder / "place").read_text().strip() == str(tree.folder)


@pytest.mark.parametrize("flag", ["--seeds", "--data", "--out", "--only", "--jobs", "--size"])
def test_a_flag_without_its_value_swallows_no_other(flag: str, tree: Tree) -> None:
    done = tree.run("table1_cifar10.sh", flag, "--dry-run")
    assert done.returncode == 2 and f"{flag} needs a value" in done.stderr
    assert not tree.venv.exists()


@pytest.mark.parametrize(
    "arguments", [["--seed", "-1"], ["--seed"], ["--out", "--size"], ["--size", "big"], ["--speed", "9"]]
)
def test_quickstart_refuses_bad_arguments(tree: Tree, arguments: list[str]) -> None:
    done = tree.run("quickstart.sh", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert not tree.venv.exists()


def test_published_values_stand_beside_ours(tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out.md"
    table.write_text(
        "architecture,dataset,epochs,accuracy,accuracy_std,n\nPC_DARTS_cifar,cifar10,600,0.97,0.001,3\n"
        "DARTS_V1,digits,2,0.95,,1\nfound,digits,2,.5,,1\nDARTS_V2,cifar10,600,,,0\n"
        "DARTS_V2,imagenet,250,0.73,,1\n"
    )
    subprocess.run([sys.executable, str(ROOT / "scripts" / "published.py"), str(table), str(out)], check=True)
    assert out.read_text().splitlines()[2:] == [
        "| DARTS_V1 | digits, 2 | 95.00 | 1 | 97.00 ± 0.14 |",
        "| DARTS_V2 | imagenet, 250 | 73.00 | 1 | 73.30 (ImageNet, 250) |",
        "| PC_DARTS | cifar10, 600 | 97.00 ± 0.10 | 3 | 97.43 ± 0.07 |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="runs in the project's own environment only")
def test_quickstart_at_smoke_size(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--size", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = (tmp_path / "s0" / "table.md").read_text()
    assert table.count("\n|") >= 5, "a head and four rows"
    assert list((tmp_path / "s0" / "search").glob("*.svg"))


# ----------------------------------------------------------------------------------------------------------- packaging


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("path", REQUIREMENT_FILES, ids=lambda path: path.name)
def test_requirements_are_ranges(path: Path) -> None:
    found = read_requirements(path)
    assert found
    for requirement in found:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators and not operators & {"==", "===", "~="}, f"{requirement}: a range with a lower bound"
    names = [requirement.name for requirement in found]
    assert len(set(names)) == len(names)


def test_core_asks_for_the_torch_that_is_promised() -> None:
    core = {requirement.name: requirement.specifier for requirement in read_requirements(ROOT / "requirements.txt")}
    assert "2.11.0" in core["torch"] and "2.15.0" in core["torch"] and "2.10.1" not in core["torch"]
    assert "MIN_TORCH=2.11\n" in (ROOT / "scripts" / "setup.sh").read_text()


def test_pyproject_reads_the_requirements(project: dict) -> None:
    assert {"dependencies", "optional-dependencies"} <= set(project["project"]["dynamic"])
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == ["requirements.txt"]
    extras = {name: entry["file"] for name, entry in dynamic["optional-dependencies"].items()}
    names = [path.stem.removeprefix("requirements-") for path in REQUIREMENT_FILES if "-" in path.stem]
    assert extras == {name: [f"requirements-{name}.txt"] for name in names}
    assert {"dev", "ffcv", "export", "cluster"} <= set(extras)
    assert Version("3.11") in Requirement(f"x{project['project']['requires-python']}").specifier


def test_pyproject_packs_every_room(project: dict) -> None:
    tools = project["tool"]["setuptools"]
    assert {path.stem for path in ROOT.glob("*.py")} <= set(tools["py-modules"])
    includes = tools["packages"]["find"]["include"]
    aside = {"tests", "benchmarks", "scripts", "docs", "runs", "data", "build", "dist"}
    for folder in sorted({path.parent for path in ROOT.glob("[a-z]*/**/*.py")}):
        top = folder.relative_to(ROOT).parts[0]
        if top not in aside and not top.endswith(".egg-info"):
            assert f"{top}*" in includes, f"{top} is missing in pyproject.toml"
            assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"


IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "opencv-python-headless": "cv2",
    "pytest-timeout": "pytest_timeout",
}
# Comes with an extra that is installed by hand only, and each use says so.
BY_HAND = {"cupy"}
WITH_TORCH = {"triton"}  # torch's builds for GPUs bring it; who imports it does without


def python_files() -> list[Path]:
    """The tools, and every file of every room: a folder with an __init__.py, or of programs (scripts, benchmarks)."""
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")] + [ROOT / "scripts", ROOT / "benchmarks"]
    return sorted({*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))})


def test_imports_are_looked_at_in_every_room() -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in python_files()}
    assert {"common", "qdarts", "darts", "ptq", "fbqat", "qsubnet", "scripts", "benchmarks", "report.py"} <= tops


def test_every_import_is_required_somewhere() -> None:
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}

    def names(path: Path) -> set[str]:
        return {IMPORT_NAMES.get(item.name, item.name) for item in read_requirements(path)}

    core = names(ROOT / "requirements.txt") | WITH_TORCH
    anything = set().union(*map(names, REQUIREMENT_FILES)) | BY_HAND
    rows = []
    for path in python_files():
        tree = ast.parse(path.read_text())
        at_top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            else:
                continue
            for name in (full.split(".")[0] for full in found):
                if name in sys.stdlib_module_names or name in ours:
                    continue
                if name not in (core if id(node) in at_top else anything):
                    rows.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not rows, "\n".join(rows)


def test_licence_and_citations() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS" in licence
    citation = (ROOT / "CITATION.cff").read_text()
    for word in ("∇QDARTS", "DARTS: Diff", "PC-DARTS", "EdMIPS", "HWGQ", "LSQ", "ENAS", "QNN", "FFCV"):
        assert word in citation, word
    assert "\t" not in citation
