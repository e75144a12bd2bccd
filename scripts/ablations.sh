#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What each choice of QDARTS is worth, one changed at a time against the joint search of cells and {2, 4} bits at a
# target. The jobs are those of scripts/plans/ablations.json:
#
#   lambda         no target, but four weights of the cost (--complexity-decay)       } the trade-off curve
#   target         other targets                                                      }
#   random-bits    the joint search's cells with random bits, at equal BitOps
#   random-cells   random cells and bits, at equal BitOps
#   separate       the cells searched in full precision, then the bits (QSubNet), to the same target
#   half-data      the search sees half of the training set (and so takes half as many steps, but for --size small)
#   second-order   second-order architecture gradients in place of the first order
#   rank           does the supernet rank the random networks as their trainings do?
#
#   bash scripts/ablations.sh [--size paper|small|quickstart|smoke] [--seeds 0 1 2] [--data DIR] [--jobs N]
#                             [--only NAME ...] [--out DIR] [--results DIR] [--dry-run]
#
#   --size SIZE    paper (default): GPU weeks; small: CIFAR-10 at 16x16; quickstart, smoke: digits
#   --seeds LIST   seeds of everything random (default 0 1 2)
#   --data DIR     where CIFAR-10 lies, or is downloaded to
#   --jobs N       processes at a time (default 1)
#   --only NAMES   some of the names above only, with what they wait for: joint, lambda, target, rank ...
#   --out DIR      where the runs go (default runs/ablations-SIZE), with table.md and curve.svg
#   --results DIR  where ablations_SIZE.csv and ablations_SIZE_rank_sSEED.csv go (default results; smoke: --out's)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# The tables are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_plan.sh" ablations "$@"
