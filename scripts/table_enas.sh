#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# ENAS over quantised cells (enas/): for binary, ternary, 4-bit and full-precision layers a search and the training of
# what it found, on MNIST and on CIFAR-10. The public ENAS-QNN project gives no accuracy of a trained network to compare.
#
#   bash scripts/table_enas.sh [--size paper|hour|quickstart|smoke] [--seeds 0 1 2] [--data DIR] [--jobs N]
#                              [--only JOB ...] [--out DIR] [--results DIR] [--dry-run]
#
#   --size SIZE    paper (default): the project's own epochs, GPU days (CIFAR-10 trained for 150: its 5 end within the first
#                  period of the cosine); hour: the same data at 16 pixels, about an hour of one CPU core for a search with
#                  its training; quickstart, smoke: on scikit-learn's digits
#   --seeds LIST   seeds of everything random (default 0 1 2)
#   --data DIR     where MNIST and CIFAR-10 lie, or are downloaded to
#   --jobs N       processes at a time (default 1)
#   --only JOBS    some jobs only, with what they wait for
#   --out DIR      where the runs go (default runs/table_enas-SIZE), with table.md
#   --results DIR  where table_enas_SIZE.csv goes (default results; with --size smoke the folder of --out)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# The tables are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_plan.sh" table_enas "$@"
