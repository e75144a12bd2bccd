#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A search on Slurm, by torchrun on every node. Submit it in the project's root:
#
#   sbatch [--nodes N] [--gpus-per-node M] [--partition P] [--time T] scripts/slurm/search.sh PROGRAM [FLAGS...]
#
#   such as: sbatch --nodes 2 scripts/slurm/search.sh qdarts/search.py --dataset imagenet --trainfile train.ffcv
#
#   RANKS_PER_NODE  processes on a node (default: one for each GPU)
#   MAX_RESTARTS    how often torchrun starts again after a process has died (default 3)
#
# Before its time is over the run saves, ends and is queued again; the same folder goes on (--save, else
# runs/slurm-JOB). python PROGRAM ... --plan --world-size N --gpus-per-node M says beforehand what to expect.
#SBATCH --job-name=search
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

HERE=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/scripts/slurm}
# shellcheck source=scripts/slurm/common.sh
. "${HERE:-$(dirname "${BASH_SOURCE[0]}")}/common.sh"
case ${1-} in -h | --help) show_help "${BASH_SOURCE[0]}" ;; esac
enter search.sh
run_ranks "$@"
