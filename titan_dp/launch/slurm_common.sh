# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by slurm.sbatch and slurm_array.sbatch, which set `python`: what both need, and when a job is tried again.
# The invariant: a job is requeued only if running it again can help. Exit code 2, the user's mistake, never is.

nproc=${NPROC:-${SLURM_GPUS_ON_NODE:-1}} # processes a node
# The id to requeue. Of an array's elements one has the array's own id as SLURM_JOB_ID: requeueing that would requeue them all.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}

mistake() {
    echo "error: $*" >&2
    exit 2
}

say() {
    echo "$(date '+%F %T') job $job: $*"
}

# Back into the queue, to resume from the newest healthy checkpoint. Returns only if the cluster refuses.
requeue() {
    say "$1: requeueing"
    scontrol requeue "$job" && exec sleep infinity # until SLURM ends what runs here, which is part of requeueing
}

# With a grace time the preempted job's processes end by themselves, which looks like a failure but for this.
preempted() {
    scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'
}

# train COMMAND...: run it and exit with its code, or requeue this job.
train() {
    local code child='' near_limit='' failures=outputs/slurm/$job.failures
    # SLURM sends USR1 two minutes before the time limit (--signal). Handed on, it makes the ranks save and leave, or be ended
    # after a minute (launch/torchrun.py): a run longer than the limit goes on in the next slot.
    trap 'near_limit=1; [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null' USR1
    "$@" &
    child=$!
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # a signal ends `wait`, not the command
    done
    # srun reports the highest code of all nodes: 137 if it had to kill one after another had left with the user's mistake.
    if ((code > 2)) && [[ -n ${logs:-} ]] && grep -qsx 2 "$logs"/node-*/exit_code; then
        code=2
    fi
    if ((code == 0 || code == 2)); then
        say "ended with exit code $code"
    elif [[ $near_limit ]] && ((code == 75 || code > 128)); then # above: a node ended by srun when another was done
        requeue "the time limit is near" || true
    elif preempted; then
        requeue "preempted" || true
    elif ((code == 75)); then
        requeue "stopped by a signal" || true
    else
        mkdir -p outputs/slurm
        say "exit code $code" >>"$failures" # not SLURM_RESTART_COUNT: that counts preemptions and time limits as well
        if (($(wc -l <"$failures") <= ${RETRIES:-2})); then
            requeue "failed with exit code $code, retry $(wc -l <"$failures") of ${RETRIES:-2}" || true
        else
            say "failed with exit code $code, no retry left of ${RETRIES:-2}: given up"
        fi
    fi
    exit "$code"
}

[[ -n $job ]] || mistake "this is a job script: $usage"
