#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the project's own environment, .venv in its root, or brings it up to date; does nothing when it is.
#
#   bash scripts/setup.sh [--print-plan] [EXTRA...]      EXTRA: dev, export, ffcv, cluster (requirements-EXTRA.txt)
#
#   PYTHON=python3.12       the Python to make it from (default: the first of python3, python, python3.13 ... that fits)
#   TORCH_SPEC="torch==2.13.0 torchvision==0.28.0"
#                           what to hand to `pip install` for torch (a CPU-only build, a fixed version); remembered in .venv
#   PIP_INDEX_URL, PIP_FIND_LINKS, ...   pip's own variables work as always
#
# Where that Python already has a fitting torch and torchvision, .venv is made with --system-site-packages and uses them.
# The other scripts call this one first; a second call takes a fraction of a second.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
MIN_TORCH=2.11

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d' ' -f1; }

apt_install() {  # apt_install PACKAGE: true when it is installed afterwards
    local options=(-y -qq --no-install-recommends)
    export DEBIAN_FRONTEND=noninteractive
    apt-get install "${options[@]}" "$1" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install "${options[@]}" "$1" >/dev/null; }
}

# ---- what is asked for -------------------------------------------------------------------------------------------
plan_only=0
extras=()
for argument in "$@"; do
    case $argument in
        --print-plan) plan_only=1 ;;
        -h | --help) sed -n '4,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *)
            [[ $argument =~ ^[a-z]+$ && -f $ROOT/requirements-$argument.txt ]] ||
                die "unknown extra '$argument'; there are: $(cd "$ROOT" && echo requirements-*.txt | sed 's/requirements-//g; s/\.txt//g')"
            extras+=("$argument") ;;
    esac
done

# Two scripts started at once must not build the same folder; the lock ends with this process.
if [ $plan_only = 0 ] && command -v flock >/dev/null; then
    exec 9<"$ROOT/scripts/setup.sh"
    flock -n 9 2>/dev/null || { say "waiting for another setup of this folder"; flock 9 || true; }
fi

torch_spec=${TORCH_SPEC-}
if [ -z "$torch_spec" ] && [ -f "$VENV/.torch-spec" ]; then torch_spec=$(<"$VENV/.torch-spec"); fi

# ---- which Python ------------------------------------------------------------------------------------------------
# Prints: VERSION ENSUREPIP(yes|no) PIP(yes|no) TORCH(version when it fits, or -) SITE(site-packages of a virtual
# environment that started us, or -). Plain enough for an old Python to parse.
read -r -d '' PROBE <<'PY' || true
import os, sys
version = ".".join(str(n) for n in sys.version_info[:3])
if sys.version_info < (3, 11):
    print(version + " old - - -")
    sys.exit(0)
import importlib.metadata as metadata
import importlib.util as util

def has(name):
    return "yes" if util.find_spec(name) else "no"

def numbers(text):
    parts = text.split("+")[0].split(".")[:2]
    return [int("".join(c for c in p if c.isdigit()) or 0) for p in parts]

def satisfies(spec):
    from pip._vendor.packaging.requirements import Requirement
    words = iter(spec.split())
    for word in words:
        if word.startswith("-"):
            if "=" not in word:
                next(words, None)  # the option's value
            continue
        requirement = Requirement(word)
        if not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
            return False
    return True

def torch():
    try:
        found = metadata.version("torch")
        if numbers(found) < numbers(sys.argv[1]) or not satisfies(os.environ.get("SPEC", "")):
            return "-"
        import torch as t, torchvision
        return t.__version__
    except Exception:  # a torch that does not import, or a specification that cannot be compared, is not reused
        return "-"

site = "-"
if sys.prefix != sys.base_prefix:
    import sysconfig
    site = sysconfig.get_path("purelib")
print(" ".join([version, has("ensurepip"), has("pip"), torch(), site]))
PY

python='' version='' ensurepip='' pip='' torch='-' site='-'
choose_python() {
    local name found v e p t s tried=()
    local candidates=(python3 python python3.13 python3.12 python3.11)
    if [ -n "${PYTHON-}" ]; then candidates=("$PYTHON"); fi
    for name in "${candidates[@]}"; do
        found=$(command -v "$name" 2>/dev/null) || { tried+=("$name: not found"); continue; }
        case $found in "$VENV"/*) continue ;; esac  # an activated .venv cannot be its own parent
        read -r v e p t s < <(SPEC=$torch_spec "$found" -c "$PROBE" $MIN_TORCH 2>/dev/null) || { tried+=("$name: does not run"); continue; }
        if [ "$e" = old ]; then tried+=("$name: $v"); continue; fi
        # The first that fits is taken, but one that brings torch is better, and one that can make a venv next.
        if [ -z "$python" ] || { [ "$torch" = - ] && { [ "$t" != - ] || [ "$ensurepip$e" = noyes ]; }; }; then
            python=$found version=$v ensurepip=$e pip=$p torch=$t site=$s
        fi
        if [ "$torch" != - ]; then break; fi
    done
    [ -n "$python" ] || die "Python 3.11 or newer is needed; tried: $(IFS=';'; echo "${tried[*]}").
       Debian, Ubuntu:  apt-get install python3 python3-venv   (or name one: PYTHON=/path/to/python3.12 bash scripts/...)"
}

# ---- what state .venv is in --------------------------------------------------------------------------------------
digest() {  # digest NAME VERSION: what the environment's part NAME (core or an extra) was made from
    {
        echo "layout 1 $2 $ROOT $torch_spec"
        cat "$ROOT/requirements.txt" "$ROOT/pyproject.toml"
        if [ "$1" != core ]; then cat "$ROOT/requirements-$1.txt"; fi
    } | sha256
}

action='' why=''
if [ ! -e "$VENV" ]; then
    action=make why="there is none"
elif ! state=$("$VENV/bin/python" -c 'import importlib.util as u, sys
print(".".join(map(str, sys.version_info[:3])), int(sys.version_info >= (3, 11)), int(bool(u.find_spec("torch"))), int(bool(u.find_spec("pip"))))' 2>/dev/null); then
    action=remake why="its Python does not run"
else
    read -r version fits has_torch has_pip <<<"$state"
    if [ "$fits" = 0 ]; then
        action=remake why="its Python $version is older than 3.11"
    elif [ "$has_pip" = 0 ]; then
        action=remake why="it is half made"
    elif [ -e "$VENV/.unusable" ]; then
        action=remake why="its torch did not import"
    elif [ -n "${PYTHON-}" ] && wanted=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') && [ "$wanted" != "${version%.*}" ]; then
        action=remake why="PYTHON asks for $wanted, it has ${version%.*}"
    elif [ -f "$VENV/.root" ] && [ "$(<"$VENV/.root")" != "$ROOT" ]; then
        action=remake why="the project's folder has moved"
    elif [ "$has_torch" = 0 ]; then
        action=update why="torch is missing"
    else
        for part in core ${extras[@]+"${extras[@]}"}; do
            if [ ! -f "$VENV/.digest-$part" ]; then
                action=update why="$part is not installed yet"
            elif [ "$(<"$VENV/.digest-$part")" != "$(digest "$part" "$version")" ]; then
                action=update why="the requirements ($part) have changed"
            else
                continue
            fi
            break
        done
    fi
fi
action=${action:-ready}

if [ "$action" = make ] || [ "$action" = remake ]; then choose_python; fi

if [ $plan_only = 1 ]; then
    echo "action: $action"
    echo "why: ${why:-up to date}"
    echo "python: ${python:-$VENV/bin/python}"
    echo "version: $version"
    if [ -n "$python" ]; then echo "reuse-torch: $torch"; fi
    echo "torch-spec: ${torch_spec:--}"
    for part in core ${extras[@]+"${extras[@]}"}; do echo "digest-$part: $(digest "$part" "$version")"; done
    exit 0
fi
if [ "$action" = ready ]; then exit 0; fi

# ---- make it -----------------------------------------------------------------------------------------------------
make_venv() {
    local flags=()
    if [ "$torch" != - ]; then flags=(--system-site-packages); fi
    if [ "$ensurepip" = no ] && is_root && command -v apt-get >/dev/null; then
        say "this Python cannot make environments yet: installing python${version%.*}-venv"
        if apt_install "python${version%.*}-venv" || apt_install python3-venv; then ensurepip=yes; fi
    fi
    rm -rf "$VENV"
    if [ "$ensurepip" = yes ]; then
        "$python" -m venv ${flags[@]+"${flags[@]}"} "$VENV" || die "could not make $VENV with $python -m venv (see above)"
    elif [ "$pip" = yes ]; then
        # Debian's Python without python3-venv: its pip can fill an environment from outside.
        "$python" -m venv --without-pip ${flags[@]+"${flags[@]}"} "$VENV"
        "$python" -m pip --python "$VENV/bin/python" install --quiet pip || die "could not put pip into $VENV; as root: apt-get install python${version%.*}-venv"
    else
        die "this Python ($python) cannot make environments; as root: apt-get install python${version%.*}-venv"
    fi
    if [ "$torch" != - ] && [ "$site" != - ]; then
        # The Python that started us lives in a virtual environment, which --system-site-packages does not reach.
        printf 'import site; site.addsitedir(r"%s")\n' "$site" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent-environment.pth"
    fi
    if [ "$torch" != - ] && ! "$VENV/bin/python" -c 'import torch, torchvision' 2>/dev/null; then
        say "torch $torch cannot be reused from inside .venv: installing it there"
        torch=-
        make_venv
    fi
}

say ".venv: $action ($why)"
if [ "$action" != update ]; then
    reuse="torch is installed into it"
    if [ "$torch" != - ]; then reuse="torch $torch of this Python is reused"; fi
    say "from Python $version ($python); $reuse"
    if [ "$torch" = - ] && [ -z "$torch_spec" ] && [ "$(df -Pk "$ROOT" | awk 'NR == 2 {print $4}')" -lt 10000000 ]; then
        say "less than 10 GB are free here; torch with its GPU libraries takes about 6 (TORCH_SPEC names a smaller build)"
    fi
    make_venv
fi

pip_install() {
    local quiet=()
    if [ ! -t 1 ]; then quiet=(--quiet --progress-bar off); fi
    "$VENV/bin/python" -m pip --no-input --disable-pip-version-check install ${quiet[@]+"${quiet[@]}"} "$@" ||
        die "pip could not install what is needed (see above); without a network, PIP_FIND_LINKS or PIP_INDEX_URL name a place that has it"
}

rm -f "$VENV"/.digest-core  # a stop from here on leaves an environment that the next start repairs
requirements=(-r "$ROOT/requirements.txt")
for extra in ${extras[@]+"${extras[@]}"}; do requirements+=(-r "$ROOT/requirements-$extra.txt"); done
patience=''
if [ "$action" != update ] && [ "$torch" = - ]; then patience=" (torch's download takes minutes)"; fi
say "installing: requirements.txt${extras[*]:+ and the extras ${extras[*]}}$patience"
# shellcheck disable=SC2086  # several words on purpose
if [ -n "$torch_spec" ]; then pip_install $torch_spec; fi
pip_install "${requirements[@]}" "setuptools>=77"
# In editable mode, so that `python -m qdarts.search` works from any folder.
pip_install --no-deps --no-build-isolation --editable "$ROOT"

if [ ! -e "$VENV/bin/torchrun" ]; then
    # A reused torch left its launcher with the other Python.
    # shellcheck disable=SC2016  # expands when it runs
    printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m torch.distributed.run "$@"\n' >"$VENV/bin/torchrun"
    chmod +x "$VENV/bin/torchrun"
fi

if ! command -v dot >/dev/null; then
    if is_root && command -v apt-get >/dev/null && say "installing graphviz (draws the cells)" && apt_install graphviz; then :; else
        say "the program 'dot' is missing: cells are drawn by matplotlib instead (as root: apt-get install graphviz)"
    fi
fi

if ! command -v c++ >/dev/null && is_root && command -v apt-get >/dev/null; then
    say "installing g++ (builds the native CPU kernels)"
    apt_install g++ || true
fi

summary=$("$VENV/bin/python" -c 'import sys, torch, torchvision, genotypes
print("Python %d.%d.%d, torch %s, %s" % (*sys.version_info[:3], torch.__version__, "CUDA" if torch.cuda.is_available() else "no GPU"))') ||
    { touch "$VENV/.unusable"; die "torch and torchvision were installed but do not import together (see above); name a pair that fits: TORCH_SPEC"; }
version=$("$VENV/bin/python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
echo "$ROOT" >"$VENV/.root"
echo "$torch_spec" >"$VENV/.torch-spec"
for part in core ${extras[@]+"${extras[@]}"}; do digest "$part" "$version" >"$VENV/.digest-$part"; done
# After the digests: where it cannot be built everything works without it, only slower, and the program has said why.
(cd "$ROOT" && "$VENV/bin/python" -m common.quant.kernels >/dev/null) || say "without a C++ compiler searches are slower (as root: apt-get install g++)"
say "ready: $summary"
