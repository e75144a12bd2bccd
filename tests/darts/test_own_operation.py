# SPDX-License-Identifier: Apache-2.0
"""--search-space FILE.py: the example of docs/own-operation.md searched, trained and evaluated; what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.cost.__main__ import main as cost
from common.engine import read_json
from common.nets import OPERATIONS, load_architecture
from common.recipes.own_space import load_search_space
from darts.search import main as search
from darts.train import main as train
from evaluate import main as evaluate
from qdarts.search import main as search_with_bits
from visualize import main as visualize

SMOKE = ["--preset", "smoke", "--device", "cpu", "--no-tensorboard"]
ONLY = 'PRIMITIVES = ("none", "depthwise_3x3")\n'


@pytest.fixture
def example(root: Path, tmp_path: Path) -> Path:
    """The document's file, as a reader would copy it."""
    code = re.search(r"```python\n(.*?)```", (root / "docs/own-operation.md").read_text(), re.DOTALL)
    assert code is not None
    path = tmp_path / "my_space.py"
    path.write_text(code[1])
    return path


@pytest.mark.parametrize("method", ["DARTS", "PC-DARTS"])
def test_the_example_is_searched_trained_and_evaluated(example: Path, tmp_path: Path, method: str) -> None:
    """With no other candidate, so that what is found holds it for certain."""
    example.write_text(example.read_text() + ONLY)
    space, runs = ["--search-space", str(example)], [tmp_path / name for name in ("search", "train")]
    shape = ["--nodes", "2", "--multiplier", "2", "--method", method]
    assert search([*SMOKE, *space, *shape, "--save", str(runs[0])]) == 0
    genotype = load_architecture(runs[0]).genotype
    assert {name for name, _ in (*genotype.normal, *genotype.reduce)} == {"depthwise_3x3"}
    assert f"--search-space {example}" in read_json(runs[0] / "result.json")["train_command"]
    assert train([*SMOKE, *space, "--arch", str(runs[0]), "--save", str(runs[1])]) == 0
    assert evaluate([str(runs[1]), "--search-space", str(example), "--json"]) == 0


def test_a_network_of_it_is_refused_without_the_file(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_search_space(example)
    path = load_architecture("DARTS_V2").save(tmp_path / "architecture.json")
    path.write_text(path.read_text().replace("dil_conv_3x3", "depthwise_3x3"))
    load_architecture(path)
    del OPERATIONS["depthwise_3x3"]
    with pytest.raises(SystemExit):
        train([*SMOKE, "--arch", str(path)])
    assert "unknown primitive 'depthwise_3x3'" in (error := capsys.readouterr().err) and "--search-space" in error


def test_the_tools_take_the_file(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a process that has not seen the file; without it they say which flag is the cure."""
    before = dict(OPERATIONS)
    load_search_space(example)
    architecture = load_architecture("DARTS_V2").with_uniform_bits(2, 4)
    path = architecture.save(tmp_path / "architecture.json")
    path.write_text(path.read_text().replace("dil_conv_3x3", "depthwise_3x3"))
    for tool, code in ((visualize, 1), (cost, 2)):
        OPERATIONS.clear()
        OPERATIONS.update(before)
        load_search_space.cache_clear()
        assert tool([str(path)]) == code and "--search-space" in capsys.readouterr().err
        assert tool([str(path), "--search-space", str(example)]) == 0, capsys.readouterr().err
    svg = path.with_suffix(".svg").read_text()
    assert "depthwise_3x3" in svg and "w2" in svg


def test_the_content_belongs_to_the_configuration_and_the_place_does_not(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file elsewhere goes on (here: is finished), another content is refused."""
    example.write_text('PRIMITIVES = ("none", "sep_conv_3x3", "max_pool_3x3")\n')
    flags = [*SMOKE, "--nodes", "1", "--multiplier", "1", "--epochs", "1", "--save", str(tmp_path / "run")]
    assert search([*flags, "--search-space", str(example)]) == 0
    moved = tmp_path / "moved.py"
    moved.write_text(example.read_text())
    assert search([*flags, "--search-space", str(moved), "--resume", "auto"]) == 0
    assert "already finished" in capsys.readouterr().out
    moved.write_text('PRIMITIVES = ("none", "sep_conv_3x3", "avg_pool_3x3")\n')
    load_search_space.cache_clear()
    assert search([*flags, "--search-space", str(moved), "--resume", "auto"]) == 2
    assert "search_space_digest" in capsys.readouterr().err


def test_bits_are_searched_among_built_in_operations_only(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        search_with_bits([*SMOKE, "--search-space", str(example)])
    assert "no bits are searched for depthwise_3x3" in capsys.readouterr().err
    smaller = tmp_path / "smaller.py"
    smaller.write_text('PRIMITIVES = ["sep_conv_3x3", "skip_connect"]\n')
    flags = ["--nodes", "1", "--multiplier", "1", "--epochs", "1", "--save", str(tmp_path / "run")]
    assert search_with_bits([*SMOKE, *flags, "--search-space", str(smaller)]) == 0
    genotype = load_architecture(tmp_path / "run").genotype
    assert {name for name, _ in (*genotype.normal, *genotype.reduce)} <= {"sep_conv_3x3", "skip_connect"}


HEAD = "from torch import nn\nfrom common.nets import OPERATIONS\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name\n", "importing failed: ModuleNotFoundError"),
        ("PRIMITIVES = ('none', 'conv_9x9')\n", "names 'conv_9x9', which nobody registered"),
        ("PRIMITIVES = ('none',)\n", "at least one operation"),
        ("PRIMITIVES = 'sep_conv_3x3'\n", "must be a list of names"),
        ("", "registers no operation and sets no PRIMITIVES"),
        ("from common.nets import OPERATIONS\n", "put a builder into OPERATIONS (from common.nets)"),
        (HEAD + "OPERATIONS['skip_connect'] = lambda c, n, channels, s: nn.Identity()\n", "is an operation already"),
        (
            HEAD + "OPERATIONS['same'] = lambda c, n, channels, s: nn.Identity()\n",
            "same at stride 2 gives (2, 4, 8, 8)",
        ),
        (HEAD + "OPERATIONS['bad'] = lambda conv, norm, channels, s: conv(1, 2, 3)\n", "bad failed at stride 1"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_once(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = tmp_path / "space.py", dict(OPERATIONS)
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        search([*SMOKE, "--search-space", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "1 error" in error and reason in error and str(path) in error
    assert before == OPERATIONS


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search([*SMOKE, "--search-space", str(tmp_path / "none.py")])
    assert "no such file" in capsys.readouterr().err
