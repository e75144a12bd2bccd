# SPDX-License-Identifier: Apache-2.0
"""A user's own function: the example of docs/own-data.md, and every promise it can break."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import Stream, load

PREFIX = "import numpy as np, torch\nfrom common.data import *\n"
GOOD = {
    "a": "np.zeros((6, 1, 8, 8), np.uint8)",
    "b": "np.arange(6) % 3",
    "c": "np.ones((3, 1, 8, 8), np.uint8)",
    "d": "[0, 1, 2]",
}


@pytest.fixture
def own(tmp_path: Path) -> Any:
    def run(body: str, name: str = "make", **options: Any) -> Any:
        path = tmp_path / "mine.py"
        path.write_text(PREFIX + body)
        return load("cifar10", data_module=f"{path}:{name}", **options)

    return run


def arrays(**changes: str) -> str:
    return "def make():\n    return ({a}, {b}, {c}, {d})".format(**{**GOOD, **changes})


def test_the_documented_example(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "own-data.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    (tmp_path / "my_images.py").write_text(code)
    data = load("digits", data_module=f"{tmp_path / 'my_images.py'}:stripes")
    assert data.info.name == "my_images" and data.info.num_classes == 2 and data.info.channels == 1
    assert data.train.images.shape == (200, 1, 16, 16) and len(data.test) == 50
    assert data.info.pad == 2 and not data.info.flip
    x, y = Stream(data.train, data.info, batch_size=10, seed=0, name="train", augment=False).batch(0, 0)
    assert x.shape == (10, 1, 16, 16)
    # a row of class 0 is constant up to the noise, a column of class 1
    spread = torch.where(y == 0, x.std(3).mean((1, 2)), x.std(2).mean((1, 2)))
    assert (spread < 0.5).all()


def test_lists_arrays_and_tensors_are_taken(own: Any) -> None:
    data = own(arrays(b="torch.arange(6) % 3", d="np.array([0, 1, 2], np.int32)"))
    assert data.info.num_classes == 3 and data.test.labels.dtype == torch.int64
    assert data.info.std == (1.0,)  # constant images: normalisation stays defined


def test_a_whole_image_data_is_taken_as_it_is_and_resized_on_request(own: Any) -> None:
    body = (
        "def make():\n"
        "    part = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]))\n"
        "    info = DatasetInfo('mine', 2, 3, 8, ('x', 'y'), (.5,) * 3, (.2,) * 3, True, 1)\n"
        "    return ImageData(info, part, Split(part.images + 1, part.labels))"
    )
    assert own(body).info.classes == ("x", "y")
    data = own(body, image_size=12)
    assert data.info.image_size == 12 and data.test.images.shape == (4, 3, 12, 12)
    for old, new, message in (
        ("('x', 'y')", "('x',)", "info.classes names 1 of 2"),
        ("(.5,) * 3", "(.5,)", "info.mean needs one figure per channel"),
        ("(.2,) * 3", "(0.,) * 3", "info.std must be above 0"),
        ("[0, 1, 1, 0]", "[0, 1, 2, 0]", "train labels run from 0 to 2; expected 0..1"),
        ("3, 8, ('x'", "1, 8, ('x'", "train images have shape"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            own(body.replace(old, new))


def test_root_and_image_size_reach_a_function_that_asks(own: Any, tmp_path: Path) -> None:
    body = arrays().replace("make():", "make(root, image_size):\n    assert (root.name, image_size) == ('r', 8)")
    assert own(body, root=tmp_path / "r", image_size=8).info.image_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": "np.zeros((6, 1, 8, 8))"}, "train_images have type torch.float64; expected uint8"),
        ({"a": "np.zeros((6, 8, 8), np.uint8)"}, r"train_images have shape \(6, 8, 8\)"),
        ({"a": "np.zeros((6, 8, 8, 3), np.uint8)"}, "channels first"),
        ({"a": "np.zeros((6, 1, 8, 9), np.uint8)"}, "H = W"),
        ({"a": "'pictures'"}, "train_images is no array of numbers"),
        ({"a": "np.zeros((0, 1, 8, 8), np.uint8)", "b": "np.zeros(0, int)"}, "are empty"),
        ({"b": "np.arange(5) % 3"}, "6 train images but 5 train labels"),
        ({"b": "np.arange(6) / 2"}, "train_labels have type torch.float64"),
        ({"b": "np.arange(6).reshape(2, 3)"}, "expected integers"),
        ({"b": "np.arange(6) % 3 - 1"}, "train_labels hold -1"),
        ({"b": "np.arange(6) % 3 * 2"}, "no training image has label 1"),
        ({"c": "np.zeros((3, 1, 8, 8))"}, "test images must be a uint8 tensor"),
        ({"c": "np.zeros((3, 3, 8, 8), np.uint8)"}, "test images have shape"),
        ({"d": "[0, 1, 3]"}, "test labels run from 0 to 3; expected 0..2"),
        ({"d": "[0, 1]"}, "3 test images but 2 test labels"),
        ({"c": "np.zeros((0, 1, 8, 8), np.uint8)", "d": "np.zeros(0, int)"}, "the test split is empty"),
    ],
)
def test_wrong_arrays_are_refused_by_name(own: Any, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"--data-module .*mine.py:make: .*{message}"):
        own(arrays(**changes))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): pass", r"has no function 'make' \(it has: .*other"),
        ("make = 3", "has no function 'make'"),
        ("def make(): return 1, 2, 3", "must return an ImageData or .*, not tuple"),
        ("def make(): raise KeyError('gone')", "the function failed: KeyError: 'gone'"),
        ("def make(): return make(", "importing failed: SyntaxError"),
        ("import there_is_no_such_module", "importing failed: ModuleNotFoundError"),
    ],
)
def test_wrong_files_are_refused_by_name(own: Any, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own(body)


@pytest.mark.parametrize("spec", ["mine.py", ":make", "mine.py:"])
def test_the_form_of_the_flag_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=r"expected file\.py:function"):
        load("digits", data_module=spec)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load("digits", data_module=f"{tmp_path}/none.py:make")
    (tmp_path / "set.txt").write_text("")
    with pytest.raises(ValueError, match="is not a Python file"):
        load("digits", data_module=f"{tmp_path}/set.txt:make")
