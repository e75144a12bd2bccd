#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Writes ImageNet as a pair of FFCV files.
#
#   export IMAGENET_DIR=/path/to/imagenet    # holds train/CLASS/* and val/CLASS/*
#   export WRITE_DIR=/path/for/the/files
#   bash scripts/write_imagenet.sh 500 0.50 90 [MORE FLAGS OF python -m common.data]
#
# 500: longest side in pixels; 0.50: share of the images stored as JPEG, the rest as pixels; 90: quality of the JPEGs.
# Gives train_500_0.50_90.ffcv and val_500_0.50_90.ffcv, for --trainfile and --valfile. A file that is there is kept.
#
#   PYTHON=/path/to/python   another environment than the project's own .venv
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
die() { printf 'write_imagenet: %s\n' "$*" >&2; exit 2; }

if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then sed -n '4,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; fi
[ $# -ge 3 ] || die "three values are needed: LONGEST_SIDE SHARE_OF_JPEGS QUALITY, such as 500 0.50 90"
[ -n "${IMAGENET_DIR-}" ] || die "IMAGENET_DIR is not set: the folder that holds train/ and val/"
[ -n "${WRITE_DIR-}" ] || die "WRITE_DIR is not set: where the files go"
side=$1 share=$2 quality=$3
shift 3

python=${PYTHON:-$ROOT/.venv/bin/python}
if [ -z "${PYTHON-}" ]; then bash "$ROOT/scripts/install_ffcv.sh"; fi
imagenet=$(cd "$IMAGENET_DIR" && pwd -P) || die "IMAGENET_DIR=$IMAGENET_DIR is no folder"
mkdir -p "$WRITE_DIR"
target=$(cd "$WRITE_DIR" && pwd -P)
cd "$ROOT"
for part in train val; do
    out=$target/${part}_${side}_${share}_${quality}.ffcv
    if [ -f "$out" ]; then echo "write_imagenet: $out is there already"; continue; fi
    "$python" -m common.data "$imagenet/$part" --out "$out" \
        --max-resolution "$side" --compress-probability "$share" --jpeg-quality "$quality" "$@"
done
