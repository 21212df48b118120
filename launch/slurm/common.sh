# shellcheck shell=bash
# What the job scripts of this folder share. They source it from the project's root, where sbatch was called.
#
#   DS_CONFIG=FILE                     another DeepSpeed JSON than the script's; empty: none, for --engine fsdp2 or plain
#   LAUNCHER=srun|torchrun|deepspeed   who starts the ranks (default srun); launch/README.md says what differs
#   APPTAINER_IMAGE=diffdpo.sif        run inside it with apptainer
#   PYXIS_IMAGE=registry#diffdpo:gpu   run inside it with pyxis

set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not meet
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}} # srun has not read the job's since 22.05
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export PYTHONUNBUFFERED=1

pyxis=()
inside=()
if [ -n "${PYXIS_IMAGE:-}" ]; then
    pyxis=("--container-image=$PYXIS_IMAGE" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
elif [ -n "${APPTAINER_IMAGE:-}" ]; then
    inside=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$APPTAINER_IMAGE")
fi

# engine_flags DEFAULT FLAG...: leaves in the array "engine" the DeepSpeed JSON that the run takes, unless FLAGs name an engine.
# shellcheck disable=SC2034  # the scripts use "engine"
engine_flags() {
    local json=${DS_CONFIG-$1} word
    shift
    engine=(--ds_config "$json")
    for word in "$@"; do
        case $word in --engine | --engine=*) engine=() ;; esac
    done
    if [ -z "$json" ]; then engine=(); fi
}

# start SCRIPT FLAG...: a job step with all ranks of the job. One task a rank; of torchrun and deepspeed one a node.
start() {
    local ranks_a_node=$((SLURM_NTASKS / SLURM_NNODES))
    local one_a_node=("--ntasks=$SLURM_NNODES" --ntasks-per-node=1 "--cpus-per-task=$((ranks_a_node * ${SLURM_CPUS_PER_TASK:-1}))")
    case ${LAUNCHER:-srun} in
        srun)
            exec srun --kill-on-bad-exit=1 "${pyxis[@]}" launch/slurm/rank.sh "${inside[@]}" python "$@"
            ;;
        torchrun)
            exec srun --kill-on-bad-exit=1 "${one_a_node[@]}" "${pyxis[@]}" "${inside[@]}" torchrun \
                --nnodes "$SLURM_NNODES" --nproc_per_node "$ranks_a_node" --rdzv_id "$SLURM_JOB_ID" \
                --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --shutdown_timeout 110 "$@"
            ;;
        deepspeed)
            local hostfile=outputs/slurm-$SLURM_JOB_ID.hosts
            mkdir -p outputs
            scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks_a_node/" >"$hostfile"
            # shellcheck disable=SC2016  # each node's own SLURM_NODEID
            exec srun --kill-on-bad-exit=1 "${one_a_node[@]}" "${pyxis[@]}" "${inside[@]}" bash -c \
                'exec deepspeed --hostfile "$0" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"' \
                "$hostfile" "$@"
            ;;
        *)
            echo "error: LAUNCHER is ${LAUNCHER}; allowed: srun, torchrun, deepspeed" >&2
            exit 2
            ;;
    esac
}

# until_stopped COMMAND...: run it, hand SIGTERM on to it, and put the job into the queue again if it was stopped on the
# way (exit code 3, or SIGTERM came: torchrun and deepspeed, sent it, keep the code of their ranks to themselves), or hung
# (exit code 4; three times at most: the next nodes may be better ones). A job that was cancelled is not RUNNING any more and stays away.
until_stopped() {
    local code step signals=0 seen
    trap 'signals=$((signals + 1)); kill -TERM "$step" 2>/dev/null || true' TERM
    ("$@") &
    step=$!
    while :; do
        seen=$signals code=0
        wait "$step" || code=$?
        if [ "$signals" -eq "$seen" ]; then break; fi # else a signal ended `wait`, not the step
    done
    trap - TERM
    local again=0
    if [ "$code" -eq 3 ] || [ "$signals" -gt 0 ]; then again=1; fi
    if [ "$code" -eq 4 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then again=1; fi
    if [ "$code" -ne 0 ] && [ "$again" -eq 1 ]; then
        if scontrol show job -o "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
            echo "stopped with exit code $code; the job goes back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    return "$code"
}
