# SPDX-License-Identifier: Apache-2.0
"""Every command and code block of README.md, docs/ and the folders' READMEs: files exist, flags parse, all of it runs.

The quick tests read the flags as the programs do; the slow one runs the commands one after the other at smoke size.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.photographs import make_folder
from tests.helpers.programs import python

METHODS = ("qdarts", "darts", "ptq", "fbqat", "qsubnet", "enas")
ROOT = Path(__file__).resolve().parents[1]
# Appended to a documented command, so that it takes seconds; later flags win.
SMALL = ["--preset", "smoke", "--dataset", "digits", "--epochs", "1", "--batch-size", "16", "--steps-per-epoch", "1"]
# The same for ImageNet's commands: a few small photographs in its place.
SMALL_IMAGENET = [*SMALL[:2], *SMALL[4:], "--dataset", "imagenet", "--image-size", "32"]
# Reachable by every search at smoke size.
TARGET = "32692634"


def documents() -> list[Path]:
    """Everything that a user reads."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / m / "README.md" for m in METHODS)]


def blocks(language: str) -> list[tuple[Path, str]]:
    """The fenced blocks of a language, with the document that each stands in."""
    found = []
    for file in documents():
        text = file.read_text(encoding="utf-8")
        found += [(file, block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


def commands(block: str) -> list[list[str]]:
    """The words of every command in a bash block."""
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def documented(pattern: str) -> list[list[str]]:
    """Every documented `python PROGRAM ...` whose program matches, each once."""
    found: dict[str, list[str]] = {}
    for _, block in blocks("bash"):
        for words in commands(block):
            if words[0] == "python" and len(words) > 1 and re.fullmatch(pattern, words[1]):
                found.setdefault(shlex.join(words), words)
    return list(found.values())


def titled(words: list[str]) -> str:
    """A short name of a test."""
    return " ".join(words[1:])[:70]


def files_written_in_documents() -> dict[str, str]:
    """Example files that a document shows: `name.py` in its text, the next python block its content."""
    found = {}
    for file in documents():
        text = file.read_text(encoding="utf-8")
        for name, block in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
            found[name] = block
    return found


# ------------------------------------------------------------------------------------------------------ the runs


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A joint search, a full-precision training, a search of bits and one of micro cells, at smoke size."""
    place = tmp_path_factory.mktemp("documents")
    few = ["--preset", "smoke", "--epochs", "1", "--no-tensorboard"]
    python(root, root / "qdarts/search.py", *few, "--save", "joint", cwd=place)
    python(root, root / "darts/train.py", *few, "--arch", "PC_DARTS", "--save", "trained", cwd=place)
    low = ["--arch", "PC_DARTS", "--wbits", "2", "--abits", "4"]
    python(root, root / "fbqat/train.py", *few, *low, "--save", "low", cwd=place)
    python(root, root / "qsubnet/search.py", *few, "--arch", "PC_DARTS", "--save", "bits", cwd=place)
    python(root, root / "enas/search.py", *few, "--save", "micro", cwd=place)
    make_folder(place / "photographs")
    for name in ("gamma_checkpoint.t7", "train.ffcv", "val.ffcv"):
        (place / name).write_bytes(b"")
    for name, content in files_written_in_documents().items():
        (place / name).write_text(content, encoding="utf-8")
    return {name: place / name for name in ("joint", "trained", "low", "bits", "micro")} | {"place": place}


def is_imagenet(words: list[str]) -> bool:
    """Whether a command reads ImageNet."""
    return "imagenet" in words or "--trainfile" in words


def without_ffcv(arguments: list[str], runs: dict[str, Path]) -> list[str]:
    """Photographs in place of .ffcv files, whose reading has tests of its own; a tool keeps its run's own data."""
    arguments = list(arguments)
    for flag in ("--trainfile", "--valfile"):
        if flag in arguments:
            at = arguments.index(flag)
            arguments[at : at + 2] = ["--data", str(runs["place"] / "photographs")] if flag == "--trainfile" else []
    return arguments


def made_small(arguments: list[str], words: list[str], runs: dict[str, Path]) -> list[str]:
    """The arguments of a search or training, so that it takes seconds."""
    arguments = without_ffcv(arguments, runs)
    if "--target-bitops" in arguments:
        arguments[arguments.index("--target-bitops") + 1] = TARGET
    if "--target" in arguments:  # the table of documents gives one in bytes
        arguments[arguments.index("--target") + 1] = "9000"
    arguments += [*(SMALL_IMAGENET if is_imagenet(words) else SMALL), "--no-tensorboard"]
    if re.search(r"(qdarts|darts|ptq|fbqat)/search", " ".join(words)):
        arguments += ["--warmup-epochs", "0"]
    return arguments


def filled(words: list[str], runs: dict[str, Path]) -> list[str]:
    """The words behind `python`, with RUN, DIR and the like put in."""
    program, text = words[1], " ".join(words)
    folder = runs["place"] / "photographs" if is_imagenet(words) else runs["place"]
    needs_training = "--init-from" in words or re.search(r"quantize|evaluate|report|export", program)
    result = []
    for word in words[1:]:
        if word == "DIR":
            word = str(folder)
        elif word == "RUN" or re.fullmatch(r"runs/[\w-]+/RUN", word):
            bits = "qsubnet-search" in word or program == "qsubnet/train.py"
            searched = "bits" if bits else "micro" if program.startswith("enas/") else "joint"
            if "darts-search/" in word and program == "darts/train.py":
                searched = "trained"  # its cells, in full precision
            trained = "low" if program == "export.py" else "trained"  # integers are of few bits
            word = str(runs[trained if needs_training or "-train/" in word else searched])
        elif word in ("gamma_checkpoint.t7", "train.ffcv", "val.ffcv") or word in files_written_in_documents():
            word = str(runs["place"] / word)
        if word != "...":  # "and so on"
            result.append(word)
    assert "RUN" not in result, text
    return result


# ------------------------------------------------------------------------------------------------------ the tests


def test_the_files_that_the_documents_name_exist(root: Path) -> None:
    shown = files_written_in_documents()
    for file, block in blocks("bash"):
        for words in commands(block):
            scripts = [w for w in words if re.fullmatch(r"[\w/]+\.(py|sh)", w) and w not in shown]
            modules = [words[i + 1] for i, w in enumerate(words[:-1]) if w == "-m"]
            for name in [*scripts, *(m.replace(".", "/") for m in modules)]:
                assert (root / name).exists() or (root / f"{name}.py").is_file(), f"{file.name}: {words}"


def test_every_method_has_a_readme_and_a_section(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for method in METHODS:
        assert f"### {method}:" in readme and f"({method}/README.md)" in readme
        assert (root / method / "README.md").is_file()


@pytest.mark.parametrize("words", documented(r"\w+/(search|train|quantize)\.py"), ids=titled)
def test_documented_flags_parse(
    words: list[str],
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """--print-config runs the whole of flag handling: presets, files, cross checks."""
    program, *flags = filled(words, runs)
    # a folder that an earlier command of the same block would have made
    made = str(runs["bits" if program == "qsubnet/train.py" else "trained"])
    flags = [made if re.fullmatch(r"runs/[\w-]+", f) and flags[i - 1] != "--save" else f
             for i, f in enumerate(flags)]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).main([*flags, "--print-config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    assert "threads" in capsys.readouterr().out


def planned() -> list[list[str]]:
    """Every documented command that runs a plan or a grid, each once."""
    found = {}
    for _, block in blocks("bash"):
        for words in commands(block):
            tables = words[0] == "bash" and re.fullmatch(r"scripts/(table\w*|ablations)\.sh", words[1])
            if tables or words[:2] == ["python", "sweep.py"]:
                found.setdefault(shlex.join(words), words)
    return list(found.values())


@pytest.mark.parametrize("words", planned(), ids=titled)
def test_documented_sweeps_and_tables_plan(words: list[str], root: Path) -> None:
    """--dry-run reads all flags, the plan and every command in it; one line a job."""
    command = [sys.executable if words[0] == "python" else words[0], *words[1:]]
    if "--dry-run" not in words:
        command.insert(command.index("--") if "--" in command else len(command), "--dry-run")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) > 1 and all(len(line) == 4 and line[3].startswith("python ") for line in lines), done.stdout


def test_sweeps_and_tables_are_documented() -> None:
    named = " ".join(word for words in planned() for word in words)
    for name in (
        "sweep.py --grid",
        "sweep.py scripts/plans/",
        "table1_cifar10.sh",
        "table_darts.sh",
        "table_enas.sh",
        "ablations.sh",
        "table2_imagenet.sh",
        "--executor slurm",
    ):
        assert name in named, name


@pytest.mark.parametrize("file, block", blocks("python"), ids=lambda value: getattr(value, "name", "block"))
def test_documented_python_runs(root: Path, tmp_path: Path, file: Path, block: str) -> None:
    if "def " in block and "import" not in block:
        pytest.skip("a fragment")
    python(root, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{block}", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documented_commands_run(root: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document's blocks in order and in one folder, so that what one command leaves is there for the next."""
    done, shown = set(), files_written_in_documents()
    with_own = os.pathsep.join((str(root), str(runs["place"])))
    for file, block in blocks("bash"):
        place = runs["place"] / file.relative_to(root).with_suffix("")
        place.mkdir(parents=True, exist_ok=True)
        for words in commands(block):
            tools = r"(evaluate|export|report|visualize|doctor)\.py|-[mc]"
            kind = re.fullmatch(rf"\w+/(search|train|quantize)\.py|{tools}", words[1])
            own = words[1] in shown or words[1] == "-c"  # a user's file imports the project
            monkeypatch.setenv("PYTHONPATH", with_own if own else str(root))
            if words[0] != "python" or (kind is None and not own) or "gamma_checkpoint.t7" in words:
                continue  # scripts, sweeps and the import of bits have tests of their own
            arguments = filled(words, runs)
            if (kind is None or kind.group(1) in ("search", "train")) and "--plan" not in words:
                arguments = made_small(arguments, words, runs)
            arguments = without_ffcv(arguments, runs)
            if arguments[:3] == ["-m", "common.cost", "latency"]:  # a table of the networks that made_small searches
                arguments += ["--dataset", "digits", "--init-channels", "4", "--layers", "3", "--samples", "2"]
            if "--backends" in arguments:
                arguments += ["--threads", "1", "--seconds", "0.05", "--images", "8"]
            if (key := shlex.join(arguments)) in done:
                continue
            done.add(key)
            if arguments[0] not in ("-m", "-c"):
                arguments[0] = str(root / arguments[0])
            # `repeat` and `latency` name what an earlier command left here; the other modules read the project's files
            here = arguments[0] != "-m" or arguments[1] == "common.engine" or "latency" in arguments
            python(root, *arguments, cwd=place if here else root)
    assert len(done) > 40


def launched() -> list[list[str]]:
    """Every documented `torchrun --nproc_per_node=N PROGRAM ...`, each once."""
    found = {}
    for _, block in blocks("bash"):
        for words in commands(block):
            if words[0] == "torchrun" and "..." not in words:
                found.setdefault(shlex.join(words), words)
    return list(found.values())


def test_torchrun_is_documented() -> None:
    assert len(launched()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("words", launched(), ids=titled)
def test_documented_torchrun_runs(words: list[str], root: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Two processes stand for any number of GPUs."""
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    program, *flags = made_small(filled(["python", *words[at:]], runs), words, runs)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    python(root, *launcher, root / program, *flags, "--save", tmp_path / "run", cwd=tmp_path)
    assert (tmp_path / "run" / "result.json").is_file()
