#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The main job on real images, from nothing: installs what is needed, searches an architecture together with its
# bit-widths on scikit-learn's handwritten digits, trains it, trains PC-DARTS at 32, 2 and 4 bits beside it, prints one
# table, and exports what was found. Minutes on 2 CPU cores; no download but the packages.
#
#   bash scripts/quickstart.sh [--seed N] [--out DIR] [--size quickstart|smoke]
#
#   --seed N      seed of everything random (default 0)
#   --out DIR     where the runs go (default runs/quickstart; this seed's go to DIR/sN)
#   --size smoke  a few steps only, in seconds: shows that every step runs, its figures mean nothing
#
# A quickstart that was stopped goes on where it was when the same command is given again.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
seed=0
out=$ROOT/runs/quickstart
size=quickstart

fail() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '4,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --seed | --out | --size)
            case ${2--} in -*) fail "$1 needs a value" ;; esac
            case $1 in
                --seed) seed=$2 ;;
                --out) case $2 in /*) out=$2 ;; *) out=$PWD/$2 ;; esac ;;
                --size) size=$2 ;;
            esac
            shift 2 ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done
[[ $seed =~ ^[0-9]+$ ]] || fail "--seed: '$seed' is no whole number from 0 up"
[ "$size" = quickstart ] || [ "$size" = smoke ] || fail "--size: '$size' is neither quickstart nor smoke"

bash "$ROOT/scripts/setup.sh" export

# From here on `python` is the project's own, and paths are relative to its root.
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
base=${out#"$ROOT"/}
out=$base/s$seed
mkdir -p "$out"

# The sizes stand in the training preset and nowhere else.
preset=$(python qdarts/train.py --preset "$size" --print-config)
preset() { awk -v key="$1" '$1 == key {print $2}' <<<"$preset"; }

length="about 5 to 8 minutes on 2 CPU cores"
if [ "$size" = smoke ]; then length="a minute or two; the figures mean nothing"; fi
cat <<TEXT

Quickstart, seed $seed: one search and four trainings on handwritten digits (1437 to learn from, 360 to test with),
$length. Every step shows its own remaining time; stop it at any time,
the same command goes on. Everything is kept in $out
  1 search cells and bit-widths together, within 10% of the BitOps of the 2-bit PC-DARTS network
  2 train what was found          3-5 train PC-DARTS at 32, 2 and 4 bits, same size
  then table and drawing, and what was found as a file of packed integers and in ONNX: proved, and timed
TEXT
SECONDS=0
channels=$(preset init_channels)
layers=$(preset layers)
target=$(python -m common.cost PC_DARTS --dataset digits --init-channels "$channels" --layers "$layers" --wbits 2 --abits 2 --json |
    python -c 'import json, sys; print(int(json.load(sys.stdin)["bitops"]))')
echo "target: $target BitOps, those of PC-DARTS at 2 bits"
python sweep.py scripts/plans/quickstart.json --size "$size" --seeds "$seed" --out "$base" --set target="$target" --follow

printf '\nTable and drawing   (%d:%02d since the start)\n' $((SECONDS / 60)) $((SECONDS % 60))
printf '$ python visualize.py %s\n' "$out/search"
python visualize.py "$out/search"
runs=("$out/found" "$out/pcdarts-fp32" "$out/pcdarts-2bit" "$out/pcdarts-4bit")
printf '$ python report.py %s\n\n' "${runs[*]}"
python report.py "${runs[@]}" | tee "$out/table.md"

printf '\nTo a device   (%d:%02d since the start)\n' $((SECONDS / 60)) $((SECONDS % 60))
formats=(packed onnx onnx-fp32)
printf '$ python export.py %s --format %s\n' "$out/found" "${formats[*]}"
python export.py "$out/found" --format "${formats[@]}"
printf '$ python evaluate.py %s --seconds 2\n\n' "$out/found/export"
python evaluate.py "$out/found/export" --seconds 2 | tee "$out/backends.md"
printf '\nDone in %d:%02d. The tables: %s/table.md, backends.md; the drawing of the cells and all runs: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$out" "$out"
