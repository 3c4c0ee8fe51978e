# Sourced first by the batch scripts: the site's settings, threads, and run_ranks.

# Slurm runs a copy of the batch script in another directory; quack-lm submit exports this one's as QUACK_SLURM_DIR.
QUACK_SITE=${QUACK_SITE:-$QUACK_SLURM_DIR/site.sh}
set +u # activation scripts and modules read unset variables
source "$QUACK_SITE"
set -u
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since slurm 22.05, srun reads this only from its own variable.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# A preemption sends SIGTERM to this shell too. If the shell ended, slurm would end the ranks before they have saved.
trap : TERM
# The name of this job alone: the last task of an array has the same job number as the array.
JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
fi
echo "job ${SLURM_JOB_ID} on ${SLURM_JOB_NODELIST}, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"

# One task per rank: signals reach every rank, and when one rank dies, srun ends the others. With QUACK_REQUEUE=1, the
# job is requeued before its time limit, and after a failure (a hung collective that the watchdog ended, a lost GPU); it
# continues from its last checkpoint. Not requeued: a user's error, a second Ctrl-C (130), a failure soon after the
# start, a job with too many restarts (RETRY_AFTER_S and MAX_RESTARTS in site.sh).
run_ranks() {
  local code=0 told
  make_notice
  SECONDS=0
  # srun starts the program itself: under proctrack/cgroup slurm signals only its direct child.
  srun --kill-on-bad-exit=1 "${PYTHON[@]}" "$@" || code=$?
  told=$(echo "$QUACK_JOB".*)
  rm -f "$QUACK_JOB" "$QUACK_JOB".*
  case $told in
    *.user_error) return 2 ;;
    *.time_is_up)
      if [[ ${QUACK_REQUEUE:-} == 1 ]]; then
        requeue "time is up"
        return 1
      fi
      ;;
  esac
  # On a partition with a GraceTime, the ranks get SIGTERM when it begins, and slurm requeues only jobs that still run
  # when it ends. 143: a program without a SIGTERM handler, or before it has installed one.
  if [[ $told == *.terminated || $code == 143 ]] && is_in_grace; then
    requeue "preempted"
    return 1
  fi
  if [[ ${QUACK_REQUEUE:-} == 1 && $code != 0 && $code != 130 ]] &&
    ((SECONDS >= ${RETRY_AFTER_S:-600} && ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
    requeue "exit code $code after $SECONDS s"
  fi
  return "$code"
}

# When one rank fails, srun ends the others, and its exit code shows only that. So a rank renames the file QUACK_JOB to
# QUACK_JOB.<reason>; a rename works on a full disk, too.
make_notice() {
  export QUACK_JOB=$PWD/.quack_job_$SLURM_JOB_ID
  # An interrupted earlier start of this job may have left one.
  rm -f "$QUACK_JOB" "$QUACK_JOB".*
  if { : >"$QUACK_JOB"; } 2>/dev/null; then
    return
  fi
  # Only the ranks of this node see it, but rank 0, which reports signals, is one of them.
  if ! QUACK_JOB=$(mktemp "${TMPDIR:-/tmp}/quack_job_XXXXXX" 2>/dev/null); then
    echo "error: neither $PWD nor TMPDIR=${TMPDIR:-/tmp} is writable: submit from another directory, or export" \
      "TMPDIR in $QUACK_SITE" >&2
    exit 2
  fi
}

# Whether this job is preempted and slurm has not begun to end it: after scancel, or a preemption without GraceTime, its
# state is COMPLETING. Retried, because without an answer the rest of the run is lost.
is_in_grace() {
  local shown tries
  for ((tries = 0; tries < 5; tries++)); do
    if shown=$(scontrol show job -o "$JOB"); then
      [[ $shown == *" JobState=RUNNING "* && $shown == *" PreemptTime="* && $shown != *" PreemptTime=None "* ]]
      return
    fi
    sleep 10
  done
  return 1
}

# Requeue this job; returns only on failure.
requeue() {
  local state tries
  echo "$1: requeueing job $JOB, which continues from its last checkpoint"
  # A busy controller may not answer at first.
  for ((tries = 0; tries < 5; tries++)); do
    state=$(squeue -h -j "$JOB" -o %T) || state=""
    # Do not requeue a canceled job, or one that slurm requeues itself.
    [[ -z $state || $state == RUNNING ]] || break
    if [[ -n $state ]] && scontrol requeue "$JOB"; then
      # Wait until slurm ends this script: if it ended first, the job would count as failed.
      trap - TERM
      sleep 300
    fi
    sleep 10
  done
  echo "error: job $JOB (${state:-of unknown state}) is not requeued; submit it again to continue" >&2
}
