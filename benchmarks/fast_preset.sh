#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Does --preset fast find architectures as good as no preset does? Both searches at the sizes of a small preset, each
# found network trained alike, five seeds; accuracy, BitOps and time, paired by seed.
#
#   bash benchmarks/fast_preset.sh [--size quickstart|small|smoke] [--seeds 0 1 2] [--data DIR] [--jobs N] [--out DIR]
#                                  [--results DIR] [--dry-run]
#
#   --size SIZE    quickstart (default): digits; small: CIFAR-10 at 16x16; smoke: the path only
#   --seeds LIST   default 0 1 2 3 4
#   --data DIR     where CIFAR-10 lies, or is downloaded to
#   --jobs N       processes at a time (default 1: the times are compared)
#   --out DIR      where the runs go (default runs/fast_preset-SIZE)
#   --results DIR  where fast_preset_SIZE.json goes (default benchmarks/results; with --size smoke the folder of --out)
#
# The figures are written after every finished row. Stopped, the same command goes on.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
size=quickstart results=""
given=("$@")
for ((i = 0; i < $#; i++)); do
    case ${given[i]} in
        --size) size=${given[i + 1]-} ;;
        --results) results=given ;;
        -h | --help) sed -n '4,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
done
extra=(--size "$size")
if [ -z "$results" ] && [ "$size" != smoke ]; then extra+=(--results "$ROOT/benchmarks/results"); fi
exec bash "$ROOT/scripts/run_plan.sh" fast_preset "${extra[@]}" "$@"
