#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A table on Slurm: every element of an array is a worker that takes the next free job of one plan, so that a plan of
# any length is done by as many nodes as there are elements. Submit it in the project's root:
#
#   sbatch --array=0-7 [--gpus-per-node M] [--partition P] [--time T] scripts/slurm/table.sh PLAN [FLAGS...]
#
#   such as: sbatch --array=0-7 scripts/slurm/table.sh table2_imagenet --size paper --seeds 0 1 2 --data DIR
#
#   PLAN, FLAGS     as in bash scripts/run_plan.sh PLAN [FLAGS...]
#   RANKS_PER_NODE  processes of each search and training (default: one for each GPU)
#
# The workers share the folder of the plan's runs, which must lie on a disk that all nodes see. Before its time is over
# a worker's run saves, and the worker is queued again.
#SBATCH --job-name=table
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.log
set -euo pipefail

HERE=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/scripts/slurm}
# shellcheck source=scripts/slurm/common.sh
. "${HERE:-$(dirname "${BASH_SOURCE[0]}")}/common.sh"
case ${1-} in -h | --help) show_help "${BASH_SOURCE[0]}" ;; esac
enter table.sh
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=50
until_end bash scripts/run_plan.sh "$@" --ranks "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
