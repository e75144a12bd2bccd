#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests, in the project's own environment (made when it is not there).
#
#   bash scripts/test.sh [--full] [PYTEST ARGUMENTS...]
#
#   --full    the slow tests too
#   examples: bash scripts/test.sh tests/quant        bash scripts/test.sh -x -k resume
#
# Test files run side by side, one a core, at most four (`-n 0`: one after the other, for a debugger). The last line is
# pytest's own summary and the exit code is pytest's.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    case $argument in
        --full) selection=() ;;
        -h | --help) sed -n '4,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done

bash "$ROOT/scripts/setup.sh" dev export

# One thread a process: the tests are small, and exact comparisons want one order of summation.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
started_from=$PWD
cd "$ROOT"
if [ "$started_from" != "$ROOT" ] && [ ${#arguments[@]} -gt 0 ]; then echo "test: paths are relative to $ROOT"; fi
cores=$(env -u OMP_NUM_THREADS nproc)  # which would count those threads
exec "$ROOT/.venv/bin/python" -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
