#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the batch scripts of this folder share; they source it, it is not submitted itself.
#
# A program saves at its next step after SIGUSR2, which Slurm sends to the batch script some minutes before the job's
# time is over (#SBATCH --signal=B:USR2@180) and, where the site says so, before it is preempted. The script hands the
# signal on, waits for the end, and queues itself again; --resume auto then goes on where the run was.
set -euo pipefail

say() { printf '%s: %s\n' "$(date -u +%FT%TZ)" "$*"; }
fail() { printf '%s: %s\n' "${SLURM_JOB_NAME:-slurm}" "$*" >&2; exit 2; }

# show_help FILE: the comment at its top.
show_help() { sed -n '4,${/^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p}' "$1"; exit 0; }

# enter SCRIPT: the project's root, its Python in front.
enter() {
    [ -n "${SLURM_JOB_ID-}" ] || fail "is for Slurm: sbatch [options] scripts/slurm/$1 ... (--help says more)"
    cd "${SLURM_SUBMIT_DIR:-$PWD}"
    [ -f scripts/setup.sh ] || fail "submit it in the project's root, not in $PWD"
    export PATH=$PWD/.venv/bin:$PATH
}

# until_end COMMAND...: run it in the background; its exit code, or after a signal: queue this job again, and end.
until_end() {
    local code=0 signal=""
    "$@" &
    local child=$!
    trap 'signal=USR2; say "SIGUSR2: the run saves and ends"; kill -USR2 $child 2>/dev/null || true' USR2
    # A trap interrupts wait: the child's own end is asked for again.
    while :; do
        code=0
        wait "$child" || code=$?
        if ! kill -0 "$child" 2>/dev/null; then break; fi
    done
    trap - USR2
    if [ -n "$signal" ] && [ "$code" != 0 ]; then
        say "queued again (exit code $code, restarts so far: ${SLURM_RESTART_COUNT:-0})"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    return "$code"
}

# run_ranks PROGRAM [FLAGS...]: torchrun on every node, a process for each GPU (RANKS_PER_NODE says otherwise).
run_ranks() {
    [ $# -gt 0 ] || fail "which program? such as qdarts/search.py --dataset imagenet"
    local program=$1 ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} nodes=${SLURM_JOB_NUM_NODES:-1} head=localhost
    shift
    [ -f "$program" ] || fail "there is no $program in $PWD"
    # One folder over all restarts, so that every one of them goes on in it.
    case " $* " in *" --save "* | *" --save="*) ;; *) set -- "$@" --save "runs/slurm-$SLURM_JOB_ID" ;; esac
    case " $* " in *" --resume "* | *" --resume="*) ;; *) set -- "$@" --resume auto ;; esac
    if [ "$nodes" -gt 1 ]; then head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p); fi
    # What torchrun hands on, and how long it waits for the checkpoint (seconds).
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
    say "$nodes x $ranks processes: $program $*"
    until_end srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        python -m torch.distributed.run --nnodes="$nodes" --nproc_per_node="$ranks" --max-restarts="${MAX_RESTARTS:-3}" \
        --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
        "$program" "$@"
}
