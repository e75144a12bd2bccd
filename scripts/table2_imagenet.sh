#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The paper's ImageNet comparison, like for like: PC-DARTS in full precision, PTQ, FBQAT, QSubNet and QDARTS with bits
# {2,4} and {2,4,8}, on one recipe and one accounting, seed by seed. The jobs are those of
# scripts/plans/table2_imagenet.json. Searches see 12.5% of the training images and never the validation images.
#
#   bash scripts/table2_imagenet.sh [--size paper|small|quickstart|smoke] [--seeds 0 1 2]
#                                   [--data DIR | --trainfile X.ffcv --valfile Y.ffcv] [--jobs N] [--only METHOD ...]
#                                   [--executor E] [--cluster NAME=VALUE ...] [--ranks N] [--out DIR] [--results DIR]
#                                   [--dry-run]
#
#   --size SIZE    paper (default): many GPU days; small: the same images at 64x64, a few steps an epoch; quickstart,
#                  smoke: digits in their place, which need no file
#   --seeds LIST   seeds of everything random (default 0 1 2)
#   --data DIR     ImageNet (any ImageFolder): DIR/train/CLASS/* and DIR/val/CLASS/*
#   --trainfile, --valfile   or its .ffcv files (scripts/write_imagenet.sh)
#   --jobs N       processes at a time (default 1, on a cluster 100)
#   --only NAMES   some methods or jobs only, with what they wait for: darts, ptq, fbqat, qsubnet, qdarts, ptq-4 ...
#   --executor E   local (default), slurm or submitit; --cluster NAME=VALUE ...: its parameters (docs/cluster.md)
#   --ranks N      torchrun: GPUs of each search and training
#   --out DIR      where the runs go (default runs/table2_imagenet-SIZE), with table.md and pareto.svg
#   --results DIR  where table2_SIZE.csv goes (default results; with --size smoke the folder of --out)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# The tables are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_plan.sh" table2_imagenet "$@"
