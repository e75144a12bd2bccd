#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The figures on digits in README.md and docs/results.md: the quickstart over several seeds, and the share of
# parameter-free operations that a search finds at three weights of the cost in the architecture step.
#
#   bash scripts/digits_study.sh [--seeds 0 1 2] [--out DIR] [--only quickstart|share]
#
# Writes results/quickstart.csv and results/parameter_free_share.csv. Stopped, the same command goes on.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
seeds="0 1 2"
out=runs
only=both
fail() { printf 'digits_study: %s\n' "$*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --seeds | --out | --only)
            case ${2--} in -*) fail "$1 needs a value" ;; esac
            flag=${1#--} value=$2
            shift 2
            # --seeds: all words until the next flag
            while [ "$flag" = seeds ] && [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do value+=" $1"; shift; done
            declare "$flag=$value" ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
done
[[ $only =~ ^(both|quickstart|share)$ ]] || fail "--only: '$only' is neither quickstart nor share"

bash "$ROOT/scripts/setup.sh"
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
mkdir -p results

if [ "$only" != share ]; then
    for seed in $seeds; do bash scripts/quickstart.sh --seed "$seed" --out "$out/quickstart"; done
    python report.py "$out"/quickstart/s*/{found,pcdarts-fp32,pcdarts-2bit,pcdarts-4bit}
    python report.py "$out"/quickstart/s*/{found,pcdarts-fp32,pcdarts-2bit,pcdarts-4bit} --format csv --out results/quickstart.csv
fi

if [ "$only" != quickstart ]; then
    # 1e-5 is the default: a tenth of --complexity-decay 1e-4
    # shellcheck disable=SC2086  # a list on purpose
    python sweep.py --grid arch-complexity-decay=0,1e-5,1e-4 --seeds $seeds --out "$out/share" -- \
        python qdarts/search.py --preset quickstart
    python - "$out"/share/s*/arch-complexity-decay-* > results/parameter_free_share.csv <<'PY'
import json, sys
from pathlib import Path

print("arch_complexity_decay,seed,parameter_free_share,exact_bitops,exact_bitops_quantized,valid_top1")
folders = [(float(path.name.removeprefix("arch-complexity-decay-")), int(path.parent.name[1:]), path) for path in map(Path, sys.argv[1:])]
for decay, seed, folder in sorted(folders):
    result = json.loads((folder / "result.json").read_text())
    figures = [result["parameter_free_share"], result["exact_bitops"], result["exact_bitops_quantized"], result["metrics"]["valid_top1"]]
    print(f"{decay:g}", seed, *(f"{f:.6g}" for f in figures), sep=",")
PY
    cat results/parameter_free_share.csv
fi
