# Sourced first by the batch scripts: the site's settings, threads, and who may end the script.

# Slurm runs a copy of the batch script, so its own place says nothing; slurm/submit.sh passes the repository's.
QUACK_SITE=${QUACK_SITE:-$QUACK_ROOT/slurm/site.sh}
source "$QUACK_SITE"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since 22.05 srun takes this only from its own variable.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# A preemption sends SIGTERM to this shell too, and with it gone slurm would not let the ranks finish their save.
trap : TERM
echo "job ${SLURM_JOB_ID} on ${SLURM_JOB_NODELIST}, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"

# One task per rank: signals reach every rank, exit codes pass through, and when one rank dies the others do not wait.
# With QUACK_REQUEUE=1, a job that breaks down after a while (a hung collective that the watchdog ended, a GPU that fell
# off) is queued again: it continues from its last checkpoint. Not so a mistake (2), a second Ctrl-C (130), what breaks
# at once or has been restarted often (slurm/site.sh), and what slurm itself is ending: a job that was canceled. The
# code does not tell the last: srun returns the highest, and the ranks that it ends after a breakdown die of a signal.
run_ranks() {
  local code=0 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
  SECONDS=0
  srun --kill-on-bad-exit=1 "${PYTHON[@]}" "$@" || code=$?
  case $code in 0 | 2 | 130) return "$code" ;; esac
  if [[ ${QUACK_REQUEUE:-} == 1 ]] && ((SECONDS >= ${RETRY_AFTER_S:-600} &&
    ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})) && [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
    echo "exit code $code after $SECONDS s: requeueing job ${job:=$SLURM_JOB_ID}, which continues from its last checkpoint"
    if scontrol requeue "$job"; then
      # Slurm ends this script now; one that ended by itself would count as a failed job.
      trap - TERM
      sleep 300
    fi
    echo "error: job $job is not requeued; submit it again to continue" >&2
  fi
  return "$code"
}
