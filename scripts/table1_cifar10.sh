#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The paper's CIFAR-10 comparison, like for like: PC-DARTS in full precision, PTQ, FBQAT, QSubNet and QDARTS on one
# recipe and one accounting, seed by seed. The jobs are those of scripts/plans/table1_cifar10.json.
#
#   bash scripts/table1_cifar10.sh [--size paper|small|quickstart|smoke] [--seeds "0 1 2"] [--data DIR] [--jobs N]
#                                  [--only METHOD] [--out DIR] [--results DIR] [--dry-run]
#
#   --size SIZE    paper (default): GPU days; small: CIFAR-10 at 16x16; quickstart, smoke: digits
#   --seeds LIST   seeds of everything random (default "0 1 2")
#   --data DIR     where CIFAR-10 lies, or is downloaded to
#   --jobs N       processes at a time (default 1)
#   --only NAMES   some methods or jobs only, with what they wait for: darts, ptq, fbqat, qsubnet, qdarts, ptq-4 ...
#   --out DIR      where the runs go (default runs/table1-SIZE), with table.md and pareto.svg
#   --results DIR  where table1_SIZE.md and .csv go (default results; with --size smoke DIR of --out)
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
#
# Every finished row is written to the tables at once. Stopped, the same command goes on.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
size=paper seeds="0 1 2" data="" jobs=1 only="" out="" results="" dry=""
fail() { printf 'table1_cifar10: %s\n' "$*" >&2; exit 2; }
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '4,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --dry-run) dry=--dry-run; shift ;;
        --size | --seeds | --data | --jobs | --only | --out | --results)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --data | --out | --results) declare "${1#--}=$(absolute "$2")" ;;
                *) declare "${1#--}=$2" ;;
            esac
            shift 2 ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done

cd "$ROOT"
PATH=$ROOT/.venv/bin:$PATH
# Reading the plan takes no more than a Python; running it takes the project's own environment.
[ -n "$dry" ] || bash scripts/setup.sh
python=$(command -v python || command -v python3) || fail "there is no Python; scripts/setup.sh says what to do"
out=${out:-runs/table1-$size}
out=${out#"$ROOT"/}
if [ -z "$results" ]; then results=results; [ "$size" != smoke ] || results=$out; fi
# shellcheck disable=SC2086  # lists of words on purpose
exec "$python" sweep.py scripts/plans/table1_cifar10.json --size "$size" --seeds ${seeds//,/ } --jobs "$jobs" --out "$out" \
    --set data="$data" results="$results" ${only:+--only ${only//,/ }} $dry
