#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the scripts of tables have in common: one plan of scripts/plans, run by sweep.py.
#
#   bash scripts/run_plan.sh NAME [--size SIZE] [--seeds 0 1 2] [--data DIR] [--jobs N] [--only NAME ...] [--out DIR]
#                            [--results DIR] [--executor E] [--cluster NAME=VALUE ...] [--ranks N] [--dry-run]
#
#   NAME           of the plan, and of the script whose help is shown
#   --size SIZE    one of the plan's sizes (default: its first)
#   --seeds N ...  seeds of everything random (default: the plan's)
#   --data DIR     where the data lie, or are downloaded to
#   --trainfile X.ffcv --valfile Y.ffcv, --imagenet DIR   ImageNet, for plans with rows of it
#   --jobs N       processes at a time (default 1, on a cluster 100)
#   --only NAMES   some methods or jobs only, with what they wait for
#   --out DIR      where the runs go (default runs/NAME-SIZE)
#   --results DIR  where the tables to be kept go (default results; with --size smoke the folder of --out)
#   --executor E   local (default), slurm or submitit; --cluster NAME=VALUE ...: its parameters (docs/cluster.md)
#   --ranks N      torchrun: processes of each search and training
#   --dry-run      one line a job: method, setting, seed, command; nothing is run
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
name=${1-}
fail() { printf '%s: %s\n' "${name:-run_plan}" "$*" >&2; exit 2; }
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }
show_help() { sed -n '4,${/^#/!q; s/^# \{0,1\}//p}' "$1"; exit 0; }
case $name in "" | -h | --help) show_help "${BASH_SOURCE[0]}" ;; esac
plan=$ROOT/scripts/plans/$name.json
[ -f "$plan" ] || fail "there is no plan $plan"
shift

size="" seeds="" data="" trainfile="" valfile="" imagenet="" jobs="" only="" out="" results="" executor="" cluster="" ranks="" dry=""
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) show_help "$ROOT/scripts/$name.sh" ;;
        --dry-run) dry=--dry-run; shift ;;
        --size | --seeds | --data | --trainfile | --valfile | --imagenet | --jobs | --only | --out | --results | \
            --executor | --cluster | --ranks)
            flag=$1
            case ${2--} in -*) fail "$flag needs a value" ;; esac
            case $flag in
                --data | --trainfile | --valfile | --imagenet | --out | --results) value=$(absolute "$2") ;;
                *) value=$2 ;;
            esac
            shift 2
            case $flag in --seeds | --only | --cluster) # lists: all words until the next flag
                while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do value+=" $1"; shift; done ;;
            esac
            declare "${flag#--}=$value" ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done

cd "$ROOT"
# Reading the plan takes no more than a Python; running it takes the project's own environment.
case $executor in slurm | submitit) extras=cluster ;; *) extras="" ;; esac
[ -n "$dry" ] || bash scripts/setup.sh $extras
export PATH=$ROOT/.venv/bin:$PATH
python=$(command -v python || command -v python3) || fail "there is no Python; bash scripts/setup.sh says what to do"
size=${size:-paper}
out=${out:-runs/${name/_cifar10/}-$size}
out=${out#"$ROOT"/}
if [ -z "$results" ]; then results=results; [ "$size" != smoke ] || results=$out; fi
[ -n "$dry" ] || mkdir -p "$results"
settings=(data="$data" results="$results")
if [ -n "$imagenet" ]; then settings+=(imagenet=imagenet "files=--data $(printf %q "$imagenet")"); fi
if [ -n "$trainfile$valfile" ]; then
    settings+=("files=--trainfile $(printf %q "$trainfile") --valfile $(printf %q "$valfile")")
    if grep -q '"imagenet":' "$plan"; then settings+=(imagenet=imagenet); fi
fi
# shellcheck disable=SC2086  # lists of words on purpose
exec "$python" sweep.py "scripts/plans/$name.json" --size "$size" --out "$out" \
    --set "${settings[@]}" ${seeds:+--seeds ${seeds//,/ }} ${only:+--only ${only//,/ }} \
    ${jobs:+--jobs "$jobs"} ${executor:+--executor "$executor"} ${cluster:+--cluster $cluster} ${ranks:+--ranks "$ranks"} $dry
