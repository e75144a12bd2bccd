#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs ffcv, the fast ImageNet loader, into the project's environment; does nothing when it is there and works.
#
#   bash scripts/install_ffcv.sh [--print-plan]
#
#   PYTHON=/path/to/python   another environment than the project's own .venv
#
# Debian and Ubuntu only. ffcv is published as source: it needs a C++ compiler, the headers of OpenCV's core and imgproc,
# and those of libturbojpeg. As root the missing packages are installed (10 to 20 small ones); otherwise the line that
# installs them is printed. Elsewhere: conda env create -f environment.yml.
# Exit codes: 0 installed; 3 it cannot be installed here, the reason is the last line.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VERSION=1.0.2
# The smallest set that builds: libopencv-dev would bring every module of OpenCV, some 200 packages.
PACKAGES=(build-essential pkg-config libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev)

say() { printf 'install_ffcv: %s\n' "$*"; }
cannot() { printf 'install_ffcv: %s\n' "$*" >&2; exit 3; }
works() { "$python" -c 'import ffcv.loader, ffcv.writer, ffcv.fields' >/dev/null 2>&1; }

plan_only=0
for argument in "$@"; do
    case $argument in
        --print-plan) plan_only=1 ;;
        -h | --help) sed -n '4,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) printf "install_ffcv: unknown argument '%s'; see --help\n" "$argument" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-$ROOT/.venv/bin/python}
if [ -z "${PYTHON-}" ] && [ $plan_only = 0 ]; then bash "$ROOT/scripts/setup.sh"; fi
state=missing
if [ -x "$(command -v "$python" || true)" ] && works; then state=installed; fi

missing=()
if command -v dpkg-query >/dev/null; then
    for package in "${PACKAGES[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
fi

if [ $plan_only = 1 ]; then
    echo "python: $python"
    echo "ffcv: $state"
    echo "packages: ${PACKAGES[*]}"
    echo "missing-packages: ${missing[*]:--}"
    exit 0
fi
if [ $state = installed ]; then say "ffcv $VERSION is installed"; exit 0; fi

# ---- system packages ---------------------------------------------------------------------------------------------
command -v apt-get >/dev/null ||
    cannot "this is neither Debian nor Ubuntu (no apt-get); the conda way: conda env create -f environment.yml"
if [ ${#missing[@]} -gt 0 ]; then
    line="apt-get install -y --no-install-recommends ${missing[*]}"
    [ "$(id -u)" = 0 ] || cannot "system packages are missing; as root:  $line"
    say "$line"
    export DEBIAN_FRONTEND=noninteractive
    options=(-y -qq --no-install-recommends)
    apt-get install "${options[@]}" "${missing[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 || true; apt-get install "${options[@]}" "${missing[@]}" >/dev/null; } ||
        cannot "the system packages cannot be installed (see above)"
fi

# ---- the wheel ---------------------------------------------------------------------------------------------------
# ffcv asks pkg-config for all of OpenCV and includes its header of everything; it uses these two modules.
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir -p "$build/include/opencv2"
printf '#include <opencv2/%s.hpp>\n' core imgproc >"$build/include/opencv2/opencv.hpp"
cat >"$build/opencv4.pc" <<PC
Name: OpenCV
Description: core and imgproc
Version: $(dpkg-query -W -f '${Version}' libopencv-core-dev | sed 's/[^0-9.].*//')
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I$build/include -I/usr/include/opencv4
PC
say "building ffcv $VERSION (under a minute)"
pip=("$python" -m pip --no-input --disable-pip-version-check)
PKG_CONFIG_PATH=$build "${pip[@]}" wheel --quiet --no-deps --no-cache-dir --wheel-dir "$build/wheel" "ffcv==$VERSION" ||
    cannot "ffcv $VERSION does not build here (see above)"
# What ffcv imports without declaring it comes with the project; numba and OpenCV's Python module do not.
"${pip[@]}" install --quiet -r <(grep -v '^ffcv' "$ROOT/requirements-ffcv.txt") setuptools ||  # for its distutils
    cannot "numba and opencv-python-headless cannot be installed (see above)"
"${pip[@]}" install --quiet --no-deps --force-reinstall "$build"/wheel/ffcv-*.whl || cannot "the wheel cannot be installed"
works || { "$python" -c 'import ffcv.loader, ffcv.writer, ffcv.fields' || true; cannot "ffcv was built and does not import (see above)"; }
say "ffcv $VERSION is ready"
