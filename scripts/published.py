# SPDX-License-Identifier: Apache-2.0
"""Published accuracies beside ours: `python scripts/published.py TABLE.csv OUT.md`, TABLE.csv from report.py.

Sources: DARTS_V1 and DARTS_V2 are first and second order in table 1 of DARTS (Liu et al., ICLR 2019), PC_DARTS is in
table 1 of PC-DARTS (Xu et al., ICLR 2020): mean and standard deviation of the accuracy at 36 channels, 20 cells, 600
epochs. IMAGENET: DARTS_V2 in table 3 of DARTS, top-1 at 48 channels, 14 cells, 250 epochs, of one training.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

PUBLISHED = {"DARTS_V1": (97.00, 0.14), "DARTS_V2": (97.24, 0.09), "PC_DARTS": (97.43, 0.07)}
IMAGENET = {"DARTS_V2": 73.3}


def published_table(rows: list[Mapping[str, str]]) -> str:
    """A Markdown table: ours of every row with a published architecture, and what was published."""
    lines = ["| cell | data, epochs | ours % | n | published %: CIFAR-10, 600 |", "|---|---|---:|---:|---:|"]
    for name, (mean, deviation) in PUBLISHED.items():
        for row in rows:
            if row["architecture"].removesuffix("_cifar") == name and row["accuracy"]:
                ours = f"{100 * float(row['accuracy']):.2f}"
                ours += f" ± {100 * float(row['accuracy_std']):.2f}" if row["accuracy_std"] else ""
                what = f"{row['dataset']}, {row['epochs']}"
                theirs = f"{mean:.2f} ± {deviation:.2f}"
                if row["dataset"] == "imagenet":
                    theirs = f"{IMAGENET[name]:.2f} (ImageNet, 250)" if name in IMAGENET else "-"
                lines.append(f"| {name} | {what} | {ours} | {row['n']} | {theirs} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table of the CSV file; the exit code."""
    if len(sys.argv) != 3:
        print("usage: python scripts/published.py TABLE.csv OUT.md", file=sys.stderr)
        return 2
    with Path(sys.argv[1]).open(newline="", encoding="utf-8") as file:
        Path(sys.argv[2]).write_text(published_table(list(csv.DictReader(file))), encoding="utf-8")
    print(f"wrote {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
