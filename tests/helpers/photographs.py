# SPDX-License-Identifier: Apache-2.0
"""A small ImageFolder of real photographs: pieces of the two that come with scikit-learn, as JPEGs of many sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02", "n03")


def make_folder(root: Path, train: int = 5, val: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    """root/train/CLASS/i.JPEG and root/val/CLASS/i.JPEG; among them a grey and a CMYK JPEG and a PNG named .JPEG."""
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            for i in range(count):
                height, width = (int(side) for side in random.integers(70, 260, 2))
                top, left = int(random.integers(0, 427 - height)), int(random.integers(0, 640 - width))
                piece = Image.fromarray(photographs[(number + i) % 2][top : top + height, left : left + width])
                path = root / part / name / f"{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                if (number, i) == (0, 0):
                    piece.convert("L").save(path, "JPEG")
                elif (number, i) == (1, 0):
                    piece.convert("CMYK").save(path, "JPEG", quality=90)
                elif (number, i) == (2, 0):
                    piece.save(path, "PNG")
                else:
                    piece.save(path, "JPEG", quality=90)
    return root
