# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, read from the source itself: who may import whom, nothing written twice, nothing unsafe.

Every rule reads all files that git would take, so that a new file is covered from its first day.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("qdarts", "darts", "ptq", "fbqat", "qsubnet", "enas")
TOOLS = ("evaluate", "visualize", "report", "sweep", "export", "doctor")
WINGS = ("data", "quant", "nets", "cost", "export", "engine", "recipes")
# Room -> the rooms that it may import, besides itself. Methods and tools stand on all of common.
GROUND: frozenset[str] = frozenset()
ALL_OF_COMMON = frozenset({"genotypes", "common", *(f"common.{wing}" for wing in WINGS)})
ARROWS = {
    "genotypes": GROUND,
    "common": GROUND,  # below the wings: how JSON is read
    "common.data": frozenset({"common"}),
    "common.quant": GROUND,
    "common.engine": frozenset({"common"}),
    "common.nets": frozenset({"common", "common.quant", "genotypes"}),
    "common.cost": frozenset({"common.nets", "common.quant", "genotypes"}),
    "common.export": frozenset({"common", "common.nets", "common.quant", "common.cost", "common.engine", "genotypes"}),
    "common.recipes": ALL_OF_COMMON,
    **dict.fromkeys(METHODS, ALL_OF_COMMON),
    "tools": ALL_OF_COMMON,
    "benchmarks": ALL_OF_COMMON | frozenset((*METHODS, "tests")),
}
# The entry points that read like a recipe.
MAX_ENTRY_LINES = 250
MAX_FUNCTION_LINES = 120
# Two functions longer than this may not have the same body.
MAX_SHARED_LINES = 10


@dataclass(frozen=True)
class Source:
    """One Python file: its path below the root, its dotted name, text and syntax tree."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def is_test(self) -> bool:
        return self.path.parts[0] == "tests"

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


@cache
def committed_files() -> tuple[Path, ...]:
    """Every file that git has or would take, relative to the root; all files where there is no git (an archive)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [Path(name) for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = (".venv", "runs", "data", "build", "dist", "__pycache__")
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [path for path in found if path.parts[0] not in hidden and not path.parts[0].startswith(".")]
    return tuple(sorted(name for name in set(names) if (ROOT / name).is_file()))


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file, parsed once."""
    found = []
    for path in committed_files():
        if path.suffix == ".py":
            text = (ROOT / path).read_text(encoding="utf-8")
            parts = path.with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(path, module, text, ast.parse(text, filename=str(path))))
    return tuple(found)


def product() -> list[Source]:
    """Every Python file but the tests."""
    return [source for source in sources() if not source.is_test]


def room(module: str) -> str | None:
    """The room of a dotted name: common.<wing>, a method, genotypes, benchmarks or tools; None for what is not ours."""
    parts = module.split(".")
    if parts[-1] == "__main__":  # the command of a wing stands on top, like any tool
        return "tools"
    if parts[0] == "common":
        return ".".join(parts[:2]) if len(parts) > 1 and parts[1] in WINGS else "common"
    if parts[0] in (*METHODS, "genotypes", "benchmarks", "tests"):
        return parts[0]
    known = {source.module for source in product()}
    return "tools" if parts[0] in known or parts[0] == "scripts" else None


def walk_runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """Like ast.walk, without the bodies of `if TYPE_CHECKING:`, which never run."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def imported(source: Source, nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` gives a.b where that is a module, else a."""
    modules = {other.module for other in sources()}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in modules else base


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file, nested ones too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def public_definitions(source: Source) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """(qualified name, node) of public functions, public classes and the public methods of public classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in source.tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, kinds) and not child.name.startswith("_"):
                    yield f"{node.name}.{child.name}", child


def report(rows: list[str]) -> str:
    """Offenders, one a line, for an assertion's message."""
    return "\n  ".join(["", *rows])


def forbidden_arrows(found: list[Source]) -> list[str]:
    """Every import of a room that the importing room may not know."""
    rows = []
    for source in found:
        own = room(source.module) or ""
        may = ARROWS.get(own, GROUND)
        for line, name in imported(source, ast.walk(source.tree)):
            other = room(name)
            if other not in (None, own) and other not in may:
                rows.append(f"{source.path}:{line}: {own} imports {name}; it may import: {', '.join(sorted(may))}")
    return rows


def test_arrows_run_down() -> None:
    rows = forbidden_arrows(product())
    assert not rows, report(rows)


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("common.engine.run", "from common.nets import build_network"),
        ("common.quant.layers", "import common.engine.seeding"),
        ("common.nets.network", "from common.cost import network_cost"),
        ("common.data.digits", "from genotypes import lookup"),
        ("common.recipes.search", "from qdarts import search"),
        ("qdarts.search", "from darts.train import main"),
        ("report", "import qdarts.train"),
        ("doctor", "def f():\n    from genotypes import lookup, GENOTYPES\n    import common.recipes\n    import enas"),
        ("common.cost.counting", "from ..engine import run"),
    ],
)
def test_the_arrow_rule_sees_a_wrong_arrow(module: str, statement: str) -> None:
    path = Path(*module.split(".")).with_suffix(".py")
    rows = forbidden_arrows([Source(path, module, statement, ast.parse(statement))])
    assert len(rows) == 1, report(rows)


def test_no_circle_of_imports() -> None:
    modules = {source.module for source in product()}
    graph: dict[str, set[str]] = {
        source.module: {name for _, name in imported(source, walk_runtime(source.tree)) if name in modules}
        for source in product()
    }
    # Leaves are taken away until none is left; what stays lies on a circle or leads into one.
    while leaves := {module for module, targets in graph.items() if not targets - {module}}:
        graph = {module: targets - leaves for module, targets in graph.items() if module not in leaves}
    assert not graph, report([f"{module} -> {', '.join(sorted(targets))}" for module, targets in graph.items()])


def body_key(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, str]:
    """(lines, dump) of a function's body without its docstring; the function's own name and signature do not count."""
    body = node.body
    if ast.get_docstring(node, clean=False) is not None:
        body = body[1:]
    if not body:
        return 0, ""
    lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
    return lines, "\n".join(ast.dump(statement) for statement in body)


def shared_bodies(found: list[Source]) -> list[str]:
    """Groups of functions of more than MAX_SHARED_LINES lines that have one body."""
    places = defaultdict(list)
    for source in found:
        for node in functions(source):
            lines, key = body_key(node)
            if lines > MAX_SHARED_LINES:
                places[key].append(f"{source.path}:{node.lineno} {node.name}")
    return [" = ".join(group) for group in places.values() if len(group) > 1]


def test_nothing_is_written_twice() -> None:
    rows = shared_bodies(list(sources()))
    assert not rows, report(rows)


def test_the_duplicate_rule_sees_a_copy_under_another_name() -> None:
    lines = "".join(f"    y{i} = x + {i}\n" for i in range(11)) + "    return x\n"
    text = f'def one(x):\n    """Some words."""\n{lines}\n\ndef two(x):\n{lines}\n\ndef three(x):\n    x = 1\n{lines}'
    rows = shared_bodies([Source(Path("a.py"), "a", text, ast.parse(text))])
    assert len(rows) == 1
    assert "one" in rows[0] and "two" in rows[0] and "three" not in rows[0]


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """(call, dotted name of what is called) of a file, where that is a plain name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


# Modules that run what they read: nothing here reads by them.
PICKLES = ("pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "jsonpickle")
PICKLES_WRITE = ("dump", "dumps", "HIGHEST_PROTOCOL", "DEFAULT_PROTOCOL")
RUNS_CODE = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__|execfile)"
    r"|os\.(system|popen|startfile|exec\w+|spawn\w+)|subprocess\.get\w*output|pty\.spawn"
    r"|torch\.(jit|export|package)\.\w*(load|Importer)\w*|torch\.hub\.\w+|torch\.serialization\.add_safe_globals"
    r"|yaml\.(load|load_all|full_load\w*|unsafe_load\w*)|(pandas|pd)\.read_pickle|code\.interact"
    r"|.*\.exec_module|.*\.read_pickle"
)
# Python files that a user names in order to have them run: --data-module, --search-space.
RUN_ON_REQUEST = {
    ("common/data/own.py", "found.loader.exec_module"),
    # Given nothing but what `torch_archive.checked_program` let through: raw tensors, known operators, no pickle.
    ("common/export/torch_export.py", "torch.export.load"),
}


def aliases(source: Source) -> dict[str, str]:
    """Name in a file -> what it was imported as: `import torch as t` gives t -> torch."""
    found = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {entry.asname: entry.name for entry in node.names if entry.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {entry.asname or entry.name: f"{node.module}.{entry.name}" for entry in node.names}
    return found


def unsafe_calls(source: Source) -> list[str]:
    """eval, exec, pickles, torch.load that may run code, archives that may write anywhere, and shells, in one file."""
    rows, known = [], aliases(source)
    for node, typed in calls(source):
        head, dot, rest = typed.partition(".")
        name = known.get(head, head) + dot + rest
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = (
            (RUNS_CODE.fullmatch(name) is not None and (str(source.path), typed) not in RUN_ON_REQUEST)
            or keywords.get("weights_only", "True") != "True"
            or (name == "torch.load" and "weights_only" not in keywords)
            or keywords.get("shell", "False") != "False"
            or keywords.get("allow_pickle", "False") != "False"
            or (
                name.endswith((".extractall", ".unpack_archive")) and keywords.get("filter") not in ("'data'", '"data"')
            )
        )
        if bad:
            rows.append(f"{source.path}:{node.lineno}: {ast.unparse(node)[:100]}")
    for node in ast.walk(source.tree):  # also where they are only named, to be called elsewhere
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.ImportFrom):
            name = f"{node.module}.{node.names[0].name}"
        head, _, rest = name.partition(".")
        if known.get(head, head) in PICKLES and rest not in PICKLES_WRITE:
            rows.append(f"{source.path}:{node.lineno}: {ast.unparse(node)}")
    return rows


def test_nothing_runs_code_from_data() -> None:
    rows = [row for source in product() for row in unsafe_calls(source)]
    assert not rows, report(rows)


@pytest.mark.parametrize(
    "statement",
    [
        "eval(text)",
        "import builtins as b; b.exec(text)",
        "__import__(name)",
        "import pickle; pickle.load(file)",
        "import pickle as p; reader = p.Unpickler",
        "import os, marshal; marshal.loads(data)",
        "from pickle import load",
        "import torch; torch.load(path)",
        "import torch as t; t.load(path)",
        "from torch import load; load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "from torch import hub; hub.load(place, name)",
        "torch.jit.load(path)",
        "torch.serialization.add_safe_globals([print])",
        "numpy.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, Loader=loader)",
        "import pandas as p; p.read_pickle(path)",
        "subprocess.run(command, shell=True)",
        "from subprocess import getoutput as run; run(command)",
        "from os import system; system(command)",
        "os.popen(command)",
        "spec.loader.exec_module(module)",
        "archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "shutil.unpack_archive(file, folder)",
    ],
)
def test_the_safety_rule_sees(statement: str) -> None:
    assert unsafe_calls(Source(Path("a.py"), "a", statement, ast.parse(statement)))
    fine = "import re, json, pickle; model.eval(); torch.load(p, weights_only=True); re.compile('x'); json.load(f)"
    fine += "; yaml.safe_load(f); pickle.dump(x, f)"
    assert not unsafe_calls(Source(Path("a.py"), "a", "", ast.parse(fine)))


def test_no_bare_except_and_nothing_left_open() -> None:
    # Spelled apart, so that this file does not find itself.
    left_open = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]))
    rows = [
        f"{source.path}:{node.lineno}: except without a type"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    rows += [
        f"{source.path}:{number}: {line.strip()}"
        for source in product()
        for number, line in enumerate(source.text.splitlines(), 1)
        if left_open.search(line)
    ]
    assert not rows, report(rows)


def test_licence_line_comes_first() -> None:
    tag = "# SPDX-License-Identifier: Apache-2.0"
    rows = []
    for path in committed_files():
        if path.suffix in (".py", ".sh", ".toml") or path.parts[0] == ".ci":
            head = (ROOT / path).read_text(encoding="utf-8").splitlines()[:2]
            if tag not in (head[1:] if head and head[0].startswith("#!") else head[:1]):
                rows.append(str(path))
    assert not rows, report(rows)


def test_entry_points_and_functions_stay_readable() -> None:
    rows = []
    for source in product():
        lines = source.text.count("\n")
        recipe = room(source.module) in METHODS and source.path.name in ("search.py", "train.py")
        if (recipe or source.module in TOOLS) and lines > MAX_ENTRY_LINES:
            rows.append(f"{source.path}: {lines} lines, an entry point has at most {MAX_ENTRY_LINES}")
        for node in functions(source):
            if (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                rows.append(f"{source.path}:{node.lineno} {node.name}: {size} lines, at most {MAX_FUNCTION_LINES}")
    assert not rows, report(rows)


def test_signatures_are_annotated() -> None:
    rows = []
    for source in product():
        for node in functions(source):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            every += [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
            bare = [argument.arg for argument in every if argument.annotation is None]
            bare = [name for name in bare if name not in ("self", "cls", "ctx")]
            if node.returns is None and node.name != "__init__":
                bare.append("return")
            if bare and not node.name.startswith("_"):
                rows.append(f"{source.path}:{node.lineno} {node.name}: no annotation of {', '.join(bare)}")
    assert not rows, report(rows)


# Names that torch, argparse and Python themselves define and document.
INHERITED = {"forward", "backward", "setup_context", "extra_repr", "state_dict", "load_state_dict", "error"}


def test_public_names_are_documented() -> None:
    rows = [f"{source.path}: the file" for source in product() if source.text and not ast.get_docstring(source.tree)]
    rows += [
        f"{source.path}:{node.lineno} {name}"
        for source in product()
        for name, node in public_definitions(source)
        if node.name not in INHERITED and not ast.get_docstring(node)
    ]
    assert not rows, report(rows)


def test_no_machine_paths_in_files() -> None:
    # Spelled apart, so that this file does not find itself.
    texts = (".py", ".sh", ".toml", ".txt", ".md", ".json", ".cff", ".yml", ".csv", "")
    path = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/tm" + "p/venv"]))
    rows = []
    for name in committed_files():
        if name.suffix in texts and name.name != "LICENSE":
            lines = (ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines()
            rows += [f"{name}:{number}: {line[:100]}" for number, line in enumerate(lines, 1) if path.search(line)]
    assert not rows, report(rows)


LEAN_IMPORT = """
import socket, sys

class NetworkTouched(Exception): pass
def refuse(*arguments, **options): raise NetworkTouched(arguments)
socket.socket.connect = refuse
socket.getaddrinfo = refuse

sys.argv = ["importer", "--not-a-flag", "not-a-file"]
argv = list(sys.argv)
heavy = ("matplotlib", "graphviz", "tensorboard", "torch.utils.tensorboard", "sklearn", "torchvision", "scipy", "PIL")
import importlib
import torch
for name in sys.stdin.read().split():
    before = {module for module in heavy if module in sys.modules}
    threads = torch.get_num_threads()
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{name}: {type(error).__name__}: {error}")
        continue
    for module in heavy:
        if module in sys.modules and module not in before:
            print(f"{name}: imports {module}; it belongs into the function that needs it")
    if torch.cuda.is_initialized(): print(f"{name}: touches CUDA")
    if sys.argv != argv: print(f"{name}: changes argv")
    if torch.get_num_threads() != threads: print(f"{name}: changes torch's threads")
    if torch.get_default_dtype() != torch.float32: print(f"{name}: changes the default dtype")
"""


def test_imports_are_lean() -> None:
    names = [source.module for source in product() if source.path.name != "__main__.py"]
    done = subprocess.run(
        [sys.executable, "-c", LEAN_IMPORT],
        input="\n".join(names),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout, report(done.stdout.splitlines())
