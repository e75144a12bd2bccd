# SPDX-License-Identifier: Apache-2.0
"""Take every figure of docs/performance.md, imagenet.md and cluster.md anew: benchmarks/results/*.json, plot, tables.

Run it on a machine that does nothing else. A benchmark that fails stops it; what was measured before stays.

    python benchmarks/run_all.py [--data ROOT] [--photographs DIR] [--only supernet_plain startup ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import page
from benchmarks.measuring import RESULTS, ROOT

STEP = "supernet_step.py"
# Result -> script and flags. {plot}, {csv} are files beside the result; --data is added for those of NEEDS_DATA.
PLAN: dict[str, list[str]] = {
    "supernet_plain": [STEP, "--against", "plain"],
    "supernet_tuned": [STEP, "--against", "plain-tuned"],
    "supernet_8bit": [STEP, "--against", "plain", "--bits", "2", "4", "8"],
    "supernet_float": [STEP, "--against", "plain", "--bits", "32"],
    "supernet_darts": [
        STEP,
        "--against",
        "plain",
        "--bits",
        "32",
        "--method",
        "darts",
        "--batch-size",
        "32",
        "--repeats",
        "3",
    ],
    "supernet_second_order": [STEP, "--second-order", "finite-difference"],
    "training_step": ["training_step.py"],
    "kernels": ["kernels.py"],
    "startup": ["startup.py"],
    "features": ["features.py"],
    "scaling": ["scaling.py", "--csv", "{csv}", "--plot", "{plot}"],
    "data_pipeline": ["data_pipeline.py"],
    "enas_step": ["enas_step.py"],
    "ranks": ["ranks.py"],
    "loaders": ["loaders.py"],
}
# Result -> which of our flags names its data.
NEEDS_DATA = {"startup": "data", "data_pipeline": "data", "loaders": "photographs"}
OWN_OUTPUT = ("data_pipeline", "loaders")  # of --output; their exit codes say that a goal is missed


def main(argv: list[str] | None = None) -> int:
    """Run the plan, or a part of it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="where CIFAR-10 lies (default: benchmarks do without it)")
    parser.add_argument("--photographs", type=Path, help="train/CLASS/* and val/CLASS/* (default: pieces of two)")
    parser.add_argument("--only", nargs="+", choices=tuple(PLAN), default=list(PLAN), metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.only:
        print(f"== {name}", flush=True)
        data = getattr(args, NEEDS_DATA[name]) if name in NEEDS_DATA else None
        done = subprocess.run([sys.executable, *command(name, data)], cwd=ROOT)
        if done.returncode and name not in OWN_OUTPUT:
            return done.returncode
    page.write()
    return 0


def command(name: str, data: Path | None) -> list[str]:
    """The command line of one result."""
    places = {"{csv}": str(RESULTS / f"{name}.csv"), "{plot}": str(ROOT / "docs" / "images" / f"{name}.svg")}
    script, *flags = (places.get(part, part) for part in PLAN[name])
    flags += ["--output" if name in OWN_OUTPUT else "--json", str(RESULTS / f"{name}.json")]
    if data is not None:
        flags += ["--data", str(data)]
    return [str(ROOT / "benchmarks" / script), *flags]


if __name__ == "__main__":
    sys.exit(main())
