#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The pictures of the README, from the runs of a quickstart: cells, film, curves, choices and the whole network.
#
#   bash scripts/readme_pictures.sh [SEARCH [TRAINING [DIR]]]
#
#   SEARCH, TRAINING   run folders (default: runs/quickstart/s0/search and runs/quickstart/s0/found)
#   DIR                where the pictures go (default: docs/images)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case ${1:-} in -h | --help) sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
search=${1:-$ROOT/runs/quickstart/s0/search}
training=${2:-$ROOT/runs/quickstart/s0/found}
out=${3:-$ROOT/docs/images}
for run in "$search" "$training"; do
    [ -f "$run/result.json" ] || { echo "readme_pictures: $run holds no finished run; see --help" >&2; exit 2; }
done
python=$ROOT/.venv/bin/python
[ -x "$python" ] || python=python

mkdir -p "$out"
"$python" "$ROOT/visualize.py" "$search" --out "$out/quickstart-cells.png"
"$python" "$ROOT/visualize.py" "$search" --animate --out "$out/quickstart-search.gif"
"$python" "$ROOT/visualize.py" --grown "$training" --out "$out/quickstart-network.png"
"$python" "$ROOT/report.py" "$search" --plots >/dev/null
for picture in curves alphas; do
    cp "$search/$picture.svg" "$out/quickstart-$picture.svg"
done
