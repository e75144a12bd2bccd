#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The paper's CIFAR-10 comparison, like for like: PC-DARTS in full precision, PTQ, FBQAT, QSubNet and QDARTS on one
# recipe and one accounting, seed by seed. The jobs are those of scripts/plans/table1_cifar10.json.
#
#   bash scripts/table1_cifar10.sh [--size paper|small|quickstart|smoke] [--seeds 0 1 2] [--data DIR] [--jobs N]
#                                  [--only METHOD ...] [--out DIR] [--results DIR] [--dry-run]
#
#   --size SIZE    paper (default): GPU days; small: CIFAR-10 at 16x16; quickstart, smoke: digits
#   --seeds LIST   seeds of everything random (default 0 1 2)
#   --data DIR     where CIFAR-10 lies, or is downloaded to
#   --jobs N       processes at a time (default 1)
#   --only NAMES   some methods or jobs only, with what they wait for: darts, ptq, fbqat, qsubnet, qdarts, ptq-4 ...
#   --out DIR      where the runs go (default runs/table1-SIZE), with table.md and pareto.svg
#   --results DIR  where table1_SIZE.csv goes (default results; with --size smoke the folder of --out)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# The tables are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_plan.sh" table1_cifar10 "$@"
