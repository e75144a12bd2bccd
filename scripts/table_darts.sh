#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The published full-precision cells DARTS_V1, DARTS_V2 and PC_DARTS, trained by darts/train.py, with the published
# CIFAR-10 accuracies beside ours: 97.00 +- .14 and 97.24 +- .09 (Liu et al., ICLR 2019, table 1: DARTS first and second
# order) and 97.43 +- .07 (Xu et al., ICLR 2020, table 1: PC-DARTS). With --imagenet also DARTS_V2 on ImageNet, published
# top-1 73.3 (Liu et al., ICLR 2019, table 3).
#
#   bash scripts/table_darts.sh [--size paper|small|quickstart|smoke] [--seeds 0 1 2] [--data DIR]
#                               [--imagenet DIR | --trainfile X.ffcv --valfile Y.ffcv] [--jobs N] [--only CELL ...]
#                               [--executor E] [--cluster NAME=VALUE ...] [--ranks N] [--out DIR] [--results DIR]
#                               [--dry-run]
#
#   --size SIZE    paper (default): 600 epochs, GPU days; the others are smaller, and no match for what was published
#   --seeds LIST   seeds of everything random (default 0 1 2)
#   --data DIR     where CIFAR-10 lies, or is downloaded to
#   --imagenet DIR ImageNet: DIR/train/CLASS/* and DIR/val/CLASS/*; or its .ffcv files by --trainfile and --valfile
#                  (quickstart and smoke have digits of another size in its place, and always this row)
#   --jobs N       processes at a time (default 1, on a cluster 100)
#   --only NAMES   some cells only: DARTS_V1, DARTS_V2-imagenet ...
#   --executor E   local (default), slurm or submitit; --cluster NAME=VALUE ...: its parameters (docs/cluster.md)
#   --ranks N      torchrun: GPUs of each training
#   --out DIR      where the runs go (default runs/table_darts-SIZE), with table.md and published.md
#   --results DIR  where table_darts_SIZE.csv goes (default results; with --size smoke the folder of --out)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# The tables are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_plan.sh" table_darts "$@"
