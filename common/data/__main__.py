# SPDX-License-Identifier: Apache-2.0
"""Write a folder of images, one folder per class, as an FFCV file; or only look whether all can be read.

    python -m common.data IMAGENET/train --out train.ffcv --max-resolution 500 --compress-probability 0.5
    python -m common.data IMAGENET/train --check

The images keep torchvision's order (classes, then names), so that an index means the same in both. The class names are
written beside the file, as X.ffcv.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.engine.parsing import Config, Parser, integer, number
from common.recipes.flags import run_program

PROG = "python -m common.data"


def parser() -> Parser:
    """The flags."""
    parser = Parser(prog=PROG, usage="%(prog)s DIR --out X.ffcv [flags]", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="DIR", help="DIR/CLASS/*, such as ImageNet's train or val")
    add("--out", type=Path, metavar="X.ffcv", help="the file; it appears when it is whole")
    longest = "longest side in pixels, larger images are shrunk (default: as they are)"
    add("--max-resolution", type=integer(8), metavar="N", help=longest)
    share = "share of the images stored as JPEG; the rest as pixels, larger and quicker to read"
    add("--compress-probability", type=number(0, 1), default=1.0, metavar="P", help=share)
    add("--jpeg-quality", type=integer(1, 100), default=90, metavar="Q", help="of those JPEGs")
    add("--subset", type=integer(1), metavar="N", help="N images only, taken from the classes in turn")
    add("--check", action="store_true", help="decode every image, name the first that is unreadable, write nothing")
    add("--workers", "-j", type=integer(1), metavar="N", help="processes that write (default: one a core)")
    return parser


def take(samples: list[tuple[str, int]], count: int | None) -> list[tuple[str, int]]:
    """`count` images, the first of every class, then the second, and so on, in their old order; None: all."""
    if count is None or count >= len(samples):
        return samples
    seen: dict[int, int] = {}
    turns = []
    for index, (_, label) in enumerate(samples):
        turns.append((seen.get(label, 0), index))
        seen[label] = seen.get(label, 0) + 1
    return [samples[index] for index in sorted(index for _, index in sorted(turns)[:count])]


def write(config: Config) -> None:
    """Write the file and say how large it became. Raises ValueError naming flag or file."""
    from common.data.ffcv import INSTALL, why_missing, write_ffcv
    from common.data.folder import scan

    if config.check:
        return check_images(config)
    if config.folder is None or config.out is None:
        raise ValueError(f"{'DIR' if config.folder is None else '--out'}: is missing; see --help")
    if not config.folder.is_dir():
        raise ValueError(f"DIR {config.folder}: no such folder")
    if (reason := why_missing()) is not None:
        raise ValueError(f"ffcv cannot be used here ({reason}); install it: {INSTALL}")
    classes, samples = scan(config.folder)
    samples = take(samples, config.subset)
    print(f"writing {len(samples):,} images of {len(classes)} classes to {config.out}", flush=True)
    write_ffcv(
        samples,
        config.out,
        classes=classes,
        max_resolution=config.max_resolution,
        compress_probability=config.compress_probability,
        jpeg_quality=config.jpeg_quality,
        workers=config.workers or os.cpu_count() or 1,
    )
    print(f"wrote {config.out}: {config.out.stat().st_size / 1e6:,.1f} MB")


def check_images(config: Config) -> None:
    """Decode all images of the folder. Raises ValueError naming the first unreadable one, or an empty class."""
    from common.data.folder import scan
    from common.data.imagenet import FileSplit

    if config.folder is None or not config.folder.is_dir():
        raise ValueError(f"DIR {config.folder}: no such folder; give DIR, with DIR/CLASS/*")
    classes, samples = scan(config.folder)
    FileSplit(samples, config.workers or os.cpu_count() or 1).look()
    print(f"{config.folder}: {len(samples):,} images of {len(classes)} classes, all readable")


def main(argv: Sequence[str] | None = None) -> int:
    """Write as the flags say; the exit code."""
    config = parser().parse_args(argv)
    return run_program(lambda: write(config), PROG, config)


if __name__ == "__main__":
    sys.exit(main())
