# Sourced first by the batch scripts: the site's settings, threads, and who may end the script.

# Slurm runs a copy of the batch script, so its own place says nothing; slurm/submit.sh passes the repository's.
QUACK_SITE=${QUACK_SITE:-$QUACK_ROOT/slurm/site.sh}
set +u # what environments and modules source reads variables that may be unset
source "$QUACK_SITE"
set -u
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since 22.05 srun takes this only from its own variable.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# A preemption sends SIGTERM to this shell too, and with it gone slurm would not let the ranks finish their save.
trap : TERM
# This job by the name that means it alone: the last task of an array has the array's own number.
JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
fi
echo "job ${SLURM_JOB_ID} on ${SLURM_JOB_NODELIST}, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"

# One task per rank: signals reach every rank, and when one rank dies the others do not wait. With QUACK_REQUEUE=1, a job
# whose time is up is queued again, and one that breaks down after a while (a hung collective that the watchdog ended, a
# GPU that fell off): it continues from its last checkpoint. Not so a mistake, a second Ctrl-C (130), what breaks down at
# once or has been restarted often (slurm/site.sh).
run_ranks() {
  local code=0 said
  make_notice
  SECONDS=0
  # Nothing stands between srun and the program: under proctrack/cgroup slurm signals only its own child.
  srun --kill-on-bad-exit=1 "${PYTHON[@]}" "$@" || code=$?
  said=$(echo "$QUACK_JOB".*)
  rm -f "$QUACK_JOB" "$QUACK_JOB".*
  case $said in
    *.mistake) return 2 ;;
    *.time_is_up)
      if [[ ${QUACK_REQUEUE:-} == 1 ]]; then
        requeue "time is up"
        return 1
      fi
      ;;
  esac
  # Where a partition has a GraceTime, the ranks get SIGTERM when it begins; slurm itself requeues only what is still
  # there when it ends. 143: a program that has no answer to SIGTERM, or had none yet.
  if [[ $said == *.terminated || $code == 143 ]] && is_in_grace; then
    requeue "preempted"
    return 1
  fi
  if [[ ${QUACK_REQUEUE:-} == 1 && $code != 0 && $code != 130 ]] &&
    ((SECONDS >= ${RETRY_AFTER_S:-600} && ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
    requeue "exit code $code after $SECONDS s"
  fi
  return "$code"
}

# Once srun has ended the other ranks of one that failed, its exit code says only that. So a rank renames the file
# QUACK_JOB to tell why it ends; renaming works on a full disk, too.
make_notice() {
  export QUACK_JOB=$PWD/.quack_job_$SLURM_JOB_ID
  # A start that was cut off may have left the last word of its own.
  rm -f "$QUACK_JOB" "$QUACK_JOB".*
  if { : >"$QUACK_JOB"; } 2>/dev/null; then
    return
  fi
  # Seen by the ranks of this node alone, but the first is among them, who tells of signals.
  if ! QUACK_JOB=$(mktemp "${TMPDIR:-/tmp}/quack_job_XXXXXX" 2>/dev/null); then
    echo "error: neither $PWD nor TMPDIR=${TMPDIR:-/tmp} can be written to: submit from another directory, or export" \
      "TMPDIR in $QUACK_SITE" >&2
    exit 2
  fi
}

# Whether this job is preempted and slurm has not begun to end it: after scancel, or a preemption without grace, it is
# completing. What slurm does not say may be asked for again: the answer is worth the rest of the run.
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

# Queue this very job again; returns only where that cannot be done.
requeue() {
  local state tries
  echo "$1: requeueing job $JOB, which continues from its last checkpoint"
  # A busy controller may not answer at first.
  for ((tries = 0; tries < 5; tries++)); do
    state=$(squeue -h -j "$JOB" -o %T) || state=""
    # Nobody wants a job back that was canceled, or that slurm requeues by itself.
    [[ -z $state || $state == RUNNING ]] || break
    if [[ -n $state ]] && scontrol requeue "$JOB"; then
      # Slurm ends this script now; one that ended by itself would count as a failed job.
      trap - TERM
      sleep 300
    fi
    sleep 10
  done
  echo "error: job $JOB (${state:-of unknown state}) is not requeued; submit it again to continue" >&2
}
